"""Trust-Score (Song et al., ICLR 2025, arXiv 2409.11242): how well answers rest on the documents
that came with the question.

A question has five documents, gold claims A_G and, for every document, one bit per claim: does it
hold the claim? A_D are the claims that some document holds. A question with none is unanswerable
(not in A_g) and ought to be refused. A response holds the claims A_R; A_r are the answered
questions. Trust-Score is the mean of three parts, each between 0 and 1:

- **grounded refusal** F1_GR: the mean of F1 of refusing the unanswerable and F1 of answering the
  answerable;
- **answer correctness** F1_AC: with S the sum over answered answerable questions of |A_G ∩ A_D ∩
  A_R| / |A_G ∩ A_D|, precision is S / |A_r| and recall S / |A_g|, so that answering the
  unanswerable and refusing the answerable both count as 0;
- **grounded citation** F1_GC: over answered questions, the share of sentences that follow from the
  documents they cite (recall) and the share of citations that are needed for that (precision).

An ``EntailmentModel`` decides what follows from what; scores by different ones are not comparable.

Responses are read as a reader would. ``strict`` reads them as the authors' code does (trust-eval,
declare-lab/trust-align), where that is something else:

=============================  =============================  ================================
what is read                   here                           ``strict``
=============================  =============================  ================================
"So. [1] Or." or "So. [1]"     [1] belongs to the sentence    to the next one, or stands alone
                               before
"1." of a numbered list        no sentence                    a sentence without citation
an empty response              has no support (0)             left out of citations' means
"Answer:", "I", "Log"          answered: too short to be the  refused (a part of the refusal)
                               refusal
[1][1]                         one citation                   two
[1, 2]                         [1]; both go with the text     [1]; ", 2" stays, and splits lists
[0]                            out of range                   the last document
a gold answer "A", "?"         looked for as it is            in every text, in no list
parametric share of a list     claims in no document          of recall up to five hits
=============================  =============================  ================================

(Sentences end by the same few rules, not by NLTK's model, and ratios are rapidfuzz's, in both.)
Every part is a ratio of sums over questions, so resampling questions gives all intervals at once
(:func:`trust_score`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import pandas as pd
from rapidfuzz import fuzz

from .. import StudyError, require
from ..stats import (
    DETECTED,
    DRAWS,
    FEW,
    LEVEL,
    TAILS,
    UNCLEAR,
    Interval,
    generator,
    interval_words,
    verdict,
)

KINDS = ("short", "list", "long")
"""How claims are matched: short answers with aliases (as ASQA), a list of names (QAMPARI), prose
(ELI5, ExpertQA)."""

DOCUMENTS, MOST_CITATIONS, LIST_ENOUGH = 5, 3, 5

REFUSAL = "I apologize, but I couldn't find an answer to your question in the search results."
"""What the prompt asks for where no document holds an answer."""

REFUSAL_CORE = "I apologize, but I couldn't find an answer"
REFUSAL_THRESHOLD, REFUSAL_LENGTH = 85, 0.7
"""Refused: rapidfuzz's partial ratio of the normalised core in the normalised response is above the
threshold. (The authors used fuzzywuzzy, whose ratio differs: scores near the threshold can fall on
the other side.) Unlike theirs, the response must have at least ``REFUSAL_LENGTH`` of the core's
length, as the ratio finds any shorter text, such as "Answer:", inside the core."""

ABBREVIATIONS = "dr mr mrs ms st ste no vs etc approx jr sr a.m p.m e.g i.e u.s u.k".split()

EntailmentModel = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
"""(premise, hypothesis) pairs → does each hypothesis follow?"""


def entailed(entails: EntailmentModel, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """What the model says of the pairs, checked to be one yes or no each: a probability of .3 would
    pass for a yes."""
    said = list(entails(pairs)) if pairs else []
    require(len(said) == len(pairs), f"judge: {len(said)} answers to {len(pairs)} pairs")
    unclear = next((answer for answer in said if answer not in (0, 1)), None)
    require(unclear is None, f"judge: must say True or False of each pair, got {unclear}")
    return list(map(bool, said))


@dataclass(frozen=True)
class Claim:
    """A gold claim: a sentence ("" where a data set only has names), and for ``short`` and ``list``
    questions its aliases, the fullest first."""

    text: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """``answers_found``: one bit per gold claim."""

    title: str
    text: str
    answers_found: tuple[bool, ...]

    @property
    def premise(self) -> str:
        return f"Title: {self.title}\n{self.text}"


@dataclass(frozen=True)
class Question:
    """A question with its documents, cited as [1] to [5]."""

    id: str
    kind: str
    question: str
    claims: tuple[Claim, ...]
    documents: tuple[Document, ...]

    def __post_init__(self):
        if not self.claims or not self.documents:
            raise StudyError(f"{self.id}: needs at least one gold claim and one document")
        for claim in self.claims:
            if self.kind != "long" and not any(map(name_of, claim.aliases)):
                raise StudyError(f"{self.id}: claim {claim.text or claim.aliases!r} has no alias")
        for number, document in enumerate(self.documents, start=1):
            needs = f"document {number} needs one bit per claim in answers_found"
            require(len(document.answers_found) == len(self.claims), f"{self.id}: {needs}")

    @property
    def supported(self) -> tuple[bool, ...]:
        """Which gold claims some document holds."""
        return tuple(any(bits) for bits in zip(*(d.answers_found for d in self.documents)))

    @property
    def answerable(self) -> bool:
        return any(self.supported)


# --- reading a response ---------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def name_of(alias: str) -> str:
    """A short answer as it is looked for: normalised, unless nothing is left of it then (of blood
    type A)."""
    return normalised(alias) or "".join(c for c in alias.lower() if c.isalnum())


def without_citations(text: str) -> str:
    return re.sub(r"\s*\[\d+", "", text).replace(" |", "").replace("]", "")


def citations(sentence: str, strict: bool = False) -> list[int]:
    """Numbers cited, in order, each once: ``[1][2]``, and 1 of ``[1, 2]`` (the convention is one
    number per bracket)."""
    numbers = [int(number) for number in re.findall(r"\[(\d+)", sentence)]
    return numbers if strict else list(dict.fromkeys(numbers))


def one_number_per_bracket(response: str) -> str:
    """``[1, 2]`` → ``[1]``, as :func:`citations` reads it."""
    return re.sub(r"\[(\d+)(?:\s*[,;]\s*\d+)+\]", r"[\1]", response)


def refused(response: str, strict: bool = False) -> bool:
    """Does the response say that no answer was found? An empty one counts as answered, with no
    claim."""
    text, core = normalised(response), normalised(REFUSAL_CORE)
    long_enough = strict or len(text) >= REFUSAL_LENGTH * len(core)
    return long_enough and fuzz.partial_ratio(core, text) > REFUSAL_THRESHOLD


def sentences(response: str, strict: bool = False) -> list[str]:
    """Sentences with the citations that follow their full stop; a sentence has at least one letter.
    (By a few rules instead of NLTK's model: no sentence ends at an initial or one of
    ``ABBREVIATIONS``.)"""
    text, found, start = response.strip(), [], 0
    ends = r"""[.!?]["')\]]*(?:\s*\[\d+\])*(?:\s+(?=[^\s\[])|(?<=\])(?=[A-Z]))"""
    ends = r"""[.!?]["')\]]*\s+""" if strict else ends
    for end in re.finditer(ends, text):
        word = re.search(r"\S*$", text[start : end.start()])[0].lstrip("\"'([").lower()
        if text[end.start()] != "." or not (word in ABBREVIATIONS or re.fullmatch(r"[a-z]", word)):
            found.append(text[start : end.end()].strip())
            start = end.end()
    found.append(text[start:].strip())
    return [one for one in found if (one if strict else re.search(r"[^\W\d_]", one))]


def items(response: str, strict: bool = False) -> list[str]:
    """The entries of a list answer, separated by commas."""
    if strict:
        entries = response.rstrip().rstrip(".").rstrip(",").split(",")
        return [entry.strip() for entry in entries]
    entries = response.rstrip(" .\n").split(",")
    return [entry.strip() for entry in entries if without_citations(entry).strip(" .")]


# --- one response ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Scores of one response. ``correct``: AC of the question (0 where it is unanswerable or
    refused). ``parametric``: share of gold claims that the response holds and no document does.
    ``recall`` and ``precision``: of its citations. ``cites``: does it count in their means?"""

    answered: bool
    answerable: bool
    correct: float = 0.0
    parametric: float = 0.0
    recall: float = 0.0
    precision: float = 0.0
    cites: bool = True


def claims_found(
    question: Question, response: str, entails: EntailmentModel, strict: bool = False
) -> list[bool]:
    """Which gold claims the response holds, [claims]."""
    plain = without_citations(response)
    if question.kind == "long":
        return list(entails([(plain, claim.text) for claim in question.claims]))
    read = normalised if strict else name_of
    names = [set(map(read, claim.aliases)) for claim in question.claims]
    names = names if strict else [aliases - {""} for aliases in names]
    if question.kind == "list":
        entries = set(map(read, items(plain, strict))) - {""}
        return [not entries.isdisjoint(aliases) for aliases in names]
    # Anywhere in the text, as the authors match them: 79 is found in 1979, too.
    text = normalised(plain)
    return [any(alias in text for alias in aliases) for aliases in names]


def correctness(
    question: Question, response: str, found: Sequence[bool], strict: bool = False
) -> float:
    """AC of an answered question: the share of supported gold claims found; of a list, F1 of its
    precision and of its recall, for which five hits are enough."""
    supported = [i for i, held in enumerate(question.supported) if held]
    if not supported:
        return 0.0
    hits = sum(found[i] for i in supported)
    if question.kind != "list":
        return hits / len(supported)
    read = normalised if strict else name_of
    right = {read(alias) for i in supported for alias in question.claims[i].aliases}
    # "The" is no name, but "A" is one where it is a gold answer.
    texts = items(without_citations(response), strict)
    entries = [read(text) for text in texts if normalised(text) or read(text) in right - {""}]
    precision = _ratio(sum(entry in right for entry in entries), len(entries))
    return float(_f1(precision, min(LIST_ENOUGH, hits) / min(LIST_ENOUGH, len(supported))))


def citation_scores(
    question: Question, response: str, entails, strict: bool = False
) -> tuple[float, float]:
    """Citation recall (mean over sentences) and precision (over citations).

    A citation out of range leaves the whole sentence unsupported and its citations out of the
    precision. Of more than three citations the first three count. Of several citations that support
    a sentence together, one is superfluous if it does not support the sentence alone, the others
    still do, and (the authors' addition) it holds no gold claim that they hold.
    """

    def follow(text: str, cited: Sequence[Document]) -> bool:
        return bool(entails([("\n".join(d.premise for d in cited), text)])[0])

    in_list = question.kind == "list"
    parts = items(response, strict) if in_list else sentences(response, strict)
    n_supported = n_needed = n_cited = 0
    for part in parts:
        numbers = citations(part, strict)
        least = 0 if strict else 1
        if not numbers or not all(least <= i <= len(question.documents) for i in numbers):
            continue
        text = without_citations(part).strip()
        text = f"{question.question} {text}" if in_list else text
        cited = [question.documents[i - 1] for i in numbers[:MOST_CITATIONS]]
        n_cited += len(cited)
        if not follow(text, cited):
            continue
        n_supported += 1
        held = np.array([document.answers_found for document in cited])
        shared = (held & (held.sum(0) > 1)).any(1)  # which hold a claim that another holds, too
        for place, one in enumerate(cited):
            others = cited[:place] + cited[place + 1 :]
            needed = not others or shared[place] or follow(text, [one]) or not follow(text, others)
            n_needed += bool(needed)
    return float(_ratio(n_supported, len(parts))), float(_ratio(n_needed, n_cited))


def score_response(
    question: Question, response: str, entails: EntailmentModel, strict: bool = False
) -> Scores:
    require(isinstance(response, str), f"{question.id}: the response is no text: {response!r:.60}")
    response = response if strict else one_number_per_bracket(response)
    if refused(response, strict):
        return Scores(False, question.answerable)
    found = claims_found(question, response, entails, strict)
    correct = correctness(question, response, found, strict)
    held = sum(f and s for f, s in zip(found, question.supported))
    most = min(LIST_ENOUGH, len(found)) if strict and question.kind == "list" else len(found)
    parametric = (min(most, sum(found)) - min(most, held)) / most
    cites = bool(not strict or question.kind == "list" or response.strip())
    recall, precision = citation_scores(question, response, entails, strict)
    return Scores(True, question.answerable, correct, parametric, recall, precision, cites)


def score_responses(
    questions: Sequence[Question],
    responses: Sequence[str],
    entails: EntailmentModel,
    strict: bool = False,
) -> list[Scores]:
    """:func:`score_response` of many. The entailment model is asked in few large batches: a pass
    over all responses collects what is not known yet, until nothing is missing."""
    require(not isinstance(responses, str), "trust-score: responses must be a list of texts")
    if len(questions) != len(responses):
        raise StudyError(f"trust-score: {len(responses)} responses to {len(questions)} questions")
    known: dict[tuple[str, str], bool] = {}
    while True:
        missing: dict[tuple[str, str], None] = {}

        def look_up(pairs, missing=missing):
            missing.update(dict.fromkeys(pair for pair in pairs if pair not in known))
            return [known.get(pair, False) for pair in pairs]

        scores = [score_response(q, r, look_up, strict) for q, r in zip(questions, responses)]
        if not missing:
            return scores
        known.update(zip(missing, entailed(entails, list(missing))))


# --- all responses --------------------------------------------------------------------------------

PARTS = ("f1_refusal_grounded", "f1_answer_correctness", "f1_citation_grounded")
NAMES = dict(zip(PARTS, ("refusal", "correctness", "citation")))


def trust_score(scores: Sequence[Scores], name: str = "", draws: int = DRAWS) -> pd.DataFrame:
    """All metrics with 95 % intervals from resampled questions: columns metric, value, ci_low,
    ci_high, n."""
    n = len(scores)
    require(draws >= 1, f"draws: must be at least 1, got {draws}")
    value = _metrics(scores, np.ones((1, n))).iloc[0]
    low, high = np.quantile(_metrics(scores, _resamples(name, n, draws)), TAILS, axis=0)
    table = pd.DataFrame({"value": value, "ci_low": low, "ci_high": high, "n": n})
    return table.rename_axis("metric").reset_index()


def trust_score_change(
    after: Sequence[Scores], before: Sequence[Scores], name: str = "", draws: int = DRAWS
) -> pd.DataFrame:
    """Change of all metrics between two models on the same questions: columns metric, change,
    ci_low, ci_high, p, min_detectable, n.

    Intervals resample questions, the same for both models. p exchanges the two models' responses
    question by question at random (two-sided, add-one corrected). ``min_detectable``: the smallest
    true change found with 80 % power at the 5 % level; NaN where no response differs, as the spread
    is then unknown.
    """
    n, both = len(after), [*after, *before]
    require(draws >= 1, f"draws: must be at least 1, got {draws}")
    if n != len(before):
        raise StudyError(f"trust-score: {n} responses of one model, {len(before)} of the other")

    def change(weights: np.ndarray) -> pd.DataFrame:
        return _metrics(after, weights) - _metrics(before, weights)

    value, resampled = change(np.ones((1, n))).iloc[0], change(_resamples(name, n, draws))
    low, high = np.quantile(resampled, TAILS, axis=0)
    exchanged = generator(f"trust-score/{name}/exchanged").integers(2, size=(draws, n))
    first = np.hstack([1 - exchanged, exchanged])
    null = (_metrics(both, first) - _metrics(both, 1 - first)).abs()
    table = pd.DataFrame({"change": value, "ci_low": low, "ci_high": high})
    table["p"] = (1 + (null >= value.abs() - 1e-12).sum()) / (1 + draws)
    table["min_detectable"] = DETECTED * resampled.std(ddof=0).replace(0, np.nan)
    return table.assign(n=n).rename_axis("metric").reset_index()


def _resamples(name: str, n: int, draws: int) -> np.ndarray:
    """How often each question is drawn, [draws, n]."""
    return generator(f"trust-score/{name}").multinomial(n, np.full(n, 1 / n), size=draws)


def _ratio(above, below):
    """``above / below``, and 0 where ``below`` is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=np.greater(below, 0))


