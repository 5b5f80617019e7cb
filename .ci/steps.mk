# The steps of .ci/run: behind a name's colon stands what must be done before.
SHELL := .ci/step
.SHELLFLAGS = $@
.ONESHELL:
.SILENT:
steps := lint types cuda-choice cuda-wheel wheel-without-gpu sanitize threads mutants clang aarch64 device-tests \
         machine-code tests emulated-gpu-80 emulated-gpu-90 failures emulated-kernels emulated-simd fuzz demo \
         demo-omniglot experiment bench python-3.10 python-3.13
.PHONY: all emulated-gpu $(steps)
# The order of start, where nothing else decides: what others wait for, then the longest.
all: tests device-tests cuda-wheel $(steps)

no_warnings := CXXFLAGS=-Werror
project := -G Ninja -DSKBUILD_PROJECT_NAME=fastcompat -DSKBUILD_PROJECT_VERSION=0 -DFASTCOMPAT_CUDA=OFF
# The commands of README.md as they stand there. The wheel of `cuda-wheel` has the CUDA kernels; these leave them out.
readme = command=$$(sed -n '/<!-- $(1) -->/,/^```$$/p' README.md | sed '1,2d;$$d'); [ "$$command" ]; \
         export SKBUILD_CMAKE_DEFINE=FASTCOMPAT_CUDA=OFF $(no_warnings); echo "$$command"; eval "$$command"
# PATH without nvcc: every folder that has it is replaced by links to everything else in it.
hide_nvcc := hidden=; while read -rd : folder; do if [ -e "$$folder/nvcc" ]; then shadow=$$(mktemp -d); \
             ln -s "$$folder"/* "$$shadow"; rm "$$shadow/nvcc"; folder=$$shadow; fi; hidden+=$$folder:; done <<< "$$PATH:"; \
             export PATH=$${hidden%:}

lint:
	ruff check .
	ruff format --check .
	git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh' | xargs clang-format --dry-run --Werror

# The package, and a user's program.
types: tests
	mypy --python-executable .venv-test/bin/python
	basedpyright --pythonpath .venv-test/bin/python tests/typing

# What the build does where nvcc is missing, too old, or refuses.
cuda-choice: tests
	.venv-test/bin/pytest tests/packaging

# Compiled by the nvcc of PyPI, on a machine that shows none.
cuda-wheel:
	$(hide_nvcc)
	$(no_warnings) FASTCOMPAT_NVCC=pypi pip wheel -q --no-deps -w build/wheel .

# The same environment as for the tests, but for the package itself.
wheel-without-gpu: cuda-wheel tests
	python3 -m venv .venv-wheel
	.venv-test/bin/python -c 'import site; print(site.getsitepackages()[0])' > "$$(echo .venv-wheel/lib/python*/site-packages)/tests.pth"
	.venv-wheel/bin/pip install -q --no-deps --force-reinstall --ignore-installed build/wheel/*.whl
	.venv-wheel/bin/fastcompat info
	best=$$(cd build && ../.venv-wheel/bin/python -c 'import fastcompat; assert fastcompat.build_info()["cuda"]
	assert "no NVIDIA driver" in fastcompat._native._C.cuda.unusable(0); print(fastcompat.build_info()["simd"])')
	.venv-wheel/bin/python .venv-test/bin/pytest tests/package/test_install.py
	.venv-wheel/bin/python .venv-test/bin/pytest tests/engine/test_topk.py tests/engine/test_softmax_stats.py -k "$$best"

# AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	cmake -S . -B build/sanitize $(project) -DCMAKE_BUILD_TYPE=None -DFASTCOMPAT_SANITIZE=ON > /dev/null
	cmake --build build/sanitize > /dev/null
	build/sanitize/native_tests
	tests/native/headers.sh

threads:
	.ci/thread-sanitizer

# Faults planted in the kernels, which the self-check must find.
mutants: tests
	.ci/mutants .venv-test/bin/python

# Another compiler: no warning, and the native tests.
clang:
	if ! command -v clang++ > /dev/null; then echo "NOT RUN: there is no clang++"; exit; fi
	cmake -S . -B build/clang $(project) -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER=clang++ \
	  -DCMAKE_CXX_FLAGS="-O1 -Werror" -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" > /dev/null
	cmake --build build/clang --target engine
	clang++ -std=c++17 -O1 -Icsrc tests/native/test_engine.cpp build/clang/libengine.a -pthread -ldl -o build/clang/native_tests
	build/clang/native_tests

# The generic kernels on another processor.
aarch64:
	if ! command -v aarch64-linux-gnu-g++ qemu-aarch64-static > /dev/null; then echo "NOT RUN: there is no aarch64 compiler, or no qemu"; exit; fi
	mkdir -p build/aarch64
	aarch64-linux-gnu-g++ -std=c++17 -O1 -Wall -Wextra -Werror -Wno-psabi -ffp-contract=off -Icsrc -static -pthread \
	  $$(ls csrc/cpu/*.cpp | grep -v 'isa_[^g]') tests/native/test_engine.cpp -ldl -o build/aarch64/native_tests
	qemu-aarch64-static build/aarch64/native_tests

# The extension compiles and loads there, and the package is valid. PyPI's torch for these Pythons is the one with CUDA
# (797 MB and more), so that their tests run in .github/workflows alone; so do those of the oldest torch.
python-3.10 python-3.13: python-%:
	echo "NOT RUN: the tests on Python $* and on torch 2.4, whose packages are too large: see .github/workflows/ci.yml"
	python=$$(ls -d ~/.pyenv/versions/$*.*/bin/python$* 2> /dev/null | tail -1 || true)
	python=$${python:-$$(command -v python$* || true)}
	if [ -z "$$python" ]; then echo "NOT RUN: there is no Python $*"; exit; fi
	"$$python" -m venv build/python-$*
	$(no_warnings) SKBUILD_CMAKE_DEFINE=FASTCOMPAT_CUDA=OFF build/python-$*/bin/pip install -q --no-deps .
	cd build
	python-$*/bin/python -W error -m compileall -q ../fastcompat
	python-$*/bin/python -c 'import importlib.util as util, sysconfig
	module = sysconfig.get_path("platlib") + "/fastcompat/_C" + sysconfig.get_config_var("EXT_SUFFIX")
	spec = util.spec_from_file_location("_C", module)
	module = util.module_from_spec(spec); spec.loader.exec_module(module)
	print(module.build()["version"], module.simd_levels())'

