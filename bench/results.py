#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""The benchmark's JSON files: named shapes, rows, and how a file is written small.

usage: results.py FILE.json...      cuts files that cuvq_bench wrote to what is read of them, in place: no name of the
                                    machine, no paths, one row to a line
       results.py --median OUT FILE.json...   leaves, as OUT, of several runs of the same rows the one in the middle, by
                                    the geometric mean of cuvq's times; the files are gone. Runs that were cut short
                                    do not count
       results.py --ratios DIRECTORY   gives the rows of cuvq in the files of one run the counters vs_PEER for those
                                    peers that peers.py timed, and those peers' rows GB/s and of_ceiling
"""

import json
import math
import pathlib
import re
import sys
from dataclasses import dataclass, field

HERE = pathlib.Path(__file__).resolve().parent
DEFAULT_DIRECTORY = HERE / "results"

# What a row keeps besides its counters, and what of a run's context is dropped.
ROW_KEYS = ("name", "real_time", "time_unit", "label", "error_occurred", "error_message")
NOT_COUNTERS = ROW_KEYS + (
    "run_name", "run_type", "family_index", "per_family_instance_index", "repetitions", "repetition_index",
    "threads", "iterations", "cpu_time")
MACHINE_KEYS = (
    "host_name", "executable", "load_avg", "caches", "num_cpus", "mhz_per_cpu", "cpu_scaling_enabled",
    "aslr_enabled", "library_build_type", "library_version", "json_schema_version")


def named_shapes():
    """[(set, name, (N, K, D))], from the table in shapes.hpp."""
    line = re.compile(r'^\s*\{"(\w+)", "([^"]*)", \{(\d+), (\d+), (\d+)\}\},', re.M)
    return [(s, name, (int(n), int(k), int(d)))
            for s, name, n, k, d in line.findall((HERE / "shapes.hpp").read_text())]


def shapes_of(set_name):
    return [shape for s, _, shape in named_shapes() if s == set_name]


def shape_text(shape):
    return "x".join(str(n) for n in shape)


@dataclass
class Row:
    test: str
    who: str
    type: str = ""
    shape: tuple = ()
    variant: str = ""
    us: float = None  # None: not run, for `reason`
    label: str = ""
    reason: str = ""
    counters: dict = field(default_factory=dict)

    @property
    def wrong(self):
        """Rows with a wrong code, of those compared; None if none were."""
        return None if "wrong" not in self.counters else int(self.counters["wrong"])

    @property
    def spoiled(self):
        """Whether what was timed gave wrong codes, or sums or a codebook that are off."""
        return bool(self.wrong) or "WRONG" in self.label

    @property
    def key(self):
        return self.test, self.who, self.type, self.shape, self.variant


def die(text):
    print(f"{pathlib.Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    sys.exit(2)


def load(path):
    """A file's content, without the rows that Google Benchmark makes of repetitions; ends the program, in one line, if
    it is none of the benchmark's."""
    try:
        content = json.loads(pathlib.Path(path).read_text())
        content["benchmarks"] = [e for e in content["benchmarks"] if e.get("run_type") != "aggregate"]
        content["context"].items()
        for entry in content["benchmarks"]:
            parse_row(entry)
    except OSError as e:
        die(f"{path}: {e.strerror}")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        die(f"{path}: is no result of the benchmark, or cut short: {type(e).__name__}: {e}")
    return content


def load_all(directory):
    """{path: content} of a directory's files, in the order of their names."""
    if not pathlib.Path(directory).is_dir():
        die(f"{directory}: no such folder")
    return {path: load(path) for path in sorted(pathlib.Path(directory).glob("*.json"))}


def fastest_peers(files):
    """{key: row} of what peers.py timed; of what several of its files hold, the fastest row, since some peers tune
    themselves, and not always alike."""
    rows = {}
    for path, content in files.items():
        if path.name.startswith("peers"):
            for row in map(parse_row, content["benchmarks"]):
                if row.us is not None and (row.key not in rows or row.us < rows[row.key].us):
                    rows[row.key] = row
    return rows


