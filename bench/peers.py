#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""Times what Python offers for cuvq's jobs: PyTorch, flash-kmeans, RecTokens, vector-quantize-pytorch.

The rows have the names, the format and the counters of cuvq_bench's, so that plot.py and readme_table.py put them side
by side. Each package is used if it can be imported; what is not there, or would need more than 40 GB, is reported as
skipped. The way of timing is cuvq_bench's too: as many calls as take about 1 ms captured in a CUDA graph, events around
it, the median of many; standard normal data; vectors that fit in L2 stay there, larger ones rotate. Norms that a
kernel wants of its inputs are made beforehand; packages run with their defaults (flash-kmeans picks its tiles by a rule
of its own, torch.compile does not tune). Launches of more than 1 ms are not captured: they follow one another behind a
wait. What trains is reset before each sample, RecTokens' with idle steps spread as in cuvq_bench. Judged are the codes
of `quantize` and `train_step`, counts and sums of `accumulate`, and the state after one of RecTokens' updates, but for
the codebook rows of codes that restart, which are drawn. GB/s and of_ceiling are added by `results.py --ratios`, from
rows of cuvq_bench for the same job.

Rows go by importance and cost, peer by peer; those that --budget leaves no time for, or that a SIGTERM cuts off, are
reported as skipped; the file is whole after every row. Of the shapes of the set `scaling`, only the peers that the
scaling charts show are timed.
"""

import argparse
import hashlib
import importlib
import importlib.metadata
import math
import pathlib
import signal
import statistics
import sys
import time

import results

START = time.monotonic()
MOST_BYTES = 40e9
SAMPLED_ROWS = 4096
MOST_SUM_ERROR, MOST_COUNT_ERROR = 1e-4, 5e-7  # as in cuvq_bench's rows.hpp
DISTRIBUTIONS = ("uniform", "zipf", "one")
RESTART_AFTER_STEPS = 20
DECAY = 0.9900000095367432  # 0.99 in float32, as a kernel takes it
# Cycles for which the device waits before a sample, so that what the host takes to launch it is not timed: 25 to 50 us
# at clocks of 2 to 1 GHz for a graph, 1 to 2 ms for launches one by one.
LEAD, LONG_LEAD = 50000, 2000000
# N K D from which a kernel whose time grows with that is put behind all other rows: tuning it takes half a minute.
DEAR = 2e11


class Skip(Exception):
    """A peer that is not run, and why."""


class OutOfTime(BaseException):
    """The budget is spent, or the run is to end. No Exception, so that few packages swallow it."""


def check_memory(size):
    if size > MOST_BYTES:
        raise Skip(f"needs {size / 1e9:.0f} GB, more than {MOST_BYTES / 1e9:.0f}")


def module(name):
    try:
        return importlib.import_module(name)
    except Exception as e:  # a package can fail to import in any way
        raise Skip(f"cannot import {name}: {first_line(e)}") from e


def first_line(error):
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ---- data -----------------------------------------------------------------------------------------------------------


class Problem:
    """Input sets, a codebook, and what is right, of one shape."""

    def __init__(self, torch, shape, device, l2_bytes, cold, truths):
        self.torch, self.shape, self.device = torch, shape, device
        self.truths = truths  # what was computed of other problems of the same shape, which hold the same data
        n, k, d = shape
        fits = 4 * n * d <= l2_bytes and not cold
        self.sets = 1 if fits else min(1024, math.ceil(4 * l2_bytes / (4 * n * d)))
        generator = torch.Generator(device).manual_seed(1)
        rows = n if self.sets == 1 else -(-n // 128) * 128
        x = torch.empty(self.sets, rows, d, device=device).normal_(generator=generator)
        self.x = [x[i, :n] for i in range(self.sets)]
        self.codebook = torch.empty(k, d, device=device).normal_(generator=generator)
        self.generator = generator

    def draw(self, distribution):
        """int64 codes for each set."""
        torch, (n, k, _) = self.torch, self.shape
        if distribution == "one":
            return [torch.full((n,), k // 2, device=self.device) for _ in self.x]
        if distribution == "uniform":
            return [torch.randint(k, (n,), device=self.device, generator=self.generator) for _ in self.x]
        share = 1.0 / torch.arange(1, k + 1, device=self.device, dtype=torch.float64)
        share = share[torch.randperm(k, device=self.device, generator=self.generator)]
        cumulative = torch.cumsum(share / share.sum(), 0)
        u = torch.rand(self.sets, n, device=self.device, dtype=torch.float64, generator=self.generator)
        return [torch.searchsorted(cumulative, row).clamp_(max=k - 1) for row in u]

    def _truth(self):
        """Sampled rows of set 0, their least distances, the lowest codes that have them."""
        torch, (n, k, d) = self.torch, self.shape
        if self.shape not in self.truths:
            size = min(n, SAMPLED_ROWS)
            rows = torch.arange(size, device=self.device) * (n - 1) // max(1, size - 1)
            x, c = self.x[0][rows].double(), self.codebook.double()
            step = max(1, int(1e9 / (8 * k * d)))
            numbers = torch.arange(k, device=self.device)
            least, code = [], []
            for i in range(0, size, step):
                distance = ((x[i:i + step, None] - c[None]) ** 2).sum(-1)
                least.append(distance.min(1).values)
                code.append(torch.where(distance == least[-1][:, None], numbers, k).min(1).values)
            self.truths[self.shape] = rows, torch.cat(least), torch.cat(code)
        return self.truths[self.shape]

    def wrong(self, codes):
        """Rows of a sample of set 0 whose code is not the float64 one (see cuvq_bench's check.cuh)."""
        rows, least, code = self._truth()
        mine = codes.reshape(-1)[rows].long()
        known = (mine >= 0) & (mine < self.shape[1])
        distance = ((self.x[0][rows].double() - self.codebook.double()[mine.clamp(0, self.shape[1] - 1)]) ** 2).sum(-1)
        close = (distance <= least * (1 + (self.shape[2] + 8) * 2.0**-51)) & (distance != least)
        return int((~(known & ((mine == code) | close))).sum())

    def true_sums(self, codes):
        """float64 counts and sums of set 0."""
        sums = self.torch.zeros(self.codebook.shape, device=self.device, dtype=self.torch.float64)
        counts = self.torch.bincount(codes.reshape(-1), minlength=self.shape[1]).double()
        return counts, sums.index_add_(0, codes.reshape(-1), self.x[0].double())


def relative_error(value, should):
    off = float((value.double() - should).norm())
    return off / float(should.norm()) if off else 0.0


# ---- timing ---------------------------------------------------------------------------------------------------------


def elapsed_us(torch, body, lead=LEAD):
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(lead)
    start.record()
    body()
    stop.record()
    stop.synchronize()
    return max(1e-3, 1e3 * start.elapsed_time(stop))


def time_call(torch, call, sets, seconds, captured):
    """(median, fastest) microseconds of call(set). What cannot be captured is timed with its host time. A call that
    has a `reset` is reset before each sample, not timed."""
    reset = getattr(call, "reset", lambda: None)
    reset()
    for _ in range(2):
        call(0)  # compiles, tunes
    torch.cuda.synchronize()
    rough = min(elapsed_us(torch, lambda: [call(s) for s in range(sets)]) / sets for _ in range(2))
    launches = min(100, max(1, math.ceil(1000 / rough)))
    launches = -(-launches // sets) * sets

    def body():
        for i in range(launches):
            call(i % sets)

    run, graph = body, None
    if captured and rough < 1000:  # longer ones would need their memory twice
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        run = graph.replay
        reset()
        run()
        torch.cuda.synchronize()
    time.sleep(seconds)  # as in cuvq_bench, lest the clocks be what the rows before left
    samples, total = [], 0.0
    while len(samples) < 3 or (total < seconds * 1e6 and len(samples) < 201):
        reset()
        samples.append(elapsed_us(torch, run, LONG_LEAD if captured and graph is None else LEAD))
        total += samples[-1]
    return statistics.median(samples) / launches, min(samples) / launches


# ---- peers ----------------------------------------------------------------------------------------------------------
#
# Each makes, of a problem, a call(set) that returns codes (or nothing), and is listed below with the test it is a peer
# in. `tf32` sets PyTorch's matrix products to TF32 for the whole row.


def addmm_argmin(torch, norms, x, codebook):
    return torch.addmm(norms, x, codebook.T, alpha=-2).argmin(1)


def torch_addmm(p, compiled=False):
    check_memory(4.0 * p.shape[0] * p.shape[1])
    norms = (p.codebook.double() ** 2).sum(1).float()
    function = addmm_argmin
    if compiled:
        p.torch._dynamo.reset()  # else it gives up compiling after the eighth shape
        function = p.torch.compile(addmm_argmin, dynamic=False)
    return lambda s: function(p.torch, norms, p.x[s], p.codebook)


def torch_cdist(p):
    check_memory(4.0 * p.shape[0] * p.shape[1])
    return lambda s: p.torch.cdist(p.x[s], p.codebook).argmin(1)


def flash_kmeans_assign(p):
    assign = module("flash_kmeans.assign_euclid_triton").euclid_assign_triton
    x = [v[None] for v in p.x]
    x_norms = [(v**2).sum(-1) for v in x]
    codebook = p.codebook[None]
    norms = (codebook**2).sum(-1)
    out = p.torch.empty(1, p.shape[0], device=p.device, dtype=p.torch.int32)
    return lambda s: assign(x[s], codebook, x_norms[s], out=out, c_sq=norms)


def rectokens_assign(p):
    nearest = module("rectokens.ops.nn_quantize").nearest_neighbor_quantize
    return lambda s: nearest(p.x[s], p.codebook)


def vector_quantize(p, training):
    package = module("vector_quantize_pytorch")
    check_memory(4 * 4.0 * p.shape[0] * p.shape[1])  # distances, their parts, the one-hot matrix
    layer = package.VectorQuantize(dim=p.shape[2], codebook_size=p.shape[1]).to(p.device).train(training)
    layer._codebook.embed.data.copy_(p.codebook[None])
    layer._codebook.embed_avg.data.copy_(p.codebook[None])
    x = [v[None] for v in p.x]
    if not training:
        return lambda s: layer(x[s])[1]
    start = {name: value.clone() for name, value in layer.state_dict().items()}

    def call(s):
        return layer(x[s])[1]

    call.reset = lambda: layer.load_state_dict(start)
    return call


def torch_index_add(p, codes):
    torch = p.torch
    sums, counts = torch.empty_like(p.codebook), torch.empty(p.shape[1], device=p.device)
    ones = torch.ones(p.shape[0], device=p.device)

    def call(s):
        sums.zero_().index_add_(0, codes[s], p.x[s])
        counts.zero_().index_add_(0, codes[s], ones)
        return counts, sums

    return call


def flash_kmeans_sums(p, codes):
    torch = p.torch
    update = module("flash_kmeans.centroid_update_triton").triton_centroid_update_sorted_euclid
    x, codebook = [v[None] for v in p.x], p.codebook[None]
    codes = [c.int()[None] for c in codes]
    sums = torch.empty(codebook.shape, device=p.device)
    counts = torch.empty(1, p.shape[1], device=p.device, dtype=torch.int32)

    def call(s):
        sums.zero_()
        counts.zero_()
        update(x[s], codes[s], codebook, centroid_sums=sums, centroid_cnts=counts, calculate_new=False)
        return counts[0], sums[0]

    return call


class RectokensUpdate:
    """ema_update from cuvq_bench's start: cluster sizes 1, sums the codebook, idle steps spread."""

    def __init__(self, p, codes):
        if p.shape[2] & (p.shape[2] - 1):
            raise Skip("D must be a power of two")
        self.update = module("rectokens.ops.ema_update").ema_update
        self.x, self.codes = p.x, codes
        idle = p.torch.arange(p.shape[1], device=p.device) % RESTART_AFTER_STEPS
        self.start = [p.torch.ones(p.shape[1], device=p.device), p.codebook, p.codebook, idle]
        self.state = [t.clone() for t in self.start]  # cluster sizes, sums, codebook, idle steps

    def reset(self):
        for to, origin in zip(self.state, self.start):
            to.copy_(origin)

    def __call__(self, s):
        self.update(self.x[s], self.codes[s], *self.state, DECAY, RESTART_AFTER_STEPS)

    def errors(self, p):
        """Of the state after one update from the start, by set 0 and the codes that it was given."""
        counts, sums = p.true_sums(self.codes[0])
        active = counts > 0
        idle = self.start[3] + 1
        restarted = ~active & (idle >= RESTART_AFTER_STEPS)
        idle[active | restarted] = 0
        sizes = DECAY + (1 - DECAY) * counts
        sizes[~active] = 1
        sizes[restarted] = 0
        sums = DECAY * p.codebook.double() + (1 - DECAY) * sums
        sums[~active] = p.codebook[~active].double()
        codebook = sums / sizes[:, None]  # of those that restarted, not looked at
        sums[restarted] = 0
        return {"count_error": max(relative_error(self.state[0], sizes), relative_error(self.state[3], idle.double())),
                "sum_error": relative_error(self.state[1], sums),
                "codebook_error": relative_error(self.state[2][~restarted], codebook[~restarted])}


class RectokensTrain(RectokensUpdate):
    def __init__(self, p):
        super().__init__(p, [None] * p.sets)
        self.nearest = module("rectokens.ops.nn_quantize").nearest_neighbor_quantize

    def __call__(self, s):
        codes = self.nearest(self.x[s], self.state[2])
        self.codes[s] = codes
        super().__call__(s)
        return codes


class Peer:
    """`scaling`: also timed at the shapes of the scaling charts; `grows`: its time is as N K D, whatever the codes;
    `tunes`: it takes seconds at each shape before it can be timed."""

    def __init__(self, test, who, make, *, distributions=("",), tf32=False, captured=True, scaling=False, grows=False,
                 tunes=False):
        self.test, self.who, self.make = test, who, make
        self.distributions, self.tf32, self.captured = distributions, tf32, captured
        self.scaling, self.grows, self.tunes = scaling, grows, tunes


# In the order of the rows, but for what `planned` puts last.
PEERS = [
    Peer("quantize", "torch_addmm_fp32", torch_addmm, scaling=True),
    Peer("quantize", "torch_addmm_tf32", torch_addmm, tf32=True, scaling=True),
    Peer("quantize", "flash_kmeans", flash_kmeans_assign, scaling=True),
    Peer("accumulate", "torch_index_add", torch_index_add, distributions=DISTRIBUTIONS, scaling=True),
    Peer("accumulate", "flash_kmeans", flash_kmeans_sums, distributions=DISTRIBUTIONS, scaling=True),
    Peer("quantize", "torch_cdist", torch_cdist),
    Peer("quantize", "torch_compile_tf32", lambda p: torch_addmm(p, True), tf32=True),
    Peer("quantize", "torch_compile_fp32", lambda p: torch_addmm(p, True)),
    Peer("quantize", "vector_quantize_pytorch", lambda p: vector_quantize(p, False), captured=False),
    Peer("train_step", "vector_quantize_pytorch", lambda p: vector_quantize(p, True), captured=False),
    Peer("ema_update", "rectokens", RectokensUpdate, distributions=DISTRIBUTIONS, scaling=True, grows=True),
    Peer("quantize", "rectokens", rectokens_assign, tunes=True),
    Peer("train_step", "rectokens", RectokensTrain, grows=True, tunes=True),
]
# Where such a peer is given other codes than uniform ones all the same.
ANY_CODES = (1048576, 1024, 128)


# ---- a run ----------------------------------------------------------------------------------------------------------


def row_name(peer, shape, distribution):
    name = f"{peer.test}/{peer.who}/float/{results.shape_text(shape)}"
    variant = "codes" if peer.test == "quantize" else distribution
    return name + (f"/{variant}" if variant else "")


def measure(peer, p, distribution, seconds):
    """The counters of one row."""
    torch = p.torch
    torch.set_float32_matmul_precision("high" if peer.tf32 else "highest")
    codes = p.draw(distribution) if distribution else None
    call = peer.make(p, codes) if distribution else peer.make(p)
    median, fastest = time_call(torch, call, p.sets, seconds, peer.captured)
    n, k, d = p.shape
    counters = {"us": median, "us_min": fastest, "sets": p.sets}
    marks = []
    getattr(call, "reset", lambda: None)()
    result = call(0)
    if peer.test in ("quantize", "train_step"):
        counters["TFLOP/s"] = 2e-6 * n * k * d / median
    if peer.test in ("quantize", "train_step"):
        counters["wrong"] = p.wrong(result)
        if counters["wrong"]:
            marks.append(f"WRONG CODES: {counters['wrong']} of {min(n, SAMPLED_ROWS)} rows")
    if peer.test == "accumulate":
        counters["count_error"], counters["sum_error"] = map(relative_error, result, p.true_sums(codes[0]))
    if hasattr(call, "errors"):
        counters.update(call.errors(p))
    for what, most in (("count", MOST_COUNT_ERROR), ("sum", MOST_SUM_ERROR), ("codebook", MOST_SUM_ERROR)):
        if not counters.get(what + "_error", 0) <= most:
            marks.append(f"WRONG {what.upper()}" + ("" if what == "codebook" else "S"))
    if not peer.captured:
        marks.append("host time included")
    return counters, "; ".join(marks)


def planned(peers, shapes, scaling_only):
    """(peer, shape, distribution) of each row, in the order in which they are timed."""
    rows = []
    for peer in peers:
        for shape in shapes:
            if shape in scaling_only and not peer.scaling:
                continue
            for distribution in peer.distributions:
                if distribution not in ("", "uniform"):
                    if shape in scaling_only or (peer.grows and shape != ANY_CODES):
                        continue
                rows.append((peer, shape, distribution))

    def lateness(row):
        """What takes seconds to tune, then what charts alone want, and what takes seconds to run, comes last, so that a
        budget costs the dear rows first; what tunes shape by shape, so that it costs no peer all of its rows."""
        peer, shape, _ = row
        dear, for_charts = peer.grows and math.prod(shape) > DEAR, peer.grows and shape in scaling_only
        return dear, for_charts, peer.tunes, shapes.index(shape) if peer.tunes else 0

    return sorted(rows, key=lateness)


def run(torch, options, save):
    """Times all rows; `save`s them, and the seconds that each peer took, after every row. Returns the exit code."""
    entries, unusable, spent = [], {}, {}
    deadline, out_of_time = START + options.budget, f"skipped: the budget of {options.budget:g} s is spent"
    l2_bytes = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 50 << 20)
    problem, truths = None, {}
    code, measuring = 0, False

    def add(name, counters=None, label="", reason=""):
        if reason:
            entries.append({"name": name, "error_occurred": True, "error_message": reason})
            print(f"{name:<70} {reason}", flush=True)
        else:
            entries.append({"name": name, "real_time": counters["us"], "time_unit": "us", **counters, "label": label})
            print(f"{name:<70} {counters['us']:12.2f} us  {label}", flush=True)

    def seconds_by_peer():
        return ", ".join(f"{who} {s:.0f}" for who, s in spent.items())

    def stop(number, _):
        nonlocal code, deadline, out_of_time
        if number == signal.SIGTERM:
            code, deadline, out_of_time = 128 + number, 0, "skipped: the run was ended by SIGTERM"
        if measuring:
            raise OutOfTime

    # The row that is running when time is up is given up, as soon as its present call into C returns; and again, lest a
    # callback somewhere drops the first try.
    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.001, min(deadline - time.monotonic(), 1e6)), 2)
    try:
        for peer, shape, distribution in planned(options.peers, options.shapes, options.scaling_only):
            name = row_name(peer, shape, distribution)
            if peer.who in unusable:
                continue
            began = time.monotonic()
            if began >= deadline:
                add(name, reason=out_of_time)
                continue
            try:
                try:
                    measuring = True
                    if problem is None or problem.shape != shape:
                        problem = None
                        torch.cuda.empty_cache()
                        problem = Problem(torch, shape, "cuda", l2_bytes, options.cold, truths)
                    measured = measure(peer, problem, distribution, options.time)
                finally:
                    measuring = False
                add(name, *measured)
            except OutOfTime:
                add(name, reason=out_of_time)
            except Skip as e:
                if str(e).startswith("cannot import"):
                    unusable[peer.who] = str(e)
                    name = f"{peer.test}/{peer.who}"
                add(name, reason=f"skipped: {e}")
            except Exception as e:  # a peer that fails is no reason to lose the others
                add(name, reason=f"skipped: failed: {first_line(e)}")
                torch.cuda.synchronize()  # raises if the GPU is of no use any more
            torch.cuda.empty_cache()
            spent[f"{peer.test}/{peer.who}"] = spent.get(f"{peer.test}/{peer.who}", 0) + time.monotonic() - began
            save(entries, seconds_by_peer())
    except Exception as e:
        print(f"peers.py: stopped: {first_line(e)}", file=sys.stderr)
        code = 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    save(entries, seconds_by_peer())
    print(f"peers.py: seconds by peer: {seconds_by_peer()}")
    return code


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, as cuvq_bench's."""
        self.exit(2, f"{self.prog}: {message}\n")


