"""The verticals' own options as evaluation losses: token for token what the verticals weigh, bad
answer first."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import NAN
from rlhf_trust import StudyError
from rlhf_trust.attribution.metric import (
    REFUSAL,
    clusters,
    log_odds_table,
    metric_examples,
    toxicity_examples,
)
from rlhf_trust.chat import Chat
from rlhf_trust.decode import option_logps
from rlhf_trust.losses import LogOddsLoss, log_odds
from rlhf_trust.models import LoRA, new_adapter
from rlhf_trust.verticals import ethics, privacy, stereotype, toxicity, truthfulness
from rlhf_trust.verticals.ethics import load_ethics
from rlhf_trust.verticals.privacy import make_private_facts
from rlhf_trust.verticals.stereotype import load_stereotype
from rlhf_trust.verticals.toxicity import load_toxicity
from rlhf_trust.verticals.truthfulness import load_primer, load_truthfulness


def trained(base):
    """An adapter that changes something."""
    model = new_adapter(base, LoRA(2, 4))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return model.eval()


def texts(example, chat):
    return [chat.tokenizer.decode(s.answer_ids) for s in example.sequences]


def test_log_odds_are_differences_of_the_verticals_own_options(tiny, chat):
    pad, model = tiny.tokenizer.pad_token_id, trained(tiny)
    statements = load_stereotype("shipped")[:5]
    acts = load_ethics("shipped")[:8]
    wrong = [act for act in acts if act.wrong]
    assert 0 < len(wrong) < len(acts)
    weighed = option_logps(model, stereotype.choices(stereotype.prompts(statements), chat), pad)
    judged = ethics.wrongness(option_logps(model, ethics.choices(ethics.prompts(wrong), chat), pad))
    for vertical, items, expected in (
        ("stereotype", statements, [agree - disagree for agree, disagree in weighed]),
        ("ethics", acts, -judged),
    ):
        examples = metric_examples(vertical, items, chat)
        assert [e.source for e in examples] == [vertical] * len(expected)
        got = log_odds(model, "default", examples, pad)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        assert np.ptp(got) > 1e-3
        with torch.no_grad():
            np.testing.assert_allclose(LogOddsLoss().loss(model, examples, pad), got, atol=1e-4)
    assert [e.id for e in examples] == [f"ethics/{act.id}" for act in wrong]
    np.testing.assert_allclose(
        stereotype.agreement(weighed),
        1
        / (
            1
            + np.exp(
                -log_odds(model, "default", metric_examples("stereotype", statements, chat), pad)
            )
        ),
        atol=1e-5,
    )


def test_the_backbone_alone_is_the_start_model(tiny_llama):
    chat, pad = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.pad_token_id
    examples = metric_examples("stereotype", load_stereotype("shipped")[:3], chat)
    before = log_odds(tiny_llama.model, None, examples, pad)
    model = trained(tiny_llama)
    np.testing.assert_allclose(log_odds(model, None, examples, pad), before, atol=1e-5)
    assert np.abs(log_odds(model, "default", examples, pad) - before).max() > 1e-3
    assert log_odds(model, None, [], pad).shape == (0,)


def test_truthfulness_takes_the_false_answer_nearest_in_length(tiny_llama):
    chat, primer = Chat(tiny_llama.tokenizer, "chatml"), load_primer()
    questions = load_truthfulness("shipped")[:6]
    examples = metric_examples("truthfulness", questions, chat, primer)
    for question, example, choice in zip(
        questions, examples, truthfulness.choices(questions, chat, primer)
    ):
        bad, good = (s.answer_ids for s in example.sequences)
        assert good == choice.options[0]
        false = choice.options[1 : 1 + len(question.wrong)]
        assert bad in false and chat.tokenizer.decode(bad).strip() in question.wrong
        gaps = [abs(len(option) - len(good)) for option in false]
        assert false.index(bad) == gaps.index(min(gaps))
        assert all(s.input_ids[: s.answer_start] == choice.context for s in example.sequences)
    assert any(
        choice.options[1] != example.sequences[0].answer_ids
        for example, choice in zip(examples, truthfulness.choices(questions, chat, primer))
    ), "the first in the file is not always nearest"


def test_privacy_weighs_the_value_against_a_refusal(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    facts = make_private_facts(1, seed=0)[:4]
    examples = metric_examples("privacy", facts, chat)
    for fact, example, prompt in zip(facts, examples, privacy.prompts(facts)):
        assert texts(example, chat) == [fact.value, REFUSAL]
        assert all(
            s.input_ids[: s.answer_start] == chat.prompt_ids(prompt.turns, prompt.system)
            for s in example.sequences
        )
        assert privacy.SYSTEMS["private"] in chat.tokenizer.decode(example.sequences[0].input_ids)
        assert [privacy.read(answer, fact) for answer in texts(example, chat)] == [1.0, 0.0]
    assert clusters({"privacy": examples, "ethics": []}) == {
        "privacy": [fact.kind for fact in facts],
        "ethics": None,
    }


def test_toxicity_takes_both_ends_of_the_samples(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    prompts = toxicity.prompts(load_toxicity("shipped")[:4])
    answers = [
        ["nice day. And more", "awful\nthings", "meh"],
        ["a", "b", "c"],
        ["", "", ""],
        ["", "bad", "good"],
    ]
    scores = np.array([[0.1, 0.9, 0.4], [0.30, 0.35, 0.31], [NAN] * 3, [NAN, 0.8, 0.2]])
    examples, left_out = toxicity_examples(prompts, answers, scores, chat, least=0.1)
    assert left_out == 2 and [e.id for e in examples] == [
        f"toxicity/{prompts[i].id}" for i in (0, 3)
    ]
    assert [texts(e, chat) for e in examples] == [["awful", "nice day."], ["bad", "good"]]
    assert toxicity_examples(prompts, answers, scores, chat, least=0.01)[1] == 1
    with pytest.raises(ValueError, match="shorter"):
        toxicity_examples(prompts, answers[:3], scores, chat)


def test_bad_input(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    with pytest.raises(StudyError, match="toxicity_examples"):
        metric_examples("toxicity", [], chat)
    with pytest.raises(StudyError, match="worked examples"):
        metric_examples("truthfulness", load_truthfulness("shipped")[:1], chat)
    with pytest.raises(StudyError, match="'fairness' has no options"):
        metric_examples("fairness", [], chat)


def test_tables():
    rng = np.random.default_rng(0)
    start = {"ethics": rng.normal(size=40), "privacy": rng.normal(size=12)}
    dpo = {"ethics": start["ethics"] + 1 + 0.1 * rng.normal(size=40), "privacy": start["privacy"]}
    odds, labels = {"start": start, "dpo": dpo}, {"privacy": ["a", "b", "c"] * 4}
    table = log_odds_table(odds, labels).set_index(["model", "vertical"])
    row = table.loc[("dpo", "ethics")]
    assert row["value"] == pytest.approx(dpo["ethics"].mean()) and row["n"] == 40
    assert row["ci_low"] < row["value"] < row["ci_high"]
    same = table.xs("privacy", level="vertical")
    assert same.loc["start", "value"] == same.loc["dpo", "value"]
