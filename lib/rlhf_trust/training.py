"""Training: TRL's trainers for the stages that a notebook shows, and one fast loop for every retraining.

:func:`train_sft`, :func:`train_reward` and :func:`train_dpo` are TRL's trainers on our own tokens, so that training,
evaluation and attribution see the same ids. :func:`fit` trains one adapter on the same backbone through the very loss
that is attributed (:mod:`.losses`), from weights put back by ``models.restore``: hundreds of retrainings, without a
trainer's set-up, which takes longer than such a fit.

What is held fixed in :func:`fit` so that the adapter alone learns: the backbone, other adapters (DPO's reference among
them, whose log-probabilities come with the loss, ``losses.reference_logps``), and for the reward loss the head. A
retraining of the reward model takes a saved head or :func:`random_head`: TRL's own starts at zero, where the adapter
has no gradient.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from . import StudyError
from .artifacts import progress
from .chat import Chat
from .data.preferences import PreferencePair
from .decode import PAD_TO, Example, answer_logps, batches_by_length, rewards
from .losses import LogOddsLoss, Loss, log_odds
from .models import (
    Base,
    load_adapters,
    lora_config,
    lora_weights,
    new_adapter,
    only_adapter,
    restore,
    save_adapter,
    snapshot,
)
from .sources import model_directory

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
            raise StudyError(
                "recipe: learning_rate must be above 0, and batch, epochs and at_once at least 1"
            )


def fit(
    network,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    recipe: Recipe,
    seed: int,
    desc: str = "",
) -> np.ndarray:
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
        raise StudyError(
            "fit: the model is in training mode, where dropout would act; call eval() first"
        )
    weights = list(lora_weights(network, adapter).values())
    if any(weight.dtype != torch.float32 for weight in weights):
        raise StudyError(
            f"fit: the LoRA weights of {adapter!r} are not float32, too coarse for small steps"
        )
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    batches = _batches(examples, recipe, seed)
    found = []
    try:
        with only_adapter(network, adapter, weights), torch.enable_grad():
            for step, batch in enumerate(
                progress(batches, desc=desc, unit="step") if desc else batches
            ):
                if recipe.schedule == "linear":
                    optimizer.param_groups[0]["lr"] = recipe.learning_rate * (
                        1 - step / len(batches)
                    )
                optimizer.zero_grad()
                found.append(
                    _accumulate(
                        network, adapter, [examples[i] for i in batch], loss, pad, recipe.at_once
                    )
                )
                norm = float(torch.nn.utils.clip_grad_norm_(weights, CLIP))
                if not (math.isfinite(found[-1]) and math.isfinite(norm)):
                    raise StudyError(
                        f"fit: at step {step + 1} the {loss.name} loss is {found[-1]} and its gradient's norm "
                        f"{norm}; lower learning_rate, or look for a broken example"
                    )
                optimizer.step()
    finally:
        optimizer.zero_grad()
    return np.array(found)


def _accumulate(
    network, adapter: str, batch: Sequence[Example], loss: Loss, pad: int, at_once: int
) -> float:
    """Add the gradient of a batch's mean loss to the weights', ``at_once`` examples at a time; returns that mean."""
    total = 0.0
    for start in range(0, len(batch), at_once):
        part = loss.loss(network, batch[start : start + at_once], pad).sum() / len(batch)
        if not part.requires_grad:
            raise StudyError(
                f"fit: adapter {adapter!r} takes no part in the loss (disabled or merged?)"
            )
        part.backward()
        total += float(part.detach())
    return total


def _batches(examples: Sequence[Example], recipe: Recipe, seed: int) -> list[list[int]]:
    """The batches of all epochs: like lengths together (little is padded), in an order drawn anew each epoch.

    Examples are shuffled first, so that which ones of a length meet in a batch changes too.
    """
    random, found = Random(f"fit/{seed}"), []
    lengths = [max(map(len, example.sequences)) for example in examples]
    for _ in range(recipe.epochs):
        order = random.sample(range(len(examples)), len(examples))
        groups = [
            [order[i] for i in group]
            for group in batches_by_length([lengths[i] for i in order], recipe.batch)
        ]
        random.shuffle(groups)
        found += groups
    return found


def example_losses(
    network, adapter: str, examples: Sequence[Example], loss: Loss, pad: int, rows: int = 32
) -> np.ndarray:
    """Each example's loss under one adapter, [examples], without gradients. ``rows``: sequences in one pass."""
    if isinstance(loss, LogOddsLoss):  # two answers to one prompt, which then runs once
        return log_odds(network, adapter, examples, pad)
    found = np.zeros(len(examples))
    lengths = [max(map(len, example.sequences)) for example in examples]
    with only_adapter(network, adapter), torch.no_grad():
        for batch in batches_by_length(lengths, max(1, rows // loss.sequences)):
            found[batch] = (
                loss.loss(network, [examples[i] for i in batch], pad).double().cpu().numpy()
            )
    return found


def fresh_adapters(
    base: Base, names: Sequence[str], rank: int, alpha: int, targets: list[str] | None, seed: int
):
    """The backbone with fresh adapters of these names, all with the same weights (they change nothing yet)."""
    network = new_adapter(base, rank, alpha, targets, seed)
    start = snapshot(network, "default")
    for name in names:
        network.add_adapter(name, network.peft_config["default"])
        restore(network, name, start)
    network.delete_adapter("default")
    network.set_adapter(names[0])
    return network.eval()


def random_head(hidden: int, seed: int) -> torch.Tensor:
    """A reward head to hold fixed: a random direction of length 1, [hidden]."""
    head = torch.randn(hidden, generator=torch.Generator().manual_seed(seed))
    return head / head.norm()


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one TRL stage.

    ``batch`` counts the examples of an optimiser step (pairs where a stage trains on pairs); ``at_once`` how many of them
    go through the model together: fewer take less memory and change the result only in the last digits.
    """

    learning_rate: float
    batch: int
    at_once: int = 4
    epochs: int = 1
    warmup: float = 0.1
    seed: int = 0


def trl_arguments(kind: type, config: TrainConfig, examples: int, **more):
    """A TRL configuration for one process: no mixed precision, no checkpointing, no checkpoints, no reports, no
    shuffling (:func:`training_order` has done it).

    TRL's own defaults are bf16 and gradient checkpointing, on a CPU too.
    """
    steps = math.ceil(examples / config.batch) * config.epochs
    at_once = math.gcd(config.batch, config.at_once)
    return kind(
        output_dir=tempfile.gettempdir(),
        learning_rate=config.learning_rate,
        seed=config.seed,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=config.batch // at_once,
        num_train_epochs=config.epochs,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        max_length=None,
        pad_to_multiple_of=PAD_TO,
        **more,
    )


def training_order(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """An order of examples in which every batch holds like lengths, the batches shuffled: little is padded.

    Of the examples left over for a shorter last batch, the batch itself stays last.
    """
    groups = batches_by_length(lengths, batch)
    last = [groups.pop()] if len(groups[-1]) < batch else []
    Random(seed).shuffle(groups)
    return [index for group in groups + last for index in group]


class Curve(TrainerCallback):
    """Keeps what the trainer logs as rows (step, metric, value), shows a bar, and stops at a loss that is no number."""

    def __init__(self, stage: str, metrics: Sequence[str]):
        self.stage, self.metrics, self.rows, self._bar = stage, metrics, [], None

    def on_train_begin(self, args, state, control, **_):
        self._bar = progress(total=state.max_steps, desc=self.stage, unit="step")

    def on_step_end(self, args, state, control, **_):
        self._bar.update(1)

    def on_train_end(self, args, state, control, **_):
        self._bar.close()

    def on_log(self, args, state, control, logs=None, **_):
        for metric in self.metrics:
            if metric in (logs or {}):
                value = float(logs[metric])
                if not math.isfinite(value) and metric in ("loss", "grad_norm"):
                    raise StudyError(
                        f"{self.stage}: {metric} is {value} at step {state.global_step}; "
                        "lower learning_rate, or look for a broken row in that batch"
                    )
                self.rows.append(
                    {
                        "stage": self.stage,
                        "step": state.global_step,
                        "metric": metric,
                        "value": value,
                    }
                )

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["stage", "step", "metric", "value"])


def run_trl(trainer: Trainer, curve: Curve) -> pd.DataFrame:
    """Train with the curve as the only thing that is shown.

    TRL runs the output head at positions that have a label where it has a Triton kernel, and elsewhere at all of them, so that
    devices which compile for every shape need not. A CPU does not, and prompts are more than half of a batch.
    """
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    with patch.object(trl.trainer.utils, "_use_triton", lambda device: True):
        trainer.train()
    trainer.model.eval()
    return curve.table()


def sft_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    """Prompt + chosen answer with a mask over the answer."""
    sequences = [chat.sequence(pair.prompt, pair.chosen) for pair in pairs]
    order = training_order([len(s) for s in sequences], config.batch, config.seed)
    return Dataset.from_list(
        [
            {
                "input_ids": list(s.input_ids),
                "completion_mask": [0] * s.answer_start + [1] * (len(s) - s.answer_start),
            }
            for s in (sequences[index] for index in order)
        ]
    )


def train_sft(
    base: Base,
    chat: Chat,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    rank: int,
    alpha: int,
    targets: list[str] | None,
    out: Path,
) -> pd.DataFrame:
    """Train a fresh LoRA adapter on the chosen answers and save it to ``out``; returns the curve."""
    model = new_adapter(base, rank, alpha, targets, seed=config.seed)
    trainer = SFTTrainer(
        model=model,
        args=trl_arguments(SFTConfig, config, len(pairs), completion_only_loss=True),
        train_dataset=sft_dataset(pairs, chat, config),
        processing_class=chat.tokenizer,
    )
    curve = run_trl(trainer, Curve("sft", ("loss", "grad_norm", "learning_rate")))
    save_adapter(base, model, out)
    return curve


def held_out_loss(model, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16) -> np.ndarray:
    """Mean loss a token of each pair's chosen answer, in nats: array [pairs]."""
    sums, counts = answer_logps(
        model,
        [chat.sequence(p.prompt, p.chosen) for p in pairs],
        chat.tokenizer.pad_token_id,
        rows,
        desc="held-out loss",
    )
    return -sums / counts


def reward_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    rows = [
        {
            "chosen_ids": list(chat.sequence(p.prompt, p.chosen).input_ids),
            "rejected_ids": list(chat.sequence(p.prompt, p.rejected).input_ids),
        }
        for p in pairs
    ]
    order = training_order([max(map(len, row.values())) for row in rows], config.batch, config.seed)
    return Dataset.from_list([rows[index] for index in order])


def train_reward(
    base: Base,
    chat: Chat,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    rank: int,
    alpha: int,
    targets: list[str] | None,
    out: Path,
) -> pd.DataFrame:
    """Train a reward adapter and head from the start model and save both to ``out``; returns the curve."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory(base.source),
        num_labels=1,
        dtype=base.model.dtype,
        pad_token_id=chat.tokenizer.pad_token_id,
    ).to(base.device)
    # From zero all rewards are equal at first; a random head would begin with a preference of its own.
    torch.nn.init.zeros_(model.score.weight)
    model = get_peft_model(
        model,
        lora_config(
            base.model, rank, alpha, targets, task_type="SEQ_CLS", modules_to_save=["score"]
        ),
    )
    trainer = RewardTrainer(
        model=model,
        args=trl_arguments(RewardConfig, config, len(pairs)),
        train_dataset=reward_dataset(pairs, chat, config),
        processing_class=chat.tokenizer,
    )
    curve = run_trl(trainer, Curve("reward", ("loss", "accuracy", "margin", "grad_norm")))
    save_adapter(base, model, out, head=reward_head(model))
    return curve


def reward_head(model) -> torch.Tensor:
    """The trained head of a PEFT-wrapped reward model, shape [1, hidden]."""
    return model.base_model.model.score.modules_to_save["default"].weight


def pair_rewards(
    model, head: torch.Tensor, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16
) -> np.ndarray:
    """Rewards of chosen and rejected answers, array [pairs, 2]."""
    sequences = [
        chat.sequence(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)
    ]
    return rewards(
        model, head, sequences, chat.tokenizer.pad_token_id, rows, desc="held-out rewards"
    ).reshape(-1, 2)


class TokenDPOTrainer(DPOTrainer):
    """Takes our own tokens as they are (``prompt_ids``, ``chosen_ids``, ``rejected_ids``); SFT and reward trainers
    accept tokens by themselves."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def dpo_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    rows = [
        {
            "prompt_ids": list(chat.prompt_ids(p.prompt)),
            "chosen_ids": list(chat.answer_ids(p.chosen)),
            "rejected_ids": list(chat.answer_ids(p.rejected)),
        }
        for p in pairs
    ]
    lengths = [
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows
    ]
    return Dataset.from_list(
        [rows[index] for index in training_order(lengths, config.batch, config.seed)]
    )


def dpo_trainer(
    base: Base,
    chat: Chat,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    beta: float,
    sft: Path,
) -> DPOTrainer:
    """The trainer with policy = SFT adapter and reference = a frozen copy of it."""
    model = load_adapters(base, {"default": sft}, trainable="default")
    return TokenDPOTrainer(
        model=model,
        args=trl_arguments(DPOConfig, config, len(pairs), beta=beta),
        train_dataset=dpo_dataset(pairs, chat, config),
        processing_class=chat.tokenizer,
    )


def train_dpo(
    base: Base,
    chat: Chat,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    beta: float,
    sft: Path,
    out: Path,
) -> pd.DataFrame:
    """Train from the SFT adapter in ``sft`` and save the policy's adapter to ``out``; returns the curve."""
    trainer = dpo_trainer(base, chat, pairs, config, beta, sft)
    curve = run_trl(
        trainer,
        Curve(
            "dpo",
            (
                "loss",
                "rewards/accuracies",
                "rewards/margins",
                "logps/chosen",
                "logps/rejected",
                "grad_norm",
            ),
        ),
    )
    save_adapter(base, trainer.model, out)
    return curve


def pair_logps(model, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16) -> np.ndarray:
    """Summed log-probabilities of chosen and rejected answers, array [pairs, 2]."""
    sequences = [
        chat.sequence(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)
    ]
    sums, _ = answer_logps(
        model, sequences, chat.tokenizer.pad_token_id, rows, desc="log-likelihoods of pairs"
    )
    return sums.reshape(-1, 2)


def margins_of_pairs(
    policy_logps: np.ndarray, reference_logps: np.ndarray, beta: float
) -> np.ndarray:
    """DPO's implicit reward of chosen minus rejected, β[(log π - log π_ref)_c - (log π - log π_ref)_r]: array [pairs]."""
    implicit = beta * (policy_logps - reference_logps)
    return implicit[:, 0] - implicit[:, 1]
