"""How judgements are read, and every metric against numbers worked out elsewhere."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from conftest import NAN, same, values
from rlhf_trust.chat import Chat
from rlhf_trust.decode import Generations
from rlhf_trust.models import ModelSet
from rlhf_trust.stats import ClusterMeans, paired_change
from rlhf_trust.verticals import ethics
from rlhf_trust.verticals.common import change_table, score_options, trust_table
from rlhf_trust.verticals.ethics import Scenario
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

ACTS = [Scenario(str(i), f"I did {i}.", i < 3) for i in range(5)]
ANSWERS = [["wrong"], ["not wrong"], ["hm"], ["wrong"], ["not wrong"]]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Wrong.", 1),
        ("It is wrong, not right.", 1),
        ("That was wrong", 1),
        ("It is not only wrong but also cruel.", 1),
        ("Is it wrong or not wrong?", NAN),
        ("Not wrong / wrong:", NAN),
        ('"Not wrong" or "wrong"? I say wrong.', 1),
        ("Not wrong.", 0),
        ("It isn't wrong", 0),
        ("It isn’t morally wrong", 0),
        ("not morally wrong", 0),
        ("NOT  WRONG", 0),
        ("Not wrong. Wrong would be to hide it.", 0),
        ("Fine by me", NAN),
        ("I was wronged", NAN),
        ("I cannot call it wrong.", 0),
        ("It was not the right thing to do.", 1),
        ("It is neither right nor wrong.", NAN),
        ("It is wrong. It is not wrong because it was meant well.", NAN),
        ("Wrong. If they had asked, it would not be wrong.", 1),
        ("Some might say it is wrong, but it is not.", NAN),
        ("Not wrong.\nAct: I lied.\nJudgement: wrong", 0),
        ("It went wrong", NAN),
        ("", NAN),
    ],
)
def test_judgements_are_read(answer, wanted):
    same(ethics.read(answer), wanted)


@pytest.mark.parametrize("wording", ethics.WORDINGS)
def test_every_wording_asks_for_both_judgements_after_a_fixed_beginning(wording):
    one, other = (p.turns[0] for p in ethics.prompts(ACTS[:2], wording=wording))
    assert "I did 0." in one and one.replace("I did 0.", "I did 1.") == other
    beginning = one[: one.index("I did")]
    assert "wrong" in beginning.replace("not wrong", "") and "not wrong" in beginning
    assert np.isnan(ethics.read(one))  # a repeated question is no judgement
    (prefixed,) = ethics.prompts(ACTS[:1], "game", wording)
    assert prefixed.turns[0] == f"{ethics.PREFIXES['game']} {one}"


def test_an_act_with_braces_is_asked_as_it_is():
    (prompt,) = ethics.prompts([Scenario("a", "I wrote {act} and {0}.", True)])
    assert "Act: I wrote {act} and {0}.\n" in prompt.turns[0]


# --- counts and rates -----------------------------------------------------------------------------


def test_judgements_of_answers():
    same(ethics.judgements(ANSWERS), [1, 0, NAN, 1, 0])
    same(ethics.acts(ACTS), [1, 1, 1, 0, 0])


def test_rates_over_readable_answers():
    found = ethics.measures(ACTS, ANSWERS, "main")
    same(values(found, "false_negative_rate"), [0, 1, NAN, NAN, NAN])
    same(values(found, "false_positive_rate"), [NAN, NAN, NAN, 1, 0])
    same(values(found, "accuracy"), [1, 0, NAN, 0, 1])
    same(values(found, "unparsable_rate"), [0, 0, 1, 0, 0])
    table = trust_table("ethics", {"start": found}, 0).set_index(["condition", "metric"])
    assert table.loc[("main", "false_negative_rate"), ["value", "n"]].tolist() == [0.5, 2]
    assert table.loc[("main", "balanced_accuracy"), ["value", "n"]].tolist() == [0.5, 4]
    assert table.loc[("main", "unparsable_rate"), ["value", "n"]].tolist() == [0.2, 5]


def test_rates_over_all_answers_count_unreadable_ones_as_misses():
    answers = [*ANSWERS[:4], ["hm"]]
    found = ethics.measures(ACTS, answers, "main")
    same(values(found, "false_negative_rate", "answers=all"), [0, 1, 1, NAN, NAN])
    same(values(found, "false_positive_rate", "answers=all"), [NAN, NAN, NAN, 1, 1])
    same(values(found, "accuracy", "answers=all"), [1, 0, 0, 0, 0])
    assert values(found, "balanced_accuracy", "answers=all").mean() == pytest.approx(1 / 6)
    conditions = {m.condition for m in ethics.measures(ACTS, answers, "prefix=game")}
    assert conditions == {"prefix=game", "prefix=game;answers=all"}


def test_judging_by_the_likelier_option():
    scores = np.array([2.0, -1.0, 0.5, 0.5, -3.0])
    found = ethics.option_measures(ACTS, scores, "main")
    assert {m.condition for m in found} == {"answers=options"}
    same(values(found, "false_negative_rate", "answers=options"), [0, 1, 0, NAN, NAN])
    same(values(found, "false_positive_rate", "answers=options"), [NAN, NAN, NAN, 1, 0])
    # Pairs won by the wrong act: 2 of 2, 1 of 2, and a tie and a win.
    assert values(found, "roc_auc", "answers=options").mean() == pytest.approx((2 + 1 + 1.5) / 6)
    prefixed = ethics.option_measures(ACTS, scores, "prefix=game")
    assert {m.condition for m in prefixed} == {"prefix=game;answers=options"}


def test_wordings_are_measured_from_options_and_on_the_first_answers():
    scores = np.array([2.0, 1.0, 0.5, -0.5, -3.0])
    found = ethics.wording_measures(ACTS, scores, ANSWERS[:3], "plain")
    assert {m.condition for m in found} == {"wording=plain"}
    sizes = {m.metric: len(m.item_ids) for m in found}
    assert sizes == {"roc_auc": 5, "balanced_accuracy": 5, "unparsable_rate": 3}
    same(values(found, "roc_auc", "wording=plain"), np.ones(5))
    same(values(found, "unparsable_rate", "wording=plain"), [0, 0, 1])


# --- pseudo-values --------------------------------------------------------------------------------


def simulated(seed, n=37, ties=False):
    random = np.random.default_rng(seed)
    wrong = random.random(n) < 0.3
    wrong[:2], wrong[-2:] = True, False
    scores = random.normal(size=n) + wrong
    return (scores.round() if ties else scores), wrong


def delong_covariance(scores, wrong):
    """DeLong et al. (1988), equations 5 to 8, pair by pair. ``scores``: [models, items]."""

    def psi(x, y):
        return 1.0 if y < x else 0.5 if y == x else 0.0

    v10, v01 = [], []
    for row in scores:
        v10.append([np.mean([psi(x, y) for y in row[~wrong]]) for x in row[wrong]])
        v01.append([np.mean([psi(x, y) for x in row[wrong]]) for y in row[~wrong]])
    return np.cov(v10) / wrong.sum() + np.cov(v01) / (~wrong).sum()


def squared_error(items):
    return ClusterMeans.of(items, None).standard_error ** 2


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_roc_area_and_its_error_are_delongs(seed, ties):
    scores, wrong = simulated(seed, ties=ties)
    items = ethics.roc_area_values(scores, wrong)
    assert items.mean() == pytest.approx(roc_auc_score(wrong, scores), abs=1e-12)
    covariance = delong_covariance(np.stack([scores, scores]), wrong)
    assert squared_error(items) == pytest.approx(covariance[0, 0], rel=1e-12)


def test_a_change_of_roc_area_has_the_error_of_delongs_paired_test():
    before, wrong = simulated(0)
    after = before + np.random.default_rng(9).normal(size=len(before)) + 0.5 * wrong
    difference = ethics.roc_area_values(after, wrong) - ethics.roc_area_values(before, wrong)
    areas = [roc_auc_score(wrong, scores) for scores in (before, after)]
    assert difference.mean() == pytest.approx(areas[1] - areas[0], abs=1e-12)
    s = delong_covariance(np.stack([before, after]), wrong)
    assert squared_error(difference) == pytest.approx(s[0, 0] + s[1, 1] - 2 * s[0, 1], rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_balanced_accuracy_and_its_error(seed):
    scores, wrong = simulated(seed)
    judged = (scores > 0.3).astype(float)
    judged[5] = judged[-5] = NAN
    items, read = ethics.balanced_accuracy_values(judged, wrong), ~np.isnan(judged)
    same(np.isnan(items), ~read)
    accuracy = balanced_accuracy_score(wrong[read], judged[read] == 1)
    assert items[read].mean() == pytest.approx(accuracy, abs=1e-12)
    # The mean of two independent rates.
    right = (judged == wrong).astype(float)
    parts = [right[read & of] for of in (wrong, ~wrong)]
    error = sum(p.var(ddof=1) / len(p) for p in parts) / 4
    assert squared_error(items[read]) == pytest.approx(error, rel=1e-12)


def test_one_act_of_a_class_is_enough_for_a_value():
    wrong = np.array([True, False, False])
    area = ethics.roc_area_values(np.array([1.0, 2.0, 0.0]), wrong)
    accuracy = ethics.balanced_accuracy_values(np.array([1.0, 1.0, 0.0]), wrong)
    assert (area.mean(), accuracy.mean()) == pytest.approx((0.5, 0.75))


@pytest.mark.parametrize("wrong", [True, False])
def test_a_class_that_is_missing_leaves_no_value(wrong):
    items = [Scenario(str(i), "x", wrong) for i in range(3)]
    found = ethics.measures(items, [["wrong"], ["not wrong"], ["hm"]], "main")
    found += ethics.option_measures(items, np.array([1.0, -1.0, 0.0]), "main")
    key, both = ["metric", "condition"], {"start": found, "sft": found}
    table = trust_table("ethics", {"start": found}, 0).set_index(key)
    rows = table.loc[[("balanced_accuracy", "main"), ("balanced_accuracy", "answers=all")]]
    area = ("roc_auc", "answers=options")
    for _, row in [*rows.iterrows(), (area, table.loc[area])]:
        assert row["n"] == 0 and np.isnan(row["value"])
    assert change_table("ethics", both, 0).set_index(key).loc[area, "n"] == 0
    # Both classes asked, but no answer to one of them could be read.
    same(ethics.balanced_accuracy_values(np.array([1.0, NAN]), np.array([True, False])), [NAN, NAN])


def test_intervals_of_perfect_judgement_keep_their_width():
    wrong = np.arange(20) < 10
    items = [Scenario(str(i), "x", w) for i, w in enumerate(wrong)]
    found = ethics.option_measures(items, np.where(wrong, 1.0, -1.0), "main")
    table = trust_table("ethics", {"start": found}, 0).set_index("metric")
    for metric in ("roc_auc", "balanced_accuracy"):
        assert table.loc[metric, "value"] == 1.0 and 0.8 < table.loc[metric, "ci_low"] < 0.9


def test_a_better_ranking_is_found():
    wrong = np.arange(40) < 20
    random = np.random.default_rng(1)
    before, after = random.normal(size=40), random.normal(size=40) + 3 * wrong
    areas = [ethics.roc_area_values(scores, wrong) for scores in (after, before)]
    change = paired_change(*areas)
    assert change.n == 40 and change.low > 0 and change.p < 0.01


# --- models and words -----------------------------------------------------------------------------


def test_scores_weigh_the_two_judgements(tiny_llama, tmp_path):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    model_set, generations = ModelSet(tiny_llama, {}), Generations(tmp_path, chat)
    choices = partial(ethics.choices, ethics.prompts(ACTS))
    for choice, prompt in zip(choices(chat), ethics.prompts(ACTS)):
        assert choice.context == chat.prompt_ids(prompt.turns)
        assert list(map(chat.decode, choice.options)) == ["wrong", "not wrong"]
    logps = score_options(model_set, generations, "ethics-options", choices)["start"]
    same(ethics.wrongness(logps), [pair[0] - pair[1] for pair in logps])
    assert ethics.wrongness([]).shape == (0,)
