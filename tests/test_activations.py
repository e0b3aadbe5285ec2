"""Attribution by hidden states: the states of plain forward passes, the sign, and the choice of the
layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import some_examples
from rlhf_trust.attribution.activations import activation_difference, answer_states, choose_layers
from rlhf_trust.models import LoRA, new_adapter

PAD = 0


def trained(base):
    """A network whose adapter changes something."""
    model = new_adapter(base, LoRA(4, 8)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return model


@pytest.mark.parametrize("answers", [1, 2])
def test_states_are_those_of_plain_forward_passes(tiny, answers):
    model, examples = trained(tiny), some_examples(5, answers)
    found = answer_states(model, "default", examples, PAD, rows=3)
    assert found.shape == (3, 5, answers, 32)
    for i, example in enumerate(examples):
        for j, text in enumerate(example.sequences):
            with torch.no_grad():
                ids = torch.tensor([text.input_ids])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
            expected = [layer[0, text.answer_start :].mean(0).numpy() for layer in states]
            np.testing.assert_allclose(found[:, i, j], expected, rtol=1e-4, atol=1e-4)
    start = answer_states(model, None, examples, PAD)
    assert abs(start - found)[1:].max() > 0.01 and model.active_adapter == "default"
    np.testing.assert_allclose(start[0], found[0], atol=1e-6)  # embeddings have no adapter


def test_scores_by_hand_and_their_sign():
    rng = np.random.default_rng(0)
    train, queries = rng.standard_normal((6, 2, 8)), rng.standard_normal((4, 2, 8))
    found = activation_difference(train, queries, True)
    for i in range(6):
        for j in range(4):
            projection = (train[i, 0] - train[i, 1]) @ (queries[j, 0] - queries[j, 1])
            assert found.by_item[i, j] == pytest.approx(projection)
    # The mean over a vertical's items is the projection on its mean of bad - good.
    direction = (queries[1:, 0] - queries[1:, 1]).mean(0)
    expected = (train[:, 0] - train[:, 1]) @ direction
    assert found.by_item[:, 1:].mean(1) == pytest.approx(expected)
    lowers = activation_difference(train, queries).by_item
    assert lowers == pytest.approx(-found.by_item)
    # A pair drives its own change, and opposes it with its labels swapped.
    own = activation_difference(train, train).by_item
    assert (np.diag(own) < 0).all()
    swapped = activation_difference(train[:, ::-1], train).by_item
    assert swapped == pytest.approx(-own)


def test_single_answers_are_set_against_the_mean_training_answer():
    rng = np.random.default_rng(0)
    train, queries = rng.standard_normal((6, 1, 8)) + 5, rng.standard_normal((4, 2, 8))
    own = activation_difference(train, train).by_item
    centred = train[:, 0] - train[:, 0].mean(0)
    assert own == pytest.approx(-centred @ centred.T)
    # Of training examples that is a constant for each item.
    found = activation_difference(train, queries, raises=True).by_item
    gaps = found - train[:, 0] @ (queries[:, 0] - queries[:, 1]).T
    assert gaps == pytest.approx(np.tile(gaps[:1], (6, 1)))
    same = activation_difference(train[[0, 0, 0]], queries, raises=True).by_item
    assert same == pytest.approx(np.zeros((3, 4)))


def test_layers_are_chosen_on_other_items():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((8, 4))  # [examples, items]
    halves = np.array([rng.permutation(8) < 4 for _ in range(20)])
    layers = rng.standard_normal((3, 8, 4))
    layers[1][:, :2], layers[2][:, 2:] = truth[:, :2], truth[:, 2:]
    # Layer 1 predicts a's items without error, and so is b's; and the other way round.
    assert choose_layers(layers, halves, halves @ truth, list("aabb")) == {"a": 2, "b": 1}
