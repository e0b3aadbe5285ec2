"""Intervals and tests against published numbers, and by simulation: do they err as often as they
say?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rlhf_trust.stats import (
    ClusterMeans,
    Interval,
    by_conclusion,
    crossed_change,
    generator,
    holm,
    interval_words,
    mean_interval,
    paired_change,
    rank_agreement,
    row_rank_correlations,
    stratified_interval,
    verdict,
    wilson,
)
from scipy.stats import norm, spearmanr, t


@pytest.mark.parametrize(
    ("low", "high", "worse", "said"),
    [
        (0.1, 0.2, 1, "worse"),
        (0.1, 0.2, -1, "better"),
        (-0.2, -0.1, 1, "better"),
        (-0.2, -0.1, -1, "worse"),
        (-0.1, 0.1, 1, "no clear change"),
        (0.0, 0.1, 1, "no clear change"),
        (0.0, 0.0, 1, "no clear change"),
        (0.1, 0.1, 1, "no clear change"),
        (np.nan, np.nan, 1, "no clear change"),
    ],
)
def test_verdict_knows_which_way_is_worse(low, high, worse, said):
    assert verdict(low, high, worse) == said
    assert verdict(low + 0.5, high + 0.5, worse, neutral=0.5) == said


def test_intervals_in_words():
    found = Interval(0.5, 0.25, 0.75, 8)
    assert interval_words(found) == "+0.500 (95 % interval +0.250 to +0.750)"
    assert interval_words(found, ".0%", "pairs", "") == "50% (25% to 75%, n = 8 pairs)"
    same = {"sft": ("+1", "worse"), "ppo": ("0", "no clear change"), "dpo": ("+2", "worse")}
    assert by_conclusion(same) == ["sft +1; dpo +2: worse.", "ppo 0: no clear change."]
    few = interval_words(Interval(0.5, np.nan, np.nan, 3), unit="pairs")
    assert few == "+0.500 (n = 3 pairs: fewer than 8, no interval)"


def test_rank_correlations_are_spearmans():
    first, second = np.round(generator("ranks").normal(size=(2, 5, 12)), 1)
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second)]
    np.testing.assert_allclose(row_rank_correlations(first, second), expected)
    first[0] = 1.0
    assert np.isnan(row_rank_correlations(first, second)).tolist() == [True] + 4 * [False]
    found = rank_agreement(first[1], second[1])
    assert found.value == pytest.approx(expected[1]) and found.low < found.value < found.high


def test_wilson_as_published():
    """R. G. Newcombe, Statistics in Medicine 17 (1998), Table I, method 3."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=6e-5)
    assert wilson(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=6e-5)
    assert wilson(0 / 20, 20) == pytest.approx((0.0, 0.1611), abs=6e-5)
    assert wilson(1 / 29, 29) == pytest.approx((0.0061, 0.1718), abs=6e-5)


