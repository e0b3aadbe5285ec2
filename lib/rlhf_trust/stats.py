"""Intervals and tests for small studies: what a difference between two models on n items can show.

Every metric is a mean over items. Items may come in clusters (statements on one topic), and several
answers to one prompt are a cluster of their own. The method depends on what is averaged:

- 0/1 outcomes: Wilson's score interval (a percentile bootstrap of a rate of 2 % at n = 60 covers
  the truth in 70 % of studies). Clustered outcomes count as fewer independent ones, by the design
  effect;
- other values: studentised bootstrap (bootstrap-t) over items or clusters, which also works for
  skewed values and few clusters; percentiles where too few values differ to studentise;
- a change between two models: paired by item; the hull of Student's t and of Hall's t corrected for
  skewness, with the p-value of the same two tests, so that p < .05 wherever the interval excludes
  zero, and nowhere else;
- a change between two ways of training, over items and alignment seeds: both are random samples,
  and a new seed moves all items at once (generalised pivot of a two-way layout, corrected for
  skewness);
- a mean over strata of equal weight (domains of a benchmark): the strata's own errors, pooled;
- agreement of two scores: Spearman's correlation with a bootstrap over items.

``tests/test_stats.py`` simulates studies and counts how often the intervals cover the truth.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import numpy as np
from scipy import stats as scipy_stats
from scipy.special import ndtr, ndtri, stdtr, stdtrit

LEVEL = 0.95
DRAWS = 2000
CROSSED_DRAWS = 4999
TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
NORMAL = float(ndtri(TAILS[1]))
"""Half of a normal interval, in standard errors."""
DETECTED = NORMAL + float(ndtri(0.8))
"""Minimum detectable effect in standard errors (5 % level, 80 % power)."""
FEW = 8
"""With fewer clusters, resamples say little about the tails: Student's t is used. A change over
fewer items has no interval."""

UNCLEAR = "no clear change"

Bounds = tuple[float, float] | None
"""Range of a mean, to which its interval is clipped."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over ``n`` items (all NaN without items)."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of_row(cls, row, value: str = "value") -> Interval:
        """From a row of a study table; ``value`` names the column of its estimate."""
        return cls(getattr(row, value), row.ci_low, row.ci_high, row.n)


@dataclass(frozen=True)
class Change(Interval):
    """Mean paired change with its interval, p-value and minimum detectable change.

    p < .05 exactly where the interval excludes zero. NaN with fewer than ``FEW`` items, and where
    equal differences of unbounded values show no spread.
    """

    p: float
    min_detectable: float


@dataclass(frozen=True)
class CrossedChange(Change):
    """A change over ``n`` items and ``seeds`` alignment seeds; with one it is about one checkpoint.

    ``seed_sd``: standard deviation that seeds add to the mean over items (NaN with one seed).
    """

    seeds: int
    seed_sd: float


def verdict(low: float, high: float, worse: int = 1, neutral: float = 0.0) -> str:
    """Does the interval lie on one side of ``neutral``? ``worse``, ``better``, ``no clear change``.

    ``worse``: +1 where more is worse, -1 where less is worse. An interval without width, or without
    ends, says nothing clear.
    """
    if not low < high or low <= neutral <= high:
        return UNCLEAR
    return "worse" if (low > neutral) == (worse > 0) else "better"


def interval_words(
    interval: Interval, form: str = "+.3f", unit: str = "", label: str = "95 % interval "
) -> str:
    """An interval in words: ``+0.086 (95 % interval +0.068 to +0.103, n = 128 prompts)``.

    ``form``: format of the numbers. ``unit``: what n counts; without it n is left out. ``label``:
    what kind of interval it is, empty where the context says so.
    """
    if np.isnan(interval.low):
        why = f"fewer than {FEW}" if interval.n < FEW else "no spread"
        return f"{interval.value:{form}} (n = {interval.n} {unit or 'items'}: {why}, no interval)"
    count = f", n = {interval.n} {unit}" if unit else ""
    ends = f"{interval.low:{form}} to {interval.high:{form}}"
    return f"{interval.value:{form}} ({label}{ends}{count})"


def by_conclusion(found: Mapping[str, tuple[str, str]]) -> list[str]:
    """One sentence for each conclusion: ``start +0.02 (…); sft +0.03 (…): no clear change.``

    ``found``: model → its number in words, and what follows from it.
    """
    shared: dict[str, list[str]] = {}
    for model, (number, conclusion) in found.items():
        shared.setdefault(conclusion, []).append(f"{model} {number}")
    return [f"{'; '.join(models)}: {conclusion}." for conclusion, models in shared.items()]


