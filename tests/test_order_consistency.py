"""Order consistency: annotation as its integral says, learners on a known truth, best-of-n against drawing."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from test_ppo import write_adapters

from rlhf_trust import StudyError, models
from rlhf_trust.artifacts import Kept
from rlhf_trust.chat import Sequence
from rlhf_trust.rewards import embeddings, order_consistency as oc

QUICK = oc.Network(hidden=(32,), epochs=15, batch=128, learning_rate=3e-3)


def linear_bench(prompts=60, answers=8, d=12, prompt_spread=1.0, seed=0):
    """Embeddings with a part that a prompt's answers share; the golden reward is linear in them."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=d) / d**0.5

    def draw(n):
        embeddings = rng.normal(size=(n, answers, d)) + prompt_spread * rng.normal(size=(n, 1, d))
        return embeddings, oc.in_units(embeddings @ direction)

    return oc.Bench(*draw(prompts), *draw(prompts))


@pytest.mark.parametrize(("variance", "quality"), [(1, 0.67486), (2, 0.72521), (4, 0.77799), (8, 0.82801), (10, 0.84280), (20, 0.88333)])
def test_annotation_quality(variance, quality):
    assert oc.annotation_quality(variance) == pytest.approx(quality, abs=1e-5)


def test_labels_are_right_as_often_as_the_integral_says():
    rng = np.random.default_rng(0)
    golden = rng.normal(size=(200, 8))
    pairs = oc.choose_pairs(golden, "same", 20000, rng)
    beta = 1.5
    annotated, right = oc.annotate(golden, pairs, beta, rng)
    assert right == pytest.approx(oc.annotation_quality(beta**2 * 2), abs=0.01)
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
    with pytest.raises(StudyError, match="pair choice: must be one of"):
        oc.choose_pairs(golden, "other", 5, rng)
    with pytest.raises(StudyError, match="1 prompts with 8 answers each have no such pair"):
        oc.choose_pairs(golden[:1], "cross", 5, rng)


@pytest.mark.parametrize("learner", list(oc.LEARNERS))
def test_a_linear_truth_without_noise_is_learnt(learner):
    found = oc.sweep(linear_bench(), [learner], ["same"], [np.inf], [3000], [0], [4], QUICK)
    assert found.loc[0, "spearman"] > {"bradley_terry": 0.9, "classifier": 0.8, "lightgbm": 0.7}[learner]
    assert found.loc[0, "pair_accuracy"] > 0.75 and found.loc[0, "gain_4"] > 0.7  # the best possible is 1.03


def test_a_prompts_own_level_moves_the_classifier_alone():
    rng = np.random.default_rng(0)
    won, lost, level = (torch.tensor(rng.normal(size=50)) for _ in range(3))
    assert float(oc.bradley_terry(won + level, lost + level)) == pytest.approx(float(oc.bradley_terry(won, lost)))
    assert abs(float(oc.classification(won + level, lost + level)) - float(oc.classification(won, lost))) > 0.01


def test_best_of_n_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    learnt, golden = rng.normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        for row in range(3):
            drawn = [golden[row, max(picked, key=lambda i: learnt[row, i])] for picked in itertools.combinations(range(6), n)]
            assert oc.best_of_n(learnt, golden, n)[row] == pytest.approx(np.mean(drawn) - golden[row].mean())
    assert oc.best_of_n(golden, golden, 6) == pytest.approx(golden.max(1) - golden.mean(1))
    with pytest.raises(StudyError, match="n = 7 of 6"):
        oc.best_of_n(learnt, golden, 7)


def test_accuracy_and_correlation_by_prompt():
    rng = np.random.default_rng(0)
    learnt, golden = rng.normal(size=(2, 3, 6))
    for row in range(3):
        pairs = list(itertools.combinations(range(6), 2))
        right = np.mean([(golden[row, i] - golden[row, j]) * (learnt[row, i] - learnt[row, j]) > 0 for i, j in pairs])
        assert oc.pair_accuracy(learnt, golden)[row] == pytest.approx(right)
        assert oc.rank_correlation(learnt, golden)[row] == pytest.approx(spearmanr(learnt[row], golden[row]).statistic)
    assert oc.pair_accuracy(np.zeros((1, 3)), np.array([[1.0, 2, 3]])) == [0.0]
    assert np.isnan(oc.pair_accuracy(np.ones((1, 3)), np.ones((1, 3)))).all()
    assert oc.rank_correlation(np.ones((1, 3)), np.array([[1.0, 2, 3]])) == [0.0] and np.isnan(oc.rank_correlation(np.ones((1, 3)), np.ones((1, 3))))


