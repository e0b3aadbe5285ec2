"""Which examples stand for a stage, and what the likeness of texts alone says of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlhf_trust import StudyError
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.attribution.metric import (
    changed_items,
    evaluation_examples,
    inpo_examples,
    text_scores,
    training_examples,
)
from rlhf_trust.attribution.solvers import tfidf
from rlhf_trust.attribution.store import InMemory, Scaled
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import Pair, PreferencePair
from rlhf_trust.decode import Example, Prompt, rewards
from rlhf_trust.losses import LogOddsLoss, RewardGapLoss
from rlhf_trust.models import lora_weights, snapshot
from rlhf_trust.training import fresh_adapters

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
    for stage, kept, identical in (("sft", ["a"], 1), ("dpo", ["b"], 1)):
        assert [len(e.sequences) for e in training_examples(pairs(), chat, stage)] == [
            1 if stage == "sft" else 2
        ] * 4
        items, same = changed_items(answered, stage, 5)
        assert ([prompt.id for prompt, _, _ in items], same) == (kept, identical)
    (example,) = evaluation_examples(items, chat, "dpo", "ethics")
    assert [
        chat.tokenizer.decode(s.answer_ids).removesuffix("<|im_end|>") for s in example.sequences
    ] == ["z", "x"]  # after wins


def test_inpo_is_attributed_to_its_own_answers(tiny_llama):
    chat, asked = Chat(tiny_llama.tokenizer, "chatml"), pairs()
    won, lost = (chat.sequence(asked[2].prompt, text) for text in ("question", "answers the"))
    own, (example,) = inpo_examples([Pair(3, "p2", won, lost, (-1.0, -2.0))], asked, chat)
    assert (own[0].id, own[0].chosen, own[0].rejected, own[0].source) == (
        "round 3, p2",
        "question",
        "answers the",
        "helpful",
    )
    assert (
        example == Example("round 3, p2", "helpful", (won, lost))
        and own[0].prompt == asked[2].prompt
    )
    with pytest.raises(
        StudyError, match="'p2', a prompt that it answered, is not among the 1 training pairs"
    ):
        inpo_examples([Pair(3, "p2", won, lost, (-1.0, -2.0))], asked[:1], chat)


def test_text_scores_have_the_sign_of_influence(tiny_llama):
    chat, tokenizer = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer
    train, both = training_examples(pairs(), chat, "sft"), training_examples(pairs(), chat, "dpo")
    own = text_scores(train, train, tokenizer, groups=["a", "a", "b", "b"])
    assert (own.by_item.argmin(0) == np.arange(4)).all(), (
        "an example lowers the loss of its own text most"
    )
    np.testing.assert_array_equal(own.groups["b"].by_item, own.by_item[:, 2:])
    texts = [
        [tokenizer.decode(e.sequences[side].input_ids, skip_special_tokens=True) for e in both]
        for side in (0, 1)
    ]
    chosen, rejected = (tfidf(texts[0], side).by_item for side in texts)
    np.testing.assert_allclose(text_scores(both, both, tokenizer).by_item, chosen - rejected)
    np.testing.assert_allclose(
        text_scores(both, both, tokenizer, raises=True).by_item, rejected - chosen
    )
    assert (np.diag(text_scores(both, both, tokenizer).by_item) < 0).all()


def test_the_reward_gap_is_the_difference_of_rewards(tiny_llama):
    chat, pad = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.pad_token_id
    network = fresh_adapters(tiny_llama, ("reward",), 4, 8, None, 0)
    with torch.no_grad():
        for weight in lora_weights(network, "reward").values():
            weight.normal_(std=0.1)
    head = torch.linspace(-1, 1, 32)
    examples = training_examples(pairs(), chat, "ppo")
    with torch.no_grad():
        found = RewardGapLoss(head).loss(network, examples, pad)
        rewards = rewards(
            network, head, [s for e in examples for s in e.sequences], pad
        ).view(-1, 2)
    np.testing.assert_allclose(found, rewards[:, 0] - rewards[:, 1], atol=1e-4)
    flipped = [Example(e.id, e.source, e.sequences[::-1]) for e in examples]
    for ours, theirs in zip(
        *(
            per_example_gradients(network, "reward", of, RewardGapLoss(head), pad).values()
            for of in (examples, flipped)
        )
    ):
        np.testing.assert_allclose(ours, -theirs, atol=1e-4)


def test_fresh_adapters_start_alike_and_change_nothing(tiny_llama):
    chat, pad = Chat(tiny_llama.tokenizer, "chatml"), tiny_llama.tokenizer.pad_token_id
    examples = training_examples(pairs(), chat, "dpo")
    with torch.no_grad():
        before = LogOddsLoss().loss(tiny_llama.model, examples, pad)
    network = fresh_adapters(tiny_llama, ("sft", "dpo"), 4, 8, None, seed=3)
    assert set(network.peft_config) == {"sft", "dpo"} and not network.training
    first, second = snapshot(network, "sft"), snapshot(network, "dpo")
    assert all(torch.equal(first[name], second[name]) for name in first) and any(
        w.any() for w in first.values()
    )
    with torch.no_grad():
        np.testing.assert_allclose(LogOddsLoss().loss(network, examples, pad), before, atol=1e-5)


def test_scaled_gradients():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(3, 2)}
    scaled = Scaled(InMemory(tensors, "xyz"), [0.5, 2.0, 1.0])
    assert (len(scaled), scaled.width("b"), scaled.ids) == (3, 2, ("x", "y", "z"))
    expected = InMemory(
        {name: t * torch.tensor([[0.5], [2.0], [1.0]]) for name, t in tensors.items()}, "xyz"
    )
    torch.testing.assert_close(scaled.squares, expected.squares)
    for layer in "ab":
        torch.testing.assert_close(next(scaled.blocks(layer))[1], next(expected.blocks(layer))[1])