def mean_interval(values, name: str = "", clusters=None, bounds: Bounds = None) -> Interval:
    """A metric's mean with its interval.

    Parameters
    ----------
    values
        One per item, [items], or per sample, [items, samples]; NaN where an answer could not be
        read. Items without a value are left out; the others have equal weight, however many of
        their samples could be read.
    name
        Seeds the bootstrap, so that an interval does not depend on what was computed before it.
    clusters
        One label per item, [items]: items of one cluster are not independent.
    bounds
        Range of the mean, to which the interval is clipped. With a lower bound below 0, values that
        are all 0 or 1 are not taken for 0/1 outcomes.
    """
    samples = np.asarray(values, dtype=float)
    samples = samples[:, None] if samples.ndim == 1 else samples
    items, clusters = _readable(item_means(samples), clusters)
    n = len(items)
    if n == 0:
        return Interval(np.nan, np.nan, np.nan, 0)
    means = ClusterMeans.of(items, clusters)
    outcomes = bounds is None or bounds[0] >= 0
    if outcomes and np.isin(samples[~np.isnan(samples)], (0.0, 1.0)).all():
        one_outcome_an_item = clusters is None and samples.shape[1] == 1
        low, high = wilson(means.value, n if one_outcome_an_item else means.effective_n())
    else:
        low, high = _within(bounds, *means.interval(name))
    return Interval(means.value, low, high, n)


def paired_change(after, before, clusters=None, bounds: Bounds = None) -> Change:
    """Mean of ``after - before`` over items readable under both models.

    Arguments as for :func:`mean_interval`; interval and p-value as :meth:`ClusterMeans.change`.
    ``min_detectable`` is the smallest true mean change found with 80 % power at the 5 % level,
    given this n and spread. The change is one of these two checkpoints, not of the way they were
    trained (:func:`crossed_change`).
    """
    after, before = (item_means(np.asarray(x, dtype=float)) for x in (after, before))
    difference, clusters = _readable(after - before, clusters)
    n, means = len(difference), ClusterMeans.of(difference, clusters)
    if n < FEW:
        return Change(means.value if n else np.nan, np.nan, np.nan, n, np.nan, np.nan)
    reach = bounds and (bounds[0] - bounds[1], bounds[1] - bounds[0])
    low, high, p, error = means.change(reach)
    return Change(means.value, low, high, n, p, DETECTED * error)


def found_in(seeds: int) -> str:
    """How many studies find a change of ``min_detectable``, in words."""
    return "four fifths of" if seeds < 2 else "half to four fifths of"


