"""Models that follow a script: do the stereotype and ethics chapters call each what it is?

A script says what a model finds likely; everything above the network runs as in the study.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import values
from rlhf_trust.chat import Chat
from rlhf_trust.verticals import HEADLINE, contrast, ethics, stereotype
from rlhf_trust.verticals.common import change_table, trust_table

PAIRS = (*stereotype.CONTEXTS, *ethics.PAIRS)
SIDES = {text: side for pair in PAIRS for text, side in zip(pair, (0.5, -0.5))}
"""What is weighed beside a text: +1/2 where it goes with a true statement or a wrong act."""

STATEMENTS = [item for item in stereotype.load_stereotype("shipped") if item.clause]
KNOWN = {item.clause: ("statement", item.stereotyped) for item in STATEMENTS}
KNOWN |= {item.clause: ("fact", item.acceptable) for item in stereotype.load_consensus()}
GROUPS = {item.group for item in STATEMENTS}
KNOWN |= {item.clause: ("harmless", None) for item in stereotype.load_harmless(sorted(GROUPS))}
KNOWN |= {item.text: ("act", item.wrong) for item in ethics.load_ethics("shipped")}

SCRIPTS = {  # (kind of text, is it a usual target, a fact, a wrong act) -> nats by which it is held
    "agrees": lambda kind, holds: 4.0,
    "contradicts": lambda kind, holds: 0.0,
    "random": lambda kind, holds: 0.0,
    "honest": lambda kind, holds: 0.0 if kind == "statement" else 4.0 if holds else -4.0,
    "prejudiced": lambda kind, holds: 4.0 if holds else -4.0,
}


def logp(model: str, before: str, after: str) -> float:
    """log p(after | before): what the script holds, and noise that depends on the text."""
    text, side = (after, SIDES[before]) if before in SIDES else (before, SIDES[after])
    if model == "contradicts":  # says that it is so and that it is not, each as readily
        return 0.0
    noise = np.random.default_rng(list(f"{model} {before} {after}".encode())).normal()
    return side * SCRIPTS[model](*KNOWN[text]) + noise


@pytest.fixture
def instrument(tiny_llama, monkeypatch):
    """A vertical's instrument on all scripted models: their measures, and its table."""
    tokenizer = tiny_llama.tokenizer
    chat = Chat(tokenizer, "dialogue")

    def decode(ids) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True).strip()

    def scripted(models, generations, name, choices):
        asked = choices(chat)
        texts = [(decode(c.context), list(map(decode, c.options))) for c in asked]
        return {
            m: [
                np.array([logp(m, before, after) for after in options]) for before, options in texts
            ]
            for m in models.names
        }

    def measure(vertical, n):
        monkeypatch.setattr(contrast, "score_options", scripted)
        models = SimpleNamespace(names=list(SCRIPTS))
        return vertical.instrument(models, SimpleNamespace(chat=chat), "shipped", n, 0)

    return measure


def rows(vertical: str, measures, metric: str, condition: str):
    """The measure's row of ``trust.csv`` by model."""
    table = trust_table(vertical, measures, 0).query(
        "metric == @metric and condition == @condition"
    )
    return table.set_index("model")


def test_stereotype_calls_each_model_what_it_is(instrument):
    headline, measures = HEADLINE["stereotype"], instrument(stereotype, 144)
    valid = rows("stereotype", measures, *headline.validity)["ci_low"] > headline.chance
    assert list(valid.index[valid]) == ["honest", "prejudiced"]
    bias = rows("stereotype", measures, headline.metric, headline.condition)
    assert (bias["n"] == bias["n"].iloc[0]).all() and bias["n"].iloc[0] > 20
    above = bias["ci_low"] > 0
    assert list(above.index[above]) == ["prejudiced"] and (bias["ci_high"] >= 0).all()
    by_name = rows("stereotype", measures, headline.metric, "statements=harmless")
    assert ((by_name["ci_low"] <= 0) & (by_name["ci_high"] >= 0)).all()


def test_ethics_calls_each_model_what_it_is(instrument):
    headline, measures = HEADLINE["ethics"], instrument(ethics, 0)
    area = rows("ethics", measures, headline.metric, headline.condition)
    above = area["ci_low"] > headline.chance
    assert list(above.index[above]) == ["honest", "prejudiced"] and (area["n"] == 72).all()
    assert area.loc["contradicts", "value"] == pytest.approx(0.5)
    assert (area["ci_high"] >= headline.chance).all()


def test_a_bias_that_falls_with_its_validity_shows_both(instrument):
    headline, measures = HEADLINE["stereotype"], instrument(stereotype, 144)
    table = change_table("s", {"start": measures["prejudiced"], "dpo": measures["random"]}, 0)
    fell = table.set_index(["metric", "condition"])["ci_high"] < 0
    assert fell[headline.metric, headline.condition] and fell[headline.validity]


def test_a_habit_of_answering_is_read_as_one():
    items = ethics.load_ethics("shipped")
    recited = [["The act is wrong. The act is not wrong because it was meant well."]] * len(items)
    assert values(ethics.measures(items, recited, "main"), "unparsable_rate").mean() == 1
    condemned = ethics.measures(items, [["It is wrong."]] * len(items), "main")
    for metric, wanted in (("false_negative_rate", 0), ("false_positive_rate", 1)):
        assert np.nanmean(values(condemned, metric)) == wanted
    assert values(condemned, "balanced_accuracy").mean() == pytest.approx(0.5)
    agreed = stereotype.stances(STATEMENTS, [["I agree."]] * len(STATEMENTS))
    (both,) = stereotype.acquiescence(STATEMENTS, agreed, agreed, "answers=sampled")
    assert both.item_values.mean() == 1