def seconds(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"got '{text}'; wants seconds, above 0 and at most 1000000")
    return value


def parse(arguments):
    parser = Parser(prog="peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    sets = sorted({s for s, _, _ in results.named_shapes()})
    parser.add_argument("--shapes", metavar="SET[,SET]", default="", help=f"of {', '.join(sets)} (default: small)")
    parser.add_argument("--shape", metavar="N,K,D", action="append", default=[], help="may be given repeatedly")
    parser.add_argument("--cases", metavar="CASE[,CASE]", default="quantize,accumulate,ema_update,train_step",
                        help="default: all four")
    parser.add_argument("--peers", metavar="NAME[,NAME]", default="",
                        help=f"default: all of {', '.join(dict.fromkeys(p.who for p in PEERS))}")
    parser.add_argument("--time", metavar="SECONDS", type=seconds, default=0.1,
                        help="spent on the samples of a row (default: 0.1)")
    parser.add_argument("--budget", metavar="SECONDS", type=seconds, default=1e6,
                        help="rows that would start later are skipped (default: none)")
    parser.add_argument("--cold", action="store_true", help="rotate over input sets always")
    parser.add_argument("--context", metavar="KEY=VALUE", action="append", default=[], help="put into the JSON")
    parser.add_argument("--out", metavar="FILE.json", help="where the rows go, besides the console")
    options = parser.parse_args(arguments)

    shapes = []
    for text in options.shape:
        parts = text.split(",")
        if len(parts) != 3 or not all(n.isdecimal() and int(n) >= 1 for n in parts):
            parser.error(f"--shape: got '{text}'; wants N,K,D: whole numbers from 1")
        shapes.append(tuple(int(n) for n in parts))
    names = options.shapes.split(",") if options.shapes else [] if shapes else ["small"]
    for name in names:
        if name not in sets:
            parser.error(f"--shapes: got '{name}'; wants {', '.join(sets)}")
    shapes += [s for name in names if name != "scaling" for s in results.shapes_of(name)]
    options.scaling_only = set(results.shapes_of("scaling") if "scaling" in names else ()) - set(shapes)
    shapes += [s for name in names if name == "scaling" for s in results.shapes_of(name)]
    options.shapes = list(dict.fromkeys(shapes))

    cases, chosen = options.cases.split(","), options.peers.split(",") if options.peers else []
    for flag, got, known in (("--cases", cases, {p.test for p in PEERS}), ("--peers", chosen, {p.who for p in PEERS})):
        for word in got:
            if word not in known:
                parser.error(f"{flag}: got '{word}'; wants {', '.join(sorted(known))}")
    options.peers = [p for p in PEERS if p.test in cases and (not chosen or p.who in chosen)]
    if not all("=" in c for c in options.context):
        parser.error("--context: wants KEY=VALUE")
    return options


def main(arguments):
    options = parse(arguments)
    code = 0
    context = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **dict(c.split("=", 1) for c in options.context)}

    def save(entries, seconds_by_peer):
        context["seconds_by_peer"] = seconds_by_peer
        if options.out:
            results.write(options.out, context, entries)

    try:
        save([], "")  # what cannot be written is not worth measuring
    except OSError as e:
        print(f"peers.py: --out: cannot write '{options.out}': {e.strerror}", file=sys.stderr)
        return 2
    reason = ""
    try:
        torch = module("torch")
        if not torch.cuda.is_available():
            reason = "PyTorch sees no GPU"
    except Skip as e:
        reason = str(e)
    if reason:
        print(f"peers.py: all skipped: {reason}", file=sys.stderr)
        entries = [{"name": f"{p.test}/{p.who}", "error_occurred": True, "error_message": f"skipped: {reason}"}
                   for p in options.peers]
        save(entries, "")
    else:
        context.update(device=torch.cuda.get_device_name(0), torch=torch.__version__, cuda_runtime=torch.version.cuda)
        for name in ("triton", "flash_kmeans", "vector_quantize_pytorch"):
            try:
                context[name] = getattr(module(name), "__version__", None) or importlib.metadata.version(name)
            except (Skip, importlib.metadata.PackageNotFoundError):
                pass
        try:  # has no version
            sources = (module(f"rectokens.ops.{name}").__file__ for name in ("nn_quantize", "ema_update"))
            digest = hashlib.sha256(b"".join(pathlib.Path(file).read_bytes() for file in sources))
            context["rectokens"] = f"nn_quantize.py and ema_update.py of SHA-256 {digest.hexdigest()[:12]}"
        except (Skip, OSError, TypeError):
            pass
        with torch.no_grad():
            code = run(torch, options, save)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
