"""Questions that come with documents: one reader for Trust-Score's calibrated files and for the set shipped with this study.

A row has ``question``, ``docs`` (``title``, ``text``, ``answers_found``: a bit a gold claim) and the gold claims: short answers with
their aliases (``answers``, or ``qa_pairs`` with ``short_answers``), or sentences (``claims``). Shipped rows also put each short answer
into a sentence (``statements``). Of more than five documents the first five are read; fewer are taken as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import StudyError
from ..decode import Prompt
from ..sources import locate, read_json, read_jsonl
from .trust_score import (
    DOCUMENTS,
    KINDS,
    REFUSAL,
    Claim,
    Document,
    Question,
    citations,
    items,
    sentences,
    without_citations,
)

OFFICIAL = {"asqa": "short", "qampari": "list", "eli5": "long", "expertqa": "long"}
"""The authors' files, ``trust-score/<name>_eval_top100_calibrated.json``, and how their claims are matched; a shipped file,
``trust-score/<kind>.json``, is named after that."""

ASKED = {
    "short": "Answer in one or two sentences. End every sentence with the numbers of the documents that support it, like [1] or [2][3].",
    "list": "Answer with a list separated by commas and nothing else. Put the number of the document that supports it behind every entry, "
    "like [1].",
    "long": "Answer in two to four sentences. End every sentence with the numbers of the documents that support it, like [1] or [2][3].",
}
"""What is asked for, by kind of question."""


def load_questions(source: str) -> list[Question]:
    """All questions of a data source (``shipped``, ``hub:`` or ``path:<directory>``), ids as ``<set>/<id>``.

    Of the authors' sets those are read that a directory has; at least one must be there. A bad row is an error.
    """
    if source == "shipped":
        found = {name: locate(source, f"trust-score/{name}.json") for name in KINDS}
    else:
        found = {
            name: locate(
                source,
                f"trust-score/{name}_eval_top100_calibrated.json",
                required=source.startswith("hub:"),
            )
            for name in OFFICIAL
        }
        if not any(found.values()):
            raise StudyError(
                f"data source {source}: none of trust-score/{{{','.join(OFFICIAL)}}}_eval_top100_calibrated.json is there"
            )
    return [
        question
        for name, path in found.items()
        if path
        for question in _read(path, name, OFFICIAL.get(name, name))
    ]


def _read(path: Path, name: str, kind: str) -> list[Question]:
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise StudyError(f"{path}: expected a list of questions")
    found, ids = [], set()
    for number, row in enumerate(rows, start=1):
        row = row if isinstance(row, dict) else {}
        key = str(row.get("sample_id", number))
        where = f"{path}: question {key}"
        if key in ids:
            raise StudyError(f"{where}: this sample_id is there twice")
        ids.add(key)
        try:
            documents = tuple(
                Document(_text(d["title"]), _text(d["text"]), _bits(d["answers_found"]))
                for d in row["docs"][:DOCUMENTS]
            )
            question = Question(
                f"{name}/{key}", kind, _text(row["question"]), _claims(row, kind), documents
            )
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise StudyError(
                f"{where}: needs question, docs with title, text and answers_found (0 or 1 a claim), and gold claims: "
                f"{error if isinstance(error, TypeError) else f'{error} is missing'}"
            ) from None
        stated = row.get("answerable")
        if stated is not None and bool(stated) != question.answerable:
            raise StudyError(
                f"{where}: is called {'' if stated else 'not '}answerable, but by answers_found it is{' not' if stated else ''}; "
                "mend one of the two"
            )
        found.append(question)
    return found


def _claims(row: dict, kind: str) -> tuple[Claim, ...]:
    if kind == "long":
        return tuple(map(Claim, _texts(row["claims"])))
    aliases = [
        _texts(names)
        for names in _list(
            [pair["short_answers"] for pair in row["qa_pairs"]]
            if "qa_pairs" in row
            else row["answers"]
        )
    ]
    statements = _texts(row["statements"]) if "statements" in row else ("",) * len(aliases)
    if len(statements) != len(aliases):
        raise TypeError(f"{len(statements)} statements for {len(aliases)} answers")
    return tuple(map(Claim, statements, aliases))


def _text(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _list(value) -> list:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r}")
    return value


def _texts(value) -> tuple[str, ...]:
    return tuple(map(_text, _list(value)))


def _bits(value) -> tuple[bool, ...]:
    if any(bit not in (0, 1) for bit in _list(value)):
        raise TypeError(f"expected 0 or 1, got {value!r}")
    return tuple(map(bool, value))


def load_cited(source: str) -> list[tuple[Question, str]]:
    """The few real questions with answers that people wrote and cited (ALCE's demonstrations), where a source has them.

    The answer's own sentences or entries are taken for gold claims, held by the documents that they cite; so a judge that reads
    as people do supports every one that cites. An entry without citations holds for no document.
    """
    found = []
    for name in ("asqa", "eli5", "qampari"):
        path = (
            None
            if source in ("shipped", "hub:")
            else locate(source, f"alce/{name}_default.json", required=False)
        )
        if path is None:
            continue
        try:
            found += [
                _cited(f"{name}/{number}", "list" if name == "qampari" else "long", row)
                for number, row in enumerate(read_json(path)["demos"], start=1)
            ]
        except StudyError as error:
            raise StudyError(f"{path}: {error}") from None
        except (KeyError, TypeError) as error:
            raise StudyError(
                f"{path}: needs demos with question, answer and docs with title and text ({error!r})"
            ) from None
    return found


def _cited(key: str, kind: str, row: dict) -> tuple[Question, str]:
    parts = items(_text(row["answer"])) if kind == "list" else sentences(_text(row["answer"]))
    plain, cited = (
        [without_citations(part).strip(" .") for part in parts],
        [citations(part) for part in parts],
    )
    documents = tuple(
        Document(_text(d["title"]), _text(d["text"]), tuple(i in some for some in cited))
        for i, d in enumerate(row["docs"], start=1)
    )
    claims = tuple(Claim(text, (text,) if kind == "list" else ()) for text in plain)
    return Question(key, kind, _text(row["question"]), claims, documents), row["answer"]


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt(question: Question) -> Prompt:
    """Instruction, question and numbered documents as one turn."""
    documents = "\n".join(
        f"Document [{number}](Title: {d.title}): {d.text}"
        for number, d in enumerate(question.documents, start=1)
    )
    return Prompt(
        question.id,
        (
            f"Use only the documents below. {ASKED[question.kind]} If no document holds the answer, write only: {REFUSAL}\n\n"
            f"Question: {question.question}\n\n{documents}\n\nAnswer:",
        ),
    )


# --- entailment ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entailment:
    """A statement that follows from a text, or does not. ``group``: pairs of one group are not independent."""

    premise: str
    hypothesis: str
    entailed: bool
    group: str


def hard_pairs() -> list[Entailment]:
    """The shipped pairs, written to mislead whoever compares words: paraphrases that follow, and near copies that do not."""
    path, found = locate("shipped", "entailment/pairs.jsonl"), []
    for number, row in read_jsonl(path):
        if row.get("entailed") not in (0, 1) or not all(
            isinstance(row.get(key), str) and row[key] for key in ("premise", "hypothesis")
        ):
            raise StudyError(f"{path}:{number}: needs premise, hypothesis and entailed (0 or 1)")
        found.append(
            Entailment(row["premise"], row["hypothesis"], bool(row["entailed"]), row["id"])
        )
    return found


def claim_pairs(questions: Sequence[Question]) -> list[Entailment]:
    """Every document with every gold claim of its question, put as the metric puts it (behind the question where the claim is
    a name), labelled by ``answers_found``."""

    def stated(question: Question, claim: Claim) -> str:
        return (
            claim.text
            if claim.text and question.kind != "list"
            else f"{question.question} {claim.aliases[0]}"
        )

    return [
        Entailment(d.premise, stated(q, claim), found, q.id)
        for q in questions
        for d in q.documents
        for claim, found in zip(q.claims, d.answers_found)
    ]
