"""Do intervals cover, and how often is nothing called something? (``make bench``)

Simulated studies with a known mean change: coverage of the paired interval by kind of change, of
the crossed one by items, seeds and how much seeds vary, of both with clusters of very unequal size,
and the share of contrasts between two placebos that are called clear. Results of 500 studies a
cell: ``tests/reference/coverage.csv`` (``--save`` writes it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from measure import timed
from rlhf_trust.stats import crossed_change, generator, paired_change
from scipy.special import ndtri

REFERENCE = Path(__file__).parents[1] / "reference" / "coverage.csv"


def zero_inflated(draw, zeros: float = 0.7):
    return lambda random, n: draw(random, n) * (random.random(n) > zeros)


def signs(gains: float):
    return lambda random, n: np.where(random.random(n) < gains, 1.0, -1.0)


PAIRED = {  # name: (n changes, their true mean)
    "-1, 0, 1; half gains": (zero_inflated(signs(0.5)), 0.0),
    "-1, 0, 1; 80 % gains": (zero_inflated(signs(0.8)), 0.18),
    "0, 1": (zero_inflated(signs(1.0)), 0.3),
    "0, 1; 90 % zeros": (zero_inflated(signs(1.0), 0.9), 0.1),
    "quarters, all gains": (zero_inflated(lambda r, n: r.integers(1, 5, n) / 4), 0.1875),
    "exponential gains": (zero_inflated(lambda r, n: r.exponential(1, n)), 0.3),
    "Laplace": (zero_inflated(lambda r, n: r.laplace(0, 1, n)), 0.0),
    "normal": (lambda r, n: r.normal(size=n), 0.0),
    "exponential, no zeros": (lambda r, n: r.exponential(1, n), 1.0),
}


SIZES = {  # of clusters, by items
    24: [1, 1, 1, 2, 2, 3, 5, 9],
    36: [1, 1, 1, 1, 2, 2, 3, 4, 5, 7, 9],
    60: [1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 6, 8, 9, 12],
}


def crossed(
    random,
    seeds: int,
    items: int,
    of_seeds: float,
    of_items: float,
    gains: float | None,
    zeros: float = 0.7,
    clusters: np.ndarray | None = None,
):
    """Changes [seeds, items] and their true mean.

    Effects of seeds and items are standard deviations beside an interaction of 1, as large as an
    effect of the items' clusters. ``gains``: a share ``zeros`` are then 0, the others 1 (this share
    of them) or -1; None: normal values.
    """
    values = random.normal(size=(seeds, items)) + of_items * random.normal(size=items)
    values += of_seeds * random.normal(size=(seeds, 1))
    variance = 1 + of_items**2 + of_seeds**2
    if clusters is not None:
        values += random.normal(size=clusters[-1] + 1)[clusters]
        variance += 1
    if gains is None:
        return values, 0.0
    values /= np.sqrt(variance)
    changed = 1 - zeros
    up, down = ndtri(1 - changed * gains), ndtri(changed * (1 - gains))
    return (values > up).astype(float) - (values < down), changed * (2 * gains - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=500, help="per cell")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    rows = []

    def cell(what: str, kind: str, seeds: int, items: int, study) -> None:
        """``study(random)``: its interval and the truth."""
        random = generator(f"{what}/{kind}/{seeds}/{items}")
        studies = [study(random) for _ in range(options.studies)]
        covered = np.mean([found.low <= truth <= found.high for found, truth in studies])
        clear = np.mean([found.p < 0.05 for found, _ in studies])
        rows.append((what, kind, seeds, items, options.studies, covered, clear))
        print(f"{what}, {kind}, {seeds} x {items}: {covered:.3f}, clear {clear:.3f}", flush=True)

    for items in (12, 24, 36, 60):
        for kind, (draw, truth) in PAIRED.items():

            def paired(random, draw=draw, truth=truth, items=items):
                return paired_change(draw(random, items), np.zeros(items), bounds=WIDE), truth

            cell("paired", kind, 1, items, paired)
    for items, sizes in SIZES.items():
        clusters = np.repeat(np.arange(len(sizes)), sizes)
        for seeds in (1, 3, 5):
            for gains in (None, 0.5, 1.0):
                for of_seeds in (0.0, 0.6):

                    def unequal(
                        random, size=(seeds, items), setting=(of_seeds, 0.3, gains), labels=clusters
                    ):
                        table, truth = crossed(random, *size, *setting, clusters=labels)
                        return crossed_change(table, np.zeros(size[1]), labels, WIDE), truth

                    values = "normal" if gains is None else f"70 % zeros, {gains:.0%} gains"
                    if seeds > 1 or of_seeds == 0:
                        cell("unequal", f"{values}, seeds {of_seeds}", seeds, items, unequal)
    for seeds in (3, 5):
        for items in (24, 36, 60):
            for gains in (0.8, 1.0):

                def sparse(random, size=(seeds, items), gains=gains):
                    table, truth = crossed(random, *size, 0.6, 0.3, gains, zeros=0.9)
                    return crossed_change(table, np.zeros(size[1]), bounds=WIDE), truth

                kind = f"90 % zeros, {gains:.0%} gains, items 0.3, seeds 0.6"
                cell("crossed", kind, seeds, items, sparse)
            for of_seeds in (0.1, 0.3, 0.6):
                for gains in (None, 0.5):

                    def placebos(random, shape=(seeds, items), of_seeds=of_seeds, gains=gains):
                        """What a placebo does to an item varies with its seed only."""
                        arms = [crossed(random, *shape, of_seeds, 0.0, gains)[0] for _ in "ab"]
                        return crossed_change(*arms), 0.0

                    values = "normal" if gains is None else "70 % zeros"
                    cell("placebos", f"{values}, seeds {of_seeds}", seeds, items, placebos)
    for seeds in (3, 5, 2):
        for items in (24, 36, 60):
            for gains in (None, 0.5, 0.8, 1.0):
                for of_items, of_seeds in ((0.3, 0.0), (0.3, 0.3), (0.3, 0.6), (1.5, 0.3)):
                    setting = of_seeds, of_items, gains

                    def study(random, shape=(seeds, items), setting=setting):
                        table, truth = crossed(random, *shape, *setting)
                        return crossed_change(table, np.zeros(shape[1])), truth

                    values = "normal" if gains is None else f"70 % zeros, {gains:.0%} gains"
                    kind = f"{values}, items {of_items}, seeds {of_seeds}"
                    cell("crossed", kind, seeds, items, study)
    columns = "what kind seeds items studies covered clear".split()
    table = pd.DataFrame(rows, columns=columns)
    for (what, seeds), part in table.groupby(["what", "seeds"], sort=False):
        false_alarms = f", clear {part['clear'].mean():.3f}" if what == "placebos" else ""
        lowest, mean = part["covered"].min(), part["covered"].mean()
        print(
            f"{what}, {seeds} seeds: coverage {lowest:.3f} to {part['covered'].max():.3f}, ", end=""
        )
        print(f"mean {mean:.3f}{false_alarms}")
    random = generator("speed")
    changes = random.normal(size=(5, 60))
    paired_ms = timed(lambda: [paired_change(changes[0], 0 * changes[0]) for _ in range(1000)])
    crossed_ms = 10 * timed(lambda: [crossed_change(changes, 0 * changes) for _ in range(100)])
    print(f"paired: {paired_ms:.2f} ms a call, crossed: {crossed_ms:.2f} ms")
    if options.save:
        table.round(4).to_csv(REFERENCE, index=False)


WIDE = (-np.inf, np.inf)


if __name__ == "__main__":
    main()