def test_the_sweep_is_paired_seeded_kept_and_put_into_words(tmp_path, monkeypatch):
    bench = linear_bench(prompts=20)
    settings = (["bradley_terry", "classifier"], ["same", "cross"], [0.5, np.inf], [200], [0, 1, 2], [2, 8], QUICK)
    found = oc.sweep(bench, *settings)
    kept = Kept(tmp_path / f"sweep.{bench.fingerprint}.jsonl")
    pd.testing.assert_frame_equal(found, oc.sweep(bench, *settings, kept=kept))
    monkeypatch.setattr(oc, "LEARNERS", {})  # interrupted and started again, it learns nothing anew
    pd.testing.assert_frame_equal(found, oc.sweep(bench, *settings, kept=Kept(kept.path)))
    assert linear_bench(prompts=21).fingerprint != bench.fingerprint == linear_bench(prompts=20).fingerprint
    assert len(found) == 2 * 2 * 2 * 3 and found.groupby(["pairs", "beta", "seed"])["label_accuracy"].nunique().eq(1).all()
    assert found[found["beta"] == np.inf]["spearman"].mean() > found[found["beta"] == 0.5]["spearman"].mean()
    differences = oc.against_bradley_terry(found, "gain_8")
    part = found[(found["pairs"] == "cross") & (found["beta"] == 0.5)].pivot(index="seed", columns="learner", values="gain_8")
    row = differences[(differences["pairs"] == "cross") & (differences["beta"] == 0.5)].iloc[0]
    assert row["difference"] == pytest.approx((part["classifier"] - part["bradley_terry"]).mean()) and row["seeds"] == 3
    made = differences.assign(difference=[0.2, -0.2, 0.0, 0.0], ci_low=[0.1, -0.3, -0.1, -0.1], ci_high=[0.3, -0.1, 0.1, 0.1])
    (sentence,) = oc.words(made, {0.5: 0.62, np.inf: 1.0})
    assert sentence.startswith("**classifier** against Bradley-Terry, 4 combinations: clearly better in 1 (") and "clearly worse in 1 (" in sentence


def test_golden_rewards():
    rng = np.random.default_rng(0)
    golden = oc.in_units(oc.golden_network(rng.normal(size=(180, 10)), seed=0).reshape(30, 6))
    assert golden.var(1).mean() == pytest.approx(1.0) and golden.mean() == pytest.approx(0.0)
    with pytest.raises(StudyError, match="golden reward: is constant or not finite"):
        oc.in_units(np.ones((3, 4)))
    with pytest.raises(StudyError, match="1 pairs are too few"):
        oc.fit_network(np.ones((1, 3)), np.zeros((1, 3)), oc.bradley_terry, QUICK, 0)


def test_embeddings_are_the_start_models_whatever_adapter_is_active(tiny, chat, tmp_path):
    """At the end token, which a cut-off answer is given; batched = one by one."""
    whole, cut, long = Sequence((5, 6, 7, 8, 2), 2), Sequence((5, 6, 7, 8), 2), Sequence((5, 6, 7, 8, 9, 10, 2), 3)
    with torch.no_grad():
        wanted = [tiny.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
                  for ids in (whole.input_ids, whole.input_ids, long.input_ids)]
    sft, _ = write_adapters(tiny, tmp_path)
    model = models.load_adapters(tiny, {"sft": sft})
    with torch.no_grad():
        adapted = model(input_ids=torch.tensor([whole.input_ids]), output_hidden_states=True).hidden_states[-1][0, -1].numpy()
    found = embeddings.embed(model, [whole, cut, long], chat, rows=3)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found[0] - adapted).max() > 1e-2
    np.testing.assert_array_equal(embeddings.judge(model, lambda e: e[:, 0], chat)([whole, long]), found[[0, 2], 0])
