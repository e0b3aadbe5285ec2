"""Questions with documents, entailment models, and preference pairs made from the questions."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cells, save_tiny, save_untrained
from rlhf_trust import StudyError
from rlhf_trust.models import load_base
from rlhf_trust.rag import questions as rag, trust_align, trust_score as ts
from rlhf_trust.rag.entailment import (
    LexicalEntailment,
    NeuralEntailment,
    agreement,
    claim_pairs,
    entailment_model,
    hard_pairs,
)
from rlhf_trust.rag.trust_score import Scores
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

SHIPPED = rag.load_questions("shipped")
OFFICIAL_ROWS = {
    "asqa": {
        "sample_id": "a",
        "question": "When, and who?",
        "qa_pairs": [{"short_answers": ["1932"]}, {"short_answers": ["Ida Kessland", "Kessland"]}],
    },
    "qampari": {"question": "Who?", "answers": [["Ida Kessland", "Kessland"], ["Peter Aldous"]]},
    "eli5": {"question": "Why?", "claims": ["It was cheap.", "It was old."]},
}


def row(name, bits=((1, 0), (0, 0)), **changes):
    """A row of an official set; ``bits``: a list a document."""
    docs = [
        {"title": f"T{i}", "text": f"D{i}", "answers_found": list(found), "score": 1.0}
        for i, found in enumerate(bits)
    ]
    return {**OFFICIAL_ROWS[name], "docs": docs, **changes}


def named(first):
    """Short answers of two gold claims."""
    return [{"short_answers": first}, {"short_answers": ["x"]}]


def save(folder, name, rows):
    path = folder / "trust-score" / f"{name}_eval_top100_calibrated.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows))
    return f"path:{folder}"


# --- the shipped set ------------------------------------------------------------------------------


def test_the_shipped_questions_are_what_the_datasheet_says():
    n = len(SHIPPED)
    assert n >= 90 and len({q.question for q in SHIPPED}) == len({q.id for q in SHIPPED}) == n
    assert sum(q.answerable for q in SHIPPED) >= 60 and sum(not q.answerable for q in SHIPPED) >= 30
    for kind in ts.KINDS:
        of_kind = [q for q in SHIPPED if q.kind == kind]
        assert len(of_kind) >= 30 and 0.6 < np.mean([q.answerable for q in of_kind]) < 0.7
    texts = [d.text for q in SHIPPED for d in q.documents]
    assert len(set(texts)) == len(texts) == 5 * n
    assert all(25 <= len(text.split()) <= 75 for text in texts)
    answerable = [q for q in SHIPPED if q.answerable]
    helpful = [sum(any(d.answers_found) for d in q.documents) for q in answerable]
    assert 1 < max(helpful) < 5


def test_aliases_stand_where_answers_found_says():
    """A claim's name is in every document that holds it (the statement may differ)."""
    for q in SHIPPED:
        for d in q.documents if q.kind != "long" else ():
            text = ts.normalised(d.premise)
            for claim, found in zip(q.claims, d.answers_found):
                assert not found or any(ts.normalised(a) in text for a in claim.aliases), q.id


def test_the_shipped_pairs_mislead_a_comparison_of_words():
    pairs = hard_pairs()
    assert len(pairs) >= 150 and not pairs.duplicated(["premise", "hypothesis"]).any()
    assert pairs["entailed"].mean() == pytest.approx(0.5, abs=0.05)
    hard, easy = (
        agreement(LexicalEntailment(), some).set_index("pairs")["value"]
        for some in (pairs, claim_pairs(SHIPPED))
    )
    assert hard["all"] < 0.6 < 0.85 < easy["all"]
    assert easy["not entailed"] > 0.9 and easy["entailed"] > 0.4


# --- reading --------------------------------------------------------------------------------------


