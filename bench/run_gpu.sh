#!/usr/bin/env bash
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
#
# The whole measured run on this machine's GPU, peers included: under 8 minutes on an H100. Builds cuvq_bench where
# there is no build yet. Leaves JSON files for plot.py and readme_table.py.
#
# usage: bench/run_gpu.sh [build-dir [output-dir]]     (default: build/bench, bench/results)
#
# Environment: CUVQ_COMMIT names the commit where git cannot; PYTHON is the interpreter that has PyTorch (default:
# python3). Peers in Python take part as far as they are installed: flash-kmeans, vector-quantize-pytorch, and RecTokens
# on PYTHONPATH.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
build=${1:-$root/build/bench}
out=${2:-$root/bench/results}
python=${PYTHON:-python3}

if ! driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1); then
    echo "run_gpu.sh: no GPU: nvidia-smi finds none" >&2
    exit 1
fi

bench=
for candidate in "$build/bench/cuvq_bench" "$build/cuvq_bench"; do
    if [ -x "$candidate" ]; then bench=$candidate; fi
done
if [ -z "$bench" ]; then
    cmake -S "$root" -B "$build" -D CMAKE_BUILD_TYPE=Release -D CUVQ_BUILD_BENCH=ON -D CUVQ_BUILD_TESTS=OFF \
        -D CUVQ_BUILD_EXAMPLES=OFF
    cmake --build "$build" --target cuvq_bench --parallel
    bench=$build/bench/cuvq_bench
fi

commit=${CUVQ_COMMIT:-$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)}
mkdir -p "$out"
failed=0

# measure NAME FLAG...: a run of cuvq_bench that ends up in NAME.json. Wrong codes fail the script, at its end.
measure() {
    local file=$out/$1.json
    shift
    SECONDS=0
    "$bench" --time=0.05 "$@" --benchmark_out="$file" --benchmark_out_format=json \
        --benchmark_context=commit="$commit",driver="$driver" || failed=1
    "$python" "$root/bench/results.py" "$file" || failed=1
    echo "run_gpu.sh: $(basename "$file"): $SECONDS s"
}

# peers NAME FLAG...: the same with peers.py.
peers() {
    local file=$out/$1.json
    shift
    SECONDS=0
    "$python" "$root/bench/peers.py" --seconds=0.05 "$@" --out="$file" --context=commit="$commit" \
        --context=driver="$driver" || failed=1
    echo "run_gpu.sh: $(basename "$file"): $SECONDS s"
}

measure cuvq_float --shapes=seed,models,large
measure cuvq_half --shapes=seed,large --types=half,bfloat16 --codes=uniform
measure cuvq_hard --shapes=large --data=hard --cases=quantize --no-peers
measure cuvq_scaling --shapes=scaling --cases=quantize,ema_update --codes=uniform
peers peers --shapes=seed,models,large --budget=240
peers peers_scaling --shapes=scaling --budget=45 --cases=quantize,accumulate \
    --peers=torch_addmm_fp32,torch_addmm_tf32,flash_kmeans,torch_index_add

exit "$failed"
