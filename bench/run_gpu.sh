#!/usr/bin/env bash
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#
# The whole measured run on this machine's GPU, peers included, in under 10 minutes: what there is no time for is
# skipped and says so. Builds cuvq_bench, before that time starts, where there is no build yet. Leaves JSON files for
# plot.py and readme_table.py in place of those of an earlier run, and of their charts.
#
# usage: bench/run_gpu.sh [build-dir [output-dir]]     (default: build/bench, bench/results)
#
# Environment: BUDGET is the number of seconds (default: 570, so that all ends before 590); RUNS is how often single
# precision is measured, 1 (the default) or 3, of which the median run is kept; CUVQ_COMMIT names the commit where git
# cannot; PYTHON is the interpreter that has PyTorch (default: python3). Peers in Python take part as far as they are
# installed: PyTorch, flash-kmeans, vector-quantize-pytorch, and RecTokens on PYTHONPATH.
set -euo pipefail

case ${1:-} in
-*)
    sed -n '4,/^$/s/^# \{0,1\}//p' "$0"
    [ "$1" = -h ] || [ "$1" = --help ] || exit 2
    exit 0
    ;;
esac

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/bench}
out=${2:-$root/bench/results}
python=${PYTHON:-python3}

total=${BUDGET:-570} # seconds in which rows may start; a step that overruns is killed 15 s after its share
case $total in
'' | *[!0-9]*)
    echo "run_gpu.sh: BUDGET: got $total; wants a whole number of seconds" >&2
    exit 2
    ;;
esac

runs=${RUNS:-1}
case $runs in
1 | 3) ;;
*)
    echo "run_gpu.sh: RUNS: got $runs; wants 1 or 3" >&2
    exit 2
    ;;
esac

if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); then
    echo "run_gpu.sh: no GPU: nvidia-smi finds none" >&2
    exit 1
fi

bench=
for candidate in "$build/bench/cuvq_bench" "$build/cuvq_bench"; do
    if [ -x "$candidate" ]; then bench=$candidate; fi
done
if [ -e "$build/CMakeCache.txt" ] && [ -n "$bench" ]; then
    cmake --build "$build" --target cuvq_bench --parallel # lest an old binary passes for this commit
elif [ -z "$bench" ]; then
    cmake -S "$root" -B "$build" -D CMAKE_BUILD_TYPE=Release -D CUVQ_ENABLE_CUDA=ON -D CUVQ_BUILD_BENCH=ON \
        -D CUVQ_BUILD_TESTS=OFF -D CUVQ_BUILD_EXAMPLES=OFF
    cmake --build "$build" --target cuvq_bench --parallel
    bench=$build/bench/cuvq_bench
fi

# Before the recorded results go: whether there will be others.
if ! listed=$("$bench" --benchmark_list_tests=true 2>&1) || grep 'no GPU' <<<"$listed" >/dev/null; then
    echo "run_gpu.sh: $bench does not run on a GPU: $(head -n 1 <<<"$listed")" >&2
    exit 1
fi

commit=${CUVQ_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
mkdir -p "$out"
rm -f "$out"/{cuvq_,peers}*.json "$out"/{roofline,speedup_,scaling_}*.svg
failed=0
SECONDS=0

# run NAME SHARE COMMAND...: a step that leaves NAME.json, in at most SHARE seconds or what is left of all.
run() {
    local name=$1 share=$2 left=$((total - SECONDS)) start=$SECONDS
    shift 2
    if [ "$left" -lt "$share" ]; then share=$left; fi
    if [ "$share" -lt 5 ]; then
        echo "run_gpu.sh: $name: skipped: no time left"
        return
    fi
    local code=0
    timeout --kill-after=5 $((share + 10)) "$@" --budget="$share" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "run_gpu.sh: $name: exit code $code" >&2
        failed=1
    fi
    # Killed: what cuvq_bench was writing is cut short; peers.py's file holds the rows until then.
    if [ "$code" -ge 124 ] && ! "$python" -m json.tool "$out/$name.json" >/dev/null 2>&1; then
        rm -f "$out/$name.json"
    fi
    rm -f "$out/$name.json.part"
    echo "run_gpu.sh: $name: $((SECONDS - start)) s"
}

# measure NAME SHARE FLAG...: a run of cuvq_bench. Wrong codes fail the script, at its end.
measure() {
    local file=$out/$1.json
    run "$1" "$2" "$bench" --time=0.05 "${@:3}" --benchmark_out="$file" --benchmark_out_format=json \
        --benchmark_context=commit="$commit",driver="$driver"
    [ -e "$file" ] || return 0
    if ! "$python" "$root/bench/results.py" "$file"; then
        failed=1
        rm -f "$file"
    fi
}

# Single precision, then the peers, and the other types with what is left. RecTokens alone takes minutes to tune itself.
for ((i = 1; i <= runs; ++i)); do measure "cuvq_float$i" 140 --shapes=large,small,models; done
if compgen -G "$out/cuvq_float?.json" >/dev/null; then
    "$python" "$root/bench/results.py" --median "$out/cuvq_float.json" "$out"/cuvq_float?.json || failed=1
fi
measure cuvq_hard 20 --shapes=large --data=hard --cases=quantize --no-peers
measure cuvq_scaling 60 --shapes=scaling --cases=quantize,ema_update --codes=uniform
run peers $((total - 155 - 80 * runs)) "$python" "$root/bench/peers.py" --shapes=small,large,models,scaling --time=0.05 \
    --out="$out/peers.json" --context=commit="$commit" --context=driver="$driver"
measure cuvq_half 140 --shapes=large,small,models --types=half,bfloat16
"$python" "$root/bench/results.py" --ratios "$out" || failed=1
echo "run_gpu.sh: $SECONDS s in all"

exit "$failed"
