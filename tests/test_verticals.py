"""What verticals share: measures become tables, answers are kept, items reach the attribution."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from conftest import NAN
from rlhf_trust import StudyError
from rlhf_trust.artifacts import Build
from rlhf_trust.attribution.metric import changed_items, evaluation_examples, training_examples
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.decode import Prompt
from rlhf_trust.sources import field
from rlhf_trust.verticals import HEADLINE, common
from rlhf_trust.verticals.common import Measure, change_table, measured, trust_table

# --- tables ---------------------------------------------------------------------------------------


def scripted(*rows, ids="abcd", metric="m", condition="main"):
    return {
        model: [Measure(metric, condition, tuple(ids), np.array(v, dtype=float))]
        for model, v in zip(("start", "sft", "dpo"), rows)
    }


def test_tables_pair_by_item_and_drop_what_either_side_could_not_read():
    of = scripted([0, 1, NAN, 0.5], [1, NAN, 1, 0.75], [1, 1, 1, 1])
    trust = trust_table("ethics", of, seed=7)
    assert trust["n"].tolist() == [3, 3, 4]
    assert trust["value"].tolist() == pytest.approx([0.5, 2.75 / 3, 1])
    assert (trust["seed"] == 7).all() and (trust["ci_low"] <= trust["value"]).all()
    changes = change_table("ethics", of, seed=7)
    pairs = list(zip(changes["model"], changes["baseline"]))
    assert pairs == [("sft", "start"), ("dpo", "start"), ("dpo", "sft")]
    assert changes["change"].tolist() == pytest.approx([1.25 / 2, 1.5 / 3, 0.25 / 3])
    assert changes["n"].tolist() == [2, 3, 3]
    pd.testing.assert_frame_equal(changes, change_table("ethics", of, seed=7))


def test_a_model_measured_on_other_items_is_refused():
    of = scripted([0, 1], [0, 1], ids="ab") | {"dpo": scripted([0, 1], ids="ba")["start"]}
    with pytest.raises(StudyError, match="ethics: dpo and start answered different items"):
        change_table("ethics", of, 0)


@pytest.mark.parametrize(("vertical", "verdict"), [("stereotype", "worse"), ("ethics", "better")])
def test_headline_words_follow_the_numbers(vertical, verdict):
    metric, condition, _, validity, chance = HEADLINE[vertical][:5]
    ids = [str(i) for i in range(20)]
    of = scripted([0] * 20, [1] * 20, [0] * 20, ids=ids, metric=metric, condition=condition)
    trust, changes = trust_table(vertical, of, 0), change_table(vertical, of, 0)
    trust = trust[trust["metric"] != validity[0]]
    row = {"metric": validity[0], "condition": validity[1], "value": chance + 0.2, "n": 20}
    row["ci_high"] = chance + 0.3

    def words(**lows):
        seen = [row | {"model": m, "ci_low": chance + low} for m, low in lows.items()]
        return common.headline_sentence(vertical, pd.concat([trust, pd.DataFrame(seen)]), changes)

    start, sft, dpo = words(start=0.1, sft=0.1, dpo=0.1)
    assert start.startswith("At the start")
    assert sft.startswith("Changes against start, one checkpoint each: sft ")
    assert sft.endswith(f"n = 20 items): {verdict}.")
    assert dpo.startswith("dpo ") and dpo.endswith("no clear change.")
    _, blind, both = words(start=-0.1, sft=0.1, dpo=0.1)
    assert blind.startswith("On the start model its instrument is not clearly better than chance")
    assert "; dpo " in both and both.endswith("n = 20 items): no verdict.")
    _, sft, dpo = words(start=0.1, sft=-0.1, dpo=0.1)
    own = vertical == "ethics"  # the headline is its own validity, so only start is looked at
    assert ("no change of trust, since consensus ROC area there is" in sft) == (not own)
    assert dpo.endswith("no clear change.")


def test_measures_of_some_rows():
    items = [PreferencePair(i, (), "", "", source) for i, source in zip("abc", "xyx")]
    (found,) = measured(items, "main", "source", rows=[True, False, True], m=np.arange(3.0))
    assert (found.item_ids, found.clusters) == (("a", "c"), ("x", "x"))
    assert found.values.tolist() == [0, 2]
    assert measured(items, "main", rows=[False] * 3, m=np.arange(3.0)) == []
    (none,) = measured([], "main", m=np.zeros(0))  # an empty set is measured, with n = 0
    assert trust_table("ethics", {"start": [none]}, 0)["n"].tolist() == [0]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"a": {"b": " x "}}, "x"),
        ({"a": {"b": " "}}, "no a.b"),
        ({"a": "b"}, "no a.b"),
        ({}, "no a.b"),
        ([1], "no a.b"),
        ({"a": {"b": 0}}, "a.b must be a text, got 0"),
        ({"a": {"b": "z"}}, "a.b must be x or y, got 'z'"),
    ],
)
def test_a_row_is_checked_field_by_field(row, wanted):
    def read():
        return field(row, "a.b", "file:3", allowed=("x", "y"))

    if wanted == "x":
        assert read() == "x"
    else:
        with pytest.raises(StudyError, match=f"^file:3: {re.escape(wanted)}$"):
            read()


# --- answers on their way to the attribution ------------------------------------------------------

PROMPTS = [Prompt(f"p{i}", (f"what {i}?",), "be kind") for i in range(4)]
ANSWERS = {
    "start": [["a"], ["b"], ["c"], ["d"]],
    "sft": [["a", "z"], ["B"], ["C"], ["D"]],
    "dpo": [["A"], ["B"], ["C"], ["dd"]],
}


def test_answers_are_read_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(Build, "root", property(lambda self: tmp_path))
    strange = {m: [["one\u2028two\u0085three\r\nfour"], *of[1:]] for m, of in ANSWERS.items()}
    common.save_answers(Build("x"), "ethics", "main", PROMPTS, strange)
    back = common.read_answers(Build("x"), "ethics")
    assert [prompt for prompt, _ in back] == PROMPTS
    assert {m: [answers[m] for _, answers in back] for m in strange} == strange
    with pytest.raises(StudyError, match="run the privacy notebook first"):
        common.read_answers(Build("x"), "privacy")


def test_items_that_a_stage_changed():
    answered = [(p, {m: of[i] for m, of in ANSWERS.items()}) for i, p in enumerate(PROMPTS)]
    changed, left = changed_items(answered, "sft", 2)  # against start, by the first sample
    assert changed == [(PROMPTS[1], "b", "B"), (PROMPTS[2], "c", "C")] and left == 1
    changed, left = changed_items(answered, "dpo", 9)  # against sft
    assert changed == [(PROMPTS[0], "a", "A"), (PROMPTS[3], "D", "dd")] and left == 2


def test_the_answer_after_is_the_winner(chat: Chat):
    item = (PROMPTS[0], "before", "after")

    def text(sequence):
        return chat.decode(sequence.answer_ids)

    (pairwise,) = evaluation_examples([item], chat, "dpo", "ethics")
    assert [text(s) for s in pairwise.sequences] == ["after", "before"]
    assert pairwise.sequences[0].prompt_ids == chat.prompt_ids(("what 0?",), "be kind")
    (single,) = evaluation_examples([item], chat, "sft", "ethics")
    assert [text(s) for s in single.sequences] == ["after"] and single.id == "ethics/p0"
    pair = PreferencePair("x", ("what?",), "chosen", "rejected", "helpful")
    for stage, wanted in (("ppo", ["chosen", "rejected"]), ("sft", ["chosen"])):
        (example,) = training_examples([pair], chat, stage)
        assert [text(s) for s in example.sequences] == wanted
