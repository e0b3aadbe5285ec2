"""Order consistency: labels as their integral says, known truths learnt, best-of-n by drawing."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from rlhf_trust import StudyError, models
from rlhf_trust.artifacts import ResultCache
from rlhf_trust.chat import EncodedExample
from rlhf_trust.rewards import embeddings, order_consistency as oc
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm, spearmanr
from test_ppo import write_adapters


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    for name, value in dict(HIDDEN=(32,), EPOCHS=15, BATCH=128, LEARNING_RATE=3e-3).items():
        monkeypatch.setattr(oc, name, value)


def linear_bench(prompts=60, answers=8, d=12, prompt_spread=1.0, seed=0):
    """Embeddings with a part that a prompt's answers share; the golden reward is linear in them."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d) / d**0.5

    def draw(n):
        embeddings = rng.normal(size=(n, answers, d)) + prompt_spread * rng.normal(size=(n, 1, d))
        return embeddings, oc.in_units(embeddings @ direction)

    return oc.Bench(*draw(prompts), *draw(prompts))


def expected_share(variance: float) -> float:
    """E σ(|Z|) with Z ~ N(0, v)."""
    return 2 * quad(lambda z: expit(z) * norm.pdf(z, scale=variance**0.5), 0, np.inf)[0]


@pytest.fixture
def kept(tmp_path):
    return ResultCache(tmp_path / "sweep.jsonl")


def settings(**changed) -> oc.Settings:
    chosen = {"reward_models": ["classifier"], "choices": ["same"], "betas": [1.0]}
    chosen |= {"n_pairs": [200], "seeds": [0], "best_of": [2]}
    return oc.Settings(**chosen | changed)


def test_labels_are_right_as_often_as_the_integral_says():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(200, 8))
    pairs = oc.choose_pairs(golden, "same", 20000, rng)
    beta = 1.5
    annotated, right = oc.annotate(golden, pairs, beta, rng)
    assert right == pytest.approx(expected_share(beta**2 * 2), abs=0.01)
    rewards = golden[annotated[..., 0], annotated[..., 1]]
    assert (rewards[:, 0] > rewards[:, 1]).mean() == pytest.approx(right)
    _, perfect = oc.annotate(golden, pairs, np.inf, rng)
    assert perfect == 1.0


def test_which_answers_are_paired():
    rng = np.random.default_rng(0)
    bench = linear_bench(prompt_spread=3.0)
    gaps, golden = {}, bench.train_golden
    for how in oc.CHOICES:
        pairs = oc.choose_pairs(golden, how, 4000, rng)
        same_prompt = pairs[:, 0, 0] == pairs[:, 1, 0]
        assert same_prompt.all() if how != "cross" else not same_prompt.any()
        assert (pairs[:, 0] != pairs[:, 1]).any(1).all()
        gaps[how] = np.abs(np.diff(golden[pairs[..., 0], pairs[..., 1]], axis=1)).mean()
    assert gaps["cross"] > gaps["same"] and gaps["diversified"] > gaps["same"] > gaps["similar"]
    with pytest.raises(StudyError, match="1 prompts with 8 answers have none"):
        oc.choose_pairs(golden[:1], "cross", 5, rng)


