"""From influence scores to conclusions: sums over a stage's examples, and single examples.

The paper's number is the mean of the *normalised* scores, a sum over all training examples. It is
kept as the paper's, beside ``standardised = Σ score / √(Σ score²)``, which one outlier cannot
decide. No conclusion is drawn from the sign of either: Σ score = −rᵀ Σ g, and at an optimum of the
training loss Σ g vanishes, whatever the stage did. The sign says what more training on the same
examples would do (negative: push the change further), and over seeds it is not stable.

Two things can be concluded. Which *groups* of examples score above others
(:func:`group_contrasts`), since a contrast does not vanish at an optimum. And whether the sum has
to do with the training data at all, by a null over these data (:func:`label_null`,
:func:`reference_null`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from ..data.preferences import PreferencePair
from ..decode import Example
from ..losses import DPOLoss, INPOLoss, Loss
from .features import effects
from .solvers import SOLVERS, Scores


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


def contribution(by_item: np.ndarray, seed: int = 0, draws: int = 1000) -> dict[str, float]:
    """The scores of a stage's training examples for one vertical, summed over all of them.

    Parameters
    ----------
    by_item
        Scores [examples, items] (``Scores.by_item``); their mean over items is the score of the
        mean evaluation gradient.
    seed, draws
        Of the bootstrap.

    Returns
    -------
    dict
        ``contribution``: mean normalised score, in [-1, 1] (the paper's number). ``standardised``:
        Σ score / √(Σ score²), in [-√examples, √examples], with a 95 % interval over evaluation
        items, ``ci_low`` to ``ci_high``. ``n``: evaluation items.

    The interval is the bootstrap's: items (columns) drawn with replacement, percentiles 2.5 and
    97.5 of the standardised sum. With one item nothing is known about its spread, and the interval
    is the whole range ±√examples. It is about other items; about other training data it says
    nothing.
    """
    by_item = np.asarray(by_item, dtype=float)
    examples, items = by_item.shape
    rng, scores = np.random.default_rng(seed), by_item.mean(1)
    if items > 1:
        counts = rng.multinomial(items, np.full(items, 1 / items), size=draws)
        low, high = np.percentile(standardised(by_item @ counts.T / items), [2.5, 97.5])
    else:
        low, high = -np.sqrt(examples), np.sqrt(examples)
    sums = {"contribution": normalised(scores).mean(), "standardised": standardised(scores)}
    return sums | {"ci_low": low, "ci_high": high, "n": items}


# --- could it be chance? A null over the training data -------------------------------------------

Nulls = dict[tuple[str, str], float]
"""(Solver's name, vertical) → p-value."""


def swapped_pairs(examples: Sequence[Example], loss: Loss) -> tuple[list[Example], Loss]:
    """Pairs with chosen and rejected swapped, and the loss with its references swapped alike."""
    turned = [replace(e, sequences=e.sequences[::-1]) for e in examples]
    if isinstance(loss, DPOLoss | INPOLoss):
        loss = replace(loss, reference={id: two[::-1] for id, two in loss.reference.items()})
    return turned, loss


def swap_factors(loss: Loss, values: np.ndarray, swapped: np.ndarray) -> np.ndarray:
    """The gradient of each pair with chosen and rejected swapped, as a multiple of its own: [n].

    ``values``, ``swapped``: the pairs' losses as they are, and swapped, [n].

    A pairwise loss is a function f of a margin m that swapping turns into −m: the difference of
    rewards, β times that of log-ratios (DPO), that of log-ratios (INPO). With ∇ the gradient of m,
    the pair's own gradient is f'(m) ∇ and the swapped one's −f'(−m) ∇, so exactly

        reward, DPO   f = −log σ(m)                   factor −σ(m) / σ(−m) = −eᵐ
        INPO          f = (m − c)², c = 1/(2η)        factor (m + c) / (m − c)

    Both are −1 at m = 0: to first order in the margin a swap only turns the sign. Margins are had
    from the two losses, f(−m) − f(m), which is m for the first and 4 c m for the second.
    """
    gap = np.asarray(swapped, dtype=float) - np.asarray(values, dtype=float)
    if isinstance(loss, INPOLoss):
        c = 1 / (2 * loss.eta)
        return (gap / (4 * c) + c) / (gap / (4 * c) - c)
    return -np.exp(gap)


def label_null(
    scores: Mapping[str, Scores], factors: np.ndarray, seed: int = 0, draws: int = 1000
) -> Nulls:
    """Does the sum over a stage's pairs depend on which answer people chose? For each solver that
    works on gradients and each group of items (vertical).

    Null: each pair's label is as likely the other way round. Chosen and rejected are swapped at
    random, with the trained weights and the curvature as they are; a swapped pair's score is
    ``factors`` (:func:`swap_factors`) times its own (for cosines, the factor's sign). With d half
    the difference between a pair's score and its swapped score, the sum under random labels is a
    constant plus Σ ± d, so p = (1 + count of |Σ ± d| ≥ |Σ d|) / (1 + draws), two-sided.

    For the logistic losses d = ½ rᵀ∇m: what the label adds, without the weight σ(−m) by which a
    pair that is learnt counts less. Unlike the sum of scores it does not vanish as training
    converges.

    The null is exact where the weights do not depend on these labels (held-out pairs, or gradients
    that are noise). Weights that have learnt random labels agree with them, too: in simulated
    studies of a two-layer margin (40 pairs, random labels) p < .05 came up in 8 % at a mean margin
    of 0.1, and in 12 to 13 % at 3 to 6. Only training again on shuffled labels is strict.
    """
    found = {}
    for name, own in scores.items():
        if (solver := name.partition(", ")[0]) in SOLVERS:
            times = np.sign(factors) if solver == "gradient_cosine" else factors
            for vertical, part in own.groups.items():
                signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, len(times)))
                effect = part.influence * (1 - times) / 2
                # All signs alike repeat the observed size up to rounding, and must count.
                reached = np.abs(signs @ effect) >= np.abs(effect.sum()) * (1 - 1e-9)
                found[name, vertical] = float((1 + reached.sum()) / (1 + draws))
    return found


