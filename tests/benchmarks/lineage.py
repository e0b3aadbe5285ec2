"""Likeness of all layers of two models against a pair of layers at a time, and its memory.

Part of ``make bench``. Random states of two models of 30 layers over 200 texts. The pair at a time
is written as the equations are: two kernel matrices, centred, and three inner products for every
pair of layers. Both run in this process in turns; what counts is the ratio, its median over rounds.
"""

from __future__ import annotations

import statistics
import tracemalloc

import numpy as np
from measure import timed
from rlhf_trust.lineage import cka

LAYERS, TEXTS, HIDDEN, ROUNDS = 30, 200, 576, 3


def one_pair(first: np.ndarray, second: np.ndarray) -> float:
    """CKA of two layers' states [texts, hidden], linear and biased: tr(KHLH) / sqrt(tr(KHKH)
    tr(LHLH))."""
    m = len(first)
    centring = np.eye(m) - 1 / m
    k, other = (x @ x.T for x in (first - first.mean(0), second - second.mean(0)))

    def hsic(a, b):
        return np.trace(a @ centring @ b @ centring)

    return hsic(k, other) / np.sqrt(hsic(k, k) * hsic(other, other))


def pair_at_a_time(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.array([[one_pair(a, b) for b in second] for a in first])


def main() -> None:
    first, second = np.random.default_rng(0).standard_normal((2, LAYERS, TEXTS, HIDDEN))
    ratios, found = [], {}
    for _ in range(ROUNDS):
        slow = timed(lambda: found.update(theirs=pair_at_a_time(first, second)))
        fast = timed(lambda: found.update(ours=cka(first, second, unbiased=False)))
        np.testing.assert_allclose(found["ours"], found["theirs"], rtol=1e-9)
        ratios.append(slow / fast)
    print(
        f"CKA of {LAYERS} x {LAYERS} layer pairs on {TEXTS} texts: {slow:.1f} s a pair at a time, "
        f"{fast:.2f} s together; ratio {statistics.median(ratios):.0f} (median of {ROUNDS})"
    )
    for layers in (1, LAYERS):
        tracemalloc.start()
        cka(first, second[:layers], unbiased=False)
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(f"{LAYERS * layers} pairs: {peak:.0f} MB")


if __name__ == "__main__":
    main()
