"""Small retrainings of one adapter, hundreds of them from the same start, to hold influence scores against the truth.

An influence score is a claim about a model trained again on other data. Here it is trained again: the same backbone in
memory, one adapter's LoRA weights put back (:func:`snapshot`, :func:`restore`) and fitted to a part of the examples
(:func:`fit`) through the very loss that is attributed. It is the recipe of the study's own stages (AdamW without weight
decay, gradients clipped to norm 1, batches of like length), without their trainers, whose set-up takes longer than
such a fit.

What is held fixed so that the adapter alone learns: the backbone, other adapters (DPO's reference among them, whose
log-probabilities come with the loss, ``gradients.reference_logps``), and for the reward loss the head. A retraining of
the reward model takes a saved head or :func:`random_head`: TRL's own starts at zero, where the adapter has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import Random

import numpy as np
import torch

from .. import StudyError
from ..decode import batches_by_length
from ..models import Base, new_adapter
from ..progress import progress
from .gradients import DPOLoss, Example, LogOddsLoss, Loss, NextTokenLoss, lora_layers, only_adapter, reference_logps
from .metric import log_odds

CLIP = 1.0
"""Largest norm of a step's gradient."""


@dataclass(frozen=True)
class Recipe:
    """How an adapter is fitted.

    ``batch``: examples of an optimiser step. ``schedule``: learning rate ``linear``, falling to 0 over the run, or
    ``constant``. ``at_once``: examples that go through the model together; fewer take less memory and change the result
    only in the last digits.
    """

    learning_rate: float
    batch: int = 16
    epochs: int = 1
    schedule: str = "linear"
    at_once: int = 8

    def __post_init__(self):
        if self.schedule not in ("linear", "constant"):
            raise StudyError(f"schedule: must be linear or constant, got {self.schedule!r}")
        if not self.learning_rate > 0 or min(self.batch, self.epochs, self.at_once) < 1:
            raise StudyError("recipe: learning_rate must be above 0, and batch, epochs and at_once at least 1")


def fit(network, adapter: str, examples: Seq[Example], loss: Loss, pad: int, recipe: Recipe, seed: int,
        desc: str = "") -> np.ndarray:
    """Minimise the mean loss of ``examples`` over one adapter's LoRA weights, in place.

    Parameters
    ----------
    network
        A PEFT model in evaluation mode (no dropout). Which adapter is active and which weights are trainable is the
        same after the call as before.
    seed
        Of the order of batches; every epoch has another order. Nothing else is random, so a repeat on the same machine
        (and number of threads) gives the same bytes.
    desc
        Shows a progress bar of that name.

    Returns
    -------
    ndarray [steps]
        Each step's mean loss before its update.

    Raises
    ------
    StudyError
        If there is no example or adapter, the model is in training mode, the LoRA weights are not float32, or the loss
        or its gradient is not finite.
    """
    if not examples:
        raise StudyError("fit: there is no example")
    if any(module.training for module in network.modules()):
        raise StudyError("fit: the model is in training mode, where dropout would act; call eval() first")
    weights = list(lora_weights(network, adapter).values())
    if any(weight.dtype != torch.float32 for weight in weights):
        raise StudyError(f"fit: the LoRA weights of {adapter!r} are not float32, too coarse for small steps")
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    batches = _batches(examples, recipe, seed)
    found = []
    try:
        with only_adapter(network, adapter, weights), torch.enable_grad():
            for step, batch in enumerate(progress(batches, desc=desc, unit="step") if desc else batches):
                if recipe.schedule == "linear":
                    optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - step / len(batches))
                optimizer.zero_grad()
                found.append(_accumulate(network, adapter, [examples[i] for i in batch], loss, pad, recipe.at_once))
                norm = float(torch.nn.utils.clip_grad_norm_(weights, CLIP))
                if not (math.isfinite(found[-1]) and math.isfinite(norm)):
                    raise StudyError(f"fit: at step {step + 1} the {loss.name} loss is {found[-1]} and its gradient's norm "
                                     f"{norm}; lower learning_rate, or look for a broken example")
                optimizer.step()
    finally:
        optimizer.zero_grad()
    return np.array(found)


def _accumulate(network, adapter: str, batch: Seq[Example], loss: Loss, pad: int, at_once: int) -> float:
    """Add the gradient of a batch's mean loss to the weights', ``at_once`` examples at a time; returns that mean."""
    total = 0.0
    for start in range(0, len(batch), at_once):
        part = loss.loss(network, batch[start : start + at_once], pad).sum() / len(batch)
        if not part.requires_grad:
            raise StudyError(f"fit: adapter {adapter!r} takes no part in the loss (disabled or merged?)")
        part.backward()
        total += float(part.detach())
    return total