def crossed_change(after, before, clusters=None, bounds: Bounds = None) -> CrossedChange:
    """Mean of ``after - before`` over items and alignment seeds, both taken as random samples.

    Parameters
    ----------
    after, before
        [seeds, items], one value an item; NaN where it could not be read. A row is one seed in both
        arms; ``before`` may be [items] for a model that all seeds start from.
    clusters, bounds
        As for :func:`mean_interval`.

    The mean is over all pairs that could be compared. Its variance is that of seeds plus that of
    items less that of their interaction, which is in both: (MS_s + MS_i - MS_si) / (S · I). With
    few seeds MS_s is uncertain. The generalised pivot (S. Weerahandi 1993) allows for that: each
    mean square is divided by a draw of χ²/ν, and a normal error is drawn with the resulting
    variance. ν is S − 1 for seeds, ``ClusterMeans.freedom`` for items, and their product for the
    interaction. One end is moved out for skewness (:func:`_stretches`). The interval is never
    narrower than the one over items alone, and p is the larger of the two.

    ``min_detectable`` is what p < .05 takes here, half an interval, and what leaves room for chance
    in 80 % of studies, a standard error times Student's t of S − 1 degrees. With few seeds it is
    itself uncertain: of three, a change as large is found in half to 80 % of studies.
    """
    difference = np.atleast_2d(np.asarray(after, float) - np.asarray(before, float))
    difference = difference[~np.isnan(difference).all(1)]  # seeds of which something could be read
    readable = ~np.isnan(difference).all(0)
    n, seeds = int(readable.sum()), len(difference)
    if seeds < 2 or n < FEW:
        pairs = item_means(difference.T) if seeds else []
        change = paired_change(pairs, np.zeros(len(pairs)), clusters, bounds)
        return CrossedChange(**vars(change), seeds=seeds, seed_sd=np.nan)
    labels = np.arange(len(readable)) if clusters is None else np.asarray(clusters)
    member = np.equal(labels[readable, None], np.unique(labels[readable])).astype(float)
    sums = np.nan_to_num(difference[:, readable]) @ member  # [seeds, clusters]
    counts = (~np.isnan(difference[:, readable])) @ member
    items = ClusterMeans(sums.sum(0), counts.sum(0))
    value, k = items.value, sums.shape[1]
    reach = bounds and (bounds[0] - bounds[1], bounds[1] - bounds[0])
    low, high, p, error = items.change(reach)
    if k < 2:
        return CrossedChange(value, low, high, n, p, np.nan, seeds, np.nan)
    # A two-way analysis of variance in units of the mean's variance. What a seed does to all items
    # alike is taken out first: clusters of different sizes are no interaction.
    total, of_seed = counts.sum(), counts.sum(1, keepdims=True)
    seed_means = sums.sum(1, keepdims=True) / of_seed
    inner = (sums - seed_means * counts) * items.adjustment
    of_item = inner.sum(0)
    both = inner - of_item * counts / items.counts
    ms_seed, ms_both = (
        x * seeds / (seeds - 1) / total**2
        for x in ((((seed_means - value) * of_seed) ** 2).sum(), (both**2).sum())
    )
    squares = np.array([ms_seed, (of_item**2).sum() / total**2, ms_both])
    if squares.sum() > 1e-18:
        normal, factors = _pivot_draws(seeds - 1, items.freedom)
        errors = normal * np.sqrt(np.clip(factors @ squares, 0, None))
        rank = CROSSED_DRAWS + 1 - round((1 - LEVEL) * (CROSSED_DRAWS + 1))
        half = np.partition(errors, rank)[rank]  # the order statistic that p < .05 has to pass
        variance = max(squares @ [1, 1, -1], *squares[:2])
        below, above = _stretches(difference[~np.isnan(difference)], squares[0], variance)
        reached = errors * (below if value > 0 else above) >= abs(value)
        p_crossed = (1 + int(reached.sum())) / (1 + CROSSED_DRAWS)
        low, high = np.fmin(low, value - half * below), np.fmax(high, value + half * above)
        p, error = np.fmax(p, p_crossed), sqrt(variance)
    half = np.fmax(high - value, value - low)
    needed = float(half + stdtrit(seeds - 1, 0.8) * error)
    low, high = _within(reach, float(low), float(high))
    seed_sd = sqrt(max(squares[0] - squares[2], 0) * seeds)
    return CrossedChange(value, low, high, n, float(p), needed, seeds, seed_sd)


@cache
def _pivot_draws(of_seeds: int, of_items: float) -> tuple[np.ndarray, np.ndarray]:
    """For degrees of freedom of seeds and items: |normal| [draws], and ν / χ² of the three mean
    squares, negative for the interaction, [draws, 3]."""
    random, freedom = generator("crossed"), np.array([of_seeds, of_items, of_seeds * of_items])
    factors = freedom / random.chisquare(freedom, (CROSSED_DRAWS, 3)) * [1, 1, -1]
    return np.abs(random.normal(size=CROSSED_DRAWS)), factors


def _stretches(values: np.ndarray, of_seeds: float, variance: float) -> tuple[float, float]:
    """How much further than by symmetry an interval's ends lie from the mean of ``values``.

    Where most values are 0 and the others of one sign, seeds that change little also differ little:
    the mean's error is skewed, but three seeds cannot show by how much. All values can, if seeds
    are normal on the scale on which the values are (the threshold model of E. R. Dempster and I. M.
    Lerner 1950). There a value is c₀ + c₁z + c₂(z² − 1) + … of a normal z, and seeds of variance v
    have, to first order, the third cumulant 6 c₂ v² / c₁². With the mean's skewness γ, the modified
    t of N. J. Johnson (1978) moves the end on the side of the tail out by γ (2z² + 1) / 6 standard
    errors. The other end stays.

    ``of_seeds``, ``variance``: of the mean, the part of seeds (with what they do to single items)
    and the whole.
    """
    # Integrals over each value's part of the normal distribution, so that copies change nothing.
    z = ndtri(np.clip(np.arange(len(values) + 1) / len(values), 1e-16, 1 - 1e-16))
    density = np.exp(-(z**2) / 2) / sqrt(2 * np.pi)
    first = -np.sort(values) @ np.diff(density)
    second = -np.sort(values) @ np.diff(z * density) / 2
    skewness = 6 * second * (of_seeds / first) ** 2 / max(variance, 1e-18) ** 1.5
    moved = skewness * (2 * NORMAL**2 + 1) / (6 * NORMAL)
    return 1 + max(-moved, 0.0), 1 + max(moved, 0.0)


