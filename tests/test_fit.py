"""The fast training loop: a plain AdamW loop's steps, the same each time, and everything else left
as it was."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_head, some_examples
from rlhf_trust import StudyError
from rlhf_trust.losses import DPOLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import LoRA, load_base, lora_weights, new_adapter, restore, snapshot
from rlhf_trust.training import TrainConfig, example_losses, fit, training_order
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

PAD = 0


def two_adapters(base):
    """``default`` as a fresh adapter is (B zero), ``sft`` with weights; ``sft`` is active, nothing
    is trainable."""
    model = new_adapter(base, LoRA(4, 8))
    model.add_adapter("sft", model.peft_config["default"])
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in lora_weights(model, "sft").values():
            weight.normal_(std=0.1)
    model.set_adapter("sft")
    model.requires_grad_(False)
    return model.eval()


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_fit_learns_repeats_and_touches_nothing_else(tiny_llama, stage):
    model, pairs = two_adapters(tiny_llama), some_examples(12, 2)
    loss, examples = {
        "sft": lambda: (NextTokenLoss(), some_examples(12, 1)),
        "reward": lambda: (RewardLoss(random_head(32, 0) * 4), pairs),
        "dpo": lambda: (DPOLoss(0.1, reference_logps(model, "sft", pairs, PAD)), pairs),
    }[stage]()
    settings = dict(learning_rate=5e-3, batch_size=5, micro_batch_size=2, epochs=4)
    start = snapshot(model, "default")
    frozen = {n: w.clone() for n, w in model.state_dict().items() if ".default." not in n}
    before = example_losses(model, "default", examples, loss, PAD)

    def run(seed=0):
        restore(model, "default", start)
        curve = fit(model, "default", examples, loss, PAD, TrainConfig(**settings, seed=seed))
        return curve, snapshot(model, "default")

    curve, learnt = run()
    after = example_losses(model, "default", examples, loss, PAD)
    assert len(curve) == 12 and after.mean() < before.mean() - 0.05
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in frozen.items())
    assert model.active_adapter == "sft"
    assert not any(weight.requires_grad for weight in model.parameters())
    assert all(weight.grad is None for weight in model.parameters())
    again, twice = run()
    pd.testing.assert_frame_equal(again, curve, check_exact=True)
    assert same(learnt, twice) and not same(learnt, run(seed=1)[1])
    restore(model, "default", start)
    np.testing.assert_array_equal(example_losses(model, "default", examples, loss, PAD), before)


def test_what_was_trainable_before_is_afterwards(tiny_llama):
    model = two_adapters(tiny_llama)
    model.set_adapter("default")
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    head = torch.nn.Parameter(random_head(32, 0) * 4)
    before, pairs = head.detach().clone(), some_examples(4, 2)
    fit(model, "sft", pairs, RewardLoss(head), PAD, TrainConfig(learning_rate=1e-2))
    assert model.active_adapter == "default"
    assert trainable == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not torch.equal(before, head) and head.requires_grad and head.grad is None
    fit(
        model,
        "sft",
        pairs,
        RewardLoss(head.requires_grad_(False)),
        PAD,
        TrainConfig(learning_rate=1e-2),
    )
    assert not head.requires_grad


def test_fit_is_adamw_on_the_batchs_mean_loss(tiny_llama):
    """With warm-up, cosine and clipping, on the cross-entropy of a batch's answer tokens."""
    model, examples = two_adapters(tiny_llama), some_examples(10, 1)
    settings = dict(learning_rate=1e-2, batch_size=4, micro_batch_size=3, epochs=2, warmup=1 / 3)
    start = snapshot(model, "sft")
    curve = fit(model, "sft", examples, NextTokenLoss(), PAD, TrainConfig(**settings))
    learnt = snapshot(model, "sft")

    restore(model, "sft", start)
    weights = list(lora_weights(model, "sft").values())
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=6)
    texts = [example.sequences[0] for example in examples]
    order = training_order(list(map(len, texts)), 4, seed=0)
    plain = []
    for batch in [order[:4], order[4:8], order[8:]] * 2:
        optimizer.zero_grad()
        logits, targets = [], []
        for text in (texts[i] for i in batch):
            ids = torch.tensor(text.input_ids)
            logits.append(model(ids[None]).logits[0, text.answer_start - 1 : -1])
            targets.append(ids[text.answer_start :])
        loss = cross_entropy(torch.cat(logits), torch.cat(targets))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        plain.append((loss.item(), norm.item(), schedule.get_last_lr()[0]))
        optimizer.step()
        schedule.step()
    assert max(norm for _, norm, _ in plain) > 1, "clipping has something to do"
    np.testing.assert_allclose(curve.to_numpy(), plain, rtol=1e-3)
    for name, weight in lora_weights(model, "sft").items():
        # Adam divides by tiny numbers.
        torch.testing.assert_close(learnt[name], weight.detach(), atol=2e-4, rtol=0)
        assert (learnt[name] - start[name]).abs().max() > 5e-3


