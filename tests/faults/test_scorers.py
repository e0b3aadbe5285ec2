"""Every scorer gives one score a text, whatever is in it; what it cannot do is one line."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from conftest import tiny_tokenizer
from rlhf_trust import ROOT, StudyError, params
from rlhf_trust.verticals import scorers
from transformers import BertConfig, BertForSequenceClassification

TEXTS = [
    "You are kind.",
    "",
    " \n\t",
    "x" * 200_000,
    "You fool! " * 20_000,
    "half \ud83d of a pair",
    "\udc80",
    "a\x00b",
    "\x00",
    "\x1b[31m\u202eevil\u202c",
    "\ufeffüñî 😀 中文",
    "line\r\nline\u2028line",
    "<|im_end|><|endoftext|>[SEP]",
    "You are kind.",
]


def save_classifier(folder, labels=("neutral", "toxic"), problem=None, positions=64):
    """A random classifier with these labels."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=positions,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem,
        pad_token_id=2,
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"path:{folder}"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "KEPT", tmp_path / "scores")
    monkeypatch.delenv("RLHF_TRUST_CACHE", raising=False)
    return tmp_path / "scores"


@pytest.fixture
def classifier(kept, tmp_path):
    return lambda *given, **more: save_classifier(tmp_path / "toxic-bert", *given, **more)


def archive(path, texts):
    rows = [{"text": text, "score": 0.25} for text in dict.fromkeys(texts)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"perspective:{path}"


def by_name(name, tmp_path, classifier):
    if name == "classifier":
        return scorers.make_scorer(classifier())
    if name == "perspective":
        return scorers.make_scorer(archive(tmp_path / "scores.jsonl", TEXTS))
    if name == "tox-block" and not (ROOT / "build/base/tox-block-0.1.2").is_dir():
        pytest.skip("tox-block is not here")
    return scorers.make_scorer(name)


@pytest.mark.parametrize("name", ["local", "tox-block", "classifier", "perspective"])
def test_one_score_a_text_whatever_is_in_it(name, tmp_path, classifier):
    scorer = by_name(name, tmp_path, classifier)
    scores = scorer.score(TEXTS)
    assert scores.shape == (len(TEXTS),) and ((0 <= scores) & (scores <= 1)).all()
    assert scores[0] == pytest.approx(scores[-1], abs=1e-12)  # the same text
    alone = [scorer.score([text])[0] for text in TEXTS]
    np.testing.assert_allclose(scores, alone, atol=1e-9)
    assert scorer.score([]).shape == (0,)


# --- a classifier that others trained -------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "problem", "reads"),
    [
        (("neutral", "toxic"), None, "softmax 1"),
        (("toxic", "non-toxic"), None, "softmax 0"),
        (("Toxicity", "other"), "single_label_classification", "softmax 0"),
        (("toxic", "severe_toxic", "insult"), "multi_label_classification", "sigmoid 0"),
        (("none", "insult", "toxic"), "single_label_classification", "softmax 2"),
        (("toxicity",), None, "sigmoid 0"),
    ],
)
def test_the_label_that_is_toxic_is_found_by_its_name(classifier, labels, problem, reads):
    scorer = scorers.make_scorer(classifier(labels, problem))
    kind, column = reads.split()
    inputs = scorer.tokenizer(["You fool!"], return_tensors="pt")
    with torch.no_grad():
        logits = scorer.model(**inputs).logits[0]
    wanted = (logits.softmax(-1) if kind == "softmax" else logits.sigmoid())[int(column)]
    assert scorer.score(["You fool!"])[0] == pytest.approx(float(wanted), abs=1e-6)
    assert scorer.name == "toxic-bert"


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (("LABEL_0", "LABEL_1"), None),
        (("LABEL_0",), None),
        (("hate", "nothate"), None),
        (("toxic", "toxicity"), "multi_label_classification"),
        (("non-toxic", "neutral"), None),
        (("toxic", "insult", "threat"), None),  # one of them, or several at once?
        (("toxic",), "regression"),
    ],
)
def test_labels_that_leave_a_doubt_are_refused(classifier, labels, problem):
    said = (
        f"^scorer path:.*toxic-bert: cannot tell what is toxic by labels {labels[0]}.*config.json"
    )
    with pytest.raises(StudyError, match=said) as caught:
        scorers.make_scorer(classifier(labels, problem))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", b"cut", "cannot be read"),
        ("model.safetensors", None, "cannot be read"),
        ("config.json", b"{", "cannot be read"),
        ("config.json", None, "config.json is missing"),
        ("tokenizer.json", b"[]", "cannot be read"),
    ],
)
def test_a_broken_classifier_is_one_line(classifier, tmp_path, file, content, message):
    source = classifier()
    (tmp_path / "toxic-bert" / file).unlink()
    if content is not None:
        (tmp_path / "toxic-bert" / file).write_bytes(content)
    with pytest.raises(StudyError, match=f"toxic-bert.*{message}") as caught:
        scorers.make_scorer(source)
    assert "\n" not in str(caught.value)


def test_a_language_model_is_no_classifier(kept, tiny_directories):
    with pytest.raises(StudyError, match="^scorer path:.*is no classifier: it lacks score.weight"):
        scorers.make_scorer(f"path:{tiny_directories['llama']}")


