"""Rows of preference data as typed pairs, in the forms in which people publish them.

A file's form is recognised once, from its keys (:func:`recognise`); by it each row becomes a pair
or is left out for a reason, which is the message of a ValueError (:func:`parse_pair`).

=========================  =========================================================================
form                       a row
=========================  =========================================================================
HH-RLHF text               ``chosen``, ``rejected``: dialogues ``\\n\\nHuman: …\\n\\nAssistant: …``
TRL standard               ``prompt``, ``chosen``, ``rejected``: texts
TRL conversational         the same as lists of messages with ``role`` and ``content``; the answers
                           alone or whole conversations (UltraFeedback), ``prompt`` also as a text
… with implicit prompt     without ``prompt``: the common beginning of both sides
HelpSteer2 preference      ``prompt``, ``response_1``, ``response_2``, ``preference_strength``
                           (above 0: the second is better)
HelpSteer2 ratings         ``prompt``, ``response``, ``helpfulness``: two rows running for a prompt
PKU-SafeRLHF               ``prompt``, ``response_0``, ``response_1``, ``better_response_id`` and
                           ``safer_response_id``, of which a label chooses one (``LABELS``)
=========================  =========================================================================

Other columns are ignored but for ``source``, which names a row's group, ``split``, and
UltraFeedback's ``score_chosen`` and ``score_rejected``, which make a tie where they are equal. In
texts, ``\\n\\nHuman:`` at the start of a prompt opens a dialogue; HelpSteer2 parts turns by
``<extra_id_1>``. A system message makes a bad row, since a pair's prompt has no place for one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from os.path import commonprefix

from .. import require
from ..sources import HALF_CHARACTER

Turns = list[tuple[str, str]]
"""(speaker, stripped text), the speaker ``Human`` or ``Assistant``."""

SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
DIALOGUE = re.compile(r"\s*Human:")
EXTRA_ID = re.compile(r"\s*<extra_id_1>(User|Assistant)\n")
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content)['\"]")
"""Messages that a CSV file, or a careless export, turned into a text."""

ROLES = {"user": "Human", "assistant": "Assistant"}
LABELS = {"safety": "safer_response_id", "helpfulness": "better_response_id"}
"""PKU-SafeRLHF's two labels and their columns."""

TIE = "no preference (a tie)"
"""The reason of a row that says that neither answer is better: left out, but not a bad row."""


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one conversation, of which the first was preferred.

    ``prompt`` alternates human, assistant, …, human; ``source`` is the group that a row comes from
    (of HH-RLHF ``harmless`` or ``helpful``); ``id`` is ``<file>:<line>``, of HH-RLHF
    ``<subset>.<split>:<line>``.
    """

    id: str
    prompt: tuple[str, ...]
    chosen: str
    rejected: str
    source: str

    @property
    def opening(self) -> str:
        """The first human turn, by which pairs are split."""
        return self.prompt[0]


# --- texts and messages as turns ------------------------------------------------------------------


def dialogue_turns(text: str) -> Turns:
    """The turns of ``\\n\\nHuman: …\\n\\nAssistant: …``; a speaker may have several in a row."""
    require(isinstance(text, str), "not a text")
    before, *pieces = SPEAKER.split(text)
    require(not before.strip(), "does not start with a speaker")
    return list(zip(pieces[::2], (piece.strip() for piece in pieces[1::2])))


def message_turns(messages: list[dict]) -> Turns:
    """The turns of a list of messages; an empty system message counts as none."""
    turns = []
    for message in messages:
        given = message if isinstance(message, dict) else {}
        role, text = given.get("role"), given.get("content")
        if not isinstance(role, str) or not isinstance(text, str):
            raise ValueError("a message without a role and a text")
        if role in ROLES:
            turns.append((ROLES[role], text.strip()))
        elif role != "system":
            raise ValueError("a message whose role is neither system, user nor assistant")
        elif text.strip():
            raise ValueError("a system message, which a pair's prompt cannot hold")
    return turns


def turns_of(value, speaker: str) -> Turns:
    """The turns of a dialogue, of messages, or of one text that ``speaker`` says."""
    if isinstance(value, list):
        return message_turns(value)
    require(isinstance(value, str), "neither a text nor a list of messages")
    require(not MESSAGES.match(value), "messages written as a text (JSONL and Parquet keep them)")
    return dialogue_turns(value) if DIALOGUE.match(value) else [(speaker, value.strip())]


def prompt_turns(prompt) -> Turns:
    """The turns of a prompt; the cue ``Assistant:`` that may end a dialogue is not one."""
    turns = turns_of(prompt, "Human")
    return turns[:-1] if turns[-1:] == [("Assistant", "")] else turns


def checked(turns: Turns) -> Turns:
    """``turns`` if they are a conversation that ends in an answer."""
    speakers, texts = [speaker for speaker, _ in turns], [text for _, text in turns]
    problems = {
        "does not start with a Human turn": speakers[:1] != ["Human"],
        "does not end in an Assistant turn": speakers[-1:] != ["Assistant"],
        "empty answer": not any(texts[-1:]),
        "empty turn": not all(texts),
        "half a character (a lone surrogate)": HALF_CHARACTER.search("".join(texts)),
    }
    for problem, present in problems.items():
        require(not present, problem)
    return turns


def join_turns(turns: Turns) -> tuple[str, ...]:
    """The texts of human, assistant, …, human; a speaker's turns in a row are joined into one."""
    runs = groupby(turns, key=lambda turn: turn[0])
    joined = tuple("\n\n".join(text for _, text in run) for _, run in runs)
    require(len(joined) % 2 == 1, "the prompt does not end in a Human turn")
    return joined