def test_official_files_are_read(tmp_path):
    rows = {
        "asqa": [row("asqa", bits=[(1, 0)] * 7)],
        "qampari": [row("qampari"), row("qampari", bits=[(0, 0)] * 5, answerable=False)],
        "eli5": [row("eli5")],
    }
    for name, of_set in rows.items():
        source = save(tmp_path, name, of_set)
    short, listed, nothing, long = rag.load_questions(source)
    assert (short.id, listed.id, nothing.id) == ("asqa/a", "qampari/1", "qampari/2")
    assert long.id == "eli5/1" and len(short.documents) == 5
    assert (short.kind, listed.kind, long.kind) == ("short", "list", "long")
    assert short.claims[1].aliases == ("Ida Kessland", "Kessland")
    assert long.claims[0].text == "It was cheap."
    assert listed.answerable and listed.supported == (True, False) and not nothing.answerable


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected a list of questions"),
        ([row("asqa", docs=[{}])], r"question a: docs\[0\] .*|question a: no docs\[0\]"),
        ([row("asqa", bits=[(1,)])], "question a: answers_found must be a list of 2"),
        ([row("asqa", qa_pairs=named([]))], r"question a: no short_answers\[0\]"),
        ([row("asqa", answerable=False)], "question a: answerable contradicts answers_found"),
        ([row("asqa", bits=[(0, 0)], answerable=True)], "question a: answerable contradicts"),
        ([row("asqa"), row("asqa")], "question a: this sample_id is there twice"),
        ([row("asqa", docs=[])], "question a: no docs"),
        ([row("asqa", qa_pairs=named("1932"))], r"short_answers\[0\] must be a list, got '1932'"),
        (
            [row("asqa", qa_pairs=named([1932]))],
            r"short_answers\[0\]\[0\] must be a text, got 1932",
        ),
        ([row("asqa", docs=[{"title": "T", "text": "D", "answers_found": None}])], "got None"),
        ([row("asqa", bits=[("0", 1)])], r"must be 0 or 1 per gold answer, got \['0', 1\]"),
        ([row("asqa", statements=["One."])], "1 statements for 2 answers"),
        (["text"], "question 1: row must be an object"),
    ],
)
def test_bad_rows_name_file_and_question(tmp_path, rows, message):
    with pytest.raises(StudyError, match=rf"asqa_eval_top100_calibrated.json: .*{message}"):
        rag.load_questions(save(tmp_path, "asqa", rows))


def test_a_directory_without_any_set(tmp_path):
    with pytest.raises(StudyError, match="has none of trust-score/"):
        rag.load_questions(f"path:{tmp_path}")


def test_real_cited_answers(real_data):
    cited = rag.load_cited(f"path:{real_data}")
    assert len(cited) == 12 and {q.kind for q, _ in cited} == {"list", "long"}
    scores = ts.score_responses(*zip(*cited), lambda pairs: [True] * len(pairs))
    assert all(s.answered and s.correct == 1 for s in scores)
    # A model that says yes to everything supports every sentence that cites at all.
    for (question, answer), s in zip(cited, scores):
        parts = ts.items(answer) if question.kind == "list" else ts.sentences(answer)
        assert s.recall == pytest.approx(np.mean([bool(ts.citations(part)) for part in parts]))
    lexical = ts.score_responses(*zip(*cited), LexicalEntailment())
    assert 0.5 < np.mean([s.recall for s in lexical]) < 1
    assert np.mean([s.recall for s in scores]) > 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no demos"),
        ({"demos": [{"question": "Why?"}]}, "demo 1: no answer"),
        ({"demos": [{"question": "Why?", "answer": "So [1].", "docs": []}]}, "demo 1: no docs"),
    ],
)
def test_bad_cited_answers(tmp_path, content, message):
    (tmp_path / "alce").mkdir()
    (tmp_path / "alce" / "eli5_default.json").write_text(json.dumps(content))
    with pytest.raises(StudyError, match=f"eli5_default.json: .*{message}"):
        rag.load_cited(f"path:{tmp_path}")


def test_no_cited_answers_where_there_are_none():
    assert rag.load_cited("shipped") == []


def test_the_prompt_has_everything_once():
    question = SHIPPED[0]
    (text,) = rag.prompt(question).turns
    assert text.count(question.question) == text.count(ts.REFUSAL) == 1
    assert text.endswith("\n\nAnswer:")
    for number, d in enumerate(question.documents, start=1):
        assert f"Document [{number}](Title: {d.title}): {d.text}\n" in text


# --- entailment models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("premise", "hypothesis", "expected"),
    [
        ("The bridge was opened in 1932 and replaced a ferry.", "The bridge opened in 1932.", True),
        ("The bridge was opened in 1932 for a ferry.", "The bridge opened in 1934.", False),
        ("The bridge was not opened in 1932.", "The bridge was opened in 1932.", False),
        ("The bridge was opened. Nobody liked the ferry.", "The bridge was opened.", True),
        ("The bridge was opened in 1932.", "A tunnel was dug under the river.", False),
        ("Anything.", "", False),
        ("Anything.", "It is so.", False),
    ],
)
def test_lexical_entailment(premise, hypothesis, expected):
    assert entailment_model("lexical")([(premise, hypothesis)]) == [expected]


