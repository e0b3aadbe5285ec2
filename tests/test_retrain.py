"""Small fits: they do what a plain AdamW loop does, the same each time, and leave everything else
as it was."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from rlhf_trust import StudyError
from rlhf_trust.attribution.validate import implicit_accuracy, ranked_right, sft_then_dpo
from rlhf_trust.chat import EncodedExample
from rlhf_trust.decode import Example
from rlhf_trust.losses import DPOLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import LoRA, load_base, lora_weights, new_adapter, restore, snapshot
from rlhf_trust.training import Recipe, example_losses, fit, random_head

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


def some_examples(count: int, sequences: int, seed: int = 0) -> list[Example]:
    rng = random.Random(seed)

    def sequence():
        prompt, answer = rng.randint(2, 9), rng.randint(1, 12)
        return EncodedExample(tuple(rng.randrange(3, 290) for _ in range(prompt + answer)), prompt)

    return [
        Example(f"e{i}", "random", tuple(sequence() for _ in range(sequences)))
        for i in range(count)
    ]


def settings(model):
    pairs = some_examples(12, 2)
    return {
        "sft": (NextTokenLoss(), some_examples(12, 1)),
        "reward": (RewardLoss(random_head(32, 0) * 4), pairs),
        "dpo": (DPOLoss(0.1, reference_logps(model, "sft", pairs, PAD)), pairs),
    }


def same(one: dict, other: dict) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_fit_learns_repeats_and_touches_nothing_else(tiny, stage):
    model = two_adapters(tiny)
    loss, examples = settings(model)[stage]
    recipe = Recipe(learning_rate=3e-3, batch=5, epochs=4, at_once=2)
    start, sft = snapshot(model, "default"), snapshot(model, "sft")
    frozen = {
        name: weight.detach().clone()
        for name, weight in model.named_parameters()
        if ".lora_" not in name
    }
    before = example_losses(model, "default", examples, loss, PAD)
    curve = fit(model, "default", examples, loss, PAD, recipe, seed=0)
    after, learnt = (
        example_losses(model, "default", examples, loss, PAD),
        snapshot(model, "default"),
    )
    assert len(curve) == 12 and after.mean() < before.mean() - 0.05
    assert not same(start, learnt) and same(sft, snapshot(model, "sft"))
    assert all(
        torch.equal(weight, frozen[name])
        for name, weight in model.named_parameters()
        if name in frozen
    )
    assert model.active_adapter == "sft" and not any(
        weight.requires_grad for weight in model.parameters()
    )
    assert all(weight.grad is None for weight in model.parameters())
    restore(model, "default", start)
    assert same(start, snapshot(model, "default"))
    np.testing.assert_array_equal(example_losses(model, "default", examples, loss, PAD), before)
    np.testing.assert_array_equal(fit(model, "default", examples, loss, PAD, recipe, seed=0), curve)
    assert same(learnt, snapshot(model, "default"))
    restore(model, "default", start)
    fit(model, "default", examples, loss, PAD, recipe, seed=1)
    assert not same(learnt, snapshot(model, "default"))


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_fit_is_adamw_on_the_mean_loss(tiny_llama, schedule):
    model = two_adapters(tiny_llama)
    loss, examples = NextTokenLoss(), some_examples(6, 1)
    start = snapshot(model, "sft")
    fit(
        model,
        "sft",
        examples,
        loss,
        PAD,
        Recipe(1e-2, batch=6, epochs=3, schedule=schedule, at_once=2),
        seed=0,
    )
    got = snapshot(model, "sft")
    restore(model, "sft", start)
    weights = list(lora_weights(model, "sft").values())
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (
            1 if schedule == "constant" else (1.0, 2 / 3, 1 / 3)[step]
        )
        optimizer.zero_grad()
        torch.stack([loss.loss(model, [example], PAD)[0] for example in examples]).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(weights, 1.0) > 1, "clipping has something to do"
        optimizer.step()
    for name, weight in lora_weights(model, "sft").items():
        torch.testing.assert_close(
            got[name], weight.detach(), atol=2e-4, rtol=0
        )  # Adam divides by tiny numbers
        assert (got[name] - start[name]).abs().max() > 5e-3


def test_weights_of_one_adapter_start_another(tiny_llama):
    model = two_adapters(tiny_llama)
    restore(model, "default", snapshot(model, "sft"))
    assert same(snapshot(model, "default"), snapshot(model, "sft"))
    pairs = some_examples(4, 2)
    loss = DPOLoss(0.1, reference_logps(model, "sft", pairs, PAD))
    np.testing.assert_allclose(
        example_losses(model, "default", pairs, loss, PAD), math.log(2), atol=1e-6
    )


def test_sft_then_dpo_starts_anew_each_time(tiny_llama):
    model = two_adapters(tiny_llama)
    model.add_adapter("dpo", model.peft_config["default"])
    model.eval()
    start, pairs = snapshot(model, "default"), some_examples(10, 2)
    chosen = [Example(p.id, p.source, p.sequences[:1]) for p in pairs]

    def run():
        sft_then_dpo(
            model,
            start,
            chosen,
            pairs,
            0.5,
            Recipe(3e-3, batch=5, epochs=2),
            Recipe(1e-2, batch=5, epochs=15),
            PAD,
            0,
        )
        return snapshot(model, "sft"), snapshot(model, "dpo")

    before = example_losses(
        model, "default", chosen, NextTokenLoss("mean"), PAD
    ).mean()  # SFT starts as this one is
    sft, dpo = run()
    assert example_losses(model, "sft", chosen, NextTokenLoss("mean"), PAD).mean() < before - 0.02
    assert not same(sft, dpo) and implicit_accuracy(model, pairs, 0.5, PAD).mean() == 1
    assert (
        implicit_accuracy(
            model, [Example(p.id, "", p.sequences[::-1]) for p in pairs], 0.5, PAD
        ).mean()
        == 0
    )
    again = run()
    assert same(again[0], sft) and same(again[1], dpo)


def test_a_backbone_in_bfloat16_learns_too(tiny_directories):
    model = two_adapters(load_base(f"path:{tiny_directories['llama']}", dtype="bfloat16"))
    loss, examples = settings(model)["sft"]
    before = example_losses(model, "sft", examples, loss, PAD).mean()
    fit(model, "sft", examples, loss, PAD, Recipe(3e-3, batch=6, epochs=3), seed=0)
    assert example_losses(model, "sft", examples, loss, PAD).mean() < before - 0.05
    assert all(weight.dtype == torch.float32 for weight in snapshot(model, "sft").values())


def test_ranked_right_reads_the_sign_of_the_margin(tiny_llama):
    model = two_adapters(tiny_llama)
    head, pairs = random_head(32, 3), some_examples(9, 2)
    assert float(head.norm()) == pytest.approx(1) and torch.equal(head, random_head(32, 3))
    right = ranked_right(example_losses(model, "sft", pairs, RewardLoss(head), PAD))
    turned = [Example(p.id, p.source, p.sequences[::-1]) for p in pairs]
    assert 0 < right.sum() < 9
    np.testing.assert_array_equal(
        right, 1 - ranked_right(example_losses(model, "sft", turned, RewardLoss(head), PAD))
    )
    assert ranked_right(np.array([math.log(2) - 1e-6, math.log(2) + 1e-6])).tolist() == [1, 0]


def test_bad_input(tiny_llama):
    model = two_adapters(tiny_llama)
    loss, examples = settings(model)["sft"]
    recipe = Recipe(1e-3)
    with pytest.raises(StudyError, match="no example"):
        fit(model, "sft", [], loss, PAD, recipe, 0)
    with pytest.raises(StudyError, match="no LoRA layer of an adapter 'ppo'; it has default, sft"):
        fit(model, "ppo", examples, loss, PAD, recipe, 0)
    with pytest.raises(StudyError, match="schedule"):
        Recipe(1e-3, schedule="cosine")
    with pytest.raises(StudyError, match="learning_rate must be above 0"):
        Recipe(0.0)
    other = snapshot(model, "sft")
    other.pop(next(iter(other)))
    with pytest.raises(StudyError, match="do not fit adapter 'sft'"):
        restore(model, "sft", other)
    spoiled = snapshot(model, "sft")
    restore(
        model, "sft", {name: torch.full_like(weight, math.nan) for name, weight in spoiled.items()}
    )
    with pytest.raises(StudyError, match="at step 1 the next_token_sum loss is nan"):
        fit(model, "sft", examples, loss, PAD, recipe, 0)
    assert model.active_adapter == "sft"
    with model.disable_adapter(), pytest.raises(StudyError, match="takes no part"):
        fit(model, "sft", examples, loss, PAD, recipe, 0)
    model.train()
    with pytest.raises(StudyError, match="training mode"):
        fit(model, "sft", examples, loss, PAD, recipe, 0)