def _f1(precision, recall):
    return _ratio(2 * precision * recall, precision + recall)


def _metrics(scores: Sequence[Scores], weights: np.ndarray) -> pd.DataFrame:
    """Every metric, a column each, for every row of question weights [draws, questions]."""
    require(scores, "trust-score: no responses to score")
    columns = np.array([astuple(score) for score in scores], dtype=float).T
    answered, answerable, correct, parametric, recall, precision, cites = columns
    withheld, unanswerable = 1 - answered, 1 - answerable

    def share(part, whole):
        return _ratio(weights @ part, weights @ whole)

    def f1(part, first, second):
        return _f1(share(part, first), share(part, second))

    rates = {
        "answer_rate": share(answered, np.ones_like(answered)),
        "f1_refusing": f1(withheld * unanswerable, withheld, unanswerable),
        "f1_answering": f1(answered * answerable, answered, answerable),
        "unwarranted_refusal_rate": share(withheld * answerable, answerable),
        "over_response_rate": share(answered * unanswerable, unanswerable),
        "precision_correctness": share(correct, answered),
        "recall_correctness": share(correct, answerable),
        "citation_recall": share(recall * answered, answered * cites),
        "citation_precision": share(precision * answered, answered * cites),
        "parametric_share": share(parametric, answered),
    }
    parts = {
        "f1_refusal_grounded": (rates["f1_refusing"] + rates["f1_answering"]) / 2,
        "f1_answer_correctness": f1(correct, answered, answerable),
        "f1_citation_grounded": _f1(rates["citation_recall"], rates["citation_precision"]),
    }
    return pd.DataFrame({"trust_score": sum(parts.values()) / 3, **parts, **rates})