# --- forms ----------------------------------------------------------------------------------------


def _fields(row: dict, *names: str) -> list:
    for name in names:
        require(name in row, f"no field {name!r}")
        require(row[name] is not None, f"field {name!r} is null")
    return [row[name] for name in names]


def _number(row: dict, name: str) -> float:
    (value,) = _fields(row, name)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    require(isfinite(number), f"{name} is not a number")
    return number


def _sides(start: Turns, *answers) -> tuple[Turns, ...]:
    """Prompt and answer for each answer; one that is a whole conversation must hold the prompt."""
    sides = []
    for side in (turns_of(answer, "Assistant") for answer in answers):
        if side and side[0][0] == "Human":
            require(set(start) <= set(side[:-1]), "the prompt is not part of the conversation")
            sides.append(side)
        else:
            sides.append(start + side)
    return tuple(sides)


def _dialogues(row: dict, label: str) -> tuple[Turns, ...]:
    return tuple(map(dialogue_turns, _fields(row, "chosen", "rejected")))


def _with_prompt(row: dict, label: str) -> tuple[Turns, ...]:
    prompt, *answers = _fields(row, "prompt", "chosen", "rejected")
    scores = row.get("score_chosen"), row.get("score_rejected")
    require(scores[0] != scores[1] or scores[0] in (None, ""), TIE)
    # Beside messages a text is one turn, whatever it begins with.
    if isinstance(prompt, str) and isinstance(answers[0], list):
        return _sides([("Human", prompt.strip())], *answers)
    return _sides(prompt_turns(prompt), *answers)


def _conversations(row: dict, label: str) -> tuple[Turns, ...]:
    return _with_prompt(row | {"prompt": []}, label)


def _common_beginning(row: dict, label: str) -> tuple[Turns, ...]:
    """As TRL's ``extract_prompt``, but cut between words."""
    texts = _fields(row, "chosen", "rejected")
    require(all(isinstance(text, str) for text in texts), "not a text")
    prompt = re.sub(r"\S+$", "", commonprefix(texts))
    require(prompt.strip(), "no prompt, and no common beginning that could be one")
    return _sides(prompt_turns(prompt), *(text[len(prompt) :] for text in texts))


def _helpsteer(row: dict, label: str) -> tuple[Turns, ...]:
    prompt, *answers = _fields(row, "prompt", "response_1", "response_2")
    strength = _number(row, "preference_strength")
    require(strength, TIE)
    return _sides(_marked_turns(prompt), *(answers[::-1] if strength > 0 else answers))


def _marked_turns(prompt) -> Turns:
    """A prompt of HelpSteer2, whose later turns follow ``<extra_id_1>User`` or ``…Assistant``."""
    if not isinstance(prompt, str):
        return prompt_turns(prompt)
    first, *later = EXTRA_ID.split(prompt)
    speakers = [ROLES[role.lower()] for role in later[::2]]
    return prompt_turns(first) + list(zip(speakers, (text.strip() for text in later[1::2])))


