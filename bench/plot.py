#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""Draws the benchmark's results as SVG: a roofline, speed-ups per shape set, time over N, K and D.

usage: plot.py [results-dir [output-dir]]     (default: bench/results, and there)

Needs matplotlib. A chart whose rows are missing is not drawn. Hollow marks: what was timed gave wrong codes.
"""

import math
import pathlib
import sys

import results
from results import quantize_row, quantize_us, update_row

try:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import lines, pyplot, ticker
except ImportError:
    sys.exit("plot.py: needs matplotlib: pip install matplotlib")

# Peers by the name their rows have: what charts call them, colour (Okabe and Ito's palette), marker.
OWN = ("cuvq", "#D55E00", "o")
PEERS = {
    "flash_kmeans": ("flash-kmeans", "#0072B2", "s"),
    "torch_addmm_tf32": ("PyTorch addmm + argmin, TF32", "#009E73", "^"),
    "torch_addmm_fp32": ("PyTorch addmm + argmin, FP32", "#009E73", "v"),
    "torch_compile_tf32": ("PyTorch, compiled, TF32", "#70C9B0", "^"),
    "torch_compile_fp32": ("PyTorch, compiled, FP32", "#70C9B0", "v"),
    "torch_cdist": ("PyTorch cdist + argmin, FP32", "#00543D", "d"),
    "cublas_tf32_argmin": ("cuBLAS + argmin, TF32", "#56B4E9", "D"),
    "cublas_fp32_argmin": ("cuBLAS + argmin, FP32", "#E69F00", "P"),
    "vector_quantize_pytorch": ("vector-quantize-pytorch (whole layer, host time)", "#882255", "p"),
    "torch_index_add": ("PyTorch index_add_", "#009E73", "^"),
    "cub_sort_reduce": ("CUB sort + reduce", "#E69F00", "P"),
    "cublas_one_hot": ("cuBLAS, one-hot", "#56B4E9", "D"),
    "rectokens": ("RecTokens", "#CC79A7", "X"),
    "cublas_fp16_product": ("cuBLAS FP16 product alone", "#999999", "*"),
    "read_x": ("one read of x", "#999999", "*"),
    "cuvq/fast": ("cuvq, accuracy::fast", OWN[1], "o"),
}
# What charts of `quantize`, and of EMA updates, put beside cuvq. Sums alone are less work than an update.
QUANTIZE = ("cuvq/fast", "flash_kmeans", "rectokens", "torch_addmm_tf32", "torch_addmm_fp32", "torch_compile_tf32",
            "torch_compile_fp32", "torch_cdist", "cublas_tf32_argmin", "cublas_fp32_argmin",
            "vector_quantize_pytorch", "cublas_fp16_product")
SCALING = ("flash_kmeans", "torch_addmm_tf32", "torch_addmm_fp32", "cublas_tf32_argmin", "cublas_fp32_argmin",
           "cublas_fp16_product")
UPDATE = ("rectokens", "torch_index_add", "flash_kmeans", "cub_sort_reduce", "cublas_one_hot")


HOLLOW = "hollow: some codes wrong"
SAVED = []


def scatter(axes, points, colour, marker, size, label=None, zorder=3, alpha=1):
    """Points (x, y, whether it is hollow); the legend shows a full mark."""
    for hollow in (False, True):
        axes.scatter([p[0] for p in points if p[2] == hollow], [p[1] for p in points if p[2] == hollow], s=size,
                     marker=marker, facecolors="white" if hollow else colour, edgecolors=colour, alpha=alpha,
                     linewidths=1.1 if hollow else 0, zorder=zorder, label=None if hollow else label)


def legend(axes, hollow, names=True, **how):
    """`hollow`: whether there are such marks, to be explained; `names`: whether lines and marks are named here."""
    handles = axes.get_legend_handles_labels()[0] if names else []
    if hollow:
        handles.append(lines.Line2D([], [], linestyle="none", marker="o", markersize=5, markerfacecolor="white",
                                    markeredgecolor="#444444", label=HOLLOW))
    if handles:
        axes.legend(handles=handles, frameon=False, **how)


def tidy(axes):
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)


def written_out(axis):
    """Ticks of a logarithmic axis as plain numbers."""
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))


def spaced(number):
    """1048576 as 1 048 576."""
    return f"{number:,}".replace(",", "\u202f")


def shape_label(shape):
    return ", ".join(spaced(v) for v in shape)


def spread(values, gap):
    """Values moved apart until neighbours are `gap` from each other; their order stays."""
    order = sorted(range(len(values)), key=values.__getitem__)
    moved = list(values)
    for _ in range(200):
        for a, b in zip(order, order[1:]):
            short = gap - (moved[b] - moved[a])
            if short > 1e-9:
                moved[a] -= short / 2
                moved[b] += short / 2
    return moved


def label_points(axes, points, labels, colours, own=None, leaders=False):
    """Labels to the right of the axes, at the heights of points (x, y), moved apart."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    heights = spread([math.log(y) for _, y in points], 0.055 * math.log(high / low))
    axes.set_autoscale_on(False)
    for (x, y), label, colour, height in zip(points, labels, colours, heights):
        at = (right * 1.04, math.exp(height))
        if leaders:
            axes.plot([x, right], [y, at[1]], color="#BBBBBB", linewidth=0.6, zorder=1)
        axes.annotate(label, at, fontsize=7.5, color=colour, va="center", annotation_clip=False,
                      fontweight="bold" if label == own else "normal")