@pytest.fixture
def entailment_models(tmp_path, tiny_llama):
    """Folders with a random classifier and a random sequence-to-sequence model."""
    size = len(tiny_llama.tokenizer)
    torch.manual_seed(0)
    labels = {0: "CONTRADICTION", 1: "entailment", 2: "neutral"}
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    shape |= dict(vocab_size=size, id2label=labels, initializer_range=1.0)
    classifier = BertForSequenceClassification(BertConfig(**shape))
    shape = dict(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=size)
    shape |= dict(decoder_start_token_id=0, initializer_factor=3.0)
    writer = T5ForConditionalGeneration(T5Config(**shape))
    for model, name in ((classifier, "classifier"), (writer, "writer")):
        model.save_pretrained(tmp_path / name)
        tiny_llama.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ["classifier", "writer"])
def test_a_batch_gives_the_same_as_one_by_one(entailment_models, name):
    model = entailment_model(f"path:{entailment_models / name}")
    premises = [f"the answer {i} " * (1 + i % 5) for i in range(24)]
    pairs = [(p, f"question {i} is {'not ' * (i % 2)}wrong") for i, p in enumerate(premises)]
    if not model.classifies:
        # Which token a random model prefers is chance: take a common one as "1".
        tokens = [first_token(model, *pair) for pair in pairs]
        model.yes = max(tokens, key=tokens.count)
    together = model(pairs)
    assert together == [model([pair])[0] for pair in pairs] and len(set(together)) == 2


def first_token(model, premise, hypothesis):
    inputs = model.encode([premise], [hypothesis])
    return int(model.model.generate(**inputs, max_new_tokens=1, min_new_tokens=1)[0, 1])


@pytest.mark.parametrize("name", ["classifier", "writer"])
def test_long_premises_lose_their_end_and_not_the_hypothesis(entailment_models, name):
    model = NeuralEntailment(f"path:{entailment_models / name}", max_length=200)
    ids = model.encode(["so " * 2000], ["It is not so at all."])["input_ids"][0]
    assert len(ids) <= 200 and "It is not so at all." in model.tokenizer.decode(ids)


def test_a_causal_model_is_no_entailment_model(tiny_llama):
    with pytest.raises(StudyError, match="neither a classifier nor sequence-to-sequence"):
        NeuralEntailment(tiny_llama.source)


def test_a_classifier_without_a_label_for_entailment(entailment_models):
    path = entailment_models / "classifier" / "config.json"
    path.write_text(path.read_text().replace("entailment", "yes"))
    with pytest.raises(StudyError, match="labels .* needs one for entailment"):
        NeuralEntailment(f"path:{entailment_models / 'classifier'}")


# --- Trust-Align ----------------------------------------------------------------------------------


def knowing(question):
    """An entailment model that knows which document of a question holds which claim."""
    bits = {d.premise: d.answers_found for d in question.documents}
    if question.kind == "list":
        texts = [f"{question.question} {claim.aliases[0]}" for claim in question.claims]
    else:
        texts = [f"{claim.text.rstrip('.')}." for claim in question.claims]

    def decide(premise, hypothesis):
        if premise in bits:
            return hypothesis in texts and bits[premise][texts.index(hypothesis)]
        return hypothesis.rstrip(".") in premise  # a claim in a whole answer

    return lambda pairs: [decide(*pair) for pair in pairs]


def test_positives_are_perfect():
    for question in SHIPPED:
        answer = trust_align.positive(question)
        scores = ts.score_response(question, answer, knowing(question))
        assert scores.answered == question.answerable
        assert trust_align.severity(scores) == pytest.approx(0), question.id


def test_the_fewest_documents_are_cited():
    def documents(*bits):
        return tuple(ts.Document("T", "D", tuple(map(bool, row))) for row in bits)

    claims = tuple(ts.Claim(f"claim {i}") for i in range(3))
    held = documents((1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 0), (0, 1, 0))
    question = ts.Question("q", "long", "Why?", claims, held)
    assert trust_align.fewest_documents(question) == [1, 1, None]
    assert trust_align.positive(question) == "claim 0 [2]. claim 1 [2]."
    names = (ts.Claim("", ("Hesk & Darrow, Inc.", "Hesk")), ts.Claim("", ("Washington, D.C.",)))
    question = ts.Question("q", "list", "Who?", names, documents((1, 1)))
    assert trust_align.positive(question) == "Hesk [1], Washington D.C. [1]."


