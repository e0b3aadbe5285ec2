"""Validation where the truth is known: linear models whose retraining has a formula, planted
examples, simulated intervals; and retrainings that can be killed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NAN, random_head, some_examples
from rlhf_trust import StudyError, stats
from rlhf_trust.attribution import validate as module
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.attribution.store import whole
from rlhf_trust.attribution.validate import (
    Queries,
    ablations,
    auc_ceiling,
    copy_ranks,
    copy_table,
    flipped,
    lds,
    lds_table,
    mean_gradients,
    mislabel,
    mitigation_table,
    mitigations,
    most_harmful,
    most_helpful,
    plant_copies,
    planted_auc,
    pruning_table,
    random_halves,
    random_sets,
    ranked_right,
    retrained,
    versions_of,
)
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.losses import DPOLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import LoRA, lora_weights, new_adapter
from rlhf_trust.report import mitigation_words, planted_words
from rlhf_trust.training import TrainConfig, example_losses, fit
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

PAD = 0


class Ridge:
    """Least squares with a penalty: retraining is a solve, influence −vᵀH⁻¹g exact for a small
    change of weight."""

    def __init__(self, n=64, m=12, d=6, penalty=1.0, seed=0):
        rng = np.random.default_rng(seed)
        truth = rng.normal(size=d)
        self.x, self.qx = rng.normal(size=(n, d)), rng.normal(size=(m, d))
        # Far off, so that a query's loss follows its gradient and not the curvature around its
        # minimum.
        self.y = self.x @ truth + rng.normal(size=n)
        self.qy = self.qx @ truth + 5 * rng.choice([-1, 1], size=m)
        self.damping = penalty / n * np.eye(d)

    def solve(self, rows):
        x, y = self.x[rows], self.y[rows]
        return np.linalg.solve(x.T @ x / len(x) + self.damping, x.T @ y / len(x))

    def losses(self, theta):
        return (self.qx @ theta - self.qy) ** 2 / 2

    def measure(self, rows, seed):
        return {"loss": self.losses(self.solve(rows))}

    def influence(self):
        theta = self.solve(np.arange(len(self.x)))
        g = (self.x @ theta - self.y)[:, None] * self.x
        v = (self.qx @ theta - self.qy)[:, None] * self.qx
        hessian = self.x.T @ self.x / len(self.x) + self.damping
        return -g @ np.linalg.solve(hessian, v.T)


@pytest.fixture(scope="module")
def ridge(tmp_path_factory):
    model, halves = Ridge(), random_halves(64, 100, seed=0)
    where = tmp_path_factory.mktemp("ridge")
    outcomes = retrained(where, "ridge", "ridge", halves, model.measure)
    return model.influence(), halves, outcomes["loss"]


# ------------------------------------------------------------------------------------------------


def test_halves_and_sets():
    halves = random_halves(10, 40, seed=3)
    assert halves.shape == (40, 10) and (halves.sum(1) == 5).all()
    assert len(np.unique(halves, axis=0)) > 30
    np.testing.assert_array_equal(random_halves(10, 7, seed=3), halves[:7])
    assert (random_halves(10, 40, seed=4) != halves).any()
    often = random_halves(6, 4000, seed=0).mean(0)
    assert np.abs(often - 0.5).max() < 0.03
    sets = random_sets(9, 4, 5, seed=0)
    assert sets.shape == (5, 4) and (np.diff(sets, axis=1) > 0).all()
    with pytest.raises(StudyError, match="must be even"):
        random_halves(7, 2, 0)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    halves = random_halves(8, 6, seed=0)
    calls = []

    def measure(rows, seed):
        calls.append(seed)
        draw = np.random.default_rng([seed, *rows.tolist()])
        return {"a": draw.normal(size=3), "b": draw.normal(size=2) / 3}

    whole = retrained(tmp_path / "whole", "run", ["key"], halves, measure, seed=10)
    assert calls == [10, 11, 12, 13, 14, 15]
    assert whole["a"].shape == (6, 3) and whole["b"].shape == (6, 2)

    def killed(rows, seed):
        if seed == 13:
            raise KeyboardInterrupt
        return measure(rows, seed)

    with pytest.raises(KeyboardInterrupt):
        retrained(tmp_path / "killed", "run", ["key"], halves, killed, seed=10)
    calls.clear()
    resumed = retrained(tmp_path / "killed", "run", ["key"], halves, measure, seed=10)
    assert calls == [13, 14, 15]
    for what in whole:
        np.testing.assert_array_equal(resumed[what], whole[what])
    files = [next((tmp_path / side).iterdir()) for side in ("whole", "killed")]
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
    assert [len(list((tmp_path / side).iterdir())) for side in ("whole", "killed")] == [1, 1]
    calls.clear()
    retrained(tmp_path / "whole", "run", ["key"], halves[:2], measure, seed=10)
    assert not calls
    retrained(tmp_path / "whole", "run", ["other key"], halves[:1], measure, seed=10)
    # Another subset under that number.
    retrained(tmp_path / "whole", "run", ["key"], halves[1:2], measure, seed=10)
    assert calls == [10, 10]
    monkeypatch.setenv("RLHF_TRUST_CACHE", "off")
    again = retrained(tmp_path / "off", "run", ["key"], halves, measure, seed=10)
    np.testing.assert_array_equal(again["a"], whole["a"])
    calls.clear()
    retrained(tmp_path / "off", "run", ["key"], halves, measure, seed=10)
    assert len(calls) == 6, "with the cache off nothing kept is read"


def test_pairs_are_ranked_right_where_their_loss_is_below_log_2():
    assert ranked_right(np.log(2) + np.array([-1e-6, 1e-6])).tolist() == [1, 0]


# ------------------------------------------------------------------------------------------------


def test_exact_influence_has_a_high_lds_and_random_scores_none(ridge):
    influence, halves, outcomes = ridge
    rng = np.random.default_rng(1)
    scores = lds(influence, halves, outcomes)
    assert scores.shape == (12,) and scores.mean() > 0.9
    predicted = halves.astype(float) @ influence
    by_hand = [scipy_stats.spearmanr(predicted[:, j], outcomes[:, j])[0] for j in range(12)]
    np.testing.assert_allclose(scores, by_hand, atol=1e-12)
    np.testing.assert_allclose(lds(-influence, halves, outcomes), -scores, atol=1e-12)
    solvers = {"exact": influence, "nothing": rng.normal(size=influence.shape)}
    mean, nothing = lds_table(solvers, halves, outcomes, ["nothing"], draws=200).itertuples()
    assert mean.lds == pytest.approx(scores.mean()) and mean.items == 12
    assert mean.ci_low < mean.lds < mean.ci_high
    assert nothing.ci_low < 0 < nothing.ci_high and abs(nothing.lds) < 0.15


def test_scores_that_say_nothing_and_items_that_never_change(ridge):
    influence, halves, outcomes = ridge
    # Equal sums in spite of rounding.
    assert (lds(np.full_like(influence, 0.1), halves, outcomes) == 0).all()
    still = outcomes.copy()
    still[:, 0] = 3.0
    scores = lds(influence, halves, still)
    assert np.isnan(scores[0]) and not np.isnan(scores[1:]).any()
    solvers = {"exact": influence, "turned": -influence}
    table = lds_table(solvers, halves, still, ["turned"], draws=50)
    assert (table["items"] == 11).all()
    assert table.loc[0, "above_turned"] == pytest.approx(2 * np.nanmean(scores))
    with pytest.raises(StudyError, match="no loss changes"):
        lds_table(solvers, halves, np.ones_like(outcomes), ["turned"], draws=50)
    with pytest.raises(StudyError, match="finite scores"):
        lds(influence * np.nan, halves, outcomes)


def test_lds_interval_holds_the_truth():
    """Predictions and outcomes jointly normal: the true Spearman is 6/π · asin(ρ/2) (Pearson
    1907). Noise that all items of a half share makes them dependent, so that halves and not only
    items count."""
    held, widths, simulations = 0, [], 120
    for study in range(simulations):
        rng = np.random.default_rng(study)
        count, n, m = 40, 200, 10
        halves = random_halves(n, count, seed=study)
        shared = rng.normal(size=(n, 1))
        # Σ over a half then has variance 1.
        influence = (shared + rng.normal(size=(n, m))) / np.sqrt(n / 4 * 2)
        noise = rng.normal(size=(count, 1)) * np.sqrt(1.5)
        noise = noise + rng.normal(size=(count, m)) * np.sqrt(1.5)
        truth = 6 / np.pi * np.arcsin(1 / np.sqrt(1 + 3) / 2)
        outcomes = halves @ influence + noise
        table = lds_table({"": influence}, halves, outcomes, (), f"study {study}", draws=200)
        (low, high) = table.loc[0, ["ci_low", "ci_high"]]
        held += low <= truth <= high
        widths.append(high - low)
    assert held / simulations > 0.92
    # And not by being so wide that they say nothing: the estimates' own spread asks for a width of
    # 0.28.
    assert np.mean(widths) < 0.4


def test_solvers_are_compared_on_the_same_halves(ridge):
    influence, halves, outcomes = ridge
    rng = np.random.default_rng(2)
    worse = influence + rng.normal(size=influence.shape) * influence.std()

    def compare(first, second):
        solvers = {"first": first, "second": second}
        row = lds_table(solvers, halves, outcomes, ["second"], draws=300).iloc[0]
        return row[["above_second", "above_second_low", "above_second_high", "above_second_p"]]

    value, low, high, p = change = compare(influence, worse)
    expected = lds(influence, halves, outcomes).mean() - lds(worse, halves, outcomes).mean()
    assert value == pytest.approx(expected) and 0 < low < value < high and p < 0.01
    assert compare(influence, 3 * influence).tolist() == [0, 0, 0, 1]
    turned = compare(worse, influence).tolist()
    assert turned == pytest.approx([-change.iloc[0], -high, -low, p])

    solvers = {"exact": influence, "noisy": worse}
    for name in ("nothing", "tfidf", "random"):
        solvers[name] = rng.normal(size=influence.shape)
    table = lds_table(solvers, halves, outcomes, draws=300)
    by_name = table.set_index("solver")
    exact = by_name.loc["exact"]
    assert exact["above_random_low"] > 0 and exact["above_tfidf_p_holm"] < 0.05
    assert (by_name["above_random_p_holm"].dropna() >= by_name["above_random_p"].dropna()).all()
    assert by_name.loc["random", ["above_random", "above_tfidf"]].isna().all()
    assert by_name.loc["tfidf", "above_random_p_holm"] > 0.05
    assert np.isnan(by_name.loc["tfidf", "above_tfidf"])
    assert by_name.loc["nothing", "above_random_p_holm"] > 0.05
    below = lds_table(solvers | {"exact": -influence}, halves, outcomes, draws=300)
    assert below.loc[0, "above_random_high"] < 0 and below.loc[0, "above_random_p_holm"] < 0.05


def test_random_is_a_mean_and_a_constant_says_nothing(ridge):
    influence, halves, outcomes = ridge
    rng = np.random.default_rng(3)
    many = rng.normal(size=(100, *influence.shape))
    one = max(many, key=lambda draw: abs(lds(draw, halves, outcomes).mean()))
    solvers = {"exact": influence, "random": one, "tfidf": np.full_like(influence, 0.1)}
    single = lds_table(solvers, halves, outcomes, draws=200).set_index("solver")
    table = lds_table(solvers | {"random": many}, halves, outcomes, draws=200).set_index("solver")
    mean = np.mean([lds(draw, halves, outcomes).mean() for draw in many])
    assert table.loc["random", "lds"] == pytest.approx(mean) and abs(mean) < 0.02
    assert abs(single.loc["random", "lds"]) > 0.05
    assert table.loc["tfidf", ["lds", "ci_low", "ci_high"]].tolist() == [0, 0, 0]
    assert table.loc["tfidf", "above_random"] == pytest.approx(-mean)


def test_noise_ceiling():
    """Outcomes of a half: what it is, plus what the seed adds. Perfect scores reach the ceiling."""
    rng, n = np.random.default_rng(0), 40
    halves = random_halves(n, 1000, seed=0)
    influence = rng.normal(size=(n, 30)) / np.sqrt(n / 4)
    truth = halves @ influence
    for noise, least in ((0.7, 0.5), (2.0, 0.1)):
        by_seed = truth + noise * rng.normal(size=(2, *truth.shape))
        agreement, ceiling = module.noise_ceiling(by_seed, draws=100)
        assert agreement.low < agreement.value < agreement.high and agreement.value > least
        found = lds(influence, halves, by_seed.mean(0)).mean()
        assert found == pytest.approx(ceiling.value, abs=0.03)
        assert ceiling.low <= ceiling.value <= ceiling.high
    nothing = module.noise_ceiling(rng.normal(size=(2, 200, 30)), draws=100)
    assert nothing[0].low < 0 < nothing[0].high and nothing[1].value < 0.25
    assert module.noise_ceiling(np.stack([truth] * 3), draws=20)[1].value == pytest.approx(1)


# ------------------------------------------------------------------------------------------------


def test_leaving_out_the_top_lowers_the_loss(tmp_path):
    model = Ridge(n=60, m=30, seed=4)
    scores = model.influence().mean(1)
    top, bottom = most_harmful(scores, 6), most_helpful(scores, 6)
    assert scores[top].min() >= np.sort(scores)[-6] and scores[bottom].max() <= np.sort(scores)[5]
    assert scores[top[0]] == scores.max() and scores[bottom[0]] == scores.min()
    names, subsets = ablations(60, {"top": top, "bottom": bottom}, draws=8, seed=0)
    assert names == ("top", "bottom", *["random"] * 8) and (subsets.sum(1) == 54).all()
    assert not subsets[0, top].any() and not subsets[1, bottom].any()
    losses = retrained(tmp_path, "leave-out", "ridge", subsets, model.measure)["loss"]
    table = pruning_table(names, losses).set_index("arm")
    assert table.loc["top", "change"] < 0 < table.loc["bottom", "change"]
    assert table.loc["top", "draws_high"] < 0 < table.loc["bottom", "draws_low"]
    by_hand = losses[0].mean() - losses[2:].mean()
    assert table.loc["top", "change"] == pytest.approx(by_hand)
    with pytest.raises(StudyError, match="at most half"):
        most_harmful(scores, 31)
    with pytest.raises(StudyError, match="not finite"):
        most_helpful(np.array([1.0, np.nan, 2.0, 3.0]), 1)


# ------------------------------------------------------------------------------------------------


def test_ablations():
    scores, nothing = np.array([0.1, 5, -3, 4, 0, 0, 0, 0, 0, 0]), np.zeros(0, dtype=int)
    assert most_harmful(scores, 2).tolist() == [1, 3] and most_helpful(scores, 2).tolist() == [2, 4]
    removed = {"full": nothing, "pruned": most_harmful(scores, 2)}
    names, subsets = ablations(10, removed, draws=3, seed=0)
    assert names == ("full", "pruned", "random", "random", "random")
    assert [np.flatnonzero(~row).tolist() for row in subsets[:2]] == [[], [1, 3]]
    assert (subsets[2:].sum(1) == 8).all()


def test_the_interval_over_draws_is_students():
    """With three random draws and one pruned model: ± t(2) · √(1 + 1/3) = 4.97 spreads, and it
    holds 95 % of the time."""
    rng = np.random.default_rng(0)
    at_random = np.array([1.0, 2.0, 4.0])
    low, high, p = module._between_draws(np.array([0.0]), at_random)
    assert (high - low) / 2 == pytest.approx(4.968 * at_random.std(ddof=1), rel=1e-3)
    assert (low + high) / 2 == pytest.approx(-at_random.mean()) and (p < 0.05) == (high < 0)
    assert module._between_draws(np.ones(1), np.full(3, 2.0)) == (-1, -1, 0)
    assert module._between_draws(np.ones(1), np.ones(3)) == (0, 0, 1)
    held = 0
    for _ in range(2000):
        low, high, _ = module._between_draws(rng.normal(size=1), rng.normal(size=3))
        held += low <= 0 <= high
    assert 0.935 < held / 2000 < 0.965


def test_every_arm_against_the_mean_of_the_random_ones():
    rng = np.random.default_rng(0)
    names = ("full", "pruned", "random", "random", "random")
    items = rng.normal(size=30)
    noise = rng.normal(size=(5, 30)) * 0.02
    # Pruning helps by 1 on every item, far more than random draws differ.
    losses = items + noise - np.array([0, 1, 0, 0, 0])[:, None]
    table = pruning_table(names, losses)
    assert table["arm"].tolist() == ["full", "pruned"] and table.loc[0, "p"] > 0.05
    row = table.loc[1]
    assert row["change"] == pytest.approx(losses[1].mean() - losses[2:].mean())
    assert row["items_high"] < 0 and row["draws_high"] < 0 and row["p"] < 0.05
    assert (row["n"], row["draws"]) == (30, 3)
    assert (table["p"] == table[["p_items", "p_draws"]].max(axis=1)).all()

    # What random draws differ by hides the same effect, however sure the items are.
    shifts = np.array([0, 0, -1.0, 0.2, 1.1])[:, None]
    hidden = pruning_table(names, losses + shifts).loc[1]
    assert hidden["p_items"] < 0.05 < hidden["p_draws"] and hidden["p"] == hidden["p_draws"]

    single = pruning_table(names[:3], losses[:3])
    assert single["draws_low"].isna().all() and single["p"].isna().all()
    few = pruning_table(names, losses[:, :7])
    assert few["p"].isna().all()


# ------------------------------------------------------------------------------------------------

PLAN = [
    ("remove", "harmful", np.array([1, 3])),
    ("flip", "harmful", np.array([1, 3])),
    ("flip", "harmful", np.array([1, 3, 4])),
    ("down-weight", "harmful", np.array([1, 3])),
]


def test_the_versions_of_pairs_that_an_arm_trains_on():
    arms, versions = mitigations(6, PLAN, draws=3, seed=0)
    assert len(arms) == len(versions) == 1 + 4 + 4 * 3 and versions.shape[1] == 3 * 6
    assert arms.loc[0].tolist() == ["none", "all", 0]
    assert (versions.sum(1) == np.where(arms["action"] == "remove", 6 - arms["pairs"], 6)).all()
    pairs = some_examples(6, 2)

    def trained_on(arm):
        return versions_of(pairs, np.flatnonzero(versions[arm]), 0.25)

    examples, weights = trained_on(0)
    assert examples == pairs and weights.tolist() == [1] * 6
    examples, weights = trained_on(1)
    assert examples == pairs and weights.tolist() == [1, 0, 1, 0, 1, 1]
    examples, weights = trained_on(3)
    assert weights.tolist() == [1] * 6
    for place, (example, pair) in enumerate(zip(examples, pairs)):
        turned = place in (1, 3, 4)
        assert example.sequences == (pair.sequences[::-1] if turned else pair.sequences)
        assert (example.id == pair.id) != turned
    examples, weights = trained_on(4)
    assert examples == pairs and weights.tolist() == [1, 0.25, 1, 0.25, 1, 1]

    # Actions on as many pairs share their random sets.
    at_random = arms["selection"] == "random"
    removed = ~versions[at_random & (arms["action"] == "remove")][:, :6]
    alike = at_random & (arms["action"] == "flip") & (arms["pairs"] == 2)
    assert (versions[alike][:, 6:12] == removed).all() and (removed.sum(1) == 2).all()


def test_a_flipped_pair_is_as_likely_as_the_pair_is_not(tiny_llama):
    model, pairs = new_adapter(tiny_llama, LoRA(4, 8), 0).eval(), some_examples(4, 2)
    reference = reference_logps(model, "default", pairs, PAD)
    loss = DPOLoss(0.5, reference | {flipped(p).id: reference[p.id][::-1] for p in pairs})
    fit(model, "default", pairs, loss, PAD, TrainConfig(learning_rate=1e-2, epochs=3))
    as_is = example_losses(model, "default", pairs, loss, PAD)
    other = example_losses(model, "default", [flipped(p) for p in pairs], loss, PAD)
    assert (as_is < np.log(2)).all()
    assert np.exp(-as_is) + np.exp(-other) == pytest.approx(1)


def drawn(rng, count, n=12, of_set=1.0, of_both=1.0):
    """Outcomes [count, n] of random sets: a shift of each set, and one of each item under it."""
    return of_set * rng.normal(size=(count, 1)) + of_both * rng.normal(size=(count, n))


def test_a_worthless_selection_is_one_more_random_draw():
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        items, sets = rng.normal(size=12), drawn(rng, 9)
        found.append(module.against_draws(items + sets[0], items + sets[1:]))
    wrong = np.mean([(change.low > 0) or (change.high < 0) for change in found])
    assert wrong < 0.08
    # Hardly wider than it must be: a set's shift is nearly all here, so Student's t over draws,
    # with one end moved out for the skewness that eight draws seem to have.
    means = drawn(rng, 9, of_both=0.01).mean(1)
    change = module.against_draws(np.full(12, means[0]), np.tile(means[1:, None], 12))
    half = scipy_stats.t.ppf(0.975, 7) * means[1:].std(ddof=1) * np.sqrt(1 + 1 / 8)
    assert change.value == pytest.approx(means[0] - means[1:].mean())
    ends = sorted((change.high - change.value, change.value - change.low))
    assert ends[0] == pytest.approx(half, rel=0.1) and ends[1] < 1.6 * half
    assert change.seeds == 8 and change.n == 12


def test_mitigation_table_and_words():
    rng = np.random.default_rng(1)
    arms, _ = mitigations(6, PLAN, draws=8, seed=0)
    items = rng.normal(size=12)
    ethics, privacy = (items + drawn(rng, len(arms), 12, 0.02, 0.02) for _ in range(2))
    ethics[1] -= 1  # removing helps
    ethics[3] += 1  # flipping three harms
    privacy[4] += 1  # a side effect of down-weighting
    outcomes = {"ethics": ethics, "privacy": privacy}
    table = mitigation_table(arms, outcomes, "ethics")
    assert len(table) == 8 and set(table["draws"]) == {8} and set(table["n"]) == {12}
    own = table[table["vertical"] == "ethics"].reset_index(drop=True)
    alike = (arms["action"] == "flip") & (arms["pairs"] == 3) & (arms["selection"] == "random")
    by_hand = ethics[3].mean() - ethics[alike].mean()
    assert own.loc[2, "change"] == pytest.approx(by_hand)
    for _, part in table.groupby(table["vertical"] == "ethics"):  # each a family of its own
        assert part["p_holm"].tolist() == pytest.approx(stats.holm(part["p"]))
    table = table.assign(target="ethics", share=table["pairs"] / 6)
    words = mitigation_words(table, "ethics")
    assert "over 12 items and 8 draws" in words[0] and "over 4 arms" in words[0]
    assert words[1].startswith("- remove the 2 most harmful pairs (33 %): -1.0")
    assert ": it worked (p " in words[1] and ": it harmed (p " in words[3]
    least = f"one of {own.loc[1, 'min_detectable']:.2f} nats"
    assert "no clear effect" in words[2] and least in words[2]
    aside = table[(table["vertical"] == "privacy") & (table["action"] == "down-weight")].iloc[0]
    assert f"privacy by {aside['change']:+.2f} (down-weight the 2 most harmful" in words[5]
    assert "of 4 tested" in words[5]

    similar = mitigation_words(table.assign(selection="similar"), "ethics")
    assert similar[1].startswith("- remove the 2 pairs most similar in text (33 %): ")

    few = mitigation_table(arms, {"ethics": ethics[:, :7]}, "ethics")
    assert few["p_holm"].isna().all()
    words = mitigation_words(few.assign(target="ethics", share=0.3), "ethics")
    assert "fewer than 8" in words[1] and words[1].endswith("nothing can be said.\n")
    assert len(words) == 5  # no side effect was measured
    with pytest.raises(StudyError, match="no target 'privacy'"):
        mitigation_words(table, "privacy")


def test_planted_words():
    rows = [("planted_auc", "agreement", "gradient_cosine", 0.964, 0.9, 1.0, NAN, 40)]
    rows += [("lds", "answers", "datainf", 0.4, 0.3, 0.5, NAN, 16)]
    columns = ["test", "target", "solver", "value", "ci_low", "ci_high", "p", "n"]
    (words,) = planted_words(pd.DataFrame(rows, columns=columns))
    assert "of gradient cosine 0.96 (0.90 to 1.00) (40 pairs;" in words and "datainf" not in words


# ------------------------------------------------------------------------------------------------


def test_mislabel():
    pairs = [
        PreferencePair(f"p{i}", ("hi",), f"good {i}", f"bad {i}", "helpful") for i in range(20)
    ]
    swapped, mask = mislabel(pairs, 0.1, seed=0)
    assert mask.sum() == 2 and [p.id for p in swapped] == [p.id for p in pairs]
    for pair, other, wrong in zip(pairs, swapped, mask):
        assert (other.chosen, other.rejected) == (
            (pair.rejected, pair.chosen) if wrong else (pair.chosen, pair.rejected)
        )
    assert (mislabel(pairs, 0.1, seed=0)[1] == mask).all() and (
        mislabel(pairs, 0.1, seed=1)[1] != mask
    ).any()
    for bad in (0.0, 1.0, 0.001):
        with pytest.raises(StudyError, match="swap some of them, not all"):
            mislabel(pairs, bad, 0)


def test_influence_finds_mislabelled_pairs_of_a_linear_reward():
    """Bradley-Terry on random features, 10 % of pairs swapped: their influence on clean pairs'
    loss is high."""
    rng = np.random.default_rng(0)
    truth, x, clean = rng.normal(size=5), rng.normal(size=(200, 5)), rng.normal(size=(300, 5))
    x *= np.sign(x @ truth)[:, None]  # chosen less rejected: the better one first
    clean *= np.sign(clean @ truth)[:, None]
    swapped = np.zeros(200, dtype=bool)
    swapped[rng.choice(200, 20, replace=False)] = True
    x[swapped] *= -1
    theta = np.zeros(5)
    for _ in range(50):  # Newton
        p = 1 / (1 + np.exp(-x @ theta))
        hessian = (x * (p * (1 - p))[:, None]).T @ x / 200 + 0.01 * np.eye(5)
        theta -= np.linalg.solve(hessian, -(x * (1 - p)[:, None]).mean(0) + 0.01 * theta)
    g = -x * (1 - 1 / (1 + np.exp(-x @ theta)))[:, None]
    v = (-clean * (1 - 1 / (1 + np.exp(-clean @ theta)))[:, None]).mean(0)
    found = planted_auc(-g @ np.linalg.solve(hessian, v), swapped)
    assert found.low > 0.7 and found.value > 0.85


def test_planted_auc():
    rng = np.random.default_rng(0)
    planted = np.arange(120) < 30
    truth, held = scipy_stats.norm.cdf(1 / np.sqrt(2)), 0
    for study in range(100):
        scores = rng.normal(size=120) + planted
        found = planted_auc(scores, planted, f"study {study}", draws=300)
        held += found.low <= truth <= found.high
        assert found.value == pytest.approx(roc_auc_score(planted, scores))
    assert 0.90 <= held / 100 <= 0.99
    ties = planted_auc(np.zeros(120), planted)
    assert (ties.value, ties.low, ties.high) == pytest.approx((0.5, 0.5, 0.5))
    assert planted_auc(planted.astype(float), planted).value == 1
    with pytest.raises(StudyError, match="a score of dot is not finite"):
        planted_auc(np.array([1.0, NAN, 0.0]), np.array([True, False, False]), "dot")


@pytest.mark.parametrize("accuracy", [0.5, 0.6, 0.69, 0.9])
def test_auc_ceiling_by_simulation(accuracy):
    rng = np.random.default_rng(0)
    margins = rng.normal(scipy_stats.norm.ppf(accuracy), 1.0, size=40_000)
    assert (margins > 0).mean() == pytest.approx(accuracy, abs=0.01)
    swapped = rng.random(40_000) < 0.1
    area = roc_auc_score(swapped, -np.where(swapped, -margins, margins))
    assert auc_ceiling(accuracy) == pytest.approx(area, abs=0.01)


def test_auc_ceiling_numbers():
    assert [round(auc_ceiling(a), 2) for a in (0.5, 0.6, 0.69, 1.0)] == [0.5, 0.64, 0.76, 1.0]


def test_mean_gradients_are_those_of_mean_losses(tiny_llama):
    model = new_adapter(tiny_llama, LoRA(2, 4)).eval()
    queries = {
        "answers": Queries(some_examples(4, 1), NextTokenLoss("mean")),
        "pairs": Queries(some_examples(3, 2), RewardLoss(random_head(32, 0))),
    }
    found = mean_gradients(model, "default", queries, PAD)
    assert found.ids == ("answers", "pairs")
    weights = lora_weights(model, "default")
    for row, query in enumerate(queries.values()):
        value = query.loss.loss(model, query.examples, PAD).mean()
        wanted = torch.autograd.grad(value, list(weights.values()))
        for layer, gradient in zip(weights, wanted):
            own = whole(found, layer)[row].float()
            torch.testing.assert_close(own, gradient.flatten(), rtol=1e-3, atol=1e-6)


def test_copies_are_found_by_gradients(tiny_llama):
    """A copy's gradient is its query's, so their cosine is 1: it comes first of all."""
    model = new_adapter(tiny_llama, LoRA(2, 4)).eval()
    training, queries = some_examples(10, 1), some_examples(3, 1, seed=9, prefix="q")
    examples, owner = plant_copies(training, queries, seed=0)
    ids = np.array([example.id for example in examples])
    assert sorted(ids[owner >= 0]) == ["copy of q0", "copy of q1", "copy of q2"]
    assert ids[owner < 0].tolist() != [example.id for example in training]
    for number, example in zip(owner, examples):
        assert number < 0 or example.sequences == queries[number].sequences

    def directions(some):
        found = per_example_gradients(model, "default", some, NextTokenLoss(), PAD, allow_zero=True)
        return torch.nn.functional.normalize(torch.cat(list(found.values()), 1))

    cosine = directions(examples) @ directions(queries).T
    influence = -cosine.numpy()
    assert copy_ranks(influence, owner).tolist() == [1, 1, 1]
    assert copy_ranks(-influence, owner).tolist() == [13, 13, 13]
    table = copy_table({"cosine": influence, "turned": -influence}, owner, k=2)
    assert table["value"].tolist() == pytest.approx([1, 1, 0, 0])
    assert (table["n"] == 3).all() and isinstance(table, pd.DataFrame)
