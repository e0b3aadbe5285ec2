"""Trust-Score (Song et al., ICLR 2025, arXiv 2409.11242): how far an answer rests on the documents that came with the question.

A question has five documents, gold claims A_G, and for every document a bit a claim: does it hold the claim? A_D are the claims
that some document holds; a question with none is unanswerable (¬A_g) and ought to be refused. A response holds the claims
A_R. Three parts, each between 0 and 1, and their mean:

- **grounded refusal** F1_GR: F1 of refusing the unanswerable and F1 of answering the answerable, averaged;
- **answer correctness** F1_AC: with S the sum over answered answerable questions of |A_G ∩ A_D ∩ A_R| / |A_G ∩ A_D|, precision is
  S over the answered, recall S over the answerable, so that an answer where there is none to give and a refusal where there
  was one both count as 0;
- **grounded citation** F1_GC: of the answered, how often a sentence follows from the documents it cites (recall), and how often
  a citation is needed for that (precision).

What follows from what is decided by a ``EntailmentModel``; figures by different judges are not comparable. Every part is a ratio of sums
over questions, so resampling questions gives all intervals at once (:func:`trust_score`).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from rapidfuzz import fuzz

from .. import StudyError
from ..stats import DETECTED, DRAWS, LEVEL, TAILS, generator, holm

KINDS = ("short", "list", "long")
"""How claims are matched: short answers with aliases (as ASQA), a list of names (QAMPARI), prose (ELI5, ExpertQA)."""

DOCUMENTS, MOST_CITATIONS, LIST_ENOUGH = 5, 3, 5

REFUSAL = "I apologize, but I couldn't find an answer to your question in the search results."
"""What the prompt asks for where no document holds an answer."""

REFUSAL_CORE, REFUSAL_THRESHOLD, REFUSAL_LENGTH = (
    "I apologize, but I couldn't find an answer",
    85,
    0.7,
)
"""Refused: rapidfuzz's partial ratio of the normalised core in the normalised response is above the threshold. (The authors
used fuzzywuzzy, whose ratio differs: scores near the threshold can fall on the other side.) A departure: the response must have
that share of the core's length, as the ratio finds any shorter text, such as "Answer:", inside the core."""

ABBREVIATIONS = frozenset(
    "dr mr mrs ms st ste no vs etc approx jr sr a.m p.m e.g i.e u.s u.k".split()
)

EntailmentModel = Callable[[Sequence[tuple[str, str]]], Sequence[bool]]
"""(premise, hypothesis) pairs → does each hypothesis follow?"""


@dataclass(frozen=True)
class Claim:
    """A gold claim: a sentence ("" where a data set only has names), and for ``short`` and ``list`` questions the names that
    count as it, the fullest first."""

    text: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """``answers_found``: a bit a gold claim."""

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
        if self.kind not in KINDS:
            raise StudyError(
                f"{self.id}: kind must be one of {', '.join(KINDS)}, got {self.kind!r}"
            )
        if not self.claims or not self.documents:
            raise StudyError(f"{self.id}: needs at least one gold claim and one document")
        for claim in self.claims:
            if self.kind != "long" and not any(map(normalised, claim.aliases)):
                raise StudyError(
                    f"{self.id}: claim {claim.text or claim.aliases!r} has no alias to look for"
                )
        for number, document in enumerate(self.documents, start=1):
            if len(document.answers_found) != len(self.claims):
                raise StudyError(
                    f"{self.id}: document {number} has {len(document.answers_found)} bits in answers_found for "
                    f"{len(self.claims)} claims"
                )

    @property
    def supported(self) -> tuple[bool, ...]:
        """Which gold claims some document holds."""
        return tuple(any(bits) for bits in zip(*(d.answers_found for d in self.documents)))

    @property
    def answerable(self) -> bool:
        return any(self.supported)


# --- reading a response --------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """Lower case without punctuation, articles and spare blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def without_citations(text: str) -> str:
    return re.sub(r"\s*\[\d+", "", text).replace(" |", "").replace("]", "")


