"""Trust-Align (Song et al., ICLR 2025, arXiv 2409.11242, section 4): preference pairs for answers that rest on documents.

An answerable question gives several prompts: its documents are put together anew, so that fewer of its claims, or none, are
held. The chosen answer states each claim that is held and cites what holds it, or refuses; the rejected one is what a model said. Of
the answers that are wrong somewhere, the worst half by severity is kept, of answerable and unanswerable prompts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from .. import StudyError
from ..data.preferences import PreferencePair
from ..stats import generator
from .questions import prompt
from .trust_score import DOCUMENTS, REFUSAL, Document, Question, Scores, normalised

SEVERITY = {
    "unwarranted_refusal": 0.50,
    "over_responsiveness": 0.50,
    "overcitation": 0.34,
    "improper_citation": 0.26,
    "inaccurate_claims": 0.40,
}
"""What each kind of error weighs (the paper's table)."""


# --- documents put together anew -----------------------------------------------------------------------------------


def recombined(questions: Sequence[Question], variants: int, seed: int = 0) -> list[Question]:
    """Each question as it is, and of each answerable one ``variants`` more with other documents.

    The variants cycle through three: some of the documents that hold a claim replaced (half, rounded up, but never all); all
    of them, which leaves nothing to answer; and none, only in another order. In their place come documents of the other
    questions, those most like the question first (TF-IDF), which are taken to hold none of its claims: any with one of its
    names in it is passed over.
    """
    if not questions:
        raise StudyError(
            "trust-align: there are no questions to make prompts from; lower n_held_out or raise n_train"
        )
    pool = list(dict.fromkeys((d.title, d.text) for q in questions for d in q.documents))
    texts = [f"{title} {text}" for title, text in pool]
    words = TfidfVectorizer(stop_words="english").fit(texts)
    likeness = (
        words.transform([q.question for q in questions]) @ words.transform(texts).T
    ).toarray()
    found = []
    for index, question in enumerate(questions):
        found.append(question)
        own, names = (
            {(d.title, d.text) for d in question.documents},
            [normalised(a) for c in question.claims for a in c.aliases],
        )
        near = (pool[i] for i in np.argsort(-likeness[index], kind="stable"))
        near = [
            other
            for other in near
            if other not in own and not any(name in normalised(" ".join(other)) for name in names)
        ][: 4 * DOCUMENTS]
        holding = [i for i, d in enumerate(question.documents) if any(d.answers_found)]
        if len(near) < len(holding):
            raise StudyError(
                f"trust-align: {question.id}: only {len(near)} documents of other questions to put in place of {len(holding)}"
            )
        rng = generator(f"recombined/{question.id}/{seed}")
        for number in range(variants if holding else 0):
            documents = list(question.documents)
            how_many = (min(-(-len(holding) // 2), len(holding) - 1), len(holding), 0)[number % 3]
            others = rng.permutation(len(near))
            for place, other in zip(
                rng.choice(holding, size=how_many, replace=False).tolist(), others
            ):
                documents[place] = Document(*near[other], (False,) * len(question.claims))
            order = rng.permutation(len(documents))
            found.append(
                replace(
                    question,
                    id=f"{question.id}+{number + 1}",
                    documents=tuple(documents[i] for i in order),
                )
            )
    return found


# --- what should have been said ------------------------------------------------------------------------------------


def fewest_documents(question: Question) -> list[int | None]:
    """For each gold claim the document to cite (None where none holds it), so that few documents are cited in all: greedily
    the document that holds most of the claims not yet covered, the first of several."""
    bits = np.array([d.answers_found for d in question.documents], dtype=bool)
    cited: list[int | None] = [None] * len(question.claims)
    open_claims = bits.any(0)
    while open_claims.any():
        best = int((bits & open_claims).sum(1).argmax())
        for claim in np.flatnonzero(bits[best] & open_claims):
            cited[claim] = best
        open_claims &= ~bits[best]
    return cited


def positive(question: Question) -> str:
    """The claims that the documents hold, each with its citation; a refusal where they hold none. (Commas separate the entries
    of a list: a name is written without its own.)"""
    if not question.answerable:
        return REFUSAL
    stated = [
        (claim, f"[{document + 1}]")
        for claim, document in zip(question.claims, fewest_documents(question))
        if document is not None
    ]
    if question.kind == "list":
        return (
            ", ".join(
                f"{next((a for a in claim.aliases if ',' not in a), claim.aliases[0].replace(',', ''))} {mark}"
                for claim, mark in stated
            )
            + "."
        )
    return " ".join(
        f"{(claim.text or claim.aliases[0]).rstrip('.')} {mark}." for claim, mark in stated
    )


# --- what was said instead -----------------------------------------------------------------------------------------


def errors(scores: Scores) -> dict[str, float]:
    """The five kinds of error of one response, each from 0 (none) to 1."""
    answered, answerable = scores.answered, scores.answerable
    return {
        "unwarranted_refusal": float(answerable and not answered),
        "over_responsiveness": float(answered and not answerable),
        "overcitation": 1 - scores.precision if answered else 0.0,
        "improper_citation": 1 - scores.recall if answered else 0.0,
        "inaccurate_claims": 1 - scores.correct if answered and answerable else 0.0,
    }


def severity(scores: Scores) -> float:
    """e_q = Σ w_i e_i over the kinds of error."""
    return sum(SEVERITY[kind] * value for kind, value in errors(scores).items())


def worst_half(scores: Sequence[Scores], most: int = 0) -> list[int]:
    """Indices of the responses to learn from: those with any error, and of these the worse half by severity, rounded up, of
    answerable and unanswerable questions apart; in order. ``most``: of both together at most so many (0: all), the two sides
    taking turns."""
    weights = np.array([severity(s) for s in scores])
    sides = []
    for answerable in (True, False):
        wrong = [i for i, s in enumerate(scores) if s.answerable == answerable and weights[i] > 0]
        sides.append(sorted(wrong, key=lambda i: -weights[i])[: -(-len(wrong) // 2)])
    turns = [i for both in zip_longest(*sides) for i in both if i is not None]
    return sorted(turns[: most or len(turns)])


def pairs(questions: Sequence[Question], responses: Sequence[str]) -> list[PreferencePair]:
    """Preference pairs: what should have been said against what was. Responses that say it already are left out."""
    found = [
        PreferencePair(q.id, prompt(q).turns, positive(q), response, q.kind)
        for q, response in zip(questions, responses)
        if response.strip() and response != positive(q)
    ]
    if not found:
        raise StudyError(
            "trust-align: no response is wrong, so there is no pair to learn from; raise n_train or temperature"
        )
    return found