# CUDA kernels on the CPU: every schedule, sanitizers, mutants.
device-tests:
	tests/emulator/run.sh plain address thread

# CUDA kernels: machine code for every architecture.
machine-code: cuda-wheel emulated-gpu
	WHEEL=$$(ls build/wheel/*.whl) tests/emulator/run.sh report

tests:
	$(call readme,test-command)

# tests/engine through the CUDA engine on an emulated GPU. (One after the other: these steps share build/emulator.)
emulated-gpu: device-tests
	cmake -S tests/emulator -B build/emulator -Dpybind11_DIR="$$(python -m pybind11 --cmakedir)" > /dev/null
	cmake --build build/emulator --target emulated_gpu > /dev/null

emulated-gpu-80 emulated-gpu-90: emulated-gpu-%: emulated-gpu tests
	PYTHONPATH=tests/gpu OMP_NUM_THREADS=1 .venv-test/bin/pytest -p reroute --emulated $* \
	  tests/engine/test_softmax_stats.py tests/engine/test_gradients.py tests/engine/test_topk.py

failures: emulated-gpu tests
	PYTHONPATH=tests/gpu .venv-test/bin/pytest tests/gpu/test_failures.py

# AVX-512 and AMX instructions written in AVX2, against what they are said to do.
emulated-kernels:
	cmake -S . -B build/emulation $(project) -DCMAKE_BUILD_TYPE=None -DFASTCOMPAT_SANITIZE=ON -DFASTCOMPAT_EMULATE=ON > /dev/null
	cmake --build build/emulation --target emulation_tests > /dev/null
	build/emulation/emulation_tests

# tests/engine through the AVX-512 and AMX kernels, on a processor that does not have them.
emulated-simd: tests
	missing=$$(cd build && ../.venv-test/bin/python -c 'import fastcompat; built = fastcompat.build_info()
	print(" or ".join(x for x in built["simd_built"] if x not in built["simd_usable"]))')
	if [ -z "$$missing" ]; then echo "the step tests has run every instruction set on this processor itself"; exit; fi
	export SKBUILD_CMAKE_DEFINE="FASTCOMPAT_CUDA=OFF;FASTCOMPAT_EMULATE=ON"
	pip install -q --no-deps --target build/emulated-simd/site --upgrade -Cbuild-dir=build/emulated-simd .
	export PYTHONPATH=build/emulated-simd/site OMP_NUM_THREADS=1
	.venv-test/bin/pytest -k "$$missing" tests/engine/test_softmax_stats.py tests/engine/test_gradients.py \
	  tests/engine/test_screen.py tests/engine/test_topk.py

# Random problems, and tests under other defaults of torch.
fuzz: tests
	.ci/fuzz .venv-test/bin/pytest

demo: tests
	$(call readme,demo-command)

demo-omniglot: demo
	if [ ! -d ../shared/data/omniglot ]; then echo "NOT RUN: the demonstration on Omniglot, which is not beside this folder"; exit; fi
	.venv/bin/fastcompat demo --data ../shared/data/omniglot/images_background_small1.zip --out build/demo-omniglot

experiment: demo
	rm -rf build/upgrade
	.venv/bin/python examples/upgrade_omniglot.py --quick --out build/upgrade

bench: tests
	.venv-test/bin/pytest bench --quick --result build/bench.json
	.venv-test/bin/python bench/table.py build/bench.json
