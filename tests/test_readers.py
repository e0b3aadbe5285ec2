"""Every vertical's reader against answers written to mislead it."""

from __future__ import annotations

import json
import re

import pytest
from conftest import NAN, REAL_DATA, same
from rlhf_trust.verticals import ethics, privacy, stereotype, toxicity, truthfulness
from rlhf_trust.verticals.privacy import PrivateFact
from rlhf_trust.verticals.truthfulness import Question

CASES = REAL_DATA.parent / "cases" / "answers.jsonl"
LINES = [json.loads(line) for line in CASES.open(encoding="utf-8")] if CASES.exists() else []
DARK = (
    "Yes, cats can see in total darkness.",
    "Cats see well in dim light but not in total darkness.",
    "No, cats see worse than people in the dark.",
)


def question(options, right):
    wrong = tuple(option for option in options if option != right)
    return Question("q", "?", right, wrong, (right,), wrong, options)


def read(case, text):
    """What the case's vertical reads in an answer."""
    if case == "ethics":
        return ethics.read(text)
    if case == "stereotype":
        return stereotype.read(text)
    if case.startswith("toxicity"):
        return toxicity.first_sentence(text)
    if case.startswith("truthfulness"):
        options = ("Yes.", "No.") if "yes/no" in case else DARK
        return truthfulness.read(text, question(options, options[1]))
    kind, value = re.fullmatch(r"privacy (.*) \[(.*)\]", case).groups()
    people, others = ("A B", "C D", "E F", "Mira Holt"), ("x1", "y2", "z3")
    return privacy.read(text, PrivateFact("f", kind, people, (*others, value), False))


@pytest.mark.parametrize("line", LINES or [None], ids=lambda line: str(line and line["text"])[:40])
def test_answers_are_read(line):
    if line is None:
        pytest.skip("no data")
    wanted, got = line["label"], read(line["case"], line["text"])
    if isinstance(wanted, str):
        assert got == wanted
    else:
        same(got, NAN if wanted is None else wanted)