def save(figure, path):
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
    print(path)
    SAVED.append(path)


def beforehand(rows):
    return ", codebook prepared" if rows.own_variant == "prepared" else ""


def roofline(rows, out):
    ceilings = rows.ceilings()
    if not ceilings:
        return
    product, copy = ceilings[0], ceilings[1] * 1e-3  # TFLOP/s, TB/s
    shown = {OWN[0]: [], "flash_kmeans": [], "cublas_fp32_argmin": []}
    shapes = dict.fromkeys(shape for s, _, shape in results.named_shapes() if s in ("small", "models", "large"))
    for shape in shapes:
        n, k, d = shape
        flops, least = 2.0 * n * k * d, 4.0 * (n * d + k * d + n)
        for who, points in shown.items():
            row = quantize_row(rows, who, shape)
            if row and row.us:
                points.append((flops / least, flops / row.us * 1e-6, row.spoiled, shape))
    if not shown[OWN[0]]:
        return
    figure, axes = pyplot.subplots(figsize=(7.5, 4.6))
    low = 0.7 * min(p[0] for p in shown[OWN[0]])
    high = 1.6 * max(p[0] for p in shown[OWN[0]])
    ridge = product / copy
    axes.plot([low, ridge, high], [low * copy, product, product], color="#444444", linewidth=1.2, zorder=1)
    axes.text(ridge, product * 1.12, f"FP16 product, {product:,.0f} TFLOP/s", fontsize=8, color="#444444")
    middle = math.sqrt(low * ridge)
    axes.text(middle * 0.8, middle * copy, f"copy, {copy:.2f} TB/s", fontsize=8, color="#444444", ha="right")
    for who, points in reversed(shown.items()):
        label, colour, marker = PEERS.get(who, OWN)
        if points:
            own = who == OWN[0]
            scatter(axes, points, colour, marker, 30 if own else 16, label, zorder=2, alpha=1 if own else 0.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(top=product * 2.2)
    written_out(axes.xaxis)
    written_out(axes.yaxis)
    axes.set_xlabel("operations per byte (2NKD over the fewest bytes)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("quantize, float32, codes only" + beforehand(rows), loc="left", fontsize=10)
    legend(axes, any(p[2] for points in shown.values() for p in points), fontsize=8, loc="lower right")
    tidy(axes)
    large = set(results.shapes_of("large"))
    named = [p for p in shown[OWN[0]] if p[3] in large]
    label_points(axes, [p[:2] for p in named], [shape_label(p[3]) for p in named], ["#444444"] * len(named),
                 leaders=True)
    save(figure, out / "roofline.svg")
    pyplot.close(figure)


def speedup(rows, set_name, out):
    table = []  # (shape's text, {peer: (factor, whether with wrong codes)})
    for s, name, shape in results.named_shapes():
        row = quantize_row(rows, "cuvq", shape) if s == set_name else None
        own = row.us if row else None
        if own:
            found = {who: quantize_row(rows, who, shape) for who in QUANTIZE}
            text = shape_label(shape)
            table.append((f"{name}: {text}" if name else text,
                          {who: (row.us / own, row.spoiled) for who, row in found.items() if row and row.us}))
    if not any(factors for _, factors in table):
        return
    figure, axes = pyplot.subplots(figsize=(7.5, 1.1 + 0.36 * len(table)))
    for who in QUANTIZE:
        points = [(factors[who][0], -i, factors[who][1]) for i, (_, factors) in enumerate(table) if who in factors]
        if points:
            label, colour, marker = PEERS[who]
            scatter(axes, points, colour, marker, 34, label)
    for i, (_, factors) in enumerate(table):
        if factors:
            ends = [1, *(factor for factor, _ in factors.values())]
            axes.plot([min(ends), max(ends)], [-i, -i], color="#DDDDDD", linewidth=1.5, zorder=1)
    axes.axvline(1, color=OWN[1], linewidth=1.4, zorder=2)
    axes.set_xscale("log")
    written_out(axes.xaxis)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.set_yticks([-i for i in range(len(table))], [text for text, _ in table], fontsize=8)
    axes.set_ylim(-len(table) + 0.4, 0.6)
    axes.set_xlabel(f"quantize, float32: time divided by cuvq's (exact{beforehand(rows)}); right of the line cuvq is "
                    "faster", fontsize=8)
    legend(axes, any(hollow for _, factors in table for _, hollow in factors.values()), fontsize=7.5, ncols=3,
           loc="lower center", bbox_to_anchor=(0.4, 1.0))
    tidy(axes)
    axes.grid(False, axis="y")
    save(figure, out / f"speedup_{set_name}.svg")
    pyplot.close(figure)


def scaling(rows, peers, row_of, sweeps, title, path):
    """Curves of time over one size each, named at their ends."""
    panels = []
    for axis, fixed in sweeps:
        shapes = sorted({s for s in results.shapes_of("scaling")
                         if all(s[i] == v for i, v in fixed.items())}, key=lambda s: s[axis])
        curves = {}
        for who in ("cuvq",) + tuple(peers):
            found = [(s[axis], row_of(rows, who, s)) for s in shapes]
            points = [(x, row.us, row.spoiled) for x, row in found if row and row.us]
            if len(points) > 1:
                curves[who] = points
        if "cuvq" in curves:
            panels.append((axis, fixed, curves))
    if not panels:
        return
    figure, all_axes = pyplot.subplots(1, len(panels), figsize=(3.4 * len(panels) + 0.6, 3.6), squeeze=False,
                                       gridspec_kw={"wspace": 0.3}, sharey=True)
    for (axis, fixed, curves), axes in zip(panels, all_axes[0]):
        for who, points in curves.items():
            _, colour, marker = PEERS.get(who, OWN)
            order = 3 if who == "cuvq" else 2
            axes.plot([p[0] for p in points], [p[1] for p in points], color=colour,
                      linewidth=2 if who == "cuvq" else 1.1, zorder=order)
            scatter(axes, points, colour, marker, 18, zorder=order + 0.5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(
            lambda v, _: f"{v / 1048576:g}M" if v >= 1048576 else f"{v / 1024:g}k" if v >= 1024 else f"{v:g}"))
        written_out(axes.yaxis)
        rest = ", ".join(f"{'NKD'[i]} = {spaced(v)}" for i, v in fixed.items())
        axes.set_xlabel(f"{'NKD'[axis]}   ({rest})", fontsize=8)
        tidy(axes)
    all_axes[0][0].set_ylabel("µs")
    all_axes[0][0].set_title(title, loc="left", fontsize=10)
    hollow = any(p[2] for _, _, curves in panels for points in curves.values() for p in points)
    legend(all_axes[0][0], hollow, names=False, fontsize=7.5, loc="upper left", handletextpad=0.1)

    # A curve's name stands beside the last panel that has it.
    for at, (axes, (_, _, curves)) in enumerate(zip(all_axes[0], panels)):
        named = {who: points for who, points in curves.items() if not any(who in p[2] for p in panels[at + 1:])}
        looks = [PEERS.get(who, OWN) for who in named]
        label_points(axes, [points[-1][:2] for points in named.values()], [l[0] for l in looks], [l[1] for l in looks],
                     own="cuvq")
    save(figure, path)
    pyplot.close(figure)


def main(arguments):
    if len(arguments) > 2 or any(a.startswith("-") for a in arguments):
        print(__doc__.strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    directory = pathlib.Path(arguments[0]) if arguments else results.DEFAULT_DIRECTORY
    out = pathlib.Path(arguments[1]) if len(arguments) > 1 else directory
    rows = results.Results(directory)
    if not rows:
        print(f"plot.py: no results in {directory}", file=sys.stderr)
        return 1
    # Text stays text: small files that can be searched. Equal results make equal files: by the fixed salt, and because
    # text is measured in the font that matplotlib brings along.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "cuvq", "font.family": "sans-serif",
                                "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
                                "font.size": 9, "savefig.facecolor": "white"})
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        results.die(f"{out}: {e.strerror}")
    roofline(rows, out)
    for set_name in ("small", "models", "large"):
        speedup(rows, set_name, out)
    scaling(rows, SCALING, quantize_row,
            [(0, {1: 1024, 2: 128}), (1, {0: 65536, 2: 128}), (2, {0: 65536, 1: 1024})],
            "quantize, float32, codes only" + beforehand(rows), out / "scaling_quantize.svg")
    scaling(rows, UPDATE + ("read_x",), update_row,
            [(0, {1: 1024, 2: 128}), (1, {0: 65536, 2: 128}), (2, {0: 65536, 1: 1024})],
            "ema_update, float32, uniform codes (others than cuvq and RecTokens: sums only)", out / "scaling_ema_update.svg")
    if not SAVED:
        print(f"plot.py: nothing to draw: {directory} has no GPU rows of cuvq at named shapes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