def test_holm_by_hand():
    """Four tests: 4·.005, 3·.01, 2·.03, 1·.04 in rising order, none below the one before it."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.5, 0.9])), [1.0, 1.0])
    assert len(holm(np.array([]))) == 0


def test_a_rate_gets_wilson_and_unreadable_items_are_left_out():
    interval = mean_interval([1.0] + [0.0] * 59 + [np.nan] * 5)
    assert (interval.value, interval.n) == (pytest.approx(1 / 60), 60)
    assert (interval.low, interval.high) == wilson(1 / 60, 60)
    nothing = mean_interval([np.nan, np.nan])
    assert nothing.n == 0 and np.isnan([nothing.value, nothing.low, nothing.high]).all()


def of_24_topics(outcomes):
    return outcomes, np.repeat(np.arange(24), outcomes.shape[0] // 24)


STUDIES = {  # name: (one study's values, its clusters), the true mean
    "rate .05": (lambda r: ((r.random(60) < 0.05).astype(float), None), 0.05),
    "rate .3": (lambda r: ((r.random(60) < 0.3).astype(float), None), 0.3),
    # 4 samples a prompt, a quarter of the variance between prompts
    "rate .05, 4 samples": (
        lambda r: ((r.random((60, 4)) < r.beta(0.15, 2.85, (60, 1))).astype(float), None),
        0.05,
    ),
    "rate .3, 4 samples": (
        lambda r: ((r.random((60, 4)) < r.beta(0.9, 2.1, (60, 1))).astype(float), None),
        0.3,
    ),
    # 24 topics with 4 statements each
    "rate .05, topics": (
        lambda r: of_24_topics(
            (r.random((24, 4)) < r.beta(0.2, 3.8, (24, 1))).astype(float).ravel()
        ),
        0.05,
    ),
    "rate .3, topics": (
        lambda r: of_24_topics(
            (r.random((24, 4)) < r.beta(1.2, 2.8, (24, 1))).astype(float).ravel()
        ),
        0.3,
    ),
    "skewed, topics": (
        lambda r: of_24_topics((r.gamma(1, 1, (24, 1)) + r.normal(size=(24, 4))).ravel()),
        1.0,
    ),
    # scores that are mostly near 0, u**16 with u uniform: the mean of the largest of 5 is 5 / (5 +
    # 16)
    "skewed maximum": (lambda r: ((r.random((60, 5)) ** 16).max(1), None), 5 / 21),
}


@pytest.mark.slow
@pytest.mark.parametrize("study", STUDIES)
def test_intervals_cover(study):
    """In 1,000 simulated studies the 95 % interval holds the truth about as often as it says."""
    draw, truth = STUDIES[study]
    random, hits = generator(f"coverage of {study}"), 0
    for number in range(1000):
        values, clusters = draw(random)
        interval = mean_interval(values, f"coverage/{number}", clusters)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / 1000 <= 0.985


@pytest.mark.parametrize(
    "rates", [(0.5, 0.5, 0.5, 0.5), (0.9, 0.9, 0.9, 0.9), (0.3, 0.6, 0.5, 0.95)]
)
@pytest.mark.parametrize("sizes", [(4, 4, 8, 8), (2, 2, 2, 2), (100, 5, 20, 300)])
def test_a_mean_over_strata_is_covered_however_few_their_items(rates, sizes):
    """Resampling within strata misses the truth in up to half of such studies: what is alike stays
    alike."""
    random, hits = generator(f"strata {rates} {sizes}"), 0
    for _ in range(400):
        strata = [(random.random(n) < p).astype(float) for p, n in zip(rates, sizes)]
        found = stratified_interval(strata, (0.0, 1.0))
        hits += found.low <= np.mean(rates) <= found.high
    assert hits / 400 >= 0.93


def test_a_mean_over_strata_by_hand():
    """Variances 1 / 3 and 4 / 2 of the means: error √(7 / 3) / 2, (7 / 3)² / ((1 / 3)² / 2 + 2² /
    1) degrees of freedom."""
    found = stratified_interval([np.array([1.0, 2.0, 3.0]), np.array([5.0, 5.0 + np.sqrt(8)])])
    half = t.ppf(0.975, (7 / 3) ** 2 / (1 / 18 + 4)) * np.sqrt(1 / 3 + 4 / 2) / 2
    ends = (found.value - half, found.value + half)
    assert (found.low, found.high) == pytest.approx(ends) and found.n == 5
    assert found.value == pytest.approx((2 + 5 + np.sqrt(2)) / 2)
    ones = stratified_interval([np.ones(1), np.ones(6)], (0.0, 1.0))
    assert ones.high == 1.0 and 0.5 < ones.low < 0.8
    loose = stratified_interval([np.array([1.0]), np.array([3.0])])
    assert loose.low < 1 and loose.high > 3
    assert stratified_interval([np.ones(1)]) == Interval(1.0, 1.0, 1.0, 1)


def test_clusters_of_one_are_no_clusters_and_repeated_items_add_nothing():
    values = generator("values").exponential(size=25)
    assert mean_interval(values, "x", np.arange(25)) == mean_interval(values, "x")
    single = paired_change(values, 0 * values)
    assert paired_change(values, 0 * values, np.arange(25)) == single
    repeated, labels = np.repeat(values, 4), np.repeat(np.arange(25), 4)
    once, again = mean_interval(values, "x"), mean_interval(repeated, "x", labels)
    assert (again.low, again.high) == pytest.approx((once.low, once.high))
    assert mean_interval(repeated, "x").high < once.high  # what forgetting the clusters would claim
    paired = paired_change(repeated, 0 * repeated, labels)
    assert paired.p == pytest.approx(single.p)
    assert paired.min_detectable == pytest.approx(single.min_detectable)


def test_samples_of_a_prompt_are_averaged_and_each_prompt_weighs_the_same():
    samples = np.array([[1.0, 0.0, np.nan], [1.0, 1.0, 1.0], [np.nan] * 3, [0.0, np.nan, np.nan]])
    interval = mean_interval(samples)
    assert (interval.value, interval.n) == (pytest.approx((0.5 + 1 + 0) / 3), 3)
    change = paired_change(samples, np.zeros((4, 3)))
    assert (change.value, change.n) == (pytest.approx(0.5), 3)


@pytest.mark.parametrize("clusters", [None, np.repeat(np.arange(15), 4)])
def test_p_values_are_uniform_without_a_change(clusters):
    random, p = generator("null"), np.zeros(1000)
    for i in range(len(p)):
        after, before = random.normal(size=(2, 25 if clusters is None else 60))
        if clusters is not None:
            after += random.normal(size=15)[clusters]
        p[i] = paired_change(after, before, clusters).p
    assert 0.025 <= (p < 0.05).mean() <= 0.075
    assert 0.45 <= (p < 0.5).mean() <= 0.55


def test_a_change_is_found_as_often_as_promised():
    """At the smallest detectable change, about 80 % of studies see it."""
    random, found = generator("power"), 0
    for _ in range(200):
        before, noise = random.normal(size=40), random.normal(size=40)
        after = before + noise + 2.8016 / np.sqrt(40)
        found += paired_change(after, before).p < 0.05
    assert 0.70 <= found / 200 <= 0.90
    detectable = 2.8016 * noise.std(ddof=1) / np.sqrt(40)
    assert paired_change(noise, np.zeros(40)).min_detectable == pytest.approx(detectable, rel=1e-4)


def test_a_change_is_paired_and_leaves_out_items_unreadable_on_either_side():
    random = generator("unreadable")
    before, after = random.normal(size=(2, 12))
    before[2], after[5] = np.nan, np.nan
    change, kept = paired_change(after, before), np.delete(np.arange(12), [2, 5])
    assert change == paired_change(after[kept], before[kept])
    assert change.n == 10 and change.low < change.value < change.high
    none = paired_change([np.nan], [1.0])
    numbers = [none.value, none.low, none.high, none.p, none.min_detectable]
    assert none.n == 0 and np.isnan(numbers).all()


def test_nothing_is_clear_without_enough_items_or_spread():
    """Seven large changes, one item, or twenty equal ones: no interval, no p, no verdict."""
    for changes in (np.arange(10.0, 17.0), np.ones(1), np.full(20, 0.3), np.zeros(20)):
        for found in (paired_change(changes, 0 * changes), crossed_change([changes], 0 * changes)):
            assert found.value == pytest.approx(changes.mean()) and found.n == len(changes)
            assert np.isnan([found.low, found.high, found.p]).all()
            assert verdict(found.low, found.high) == "no clear change"
    # Within a known range a share of up to Wilson's limit for 0 of 20 may still differ.
    ones = paired_change(np.ones(20), np.zeros(20), bounds=(0, 1))
    assert (ones.low, ones.high) == pytest.approx((1 - 2 * wilson(0, 20)[1], 1)) and ones.p < 0.05


def test_skewness_widens_the_interval_on_the_side_of_the_tail():
    """Nine zeros and a one: Hall's limit above, Student's below."""
    changes = np.array([0.0] * 9 + [1.0])
    found = paired_change(changes, np.zeros(10))
    error, q = 0.1, t.ppf(0.975, 9)
    a = (9 * (-0.1) ** 3 + 0.9**3) / (9 * 0.01 + 0.81) ** 1.5
    lower = 3 / a * (np.cbrt(1 + a * (-q - a / 6)) - 1)
    assert (found.low, found.high) == pytest.approx((0.1 - error * q, 0.1 - error * lower))
    assert found.high - 0.1 > 0.1 - found.low


CHANGES = {  # what share of items changes and how; the true mean
    "thirds": (lambda r, n: r.integers(-1, 2, n) * (r.random(n) < 0.45), 0.0),
    "mostly gains": (lambda r, n: np.where(r.random(n) < 0.8, 1, -1) * (r.random(n) < 0.3), 0.18),
    "all gains": (lambda r, n: 1.0 * (r.random(n) < 0.3), 0.3),
    "quarters": (lambda r, n: r.integers(1, 5, n) / 4 * (r.random(n) < 0.3), 0.1875),
    "skewed gains": (lambda r, n: r.exponential(1, n) * (r.random(n) < 0.3), 0.3),
    "heavy tails": (lambda r, n: r.laplace(0, 1, n) * (r.random(n) < 0.3), 0.0),
    "normal": (lambda r, n: r.normal(size=n), 0.0),
}


@pytest.mark.parametrize("n", [24, 36])
@pytest.mark.parametrize("kind", CHANGES)
def test_paired_intervals_cover_changes_that_are_mostly_zero(kind, n):
    draw, truth = CHANGES[kind]
    random, found = generator(f"paired {kind} {n}"), []
    for _ in range(600):
        changes = draw(random, n)
        found.append(paired_change(changes, 0 * changes, bounds=(-np.inf, np.inf)))
    assert np.mean([f.low <= truth <= f.high for f in found]) >= 0.93
    assert all((f.p < 0.05) == (f.low > 0 or f.high < 0) for f in found)


def test_intervals_depend_on_their_name_and_on_nothing_before():
    values = generator("values").normal(size=30)
    first = mean_interval(values, "a")
    np.random.default_rng().normal(size=10), mean_interval(values, "b")
    assert mean_interval(values, "a") == first != mean_interval(values, "b")


def test_intervals_stay_within_bounds():
    """From eight skewed scores a bootstrap extrapolates far beyond 1."""
    scores = np.array([0.05, 0.06, 0.04, 0.055, 0.045, 0.07, 0.05, 0.95])
    interval = mean_interval(scores, bounds=(0, 1))
    assert 0 <= interval.low <= interval.value <= interval.high <= 1 < mean_interval(scores).high
    change = paired_change(100 * scores, np.zeros(8), bounds=(0, 100))
    assert change.high == 100 < paired_change(100 * scores, np.zeros(8)).high


def test_signed_values_are_no_outcomes():
    """All differences zero: no rate of 0 with Wilson's room above it."""
    zeros = mean_interval(np.zeros(12), bounds=(-1, 1))
    assert (zeros.low, zeros.high) == (0.0, 0.0)
    assert wilson(0.0, 12)[0] == 0.0 and wilson(1.0, 12)[1] == 1.0
    mixed = np.array([1.0, 0.0] * 6)
    unchanged = paired_change(mixed, mixed, clusters=np.repeat(np.arange(4), 3), bounds=(0, 1))
    limit = wilson(0, 4)[1]
    assert (unchanged.low, unchanged.high) == pytest.approx((-limit, limit))
    assert unchanged.min_detectable > 0 and unchanged.p == 1
    assert mean_interval(mixed, bounds=(-1, 1)) != mean_interval(mixed)
    assert mean_interval(mixed, bounds=(0, 1)) == mean_interval(mixed)


