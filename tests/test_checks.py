"""Each stage's check: it holds when the interval says so, and says why when it does not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rlhf_trust.report import dpo_check, reward_check, reward_rise_check, sft_check

NOISE = np.random.default_rng(0).normal(size=80)


@pytest.mark.parametrize(("shift", "holds"), [(-1.0, True), (0.0, False), (1.0, False)])
def test_sft_holds_when_the_loss_falls(shift, holds):
    (row,) = sft_check(3 + NOISE, 3 + NOISE + shift + 0.1 * NOISE[::-1]).itertuples()
    assert row.holds is holds and row.n == 80 and row.value == pytest.approx(shift, abs=0.1)
    assert ("no clear fall" in row.sentence) is not holds


@pytest.mark.parametrize(("right", "holds"), [(0.8, True), (0.5, False), (0.2, False)])
def test_reward_holds_above_chance(right, holds):
    wins = np.arange(80) < 80 * right
    (row,) = reward_check(np.stack([wins, ~wins], 1).astype(float)).itertuples()
    assert row.holds is holds and row.value == pytest.approx(right)


@pytest.mark.parametrize(("margin", "holds"), [(0.5, True), (0.0, False), (-0.5, False)])
def test_dpo_holds_above_zero_and_says_what_could_have_been_detected(margin, holds):
    (row,) = dpo_check(margin + NOISE).itertuples()
    assert row.holds is holds
    # 80 % power at the 5 % level: 2.8016 standard errors.
    assert (
        f"detect a mean margin of {2.8016 * NOISE.std(ddof=1) / np.sqrt(80):.3f}" in row.sentence
    ) is not holds


@pytest.mark.parametrize(
    ("rise", "kl", "holds", "said"),
    [
        (0.5, 3.0, True, "rises within 10 nats"),
        (0.5, 12.0, False, "not within 10 nats"),
        (0.0, 3.0, False, "No clear rise"),
        (-0.5, 3.0, False, "The reward falls"),
        (0.5, float("nan"), False, "not within 10 nats"),
    ],
)
def test_ppo_holds_when_reward_rises_nearby(rise, kl, holds, said):
    table = pd.DataFrame(
        {"reward_before": NOISE, "reward_after": NOISE + rise + 0.2 * NOISE[::-1], "kl_after": kl}
    )
    (row,) = reward_rise_check("ppo", table).itertuples()
    assert row.holds is holds and said in row.sentence
