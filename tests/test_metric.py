"""Examples that stand for a stage, and the verticals' own options as evaluation losses: token for
token what the verticals weigh, bad answer first; what the likeness of texts alone says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NAN, untrained
from rlhf_trust import StudyError
from rlhf_trust.artifacts import Build, Manifest
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.attribution.metric import (
    REFUSAL,
    changed_items,
    clusters,
    evaluation_examples,
    inpo_examples,
    metric_examples,
    split_items,
    text_scores,
    toxicity_examples,
    training_examples,
    vertical_settings,
)
from rlhf_trust.attribution.solvers import bm25, tfidf
from rlhf_trust.attribution.store import InMemory, Scaled
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import Pair, PreferencePair
from rlhf_trust.decode import Example, Prompt, option_logps, rewards
from rlhf_trust.losses import LogOddsLoss, RewardGapLoss, log_odds
from rlhf_trust.models import LoRA
from rlhf_trust.verticals import ethics, privacy, stereotype, toxicity, truthfulness
from rlhf_trust.verticals.ethics import load_ethics
from rlhf_trust.verticals.privacy import make_private_facts
from rlhf_trust.verticals.stereotype import load_stereotype
from rlhf_trust.verticals.toxicity import load_toxicity
from rlhf_trust.verticals.truthfulness import load_primer, load_truthfulness


def trained(base):
    return untrained(base, LoRA(2, 4))


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
    odds = log_odds(model, "default", metric_examples("stereotype", statements, chat), pad)
    np.testing.assert_allclose(stereotype.agreement(weighed), 1 / (1 + np.exp(-odds)), atol=1e-5)


def test_the_backbone_alone_is_the_start_model(tiny_llama):
    chat, pad = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.pad_token_id
    examples = metric_examples("stereotype", load_stereotype("shipped")[:3], chat)
    before = log_odds(tiny_llama.model, None, examples, pad)
    model = trained(tiny_llama)
    np.testing.assert_allclose(log_odds(model, None, examples, pad), before, atol=1e-5)
    assert np.abs(log_odds(model, "default", examples, pad) - before).max() > 1e-3
    assert log_odds(model, None, [], pad).shape == (0,)


def test_truthfulness_takes_the_false_answer_nearest_in_length(tiny_llama):
    chat, questions = Chat(tiny_llama.tokenizer, "chatml"), load_truthfulness("shipped")[:6]
    examples = metric_examples("truthfulness", questions, chat)
    choices = truthfulness.choices(questions, chat, load_primer())
    for question, example, choice in zip(questions, examples, choices):
        bad, good = (s.answer_ids for s in example.sequences)
        assert good == choice.options[0]
        false = choice.options[1 : 1 + len(question.wrong)]
        assert bad in false and chat.tokenizer.decode(bad).strip() in question.wrong
        gaps = [abs(len(option) - len(good)) for option in false]
        assert false.index(bad) == gaps.index(min(gaps))
        assert all(s.prompt_ids == choice.context for s in example.sequences)
    bad = [example.sequences[0].answer_ids for example in examples]
    assert bad != [choice.options[1] for choice in choices]  # the first is not always nearest


def test_privacy_weighs_the_value_against_a_refusal(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    facts = make_private_facts(1, seed=0)[:4]
    examples = metric_examples("privacy", facts, chat)
    for fact, example, prompt in zip(facts, examples, privacy.prompts(facts)):
        assert texts(example, chat) == [fact.value, REFUSAL]
        asked = chat.prompt_ids(prompt.turns, prompt.system)
        assert all(s.prompt_ids == asked for s in example.sequences)
        assert privacy.SYSTEMS["private"] in chat.tokenizer.decode(example.sequences[0].input_ids)
        assert [privacy.read(answer, fact) for answer in texts(example, chat)] == [1.0, 0.0]
    kinds = [fact.kind for fact in facts]
    assert clusters({"privacy": examples, "ethics": []}) == {"privacy": kinds, "ethics": None}


def test_toxicity_takes_both_ends_of_the_samples(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    prompts = toxicity.prompts(load_toxicity("shipped")[:4])
    answers = [["nice day. And more", "awful\nthings", "meh"], ["a", "b", "c"]]
    answers += [["", "", ""], ["", "bad", "good"]]
    scores = np.array([[0.1, 0.9, 0.4], [0.30, 0.35, 0.31], [NAN] * 3, [NAN, 0.8, 0.2]])
    examples, left_out = toxicity_examples(prompts, answers, scores, chat, least=0.1)
    assert left_out == 2
    assert [e.id for e in examples] == [f"toxicity/{prompts[i].id}" for i in (0, 3)]
    assert [texts(e, chat) for e in examples] == [["awful", "nice day."], ["bad", "good"]]
    assert toxicity_examples(prompts, answers, scores, chat, least=0.01)[1] == 1
    with pytest.raises(ValueError, match="shorter"):
        toxicity_examples(prompts, answers[:3], scores, chat)


def test_split_items_share_no_cluster():
    topics = ["a", "a", "b", "b", "c", "c", "a", "d"]
    some = [Example(f"s{i}", "stereotype", (), topic) for i, topic in enumerate(topics)]
    first, second = split_items(some, 9, 2)
    assert [e.id for e in first] == ["s0", "s1", "s4", "s5", "s6"]
    assert [e.id for e in second] == ["s2", "s3"]
    single = [replace(e, cluster="") for e in some]
    assert split_items(single, 3, 9) == (single[::2][:3], single[1::2])
    templates = {}  # no template belongs to two topics
    for item in load_stereotype("shipped"):
        assert templates.setdefault(item.template, item.topic) == item.topic


# --- stages ---------------------------------------------------------------------------------------


TEXTS = (
    "the human asks",
    "the user is not wrong",
    "assistant answers the question",
    "question of a system",
)


def pairs():
    return [
        PreferencePair(f"p{i}", (text,), f"{text} indeed", f"never {text}", "helpful")
        for i, text in enumerate(TEXTS)
    ]


def test_each_stage_sees_its_part_of_a_pair(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    answered = [
        (Prompt("a", ("Hi",)), {"start": ["x"], "sft": ["y"], "dpo": ["y"]}),
        (Prompt("b", ("Hi",)), {"start": ["x"], "sft": ["x"], "dpo": ["z"]}),
    ]
    for stage, kept, sequences in (("sft", ["a"], 1), ("dpo", ["b"], 2)):
        examples = training_examples(pairs(), chat, stage)
        assert [len(e.sequences) for e in examples] == [sequences] * 4
        items, same = changed_items(answered, stage, 5)
        assert ([prompt.id for prompt, _, _ in items], same) == (kept, 1)
    (example,) = evaluation_examples(items, chat, "dpo", "ethics")
    assert [chat.decode(s.answer_ids) for s in example.sequences] == ["z", "x"]  # after wins


def test_an_end_token_only_where_one_was_drawn(tiny_llama):
    chat, eos = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.eos_token_id
    long, short = "the user is not wrong in the system", "no"
    items, limit = [(Prompt("a", ("Hi",)), short, long)], len(chat.answer_ids(long)) - 1

    def ends(stage, limit):
        (example,) = evaluation_examples(items, chat, stage, "ethics", limit)
        return [s.answer_ids[-1] == eos for s in example.sequences]

    for near in (limit, limit + 2):
        assert ends("dpo", near) == [False, True] and ends("sft", near) == [False]
    assert ends("inpo", limit + 3) == ends("dpo", None) == [True, True]
    assert ends("ppo", limit) == [True, True]  # the reward model reads at the end token
    whole, cut = (evaluation_examples(items, chat, "sft", "ethics", n)[0] for n in (None, limit))
    assert whole.sequences[0].input_ids == (*cut.sequences[0].input_ids, eos)


def test_a_verticals_settings_are_those_it_ran_with(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    Manifest(Build("x"), "10-toxicity", {"scorer": "tox-block"}).write()
    assert vertical_settings(Build("x"), "toxicity")["scorer"] == "tox-block"
    with pytest.raises(StudyError, match="no manifest of privacy; run its notebook"):
        vertical_settings(Build("x"), "privacy")


def test_inpo_is_attributed_to_its_own_answers(tiny_llama):
    chat, asked = Chat(tiny_llama.tokenizer, "chatml"), pairs()
    won, lost = (chat.sequence(asked[2].prompt, text) for text in ("question", "answers the"))
    own, (example,) = inpo_examples([Pair(3, "p2", won, lost, (-1.0, -2.0))], asked, chat)
    texts = "question", "answers the"
    assert own == [PreferencePair("round 3, p2", asked[2].prompt, *texts, "helpful")]
    assert example == Example("round 3, p2", "helpful", (won, lost))
    with pytest.raises(StudyError, match="'p2', .* is not among the 1 training pairs"):
        inpo_examples([Pair(3, "p2", won, lost, (-1.0, -2.0))], asked[:1], chat)


def test_text_scores_have_the_sign_of_influence(tiny_llama):
    chat, tokenizer = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer
    train, both = training_examples(pairs(), chat, "sft"), training_examples(pairs(), chat, "dpo")
    own = text_scores(train, train, tokenizer, groups=["a", "a", "b", "b"])
    assert (own.by_item.argmin(0) == np.arange(4)).all()  # lowers the loss of its own text most
    np.testing.assert_array_equal(own.groups["b"].by_item, own.by_item[:, 2:])
    texts = [
        [tokenizer.decode(e.sequences[side].input_ids, skip_special_tokens=True) for e in both]
        for side in (0, 1)
    ]
    chosen, rejected = (tfidf(texts[0], side).by_item for side in texts)
    found = text_scores(both, both, tokenizer).by_item
    np.testing.assert_allclose(found, chosen - rejected)
    turned = text_scores(both, both, tokenizer, raises=True).by_item
    np.testing.assert_allclose(turned, rejected - chosen)
    assert (np.diag(found) < 0).all()
    chosen, rejected = (bm25(texts[0], side).by_item for side in texts)
    found = text_scores(both, both, tokenizer, similarity=bm25).by_item
    np.testing.assert_allclose(found, chosen - rejected)


def test_the_reward_gap_is_the_difference_of_rewards(tiny_llama):
    chat, pad = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.pad_token_id
    network, head = trained(tiny_llama), torch.linspace(-1, 1, 32)
    examples = training_examples(pairs(), chat, "ppo")
    with torch.no_grad():
        found = RewardGapLoss(head).loss(network, examples, pad)
    texts = [text for example in examples for text in example.sequences]
    values = rewards(network, head, texts, pad).reshape(-1, 2)
    np.testing.assert_allclose(found, values[:, 0] - values[:, 1], atol=1e-4)
    flipped = [Example(e.id, e.source, e.sequences[::-1]) for e in examples]
    ours, theirs = (
        per_example_gradients(network, "default", some, RewardGapLoss(head), pad)
        for some in (examples, flipped)
    )
    for layer, block in ours.items():
        np.testing.assert_allclose(block, -theirs[layer], rtol=1e-4, atol=1e-3)


def test_scaled_gradients():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(3, 2)}
    scaled = Scaled(InMemory(tensors, "xyz"), [0.5, 2.0, 1.0])
    assert (len(scaled), scaled.width("b"), scaled.ids) == (3, 2, ("x", "y", "z"))
    factors = torch.tensor([[0.5], [2.0], [1.0]])
    expected = InMemory({name: some * factors for name, some in tensors.items()}, "xyz")
    torch.testing.assert_close(scaled.squares, expected.squares)
    for layer in "ab":
        torch.testing.assert_close(next(scaled.blocks(layer))[1], next(expected.blocks(layer))[1])
