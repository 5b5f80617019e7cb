#!/usr/bin/env bash
# Everything that can be said of the CUDA kernels without a GPU: device tests under all schedules and sanitizers, then
# every kernel compiled for every architecture and its machine code checked (tests/device/report.py).
# run.sh [plain] [address] [thread] [report]: these parts alone; without names, all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/device
parts=${*:-plain address thread report}
cmake -S tests/device -B "$build" -G Ninja > /dev/null
for part in $parts; do
  if [ "$part" = report ]; then
    cmake --build "$build" --target launches > /dev/null
    python3 tests/device/report.py --launches "$build/launches" --json "$build/compile_report.json" \
      --page "$build/cuda-kernels.md"
  else
    cmake --build "$build" --target "$part" > /dev/null
    ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)" --tests-regex "\.$part(\$|\.)"
  fi
done
