#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""Rewrites the part of README.md between the bench markers from the benchmark's results.

usage: readme_table.py [results-dir [README.md]]     (default: bench/results, the README of this repository)
"""

import os
import pathlib
import sys

import results
from results import quantize_us, update_us

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_RUN = "No run is recorded yet; `bench/run_gpu.sh` makes one.\n"

QUANTIZE = (
    ("cuvq", "**cuvq**"),
    ("flash_kmeans", "flash-kmeans"),
    ("torch_addmm_fp32", "PyTorch FP32"),
    ("torch_addmm_tf32", "PyTorch TF32"),
    ("cublas_fp32_argmin", "cuBLAS + CUB FP32"),
    ("cublas_tf32_argmin", "cuBLAS + CUB TF32"),
    ("cublas_fp16_product", "FP16 product alone"),
)
UPDATE = (
    ("cuvq", "**cuvq**"),
    ("rectokens", "RecTokens"),
    ("torch_index_add", "PyTorch index_add_ ¹"),
    ("flash_kmeans", "flash-kmeans ¹"),
    ("cub_sort_reduce", "CUB sort + reduce ¹"),
    ("cublas_one_hot", "cuBLAS one-hot ¹"),
    ("read_x", "one read of x"),
)
UPDATE_ROWS = (
    ((4096, 512, 64), "uniform"),
    ((65536, 1024, 128), "uniform"),
    ((1048576, 1024, 128), "uniform"),
    ((1048576, 1024, 128), "zipf"),
    ((1048576, 1024, 128), "one"),
)
# Rows of cuvq alone: title, and test, type and variant of the row.
OWN = (
    ("`quantize`", "quantize", "float", "codes"),
    ("… with quantized, distances", "quantize", "float", "all"),
    ("… half", "quantize", "half", "codes"),
    ("… bfloat16", "quantize", "bfloat16", "codes"),
    ("… hard data", "quantize", "float", "codes/hard"),
    ("`ema_update`", "ema_update", "float", "uniform"),
    ("`train_step`", "train_step", "float", ""),
)
CHARTS = (
    ("speedup_seed.svg", "Time of others divided by cuvq's, small shapes"),
    ("speedup_large.svg", "Time of others divided by cuvq's, large shapes"),
    ("speedup_models.svg", "Time of others divided by cuvq's, shapes of models"),
    ("roofline.svg", "Roofline of quantize"),
    ("scaling_quantize.svg", "Time of quantize over N, K and D"),
    ("scaling_ema_update.svg", "Time of ema_update over N and K"),
)


def number(us):
    return "–" if us is None else f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def cell(us, row=None):
    text = number(us)
    if row and row.wrong:
        text += f" ({row.wrong})"
    return text


def table(first, columns, lines):
    """Lines of cells; columns without any value are left out."""
    kept = [i for i in range(len(columns)) if any(line[1][i] != "–" for line in lines)]
    text = [" | ".join(["", first, *(columns[i] for i in kept), ""]).strip()]
    text.append("|---|" + "---:|" * len(kept))
    for name, cells in lines:
        text.append(" | ".join(["", name, *(cells[i] for i in kept), ""]).strip())
    return "\n".join(text) + "\n"


def shape_name(shape):
    return ", ".join(str(v) for v in shape)


def quantize_table(rows, sets):
    lines = []
    for set_name, name, shape in results.named_shapes():
        if set_name not in sets or quantize_us(rows, "cuvq", shape) is None:
            continue
        cells = [cell(quantize_us(rows, who, shape), rows.get("quantize", who, shape, variant="codes"))
                 for who, _ in QUANTIZE]
        cells[0] = f"**{cells[0]}**"
        lines.append((f"{name}: {shape_name(shape)}" if name else shape_name(shape), cells))
    return table("N, K, D", [title for _, title in QUANTIZE], lines) if lines else ""


def update_cell(rows, who, shape, codes):
    if who == "read_x":
        return number(rows.us("floor", who, shape))
    if who in ("rectokens", "cublas_one_hot"):  # measured with uniform codes only
        return number(update_us(rows, who, shape)) if codes == "uniform" else "–"
    return number(rows.us("ema_update" if who == "cuvq" else "accumulate", who, shape, variant=codes))


def update_table(rows):
    lines = []
    for shape, codes in UPDATE_ROWS:
        cells = [update_cell(rows, who, shape, codes) for who, _ in UPDATE]
        if cells[0] != "–":
            cells[0] = f"**{cells[0]}**"
            lines.append((f"{shape_name(shape)}, {'all on one code' if codes == 'one' else codes}", cells))
    return table("N, K, D, codes", [title for _, title in UPDATE], lines) if lines else ""


def own_table(rows):
    lines = []
    for set_name, _, shape in results.named_shapes():
        found = [rows.get(test, "cuvq", shape, type_, variant) for _, test, type_, variant in OWN]
        if set_name in ("seed", "large") and any(row and row.us for row in found):
            lines.append((shape_name(shape), [cell(row.us if row else None, row) for row in found]))
    return table("N, K, D", [title for title, *_ in OWN], lines) if lines else ""


def block(rows, directory, readme):
    if not rows:
        return NO_RUN
    parts = [f"Medians in µs; {rows.run_text()}. `bench/run_gpu.sh` repeats the run; `cuvq_bench --help` says how each "
             "row is taken.\n"]
    quantize = quantize_table(rows, ("seed", "large"))
    if quantize:
        parts += ["`quantize`, float32, codes only. In parentheses: wrong codes among up to 4096 rows.\n", quantize]
    models = quantize_table(rows, ("models",))
    if models:
        parts += ["<details><summary>Shapes of models</summary>\n", models, "</details>\n"]
    update = update_table(rows)
    if update:
        parts += ["`ema_update`, float32, given codes. ¹ Counts and sums only, no update.\n", update]
    own = own_table(rows)
    if own:
        parts += ["cuvq alone: float32 vectors and codes only, except where said.\n", own]
    for file, text in CHARTS:
        if (directory / file).exists():
            path = os.path.relpath(directory / file, readme.parent).replace(os.sep, "/")
            parts.append(f"![{text}]({path})\n")
    return "\n".join(parts)


def main(arguments):
    if len(arguments) > 2 or any(a.startswith("-") for a in arguments):
        print(__doc__.strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    directory = pathlib.Path(arguments[0]) if arguments else results.DEFAULT_DIRECTORY
    readme = pathlib.Path(arguments[1]) if len(arguments) > 1 else results.HERE.parent / "README.md"
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        print(f"readme_table.py: {readme}: wants one {BEGIN} and after it one {END}", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{block(results.Results(directory), directory, readme)}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