def _ratings(row: dict, label: str) -> tuple[Turns, ...]:
    require(len(row["rated"]) == 2, "other than two rated answers running to one prompt")
    one, two = (_fields(rated, "response")[0] for rated in row["rated"])
    first, second = (_number(rated, "helpfulness") for rated in row["rated"])
    both = {"response_1": one, "response_2": two, "preference_strength": second - first}
    return _helpsteer(row | both, label)


def _pku(row: dict, label: str) -> tuple[Turns, ...]:
    prompt, *answers = _fields(row, "prompt", "response_0", "response_1")
    better = _number(row, LABELS[label])
    require(better in (0, 1), f"{LABELS[label]} is neither 0 nor 1")
    return _sides(prompt_turns(prompt), *(answers[::-1] if better else answers))


HH, PKU, RATINGS = "HH-RLHF text", "PKU-SafeRLHF", "HelpSteer2 ratings"
FORMS: dict[str, Callable[[dict, str], tuple[Turns, ...]]] = {
    HH: _dialogues,
    "TRL standard": _with_prompt,
    "TRL standard, implicit prompt": _common_beginning,
    "TRL conversational": _with_prompt,
    "TRL conversational, implicit prompt": _conversations,
    "HelpSteer2 preference": _helpsteer,
    RATINGS: _ratings,
    PKU: _pku,
}
"""Form → what makes of a row (and PKU-SafeRLHF's label) the turns of the preferred conversation and
those of the other."""

KEYS = {
    "HelpSteer2 preference": {"prompt", "response_1", "response_2", "preference_strength"},
    PKU: {"prompt", "response_0", "response_1", *LABELS.values()},
    RATINGS: {"prompt", "response", "helpfulness"},
}


def recognise(rows: Sequence[dict]) -> str:
    """The form of a file's rows, by the keys that any of them has; ``ValueError`` names the keys
    if there is none.

    Without ``prompt`` the values decide: messages if most are lists, HH-RLHF's text if any begins
    with a Human turn.
    """
    keys = {str(key) for key in set().union(*rows)}
    if {"chosen", "rejected"} <= keys:
        chosen = [row.get("chosen") for row in rows]
        messages = 2 * sum(isinstance(value, list) for value in chosen) > len(rows)
        implicit = all(row.get("prompt") is None for row in rows)
        dialogues = (isinstance(value, str) and DIALOGUE.match(value) for value in chosen)
        if implicit and not messages and any(dialogues):
            return HH
        name = "TRL conversational" if messages else "TRL standard"
        return f"{name}, implicit prompt" if implicit else name
    for form, needed in KEYS.items():
        if needed <= keys:
            return form
    known = "; ".join(f"{', '.join(sorted(needed))} ({form})" for form, needed in KEYS.items())
    raise ValueError(
        f"the columns {', '.join(sorted(keys)) or '(none)'} are no form of preference data that is "
        f"known here; needed are chosen, rejected and perhaps prompt, or {known}"
    )


def joined_ratings(rows: Iterable[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """Rows of HelpSteer2's ratings, those running with one prompt joined (``rated``) under the
    first one's number."""
    runs = (list(run) for _, run in groupby(rows, key=lambda numbered: numbered[1].get("prompt")))
    return [(run[0][0], run[0][1] | {"rated": [row for _, row in run]}) for run in runs]


def parse_pair(row: dict, id: str, source: str, form: str = HH, label: str = "") -> PreferencePair:
    """A row of a form as a typed pair; ``ValueError`` says what is wrong with it, or ``TIE``.

    ``source``: the group of rows that name none. ``label``: which of PKU-SafeRLHF's (``LABELS``).
    """
    require(None not in row, "more cells than columns")  # where a CSV reader puts them
    chosen, rejected = map(checked, FORMS[form](row, label))
    require(chosen[:-1] == rejected[:-1], "the two dialogues have different prompts")
    require(chosen[-1] != rejected[-1], "both answers are the same")
    named = row.get("source")
    group = named if isinstance(named, str) and named.strip() else source
    require(not HALF_CHARACTER.search(group), "half a character (a lone surrogate) in source")
    return PreferencePair(id, join_turns(chosen[:-1]), chosen[-1][1], rejected[-1][1], group)
