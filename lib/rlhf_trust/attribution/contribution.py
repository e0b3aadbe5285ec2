"""From influence scores to conclusions: a stage's contribution, and single examples.

The paper's number is the mean of the *normalised* scores. One outlier can decide it, since the
largest score sets the scale, so conclusions use ``standardised = Σ score / √(Σ score²)`` with its
interval and p-value. Negative: the stage's training data drive the change on this vertical;
positive: they oppose it (:mod:`.solvers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import StudyError
from ..data.preferences import PreferencePair
from .solvers import Scores


@dataclass(frozen=True)
class Contribution:
    """What a stage's training data contributed to the change on one vertical.

    ``contribution``: mean normalised score, in [-1, 1] (the paper's number). ``standardised``: Σ
    score / √(Σ score²), in [-√examples, √examples], with a 95 % interval ``ci_low`` to ``ci_high``
    and ``p_null``. ``n``: evaluation items.
    """

    contribution: float
    standardised: float
    ci_low: float
    ci_high: float
    p_null: float
    n: int


def normalised(scores: np.ndarray) -> np.ndarray:
    """Positive scores over the largest positive, negative ones over the size of the most negative:
    [n] → [n], each in [-1, 1], both ends attained where there are scores of that sign; zeros
    stay."""
    scores = np.asarray(scores, dtype=float)
    highest, lowest = scores.max(initial=0.0), scores.min(initial=0.0)
    return np.where(scores > 0, scores / (highest or 1.0), scores / (-lowest or 1.0))


def standardised(scores: np.ndarray) -> np.ndarray:
    """Σ score / √(Σ score²) over the first axis; 0 where all scores are. Bounded by ±√n
    (Cauchy-Schwarz)."""
    # The statistic has no scale: divide by the largest first, so that squares of tiny scores do
    # not underflow.
    scores = np.asarray(scores, dtype=float)
    largest = np.abs(scores).max(0)
    scaled = scores / np.where(largest > 0, largest, 1.0)
    length = np.sqrt(np.square(scaled).sum(0))
    return scaled.sum(0) / np.where(length > 0, length, 1.0)


def contribution(by_item: np.ndarray, seed: int = 0, draws: int = 1000) -> Contribution:
    """A stage's contribution to one vertical from the scores against each of its items.

    Parameters
    ----------
    by_item
        Scores [examples, items] (``Scores.by_item``); their mean over items is the score of the
        mean evaluation gradient.
    seed, draws
        Of the bootstrap and of the sign flips.

    The interval is the bootstrap's: items (columns) drawn with replacement, percentiles 2.5 and
    97.5 of the standardised sum. With one item nothing is known about its spread, and the interval
    is the whole range ±√examples.

    The p-value's null: an item's evaluation gradient is as likely as its negative. Signs of the
    columns are flipped at random before averaging, two-sided, p = (1 + count) / (1 + draws).
    (Permuting training examples instead would leave the sum as it is.) What is compared is the
    numerator Σ score, and not the ratio: items often agree on which examples matter, their columns
    are then nearly proportional, and every flip only rescales the scores. The ratio cannot see a
    rescaling, and would give p = 1 to items of one mind; numerator and ratio are zero together, so
    both ask the same question.
    """
    by_item = np.asarray(by_item, dtype=float)
    examples, items = by_item.shape
    if not by_item.size or not np.isfinite(by_item).all():
        raise StudyError("contribution: there is no score, or one is not finite")
    rng, scores = np.random.default_rng(seed), by_item.mean(1)
    if items > 1:
        counts = rng.multinomial(items, np.full(items, 1 / items), size=draws)
        low, high = np.percentile(standardised(by_item @ counts.T / items), [2.5, 97.5])
    else:
        low, high = -np.sqrt(examples), np.sqrt(examples)
    sums = by_item.sum(0)  # Σ score of each item [items]
    flips = rng.choice([-1.0, 1.0], size=(draws, items))
    # A flip of all signs or none repeats the observed size up to rounding, and must count.
    reached = np.abs(flips @ sums) >= np.abs(sums.sum()) * (1 - 1e-9)
    return Contribution(
        contribution=float(normalised(scores).mean()),
        standardised=float(standardised(scores)),
        ci_low=float(low),
        ci_high=float(high),
        p_null=float((1 + reached.sum()) / (1 + draws)),
        n=items,
    )


def example_z(by_layer: np.ndarray) -> np.ndarray:
    """Each example's score against permuting gradient blocks between examples: [layers, n] → z [n].

    Null: layer by layer, the n gradient blocks g_{l,1..n} are dealt out to the examples anew, by
    independent random permutations π_l. λ_l and r_l of DataInf are sums over all examples, so they
    stay, and so a layer's scores b_{l,i} = −r_lᵀ g_{l,i} are merely dealt out with the blocks:
    example i gets s_i* = Σ_l b_{l,π_l(i)}.

    For one example, π_l(i) is uniform over 1..n. Hence b_{l,π_l(i)} has the layer's mean and its
    *population* variance over examples; π_l are independent over layers, so both add up, without
    any approximation:

        E s_i*   = Σ_l mean_i b_{l,i}              (the same for every example: the mean score)
        Var s_i* = Σ_l mean_i (b_{l,i} − mean_i b_{l,i})²
        z_i      = (s_i − E s_i*) / √Var s_i*

    The mean of z is 0. Its variance is 1 only if layers are uncorrelated over examples: a spread
    above 1 says that the layers agree about which examples matter, and |z| of some 3 or more that
    they agree on this one. 0 everywhere if no layer tells the examples apart.
    """
    by_layer = np.asarray(by_layer, dtype=float)
    largest = np.abs(by_layer).max(initial=0.0)
    blocks = by_layer / (largest or 1.0)  # z has no scale; squares of tiny scores would underflow
    deviations = (blocks - blocks.mean(1, keepdims=True)).sum(0)
    spread = np.sqrt(blocks.var(1).sum())
    return deviations / spread if spread > 1e-12 else np.zeros(by_layer.shape[1])


def example_p(by_layer: np.ndarray, seed: int = 0, draws: int = 100_000) -> np.ndarray:
    """Two-sided p-values of single examples under the null of :func:`example_z`: [layers, n] → [n].

    Under that null every example's score has one and the same distribution, that of one block
    drawn from each layer, so ``draws`` of it serve all examples and no normal tails are assumed (a
    layer's scores are heavy-tailed): p = (1 + count of draws as far from the mean score) / (1 +
    draws). Of n examples some look striking by chance: ``scipy.stats.false_discovery_control(p)``
    is Benjamini and Hochberg's correction over examples, and ``draws`` has to be well above n for
    it to find any. (What is small where layers merely agree is said at :func:`example_z`.)
    """
    by_layer = np.asarray(by_layer, dtype=float)
    deviations = by_layer - by_layer.mean(1, keepdims=True)
    rng = np.random.default_rng(seed)
    null = np.zeros(draws)
    for layer in deviations:
        null += rng.choice(layer, draws)
    # Rounding must not tell a draw from the example that it repeats.
    rounding = 1e-12 * np.abs(by_layer).max(initial=0.0)
    sizes = np.abs(deviations.sum(0)) * (1 - 1e-9) - rounding
    reached = draws - np.searchsorted(np.sort(np.abs(null)), sizes)
    return (1 + reached) / (1 + draws)


def attribution_tables(
    scores: Mapping[str, Scores],
    pairs: Sequence[PreferencePair],
    verticals: Sequence[str],
    stage: str,
    loss: str,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A stage's rows of ``attribution_summary.csv`` (every solver's contribution to each vertical)
    and of ``attribution.csv`` (DataInf's score of each example).

    Parameters
    ----------
    scores
        Name → scores of ``pairs``, with verticals as groups. What follows a comma in a name is
        said of the loss: ``datainf, token mean`` has the solver ``datainf`` and the loss ``<loss>,
        token mean``.
    verticals
        In their order. One without items (no answer changed) has a row of DataInf's with n = 0.
    seed
        Of :func:`contribution`.
    """
    summary, examples = [], []
    for vertical in verticals:
        cell = {"stage": stage, "vertical": vertical, "solver": "datainf", "loss": loss}
        parts = {name: s.groups[vertical] for name, s in scores.items() if vertical in s.groups}
        if not parts:
            summary.append(cell | {"n": 0})
        for name, part in parts.items():
            solver, comma, mean = name.partition(", ")
            cell |= {"solver": solver, "loss": loss + comma + mean}
            summary.append(cell | vars(contribution(part.by_item, seed)))
            if solver == "datainf":
                ids = {"example_id": [p.id for p in pairs], "source": [p.source for p in pairs]}
                values = {"influence": part.influence, "normalised": normalised(part.influence)}
                z = {"z": example_z(part.by_layer)}
                examples.append(pd.DataFrame(cell | ids | values | z))
    return pd.DataFrame(summary), pd.concat(examples) if examples else pd.DataFrame()
