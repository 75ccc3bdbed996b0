#!/usr/bin/env python3
# cuvq: GPU vector quantization. SPDX-License-Identifier: Apache-2.0
"""Writes the sequences that tests/reference/ema_test.cpp compares cuvq's EMA updates with.

Fifty train steps of a small codebook, for every preset and for combinations of rules that no preset has, in float64.
Each update is written the way its own system writes it, so nothing here follows cuvq's code:

  RecTokens               ema_update: only codes that have rows move; a code unused for 20 steps starts afresh
  Sonnet                  VectorQuantizerEMA over two ExponentialMovingAverage modules
  vector-quantize-pytorch EuclideanCodebook: ema_inplace, laplace_smoothing, expire_codes_ / replace
  EnCodec                 EuclideanCodebook, likewise; the replaced statistics are kept (EnCodec overwrites them)
  Mimi (moshi)            EuclideanCodebook: clamp(min=epsilon), _check_expired_codes / _replace_expired_codes

As cuvq documents it, dead codes are looked for after the blend in all of them, and a code whose statistics are all
zero keeps its row.

Usage: make_ema_sequences.py [DIRECTORY]   (default: ../data beside this script)

  ema_inputs.txt          per step: x, weights, the replacement row of each code (-1: none)
  ema_NAME.txt            the first state, then per step: codes, state after the step, statistics of the step
"""

import pathlib
import sys

import numpy as np

K, D, N, STEPS = 5, 3, 11, 50
SEED = 14


# ---- inputs: a few drifting clusters that come and go, on a grid of 1/16, so that float32 holds them exactly ---------


