"""A pass that starts from kept lower states is the whole pass."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import random_head
from rlhf_trust import StudyError
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.chat import EncodedExample
from rlhf_trust.decode import (
    Example,
    LowerStates,
    MultipleChoice,
    answer_logps,
    backbone,
    first_adapted_layer,
    option_logps,
)
from rlhf_trust.losses import DPOLoss, LogOddsLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import LoRA, load_base, new_adapter, restore, snapshot, using
from rlhf_trust.training import TrainConfig, example_losses, fit

PAD = 0


def examples(count: int, texts: int) -> list[Example]:
    """Pairs (or single texts) that share a prompt, of all lengths."""
    rng = random.Random(count)

    def ids(longest):
        return tuple(rng.randrange(3, 290) for _ in range(rng.randint(1, longest)))

    found = []
    for index in range(count):
        prompt = ids(20)
        some = tuple(EncodedExample(prompt + ids(15), len(prompt)) for _ in range(texts))
        found.append(Example(f"example {index}", "test", some))
    return found


def adapted(base, layers: str):
    network = new_adapter(base, LoRA(rank=4, alpha=8, layers=layers), seed=0).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return network


@pytest.fixture
def model(tiny):
    return adapted(tiny, "upper 1/2")


def losses(model, head):
    pairs = examples(7, 2)
    reference = reference_logps(model, "default", pairs, PAD)
    yield NextTokenLoss(), examples(7, 1)
    yield RewardLoss(head), pairs
    yield DPOLoss(0.1, {key: (a - 1, b) for key, (a, b) in reference.items()}), pairs
    yield LogOddsLoss(), pairs


def test_losses_and_gradients_from_kept_states(model):
    head = random_head(model.config.hidden_size, 0)
    kept = LowerStates(model)
    assert kept.first == first_adapted_layer(model) == 1
    for loss, some in losses(model, head):
        for rows in (2, 8):
            whole, short = (
                per_example_gradients(model, "default", some, loss, PAD, rows, kept=states)
                for states in (None, kept)
            )
            for name in whole:
                np.testing.assert_allclose(short[name], whole[name], rtol=1e-4, atol=1e-5)
        both = [example_losses(model, "default", some, loss, PAD, kept=k) for k in (None, kept)]
        np.testing.assert_allclose(*both, rtol=1e-5, atol=1e-5)


def test_a_training_from_kept_states_takes_the_same_steps(model):
    start, some = snapshot(model, "default"), examples(11, 1)
    config = TrainConfig(learning_rate=1e-2, batch_size=4, epochs=3)
    curves = []
    for kept in (None, LowerStates(model)):
        restore(model, "default", start)
        curves.append(fit(model, "default", some, NextTokenLoss(), PAD, config, kept=kept))
    np.testing.assert_allclose(*curves, rtol=1e-4)
    assert (curves[0]["grad_norm"] > 0).all()


@pytest.mark.parametrize("shared", [0, 25])
@pytest.mark.parametrize("layers", ["upper 1/2", "all"])
def test_options_of_several_models_from_kept_states(tiny, shared, layers):
    """With and without worked examples that all contexts begin with; with adapter and without.
    Where all layers are adapted nothing is kept."""
    model = adapted(tiny, layers)
    rng = random.Random(shared)
    ids = lambda n: tuple(rng.randrange(3, 290) for _ in range(n))  # noqa: E731
    primer = ids(shared)
    choices = [
        MultipleChoice(str(i), primer + ids(rng.randint(1, 9)), (ids(3), ids(1), ids(5)))
        for i in range(6)
    ]
    kept = LowerStates(model)
    for adapter in ("default", None):
        with using(model, adapter):
            whole = option_logps(model, choices, PAD, tokens=120)
            short = option_logps(model, choices, PAD, tokens=120, kept=kept)
        np.testing.assert_allclose(short, whole, rtol=1e-5, atol=1e-5)


def test_the_layers_below_run_once_and_are_put_back(model, monkeypatch):
    some, layers = examples(5, 1), list(backbone(model).layers)
    runs = []
    layers[0].register_forward_hook(lambda *_: runs.append(1))
    kept = LowerStates(model)
    config = TrainConfig(learning_rate=1e-3, batch_size=2, epochs=2)
    for _ in range(2):
        fit(model, "default", some, NextTokenLoss(), PAD, config, kept=kept)
    assert len(runs) == len(some)
    assert list(backbone(model).layers) == layers


def test_states_kept_above_an_adapter_are_refused(model, tiny_llama):
    lower = new_adapter(tiny_llama, LoRA(rank=4, alpha=8)).eval()
    kept = LowerStates(lower)
    assert kept.first == 0  # nothing to keep
    kept.first = 1
    with pytest.raises(StudyError, match="begin below layer 1"):
        example_losses(lower, "default", examples(2, 1), NextTokenLoss(), PAD, kept=kept)


def test_states_of_another_backbone_are_refused(model, tiny):
    other = adapted(load_base(tiny.source, "bfloat16"), "upper 1/2")
    kept, choice = LowerStates(model), MultipleChoice("x", (5, 6, 7), ((8,), (9,)))
    with pytest.raises(StudyError, match="of another backbone"):
        example_losses(other, "default", examples(2, 1), NextTokenLoss(), PAD, kept=kept)
    with pytest.raises(StudyError, match="of another backbone"):
        option_logps(other, [choice], PAD, kept=kept)


def test_texts_without_answer_and_ids_beyond_the_vocabulary(model):
    kept = LowerStates(model)
    sums, counts = answer_logps(model, [EncodedExample((5, 6), 2)], PAD, kept=kept)
    assert sums == counts == [0]
    choices = [MultipleChoice("x", (999, 5, last), ((8,), (9,))) for last in (6, 7)]
    with pytest.raises(StudyError, match="beyond the 300"):  # in what the contexts begin with
        option_logps(model, choices, PAD, kept=kept)


def test_log_odds_are_of_one_prompt(model):
    two = (EncodedExample((5, 6, 7), 2), EncodedExample((6, 6, 7), 2))
    with pytest.raises(StudyError, match="two answers to one prompt"):
        example_losses(model, "default", [Example("x", "test", two)], LogOddsLoss(), PAD)