def _batches(examples: Seq[Example], recipe: Recipe, seed: int) -> list[list[int]]:
    """The batches of all epochs: like lengths together (little is padded), in an order drawn anew each epoch.

    Examples are shuffled first, so that which ones of a length meet in a batch changes too.
    """
    random, found = Random(f"fit/{seed}"), []
    lengths = [max(map(len, example.sequences)) for example in examples]
    for _ in range(recipe.epochs):
        order = random.sample(range(len(examples)), len(examples))
        groups = [[order[i] for i in group] for group in batches_by_length([lengths[i] for i in order], recipe.batch)]
        random.shuffle(groups)
        found += groups
    return found


def losses(network, adapter: str, examples: Seq[Example], loss: Loss, pad: int, rows: int = 32) -> np.ndarray:
    """Each example's loss under one adapter, [examples], without gradients. ``rows``: sequences in one pass."""
    if isinstance(loss, LogOddsLoss):  # two answers to one prompt, which then runs once
        return log_odds(network, adapter, examples, pad)
    found = np.zeros(len(examples))
    lengths = [max(map(len, example.sequences)) for example in examples]
    with only_adapter(network, adapter), torch.no_grad():
        for batch in batches_by_length(lengths, max(1, rows // loss.sequences)):
            found[batch] = loss.loss(network, [examples[i] for i in batch], pad).double().cpu().numpy()
    return found


def fresh_adapters(base: Base, names: Seq[str], rank: int, alpha: int, targets: list[str] | None, seed: int):
    """The backbone with fresh adapters of these names, all with the same weights (they change nothing yet)."""
    network = new_adapter(base, rank, alpha, targets, seed)
    start = snapshot(network, "default")
    for name in names:
        network.add_adapter(name, network.peft_config["default"])
        restore(network, name, start)
    network.delete_adapter("default")
    network.set_adapter(names[0])
    return network.eval()


def sft_then_dpo(network, start: dict[str, torch.Tensor], chosen: Seq[Example], pairs: Seq[Example], beta: float,
                 sft: Recipe, dpo: Recipe, pad: int, seed: int) -> None:
    """The study's order anew, in place: adapter ``sft`` from ``start`` on the chosen answers (mean loss a token), then
    ``dpo`` from it on the pairs, against it. ``chosen``, ``pairs``: ``stages.training_examples`` of either stage."""
    restore(network, "sft", start)
    fit(network, "sft", chosen, NextTokenLoss("mean"), pad, sft, seed)
    restore(network, "dpo", snapshot(network, "sft"))
    fit(network, "dpo", pairs, DPOLoss(beta, reference_logps(network, "sft", pairs, pad)), pad, dpo, seed)


def implicit_accuracy(network, pairs: Seq[Example], beta: float, pad: int) -> np.ndarray:
    """Which pairs DPO's implicit reward (adapter ``dpo`` against ``sft``) ranks as people did, 0 or 1: [pairs]."""
    return ranked_right(losses(network, "dpo", pairs, DPOLoss(beta, reference_logps(network, "sft", pairs, pad)), pad))


def ranked_right(pair_losses: np.ndarray) -> np.ndarray:
    """Which pairs a model ranks as people did, 0 or 1, from their reward or DPO losses [n]: −log σ(margin) lies below
    log 2 exactly where the margin is above 0. The mean is the (implicit) reward accuracy."""
    return (np.asarray(pair_losses) < math.log(2)).astype(float)


def random_head(hidden: int, seed: int) -> torch.Tensor:
    """A reward head to hold fixed: a random direction of length 1, [hidden]."""
    head = torch.randn(hidden, generator=torch.Generator().manual_seed(seed))
    return head / head.norm()


def lora_weights(network, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's LoRA weights by their names without the adapter's, as ``adapter_model.safetensors`` has them."""
    return {name: layer.weight for name, layer in lora_layers(network, adapter).items()}


def snapshot(network, adapter: str) -> dict[str, torch.Tensor]:
    """A copy of an adapter's LoRA weights, for :func:`restore`."""
    return {name: weight.detach().clone() for name, weight in lora_weights(network, adapter).items()}


def restore(network, adapter: str, saved: dict[str, torch.Tensor]) -> None:
    """Put weights back to the bit; of another adapter of the same shape, too: DPO starts as the SFT adapter by
    ``restore(network, "dpo", snapshot(network, "sft"))``."""
    weights = lora_weights(network, adapter)
    misfits = {(n, tuple(w.shape)) for n, w in weights.items()} ^ {(n, tuple(w.shape)) for n, w in saved.items()}
    if misfits:
        raise StudyError(f"restore: the weights do not fit adapter {adapter!r} ({min(misfits)[0]}); take them from one of "
                         "the same rank and targets")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