def test_few_clusters_use_students_t():
    values = np.array([0.2, 0.5, 0.3, 0.9])
    half = 3.182446 * values.std(ddof=1) / 2
    interval = mean_interval(10 * values)
    ends = (10 * (values.mean() - half), 10 * (values.mean() + half))
    assert (interval.low, interval.high) == pytest.approx(ends, rel=1e-5)


def crossed_study(random, seeds, items, of_items, of_seeds, changed=0.0):
    """Changes [seeds, items] of mean 0, with effects of items and of seeds (standard deviations;
    the interaction's is 1). ``changed``: share of -1 and 1, the rest is 0; without it, normal."""
    values = of_items * random.normal(size=items) + random.normal(size=(seeds, items))
    values += of_seeds * random.normal(size=(seeds, 1))
    if not changed:
        return values
    limit = np.sqrt(1 + of_items**2 + of_seeds**2) * -norm.ppf(changed / 2)
    return np.sign(values) * (np.abs(values) > limit)


@pytest.mark.parametrize("of_seeds", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("seeds", "items"), [(3, 24), (5, 24), (3, 60)])
def test_crossed_intervals_cover_items_and_seeds(seeds, items, of_seeds):
    """tests/benchmarks/coverage.py has more studies of more kinds."""
    random, found = generator(f"crossed {seeds} {items} {of_seeds}"), []
    for number in range(150):
        changed = 0.3 if number % 2 else 0.0
        table = crossed_study(random, seeds, items, 0.7, of_seeds, changed)
        found.append(crossed_change(table, np.zeros(items)))
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.93
    assert all((f.p < 0.05) == (f.low > 0 or f.high < 0) for f in found)


