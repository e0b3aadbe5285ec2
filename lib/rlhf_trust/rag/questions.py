"""Questions that come with documents: one reader for Trust-Score's calibrated files and the shipped
set.

A row has ``question``, ``docs`` (``title``, ``text``, ``answers_found``: one bit per gold claim)
and gold claims: short answers with their aliases (``answers``, or ``qa_pairs`` with
``short_answers``), or sentences (``claims``, or ``answers`` with one each). Shipped rows also put
each short answer into a sentence (``statements``). Only the first five documents are read; fewer
are fine. Short answers without a letter or digit are left out, and counted.
"""

from __future__ import annotations

from dataclasses import replace

from .. import StudyError, require
from ..decode import Prompt
from ..sources import checked, listed, locate, read_json
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
        without = f"Trust-Score has no questions of {name}" if source.startswith("path:") else None
        path = locate(source, f"trust-score/{name}{ending}", without)
        if path:
            questions += [q for q in from_rows(read_json(path), name, kind, str(path)) if q]
    require(questions, f"{source} has none of trust-score/<set>_eval_top100_calibrated.json")
    return questions


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
    require(rows and isinstance(rows, list), f"{where}: expected a list of questions")
    questions, left_out = {}, 0
    for number, row in enumerate(rows, start=1):
        key = str(row.get("sample_id", number) if isinstance(row, dict) else number)
        place = f"{where}: question {key}"
        require(key not in questions, f"{place}: this sample_id is there twice")
        checked(row, "row", place, dict)
        asked, claims = checked(row.get("question"), "question", place), _claims(row, kind, place)
        kept = [i for i, claim in enumerate(claims) if kind == "long" or _names(claim)]
        left_out += len(claims) - len(kept)
        some, documents, question = tuple(claims[i] for i in kept), [], None
        given = listed(row.get("docs"), "docs", place, dict)[: ts.DOCUMENTS]
        missing = entails and any(d.get("answers_found") is None for d in given)
        for document in given:
            found = [0] * len(claims) if missing else document.get("answers_found")
            if not isinstance(found, list) or len(found) != len(claims):
                wanted = f"answers_found must be a list of {len(claims)}, one per gold answer"
                raise StudyError(f"{place}: {wanted}, got {found!r}")
            documents.append(_document(document, [found[i] for i in kept], place))
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
    asked = {}  # document and claim → premise and hypothesis
    for d, document in enumerate(question.documents):
        text = ts.normalised(document.premise)
        for c, claim in enumerate(question.claims):
            named = any(name in text for name in map(ts.name_of, claim.aliases) if name)
            if question.kind == "long" or named:
                short = f"{question.question} {claim.aliases[0]}" if claim.aliases else ""
                asked[d, c] = document.premise, claim.text if question.kind == "long" else short
    held = ts.entailed(entails, list(asked.values()))
    found = {place for place, yes in zip(asked, held) if yes}
    documents = tuple(
        replace(one, answers_found=tuple((d, c) in found for c in range(len(question.claims))))
        for d, one in enumerate(question.documents)
    )
    return replace(question, documents=documents)


def _claims(row: dict, kind: str, place: str) -> tuple[ts.Claim, ...]:
    if kind == "long" and "claims" in row:
        return tuple(map(ts.Claim, listed(row["claims"], "claims", place, empty=True)))
    groups, name = row.get("answers"), "answers"
    if kind != "long" and row.get("qa_pairs") is not None:
        pairs, name = listed(row["qa_pairs"], "qa_pairs", place, dict, empty=True), "short_answers"
        groups = [pair.get("short_answers") for pair in pairs]
    groups = listed(groups, name, place, list, empty=True)
    aliases = tuple(listed(group, f"{name}[{i}]", place) for i, group in enumerate(groups))
    if kind == "long":
        return tuple(ts.Claim(sentence) for sentence, *_ in aliases)
    statements = ("",) * len(aliases)
    if "statements" in row:
        statements = listed(row["statements"], "statements", place, empty=True)
    if len(statements) != len(aliases):
        raise StudyError(f"{place}: {len(statements)} statements for {len(aliases)} answers")
    return tuple(map(ts.Claim, statements, aliases))


def _document(row: dict, bits: list, place: str) -> ts.Document:
    if any(bit not in (0, 1) for bit in bits):
        raise StudyError(f"{place}: answers_found must be 0 or 1 per gold answer, got {bits!r}")
    title = row.get("title")
    if title != "":
        checked(title, "title of a document", place)
    text = checked(row.get("text"), "text of a document", place)
    return ts.Document(title, text, tuple(map(bool, bits)))


def load_cited(source: str) -> list[tuple[ts.Question, str]]:
    """The few real questions with answers that people wrote and cited (ALCE's demonstrations),
    where a source has them.

    The answer's own sentences or entries are its gold claims, held by the documents that they cite.
    A perfect entailment model therefore supports every sentence that cites. A sentence without
    citations is held by no document.
    """
    cited = []
    for name, kind in (("asqa", "long"), ("eli5", "long"), ("qampari", "list")):
        without = "the entailment model is not tried on answers that people cited there"
        path = locate(source, f"alce/{name}_default.json", without)
        if path:
            content = checked(read_json(path), "demos", str(path), dict)
            rows = listed(content.get("demos"), "demos", str(path), dict)
            for number, row in enumerate(rows, start=1):
                cited.append(_cited(f"{name}/{number}", kind, row, f"{path}: demo {number}"))
    return cited


def _cited(key: str, kind: str, row: dict, place: str) -> tuple[ts.Question, str]:
    asked, answer = (checked(row.get(part), part, place) for part in ("question", "answer"))
    parts = ts.items(answer) if kind == "list" else ts.sentences(answer)
    said = [ts.without_citations(part).strip(" .") for part in parts]
    claims = tuple(ts.Claim(text, (text,) if kind == "list" else ()) for text in said)
    documents = []
    for number, document in enumerate(listed(row.get("docs"), "docs", place, dict), start=1):
        held = [number in ts.citations(part) for part in parts]
        documents.append(_document(document, held, place))
    if not claims or kind == "list" and not all(map(_names, claims)):
        raise StudyError(f"{place}: its answer has a part that says nothing")
    return ts.Question(key, kind, asked, claims, tuple(documents)), answer


def prompt(question: ts.Question) -> Prompt:
    """Instruction, question and numbered documents as one turn."""
    text = f"Use only the documents below. {ASKED[question.kind]} "
    text += f"If no document holds the answer, write only: {ts.REFUSAL}\n\n"
    text += f"Question: {question.question}\n\n"
    for number, document in enumerate(question.documents, start=1):
        text += f"Document [{number}](Title: {document.title}): {document.text}\n"
    return Prompt(question.id, (f"{text}\nAnswer:",))
