#!/usr/bin/env bash
# Everything that can be said of the CUDA kernels without a GPU: device tests under all schedules and sanitizers, and
# every kernel compiled for every architecture and its machine code checked (tests/device/report.py).
# run.sh [plain] [address] [thread] [report]: these parts alone; without names, all of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/device
tests=() report= failed=0
for part in ${*:-plain address thread report}; do
  [ "$part" = report ] && report=yes || tests+=("$part")
done
make() { cmake --build "$build" --parallel "$(nproc)" --target "$@" -- --quiet; }

cmake -S tests/device -B "$build" -G Ninja > /dev/null
if [ "$report" ]; then # beside the tests: its longest compilation takes as long as they do
  make launches
  python3 tests/device/report.py --launches "$build/launches" --json "$build/compile_report.json" \
    --page "$build/cuda-kernels.md" > "$build/report.txt" 2>&1 &
  report=$!
fi
if [ ${#tests[@]} -gt 0 ]; then
  make "${tests[@]}" || failed=1
  ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)" \
    --tests-regex "\.($(IFS='|'; echo "${tests[*]}"))(\$|\.)" || failed=1
fi
if [ "$report" ]; then
  wait "$report" || failed=1
  cat "$build/report.txt"
fi
exit $failed