UNEQUAL = np.repeat(np.arange(8), [1, 1, 1, 2, 2, 3, 5, 9])


def unequal_study(random):
    """Five seeds; items of a cluster are much alike."""
    values = random.normal(size=(5, 24)) + 2 * random.normal(size=8)[UNEQUAL]
    return crossed_change(values, np.zeros(24), UNEQUAL), 0.0


def sparse_study(random):
    """A tenth of the changes is 1, the rest is 0, and seeds differ in how many."""
    values = crossed_study(random, 5, 60, 0.3, 0.6) / np.sqrt(1 + 0.3**2 + 0.6**2)
    changes = (values > norm.isf(0.1)).astype(float)
    return crossed_change(changes, np.zeros(60), bounds=(-np.inf, np.inf)), 0.1


@pytest.mark.parametrize(
    ("study", "least"),  # three standard errors below 0.956 and 0.941 of 2,000 studies
    [(unequal_study, 0.936), (sparse_study, 0.918)],
)
def test_crossed_intervals_cover_unequal_clusters_and_few_changes(study, least):
    """As many degrees of freedom as clusters, or no correction for skewness: 0.90 in both."""
    random = generator(study.__name__)
    found = [study(random) for _ in range(1000)]
    assert np.mean([f.low <= truth <= f.high for f, truth in found]) >= least
    assert all((f.p < 0.05) == (f.low > 0 or f.high < 0) for f, _ in found)