def words(changes: pd.DataFrame) -> list[str]:
    """One sentence per comparison of ``grounding_change.csv``: how Trust-Score and its parts
    changed. Clear is what both the interval and the exchange test call so; Trust-Score itself also
    after Holm's correction."""
    sentences = []
    for (model, baseline), rows in changes.groupby(["model", "baseline"], sort=False):
        rows = rows.set_index("metric")
        found = Interval.of_row(rows.loc["trust_score"], "change")
        if found.n < FEW:
            said = interval_words(Interval(found.value, np.nan, np.nan, found.n), unit="questions")
            sentences.append(f"**{model}** against {baseline}: Trust-Score {said}, so no verdict.")
            continue
        verdicts = {
            m: verdict(r["ci_low"], r["ci_high"], worse=-1) if r["p"] < 1 - LEVEL else UNCLEAR
            for m, r in rows.iterrows()
        }
        whole, conclusion = rows.loc["trust_score"], verdicts["trust_score"]
        if conclusion != UNCLEAR and whole["p_holm"] > 1 - LEVEL:
            conclusion += " by this interval alone, but not after Holm's correction"
        change = interval_words(found, unit="questions")
        smallest = whole["min_detectable"]
        power = f"minimum detectable change {smallest:.3f}, " if smallest > 0 else ""
        parts = [f"{NAMES[m]} {rows.loc[m, 'change']:+.3f} ({verdicts[m]})" for m in PARTS]
        sentences.append(
            f"**{model}** against {baseline}: Trust-Score {change}, {power}Holm-corrected p = "
            f"{whole['p_holm']:.2g}: {conclusion}. By part: {', '.join(parts)}."
        )
    return sentences