def reference_null(scores: Mapping[str, Scores], trained: int) -> Nulls:
    """Do the examples that SFT was trained on score otherwise than others of their kind?

    SFT's loss has no pair that could be swapped. Null: trained examples and a reference set of the
    same distribution that was not trained on are exchangeable. ``scores``: of both, the ``trained``
    ones first, with the curvature of both together, so that neither is favoured. Welch's t-test of
    their means, two-sided.
    """
    found = {}
    for name, own in scores.items():
        for vertical, part in own.groups.items():
            two = part.influence[:trained], part.influence[trained:]
            found[name, vertical] = float(scipy_stats.ttest_ind(*two, equal_var=False).pvalue)
    return found


# --- single examples, and groups of them ---------------------------------------------------------


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


def group_contrasts(
    scores: Mapping[str, Scores], groups: pd.DataFrame, stage: str, loss: str, draws: int = 500
) -> pd.DataFrame:
    """How far each group of training examples scores above the others: rows of
    ``attribution_summary.csv``.

    Parameters
    ----------
    scores
        Of DataInf and of the exact layer-wise solver that it approximates, with verticals as
        groups of items.
    groups
        Groups of examples, columns of ``features.features`` such as ``source: harmless`` and
        ``topic``.

    A row says ``<loss>: <group>`` for its loss; ``contribution`` is the effect of
    ``features.effects`` (Cliff's delta; for topics a difference in standard deviations; above 0:
    the group raises the evaluation loss more than the others) with its interval over examples,
    ``p_null`` its p-value from scores dealt out to the examples at random, Holm-corrected over the
    groups of the cell, and ``n`` counts examples.
    """
    rows = []
    for solver in ("datainf", "exact_layerwise"):
        for vertical, part in scores[solver].groups.items() if solver in scores else ():
            found = effects(part.influence, groups, f"{stage}/{loss}/{vertical}", draws)
            names = {"effect": "contribution", "p_holm": "p_null"}
            found = found.dropna(subset="effect").rename(columns=names)
            cell = {"stage": stage, "vertical": vertical, "solver": solver}
            rows.append(found.assign(loss=loss + ": " + found["feature"], **cell))
    columns = ["stage", "vertical", "solver", "loss", "contribution", "ci_low", "ci_high"]
    return pd.concat(rows)[[*columns, "p_null", "n"]] if rows else pd.DataFrame()


def attribution_tables(
    scores: Mapping[str, Scores],
    pairs: Sequence[PreferencePair],
    verticals: Sequence[str],
    stage: str,
    loss: str,
    seed: int = 0,
    p_null: Nulls | None = None,
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
    p_null
        From :func:`label_null` or :func:`reference_null`; NaN for names and verticals that it has
        not.
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
            p = (p_null or {}).get((name, vertical), np.nan)
            summary.append(cell | contribution(part.by_item, seed) | {"p_null": p})
            if solver == "datainf":
                ids = {"example_id": [p.id for p in pairs], "source": [p.source for p in pairs]}
                values = {"influence": part.influence, "normalised": normalised(part.influence)}
                z = {"z": example_z(part.by_layer)}
                examples.append(pd.DataFrame(cell | ids | values | z))
    return pd.DataFrame(summary), pd.concat(examples) if examples else pd.DataFrame()
