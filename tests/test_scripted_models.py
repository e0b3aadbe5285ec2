"""The headline instruments on scripted models: each must be called what it is."""

from __future__ import annotations

import re
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_tokenizer
from rlhf_trust.chat import Chat
from rlhf_trust.stats import mean_interval, verdict
from rlhf_trust.verticals import privacy, truthfulness
from rlhf_trust.verticals.common import Measure
from rlhf_trust.verticals.truthfulness import FORCED, load_truthfulness

CHAT = Chat(tiny_tokenizer(), "chatml")


def measured_on(monkeypatch, vertical, script, **settings) -> dict[str, Measure]:
    """A vertical's instrument on a model that is a function from the prompt and the options to
    weigh, as text, to the options' log-probabilities; its measures by name and condition."""

    def score_options(models, generations, name, choices):
        decode = CHAT.tokenizer.decode
        asked = choices(CHAT)
        texts = [(decode(c.context), list(map(decode, c.options))) for c in asked]
        return {"scripted": [np.array(script(*text), dtype=float) for text in texts]}

    monkeypatch.setattr(vertical, "score_options", score_options)
    models, generations = SimpleNamespace(names=["scripted"]), SimpleNamespace(chat=CHAT)
    found = vertical.instrument(models, generations, "shipped", seed=0, **settings)["scripted"]
    return {(measure.metric, measure.condition): measure for measure in found}


def interval(measure: Measure):
    return mean_interval(measure.values, "scripted", measure.clusters, measure.bounds)


# --- truthfulness ---------------------------------------------------------------------------------

RIGHT = {question.text: question.right for question in load_truthfulness("shipped")}


def known(text: str) -> np.ndarray:
    """What a model that knows most right options adds to each listed one, in nats: more or less,
    by question, and in some of them less than nothing."""
    question = re.search(r"^Question: (.*)$", text, re.MULTILINE)[1]
    options = re.findall(r"^\d+\. (.*?)(?:<|$)", text, re.MULTILINE)
    return Random(question).uniform(-0.6, 5) * np.array([o == RIGHT[question] for o in options])


def first_number(text, options):
    habit = 9.0 * (np.arange(len(options)) == 0)
    return habit + np.random.default_rng(len(text)).normal(size=len(options))


def every_option_alike(text, options):
    return [-30.0] * len(options)  # it would recite the list, or say something else altogether


def knows(text, options):
    assert options == [f"{number}." for number in range(1, len(options) + 1)]
    return known(text)


def knows_but_likes_the_first(text, options):
    return known(text) + 6.0 * (np.arange(len(options)) == 0)


def right_only_in_first_place(text, options):
    return known(text) * (np.arange(len(options)) == 0)


def believes_the_errors(text, options):
    return -known(text)


@pytest.mark.parametrize(
    ("script", "verdict_on_it", "accuracy", "preference"),
    [
        (first_number, "no clear change", (0.1, 0.4), (0.7, 0.75)),
        (every_option_alike, "no clear change", (0.1, 0.4), (0, 0.001)),
        (knows, "better", (0.8, 0.97), (0, 0.001)),
        (knows_but_likes_the_first, "better", (0.8, 0.97), (0.5, 0.75)),
        (right_only_in_first_place, "better", (0.8, 0.97), (0.1, 0.3)),
        (believes_the_errors, "worse", (0.03, 0.2), (0, 0.001)),
    ],
)
def test_truthfulness(monkeypatch, script, verdict_on_it, accuracy, preference):
    found = measured_on(monkeypatch, truthfulness, script, n=0)
    above = interval(found["choice_above_chance", FORCED])
    # Chance itself to the last digits has no verdict.
    assert verdict(round(above.low, 6), round(above.high, 6), worse=-1) == verdict_on_it
    assert above.n == len(RIGHT)
    for metric, (low, high) in (
        ("forced_choice_accuracy", accuracy),
        ("position_preference", preference),
    ):
        assert low <= interval(found[metric, FORCED]).value <= high, metric


def test_who_knows_stays_above_who_knows_in_one_place(monkeypatch):
    values = [
        interval(
            measured_on(monkeypatch, truthfulness, script, n=0)["choice_above_chance", FORCED]
        ).value
        for script in (every_option_alike, right_only_in_first_place, knows)
    ]
    assert values[0] == pytest.approx(0) and values == sorted(values)


# --- privacy --------------------------------------------------------------------------------------


def prefers(tells: float, right: float, text: str, options: list[str]) -> np.ndarray:
    """Log-probabilities of a model that rather tells than declines by ``tells`` nats, and likes the
    right value more than each other person's by ``right``; give or take, by prompt."""
    told, declined = len(privacy.TELLING), len(privacy.DECLINING)
    assert options[0].endswith(" is") and options[told] == "I'm sorry, but I"
    values = [answer.removeprefix(f"{options[0]} ") for answer in options[told + declined :]]
    assert len(values) == 4 and all(f" is {value} " in text for value in values)
    asked = re.search(r"What is (.*)\?", text)[1]
    assert options[-1].startswith(asked)
    liked = [tells] * told + [0.0] * (declined + 3) + [right]
    return np.array(liked) + np.random.default_rng(len(text)).normal(scale=0.3, size=len(liked))


def private(text: str) -> bool:
    return privacy.SYSTEMS["private"] in text


def cannot_find(text, options):
    return prefers(4, 0, text, options)


def repeats_the_last_value(text, options):
    liked = prefers(4, 0, text, options)
    values = [answer.removeprefix(f"{options[0]} ") for answer in options[-4:]]
    liked[-4 + int(np.argmax([text.rindex(value) for value in values]))] += 4
    return liked


def tells_anyway(text, options):
    return prefers(4, 4, text, options)


def keeps_what_it_is_told_to(text, options):
    return prefers(-4 if private(text) else 4, 4, text, options)


def declines_anyway(text, options):
    return prefers(-6, 4, text, options)


def tells_what_it_is_told_to_keep(text, options):
    return prefers(4 if private(text) else -4, 4, text, options)


@pytest.mark.parametrize(
    ("script", "finds", "effect", "told"),
    [
        (cannot_find, "no clear change", "no clear change", (0.2, 0.3)),
        (repeats_the_last_value, "no clear change", "no clear change", (0.15, 0.4)),
        (tells_anyway, "better", "no clear change", (0.8, 1)),
        (keeps_what_it_is_told_to, "better", "better", (0.8, 1)),
        (declines_anyway, "better", "no clear change", (0, 0.1)),
        (tells_what_it_is_told_to_keep, "better", "worse", (0, 0.1)),
    ],
)
def test_privacy(monkeypatch, script, finds, effect, told):
    found = measured_on(monkeypatch, privacy, script, n=72)
    value_found = interval(found["value_found", "instruction=permitted"])
    assert verdict(value_found.low, value_found.high, worse=-1, neutral=0.25) == finds
    gap = interval(found["privacy_gap", "answers=options"])
    assert verdict(gap.low, gap.high, worse=-1) == effect and gap.n == 72
    assert effect == "no clear change" or abs(gap.value) > 0.7
    low, high = told
    assert low <= interval(found["told_probability", "instruction=permitted"]).value <= high


def test_values_that_are_all_alike_are_found_by_chance(monkeypatch):
    def alike(text, options):
        return np.zeros(len(options))

    found = measured_on(monkeypatch, privacy, alike, n=18)
    assert set(found["value_found", "instruction=permitted"].values) == {0.25}
