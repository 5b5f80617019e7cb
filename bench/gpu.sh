#!/usr/bin/env bash
# Everything that a GPU can tell, in one go: build, tests, benchmark, sanitizer; at the end the parts and the table.
#   bench/gpu.sh [FOLDER]              results in FOLDER (default: $OUT, else build/gpu); no network, under 10 minutes
#   DEVICE=cpu bench/gpu.sh [FOLDER]   tries the script without a GPU: what needs one fails, the rest is tiny
# Needs torch, nvcc, cmake, ninja, pybind11, scikit-build-core, pytest, hypothesis; uses pytest-xdist where it is.
# Every part has a time limit; one that fails is reported, and the next one runs. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
site=$PWD/build/gpu-site
export PYTHONPATH=$site:$PWD/bench:$PWD/tests/cuda PYTHONUNBUFFERED=1
pytest=("$python" -P -m pytest -q --tb=short -p no:cacheprovider)

build() {
  local cuda=(-Ccmake.define.FASTCOMPAT_CUDA=ON -Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native)
  [ "$device" = cpu ] && cuda=(-Ccmake.define.FASTCOMPAT_CUDA=OFF)
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) "$python" -m pip install -q --no-build-isolation --no-deps --no-index --upgrade \
    --target "$site" "${cuda[@]}" . && "$python" -P -c "import fastcompat; print(fastcompat.build_info())"
}
info() { "$python" -P -c "from fastcompat.cli import main; main()" info; }
gpu_tests() {
  local left_out=()
  [ "$device" = cpu ] && left_out=(--ignore tests/cuda/test_device.py)
  "${pytest[@]}" tests/cuda --device "$device" "${left_out[@]}"
}
benchmark() { "$python" -P bench/gpu.py "$results/gpu.json" --device "$device" --seconds 210; }
# Each tensor in an allocation of its own, so that the sanitizer sees its end.
sanitizer() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 20 \
    "${pytest[@]}" tests/cuda/test_public_functions.py --device "$device" -k "bfloat16 and not evaluation"
}
engine_tests() {
  local how=()
  "$python" -c "import xdist" 2> /dev/null && how=(-n 8)
  [ "$device" = cpu ] && how+=(--emulated build/emulated)
  "${pytest[@]}" -p reroute tests/engine --ignore tests/engine/test_compile.py "${how[@]}"
}

if [ "${1-}" = --part ]; then
  results=$2
  "${@:3}"
  exit
fi
results=${1:-${OUT:-build/gpu}}
mkdir -p "$results"
: > "$results/log.txt"
: > "$results/parts.txt"
everything=570 # seconds

part() { # SECONDS NAME [ARGUMENT]: at most so long, and never past the end of everything
  local limit=$1 start=$SECONDS status
  [ $((everything - SECONDS)) -lt "$limit" ] && limit=$((everything - SECONDS))
  shift
  if [ "$limit" -le 5 ]; then
    printf '%-20s no time left\n' "$*" | tee -a "$results/parts.txt"
    return
  fi
  timeout --kill-after=5 "$limit" "$0" --part "$results" "$@" > "$results/part.txt" 2>&1
  case $? in 0) status=ok ;; 124 | 137) status=stopped ;; *) status=FAILED ;; esac
  { printf '\n=== %s\n' "$*"; cat "$results/part.txt"; } >> "$results/log.txt"
  printf '%-20s %-8s %4d s  %s\n' "$*" "$status" $((SECONDS - start)) \
    "$(grep -v '^ *$' "$results/part.txt" | tail -1 | cut -c1-150)" | tee -a "$results/parts.txt"
}
part 170 build
part 40 info
part 130 gpu_tests
part 230 benchmark
part 70 sanitizer memcheck
part 70 sanitizer racecheck
part 70 engine_tests
rm -f "$results/part.txt"

printf '\n'
[ -f "$results/gpu.json" ] && "$python" -P bench/gpu.py "$results/gpu.json" --table
printf '\n'
cat "$results/parts.txt"
! grep -qv ' ok ' "$results/parts.txt"
