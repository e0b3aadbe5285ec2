"""Each stage's check: it holds when the interval says so, and says why when it does not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rlhf_trust.report import (
    dpo_check,
    reward_check,
    reward_rise_check,
    rise_at_equal_length,
    sft_check,
)

NOISE = np.random.default_rng(0).normal(size=80)


@pytest.mark.parametrize(("shift", "holds"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_sft_holds_when_the_loss_falls(shift, holds):
    (row,) = sft_check(3 + NOISE, 3 + NOISE + shift + 0.1 * NOISE[::-1]).itertuples()
    assert row.holds is holds and row.n == 80 and row.value == pytest.approx(shift, abs=0.1)
    assert ("no clear fall" in row.sentence) is not holds


def measured(accuracy: tuple, gap: tuple) -> pd.DataFrame:
    """Accuracies of 80 pairs, (value, low, high) of the reward model and of its lead over words."""
    rows = {
        "reward model": accuracy,
        "bag of words": (0.6, 0.5, 0.7),
        "length rule": (0.5, 0.4, 0.6),
        "reward model less words": gap,
        "reward model, length-controlled": (0.7, 0.6, 0.8),
    }
    columns = ["measure", "value", "ci_low", "ci_high", "n"]
    return pd.DataFrame([(name, *row, 80) for name, row in rows.items()], columns=columns)


@pytest.mark.parametrize(
    ("accuracy", "holds"),
    [((0.8, 0.7, 0.9), True), ((0.5, 0.4, 0.6), False), ((0.2, 0.1, 0.3), False)],
)
def test_reward_holds_above_chance(accuracy, holds):
    (row,) = reward_check(measured(accuracy, (0.2, 0.1, 0.3))).itertuples()
    assert row.holds is holds and row.value == accuracy[0] and row.n == 80


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (
            (0.02, -0.05, 0.09),
            "is not clearly better than the bag of words: the difference in points is +2.0",
        ),
        ((0.1, 0.05, 0.15), "is better than the bag of words: the difference in points is +10.0"),
        ((-0.1, -0.15, -0.05), "is worse than the bag of words: the difference in points is -10.0"),
    ],
)
def test_reward_is_held_against_words(gap, said):
    (sentence,) = reward_check(measured((0.62, 0.55, 0.69), gap))["sentence"]
    assert said in sentence and "A bag of words prefers it in 60.0%" in sentence


@pytest.mark.parametrize(("margin", "holds"), [(0.5, True), (0.0, False), (-0.5, False)])
def test_dpo_holds_above_zero(margin, holds):
    (row,) = dpo_check(margin + NOISE).itertuples()
    assert row.holds is holds
    assert ("carries over to held-out pairs" in row.sentence) is holds


def test_few_answers_get_no_verdict():
    few, rise = NOISE[:5] + 9, reward_rise_check("ppo", evaluations(9).head(5))
    for check in (dpo_check(few), sft_check(few, few - 9), rise):
        (row,) = check.itertuples()
        assert row.holds is False and "fewer than 8, no interval" in row.sentence
        assert row.sentence.endswith("Without an interval there is no verdict.")


def evaluations(rise, kl=3.0, **changed) -> pd.DataFrame:
    """Held-out prompts before and after; answers of equal length that end, unless changed."""
    columns = {"reward_before": NOISE, "reward_after": NOISE + rise + 0.2 * NOISE[::-1]}
    columns |= {"kl_after": kl, "tokens_before": 20, "tokens_after": 20}
    columns |= {"ended_before": True, "ended_after": True}
    return pd.DataFrame(columns | changed)


@pytest.mark.parametrize(
    ("rise", "kl", "holds", "said"),
    [
        (0.5, 3.0, True, "rises within 10 nats of SFT."),
        (0.5, 12.0, False, "not within 10 nats"),
        (0.0, 3.0, False, "No clear rise"),
        (-0.5, 3.0, False, "The reward falls"),
        (0.5, float("nan"), False, "not within 10 nats"),
    ],
)
def test_ppo_holds_when_reward_rises_nearby(rise, kl, holds, said):
    (row,) = reward_rise_check("ppo", evaluations(rise, kl)).itertuples()
    assert row.holds is holds and said in row.sentence


def test_a_rise_that_length_explains_is_called_so():
    shorter = np.random.default_rng(1).integers(0, 10, size=80)
    tokens = {"tokens_after": 20 - shorter}
    by_length = evaluations(0.1 * shorter, **tokens)
    assert by_length["reward_after"].mean() > by_length["reward_before"].mean() + 0.3
    (row,) = reward_rise_check("ppo", by_length).itertuples()
    assert row.holds is False and "Length can explain the rise: at equal length" in row.sentence
    assert (
        "changes from 20.0 tokens by -4" in row.sentence
        and f"{3 / (20 - shorter.mean()):.3f} a token" in row.sentence
    )
    (row,) = reward_rise_check("ppo", evaluations(0.5, **tokens)).itertuples()
    assert row.holds is True and "not by length alone: at equal length" in row.sentence
    ends = np.arange(80) % 2 == 0
    by_ending = evaluations(0.5 * ends, ended_before=False, ended_after=ends)
    assert "Length can explain the rise" in reward_rise_check("ppo", by_ending).loc[0, "sentence"]


def test_the_rise_at_equal_length_is_the_regressions_intercept():
    rng = np.random.default_rng(2)
    tokens, ended = rng.integers(-9, 3, size=200), rng.random(200) < 0.5
    rise = 0.3 - 0.05 * tokens + 0.4 * ended + 0.1 * rng.normal(size=200)
    table = pd.DataFrame({"reward_before": 0.0, "reward_after": rise, "tokens_before": 20})
    table = table.assign(tokens_after=20 + tokens, ended_before=False, ended_after=ended)
    found = rise_at_equal_length(table)
    assert found.low < 0.3 < found.high and found.high - found.low < 0.15 and found.n == 200
    same_change = table.assign(tokens_after=15, ended_after=False)
    assert rise_at_equal_length(same_change).n == 0
