"""Questions that come with documents: one reader for Trust-Score's calibrated files and the shipped
set.

A row has ``question``, ``docs`` (``title``, ``text``, ``answers_found``: one bit per gold claim)
and gold claims: short answers with their aliases (``answers``, or ``qa_pairs`` with
``short_answers``), or sentences (``claims``, or ``answers`` with one each). Shipped rows also put
each short answer into a sentence (``statements``). Only the first five documents are read; fewer
are fine. Short answers without a letter or digit are left out, and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .. import StudyError
from ..decode import Prompt
from ..sources import locate, read_json
from . import trust_score as ts

OFFICIAL = {"asqa": "short", "qampari": "list", "eli5": "long", "expertqa": "long"}
"""The authors' files, ``trust-score/<name>_eval_top100_calibrated.json``, and how their claims are
matched. A shipped file, ``trust-score/<kind>.json``, is named after the matching."""

CITE = "End every sentence with the numbers of the documents that support it, like [1] or [2][3]."
ASKED = {
    "short": f"Answer in one or two sentences. {CITE}",
    "list": "Answer with a list separated by commas and nothing else. "
    "Put the number of the document that supports it behind every entry, like [1].",
    "long": f"Answer in two to four sentences. {CITE}",
}
"""The instruction, by kind of question."""


def load_questions(source: str) -> list[ts.Question]:
    """All questions of a data source (``shipped``, ``hub:`` or ``path:<directory>``), ids as
    ``<set>/<id>``.

    Reads those of the authors' sets that a directory has; at least one must be there. A bad row is
    an error.
    """
    kinds, ending = OFFICIAL, "_eval_top100_calibrated.json"
    if source == "shipped":
        kinds, ending = dict(zip(ts.KINDS, ts.KINDS)), ".json"
    questions = []
    for name, kind in kinds.items():
        required = not source.startswith("path:")
        path = locate(source, f"trust-score/{name}{ending}", required)
        if path:
            questions += _read(path, name, kind)
    if not questions:
        raise StudyError(f"{source} has none of trust-score/<set>_eval_top100_calibrated.json")
    return questions


@contextmanager
def _row(where: str, needs: str) -> Iterator[None]:
    """Errors in a row say where it is and what a row needs."""
    try:
        yield
    except StudyError as error:
        raise StudyError(f"{where}: {error}") from None
    except (KeyError, TypeError) as error:
        problem = f"{error} is missing" if isinstance(error, KeyError) else error
        raise StudyError(f"{where}: needs {needs}: {problem}") from None


def _read(path: Path, name: str, kind: str) -> list[ts.Question]:
    return [q for q in from_rows(read_json(path), name, kind, str(path)) if q]


def from_rows(
    rows: list[dict],
    name: str,
    kind: str,
    where: str,
    entails: ts.EntailmentModel | None = None,
) -> list[ts.Question | None]:
    """A question a row, ids as ``<name>/<sample_id>``; None where no gold claim can be looked for.

    ``kind``: one of ``KINDS``; ``where``: what errors, StudyErrors that name the row, begin with.
    ``entails``: says which documents hold which claims (:func:`annotate`) where a row does not.
    """
    if not isinstance(rows, list) or not rows:
        raise StudyError(f"{where}: expected a list of questions")
    questions, left_out = {}, 0
    for number, row in enumerate(rows, start=1):
        key = str(row.get("sample_id", number) if isinstance(row, dict) else number)
        place = f"{where}: question {key}"
        if key in questions:
            raise StudyError(f"{place}: this sample_id is there twice")
        with _row(place, "question, docs with title, text and answers_found, and gold claims"):
            asked, claims = _text(row["question"]), _claims(row, kind)
            kept = [i for i, claim in enumerate(claims) if kind == "long" or _names(claim)]
            left_out += len(claims) - len(kept)
            some, documents, question = tuple(claims[i] for i in kept), [], None
            given = row["docs"][: ts.DOCUMENTS]
            unknown = ("answers_found" not in d or d["answers_found"] is None for d in given)
            missing = entails and any(unknown)
            for document in given:
                found = [0] * len(claims) if missing else document["answers_found"]
                whole = isinstance(found, list) and len(found) == len(claims)
                documents.append(_document(document, [found[i] for i in kept] if whole else found))
            if some:
                question = ts.Question(f"{name}/{key}", kind, asked, some, tuple(documents))
                question = annotate(question, entails) if missing else question
        if question and row.get("answerable") not in (None, question.answerable):
            raise StudyError(f"{place}: answerable contradicts answers_found; fix one of the two")
        questions[key] = question
    if left_out:
        print(f"{where}: {left_out} gold answers without a letter or digit left out")
    return list(questions.values())


def _names(claim: ts.Claim) -> bool:
    return not claim.aliases or any(map(ts.name_of, claim.aliases))


def annotate(question: ts.Question, entails: ts.EntailmentModel) -> ts.Question:
    """The question with ``answers_found`` of every document, as the authors find it.

    A document holds a sentence that follows from it. It holds a short answer if one of its aliases
    stands there and the question with the first of them behind follows. (The authors also try
    ASQA's partial questions.)
    """
    pairs, places = [], []
    for d, document in enumerate(question.documents):
        text = ts.normalised(document.premise)
        for c, claim in enumerate(question.claims):
            named = any(name in text for name in map(ts.name_of, claim.aliases) if name)
            if question.kind == "long" or named:
                short = f"{question.question} {claim.aliases[0]}" if claim.aliases else ""
                pairs.append((document.premise, claim.text if question.kind == "long" else short))
                places.append((d, c))
    found = {place for place, held in zip(places, ts.entailed(entails, pairs)) if held}
    documents = tuple(
        replace(one, answers_found=tuple((d, c) in found for c in range(len(question.claims))))
        for d, one in enumerate(question.documents)
    )
    return replace(question, documents=documents)


def _claims(row: dict, kind: str) -> tuple[ts.Claim, ...]:
    if kind == "long":
        texts = row["claims"] if "claims" in row else [first for first, *_ in row["answers"]]
        return tuple(map(ts.Claim, _texts(texts)))
    pairs = row.get("qa_pairs")
    aliases = [pair["short_answers"] for pair in pairs] if pairs is not None else row["answers"]
    aliases = tuple(map(_texts, aliases))
    statements = _texts(row["statements"]) if "statements" in row else ("",) * len(aliases)
    if len(statements) != len(aliases):
        raise TypeError(f"{len(statements)} statements for {len(aliases)} answers")
    return tuple(map(ts.Claim, statements, aliases))


def _document(row: dict, bits: list) -> ts.Document:
    if not isinstance(bits, list) or any(bit not in (0, 1) for bit in bits):
        raise TypeError(f"expected 0 or 1 per claim, got {bits!r}")
    title = row["title"]
    if not isinstance(title, str):
        raise TypeError(f"expected a title, got {title!r}")
    return ts.Document(title, _text(row["text"]), tuple(map(bool, bits)))


def _text(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"expected a text, got {value!r}")
    return value


def _texts(value) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {value!r}")
    return tuple(map(_text, value))


def load_cited(source: str) -> list[tuple[ts.Question, str]]:
    """The few real questions with answers that people wrote and cited (ALCE's demonstrations),
    where a source has them.

    The answer's own sentences or entries are its gold claims, held by the documents that they cite.
    A perfect entailment model therefore supports every sentence that cites. A sentence without
    citations is held by no document.
    """
    cited = []
    for name, kind in (("asqa", "long"), ("eli5", "long"), ("qampari", "list")):
        path = locate(source, f"alce/{name}_default.json", required=False)
        if path:
            with _row(str(path), "demos with question, answer and docs with title and text"):
                rows = enumerate(read_json(path)["demos"], start=1)
                cited += [_cited(f"{name}/{number}", kind, row) for number, row in rows]
    return cited


def _cited(key: str, kind: str, row: dict) -> tuple[ts.Question, str]:
    answer = _text(row["answer"])
    parts = ts.items(answer) if kind == "list" else ts.sentences(answer)
    texts = [ts.without_citations(part).strip(" .") for part in parts]
    claims = tuple(ts.Claim(text, (text,) if kind == "list" else ()) for text in texts)
    documents = []
    for number, document in enumerate(row["docs"], start=1):
        documents.append(_document(document, [number in ts.citations(part) for part in parts]))
    return ts.Question(key, kind, _text(row["question"]), claims, tuple(documents)), answer


def prompt(question: ts.Question) -> Prompt:
    """Instruction, question and numbered documents as one turn."""
    text = f"Use only the documents below. {ASKED[question.kind]} "
    text += f"If no document holds the answer, write only: {ts.REFUSAL}\n\n"
    text += f"Question: {question.question}\n\n"
    for number, document in enumerate(question.documents, start=1):
        text += f"Document [{number}](Title: {document.title}): {document.text}\n"
    return Prompt(question.id, (f"{text}\nAnswer:",))
