#!/usr/bin/env bash
# Runs every GPU test on this machine's GPU, then the small-shape ones under compute-sanitizer's memcheck, and a few of
# these, one or two for each kernel that shares memory, under its racecheck, which takes a hundred times as long.
#
#   tests/gpu.sh [build-dir]     (default: build/test, configured and built only if it holds no tests yet)
#
# The last line says what passed; the exit status is 0 only if everything did and no sanitizer found an error.
# Set GTEST_FILTER to run a part.
set -uo pipefail
cd "$(dirname "$0")/.."
build=${1:-build/test}

fail() {
    printf 'gpu.sh: %s\n' "$*" >&2
    exit 1
}

# tests/a/b_test.cu is built as <build-dir>/tests/a.b_test.
tests=()
while IFS= read -r source; do
    name=${source#tests/}
    name=${name%.cu}
    tests+=("$build/tests/${name//\//.}")
done < <(find tests -name '*_test.cu' | sort)

if ! ls "$build"/tests/*_test >/dev/null 2>&1; then
    cmake --preset test -B "$build" && cmake --build "$build" --parallel "$(nproc)" || fail "the build failed"
fi
for test in "${tests[@]}"; do
    [ -x "$test" ] || fail "no $test: the build in $build is not whole, or was made without a CUDA compiler"
done

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 skipped=0 failed=0
# Adds up what GoogleTest printed to $log; a program that did not get to its closing lines counts as one failure.
count() {
    local n
    n=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests\?\.$/\1/p' "$log")
    [ -n "$n" ] || failed=$((failed + 1))
    passed=$((passed + ${n:-0}))
    n=$(sed -n 's/^\[  SKIPPED \] \([0-9]*\) tests\?, listed below:$/\1/p' "$log")
    skipped=$((skipped + ${n:-0}))
    n=$(sed -n 's/^\[  FAILED  \] \([0-9]*\) tests\?, listed below:$/\1/p' "$log")
    failed=$((failed + ${n:-0}))
}

for test in "${tests[@]}"; do
    printf '== %s\n' "${test##*/}"
    "$test" --gtest_brief=0 >"$log" 2>&1
    status=$?
    grep -E '^\[  (FAILED|SKIPPED) |Failure|^\[==========\] .* ran' "$log" | sort -u | head -n 40
    [ $status -eq 0 ] || grep -B 2 -A 12 'Failure' "$log" | head -n 60
    before=$failed
    count
    [ $status -eq 0 ] || [ "$failed" -gt "$before" ] || failed=$((failed + 1))  # it died after its last test
done
[ "$passed" -gt 0 ] || fail "no test ran on a GPU ($skipped skipped, $failed failed)"

# has TEST FILTER: whether there are such tests.
has() { [ -n "$("$1" --gtest_list_tests --gtest_filter="$2" | grep '^  ')" ]; }

# sanitize TOOL TEST FILTER: adds the tests that passed under it to $checked.
sanitize() {
    printf '== %s %s\n' "$1" "${2##*/}"
    if compute-sanitizer --tool "$1" --error-exitcode 9 "$2" --gtest_filter="$3" >"$log" 2>&1; then
        local n
        n=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests\?\.$/\1/p' "$log")
        checked=$((checked + ${n:-0}))
    else
        grep -E '=========|FAILED|Failure' "$log" | head -n 40
        failed=$((failed + 1))
    fi
}

if command -v compute-sanitizer >/dev/null; then
    checked=0
    for test in "${tests[@]}"; do
        if has "$test" '*Small*'; then sanitize memcheck "$test" '*Small*'; fi
    done
    sanitized="$checked under memcheck"
    checked=0
    for name in quantize_test:QuantizeTypesSmall/float_float_codebook.NormalData \
        quantize_test:QuantizeSmall.RowsNearSeveralEqualCodes \
        device.nearest_mma_test:NearestMmaSmall.AnImageOfFewRowsOverAndOver \
        accumulate_test:AccumulateTypesSmall/float.WithBadCodesNanRowsAndBadWeights \
        ema_test:EmaSmall.OddDimensions train_step_test:TrainStepSmall.OddDimensions; do
        test=$build/tests/${name%%:*}
        has "$test" "${name#*:}" || fail "no test $name"
        sanitize racecheck "$test" "${name#*:}"
    done
    sanitized="$sanitized, $checked under racecheck"
else
    sanitized="compute-sanitizer not found: no memcheck, no racecheck"
    failed=$((failed + 1))
fi

printf 'gpu.sh: %d passed, %d skipped, %d failed, %s, on %s\n' "$passed" "$skipped" "$failed" "$sanitized" \
    "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
[ "$failed" -eq 0 ]
