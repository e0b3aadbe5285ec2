"""Do influence scores predict retraining? Models trained again on other data, and planted examples.

- **Linear datamodeling score** (Park et al. 2023, TRAK, arXiv 2303.14186, eq. 3). Train on random
  halves S of a pool and note each evaluation item's loss. Influence i is a slope, so the scores
  predict Σ_{i∈S} influence_i for S; a solver's score is Spearman's correlation of prediction and
  outcome over halves, averaged over items.
- **Leaving out** the most harmful and the most helpful examples, against as many at random.
- **Planted examples**: mislabelled pairs, and copies of evaluation items among the training
  examples.
- **Mitigation**: does a vertical get better when the pairs that harm it are left out, flipped or
  given less weight, more than when others are?

Sign everywhere: a score above 0 means that more weight on the example *raises* the evaluation loss.
Where that loss is the log-odds of a bad answer (:mod:`.metric`), above 0 is harmful.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from scipy import stats as scipy_stats

from .. import StudyError, stats
from ..artifacts import ResultCache, content_key, progress
from ..data.preferences import PreferencePair
from ..decode import Example, LowerStates
from ..fan_out import fan_out
from ..losses import Loss
from ..training import training_code
from .gradients import per_example_gradients
from .store import InMemory, whole

Outcomes = dict[str, np.ndarray]
"""Name of a measurement → its values [subsets, items], one row per retraining."""

Influences = Mapping[str, np.ndarray]
"""Solver → influence [examples, items]."""


# --- retraining on subsets ----------------------------------------------------------------------


def random_halves(n: int, count: int, seed: int) -> np.ndarray:
    """``count`` random halves of ``n`` examples: bool [count, n], n/2 true in each row."""
    if n < 2 or n % 2:
        raise StudyError(f"random halves: the pool must be even and not empty, got {n}")
    return ~_without(random_sets(n, n // 2, count, seed), n)


def random_sets(n: int, k: int, draws: int, seed: int) -> np.ndarray:
    """``draws`` random sets of ``k`` of ``n`` examples: indices [draws, k], ascending. The first
    sets do not depend on ``draws``."""
    rng = np.random.default_rng(seed)
    return np.array([np.sort(rng.permutation(n)[:k]) for _ in range(draws)])


def _without(removed: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Sets of indices that are left out → what is kept, bool [sets, n]."""
    return np.array([~np.isin(np.arange(n), indices) for indices in removed])


def retrained(
    directory: Path, name: str, key: object, subsets: np.ndarray, measure: Callable, seed: int = 0
) -> Outcomes:
    """Retrain on each subset and measure, keeping every result: a killed run resumes at the subset.

    Parameters
    ----------
    directory, name
        Results lie in ``<directory>/<name>.<hash of key>.jsonl`` (``artifacts.ResultCache``).
    key
        All that the results depend on besides the subsets and ``seed``, as JSON.
    subsets
        bool [count, n]: the examples to train on.
    measure
        ``measure(indices, seed)`` → name → values [items]. It must depend on nothing but its
        arguments (restore the start!): then results are the same with and without an interruption,
        and whichever process they come from (:mod:`..fan_out`).
        Subset s gets the seed ``seed + s``.
    """
    kept = ResultCache(directory / f"{name}.{content_key(name, key, seed, training_code())}.jsonl")
    trained_on = [(np.flatnonzero(subset), seed + s) for s, subset in enumerate(subsets)]
    keys = [content_key(s, some.tolist()) for s, (some, _) in enumerate(trained_on)]
    missing = {own: given for own, given in zip(keys, trained_on) if own not in kept}
    found = fan_out(lambda given: measure(*given), missing, kept.path.with_suffix(""))
    for own, values in progress(found, desc=name, total=len(missing), unit="retraining"):
        outcomes = {what: np.asarray(some, float).tolist() for what, some in values.items()}
        kept.add(own, outcomes=outcomes)
    rows = [kept[own]["outcomes"] for own in keys]
    return {what: np.array([row[what] for row in rows]) for what in rows[0]}


@dataclass(frozen=True)
class Queries:
    """Evaluation items and the loss through which they are evaluated."""

    examples: Sequence[Example]
    loss: Loss


def query_gradients(
    network,
    adapter: str,
    queries: Queries,
    pad: int,
    kept: LowerStates | None = None,
    allow_zero: bool = True,
) -> InMemory:
    """Per-example gradients of the adapter as it is now."""
    options = {"allow_zero": allow_zero, "kept": kept}
    some, loss = queries.examples, queries.loss
    found = per_example_gradients(network, adapter, some, loss, pad, **options)
    return InMemory(found, [example.id for example in some])