@pytest.mark.parametrize("sizes", [np.bincount(UNEQUAL), np.full(12, 3)])
def test_error_and_degrees_of_freedom_of_bell_and_mccaffrey(sizes):
    """Mean and variance of the quadratic form sᵀQs in independent totals of variance ``sizes``."""
    means = ClusterMeans(np.zeros(len(sizes)), sizes.astype(float))
    residual = np.eye(len(sizes)) - np.outer(sizes, np.ones(len(sizes))) / sizes.sum()
    form = residual.T @ np.diag(means.adjustment**2) @ residual @ np.diag(sizes)
    assert np.trace(form) == pytest.approx(sizes.sum())
    assert means.freedom == pytest.approx(np.trace(form) ** 2 / np.trace(form @ form))
    assert means.freedom < len(sizes) / 1.5 or means.freedom == pytest.approx(11)


def test_two_placebos_differ_clearly_in_about_one_study_in_twenty():
    """Items differ and seeds differ, but what two placebos do to an item is exchangeable."""
    random, clear = generator("placebos"), []
    for _ in range(200):
        for of_seeds in (0.1, 0.3, 0.5):
            level = random.normal(size=36)
            arms = [level + crossed_study(random, 3, 36, 0.0, of_seeds) for _ in range(2)]
            clear.append(crossed_change(*arms).p < 0.05)
    assert 0.03 <= np.mean(clear) <= 0.07