def plain_name(name):
    """A row's name without what Google Benchmark adds to it."""
    return re.sub(r"(/iterations:\d+|/repeats:\d+|/manual_time|/real_time)+$", "", name)


def parse_row(entry):
    parts = plain_name(entry["name"]).split("/")
    row = Row(parts[0], parts[1] if len(parts) > 1 else "")
    if len(parts) > 2:
        row.type = parts[2]
    if len(parts) > 3:
        row.shape = tuple(int(n) for n in parts[3].split("x"))
    if len(parts) > 4:
        row.variant = "/".join(parts[4:])
    row.label = entry.get("label", "")
    if entry.get("error_occurred"):
        row.reason = entry.get("error_message", "")
    else:
        row.us = entry["real_time"] * {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}[entry["time_unit"]]
    row.counters = {k: v for k, v in entry.items() if k not in NOT_COUNTERS and isinstance(v, (int, float))}
    return row


class Results:
    """The rows of all JSON files of a directory. Of rows of one name, the first that ran counts; files are read in
    the order of their names."""

    def __init__(self, directory=DEFAULT_DIRECTORY):
        self.contexts, rows = [], {}
        files = load_all(directory)
        for content in files.values():
            self.contexts.append(content["context"])
            for entry in content["benchmarks"]:
                row = parse_row(entry)
                if row.key not in rows or rows[row.key].us is None:
                    rows[row.key] = row
        rows.update(fastest_peers(files))
        commits = {c["commit"] for c in self.contexts if "commit" in c}
        if len(commits) > 1:
            sys.exit(f"{directory} holds runs of several commits ({', '.join(sorted(commits))}): keep one")
        self.rows = list(rows.values())
        # Of cuvq's quantize, what stands beside peers: with a codebook prepared beforehand, as theirs are, where that
        # was timed.
        prepared = any((r.test, r.who, r.variant) == ("quantize", "cuvq", "prepared") for r in self.rows)
        self.own_variant = "prepared" if prepared else "codes"
        self._by_key = rows

    def __bool__(self):
        return bool(self.rows)

    def get(self, test, who, shape=(), type_="float", variant=""):
        return self._by_key.get((test, who, type_, tuple(shape), variant))

    def us(self, *where, **which):
        row = self.get(*where, **which)
        return row.us if row else None

    def ceilings(self):
        """(TFLOP/s, GB/s) of the card in this run, or None."""
        product, copy = self.get("ceiling", "cublas_fp16_product", type_=""), self.get("ceiling", "copy", type_="")
        if not product or not copy or product.us is None or copy.us is None:
            return None
        return product.counters["TFLOP/s"], copy.counters["GB/s"]

    def run_text(self):
        """One line that says where and when the rows were taken."""
        context = {}
        for c in self.contexts:
            context.update(c)
        parts = [context.get("device", "unknown device")]
        for key, text in (("driver", "driver"), ("cuda_runtime", "CUDA"), ("torch", "PyTorch"), ("triton", "Triton"),
                          ("flash_kmeans", "flash-kmeans"), ("vector_quantize_pytorch", "vector-quantize-pytorch"),
                          ("commit", "commit")):
            if context.get(key):
                parts.append(f"{text} {context[key]}")
        if context.get("date"):
            parts.append(context["date"][:10])
        if context.get("runs"):
            parts.append("of cuvq and cuBLAS in single precision, but for hard data and scaling, the middle one of "
                         f"{context['runs']} runs")
        return ", ".join(parts)


def quantize_row(rows, who, shape):
    """The row of finding codes of float32 vectors, or None; of cuvq its `own_variant`, or which `who` names, as in
    "cuvq/fast"."""
    if who == "cublas_fp16_product":
        return rows.get("quantize", who, shape, type_="half")
    who, _, variant = who.partition("/")
    return rows.get("quantize", who, shape, variant=variant or (rows.own_variant if who == "cuvq" else "codes"))


def quantize_us(rows, who, shape):
    row = quantize_row(rows, who, shape)
    return row.us if row else None


