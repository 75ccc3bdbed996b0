#!/usr/bin/env bash
# Runs every GPU test on this machine's GPU, then the small-shape ones under compute-sanitizer's memcheck, and a few of
# these, one or two for each kernel that shares memory by barriers, under its racecheck, which takes a hundred times as
# long.
#
#   tests/gpu.sh [build-dir]     (default: build/test, configured and built only if it holds no tests yet)
#
# The last line says what passed; the exit status is 0 only if everything did and no sanitizer found an error.
# Set GTEST_FILTER to run a part, JOBS to have fewer sanitized runs at a time, as on a GPU of little memory.
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

logs=$(mktemp -d)
trap 'wait; rm -rf "$logs"' EXIT
log=$logs/log
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

# listed TEST FILTER: how many such tests there are; fails where the program does.
listed() {
    "$1" --gtest_list_tests --gtest_filter="$2" >"$log" || return
    grep -c '^  ' "$log" || true
}

# start TOOL TEST FILTER: runs these tests under a tool of compute-sanitizer, at most eight to a run, and as many runs
# at a time as there are processors, up to sixteen.
runs=() most=$(nproc)
[ "$most" -le 16 ] || most=16
most=${JOBS:-$most}
start() {
    local number shards shard run
    number=$(listed "$2" "$3") || fail "$2 cannot list its tests"
    shards=$(((number + 7) / 8))
    for ((shard = 0; shard < shards; ++shard)); do
        while [ "$(jobs -rp | wc -l)" -ge "$most" ]; do wait -n; done
        run=$logs/${#runs[@]}
        runs+=("$1 ${2##*/} $((shard + 1))/$shards")
        {
            began=$SECONDS
            GTEST_TOTAL_SHARDS=$shards GTEST_SHARD_INDEX=$shard \
                compute-sanitizer --tool "$1" --error-exitcode 9 "$2" --gtest_filter="$3" >"$run" 2>&1
            status=$?
            echo $status >"$run.status"
            printf '== %s: %s, %d s\n' "${runs[-1]}" "$([ $status -eq 0 ] && echo done || echo failed)" $((SECONDS - began))
        } &
    done
}

if command -v compute-sanitizer >/dev/null; then
    for name in quantize_test:QuantizeTypesSmall/float_float_codebook.NormalData \
        quantize_test:QuantizeSmall.RowsNearSeveralEqualCodes \
        quantize_test:QuantizeSmall.RowsThatAClusterSettlesTogether \
        quantize_mma_test:QuantizeMmaSmall.HardRowsOfTwoBlocks \
        device.nearest_mma_test:NearestMmaSmall.AnImageOfFewRowsOverAndOver \
        accumulate_test:AccumulateTypesSmall/float.WithBadCodesNanRowsAndBadWeights \
        ema_test:EmaSmall.OddDimensions train_step_test:TrainStepSmall.OddDimensions; do
        test=$build/tests/${name%%:*}
        [ "$(listed "$test" "${name#*:}")" != 0 ] || fail "no test $name"
        start racecheck "$test" "${name#*:}"
    done
    while IFS= read -r test; do  # the largest first, which take longest
        start memcheck "$test" '*Small*'
    done < <(ls -S "${tests[@]}")
    wait
    memcheck=0 racecheck=0
    for i in "${!runs[@]}"; do
        if [ "$(cat "$logs/$i.status")" = 0 ]; then
            n=$(sed -n 's/^\[  PASSED  \] \([0-9]*\) tests\?\.$/\1/p' "$logs/$i")
            case ${runs[i]} in
            memcheck*) memcheck=$((memcheck + ${n:-0})) ;;
            *) racecheck=$((racecheck + ${n:-0})) ;;
            esac
        else
            printf '== %s\n' "${runs[i]}"
            grep -E '=========|FAILED|Failure' "$logs/$i" | head -n 40
            failed=$((failed + 1))
        fi
    done
    sanitized="$memcheck under memcheck, $racecheck under racecheck"
else
    sanitized="compute-sanitizer not found: no memcheck, no racecheck"
    failed=$((failed + 1))
fi

printf 'gpu.sh: %d passed, %d skipped, %d failed, %s, on %s\n' "$passed" "$skipped" "$failed" "$sanitized" \
    "$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)"
[ "$failed" -eq 0 ]