@pytest.mark.parametrize("how", oc.CHOICES)
def test_pairs_repeat_only_when_there_are_no_others(how):
    golden = np.random.default_rng(0).normal(size=(5, 4))
    answers = list(itertools.product(range(5), range(4)))
    in_order = [[(p, int(a)) for a in np.argsort(golden[p])] for p in range(5)]
    possible = {
        "same": [(a, b) for a, b in itertools.combinations(answers, 2) if a[0] == b[0]],
        "cross": [(a, b) for a, b in itertools.combinations(answers, 2) if a[0] != b[0]],
        "similar": [(o[1], o[2]) for o in in_order],
        "diversified": [(o[0], o[3]) for o in in_order],
    }[how]
    for n in (3, len(possible), 2 * len(possible) + 3):
        pairs = oc.choose_pairs(golden, how, n, np.random.default_rng(n))
        counts = pd.Series([frozenset(map(tuple, pair)) for pair in pairs.tolist()]).value_counts()
        assert set(counts.index) <= set(map(frozenset, possible))
        assert oc.distinct(pairs) == len(counts) == min(n, len(possible))
        assert counts.sum() == n and counts.max() - counts.min() <= 1
        assert counts.max() == -(-n // len(possible))


def test_prompts_are_held_out_whole():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(40, 6))
    for how in oc.CHOICES:
        prompts = oc.choose_pairs(golden, how, 900, rng)[..., 0]
        held_out = oc.held_out_by_prompt(prompts, rng.permutation(40))
        assert 0.2 <= held_out.mean() < 0.26
        learnt_from = set(prompts[~held_out].ravel())
        unseen = ~np.isin(prompts[held_out], list(learnt_from))
        assert unseen.any(1).all() if how == "cross" else unseen.all()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"betas": [2.0, 1.0]}, "betas: must be in rising order, got 2.0, 1.0"),
        ({"n_pairs": [400, 200]}, "amounts: must be in rising order, got 400, 200"),
        ({"best_of": [2, 9]}, "best_of: must be at most answers_test, 8, got 9"),
        ({"betas": [0.5, 2.0]}, "ppo_beta: must be one of betas, got 1.0"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changed, said):
    settings(betas=[0.5, 1.0]).check(8, ppo_beta=1.0)
    with pytest.raises(StudyError, match=said):
        settings(**changed).check(8, ppo_beta=1.0)


@pytest.mark.parametrize(
    ("name", "spearman"), [("bradley_terry", 0.9), ("classifier", 0.8), ("lightgbm", 0.7)]
)
def test_a_linear_truth_without_noise_is_learnt(name, spearman, kept):
    chosen = settings(reward_models=[name], betas=[np.inf], n_pairs=[3000], best_of=[4])
    found = oc.sweep(linear_bench(), chosen, kept)
    assert found.loc[0, "spearman"] > spearman
    # The best possible gain is 1.03.
    assert found.loc[0, "pair_accuracy"] > 0.75 and found.loc[0, "gain_4"] > 0.7


def test_networks_start_as_torchs_default_does_from_their_own_seed():
    """A larger output layer starts with rewards that are large, random and hard to unlearn."""
    first, again = (oc.perceptron([50, 256, 1], torch.Generator().manual_seed(3)) for _ in "ab")
    by_torch = torch.nn.Sequential(torch.nn.Linear(50, 256), torch.nn.Linear(256, 1))
    for own, same, default in zip(first[::2], again[::2], by_torch):
        torch.testing.assert_close(own.weight, same.weight, rtol=0, atol=0)
        assert float(own.weight.detach().std()) == pytest.approx(
            float(default.weight.detach().std()), rel=0.2
        )
        assert 0 < float(own.bias.detach().abs().max()) <= own.in_features**-0.5
    assert first(torch.randn(4, 7, 50)).shape == (4, 7)


@pytest.mark.parametrize("loss", oc.LOSSES.values())
def test_shrunk_rewards_are_not_worse_than_a_constant(loss):
    rewards = torch.linspace(-20, 20, 41)

    def shrunk(chosen, rejected):
        factor = oc.shrink_factor(loss, chosen, rejected)
        return factor, float(loss(factor * chosen, factor * rejected))

    assert shrunk(-rewards, rewards) == (0.5**10, pytest.approx(np.log(2), abs=0.01))
    often_right = rewards + torch.tensor([3.0, -2.0]).repeat(21)[:41]
    factor, least = shrunk(often_right, rewards)
    assert least < np.log(2) < loss(often_right, rewards) and factor < 1
    assert shrunk(torch.full((9,), 2.0), torch.full((9,), -2.0))[0] == 1