def citations(sentence: str) -> list[int]:
    """Numbers cited, in order, each once: ``[1][2]``, and 1 of ``[1, 2]`` (the convention is one number a bracket)."""
    return list(dict.fromkeys(int(number) for number in re.findall(r"\[(\d+)", sentence)))


def refused(response: str) -> bool:
    """Does the response say that no answer was found? An empty one counts as answered, and finds nothing."""
    said, core = normalised(response), normalised(REFUSAL_CORE)
    return (
        len(said) >= REFUSAL_LENGTH * len(core)
        and fuzz.partial_ratio(core, said) > REFUSAL_THRESHOLD
    )


def sentences(response: str) -> list[str]:
    """Sentences with the citations that follow their full stop; what has no letter is none. (By a few rules, not NLTK's model:
    no sentence ends at an initial or one of ``ABBREVIATIONS``.)"""
    text, found, start = response.strip(), [], 0
    for end in re.finditer(
        r"""[.!?]["')\]]*(?:\s*\[\d+\])*(?:\s+(?=[^\s\[])|(?<=\])(?=[A-Z]))""", text
    ):
        word = re.search(r"\S*$", text[start : end.start()])[0].lstrip("\"'([").lower()
        if text[end.start()] != "." or not (word in ABBREVIATIONS or re.fullmatch(r"[a-z]", word)):
            found.append(text[start : end.end()].strip())
            start = end.end()
    return [
        sentence for sentence in (*found, text[start:].strip()) if re.search(r"[^\W\d_]", sentence)
    ]


def one_number_a_bracket(response: str) -> str:
    """``[1, 2]`` → ``[1]``: what the convention, one number a bracket, reads of it."""
    return re.sub(r"\[(\d+)(?:\s*[,;]\s*\d+)+\]", r"[\1]", response)


def items(response: str) -> list[str]:
    """The entries of a list answer, which commas separate."""
    return [
        item.strip()
        for item in response.rstrip(" .\n").split(",")
        if without_citations(item).strip(" .")
    ]


