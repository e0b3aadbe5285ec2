"""Trust-Align (Song et al., ICLR 2025, arXiv 2409.11242, section 4): preference pairs for answers
that rest on documents.

An answerable question gives several prompts: its documents are recombined so that they hold fewer
of its claims, or none. The chosen answer states each claim that the documents hold and cites the
document, or refuses; the rejected one is a model's own answer. Of the answers with an error, the
worse half by severity is kept, separately for answerable and unanswerable prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from .. import require
from ..data.preferences import PreferencePair
from ..stats import generator
from .questions import prompt
from .trust_score import DOCUMENTS, REFUSAL, Claim, Document, Question, Scores, normalised

SEVERITY = {
    "unwarranted_refusal": 0.50,
    "over_responsiveness": 0.50,
    "overcitation": 0.34,
    "improper_citation": 0.26,
    "inaccurate_claims": 0.40,
}
"""Weight of each kind of error (the paper's table)."""


# --- recombined documents -------------------------------------------------------------------------


def recombined(questions: Sequence[Question], variants: int, seed: int = 0) -> list[Question]:
    """Each question as it is, and ``variants`` more of each answerable one, with other documents.

    The variants cycle through three: replace some of the documents that hold a claim (half, rounded
    up, but never all); replace all of them, which makes the question unanswerable; replace none and
    shuffle. Replacements are documents of the other questions, the most similar to the question
    first (TF-IDF). They are taken to hold none of its claims; documents with one of its aliases are
    skipped.
    """
    pool = list(dict.fromkeys((d.title, d.text) for q in questions for d in q.documents))
    texts = [f"{title} {text}" for title, text in pool]
    tfidf = TfidfVectorizer(stop_words="english").fit(texts)
    asked = tfidf.transform([q.question for q in questions])
    prompts = []
    for question, similarity in zip(questions, (asked @ tfidf.transform(texts).T).toarray()):
        prompts.append(question)
        if question.answerable:
            similar = [pool[i] for i in np.argsort(-similarity, kind="stable")]
            prompts += _variants(question, similar, variants, seed)
    return prompts


def _variants(
    question: Question, similar: Sequence[tuple[str, str]], variants: int, seed: int
) -> list[Question]:
    """``similar``: title and text of documents, the most similar first."""
    own = {(d.title, d.text) for d in question.documents}
    names = [normalised(alias) for claim in question.claims for alias in claim.aliases]
    others = []
    for other in similar:
        text = normalised(" ".join(other))
        if other not in own and not any(name in text for name in names):
            others.append(other)
    others = others[: 4 * DOCUMENTS]
    holding = [i for i, d in enumerate(question.documents) if any(d.answers_found)]
    needed = f"only {len(others)} documents of other questions to replace {len(holding)}"
    require(len(others) >= len(holding), f"trust-align: {question.id}: {needed}")
    counts = (min(-(-len(holding) // 2), len(holding) - 1), len(holding), 0)
    rng = generator(f"recombined/{question.id}/{seed}")
    made = []
    for number in range(variants):
        documents = list(question.documents)
        replacements = rng.permutation(len(others))
        places = rng.choice(holding, size=counts[number % 3], replace=False)
        for place, other in zip(places, replacements):
            documents[place] = Document(*others[other], (False,) * len(question.claims))
        order = rng.permutation(len(documents))
        shuffled = tuple(documents[i] for i in order)
        made.append(replace(question, id=f"{question.id}+{number + 1}", documents=shuffled))
    return made


# --- chosen answers -------------------------------------------------------------------------------


def fewest_documents(question: Question) -> list[int | None]:
    """The document to cite for each gold claim (None where none holds it), with few documents in
    all: greedily the first document that holds most of the claims not yet covered."""
    bits = np.array([d.answers_found for d in question.documents], dtype=bool)
    cited: list[int | None] = [None] * len(question.claims)
    uncovered = bits.any(0)
    while uncovered.any():
        best = int((bits & uncovered).sum(1).argmax())
        for claim in np.flatnonzero(bits[best] & uncovered):
            cited[claim] = best
        uncovered &= ~bits[best]
    return cited


def positive(question: Question) -> str:
    """The perfect answer: the claims that the documents hold, each with its citation, or a refusal
    where they hold none."""
    if not question.answerable:
        return REFUSAL
    in_list, parts = question.kind == "list", []
    for claim, document in zip(question.claims, fewest_documents(question)):
        if document is not None:
            text = _entry(claim) if in_list else (claim.text or claim.aliases[0]).rstrip(".")
            parts.append(f"{text} [{document + 1}]")
    return (", " if in_list else ". ").join(parts) + "."


def _entry(claim: Claim) -> str:
    """A name without commas, which separate the entries of a list."""
    return next((a for a in claim.aliases if "," not in a), claim.aliases[0].replace(",", ""))


# --- rejected answers -----------------------------------------------------------------------------


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
    """Indices of the responses to learn from, in order: of those with any error the worse half by
    severity, rounded up, separately for answerable and unanswerable questions. ``most``: at most
    this many in all (0: no limit), taken from the two in turn."""
    weights = np.array([severity(s) for s in scores])
    sides = []
    for answerable in (True, False):
        wrong = [i for i, s in enumerate(scores) if s.answerable == answerable and weights[i] > 0]
        sides.append(sorted(wrong, key=lambda i: -weights[i])[: -(-len(wrong) // 2)])
    turns = [i for both in zip_longest(*sides) for i in both if i is not None]
    return sorted(turns[: most or len(turns)])


def pairs(questions: Sequence[Question], responses: Sequence[str]) -> list[PreferencePair]:
    """Preference pairs: the perfect answer against the response, unless the response is empty or is
    the perfect answer."""
    made = []
    for q, response in zip(questions, responses):
        if response.strip() and response != positive(q):
            made.append(PreferencePair(q.id, prompt(q).turns, positive(q), response, q.kind))
    require(made, "trust-align: no response is wrong; raise n_train or temperature")
    return made