def test_a_prompts_own_level_moves_the_classifier_alone():
    rng = np.random.default_rng(0)
    chosen, rejected, level = (torch.tensor(rng.normal(size=50)) for _ in range(3))
    for loss, moved in ((oc.bradley_terry, False), (oc.classification, True)):
        change = float(loss(chosen + level, rejected + level) - loss(chosen, rejected))
        assert abs(change) > 0.01 if moved else abs(change) < 1e-12


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    learnt, golden = rng.normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        for row, (a, b) in enumerate(zip(learnt, golden)):
            draws = map(list, itertools.combinations(range(6), n))
            gain = np.mean([b[drawn][a[drawn].argmax()] for drawn in draws]) - b.mean()
            assert oc.best_of_n(learnt, golden, n)[row] == pytest.approx(gain)
    assert oc.best_of_n(golden, golden, 6) == pytest.approx(golden.max(1) - golden.mean(1))


def test_accuracy_and_correlation_by_prompt():
    rng = np.random.default_rng(0)
    learnt, golden = rng.normal(size=(2, 3, 6))
    for row, (a, b) in enumerate(zip(learnt, golden)):
        pairs = itertools.combinations(range(6), 2)
        right = np.mean([(b[i] - b[j]) * (a[i] - a[j]) > 0 for i, j in pairs])
        assert oc.pair_accuracy(learnt, golden)[row] == pytest.approx(right)
        correlation = spearmanr(a, b).statistic
        assert oc.rank_correlation(learnt, golden)[row] == pytest.approx(correlation)
    assert oc.pair_accuracy(np.zeros((1, 3)), np.array([[1.0, 2, 3]])) == [0.0]
    assert np.isnan(oc.pair_accuracy(np.ones((1, 3)), np.ones((1, 3)))).all()
    assert oc.rank_correlation(np.ones((1, 3)), np.array([[1.0, 2, 3]])) == [0.0]
    assert np.isnan(oc.rank_correlation(np.ones((1, 3)), np.ones((1, 3))))


def test_the_sweep_is_paired_seeded_kept_and_put_into_words(kept, monkeypatch):
    bench = linear_bench(prompts=20)
    chosen = dict(reward_models=["bradley_terry", "classifier"], choices=["same", "cross"])
    chosen = settings(**chosen, betas=[0.5, np.inf], seeds=[0, 1, 2], best_of=[2, 8])
    found = oc.sweep(bench, chosen, kept)
    monkeypatch.setattr(oc, "fit", None)  # interrupted and started again, it fits nothing anew
    again = oc.sweep(bench, chosen, ResultCache(kept.path))
    pd.testing.assert_frame_equal(found, again)
    assert bench.fingerprint == linear_bench(prompts=20).fingerprint
    assert bench.fingerprint != linear_bench(prompts=21).fingerprint
    by_annotation = found.groupby(["pairs", "beta", "seed"])
    assert len(found) == 2 * 2 * 2 * 3 and by_annotation["label_accuracy"].nunique().eq(1).all()
    by_beta = found.groupby("beta")["spearman"].mean()
    assert by_beta[np.inf] > by_beta[0.5]
    differences = oc.against_bradley_terry(found, "gain_8")
    part = found.query("pairs == 'cross' and beta == 0.5")
    by_seed = part.pivot(index="seed", columns="learner", values="gain_8")
    wanted = (by_seed["classifier"] - by_seed["bradley_terry"]).mean()
    row = differences.query("pairs == 'cross' and beta == 0.5").iloc[0]
    assert row["difference"] == pytest.approx(wanted) and row["seeds"] == 3
    made = differences.assign(difference=[0.2, -0.2, 0.0, 0.0])
    made["ci_low"], made["ci_high"] = [0.1, -0.3, -0.1, -0.1], [0.3, -0.1, 0.1, 0.1]
    (sentence,) = oc.words(made)
    start = "**classifier** against Bradley-Terry, 4 combinations: clearly better in 1 ("
    assert sentence.startswith(start) and "clearly worse in 1 (" in sentence
    assert "over 3 seeds includes zero" in sentence
    assert "by chance alone about 0.2 would be clear" in sentence
    assert "one seed has no interval" in oc.words(made.assign(seeds=1))[0]
    alone = found[found["learner"] == "classifier"]
    assert oc.words(oc.against_bradley_terry(alone, "gain_8")) == []


