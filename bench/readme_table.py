#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""Rewrites the part of README.md between the bench markers from the benchmark's results.

usage: readme_table.py [results-dir [README.md]]     (default: bench/results, the README of this repository)
"""

import os
import pathlib
import sys

import results
from results import quantize_row, quantize_us, update_row, update_us

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NO_RUN = "No run on a GPU is recorded yet; `bench/run_gpu.sh` makes one.\n"

# Columns: rows that hold the times, of which the fastest counts, and a title.
QUANTIZE = (
    (("cuvq/prepared",), "**cuvq**, codebook prepared"),
    (("cuvq/codes",), "**cuvq**"),
    (("cuvq/fast",), "cuvq, `accuracy::fast`, codebook prepared"),
    (("flash_kmeans",), "flash-kmeans"),
    (("rectokens",), "RecTokens"),
    (("torch_addmm_tf32", "torch_compile_tf32"), "PyTorch TF32 ¹"),
    (("torch_addmm_fp32", "torch_compile_fp32", "torch_cdist"), "PyTorch FP32 ¹"),
    (("cublas_tf32_argmin",), "cuBLAS + argmin TF32"),
    (("cublas_fp32_argmin",), "cuBLAS + argmin FP32"),
    (("cublas_fp16_product",), "FP16 product alone"),
)
PYTORCH = (
    (("torch_addmm_tf32",), "addmm + argmin, TF32"),
    (("torch_compile_tf32",), "… compiled, TF32"),
    (("torch_addmm_fp32",), "addmm + argmin, FP32"),
    (("torch_compile_fp32",), "… compiled, FP32"),
    (("torch_cdist",), "cdist + argmin, FP32"),
    (("vector_quantize_pytorch",), "vector-quantize-pytorch ²"),
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
UPDATE_RATIOS = ("read_x", "torch_index_add", "flash_kmeans", "rectokens")
SUMS = ("torch_index_add", "flash_kmeans", "cub_sort_reduce", "cublas_one_hot")
UPDATE_ROWS = (
    ((4096, 512, 64), "uniform"),
    ((32768, 1024, 128), "uniform"),
    ((65536, 1024, 128), "uniform"),
    ((1048576, 1024, 128), "uniform"),
    ((1048576, 1024, 128), "zipf"),
    ((1048576, 1024, 128), "one"),
)
# Columns of single rows: title, and test, who, type and variant of the row.
HALVES = (
    ("**cuvq** half, codebook prepared", "quantize", "cuvq", "half", "prepared"),
    ("**cuvq** half", "quantize", "cuvq", "half", "codes"),
    ("cuBLAS + argmin half", "quantize", "cublas_fp16_argmin", "half", "codes"),
    ("**cuvq** bfloat16, codebook prepared", "quantize", "cuvq", "bfloat16", "prepared"),
    ("**cuvq** bfloat16", "quantize", "cuvq", "bfloat16", "codes"),
    ("cuBLAS + argmin bfloat16", "quantize", "cublas_bf16_argmin", "bfloat16", "codes"),
)
TRAIN = (
    ("**cuvq**", "train_step", "cuvq", "float", ""),
    ("**cuvq**, state with a prepared codebook", "train_step", "cuvq", "float", "prepared"),
    ("… as two calls", "train_step", "cuvq", "float", "prepared_apart"),
    ("RecTokens", "train_step", "rectokens", "float", ""),
    ("vector-quantize-pytorch, host time included", "train_step", "vector_quantize_pytorch", "float", ""),
)
OWN = (
    ("`quantize`", "quantize", "cuvq", "float", "codes"),
    ("… with quantized, distances", "quantize", "cuvq", "float", "all"),
    ("… half", "quantize", "cuvq", "half", "codes"),
    ("… bfloat16", "quantize", "cuvq", "bfloat16", "codes"),
    ("… hard data", "quantize", "cuvq", "float", "codes/hard"),
    ("`ema_update`", "ema_update", "cuvq", "float", "uniform"),
    ("`train_step`", "train_step", "cuvq", "float", ""),
    ("… prepared", "train_step", "cuvq", "float", "prepared"),
)
OWN_UPDATE = tuple((f"{type_} {codes}", "ema_update", "cuvq", type_, codes)
                   for type_ in ("float", "half", "bfloat16") for codes in ("uniform", "zipf", "one"))
CHARTS = (
    ("speedup_small.svg", "Time of others divided by cuvq's, small shapes"),
    ("speedup_large.svg", "Time of others divided by cuvq's, large shapes"),
    ("speedup_models.svg", "Time of others divided by cuvq's, shapes of models"),
    ("roofline.svg", "Roofline of quantize"),
    ("scaling_quantize.svg", "Time of quantize over N, K and D"),
    ("scaling_ema_update.svg", "Time of ema_update over N, K and D"),
)


# How far medians, and with them ratios, are to be trusted.
NOISE = ("The card rests before each row, since one that has drawn all the power it may for a while lowers its clocks; "
         "even so, rows of the same work differ by up to about 5 %, some short train steps by 6 %, floors of 1 or 2 µs "
         "by 15 %: ratios nearer to 1 than that decide nothing.")


def number(us):
    return "–" if us is None else f"{us:,.0f}" if us >= 100 else f"{us:.1f}"


def cell(us, row=None):
    text = number(us)
    if row and row.wrong:
        text += f" ({row.wrong})"
    elif row and row.spoiled:
        text += " (wrong)"
    return text


def emphasized(text, title):
    """A cell of a column whose title is emphasized is so, too."""
    return f"**{text}**" if title.startswith("**") and text != "–" else text


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


def shown(rows, sets):
    """(text, shape) of the shapes of some sets that cuvq was timed at."""
    return [(f"{name}: {shape_name(shape)}" if name else shape_name(shape), shape)
            for s, name, shape in results.named_shapes() if s in sets and quantize_us(rows, "cuvq", shape)]


def fastest(rows, names, shape):
    found = [row for row in (quantize_row(rows, who, shape) for who in names) if row and row.us]
    return min(found, key=lambda row: row.us) if found else None


def quantize_table(rows, sets, columns):
    lines = []
    for text, shape in shown(rows, sets):
        found = [fastest(rows, names, shape) for names, _ in columns]
        cells = [cell(row.us, row) if row else "–" for row in found]
        lines.append((text, [emphasized(c, title) for c, (_, title) in zip(cells, columns)]))
    return table("N, K, D", [title for _, title in columns], lines) if lines else ""


def ratio(numerator, denominator):
    if numerator is None or not denominator:
        return "–"
    value = numerator / denominator
    return (f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.4f}").replace("-", "−")


def difference(a, b):
    """a - b; None if it is no more than what such rows vary by."""
    if a is None or b is None:
        return None
    return a - b if abs(a - b) > (0.03 if b >= 100 else 0.02) * b else None


def ratios_of(rows):
    """Says which of cuvq's times are divided."""
    if rows.own_variant != "prepared":
        return ""
    return ("Of `quantize` the time with a prepared codebook, but for what quantized rows and distances add and for "
            "`train_step`: there the codebook is prepared in each call. Of the update nine tenths count, as much as a "
            "step is meant to take of it. –: not measured, or a difference no larger than what such rows vary by.\n")