def make_inputs(rng):
    centres = rng.uniform(-3, 3, (4, D))
    shown = [(0, 1, 2), (0, 1), (2, 3), (0, 3, 1), (3,)]
    inputs = []
    for t in range(STEPS):
        centres += rng.normal(0, 0.15, centres.shape)
        cluster = rng.choice(shown[t // 8 % len(shown)], N)
        x = np.round(16 * (centres[cluster] + rng.normal(0, 0.4, (N, D)))) / 16
        weights = rng.choice([0, 0.25, 0.5, 1, 1.5], N)
        rows = np.where(rng.random(K) < 0.15, -1, rng.permutation(N)[:K])
        inputs.append((x + 0.0, weights, rows))
    return inputs


class State:
    def __init__(self, codebook, size):
        self.codebook = codebook.copy()
        self.size = np.array(size, float)
        self.sums = self.size[:, None] * codebook
        self.unused = np.zeros(K, int)


def write_rows(state, rows):
    """The new codebook, but for codes that nothing is known of."""
    known = (state.size != 0) | (state.sums != 0).any(1)
    state.codebook[known] = rows[known]


# ---- blends: n rows and their sum s for each code, t = 1, 2, ... ------------------------------------------------------


def rectokens(decay, epsilon=1e-5):
    def blend(state, n, s, t):
        for k in range(K):
            if n[k] > 0:
                state.size[k] = decay * state.size[k] + (1 - decay) * n[k]
                state.sums[k] = decay * state.sums[k] + (1 - decay) * s[k]
                state.codebook[k] = state.sums[k] / max(state.size[k], epsilon)

    return blend


def sonnet(decay, epsilon=1e-5):
    def blend(state, n, s, t):
        def average(hidden, value):
            hidden -= (hidden - value) * (1 - decay)
            return hidden / (1 - decay**t)

        size, dw = average(state.size, n), average(state.sums, s)
        total = size.sum()
        size = (size + epsilon) / (total + K * epsilon) * total
        write_rows(state, dw / size[:, None])

    return blend


def euclidean_codebook(decay, epsilon=1e-5):
    """vector-quantize-pytorch and EnCodec."""

    def blend(state, n, s, t):
        def ema_inplace(moving, new):
            moving *= decay
            moving += new * (1 - decay)

        def laplace_smoothing(x):
            return (x + epsilon) / (x.sum() + K * epsilon)

        ema_inplace(state.size, n)
        ema_inplace(state.sums, s)
        smoothed = laplace_smoothing(state.size) * state.size.sum()
        write_rows(state, state.sums / smoothed[:, None])

    return blend


def mimi(decay, epsilon=1e-5):
    def blend(state, n, s, t):
        state.size += (1 - decay) * (n - state.size)
        state.sums += (1 - decay) * (s - state.sums)
        write_rows(state, state.sums / np.maximum(state.size, epsilon)[:, None])

    return blend


# ---- dead codes: which codes are dead, and the size that their replacements start with --------------------------------


def never(state, t):
    return np.zeros(K, bool), 0


def unused_for(steps):
    return lambda state, t: (state.unused >= steps, 0)


def smaller_than(threshold, reset):
    return lambda state, t: (state.size < threshold, reset)


def below_share(ratio, reset_ratio, every):
    def find(state, t):
        mean = state.size.sum() / K
        return (state.size < ratio * mean) & (t % every == 0), reset_ratio * mean

    return find


# ---- a sequence -------------------------------------------------------------------------------------------------------


def nearest(x, codebook):
    distance = ((x[:, None, :] - codebook[None]) ** 2).sum(2)
    ordered = np.sort(distance, 1)
    assert (ordered[:, 1] - ordered[:, 0]).min() > 1e-4, "a near tie: choose another SEED"
    return distance.argmin(1), ordered[:, 0].mean() / D


def make_sequence(inputs, codebook, blend, find_dead, size, weighted):
    state = State(codebook, size)
    lines = state_lines(state)
    total_restarted = 0
    for t, (x, weights, rows) in enumerate(inputs, 1):
        codes, loss = nearest(x, state.codebook)
        assignment = np.eye(K)[codes] * (weights[:, None] if weighted else 1)
        n, s = assignment.sum(0), assignment.T @ x
        blend(state, n, s, t)
        state.unused = np.where(n > 0, 0, state.unused + 1)

        dead, reset = find_dead(state, t)
        restarted = dead & (rows >= 0)
        state.codebook[restarted] = x[rows[restarted]]
        state.sums[restarted] = reset * x[rows[restarted]]
        state.size[restarted] = reset
        state.unused[restarted] = 0
        total_restarted += restarted.sum()

        p = n[n > 0] / n.sum()
        perplexity = np.exp(-(p * np.log(p)).sum())
        lines += [line("codes", codes)] + state_lines(state)
        lines += [line("stats", [loss, perplexity, (n > 0).sum(), restarted.sum()])]
    return lines, total_restarted


def line(name, values):
    return " ".join([name] + [format(v + 0, ".8g") for v in np.ravel(values)])


def state_lines(state):
    return [
        line("codebook", state.codebook),
        line("embed_sum", state.sums),
        line("cluster_size", state.size),
        line("steps", state.unused),
    ]


ZEROS, ONES = np.zeros(K), np.ones(K)
# Mimi starts with ones; two codes smaller than its threshold make it restart them within fifty steps.
FEW = np.array([1, 1, 1, 0.0625, 0.03125])

# name: blend, dead codes, the cluster sizes at the start, whether rows are weighted
SEQUENCES = {
    "rectokens": (rectokens(0.99), unused_for(20), ZEROS, False),
    "sonnet": (sonnet(0.99), never, ZEROS, False),
    "vector_quantize_pytorch": (euclidean_codebook(0.8), smaller_than(2, 2), ONES, False),
    "encodec": (euclidean_codebook(0.99), smaller_than(2, 2), ONES, False),
    "mimi": (mimi(0.99), below_share(0.1, 1, 5), FEW, False),
    "active_only_min_cluster_size": (rectokens(0.75), smaller_than(1, 1.5), ONES, True),
    "laplace_usage_ratio": (euclidean_codebook(0.5, 0.125), below_share(0.25, 0.75, 3), ZEROS, True),
    "clamp_unused_steps": (mimi(0.75, 0.5), unused_for(4), ONES, True),
}


def main():
    here = pathlib.Path(__file__).resolve().parent
    directory = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here.parent / "data"
    rng = np.random.default_rng(SEED)
    codebook = np.round(16 * rng.uniform(-3, 3, (K, D))) / 16
    inputs = make_inputs(rng)
    header = ["# Written by tests/scripts/make_ema_sequences.py", f"shape {K} {D} {N} {STEPS}"]

    lines = list(header)
    for x, weights, rows in inputs:
        lines += [line("x", x), line("weights", weights), line("replacement_indices", rows)]
    (directory / "ema_inputs.txt").write_text("\n".join(lines) + "\n")

    for name, sequence in SEQUENCES.items():
        lines, restarted = make_sequence(inputs, codebook, *sequence)
        (directory / f"ema_{name}.txt").write_text("\n".join(header + lines) + "\n")
        print(f"{name}: {restarted} restarts")


if __name__ == "__main__":
    main()