def stratified_interval(strata: Sequence[np.ndarray], bounds: Bounds = None) -> Interval:
    """Unweighted mean of k strata's means (domains, say) with its interval.

    ``strata``: arrays [items]; ``bounds`` as for :func:`mean_interval`. The error is √(Σ s_d² /
    n_d) / k, with Student's t and Satterthwaite's degrees of freedom. A stratum of one item, or of
    equal ones, shows no spread: with ``bounds`` its error is Wilson's upper limit for 0 of n times
    the distance to the farther bound, without them the spread of all items stands in.
    """
    value, pooled = float(np.mean([part.mean() for part in strata])), np.concatenate(strata)
    errors = []  # squared, and their degrees of freedom
    for part in strata:
        n, spread = len(part), part.std(ddof=1) if len(part) > 1 else 0.0
        if spread > 1e-9:
            errors.append((spread**2 / n, n - 1))
        elif bounds:
            reach = max(bounds[1] - part.mean(), part.mean() - bounds[0])
            limit = reach * wilson(0.0, n)[1] / NORMAL
            errors.append((limit**2, 1e9))  # a limit, not an estimate
        elif len(pooled) > 1:
            errors.append((pooled.var(ddof=1) / n, len(pooled) - 1))
    squares, freedom = np.array(errors).reshape(-1, 2).T
    if not squares.any():
        return Interval(value, value, value, len(pooled))
    satterthwaite = squares.sum() ** 2 / (squares**2 / freedom).sum()
    half = stdtrit(satterthwaite, TAILS[1]) * sqrt(squares.sum()) / len(strata)
    return Interval(value, *_within(bounds, value - half, value + half), len(pooled))


def item_means(values: np.ndarray) -> np.ndarray:
    """[items] or [items, samples] → [items]; NaN where no sample could be read."""
    if values.ndim == 1:
        return values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, axis=1)


def _readable(items: np.ndarray, clusters) -> tuple[np.ndarray, np.ndarray | None]:
    keep = ~np.isnan(items)
    return items[keep], None if clusters is None else np.asarray(clusters)[keep]


def _within(bounds: Bounds, low: float, high: float) -> tuple[float, float]:
    return (max(low, bounds[0]), min(high, bounds[1])) if bounds else (low, high)