def ratio_table(rows):
    """What cuvq's times are in shares of others, and of each other."""
    own = rows.own_variant
    columns = ("÷ FP16 product alone", "÷ flash-kmeans", "÷ fastest PyTorch", "fast ÷ exact",
               "added by quantized, distances ÷ copy of x", "half ÷ float", "bfloat16 ÷ float", "hard ÷ normal data",
               "`train_step` ÷ (`quantize` + 0.9 `ema_update`)", "`train_step` ÷ both calls, prepared",
               "`ema_update` ÷ one read of x")
    pytorch = [who for names, title in PYTORCH[:5] for who in names]
    lines = []
    for text, shape in shown(rows, ("small", "large", "models")):
        def us(test, type_, variant):
            return rows.us(test, "cuvq", shape, type_, variant)

        exact, codes = us("quantize", "float", own), us("quantize", "float", "codes")
        everything = us("quantize", "float", "all")
        update = us("ema_update", "float", "uniform")
        best = fastest(rows, pytorch, shape)
        lines.append((text, [
            ratio(exact, quantize_us(rows, "cublas_fp16_product", shape)),
            ratio(exact, quantize_us(rows, "flash_kmeans", shape)),
            ratio(exact, best.us if best else None),
            ratio(us("quantize", "float", "fast"), exact),
            ratio(difference(everything, codes), rows.us("floor", "copy_x", shape)),
            ratio(us("quantize", "half", own), exact),
            ratio(us("quantize", "bfloat16", own), exact),
            ratio(us("quantize", "float", own + "/hard"), exact),
            ratio(us("train_step", "float", ""), codes + 0.9 * update if codes and update else None),
            ratio(us("train_step", "float", "prepared"), us("train_step", "float", "prepared_apart")),
            ratio(update, update_us(rows, "read_x", shape))]))
    return table("N, K, D", columns, lines) if lines else ""


def update_table(rows):
    lines = []
    for shape, codes in UPDATE_ROWS:
        found = {who: update_row(rows, who, shape, codes) for who, _ in UPDATE}
        times = {who: row.us if row else None for who, row in found.items()}
        if times["cuvq"]:
            cells = [f"**{cell(times['cuvq'], found['cuvq'])}**",
                     *(cell(times[who], found[who]) for who, _ in UPDATE[1:]),
                     *(ratio(times["cuvq"], times[who]) for who in UPDATE_RATIOS)]
            lines.append((f"{shape_name(shape)}, {'all on one code' if codes == 'one' else codes}", cells))
    titles = dict(UPDATE)
    columns = [*titles.values(), *(f"cuvq ÷ {titles[who].removesuffix(' ¹')}" for who in UPDATE_RATIOS)]
    return table("N, K, D, codes", columns, lines) if lines else ""