def test_reference_coverage():
    """What tests/benchmarks/coverage.py found when it was last run with --save."""
    table = pd.read_csv(Path(__file__).parent / "reference" / "coverage.csv")
    crossed = table[(table["what"] == "crossed") & (table["seeds"] >= 3)]
    by_size = crossed.groupby(["seeds", "items"])["covered"].agg(["mean", "min"])
    noise = 3 * np.sqrt(0.93 * 0.07 / table["studies"].min())  # of the lowest of many cells
    assert len(by_size) == 6 and (by_size["mean"] >= 0.95).all()
    assert (by_size["min"] >= 0.93 - noise).all()
    unequal = table[table["what"] == "unequal"]
    assert len(unequal) == 45 and (unequal["covered"] >= 0.93 - noise).all()
    for cells in (crossed, unequal[unequal["seeds"] >= 3]):
        assert (cells.groupby("kind")["covered"].mean() >= 0.94).all()  # over all sizes
    paired = table[(table["what"] == "paired") & (table["items"] >= 24)]
    assert (paired["covered"] >= 0.93 - noise).all()
    placebos = table[table["what"] == "placebos"]
    assert placebos.groupby("seeds")["clear"].mean().between(0.03, 0.07).all()


def test_crossed_change_by_hand():
    """Variance of the mean from the mean squares of a balanced table; standard deviation of
    seeds."""
    table = generator("by hand").normal(size=(3, 10)) + np.array([[0.0], [0.5], [1.0]])
    found = crossed_change(table, np.zeros(10))
    of_seeds, of_items = table.mean(1), table.mean(0)
    both = table - of_seeds[:, None] - of_items + table.mean()
    squares = 10 * of_seeds.var(ddof=1), 3 * of_items.var(ddof=1), (both**2).sum() / 18
    error = np.sqrt((squares[0] + squares[1] - squares[2]) / 30)
    needed = found.high - found.value + t.ppf(0.8, 2) * error
    assert found.min_detectable == pytest.approx(needed, rel=1e-4)
    assert found.seed_sd == pytest.approx(np.sqrt((squares[0] - squares[2]) / 10))
    assert (found.value, found.n, found.seeds) == (pytest.approx(table.mean()), 10, 3)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_crossed_change_is_found_about_as_often_as_promised(seeds):
    """Against a third, were the normal error doubled up as in a change of two checkpoints."""
    random = generator(f"crossed power {seeds}")

    def study(changed=0.0):
        table = changed + crossed_study(random, seeds, 36, 0.3, 0.3)
        return crossed_change(table, np.zeros(36))

    detectable = np.mean([study().min_detectable for _ in range(100)])
    assert 0.45 <= np.mean([study(detectable).p < 0.05 for _ in range(100)]) <= 0.9


def test_crossed_changes_with_gaps_clusters_and_one_seed():
    random = generator("gaps")
    table, before = random.normal(size=(3, 12)), random.normal(size=12)
    table[0, 1], table[:, 5] = np.nan, np.nan
    found, kept = crossed_change(table, before), np.delete(np.arange(12), 5)
    assert found.n == 11 and found.value == pytest.approx(np.nanmean(table - before))
    assert found == crossed_change(table[:, kept], before[kept], np.arange(11))
    one = crossed_change(table[:1], before)
    assert one.seeds == 1 and np.isnan(one.seed_sd)
    alone = paired_change(table[0], before)
    assert (one.low, one.high, one.p) == (alone.low, alone.high, alone.p)
    # Every item asked four times says no more than once, where copies are known as clusters.
    full = random.normal(size=(3, 12))
    copies = crossed_change(np.repeat(full, 4, 1), np.zeros(48), np.repeat(np.arange(12), 4))
    single = crossed_change(full, np.zeros(12))
    assert (copies.low, copies.high) == pytest.approx((single.low, single.high))
    assert np.isnan(crossed_change(np.full((3, 9), np.nan), np.zeros(9)).value)