def test_a_verdict_names_the_labels_of_its_own_combination(kept):
    """Across prompts that lie apart labels are right more often than within one."""
    bench = linear_bench(prompts=20, prompt_spread=3.0)
    chosen = dict(reward_models=["bradley_terry", "lightgbm"], choices=["same", "cross"])
    chosen = settings(**chosen, betas=[0.5], n_pairs=[60, 1200], seeds=[0, 1])
    found = oc.sweep(bench, chosen, kept)
    differences = oc.against_bradley_terry(found, "gain_2").set_index(["pairs", "amount"])
    for (how, amount), row in differences.iterrows():
        own = found[(found["pairs"] == how) & (found["amount"] == amount)]
        assert row["label_accuracy"] == pytest.approx(own["label_accuracy"].mean())
        assert row["distinct"] == own["distinct"].max()
    distinct = differences["distinct"]
    assert distinct["same"].to_dict() == {60: 60, 1200: 560}
    assert distinct["cross"].to_dict() == {60: 60, 1200: 1200}
    accuracy = differences.loc[("same", 1200), "label_accuracy"]
    assert differences.loc[("cross", 1200), "label_accuracy"] > accuracy + 0.05
    (sentence,) = oc.words(differences.reset_index().assign(ci_low=0.1))
    assert f"same pairs, 1200 of them (560 distinct), {accuracy:.0%} of labels correct" in sentence


def test_golden_rewards():
    rng = np.random.default_rng(0)
    golden = oc.in_units(oc.golden_network(rng.normal(size=(180, 10)), seed=0).reshape(30, 6))
    assert golden.var(1, ddof=1).mean() == pytest.approx(1.0)
    assert golden.mean() == pytest.approx(0.0)
    with pytest.raises(StudyError, match="golden reward: is constant or not finite"):
        oc.in_units(np.ones((3, 4)))
    one = oc.Annotated(np.ones((1, 3)), np.zeros((1, 3)), np.zeros((1, 2, 2), int), 1.0)
    with pytest.raises(StudyError, match="1 pairs are too few"):
        oc.fit("bradley_terry", one, seed=0)


def test_a_golden_rewards_unit_holds_for_few_answers():
    rng = np.random.default_rng(0)
    # Half of the variance lies between prompts.
    golden = 5 * (rng.normal(size=(4000, 3)) + rng.normal(size=(4000, 1)))
    units = oc.in_units(golden)
    _, right = oc.annotate(units, oc.choose_pairs(units, "same", 12000, rng), 1.0, rng)
    # 0.725; with the population's spread 0.755.
    assert right == pytest.approx(expected_share(2.0), abs=0.01)
    assert oc.prompts_share(golden) == pytest.approx(0.5, abs=0.03)
    assert oc.prompts_share(rng.normal(size=(4000, 3))) == pytest.approx(0.0, abs=0.02)


def test_embeddings_are_the_start_models_whatever_adapter_is_active(tiny, chat, tmp_path):
    """At the end token, which a cut-off answer is given; batched = one by one."""
    whole, cut = EncodedExample((5, 6, 7, 8, 2), 2), EncodedExample((5, 6, 7, 8), 2)
    long = EncodedExample((5, 6, 7, 8, 9, 10, 2), 3)

    @torch.no_grad()
    def last_state(model, text):
        ids = torch.tensor([text.input_ids])
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].numpy()

    wanted = [last_state(tiny.model, text) for text in (whole, whole, long)]
    sft, _ = write_adapters(tiny, tmp_path)
    model = models.load_adapters(tiny, {"sft": sft})
    adapted = last_state(model, whole)
    found = embeddings.embed(model, [whole, cut, long], chat, rows=3)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found[0] - adapted).max() > 1e-2
    rewards = embeddings.reward_fn(model, lambda e: e[:, 0], chat)([whole, long])
    np.testing.assert_array_equal(rewards, found[[0, 2], 0])
