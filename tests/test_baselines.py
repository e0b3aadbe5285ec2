"""Baselines of the reward model: words and length, learnt from training pairs alone."""

from __future__ import annotations

import numpy as np
import pytest
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.rewards import baselines


def pair(chosen: str, rejected: str, source: str = "helpful") -> PreferencePair:
    return PreferencePair("id", ("a question",), chosen, rejected, source)


def test_words_are_learnt_from_the_training_pairs_and_a_tie_is_a_coin():
    train = [pair("gladly done", "rudely done"), pair("done gladly", "rudely told")] * 5
    held_out = [pair("gladly", "rudely"), pair("rudely", "gladly"), pair("unseen", "words")]
    np.testing.assert_array_equal(baselines.bag_of_words(train, held_out), [1, 0, 0.5])


def test_the_length_rule_is_that_of_its_source(chat):
    long, short = "a rather long answer", "short"
    train = [pair(long, short)] * 3 + [pair(short, long)] + [pair(short, long, "harmless")] * 2
    held_out = [pair(long, short), pair(short, long), pair(long, long)]
    held_out += [pair(long, short, "harmless"), pair(short, long, "harmless")]
    right = baselines.length_rule(train, held_out, chat)
    np.testing.assert_array_equal(right, [1, 0, 0.5, 0, 1])
    # A source without training pairs has the rule of all of them.
    elsewhere = [pair(long, short, "other"), pair(short, long, "other")]
    shorter = train + [pair(short, long)]
    np.testing.assert_array_equal(baselines.length_rule(shorter, elsewhere, chat), [0, 1])


def test_length_controlled_accuracy_gives_a_rule_of_length_one_half(chat):
    long, short = "a rather long answer", "short"
    held_out = [pair(long, short)] * 30 + [pair(short, long)] * 10
    held_out += [pair(long, short, "harmless")] * 5 + [pair(short, long, "harmless")] * 35
    by_length = baselines.length_rule(held_out, held_out, chat)
    assert by_length.mean() > 0.8
    found = baselines.length_controlled(by_length, held_out, chat)
    assert found.value == pytest.approx(0.5) and found.n == 80
    perfect = baselines.length_controlled(np.ones(80), held_out, chat)
    assert perfect.value == 1.0 and perfect.low < 1.0
    assert baselines.length_controlled(np.ones(30), held_out[:30], chat).n == 0


def test_accuracies_are_paired_with_words(chat):
    train = [pair("gladly done", "rudely done"), pair("done gladly", "rudely told")] * 5
    held_out = [pair("gladly", "rudely"), pair("rudely", "gladly")] * 10
    rewards = np.array([[1.0, 0.0]] * 15 + [[0.0, 0.0]] * 5)
    found = baselines.accuracies(rewards, train, held_out, chat).set_index("measure")
    assert found.loc["reward model", "value"] == 0.75  # a tie is wrong
    assert found.loc["bag of words", "value"] == 0.5
    gap = found.loc["reward model less words"]
    assert gap["value"] == pytest.approx(0.25) and gap["ci_low"] < 0.25 < gap["ci_high"]