# --- one response --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What one response earns. ``correct``: AC of the question (0 where it is unanswerable or refused); ``parametric``: share of
    gold claims that the response holds and no document does (exact match over all gold less over what documents hold, both out
    of all); ``recall`` and ``precision`` of its citations; how many ``sentences`` it has, and how many citations were judged
    (``cited``)."""

    answered: bool
    answerable: bool
    correct: float
    parametric: float
    recall: float
    precision: float
    sentences: int
    cited: int


def claims_found(question: Question, response: str, judge: EntailmentModel) -> list[bool]:
    """Which gold claims the response holds, [claims]."""
    plain = without_citations(response)
    if question.kind == "long":
        return [bool(x) for x in judge([(plain, claim.text) for claim in question.claims])]
    if (
        question.kind == "short"
    ):  # anywhere in the text, as the authors look for them: 79 is found in 1979, too
        text = normalised(plain)
        return [
            any(alias and alias in text for alias in map(normalised, claim.aliases))
            for claim in question.claims
        ]
    named = {normalised(item) for item in items(plain)}
    return [not named.isdisjoint(map(normalised, claim.aliases)) for claim in question.claims]


def correctness(question: Question, response: str, found: Sequence[bool]) -> float:
    """AC of an answered question: share of supported gold claims found; of a list F1 of its precision and of its recall, for
    which five hits are enough."""
    held = [f for f, supported in zip(found, question.supported) if supported]
    if not held:
        return 0.0
    if question.kind != "list":
        return sum(held) / len(held)
    named = [normalised(item) for item in items(without_citations(response))]
    right = {
        normalised(alias)
        for claim, ok in zip(question.claims, question.supported)
        if ok
        for alias in claim.aliases
    }
    precision = sum(name in right for name in named) / len(named) if named else 0.0
    recall = min(LIST_ENOUGH, sum(held)) / min(LIST_ENOUGH, len(held))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def citation_scores(
    question: Question, response: str, judge: EntailmentModel
) -> tuple[float, float, int, int]:
    """Citation recall (mean over sentences), precision (over citations), and how many of each there are.

    A citation out of range leaves the whole sentence unsupported and its citations out of the precision. Of more than three
    citations the first three count. Of several that support a sentence together, one is superfluous if it does not
    support the sentence alone, the others still do, and (the authors' addition) it holds no gold claim that they hold.
    """
    bits = [d.answers_found for d in question.documents]
    total, cited = _statements(question, response)
    entailed = [bool(x) for x in judge([_asked(question, *one) for one in cited])]
    several = [
        (text, numbers, i)
        for (text, numbers), ok in zip(cited, entailed)
        if ok and len(numbers) > 1
        for i in numbers
    ]
    alone = judge([_asked(question, text, [i]) for text, _, i in several])
    rest = judge(
        [_asked(question, text, [k for k in numbers if k != i]) for text, numbers, i in several]
    )
    needed = sum(len(numbers) == 1 and ok for (_, numbers), ok in zip(cited, entailed))
    for (_, numbers, i), by_itself, by_others in zip(several, alone, rest):
        overlaps = any(
            bits[i][claim] and any(bits[k][claim] for k in numbers if k != i)
            for claim in range(len(question.claims))
        )
        needed += bool(by_itself or not by_others or overlaps)
    citations_judged = sum(len(numbers) for _, numbers in cited)
    return (
        sum(entailed) / total if total else 0.0,
        needed / citations_judged if citations_judged else 0.0,
        total,
        citations_judged,
    )


def _statements(question: Question, response: str) -> tuple[int, list[tuple[str, list[int]]]]:
    """How many statements a response makes, and those whose citations can be looked up: text and document indices."""
    parts = items(response) if question.kind == "list" else sentences(response)
    prefix = f"{question.question} " if question.kind == "list" else ""
    stated = [
        (prefix + without_citations(part).strip(), [number - 1 for number in citations(part)])
        for part in parts
    ]
    return len(stated), [
        (text, numbers[:MOST_CITATIONS])
        for text, numbers in stated
        if numbers and all(0 <= i < len(question.documents) for i in numbers)
    ]


def _asked(question: Question, text: str, numbers: Sequence[int]) -> tuple[str, str]:
    """What a judge is asked: do these documents together hold the text?"""
    return "\n".join(question.documents[i].premise for i in numbers), text


def score_response(question: Question, response: str, judge: EntailmentModel) -> Scores:
    response = one_number_a_bracket(response)
    if refused(response):
        return Scores(False, question.answerable, 0.0, 0.0, 0.0, 0.0, 0, 0)
    found = claims_found(question, response, judge)
    from_memory = sum(f and not s for f, s in zip(found, question.supported)) / len(found)
    return Scores(
        True,
        question.answerable,
        correctness(question, response, found),
        from_memory,
        *citation_scores(question, response, judge),
    )


def score_responses(
    questions: Sequence[Question], responses: Sequence[str], judge: EntailmentModel
) -> list[Scores]:
    """The same for many, the judge asked about all of them at once (apart from what depends on its first answers)."""
    if len(questions) != len(responses):
        raise StudyError(f"trust-score: {len(responses)} responses to {len(questions)} questions")
    known: dict[tuple[str, str], bool] = {}

    def remembering(pairs: Sequence[tuple[str, str]]) -> list[bool]:
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        known.update(zip(new, judge(new) if new else ()))
        return [known[pair] for pair in pairs]

    for_all: list[tuple[str, str]] = []
    for question, response in zip(questions, map(one_number_a_bracket, responses)):
        if not refused(response):
            claims_found(
                question, response, lambda pairs: for_all.extend(pairs) or [False] * len(pairs)
            )
            for_all += [_asked(question, *one) for one in _statements(question, response)[1]]
    remembering(for_all)
    return [
        score_response(question, response, remembering)
        for question, response in zip(questions, responses)
    ]


# --- all responses -------------------------------------------------------------------------------------------------

NAMES = {
    "f1_refusal_grounded": "refusal",
    "f1_answer_correctness": "correctness",
    "f1_citation_grounded": "citation",
}
PARTS = tuple(NAMES)
METRICS = (
    "trust_score",
    *PARTS,
    "answer_rate",
    "f1_refusing",
    "f1_answering",
    "unwarranted_refusal_rate",
    "over_response_rate",
    "precision_correctness",
    "recall_correctness",
    "citation_recall",
    "citation_precision",
    "parametric_share",
)


def trust_score(scores: Sequence[Scores], name: str = "", draws: int = DRAWS) -> pd.DataFrame:
    """All parts with 95 % intervals from resampled questions: columns metric, value, ci_low, ci_high, n."""
    if not scores:
        raise StudyError("trust-score: no responses to score")
    n = len(scores)
    weights = (
        generator(f"trust-score/{name}").multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    )
    values, resampled = _metrics(scores, np.ones((1, n))), _metrics(scores, weights)
    rows = [
        (metric, float(values[metric][0]), *np.quantile(resampled[metric], TAILS), n)
        for metric in METRICS
    ]
    return pd.DataFrame(rows, columns=["metric", "value", "ci_low", "ci_high", "n"])


def trust_score_change(
    after: Sequence[Scores], before: Sequence[Scores], name: str = "", draws: int = DRAWS
) -> pd.DataFrame:
    """Change of all parts between two models on the same questions: columns metric, change, ci_low, ci_high, p, min_detectable, n.

    Intervals resample questions, the same for both models. p exchanges the two models' responses question by question at random
    (two-sided, add-one corrected). ``min_detectable``: the smallest true change found with 80 % power at the 5 % level; NaN
    where no response differs, which says nothing about its spread.
    """
    n = len(after)
    if n != len(before) or not n:
        raise StudyError(
            f"trust-score: {n} responses of one model against {len(before)} of the other; both must answer the same questions"
        )
    weights = (
        generator(f"trust-score/{name}").multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    )
    exchanged = (
        generator(f"trust-score/{name}/exchanged").integers(2, size=(draws, n)).astype(float)
    )
    both, once = [*after, *before], np.ones((1, n))
    change, resampled = (
        _differences(_metrics(after, w), _metrics(before, w)) for w in (once, weights)
    )
    null = _differences(
        _metrics(both, np.hstack([1 - exchanged, exchanged])),
        _metrics(both, np.hstack([exchanged, 1 - exchanged])),
    )
    rows = []
    for metric in METRICS:
        value = float(change[metric][0])
        p = (1 + int((np.abs(null[metric]) >= abs(value) - 1e-12).sum())) / (1 + draws)
        smallest = float(DETECTED * resampled[metric].std()) or float("nan")
        rows.append((metric, value, *np.quantile(resampled[metric], TAILS), p, smallest, n))
    return pd.DataFrame(
        rows, columns=["metric", "change", "ci_low", "ci_high", "p", "min_detectable", "n"]
    )


def _differences(
    first: dict[str, np.ndarray], second: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {metric: first[metric] - second[metric] for metric in METRICS}


def _metrics(scores: Sequence[Scores], weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every metric for every row of question weights [draws, questions]; what has nothing below its line is 0."""
    answered, answerable = (
        np.array([getattr(s, field) for s in scores], dtype=float)
        for field in ("answered", "answerable")
    )
    correct, parametric, recall, precision = (
        np.array([getattr(s, field) for s in scores])
        for field in ("correct", "parametric", "recall", "precision")
    )

    def ratio(above, below):
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def f1(first, second):
        return ratio(2 * first * second, first + second)

    def total(x):
        return weights @ x

    hits, misses = total(answered * answerable), total((1 - answered) * (1 - answerable))
    m = {
        "answer_rate": ratio(total(answered), weights.sum(1)),
        "f1_refusing": f1(ratio(misses, total(1 - answered)), ratio(misses, total(1 - answerable))),
        "f1_answering": f1(ratio(hits, total(answered)), ratio(hits, total(answerable))),
        "unwarranted_refusal_rate": ratio(total((1 - answered) * answerable), total(answerable)),
        "over_response_rate": ratio(total(answered * (1 - answerable)), total(1 - answerable)),
        "precision_correctness": ratio(total(correct), total(answered)),
        "recall_correctness": ratio(total(correct), total(answerable)),
        "citation_recall": ratio(total(recall * answered), total(answered)),
        "citation_precision": ratio(total(precision * answered), total(answered)),
        "parametric_share": ratio(total(parametric), total(answered)),
    }
    m["f1_refusal_grounded"] = (m["f1_refusing"] + m["f1_answering"]) / 2
    m["f1_answer_correctness"] = f1(m["precision_correctness"], m["recall_correctness"])
    m["f1_citation_grounded"] = f1(m["citation_recall"], m["citation_precision"])
    m["trust_score"] = (
        m["f1_refusal_grounded"] + m["f1_answer_correctness"] + m["f1_citation_grounded"]
    ) / 3
    return m


def grounding_table(scores: Mapping[str, Sequence[Scores]], judge: str, seed: int) -> pd.DataFrame:
    """Rows of ``grounding.csv``: all parts of every model (name → scores of its responses), by one judge."""
    return pd.concat(
        [
            trust_score(of_model, name).assign(model=name, judge=judge, seed=seed)
            for name, of_model in scores.items()
        ],
        ignore_index=True,
    )


def grounding_changes(
    scores: Mapping[str, Sequence[Scores]],
    comparisons: Sequence[tuple[str, str]],
    judge: str,
    seed: int,
) -> pd.DataFrame:
    """Rows of ``grounding_change.csv``: each (model, baseline), with Holm's correction over the changes of the whole score."""
    rows = [
        trust_score_change(scores[model], scores[baseline], f"{model}-{baseline}").assign(
            model=model, baseline=baseline, judge=judge, seed=seed
        )
        for model, baseline in comparisons
    ]
    found = pd.concat(rows, ignore_index=True)
    whole = found["metric"] == "trust_score"
    found["p_holm"] = float("nan")
    found.loc[whole, "p_holm"] = holm(found.loc[whole, "p"].to_numpy())
    return found


def words(changes: pd.DataFrame) -> list[str]:
    """What each change of ``grounding_change.csv`` did to Trust-Score, and to which of its parts; one sentence a change.

    An interval that excludes zero is not enough where the exchange test, corrected for all changes, does not agree.
    """
    found = []
    for (model, baseline), part in changes.groupby(["model", "baseline"], sort=False):
        part = part.set_index("metric")
        whole = part.loc["trust_score"]
        verdict = _verdict(whole)
        if verdict != "no clear change" and whole["p_holm"] > 1 - LEVEL:
            verdict += (
                " by this interval alone, which the test of all changes together does not bear out"
            )
        text = (
            f"**{model}** against {baseline}: Trust-Score {whole['change']:+.3f} (95 % interval {whole['ci_low']:+.3f} to {whole['ci_high']:+.3f}, "
            f"n = {whole['n']} questions"
            + (
                f", which show changes of {whole['min_detectable']:.3f} or more"
                if whole["min_detectable"] > 0
                else ""
            )
            + f"; Holm-corrected p = {whole['p_holm']:.2g}): {verdict}."
        )
        of_parts = {
            kind: [name for name in PARTS if _verdict(part.loc[name]) == kind]
            for kind in ("better", "worse", "no clear change")
        }
        text += (
            " By part: "
            + "; ".join(
                f"{kind} in "
                + ", ".join(f"{NAMES[n]} ({part.loc[n, 'change']:+.3f})" for n in names)
                for kind, names in of_parts.items()
                if names
            )
            + "."
        )
        found.append(text)
    return found


def _verdict(row: pd.Series) -> str:
    return "better" if row["ci_low"] > 0 else "worse" if row["ci_high"] < 0 else "no clear change"


def trivial(questions: Sequence[Question], answers: bool) -> list[Scores]:
    """A baseline that answers everything, or refuses everything, and gets nothing else right."""
    return [Scores(answers, q.answerable, 0.0, 0.0, 0.0, 0.0, 0, 0) for q in questions]
