"""Trust-Score against its definition, question by question, and the specification's constants."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from rlhf_trust import StudyError
from rlhf_trust.rag import trust_score as ts
from rlhf_trust.rag.trust_score import Claim, Document, Question, Scores


def question(bits, kind="short", names=(("1932",), ("Ida Kessland", "Kessland")), key="q"):
    """A question with documents D0, D1, …; ``bits`` [documents][claims]: which claims they hold."""
    claims = tuple(Claim(f"claim {i}", of_claim) for i, of_claim in enumerate(names))
    rows = enumerate(tuple(map(bool, row)) for row in bits)
    documents = tuple(Document(f"T{i}", f"D{i}", row) for i, row in rows)
    return Question(key, kind, "When, and who?", claims, documents)


def means(scores, draws=2):
    """Trust-Score and all other metrics, by name."""
    return ts.trust_score(scores, draws=draws).set_index("metric")["value"]


def entails(holds):
    """An entailment model from a table: hypothesis → the sets of documents that suffice for it."""

    def decide(pairs):
        return [
            any(all(f"D{i}" in premise for i in enough) for enough in holds.get(hypothesis, ()))
            for premise, hypothesis in pairs
        ]

    return decide


SUBSETS = ((1, 0), (0, 1), (0, 0), (0, 0), (0, 0))
NOTHING = ((0, 0),) * 5


# --- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answerable", "unanswerable", "always_answers", "always_refuses"),
    [(610, 338, 39.15, 26.28), (295, 705, 22.78, 41.35), (207, 793, 17.15, 44.23)],
)
def test_trivial_baselines_have_the_papers_values(
    answerable, unanswerable, always_answers, always_refuses
):
    asked = [question(SUBSETS)] * answerable + [question(NOTHING)] * unanswerable
    for answers, expected in ((True, always_answers), (False, always_refuses)):
        found = means([Scores(answers, q.answerable) for q in asked])
        assert 100 * found["f1_refusal_grounded"] == pytest.approx(expected, abs=0.005)
        assert found["answer_rate"] == answers
        assert found["f1_answer_correctness"] == found["f1_citation_grounded"] == 0


# --- reading --------------------------------------------------------------------------------------


def test_what_is_read_of_a_response():
    assert ts.normalised("The Varnholm  Bridge, an arch!") == "varnholm bridge arch"
    cited = "Opened in 1932 [1][2]. By her [3] | too."
    assert ts.without_citations(cited) == "Opened in 1932. By her too."
    assert ts.citations("So [2][1][2].") == [2, 1]
    assert ts.citations("So [1,2].") == [1] and ts.citations("None.") == []
    three = ["It opened in 1932 [1].", "She drew it. [2] [3]", "And so on"]
    assert ts.sentences(" ".join(three)) == three
    assert ts.sentences("") == ts.sentences("[1].") == []
    assert ts.sentences("1. It opened [1].") == ["It opened [1]."]
    whole = "Dr. J. K. Thrupp of St. Ebba, U.S. army, slept approx. 3.5 h at 10 a.m. on Monday [1]."
    assert ts.sentences(whole) == [whole]
    four = ['He said "so." [1]', '"Why?"', "(She left.) [2] [3]", "Yes"]
    assert ts.sentences(" ".join(four)) == four
    assert ts.sentences("It opened. [1]She drew it [2].") == ["It opened. [1]", "She drew it [2]."]
    assert ts.one_number_per_bracket("So [1, 2]. Or [3; 4,5], [6].") == "So [1]. Or [3], [6]."
    listed = ts.items("Gale Street [1], Saint Ebba's [2],  , [3].")
    assert listed == ["Gale Street [1]", "Saint Ebba's [2]"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ts.REFUSAL, True),
        ("I apologize, but I couldn't find an answer.", True),
        ("It was 1932. " + ts.REFUSAL, True),
        ("I'm sorry, but I couldn't find an answer.", True),
        ("I couldn't find any answer in the documents.", False),
        ("Answer:", False),
        ("I", False),
        ("But", False),
        ("The bridge was opened in 1932.", False),
        ("", False),
    ],
)
def test_refusals(text, expected):
    assert ts.refused(text) is expected


@pytest.mark.parametrize(
    ("response", "reader", "strict"),
    [
        # (Trust-Score, recall and precision of citations) of one answerable question, in per cent.
        ("1932, by Kessland. [1]", (83.3, 100, 100), (50.0, 0, 0)),
        ("1932, by Kessland [1].", (83.3, 100, 100), (83.3, 100, 100)),
        ("1932, by Kessland [1][1].", (83.3, 100, 100), (83.3, 100, 100)),
        ("1932, by Kessland [0].", (50.0, 0, 0), (83.3, 100, 100)),
        ("Answer:", (16.7, 0, 0), (0.0, 0, 0)),  # refused: no answerable question is answered
    ],
)
def test_strict_reads_as_the_authors_code(response, reader, strict):
    asked = question(((1, 1),) * 5)
    for how, wanted in ((False, reader), (True, strict)):
        scores = ts.score_responses(
            [asked], [response], lambda pairs: ["1932" in text for _, text in pairs], strict=how
        )
        table = ts.trust_score(scores, draws=2).set_index("metric")["value"]
        found = table[["trust_score", "citation_recall", "citation_precision"]]
        np.testing.assert_allclose(100 * found, wanted, atol=0.05)


def test_strict_leaves_empty_responses_out_of_citations_means():
    asked, said = [question(((1, 1),) * 5)] * 2, ["1932, by Kessland [1].", ""]
    recalls = [
        means(ts.score_responses(asked, said, lambda pairs: [True] * len(pairs), strict))[
            "citation_recall"
        ]
        for strict in (False, True)
    ]
    assert recalls == [0.5, 1.0]


def test_strict_parametric_share_of_a_list_is_of_five():
    names = tuple((f"Name {i}",) for i in range(10))
    asked = question([[1] * 4 + [0] * 6] + [[0] * 10] * 4, "list", names)
    said = ", ".join(f"Name {i}" for i in range(8))
    found = [ts.score_response(asked, said, entails({}), s).parametric for s in (False, True)]
    assert found == pytest.approx([0.4, 0.2])


# --- one response ---------------------------------------------------------------------------------


def test_correctness_counts_what_documents_hold():
    both, one = question(SUBSETS), question(((1, 0),) + NOTHING[1:])
    said = "The bridge opened in 1932 [1]."
    assert ts.score_response(both, said, entails({})).correct == 0.5
    assert ts.score_response(one, said, entails({})).correct == 1.0
    knows = ts.score_response(one, "Kessland built it in 1932.", entails({}))
    assert (knows.correct, knows.parametric) == (1.0, 0.5)
    nothing = ts.score_response(question(NOTHING), said, entails({}))
    assert nothing == Scores(True, False, 0.0, 0.5, nothing.recall, nothing.precision)
    assert ts.score_response(both, ts.REFUSAL, entails({})) == Scores(False, True)
    empty = ts.score_response(both, "", entails({}))
    assert (empty.answered, empty.correct, empty.recall, empty.precision) == (True, 0.0, 0.0, 0.0)


def test_lists_are_matched_name_by_name():
    names = tuple((f"Name {i}",) for i in range(7))
    asked = question([[1] * 7] + [[0] * 7] * 4, "list", names)

    def correct(response, asked=asked):
        return ts.score_response(asked, response, entails({})).correct

    assert correct("Name 0, Name 1, Name 2, name 3., Name 4") == 1.0  # five hits are enough
    assert correct("Name 0 [1], Other [2]") == pytest.approx(2 * 0.5 * 0.2 / 0.7)
    assert correct("Name 0 and Name 1") == 0.0
    # Precision counts every entry.
    assert correct("Name 0, Name 0, Name 0, Other") == pytest.approx(2 * 0.75 * 0.2 / 0.95)
    assert correct("Name 0, The, !!!") == correct("Name 0")
    one = question([[1, 0]] + [[0, 0]] * 4, "list")
    assert correct("1932, Kessland", one) == pytest.approx(2 * 0.5 / 1.5)


def test_long_answers_are_matched_by_the_entails():
    def decide(pairs):
        return [pair == ("A long answer.", "claim 1") for pair in pairs]

    asked = question(SUBSETS, "long", ((), ()))
    assert ts.claims_found(asked, "A long answer [1].", decide) == [False, True]


def test_citations_one_by_one():
    asked = question(((1, 0), (1, 0), (0, 1), (0, 0), (0, 0)))
    holds = {"A.": [{0}, {1}], "B.": [{0, 2}], "C.": [{3}]}
    wanted = {
        "A [1].": (1.0, 1.0),
        "A.": (0.0, 0.0),
        "A [9].": (0.0, 0.0),
        "A [1][2].": (1.0, 1.0),  # either is enough alone
        "A [1][4].": (1.0, 0.5),  # [4] adds nothing
        "B [1][3].": (1.0, 1.0),  # both are needed
        "B [1].": (0.0, 0.0),
        "C [4][5][1][3].": (1.0, 1 / 3),  # the fourth is not read
        "A [1]. B.": (0.5, 1.0),
        "A [1]. B [9].": (0.5, 1.0),  # out of range: no support, and not part of the precision
        "A [4].": (0.0, 0.0),
    }
    assert {text: ts.citation_scores(asked, text, entails(holds)) for text in wanted} == wanted
    listed = entails({"When, and who? Kessland": [{1}]})
    found = ts.citation_scores(question(SUBSETS, "list"), "Kessland [2], 1932 [2]", listed)
    assert found == (0.5, 0.5)
    # A citation that shares a claim with the others is not superfluous, though they suffice.
    same = question(((1, 0), (1, 0), (1, 0), (0, 0), (0, 0)))
    found = ts.citation_scores(same, "Z [1][2][3].", entails({"Z.": [{0, 1}, {1, 2}]}))
    assert found == (1.0, 1.0)
    apart = question(((1, 0), (0, 1), (0, 0), (0, 0), (0, 0)))
    found = ts.citation_scores(apart, "Z [1][2][3].", entails({"Z.": [{0, 1}]}))
    assert found == (1.0, pytest.approx(2 / 3))


@settings(max_examples=150, deadline=None)
@given(
    cited=st.lists(st.lists(st.integers(1, 6), max_size=4, unique=True), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    bits=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=5, max_size=5),
)
def test_citations_are_counted_as_the_paper_says(cited, seed, bits):
    """Against the definition written out with sets, one sentence and one citation at a time."""
    asked = question(bits)
    # By sentence and set of documents.
    holds = np.random.default_rng(seed).random((len(cited), 2**6)) < 0.5

    def follows(sentence, documents):
        return bool(holds[sentence, sum(2**i for i in documents)])

    def table_model(pairs):
        decisions = []
        for premise, text in pairs:
            documents = [i for i in range(5) if f"D{i}" in premise]
            decisions.append(follows(int(text.split()[1].rstrip(".")), documents))
        return decisions

    brackets = ["".join(f" [{number}]" for number in numbers) for numbers in cited]
    response = " ".join(f"Sentence {i}{cites}." for i, cites in enumerate(brackets))
    supported, good, total = [], 0, 0
    for sentence, numbers in enumerate(cited):
        if not numbers or max(numbers) > 5:  # no citation, or one out of range
            supported.append(False)
            continue
        documents = [c - 1 for c in numbers[:3]]
        supported.append(follows(sentence, documents))
        total += len(documents)
        for one in documents:
            rest = [other for other in documents if other != one]
            if not supported[-1]:
                continue
            needed = not rest or not follows(sentence, rest)
            shares_a_claim = any(
                bits[one][claim] and any(bits[other][claim] for other in rest) for claim in (0, 1)
            )
            good += follows(sentence, [one]) or needed or shares_a_claim
    found = ts.citation_scores(asked, response, table_model)
    expected = sum(supported) / len(cited), good / total if total else 0.0
    assert found == pytest.approx(expected)


# --- all responses --------------------------------------------------------------------------------


def scored(answered, answerable, correct, recall, precision):
    """Scores as they can be: only answers have citations, only answerable questions are right."""
    correct = correct if answered and answerable else 0.0
    recall, precision = (recall, precision) if answered else (0.0, 0.0)
    return Scores(answered, answerable, correct, 0.0, recall, precision)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
        min_size=1,
        max_size=12,
    )
)
def test_the_parts_are_their_definitions(rows):
    scores = [scored(*row) for row in rows]
    found = means(scores)
    answered = {i for i, s in enumerate(scores) if s.answered}
    answerable = {i for i, s in enumerate(scores) if s.answerable}
    everything = set(range(len(scores)))

    def f1(p, r):
        return 2 * p * r / (p + r) if p + r else 0.0

    def over(a, b):
        return a / b if b else 0.0

    def f1_of_sets(some, others):
        both = len(some & others)
        return f1(over(both, len(some)), over(both, len(others)))

    refusing = f1_of_sets(everything - answered, everything - answerable)
    answering = f1_of_sets(answered, answerable)
    total = sum(s.correct for s in scores)
    correct = over(2 * total, len(answered) + len(answerable))
    recall, precision = sum(s.recall for s in scores), sum(s.precision for s in scores)
    cited = f1(over(recall, len(answered)), over(precision, len(answered)))
    assert found["f1_refusal_grounded"] == pytest.approx((refusing + answering) / 2)
    assert found["f1_answer_correctness"] == pytest.approx(correct)
    assert found["f1_citation_grounded"] == pytest.approx(cited)
    assert found["trust_score"] == pytest.approx(((refusing + answering) / 2 + correct + cited) / 3)


def test_intervals_cover_what_many_questions_have():
    def study(rng, n):
        rows = []
        for _ in range(n):
            answerable = rng.random() < 0.65
            answered = rng.random() < (0.8 if answerable else 0.4)
            rows.append(scored(answered, answerable, *rng.random(3)))
        return rows

    truth = means(study(np.random.default_rng(0), 40_000), draws=1)["trust_score"]
    hits = 0
    for seed in range(1, 201):
        table = ts.trust_score(study(np.random.default_rng(seed), 90), str(seed), draws=200)
        row = table.set_index("metric").loc["trust_score"]
        hits += row["ci_low"] <= truth <= row["ci_high"]
    assert hits / 200 > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(names=(("...",), ("x",))), "q: claim 'claim 0' has no alias"),
        (dict(bits=((1,),)), "q: document 1 needs one bit per claim"),
        (dict(bits=()), "q: needs at least one gold claim and one document"),
    ],
)
def test_bad_questions(change, message):
    with pytest.raises(StudyError, match=message):
        question(**{"bits": SUBSETS, **change})


# --- changes --------------------------------------------------------------------------------------


def drawn(rng, n, correct=0.0, like=None):
    """Responses of a model that answers most questions (those of ``like``, if given); ``correct``
    raises its correctness."""
    rows = []
    for i in range(n):
        answerable = like[i].answerable if like else rng.random() < 0.65
        right, recall, precision = rng.random(3)
        answered, right = rng.random() < 0.8, min(1.0, right + correct)
        rows.append(scored(answered, answerable, right, recall, precision))
    return rows


def test_changes_are_differences_and_their_p_values_hold():
    rng, hits, small, wide = np.random.default_rng(0), 0, 0, 0
    for study in range(120):
        before = drawn(rng, 60)
        after = drawn(rng, 60, like=before)
        table = ts.trust_score_change(after, before, str(study), draws=200)
        found = table.set_index("metric").loc["trust_score"]
        difference = means(after)["trust_score"] - means(before)["trust_score"]
        assert found["change"] == pytest.approx(difference)
        small += found["p"] < 0.05
        # What a study of this size can show is about 2.8 standard errors of such changes.
        hits += abs(found["change"]) < found["min_detectable"]
        wide += found["ci_low"] <= found["change"] <= found["ci_high"]
    assert small / 120 < 0.1 and hits / 120 > 0.95 and wide == 120
    after, before = (drawn(np.random.default_rng(1), 200, correct) for correct in (0.9, 0.0))
    clear = ts.trust_score_change(after, before, draws=200).set_index("metric")
    assert clear.loc["f1_answer_correctness", "p"] < 0.01 < clear.loc["f1_citation_grounded", "p"]


def test_changes_in_words():
    rng = np.random.default_rng(3)
    start, perfect = drawn(rng, 80), []
    for s in start:
        recall, precision = (s.recall, s.precision) if s.answered else (0.5, 0.5)
        perfect.append(Scores(s.answerable, s.answerable, 1.0 * s.answerable, 0, recall, precision))
    tables = []
    for model, scores, p in (("sft", start, 1.0), ("better", perfect, 0.001)):
        table = ts.trust_score_change(scores, start)
        tables.append(table.assign(model=model, baseline="start", p_holm=p))
    changes = pd.concat(tables)
    same, better = ts.words(changes)
    assert "no clear change" in same and "+0.000" in same and "minimum detectable" not in same
    assert changes.loc[changes["model"] == "sft", "min_detectable"].isna().all()
    assert better.startswith("**better** against start: Trust-Score +")
    assert "n = 80 questions), minimum detectable change 0." in better
    assert "Holm-corrected p = 0.001: better. By part: refusal +" in better
    assert "correctness" in better and "(better)" in better
    unclear = ts.words(changes.assign(p_holm=0.2))[1]
    assert "better by this interval alone, but not after Holm's correction" in unclear


def test_many_responses_are_scored_as_one_by_one():
    asked = [question(SUBSETS, "long", ((), ()), key=str(i)) for i in range(4)]
    said = ["A [1]. B [1][2].", ts.REFUSAL, "", "B [2][1][3]. C [7]."]
    holds = {"A.": [{0}], "B.": [{0, 1}], "claim 0": [], "claim 1": []}
    calls = []

    def counting(pairs):
        calls.append(len(pairs))
        return entails(holds)(pairs)

    one_by_one = [ts.score_response(q, r, entails(holds)) for q, r in zip(asked, said)]
    assert ts.score_responses(asked, said, counting) == one_by_one
    assert len(calls) == 2  # then what depends on the first answers
    with pytest.raises(StudyError, match="3 responses to 4 questions"):
        ts.score_responses(asked, said[:3], counting)
    with pytest.raises(StudyError, match="no responses"):
        ts.trust_score_change([], [])
    with pytest.raises(StudyError, match="1 responses of one model, 0 of the other"):
        ts.trust_score_change([Scores(True, True)], [])