def mean_gradients(
    network, adapter: str, queries: Mapping[str, Queries], pad: int, kept: LowerStates | None = None
) -> InMemory:
    """The gradient of every query's mean loss, by the query's name."""
    found = [query_gradients(network, adapter, q, pad, kept) for q in queries.values()]
    means = {}
    for layer in found[0].layers:
        means[layer] = torch.stack([whole(some, layer).mean(0) for some in found]).float()
    return InMemory(means, list(queries))


def weights_content(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of weights (``models.snapshot``), for the key of :func:`retrained`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].cpu().numpy().tobytes())
    return digest.hexdigest()


# --- linear datamodeling score ------------------------------------------------------------------


def lds(influence: np.ndarray, halves: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Linear datamodeling score of each item: [items], in [-1, 1].

    Parameters
    ----------
    influence
        Scores [n, items], above 0 where an example raises the item's loss.
    halves, outcomes
        bool [count, n] and the items' losses after training on each: [count, items].

    Spearman's correlation over halves of Σ_{i∈S} influence_i and the loss. An item for which the
    scores predict the same for every half scores 0; one whose loss never changes has no score
    (NaN).
    """
    if len(halves) < 3 or not np.isfinite(influence).all() or not np.isfinite(outcomes).all():
        raise StudyError("LDS: needs at least 3 halves, and finite scores and outcomes")
    return _rank_correlations(_predicted(influence, halves).T, outcomes.T)


def _predicted(influence: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Σ_{i∈S} influence_i of each half and item, [halves, items], up to a scale per item."""
    predictions = halves @ influence
    # Equal sums that were added in another order differ in their last digits, and must stay ties.
    return np.round(predictions / (np.abs(predictions).max(0) + (predictions == 0).all(0)), 12)


def _rank_correlations(predicted: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Spearman's correlation in each row, [rows, halves] twice → [rows]: 0 where the prediction is
    constant, NaN where the outcome is."""
    # Rounded, so that equal correlations differ by exactly 0.
    found = np.nan_to_num(stats.row_rank_correlations(predicted, outcomes)).round(12)
    return np.where(np.ptp(outcomes, axis=1) > 0, found, np.nan)


def _resampled(size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of ``size`` is drawn in bootstrap resamples, [draws, size]."""
    return rng.multinomial(size, np.full(size, 1 / size), size=draws)


def noise_ceiling(
    by_seed: np.ndarray, name: str = "", draws: int = stats.DRAWS // 2
) -> tuple[stats.Interval, stats.Interval]:
    """How far two retrainings on the same halves agree, and the LDS that this leaves in reach.

    ``by_seed``: outcomes [seeds, halves, items], the same halves trained again under other seeds
    (order of examples). The agreement r is Spearman's correlation over halves between two seeds,
    averaged over items and pairs of seeds. The mean over S seeds has the reliability
    S r / (1 + (S − 1) r) (Spearman and Brown, 1910), and scores that predict the expected outcome
    of every half without error correlate with that mean by its square root. Both formulas are for
    linear correlations and hold about so for ranks; a negative r leaves a ceiling of 0.

    Returns the agreement and the ceiling, each with a 95 % interval over halves and items.
    """
    seeds, _, items = by_seed.shape
    of_pairs, drawn = [], []
    for first, second in combinations(by_seed, 2):
        of_pairs.append(np.nanmean(_rank_correlations(first.T, second.T)))
        drawn.append(_resampled_lds(first, second, name, draws))
    ends = np.nanquantile(np.mean(drawn, axis=0), stats.TAILS)
    agreement = np.array([np.mean(of_pairs), *ends])
    r = np.clip(agreement, 0, 1)
    ceiling = np.sqrt(seeds * r / (1 + (seeds - 1) * r))
    return tuple(stats.Interval(*map(float, three), items) for three in (agreement, ceiling))


def _resampled_lds(
    predicted: np.ndarray, outcomes: np.ndarray, name: str, draws: int
) -> np.ndarray:
    """Mean over items of the rank correlation over halves, in resamples of both: [draws].

    ``predicted``, ``outcomes``: [halves, items]. Equal names give equal resamples, so that solvers
    can be compared draw by draw. Resampling both ways at once (the pigeonhole bootstrap, A. B. Owen
    2007) errs, if at all, towards wide intervals.
    """
    rng, (count, items) = stats.generator(f"lds/{name}"), outcomes.shape
    times, item_weights = (_resampled(size, draws, rng) for size in (count, items))
    drawn = np.array([np.repeat(np.arange(count), row) for row in times])  # [draws, count]
    columns = [_rank_correlations(predicted[drawn, i], outcomes[drawn, i]) for i in range(items)]
    values = np.stack(columns, 1)
    weights = item_weights * ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # no item of a resample changes: NaN
        return (weights * np.nan_to_num(values)).sum(1) / weights.sum(1)


def lds_table(
    solvers: Influences,
    halves: np.ndarray,
    outcomes: np.ndarray,
    against: Sequence[str] = ("random", "tfidf"),
    name: str = "",
    draws: int = stats.DRAWS // 2,
) -> pd.DataFrame:
    """Every solver's mean LDS, and how far above the baselines ``against`` (among ``solvers``) it
    lies.

    A solver's influence is [n, items], or [repeats, n, items] for one that is drawn at random: its
    LDS is the mean over repeats, since a single draw can lie far from 0 by luck and would move
    every comparison with it.

    Columns solver, lds, ci_low, ci_high, items, halves; for each baseline b above_b, above_b_low,
    above_b_high, above_b_p (two-sided: twice the share of resamples on the other side of 0,
    add-one corrected), above_b_p_holm (corrected over the solvers). All come from the same
    resamples. A baseline is compared with those named before it.

    Scores that are the same for every example say nothing: they predict the same for every half
    (halves are of one size), and their LDS is 0, which is what ties broken at random would give.
    """
    values, resampled = {}, {}
    for solver, influence in solvers.items():
        repeats = influence[None] if influence.ndim == 2 else influence
        values[solver] = np.mean([lds(one, halves, outcomes) for one in repeats], axis=0)
        predicted = [_predicted(one, halves) for one in repeats]
        found = [_resampled_lds(some, outcomes, name, draws) for some in predicted]
        resampled[solver] = np.mean(found, axis=0)
    if np.isnan([*values.values()]).all():
        raise StudyError("LDS: no loss changes between retrainings; train longer or faster")
    rows = []
    for solver, own in values.items():
        low, high = np.nanquantile(resampled[solver], stats.TAILS)
        row = {"solver": solver, "lds": np.nanmean(own), "ci_low": low, "ci_high": high}
        row |= {"items": int((~np.isnan(own)).sum()), "halves": len(halves)}
        before = against[: against.index(solver)] if solver in against else against
        for baseline in before:
            gaps = resampled[solver] - resampled[baseline]
            gaps = gaps[~np.isnan(gaps)]
            above, beyond = f"above_{baseline}", min((gaps <= 0).sum(), (gaps >= 0).sum())
            row[above] = np.nanmean(own - values[baseline])
            row[f"{above}_low"], row[f"{above}_high"] = np.quantile(gaps, stats.TAILS)
            row[f"{above}_p"] = min(1.0, 2 * (1 + beyond) / (1 + len(gaps)))
        rows.append(row)
    table = pd.DataFrame(rows)
    for baseline in against:
        p = table[f"above_{baseline}_p"].dropna()
        table.loc[p.index, f"above_{baseline}_p_holm"] = stats.holm(p)
    return table


# --- what is left out ---------------------------------------------------------------------------


def most_harmful(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the ``k`` highest scores (they raise the loss most), highest first; of equal ones
    the first in the list."""
    scores = np.asarray(scores, dtype=float)
    if not 0 < k <= len(scores) // 2:
        raise StudyError(f"leaving out: {k} of {len(scores)} examples; at most half can be")
    if not np.isfinite(scores).all():
        raise StudyError("leaving out: a score is not finite")
    return np.argsort(-scores, kind="stable")[:k]


def most_helpful(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the ``k`` lowest scores (they lower the loss most), lowest first."""
    return most_harmful(-np.asarray(scores), k)


def ablations(
    n: int, removed: Mapping[str, np.ndarray], draws: int, seed: int
) -> tuple[tuple[str, ...], np.ndarray]:
    """Leave out of ``n`` examples each of the sets ``removed`` (name → indices), and ``draws``
    times as many at random as in the largest of them.

    Returns the names, one per retraining (``random`` several times), and what is trained on, bool
    [retrainings, n], for :func:`retrained`."""
    at_random = random_sets(n, max(map(len, removed.values())), draws, seed)
    names = (*removed, *["random"] * draws)
    return names, _without([*removed.values(), *at_random], n)


def pruning_table(names: Sequence[str], values: np.ndarray) -> pd.DataFrame:
    """Every arm of :func:`ablations` against the mean of the random ones.

    ``values``: what was measured after each retraining, [retrainings, items].

    Two things are uncertain, and each has its interval for the same change:

    - ``items_low`` to ``items_high``, p_items: other items could have been asked; paired by item,
      with the random arms averaged.
    - ``draws_low`` to ``draws_high``, p_draws: another random set, or the same set trained with
      another seed, would have given another mean. Student's t on the arms' means over items: arm −
      mean(random) ± t · s · √(1/a + 1/r) with a retrainings of the arm, r random ones, s the
      spread pooled within arms and a + r − 2 degrees of freedom. One retraining of an arm is taken
      to be as uncertain as one of the random arms. With r = 3 and a = 1 that is ± 4.97 s: only
      large effects can show. NaN for a single random draw.

    ``p`` is the larger of the two (a change counts only if neither chance explains it; NaN if
    either is unknown, as with fewer than ``stats.FEW`` items). Columns arm, change, …, p, draws
    (random ones), n (items).
    """
    names, rows = np.array(names), []
    at_random = values[names == "random"]
    for arm in dict.fromkeys(names[names != "random"].tolist()):
        of_arm = values[names == arm]
        change = stats.paired_change(of_arm.mean(0), at_random.mean(0))
        row = {"arm": arm, "change": change.value, "items_low": change.low}
        row |= {"items_high": change.high, "p_items": change.p}
        between = _between_draws(of_arm.mean(1), at_random.mean(1))
        row |= dict(zip(("draws_low", "draws_high", "p_draws"), between))
        p = np.max([row["p_items"], row["p_draws"]])
        rows.append(row | {"p": p, "draws": len(at_random), "n": change.n})
    return pd.DataFrame(rows)


def _between_draws(arm: np.ndarray, at_random: np.ndarray) -> tuple[float, float, float]:
    """Interval and p-value of the difference of two means of retrainings, [a] and [r]."""
    if len(at_random) < 2:
        return np.nan, np.nan, np.nan
    if not max(np.ptp(arm), np.ptp(at_random)) > 0:  # no spread (or nothing measured)
        change = float(arm[0] - at_random[0])
        return change, change, float(change == 0)
    test = scipy_stats.ttest_ind(arm, at_random)
    return *map(float, test.confidence_interval(stats.LEVEL)), float(test.pvalue)


def ranked_right(pair_losses: np.ndarray) -> np.ndarray:
    """Which pairs a model ranks as people did, 0 or 1, from their reward or DPO losses [n]: −log
    σ(margin) lies below log 2 exactly where the margin is above 0."""
    return (np.asarray(pair_losses) < math.log(2)).astype(float)


# --- mitigation ---------------------------------------------------------------------------------

ACTIONS = ("remove", "flip", "down-weight")
"""What can be done to a pair: leave it out, swap chosen and rejected, train on it with less
weight."""


def mitigations(
    n: int, plan: Sequence[tuple[str, str, np.ndarray]], draws: int, seed: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """The trainings that an answer takes: ``plan``, and every action on random pairs.

    Parameters
    ----------
    plan
        Action (of ``ACTIONS``), how the pairs were selected, and their indices among ``n``.
    draws
        Random sets for every action and number of pairs in ``plan``. Actions on as many pairs share
        them.

    Returns
    -------
    arms
        One row a training: action, selection (``random`` for the draws), pairs. The first is
        trained on all pairs as they are (action ``none``).
    versions
        bool [arms, 3 n]: which versions of the pairs it is trained on, for :func:`retrained` and
        :func:`versions_of`.
    """
    plan, doses = list(plan), dict.fromkeys((action, len(some)) for action, _, some in plan)
    for action, k in doses:
        plan += [(action, "random", some) for some in random_sets(n, k, draws, seed)]
    rows, versions = [("none", "all", 0)], [np.repeat([True, False, False], n)]
    for action, selection, some in plan:
        taken = np.zeros((3, n), dtype=bool)
        taken[0] = ~np.isin(np.arange(n), some)
        if action != "remove":
            taken[ACTIONS.index(action)] = ~taken[0]
        rows.append((action, selection, len(some)))
        versions.append(taken.ravel())
    return pd.DataFrame(rows, columns=["action", "selection", "pairs"]), np.array(versions)


def flipped(pair: Example) -> Example:
    """A pair with its two answers swapped, under an id of its own."""
    return replace(pair, id=f"{pair.id} flipped", sequences=pair.sequences[::-1])


def versions_of(
    pairs: Sequence[Example], indices: np.ndarray, less: float
) -> tuple[list[Example], np.ndarray]:
    """Examples and their weights for ``training.fit``, [n], from the indices of a row of
    :func:`mitigations`: a pair that is left out keeps its place in the order, with weight 0.
    ``less``: the weight of down-weighted pairs."""
    version, which = np.divmod(indices, len(pairs))
    weights, examples = np.zeros(len(pairs)), list(pairs)
    weights[which] = np.array([1.0, 1.0, less])[version]
    for i in which[version == ACTIONS.index("flip")]:
        examples[i] = flipped(pairs[i])
    return examples, weights


def mitigation_table(
    arms: pd.DataFrame,
    outcomes: Outcomes,
    target: str,
    clusters: Mapping[str, list | None] | None = None,
) -> pd.DataFrame:
    """Every arm against the same action on as many random pairs, by what was measured.

    Parameters
    ----------
    arms, outcomes
        From :func:`mitigations`, and the result of :func:`retrained` for its versions: name →
        [arms, items]. More is worse.
    target
        The outcome that the arms are meant to lower.
    clusters
        Name → a label for each item, as ``metric.clusters`` gives it.

    Columns action, selection, pairs, vertical, change, ci_low, ci_high, p, p_holm, min_detectable,
    draws, n: see :func:`against_draws`. ``p_holm`` corrects the changes of the target over the
    arms, and all others, the side effects, over arms and outcomes.
    """
    random, rows = arms["selection"] == "random", []
    for place, arm in arms[~random & (arms["action"] != "none")].iterrows():
        alike = random & (arms["action"] == arm["action"]) & (arms["pairs"] == arm["pairs"])
        for what, values in outcomes.items():
            found = against_draws(values[place], values[alike], (clusters or {}).get(what))
            row = dict(arm) | {"vertical": what, "change": found.value, "ci_low": found.low}
            row |= {"ci_high": found.high, "p": found.p, "min_detectable": found.min_detectable}
            rows.append(row | {"draws": int(alike.sum()), "n": found.n})
    table = pd.DataFrame(rows).assign(p_holm=np.nan)
    for _, p in table["p"].dropna().groupby(table["vertical"] == target):
        table.loc[p.index, "p_holm"] = stats.holm(p)
    return table


def against_draws(
    selected: np.ndarray, at_random: np.ndarray, clusters=None
) -> stats.CrossedChange:
    """Mean over items of ``selected`` [items] less that of random draws [draws, items], with an
    interval over items and draws.

    Were the selection worthless, it would be one more random draw. So the change must exceed what
    one draw differs from the mean of r others by, a variance of (1 + 1/r) σ² where that of their
    mean is σ²/r: the draws' deviations are stretched by √(r + 1), and ``stats.crossed_change`` does
    the rest.
    """
    middle, r = at_random.mean(0), len(at_random)
    stretched = middle + np.sqrt(r + 1) * (at_random - middle)
    return stats.crossed_change(np.broadcast_to(selected, at_random.shape), stretched, clusters)


# --- planted examples ---------------------------------------------------------------------------


def drawn_share(
    name: str, verb: str, n: int, share: float, seed: int
) -> tuple[list[int], np.ndarray]:
    """A random ``share`` of ``n`` places, as drawn and as bool [n]. ``name`` seeds the draw and
    begins the message that ``verb`` explains, where it would be none or all."""
    count = round(share * n)
    if not 0 < count < n:
        raise StudyError(f"{name}: {count} of {n} pairs; {verb} some of them, not all")
    places = Random(f"{name}/{seed}").sample(range(n), count)
    return places, np.isin(np.arange(n), places)


def mislabel(
    pairs: Sequence[PreferencePair], share: float, seed: int
) -> tuple[list[PreferencePair], np.ndarray]:
    """Swap chosen and rejected in a random ``share`` of the pairs.

    Returns the pairs, in order, and which were swapped, bool [n].
    """
    swapped, mask = drawn_share("mislabel", "swap", len(pairs), share, seed)
    turned = list(pairs)
    for i in swapped:
        turned[i] = replace(pairs[i], chosen=pairs[i].rejected, rejected=pairs[i].chosen)
    return turned, mask


def planted_auc(
    scores: np.ndarray, planted: np.ndarray, name: str = "", draws: int = stats.DRAWS
) -> stats.Interval:
    """Area under the ROC curve of finding the ``planted`` [n] by high ``scores`` [n]: the
    probability that a planted example scores above another, ties counting half.

    95 % interval: percentiles of a bootstrap of planted examples and of the others, each drawn with
    replacement. ``n`` counts all. (Where a low score marks them, pass −scores.)
    """
    scores, planted = np.asarray(scores, dtype=float), np.asarray(planted, dtype=bool)
    if not np.isfinite(scores).all():
        raise StudyError(f"planted examples: a score of {name} is not finite")
    # Its mean is the area, and its weighted mean that of a resample.
    ahead = (1 + np.sign(scores[planted][:, None] - scores[~planted])) / 2
    rng = stats.generator(f"planted/{name}")
    rows, columns = (_resampled(size, draws, rng) / size for size in ahead.shape)
    low, high = np.quantile(((rows @ ahead) * columns).sum(1), stats.TAILS)
    return stats.Interval(float(ahead.mean()), float(low), float(high), len(scores))


def auc_ceiling(accuracy: float) -> float:
    """The largest area under the ROC curve for mislabelled pairs, given a reward model's accuracy.

    Let the reward model's margin m = r(better) − r(worse) be normal over pairs, m ~ N(μ, σ²). Its
    held-out accuracy is a = P(m > 0) = Φ(μ/σ), hence μ/σ = Φ⁻¹(a). As labelled, a good pair has
    the margin m, and a swapped one −m. The area is the probability that a good pair's margin m₁
    lies above a swapped one's −m₂; m₁ + m₂ ~ N(2μ, 2σ²), so

        AUC = P(m₁ + m₂ > 0) = Φ(2μ / (√2 σ)) = Φ(√2 · Φ⁻¹(a))

    No other function of the margin does better, as the likelihood ratio of the two normals rises
    with the margin. A model that cannot order a pair it has not seen cannot find it mislabelled:
    .64 at an accuracy of 60 %, .76 at 69 %, .5 (chance) at 50 %. Noise in people's own labels is
    part of ``accuracy`` already.
    """
    return float(scipy_stats.norm.cdf(math.sqrt(2) * scipy_stats.norm.ppf(accuracy)))


def plant_copies(
    training: Sequence[Example], queries: Sequence[Example], seed: int
) -> tuple[list[Example], np.ndarray]:
    """Put a copy of each query among the training examples, at random places.

    Returns the examples and, for each, the number of the query that it copies (−1: none), [n +
    queries]. Copies are named ``copy of <query>`` and must have as many sequences as the training
    loss needs. A copy shares all of its words with its query: text similarity ranks it first by
    construction, so this checks only that a solver does not miss the obvious.
    """
    copies = [replace(query, id=f"copy of {query.id}") for query in queries]
    examples = [*training, *copies]
    owner = np.r_[np.full(len(training), -1), np.arange(len(queries))]
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order], owner[order]


def copy_ranks(influence: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The rank of each query's copy among all training examples, from 1 (ties: their mean):
    [queries].

    ``influence`` [n, queries]. A copy lowers its query's loss, so the lowest score ranks first.
    """
    (places,) = np.nonzero(owner >= 0)
    ranks = np.empty(influence.shape[1])
    ranks[owner[places]] = scipy_stats.rankdata(influence, axis=0)[places, owner[places]]
    return ranks


def copy_table(solvers: Influences, owner: np.ndarray, k: int = 10) -> pd.DataFrame:
    """How well each solver finds the copies: columns solver, metric, value, ci_low, ci_high, n.

    ``recall@k``: share of queries whose copy is among the first k; ``percentile``: mean share of
    the other examples that rank behind the copy (1/2 by chance).
    """
    rows = []
    for solver, influence in solvers.items():
        ranks = copy_ranks(influence, owner)
        percentile = 1 - (ranks - 1) / max(1, len(owner) - 1)
        for metric, values in ((f"recall@{k}", ranks <= k), ("percentile", percentile)):
            found = stats.mean_interval(values, f"copies/{solver}/{metric}", bounds=(0, 1))
            rows.append((solver, metric, *astuple(found)))
    return pd.DataFrame(rows, columns=["solver", "metric", "value", "ci_low", "ci_high", "n"])