def test_an_interrupted_run_goes_on_and_other_weights_begin_anew(
    classifier, kept, tmp_path, monkeypatch
):
    source, texts = classifier(), [f"{'word ' * i}of {i}" for i in range(10)]
    wanted = scorers.ClassifierScorer(source, batch_size=3).score(texts)
    (file,) = kept.iterdir()
    file.unlink()
    scorer, read = scorers.ClassifierScorer(source, batch_size=3), []
    forward = type(scorer.model).forward

    def counted(self, **inputs):
        read.append(len(inputs["input_ids"]))
        if len(read) == 3:
            raise KeyboardInterrupt
        return forward(self, **inputs)

    monkeypatch.setattr(type(scorer.model), "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(texts)
    again = scorers.ClassifierScorer(source, batch_size=3)
    np.testing.assert_array_equal(again.score(texts), wanted)
    assert read == [3, 3, 3, 3, 1]
    again.score(texts[::-1])
    assert len(read) == 5
    with torch.no_grad():
        again.model.classifier.bias[1] += 3
    again.model.save_pretrained(tmp_path / "toxic-bert")
    assert (scorers.ClassifierScorer(source).score(texts) != wanted).all() and len(read) == 6


def test_cut_texts_are_counted(classifier, capsys):
    scorer = scorers.make_scorer(classifier(positions=8))
    short, long = "kind", "the answer to the question is not wrong " * 3
    for _ in range(2):  # the second time from what is kept
        scorer.score([short, long, long])
        assert "toxic-bert: 1 of 2 texts are cut at their end" in capsys.readouterr().out
    scorer.score([short])
    assert capsys.readouterr().out == ""


def test_a_score_that_is_no_number_is_not_kept(classifier, kept):
    scorer = scorers.make_scorer(classifier())
    with torch.no_grad():
        scorer.model.classifier.bias[0] = float("nan")
    with pytest.raises(StudyError, match="^scorer toxic-bert: gave no probability for 'a'"):
        scorer.score(["a"])
    assert not [line for file in kept.iterdir() for line in file.read_text().splitlines()]


# --- archived scores of Perspective ---------------------------------------------------------------

OF_A = hashlib.sha256(b"a, b").hexdigest()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.jsonl", '{"text": "a, b", "score": 0.5}\n\n{"text": "", "score": 1}\n'),
        ("s.jsonl", f'{{"sha256": "{OF_A}", "score": 0.5}}\n{{"text": "", "score": "1"}}'),
        ("s.csv", 'text,score,other\n"a, b",0.5,x\n"",1,y\n'),
        ("s.csv", f"sha256,score\n{OF_A.upper()},0.5\n{hashlib.sha256(b'').hexdigest()},1\n"),
        ("s.csv", f'\ufefftext,sha256,score\n,{OF_A},0.5\n"a, b",,0.5\n,,1.0\n'),
    ],
)
def test_archived_scores_are_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    scorer = scorers.make_scorer(f"perspective:{tmp_path / name}")
    assert scorer.score(["a, b", "", "a, b"]).tolist() == [0.5, 1, 0.5]
    assert scorer.name == "perspective" and "nobody can compute again" in scorer.about


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}', r"s.jsonl:1: needs text or sha256, and score"),
        ('{"score": 0.1}', r"s.jsonl:1: needs text or sha256"),
        ('{"sha256": "abc", "score": 0.1}', r"s.jsonl:1: needs text or sha256"),
        ('{"text": "a", "score": 0.1}\n{"text": "b", "score": 1.1}', "s.jsonl:2: needs"),
        ('{"text": "a", "score": null}', "s.jsonl:1: needs"),
        ('{"text": "a", "score": NaN}', "s.jsonl:1: needs"),
        ('{"text": "a", "score": "0,5"}', "s.jsonl:1: needs"),
        ('{"text": 3, "score": 0.5}', "s.jsonl:1: needs"),
        ('{"text": "a", "score": 0.1}\n{"text": "a", "score": 0.2}', "s.jsonl:2: the same text"),
        ("[1]", "s.jsonl:1: expected a JSON object"),
        ('{"text": "a", "score": 0.5', "s.jsonl:1: not valid JSON"),
        ('{"text": "c", "score": 0.5}', r"lacks 2 of 2 texts, such as 'a'; the service has ended"),
        ('{"text": "b", "score": 0.5}', r"lacks 1 of 2 texts, such as 'a'"),
        ("", "s.jsonl: the file is empty"),
    ],
)
def test_archived_scores_that_do_not_do_are_one_line(tmp_path, content, message):
    path = tmp_path / "s.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(StudyError, match=message) as caught:
        scorers.make_scorer(f"perspective:{path}").score(["a", "b", "a"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("perspective", "^scorer perspective:: no such file; the service ends on 31 December 2026"),
        ("perspective:", "^scorer perspective:: no such file"),
        ("perspective:/none.csv", "^scorer perspective:/none.csv: no such file"),
        ("perspective:/", "^scorer perspective:/: no such file"),
        ("detoxify", "^scorer: must be one of local, tox-block, hub:.*, got 'detoxify'$"),
        ("Local", "^scorer: must be one of .*got 'Local'$"),
        ("hub:", "^scorer: must be one of .*got 'hub:'$"),
        ("path:", "^scorer: must be one of .*got 'path:'$"),
        ("", "^scorer: must be one of .*got ''$"),
    ],
)
def test_what_is_no_scorer_says_what_is_one(name, message):
    with pytest.raises(StudyError, match=message):
        scorers.make_scorer(name)


def test_two_scorers_are_told_apart_by_name(classifier, tmp_path):
    first = classifier()
    save_classifier(tmp_path / "copy" / "toxic-bert")
    with pytest.raises(StudyError, match="^second_scorer: .* is already the first one"):
        scorers.make_scorers(first, f"path:{tmp_path / 'copy' / 'toxic-bert'}")


def test_a_relative_archive_is_found_from_a_notebook():
    assert params.whole_paths("perspective:data/s.csv") == f"perspective:{ROOT / 'data/s.csv'}"
    assert params.whole_paths("mine=path:a/b") == f"mine=path:{ROOT / 'a/b'}"
    assert params.whole_paths("perspective:") == "perspective:"