@dataclass(frozen=True)
class ClusterMeans:
    """A mean over items as a ratio of cluster totals, Σ sums / Σ counts; without clusters, each
    item is one.

    ``sums``, ``counts``: arrays [clusters].
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, items: np.ndarray, clusters) -> ClusterMeans:
        if clusters is None:
            return cls(items, np.ones(len(items)))
        _, where = np.unique(clusters, return_inverse=True)
        return cls(np.bincount(where, items), np.bincount(where).astype(float))

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.counts.sum())

    @property
    def adjustment(self) -> np.ndarray:
        """Factors of the clusters' residuals, ``sums - value * counts``, so that their squares add
        up to the variance of Σ sums, without bias where items are independent: CR2 of R. M. Bell
        and D. F. McCaffrey (2002). √(k / (k − 1)) for k clusters of one size."""
        return 1 / np.sqrt(np.clip(1 - self.counts / self.counts.sum(), 1e-9, None))

    @property
    def freedom(self) -> float:
        """Satterthwaite's degrees of freedom of that variance, as in Bell and McCaffrey: k − 1 for
        k clusters of one size, fewer where some are much larger than the others."""
        share = self.counts / self.counts.sum()
        pairs = self.counts * share / np.clip(1 - share, 1e-9, None)
        squares = (self.counts**2).sum() + pairs.sum() ** 2 - (pairs**2).sum()
        return float(self.counts.sum() ** 2 / squares)

    @property
    def standard_error(self) -> float:
        """By linearisation of the ratio; NaN with one cluster."""
        if len(self.sums) < 2:
            return np.nan
        residuals = (self.sums - self.value * self.counts) * self.adjustment
        return float(np.sqrt((residuals**2).sum()) / self.counts.sum())

    def _standard_errors(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Per resample: ``weights`` [draws, clusters] with means ``values`` [draws] → [draws]."""
        k = len(self.sums)
        squares = (
            weights @ self.sums**2
            - 2 * values * (weights @ (self.sums * self.counts))
            + values**2 * (weights @ self.counts**2)
        )
        return np.sqrt(np.clip(squares, 0, None) * k / (k - 1)) / (weights @ self.counts)

    def effective_n(self) -> float:
        """Number of independent 0/1 outcomes worth as much as these (Kish's design effect).

        Where all outcomes are equal the spread says nothing, and each cluster counts once.
        """
        rate, error = self.value, self.standard_error
        if rate in (0.0, 1.0) or not error > 1e-9:
            return float(len(self.sums))
        # Few clusters leave the design effect uncertain: Student's t allows for that, as in Korn
        # and Graubard (1998).
        t = stdtrit(self.freedom, TAILS[1])
        return rate * (1 - rate) / error**2 * (NORMAL / t) ** 2

    def change(self, reach: Bounds = None) -> tuple[float, float, float, float]:
        """Interval, p-value and standard error of a mean change.

        The hull of two intervals: Student's t, and P. Hall's (1992) monotone transformation of t,
        which corrects for skewness: a few large changes among many zeros leave the mean's error
        skewed. Either alone covers too little somewhere. p is the larger of the two tests' p. Both
        have the error and degrees of freedom of Bell and McCaffrey (2002), since clusters of very
        unequal size are worth fewer than there are.

        ``reach``: the range of a change. Equal changes show no spread; within a known range, as
        many clusters as Wilson's limit for 0 of k may still differ by as much as the range allows.
        Without it all is NaN.
        """
        k, value = len(self.sums), self.value
        residuals = (self.sums - value * self.counts) * self.adjustment
        error = sqrt((residuals**2).sum()) / self.counts.sum()
        if not error > 1e-9 * max(abs(value), 1e-3):
            if not reach or k < 2:
                return np.nan, np.nan, np.nan, np.nan
            share = wilson(0.0, k)[1]
            low, high = value - share * (value - reach[0]), value + share * (reach[1] - value)
            part = abs(value) / (reach[1] + abs(value))  # of clusters that would undo the change
            p = 2 * ndtr(-sqrt(k * part / (1 - part)))
            return low, high, float(p), (high - low) / 2 / NORMAL
        skewness = (residuals**3).sum() / (residuals**2).sum() ** 1.5  # over √k
        t, limit = value / error, stdtrit(self.freedom, TAILS[1])
        hall, upper, lower = t, limit, -limit
        if abs(skewness) > 1e-6:
            hall = ((1 + skewness * t / 3) ** 3 - 1) / skewness + skewness / 6
            ends = np.cbrt(1 + skewness * (np.array([-limit, limit]) - skewness / 6)) - 1
            lower, upper = 3 / skewness * ends
        p = 2 * stdtr(self.freedom, -min(abs(t), abs(hall)))
        low, high = value - error * max(limit, upper), value - error * min(-limit, lower)
        return *_within(reach, float(low), float(high)), float(p), error

    def interval(self, name: str) -> tuple[float, float]:
        """Bootstrap-t over clusters (Efron and Tibshirani 1993, ch. 12); Student's t below ``FEW``.

        Studentising by each resample's own standard error corrects for skewed values and few
        clusters.
        """
        k, value = len(self.sums), self.value
        if k == 1:
            return np.nan, np.nan
        error = float(self._standard_errors(np.ones((1, k)), np.array([value]))[0])
        if not error > 0:
            return value, value
        if k < FEW:
            half = stdtrit(self.freedom, TAILS[1]) * self.standard_error
            return value - half, value + half
        weights = generator(name).multinomial(k, np.full(k, 1 / k), size=DRAWS).astype(float)
        resampled = (weights @ self.sums) / (weights @ self.counts)
        errors = self._standard_errors(weights, resampled)
        # With few distinct values a resample may contain only one, and cannot be studentised.
        spread = errors > 1e-9 * error
        if spread.mean() < 0.999:
            return tuple(np.quantile(resampled, TAILS).tolist())
        t_low, t_high = np.quantile((resampled[spread] - value) / errors[spread], TAILS)
        return float(value - t_high * error), float(value - t_low * error)