def sums_table(rows, sets):
    """Counts and sums alone, and the whole update beside them."""
    titles = {who: title.removesuffix(" ¹") for who, title in UPDATE}
    lines = []
    for text, shape in shown(rows, sets):
        own = rows.get("accumulate", "cuvq", shape, variant="uniform"), update_row(rows, "cuvq", shape)
        others = [update_row(rows, who, shape) for who in SUMS]
        if own[0] and any(row and row.us for row in others):
            lines.append((text, [*(f"**{cell(row.us if row else None, row)}**" for row in own),
                                 *(cell(row.us if row else None, row) for row in others)]))
    columns = ("**cuvq** `accumulate`", "**cuvq** `ema_update`", *(titles[who] for who in SUMS))
    return table("N, K, D", columns, lines) if lines else ""


def row_table(rows, sets, columns):
    """Columns of single rows. Where others stand beside cuvq, only shapes at which one of them was timed."""
    judges = [i for i, (_, _, who, *_) in enumerate(columns) if who != "cuvq"] or range(len(columns))
    lines = []
    for text, shape in shown(rows, sets):
        found = [rows.get(test, who, shape, type_, variant) for _, test, who, type_, variant in columns]
        if any(found[i] and found[i].us for i in judges):
            cells = [cell(row.us if row else None, row) for row in found]
            lines.append((text, [emphasized(c, title) for c, (title, *_) in zip(cells, columns)]))
    return table("N, K, D", [title for title, *_ in columns], lines) if lines else ""


def folded(title, *parts):
    """A block to be opened by its title; empty if it has no tables."""
    if not any(parts):
        return []
    return [f"<details><summary>{title}</summary>\n", *(p for p in parts if p), "</details>\n"]


def pytorch_forms(rows):
    """Of which ways of PyTorch's the fastest stands in the first table."""
    ways = (("torch_addmm", "addmm + argmin"), ("torch_compile", "the same compiled"), ("torch_cdist", "cdist + argmin"))
    measured = [name for who, name in ways if any(row.us and row.who.startswith(who) for row in rows.rows)]
    if len(measured) == 1:
        return f"¹ {measured[0]}; the run had no time for other ways."
    return f"¹ The fastest of {', '.join(measured)}, of those that were timed at that shape."


def block(rows, directory, readme):
    if not rows:
        return NO_RUN
    parts = [f"Medians in µs; {rows.run_text()}. `RUNS=3 bench/run_gpu.sh` repeats the run; `cuvq_bench --help` says how each "
             f"row is taken. {NOISE}\n"]
    quantize = quantize_table(rows, ("small", "large"), QUANTIZE)
    if quantize:
        parts += ["`quantize`, float32, codes only. In parentheses: wrong codes among up to 4096 rows. " +
                  pytorch_forms(rows) + "\n", quantize]
    parts += folded("Shapes of models", quantize_table(rows, ("models",), QUANTIZE))
    pytorch = quantize_table(rows, ("small", "large", "models"), PYTORCH)
    parts += folded("PyTorch, each way by itself",
                    "² The whole layer, host time included.\n" if "²" in pytorch else "", pytorch)
    halves = row_table(rows, ("small", "large", "models"), HALVES)
    codebooks = "cuvq's codebook is float, of values that the vectors' type holds; cuBLAS takes both in that type.\n"
    parts += folded("Half and bfloat16 vectors, beside others", codebooks if halves else "", halves)
    update = update_table(rows)
    if update:
        parts += ["`ema_update`, float32, given codes. ¹ Counts and sums only, no update.\n", update]
    parts += folded("Counts and sums, float32, uniform codes, beside others",
                    sums_table(rows, ("small", "large", "models")))
    parts += folded("`train_step`, float32, beside others", row_table(rows, ("small", "large", "models"), TRAIN))
    own = row_table(rows, ("small", "large"), OWN)
    if own:
        parts += ["cuvq alone: float32 vectors and codes only, except where said.\n", own]
    parts += folded("cuvq alone: shapes of models", row_table(rows, ("models",), OWN))
    parts += folded("cuvq alone: `ema_update` by type of the vectors and by codes",
                    row_table(rows, ("small", "large", "models"), OWN_UPDATE))
    parts += folded("cuvq's times divided by others, and by each other", ratios_of(rows), ratio_table(rows))
    if len(parts) == 1:  # rows of the CPU path at most
        return NO_RUN
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
    try:
        text = readme.read_text()
    except OSError as e:
        results.die(f"{readme}: {e.strerror}")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        print(f"readme_table.py: {readme}: wants one {BEGIN} and after it one {END}", file=sys.stderr)
        return 1
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{block(results.Results(directory), directory, readme)}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