def update_row(rows, who, shape, codes="uniform"):
    """The row of an EMA update by given codes, or of those that only make sums, of sums; or None."""
    if who == "read_x":
        return rows.get("floor", who, shape)
    if who in ("cuvq", "rectokens"):
        return rows.get("ema_update", who, shape, variant=codes)
    if who == "cublas_one_hot":  # its time does not depend on the codes
        return rows.get("accumulate", who, shape)
    return rows.get("accumulate", who, shape, variant=codes)


def update_us(rows, who, shape, codes="uniform"):
    row = update_row(rows, who, shape, codes)
    return row.us if row else None


def comparable(mine, peer):
    """Whether a row of cuvq names its time as a share of that peer's; as cuvq_bench decides it of its own peers."""
    if mine.who != "cuvq" or peer.us is None or (mine.shape, mine.type) != (peer.shape, peer.type):
        return False
    if mine.variant.endswith("hard"):
        return False
    if mine.test == "quantize":
        return peer.test == "quantize"
    return (peer.test == mine.test or (peer.test, mine.test) == ("accumulate", "ema_update")) and \
        peer.variant in ("", mine.variant)


def add_ratios(directory):
    files = load_all(directory)
    peers = fastest_peers(files).values()
    jobs = {}  # cuvq's row for each: what is to be done, in bytes and against the ceilings, is the same whoever does it
    for content in files.values():
        for row in map(parse_row, content["benchmarks"]):
            if row.who == "cuvq" and row.us:
                jobs.setdefault((row.test, row.type, row.shape, row.variant), row)
    for path, content in files.items():
        for entry in content["benchmarks"]:
            mine = parse_row(entry)
            if mine.us is None:
                continue
            entry.update({"vs_" + p.who: mine.us / p.us for p in peers if comparable(mine, p)})
            own = jobs.get((mine.test, mine.type, mine.shape, mine.variant))
            if own and path.name.startswith("peers"):
                entry.update({key: own.counters[key] * own.us / mine.us for key in ("GB/s", "of_ceiling")
                              if key in own.counters})
        write(path, content["context"], content["benchmarks"])


def keep_median(out, paths):
    """Of an even number of runs, the slower of the two in the middle."""
    runs = []  # (rows that ran, their sum of logarithms for cuvq, content)
    for path in paths:
        content = load(path)
        rows = [row for row in map(parse_row, content["benchmarks"]) if row.us]
        runs.append((len(rows), sum(math.log(row.us) for row in rows if row.who == "cuvq"), content))
    whole = sorted((run for run in runs if run[0] == max(r[0] for r in runs)), key=lambda run: run[1])
    kept = whole[len(whole) // 2][2]
    if len(whole) > 1:
        kept["context"]["runs"] = len(whole)
    write(out, kept["context"], kept["benchmarks"])
    for path in paths:
        if not pathlib.Path(path).samefile(out):
            pathlib.Path(path).unlink()


def rounded(value):
    return float(f"{value:.5g}") if isinstance(value, float) and value == value else value


def write(path, context, entries):
    """Google Benchmark's format, a row to a line, numbers to five digits. The file is at no time half written."""
    context = {k: v for k, v in context.items() if k not in MACHINE_KEYS}
    lines = []
    for entry in entries:
        kept = {"name": plain_name(entry["name"])}
        for key, value in entry.items():
            if key != "name" and (key in ROW_KEYS or key not in NOT_COUNTERS):
                kept[key] = rounded(value)
        if not kept.get("label"):
            kept.pop("label", None)
        if kept.get("error_occurred"):
            kept = {k: v for k, v in kept.items() if k in ("name", "error_occurred", "error_message")}
        lines.append(json.dumps(kept))
    text = '{"context": ' + json.dumps(context, indent=1) + ',\n"benchmarks": [\n' + ",\n".join(lines) + "\n]}\n"
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text)
        return
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def main(arguments):
    if len(arguments) == 2 and arguments[0] == "--ratios":
        add_ratios(arguments[1])
        return 0
    if len(arguments) > 2 and arguments[0] == "--median":
        keep_median(arguments[1], arguments[2:])
        return 0
    if not arguments or any(a.startswith("-") for a in arguments):
        print(__doc__.strip())
        return 0 if arguments in (["-h"], ["--help"]) else 2
    for path in arguments:
        content = load(path)
        write(path, content["context"], content["benchmarks"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
