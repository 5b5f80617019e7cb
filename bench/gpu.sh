#!/usr/bin/env bash
# Everything that a GPU can tell, in one go: build, tests, benchmark, sanitizer; at the end the parts and the table.
#   bench/gpu.sh [FOLDER]              results in FOLDER (default: $OUT, else build/gpu); no network, under 10 minutes
#   DEVICE=cpu bench/gpu.sh [FOLDER]   tries the script without a GPU: what needs one fails, the rest is tiny
# Needs Python 3.10 or newer, torch, numpy, tqdm, typer, pytest, nvcc, cmake, ninja, pybind11, scikit-build-core; engine tests that
# want more than is installed (hypothesis, scikit-learn) are left out, pytest-xdist is used where it is.
# Baselines that no machine has by itself can be brought as wheels in build/wheels (cut-cross-entropy, inf_cl, faiss-gpu-cu12).
# Every part has a time limit; one that fails is reported, and the next one runs. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
export PYTHONPATH=$site:$PWD/bench:$PWD/tests/gpu${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
pytest=("$python" -P -m pytest -q --tb=short -p no:cacheprovider)

build() {
  local missing wheel
  missing=$("$python" -c "from importlib.util import find_spec
print(*[p for p in 'torch numpy tqdm typer pytest pybind11 scikit_build_core'.split() if not find_spec(p)])")
  [ -z "$missing" ] || echo "not installed: $missing"
  mkdir -p build/gpu-device
  compile_device_tests > build/gpu-device.txt 2>&1 &
  local kernels_alone=$! status=0 cuda=(-Ccmake.define.FASTCOMPAT_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native)
  [ "$device" = cpu ] && cuda=(-Ccmake.define.FASTCOMPAT_CUDA=OFF)
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip install -q --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site" "${cuda[@]}" . && "$python" -P -c "import fastcompat; print(fastcompat.build_info())" || status=1
  for wheel in build/wheels/*.whl; do
    [ ! -e "$wheel" ] || "$python" -m pip install -q --no-deps --no-index --target "$site" "$wheel"
  done
  wait "$kernels_alone" # a failure shows in device_tests
  return $status
}
info() { "$python" -P -c "from fastcompat.commands.app import main; main()" info; }
gpu_tests() {
  local left_out=()
  [ "$device" = cpu ] && left_out=(--ignore tests/gpu/test_device.py)
  "${pytest[@]}" tests/gpu --device "$device" "${left_out[@]}"
}
# The kernels alone, as in tests/emulator but on the hardware; they compile beside the module, which takes as long.
compile_device_tests() {
  local source program kernels=()
  [ "$device" = cpu ] && return
  rm -f build/gpu-device/*
  for source in csrc/cuda/*.cu tests/emulator/test_*.cu; do
    nvcc -std=c++17 -O2 -gencode arch=compute_90a,code=sm_90a -Icsrc -Icsrc/cuda -Itests/emulator -c "$source" \
      -o "build/gpu-device/$(basename "$source" .cu).o" &
  done
  wait
  for source in csrc/cuda/*.cu; do kernels+=("build/gpu-device/$(basename "$source" .cu).o"); done
  for source in tests/emulator/test_*.cu; do
    program=build/gpu-device/$(basename "$source" .cu)
    nvcc -arch=sm_90a "$program.o" "${kernels[@]}" -o "$program" &
  done
  wait
}
device_tests() {
  local source program failed=0
  cat build/gpu-device.txt
  for source in tests/emulator/test_*.cu; do
    program=build/gpu-device/$(basename "$source" .cu)
    [ -x "$program" ] && "$program" || failed=1
  done
  return $failed
}
benchmark() { "$python" -P bench/gpu.py "$results/gpu.json" --device "$device" --seconds 170; }
# Each tensor in an allocation of its own, so that the sanitizer sees its end.
memcheck() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 --print-limit 20 \
    "${pytest[@]}" tests/gpu/test_public_functions.py --device "$device" -k "bfloat16 and not evaluation"
}
racecheck() {
  local source program failed=0
  for source in tests/emulator/test_*.cu; do
    program=build/gpu-device/$(basename "$source" .cu)
    [ -x "$program" ] && compute-sanitizer --tool racecheck --error-exitcode 9 --print-limit 20 "$program" || failed=1
  done
  return $failed
}
engine_tests() {
  local how=()
  "$python" -c "import xdist" 2> /dev/null && how=(-n 8)
  [ "$device" = cpu ] && how+=(--emulated 80)
  "${pytest[@]}" -p reroute tests/engine --ignore tests/engine/test_compile.py "${how[@]}"
}

if [ "${1-}" = --part ]; then
  results=$2
  "${@:3}"
  exit
fi
results=${1:-${OUT:-build/gpu}}
mkdir -p "$results"
rm -f "$results/gpu.json"
: > "$results/log.txt"
: > "$results/parts.txt"
everything=570 # seconds

part() { # SECONDS NAME: at most so long, and never past the end of everything
  local limit=$1 start=$SECONDS status
  [ $((everything - SECONDS)) -lt "$limit" ] && limit=$((everything - SECONDS))
  shift
  if [ "$limit" -le 5 ]; then
    printf '%-20s no time left\n' "$*" | tee -a "$results/parts.txt"
    return
  fi
  timeout --kill-after=5 "$limit" bench/gpu.sh --part "$results" "$@" > "$results/part.txt" 2>&1
  case $? in 0) status=ok ;; 124 | 137) status=stopped ;; *) status=FAILED ;; esac
  { printf '\n=== %s\n' "$*"; cat "$results/part.txt"; } >> "$results/log.txt"
  printf '%-20s %-8s %4d s  %s\n' "$*" "$status" $((SECONDS - start)) \
    "$(grep -v '^ *$' "$results/part.txt" | tail -1 | cut -c1-150)" | tee -a "$results/parts.txt"
}
part 280 build # most of it one compilation, which most parts need
part 40 info
part 130 gpu_tests
part 190 benchmark
part 70 device_tests
part 60 memcheck
part 60 racecheck
part 60 engine_tests
rm -f "$results/part.txt"

printf '\n'
[ -f "$results/gpu.json" ] && "$python" -P bench/gpu.py "$results/gpu.json" --table
printf '\n'
cat "$results/parts.txt"
! grep -qv ' ok ' "$results/parts.txt"