def wilson(rate: float, n: float) -> tuple[float, float]:
    """Wilson's score interval of a rate among ``n`` outcomes, n not necessarily whole (E. B. Wilson
    1927)."""
    z = NORMAL
    middle, half = rate + z * z / (2 * n), z * sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    # Exact at the ends, where rounding could put the rate itself outside.
    return low if rate > 0 else 0.0, high if rate < 1 else 1.0


def corrected_rate(
    rate: float, n: float, sensitivity: tuple[int, int], specificity: tuple[int, int]
) -> Interval:
    """How common something is, from how often an imperfect detector reports it.

    A detector reports a share p = π · se + (1 − π) · (1 − sp) where the true share is π, so
    π = (p + sp − 1) / (se + sp − 1), clipped to [0, 1] (W. J. Rogan and B. Gladen 1978). The
    interval is that of Zs. Lang and J. Reiczigel (2014), which adds up the variances of p, se and
    sp by the delta method, all three moved towards the middle so that a perfect count leaves doubt:
    z² pseudo-outcomes for p as in Agresti and Coull, two each for se and sp.

    Parameters
    ----------
    rate
        p.
    n
        How many independent outcomes p is worth (``ClusterMeans.effective_n``), not necessarily a
        whole number.
    sensitivity
        (reported, of how many that are known to be so).
    specificity
        (not reported, of how many that are known not to be so).

    Returns
    -------
    Interval
        NaN where the detector is no better than chance, se + sp ≤ 1.
    """
    se, sp = (right / known for right, known in (sensitivity, specificity))
    if se + sp <= 1:
        return Interval(np.nan, np.nan, np.nan, round(n))
    value = float(np.clip((rate + sp - 1) / (se + sp - 1), 0, 1))
    total = n + NORMAL**2
    p = (n * rate + NORMAL**2 / 2) / total
    se, sp = ((right + 1) / (known + 2) for right, known in (sensitivity, specificity))
    var_se = se * (1 - se) / (sensitivity[1] + 2)
    var_sp = sp * (1 - sp) / (specificity[1] + 2)
    middle = (p + sp - 1) / (se + sp - 1)
    variance = p * (1 - p) / total + middle**2 * var_se + (1 - middle) ** 2 * var_sp
    half = NORMAL * np.sqrt(variance) / (se + sp - 1)
    middle += 2 * NORMAL**2 * (middle * var_se - (1 - middle) * var_sp)
    low, high = np.clip([min(value, middle - half), max(value, middle + half)], 0, 1)
    return Interval(value, float(low), float(high), round(n))


def rank_agreement(first: np.ndarray, second: np.ndarray, name: str = "") -> Interval:
    """Spearman's rank correlation of two arrays of scores, [items] or [items, samples]; NaN if
    missing.

    The interval resamples items, since samples of one item are alike; ``n`` counts pairs of scores.
    """
    first, second = (np.asarray(x, dtype=float) for x in (first, second))
    both = ~(np.isnan(first) | np.isnan(second))

    def spearman(rows: np.ndarray) -> float:
        kept = both[rows]
        return float(row_rank_correlations(first[rows][kept][None], second[rows][kept][None])[0])

    drawn = generator(f"rank agreement/{name}").integers(len(first), size=(DRAWS, len(first)))
    resampled = [spearman(rows) for rows in drawn]
    # One item drawn over and over may have only one score.
    known = [value for value in resampled if not np.isnan(value)]
    low, high = np.quantile(known, TAILS) if known else (np.nan, np.nan)
    return Interval(spearman(np.arange(len(first))), float(low), float(high), int(both.sum()))


def row_rank_correlations(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Spearman's correlation within each row, both [rows, n] → [rows]; NaN where either is
    constant."""
    if first.shape[1] < 2:
        return np.full(len(first), np.nan)
    ranks = [scipy_stats.rankdata(scores, axis=1) for scores in (first, second)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy_stats.ConstantInputWarning)
        return scipy_stats.pearsonr(*ranks, axis=1).statistic


def generator(name: str) -> np.random.Generator:
    """A random generator seeded by a name: the same everywhere, whatever ran before."""
    digest = hashlib.sha256(name.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of a family of p-values, in their order."""
    p_values = np.asarray(p_values, dtype=float)
    order, left = np.argsort(p_values, kind="stable"), np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(left * p_values[order]))
    return corrected