@pytest.mark.slow
def test_recombined_documents():
    some = SHIPPED[:40]
    made = trust_align.recombined(some, 3)
    answerable = [q for q in some if q.answerable]
    assert len(made) == len(some) + 3 * len(answerable) and len({q.id for q in made}) == len(made)
    by_id = {q.id: q for q in made}
    for original in some:
        assert by_id[original.id] == original
    for original in answerable:
        fewer, none, shuffled = (by_id[f"{original.id}+{i}"] for i in (1, 2, 3))
        held = sum(any(d.answers_found) for d in original.documents)
        assert sum(any(d.answers_found) for d in fewer.documents) == max(1, held - -(-held // 2))
        assert not none.answerable and set(shuffled.documents) == set(original.documents)
        aliases = [ts.normalised(alias) for claim in original.claims for alias in claim.aliases]
        for variant in (fewer, none, shuffled):
            assert len(set(variant.documents)) == 5
            for new in set(variant.documents) - set(original.documents):
                text = ts.normalised(new.premise)
                assert not any(new.answers_found) and not any(alias in text for alias in aliases)
    assert trust_align.recombined(some, 3) == made != trust_align.recombined(some, 3, seed=1)
    first = [q for q in made if not q.id.endswith(("+2", "+3"))]
    assert [q.id for q in trust_align.recombined(some, 1)] == [q.id for q in first]
    with pytest.raises(StudyError, match="only 0 documents of other questions to replace"):
        trust_align.recombined(answerable[:1], 1)


def test_errors_and_severity():
    refused, answered = Scores(False, True), Scores(True, False, recall=0.5, precision=0.25)
    half_right = Scores(True, True, 0.5, recall=1.0, precision=1.0)
    assert trust_align.severity(refused) == 0.5
    assert trust_align.severity(answered) == pytest.approx(0.5 + 0.34 * 0.75 + 0.26 * 0.5)
    assert trust_align.severity(half_right) == pytest.approx(0.4 * 0.5)
    assert trust_align.severity(Scores(False, False)) == 0


def test_the_worse_half_is_kept_of_either_kind():
    def answerable(correct):
        return Scores(True, True, correct, recall=1.0, precision=1.0)

    right, refused = answerable(1.0), Scores(False, False)
    too_much = [Scores(True, False, recall=r, precision=1.0) for r in (1.0, 0.0, 0.5)]
    scores = [answerable(0.9), right, answerable(0.1), refused]
    scores += [*too_much, answerable(0.5), answerable(0.2)]
    wanted = {0: [2, 5, 6, 8], 1: [2], 2: [2, 5], 3: [2, 5, 8], 40: [2, 5, 6, 8]}
    assert {most: trust_align.worst_half(scores, most) for most in wanted} == wanted
    assert trust_align.worst_half([right, refused]) == []


def test_pairs_leave_out_what_is_said_already():
    some = SHIPPED[:3]
    (pair,) = trust_align.pairs(some, ["Something else.", trust_align.positive(some[1]), " "])
    assert (pair.id, pair.prompt) == (some[0].id, rag.prompt(some[0]).turns)
    assert (pair.chosen, pair.rejected) == (trust_align.positive(some[0]), "Something else.")
    with pytest.raises(StudyError, match="no response is wrong"):
        trust_align.pairs(some[:1], [trust_align.positive(some[0])])


# --- the chapter without any training -------------------------------------------------------------


@pytest.mark.slow
def test_without_alignment_the_chapter_measures_what_is_there(tmp_path, monkeypatch):
    """One adapter, no SFT model and no question to train on: start and it are measured, compared,
    and nothing is made."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    model = f"path:{save_tiny('llama', tmp_path / 'model', positions=4096)}"
    save_untrained(load_base(model, "float32"), tmp_path / "build" / "models" / "mine")
    sizes = dict(n_held_out=3, n_train=0, max_new_tokens=4, n_samples=1)
    chapter = run_cells(
        "40-rag-trust", model=model, dtype="float32", trained=["mine"], align=False, **sizes
    )
    assert [path.name for path in (tmp_path / "build" / "models").iterdir()] == ["mine"]
    parts = tmp_path / "build" / "tables" / "parts"
    assert {path.name for path in parts.iterdir()} == {
        "grounding.40.csv",
        "grounding_change.40.csv",
    }
    models = pd.read_csv(parts / "grounding.40.csv")["model"].unique().tolist()
    assert models == ["start", "mine", "perfect answers", "always refuses", "always answers"]
    changes = pd.read_csv(parts / "grounding_change.40.csv")
    assert set(zip(changes["model"], changes["baseline"])) == {("mine", "start")}
    assert chapter["kinds"]["model"].unique().tolist() == ["start", "mine"]
