#!/usr/bin/env bash
# Everything that can be said of the CUDA kernels without a GPU: device tests under all schedules and sanitizers, then
# every kernel compiled for every architecture and its machine code checked (tests/device/report.py).
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/device
cmake -S tests/device -B "$build" -G Ninja > /dev/null
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)"
python3 tests/device/report.py --json "$build/compile_report.json"
