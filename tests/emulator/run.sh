#!/usr/bin/env bash
# Everything that can be said of the CUDA kernels without a GPU: device tests under all schedules and sanitizers, and
# the machine code of every kernel for every architecture checked (tests/emulator/report.py).
# run.sh [plain] [address] [thread] [report]: these parts alone; without names, all of them.
# The report reads the wheel WHEEL; without this variable one is built.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=build/emulator
tests=() report= failed=0
for part in ${*:-plain address thread report}; do
  [ "$part" = report ] && report=launches || tests+=("$part")
done

cmake -S tests/emulator -B "$build" -G Ninja > /dev/null
cmake --build "$build" --parallel "$(nproc)" --target "${tests[@]}" $report -- --quiet
if [ "$report" ]; then
  if [ -z "${WHEEL-}" ]; then
    pip wheel -q --no-deps -Ccmake.define.FASTCOMPAT_CUDA=ON -w "$build" .
    WHEEL=$(ls -t "$build"/*.whl | head -1)
  fi
  python3 tests/emulator/report.py "$WHEEL" --launches "$build/launches" --json "$build/compile_report.json" \
    --page "$build/cuda-kernels.md" || failed=1
fi
if [ ${#tests[@]} -gt 0 ]; then
  ctest --test-dir "$build" --output-on-failure --parallel "$(nproc)" \
    --tests-regex "\.($(IFS='|'; echo "${tests[*]}"))(\$|\.)" || failed=1
fi
exit $failed