def test_weights_of_one_adapter_start_another(tiny_llama):
    model, pairs = two_adapters(tiny_llama), some_examples(4, 2)
    restore(model, "default", snapshot(model, "sft"))
    loss = DPOLoss(0.1, reference_logps(model, "sft", pairs, PAD))
    losses = example_losses(model, "default", pairs, loss, PAD)
    np.testing.assert_allclose(losses, math.log(2), atol=1e-6)
    other = snapshot(model, "sft")
    other.pop(next(iter(other)))
    with pytest.raises(StudyError, match="do not fit adapter 'sft'"):
        restore(model, "sft", other)


def test_a_backbone_in_bfloat16_learns_too(tiny_directories):
    model = two_adapters(load_base(f"path:{tiny_directories['llama']}", dtype="bfloat16"))
    loss, examples = NextTokenLoss("mean"), some_examples(12, 1)
    before = example_losses(model, "sft", examples, loss, PAD).mean()
    config = TrainConfig(learning_rate=5e-3, batch_size=6, epochs=4)
    fit(model, "sft", examples, loss, PAD, config)
    assert example_losses(model, "sft", examples, loss, PAD).mean() < before - 0.05
    assert all(weight.dtype == torch.float32 for weight in snapshot(model, "sft").values())


def test_bad_input(tiny_llama):
    for settings, words in (
        ({"learning_rate": 0.0}, "learning_rate: must be above 0"),
        ({"learning_rate": 1e-3, "micro_batch_size": 0}, "micro_batch_size: must be at least 1"),
        ({"learning_rate": 1e-3, "warmup": 1.5}, "warmup: must be from 0 to 1"),
        ({"learning_rate": 1e-3, "warmup": -0.5}, "warmup: must be from 0 to 1"),
    ):
        with pytest.raises(StudyError, match=words):
            TrainConfig(**settings)
    model, examples = two_adapters(tiny_llama), some_examples(6, 1)

    def refused(words, adapter="sft", some=examples):
        with pytest.raises(StudyError, match=words):
            fit(model, adapter, some, NextTokenLoss(), PAD, TrainConfig(learning_rate=1e-3))
        assert model.active_adapter == "sft"
        assert not any(weight.requires_grad for weight in model.parameters())

    refused("no example", some=[])
    refused("no LoRA layer of an adapter 'ppo'; it has default, sft", adapter="ppo")
    spoiled = snapshot(model, "sft")
    restore(model, "sft", {name: weight * math.nan for name, weight in spoiled.items()})
    refused("at step 1 the next_token_sum loss is nan")
    restore(model, "sft", spoiled)
    with model.disable_adapter():
        refused("takes no part")
    model.requires_grad_(False)  # PEFT makes the active adapter trainable when it comes back
    for weight in lora_weights(model, "sft").values():
        weight.data = weight.data.bfloat16()
    refused("are not float32")
    model.train()
    refused("training mode")
