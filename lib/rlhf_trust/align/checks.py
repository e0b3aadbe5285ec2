"""Did training do what it is for? One row a stage, with its interval and a sentence made from the numbers."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..stats import mean_interval, paired_change


def sft_check(before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """Held-out loss a token, per pair, before and after: it should fall."""
    change = paired_change(after, before, "sft/held-out loss")
    holds = change.high < 0
    sentence = (f"SFT changes the held-out loss from {before.mean():.3f} to {after.mean():.3f} nats a token "
                f"({change.value:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}, n = {change.n} answers): "
                + ("it learned the preferred answers' way of speaking beyond the examples it saw." if holds else
                   "that is no clear fall. More examples, more passes or a larger step would be needed, or the start "
                   "model already speaks this way."))
    return _row("sft", "held-out loss falls", holds, change.value, change.low, change.high, change.n, sentence)


def reward_check(rewards: np.ndarray) -> pd.DataFrame:
    """Held-out accuracy from rewards of (chosen, rejected) [pairs, 2]: its interval should lie above one half."""
    accuracy = mean_interval((rewards[:, 0] > rewards[:, 1]).astype(float))
    holds = accuracy.low > 0.5
    sentence = (f"On {accuracy.n} held-out pairs the reward model prefers the chosen answer in {accuracy.value:.1%} "
                f"(95 % interval {accuracy.low:.1%} to {accuracy.high:.1%}): "
                + ("better than chance." if holds else
                   "the interval reaches down to chance, so PPO below climbs a reward that may say little about "
                   "people's preferences. With this model, accuracy grows slowly with the number of pairs."))
    return _row("reward", "held-out accuracy above chance", holds, accuracy.value, accuracy.low, accuracy.high, accuracy.n,
                sentence)


def dpo_check(margins: np.ndarray) -> pd.DataFrame:
    """Held-out implicit reward margins [pairs]; they start at exactly 0, since policy and reference are the same."""
    margin = mean_interval(margins, "dpo/margin")
    accuracy = float((margins > 0).mean())
    holds = margin.low > 0
    sentence = (f"DPO raises the held-out margin from 0 to {margin.value:+.3f} (95 % interval {margin.low:+.3f} to "
                f"{margin.high:+.3f}, n = {margin.n} pairs), with {accuracy:.1%} of pairs on the right side: "
                if margin.value > 0 else
                f"DPO moves the held-out margin from 0 to {margin.value:+.3f} (95 % interval {margin.low:+.3f} to "
                f"{margin.high:+.3f}, n = {margin.n} pairs): ")
    sentence += ("what it learned from the training pairs carries over." if holds else
                 f"the interval holds zero. With margins as widely spread as these (standard deviation {margins.std():.2f}) so many "
                 f"pairs would show a mean of {_detectable(margins):.3f} four times in five; what so few training pairs taught this "
                 "model about other people's choices is less than that. 02-reward's held-out accuracy says how much of them a "
                 "model of this size learns at all.")
    return _row("dpo", "held-out margin rises", holds, margin.value, margin.low, margin.high, margin.n, sentence)


def _detectable(values: np.ndarray) -> float:
    """The mean that would be told from zero four times in five, with so many values of this spread."""
    return paired_change(values, np.zeros_like(values)).min_detectable


def reward_rise_check(stage: str, held_out: pd.DataFrame, max_kl: float = 10.0) -> pd.DataFrame:
    """PPO's and INPO's held-out reward before and after (paired by prompt): it should rise at a KL of at most ``max_kl``
    nats."""
    change = paired_change(held_out["reward_after"], held_out["reward_before"], f"{stage}/held-out reward")
    kl = float(held_out["kl_after"].mean())
    holds = change.n > 1 and change.low > 0 and kl <= max_kl
    sentence = (f"{stage.upper()} changes the reward of answers to {change.n} held-out prompts by {change.value:+.3f} (95 % interval "
                f"{change.low:+.3f} to {change.high:+.3f}) at a KL to SFT of {kl:.2f} nats an answer: "
                + ("it climbs the reward without going far." if holds else
                   f"it went further than {max_kl:g} nats from SFT." if not kl <= max_kl else
                   "the reward fell. Look at the curves for the step from which on it did, and lower the learning rate." if change.high < 0 else
                   f"no clear rise. So many prompts would show one of {change.min_detectable:.3f} four times in five; more steps, "
                   "larger ones or less weight on the KL would be needed, or a reward model that tells answers apart more clearly."))
    return _row(stage, f"held-out reward rises within {max_kl:g} nats", holds, change.value, change.low, change.high, change.n,
                sentence)


def _row(stage, check, holds, value, low, high, n, sentence) -> pd.DataFrame:
    return pd.DataFrame([{"stage": stage, "check": check, "holds": bool(holds), "value": value, "ci_low": low,
                          "ci_high": high, "n": n, "sentence": sentence}])
