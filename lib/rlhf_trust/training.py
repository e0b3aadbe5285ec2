"""Training: TRL's trainers for the stages that a notebook shows, and one fast loop for all else.

:func:`train_sft`, :func:`train_reward` and :func:`train_dpo` are TRL's trainers on our own tokens,
so that training, evaluation and attribution see the same ids. :func:`fit` takes the same steps
(optimiser, schedule, clipping, batches) without a trainer's set-up, which takes longer than many a
fit, and through the very loss that is attributed (:mod:`.losses`): further seeds and hundreds of
retrainings, each from weights put back by ``models.restore``. That both follow one trajectory is
held by ``tests/test_trajectories.py``.

    AdamW, no weight decay; learning rate: linear warm-up, then a cosine to 0; gradients clipped to
    norm 1; batches of like length in a shuffled order, the same in every epoch.

What is fixed while an adapter is trained: the backbone, other adapters (DPO's reference among them,
whose log-probabilities come with the loss) and, unless the loss trains it, the reward head.
"""

from __future__ import annotations

import hashlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from . import StudyError, artifacts, decode, distributed, models, require
from .chat import Chat
from .data.preferences import PreferencePair, pair_tokens
from .decode import Example, LowerStates
from .losses import LogOddsLoss, Loss, log_odds, tokens_content
from .models import Base, LoRA
from .sources import NO_CODE, model_directory, refusing

CLIP = 1.0
"""Largest norm of a step's gradient."""

NOTE = "manifest.json"
"""Beside weights: the key of what they were made from, a number about the training, and their
hash."""

Pairs = Sequence[PreferencePair]
"""What a stage is trained on, or evaluated."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How an adapter is trained.

    ``batch_size``: examples of an optimiser step (pairs where a stage trains on pairs), of which
    ``micro_batch_size`` go through the model together: fewer take less memory and change the result
    only in the last digits. ``learning_rate`` is reached after ``warmup`` (a share of all steps).
    ``epsilon``: what AdamW adds to the root of the mean squared gradient. One of the gradients' own
    size makes a step a smooth function of them, which attribution through training needs
    (:mod:`.attribution.unrolled`).
    """

    learning_rate: float
    batch_size: int = 8
    micro_batch_size: int = 4
    epochs: int = 1
    warmup: float = 0.1
    epsilon: float = 1e-8
    seed: int = 0

    def __post_init__(self):
        for name in ("learning_rate", "epsilon"):
            require(getattr(self, name) > 0, f"{name}: must be above 0, got {getattr(self, name)}")
        for name in ("batch_size", "micro_batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise StudyError(f"{name}: must be at least 1, got {getattr(self, name)}")
        require(0 <= self.warmup <= 1, f"warmup: must be from 0 to 1, got {self.warmup}")

    def steps(self, examples: int) -> int:
        """Optimiser steps of a training on so many examples."""
        return math.ceil(examples / self.batch_size) * self.epochs

    def warmup_steps(self, examples: int) -> int:
        """How many of them the learning rate rises."""
        return round(self.warmup * self.steps(examples))


def training_order(lengths: Sequence[int], batch_size: int, seed: int) -> list[int]:
    """An order of examples in which every batch holds like lengths, the batches shuffled: little is
    padded. Of examples left over for a shorter last batch, the batch itself stays last."""
    groups = decode.batches_by_length(lengths, batch_size)
    last = [groups.pop()] if len(groups[-1]) < batch_size else []
    Random(seed).shuffle(groups)
    return [index for group in groups + last for index in group]


# --- the fast loop --------------------------------------------------------------------------------


def fit(
    network,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    config: TrainConfig,
    desc: str = "",
    kept: LowerStates | None = None,
    weights: Sequence[float] | None = None,
    trajectory: Trajectory | None = None,
) -> pd.DataFrame:
    """Minimise the mean loss of ``examples`` over one adapter's LoRA weights, in place. Of a step's
    examples each process (:mod:`.distributed`) takes its share.

    Parameters
    ----------
    network
        A PEFT model in evaluation mode (no dropout). Which adapter is active and which weights are
        trainable is the same after the call as before.
    config
        ``seed`` is that of the order of batches. Nothing else is random, so a repeat on the same
        machine (and number of threads) gives the same bytes.
    desc
        Shows a progress bar of that name.
    kept
        States of the lower layers, which trainings on the same texts share.
    weights
        A factor for each example's loss, by default 1. Batches and what their sums are divided by
        stay what they are, so that 0 leaves an example out and changes nothing else.
    trajectory
        Where every step's state is kept, for attribution through training.

    Returns
    -------
    DataFrame
        A row a step: ``loss`` (the batch's mean before the update), ``grad_norm`` (before
        clipping), ``learning_rate``.

    Raises
    ------
    StudyError
        If there is no example or adapter, the model is in training mode, the LoRA weights are not
        float32, or the loss or its gradient is not finite.
    """
    require(examples, "fit: there is no example")
    still = not any(module.training for module in network.modules())
    require(still, "fit: the model is in training mode, where dropout acts; call eval() first")
    trained = trained_weights(network, adapter, loss)
    fine = all(weight.dtype in (torch.float32, torch.float64) for weight in trained.values())
    require(fine, f"fit: the LoRA weights of {adapter!r} are not float32, too coarse to train")
    parameters = list(trained.values())
    rate, epsilon = config.learning_rate, config.epsilon
    optimizer = torch.optim.AdamW(parameters, lr=rate, eps=epsilon, weight_decay=0.0)
    steps, warmup = config.steps(len(examples)), config.warmup_steps(len(examples))
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    batches, curve = training_batches(examples, config), []
    factors = np.ones(len(examples)) if weights is None else np.asarray(weights, float)
    if factors.shape != (len(examples),):
        raise StudyError(f"fit: {len(factors)} weights for {len(examples)} examples")
    if trajectory is not None:  # before the loss's own weights move
        about = training_content(examples, loss, config, weights)
    try:
        with models.using(network, adapter, parameters), torch.enable_grad():
            for places in artifacts.progress(batches, desc=desc, unit="step") if desc else batches:
                batch, own = [examples[i] for i in places], factors[places]
                value = _accumulate(network, batch, own, loss, pad, config.micro_batch_size, kept)
                value = sum(distributed.gathered(value))
                distributed.add_up_gradients(parameters)
                if trajectory is not None:
                    trajectory.keep(trained, optimizer)
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
                if not (math.isfinite(value) and math.isfinite(norm)):
                    raise StudyError(
                        f"fit: at step {len(curve) + 1} the {loss.name} loss is {value} and its "
                        f"gradient's norm {norm}; lower learning_rate, or look for a broken example"
                    )
                curve.append((value, norm, optimizer.param_groups[0]["lr"]))
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    finally:
        optimizer.zero_grad()
    curve = pd.DataFrame(curve, columns=["loss", "grad_norm", "learning_rate"])
    if trajectory is not None:
        trajectory.finish(trained, about, curve["learning_rate"].tolist())
    return curve


def trained_weights(network, adapter: str, loss: Loss) -> dict[str, torch.nn.Parameter]:
    """All that a training changes, by name: an adapter's LoRA weights and the loss's own."""
    own = {f"loss.{number}": weight for number, weight in enumerate(loss.parameters())}
    return models.lora_weights(network, adapter) | own


def training_batches(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
    """The examples of every optimiser step, in all epochs, as indices."""
    lengths = [max(map(len, example.sequences)) for example in examples]
    order = training_order(lengths, config.batch_size, config.seed)
    starts = range(0, len(order), config.batch_size)
    return [order[start : start + config.batch_size] for start in starts] * config.epochs


def training_content(
    examples: Sequence[Example],
    loss: Loss,
    config: TrainConfig,
    weights: Sequence[float] | None = None,
) -> list:
    """All that a training depends on besides the network and its weights, as JSON."""
    factors = None if weights is None else np.asarray(weights, float).tolist()
    return [loss.content(examples), tokens_content(examples), asdict(config), factors]


def _accumulate(
    network, batch: Sequence[Example], factors: np.ndarray, loss: Loss, pad, at_once: int, kept
) -> float:
    """Add the gradient of a batch's weighted mean loss to the weights'; returns that mean. Of both
    this process's part.

    Examples of weight 0 do not run, but for the first of a batch in which all are: its gradient is
    0 times something."""
    total, denominator = 0.0, loss.denominator(batch)
    run = distributed.share(np.flatnonzero(factors) if factors.any() else [0])
    for start in range(0, len(run), at_once):
        some = run[start : start + at_once]
        values = loss.loss(network, [batch[i] for i in some], pad, kept)
        if not values.requires_grad:
            raise StudyError("fit: the adapter takes no part in the loss (disabled or merged?)")
        part = (values * values.new_tensor(factors[some])).sum() / denominator
        part.backward()
        total += float(part.detach())
    return total


def training_code(*more: str) -> str:
    """Of the modules that every training runs through, and others: part of the key of what is kept
    of one."""
    return artifacts.code_hash("chat", "decode", "losses", "models", "training", *more)


def trained_once(out: Path, about: object, train: Callable[[], float]) -> float:
    """What ``train``, which writes the folder ``out``, returns; if that is there as it was written,
    and was made from the same (``about``), what it returned then."""
    key, note = artifacts.content_key(*about), out / NOTE
    with suppress(OSError, ValueError):  # not there, or damaged
        kept = artifacts.read_record(note)
        if kept["key"] == key and kept["weights"] == artifacts.sha256_of(out):
            artifacts.note_written(out)
            return kept["reward"]
    found = train()
    # Last, and inside the folder, which a new training replaces as a whole.
    made = {"key": key, "reward": found, "weights": artifacts.sha256_of(out)}
    artifacts.write_record(note, made)
    return found


def keep_state(path: Path, key: str, state: Mapping) -> None:
    """Write where a computation stands, with its hash, for :func:`kept_state`."""
    if not distributed.writes():
        return
    saved = io.BytesIO()
    torch.save({"key": key, **state}, saved)
    with artifacts.atomic_write(path) as aside:
        aside.write_bytes(hashlib.sha256(saved.getvalue()).digest() + saved.getvalue())


def kept_state(path: Path, key: str, device="cpu") -> dict:
    """What :func:`keep_state` wrote under this key; empty if there is none, or it is damaged."""
    try:
        saved = path.read_bytes()
        if hashlib.sha256(saved[32:]).digest() != saved[:32]:
            return {}
        state = torch.load(io.BytesIO(saved[32:]), map_location=device, weights_only=True)
    except Exception:  # no file, or of another version
        return {}
    return state if state.get("key") == key else {}


class Trajectory:
    """The states that a training went through, in a folder: for each step the weights, AdamW's
    moments and the gradient before clipping, and at last the weights and a manifest.

    Four numbers a trained weight and step: 2.5 MB a step at rank 8 on the upper third of SmolLM2's
    layers, in float32. A training that did not end leaves no manifest, and is to be run again.
    """

    MANIFEST = "trajectory.json"

    def __init__(self, folder: Path | str):
        self.folder, self._kept = Path(folder), 0

    @property
    def ended(self) -> bool:
        """Is a training here, did it end, and is every state as it was written?"""
        try:
            return bool(self.read())
        except StudyError:
            return False

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:05}.safetensors"

    def keep(self, trained: Mapping[str, torch.nn.Parameter], optimizer) -> None:
        """Write the state before an update whose gradient lies in the weights' ``.grad``."""
        if not self._kept:
            (self.folder / self.MANIFEST).unlink(missing_ok=True)
        found = {}
        for name, weight in trained.items():
            state, zeros = optimizer.state.get(weight, {}), torch.zeros_like(weight)
            moments = state.get("exp_avg", zeros), state.get("exp_avg_sq", zeros)
            gradient = zeros if weight.grad is None else weight.grad
            for part, tensor in zip(("weight", "m", "v", "g"), (weight, *moments, gradient)):
                found[f"{part}.{name}"] = tensor.detach()
        self._write(found)

    def _write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with artifacts.atomic_write(self._file(self._kept)) as aside:
            save_file({name: tensor.cpu().clone() for name, tensor in tensors.items()}, aside)
        self._kept += 1

    def finish(
        self, trained: Mapping[str, torch.nn.Parameter], about: list, rates: list[float]
    ) -> None:
        """Write the weights at the end and what the training was (:func:`training_content`)."""
        self._write({f"weight.{name}": weight.detach() for name, weight in trained.items()})
        states = map(self._file, range(self._kept))
        files = {state.name: artifacts.file_sha256(state) for state in states}
        manifest = {"key": artifacts.content_key(about), "learning_rates": rates, "files": files}
        artifacts.write_record(self.folder / self.MANIFEST, manifest)
        self._kept = 0

    def read(self) -> tuple[str, list[float]]:
        """What the training was, as a key, and the learning rate of every step; a StudyError if it
        did not end or a state is missing or damaged."""
        path, again = self.folder / self.MANIFEST, "train again with fit(…, trajectory=…)"
        if not path.is_file():
            raise StudyError(f"{path}: no such file, so the training did not end here; {again}")
        with refusing(f"{path}: damaged", again, OSError, ValueError):
            manifest = artifacts.read_record(path)
        for file, digest in manifest.get("files", {"": None}).items():
            if artifacts.file_sha256(path := self.folder / file) != digest:
                problem = "damaged" if path.exists() else "no such file"
                raise StudyError(f"{path}: {problem}; {again}")
        return manifest["key"], manifest["learning_rates"]

    def state(self, step: int, device="cpu") -> dict[str, dict[str, torch.Tensor]]:
        """``weight``, ``m``, ``v`` and ``g`` (only ``weight`` after the last step) → name →
        tensor."""
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(self._file(step), device=str(device)).items():
            part, _, weight = name.partition(".")
            found.setdefault(part, {})[weight] = tensor
        return found


def example_losses(
    network,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    rows: int = 32,
    kept: LowerStates | None = None,
) -> np.ndarray:
    """Each example's loss under one adapter, [examples], without gradients. ``rows``: texts in one
    pass."""
    if isinstance(loss, LogOddsLoss):  # what its prompts share runs once
        return log_odds(network, adapter, examples, pad, kept)
    found = np.zeros(len(examples))
    lengths = [decode.packed_length(example.sequences) for example in examples]
    with models.using(network, adapter), torch.no_grad():
        for batch in decode.batches_by_length(lengths, max(1, rows // loss.sequences)):
            values = loss.loss(network, [examples[i] for i in batch], pad, kept)
            found[batch] = values.double().cpu().numpy()
    return found


# --- TRL's trainers -------------------------------------------------------------------------------


def trl_arguments(kind: type, config: TrainConfig, examples: int, **more):
    """A TRL configuration: no mixed precision, no gradient checkpointing, no reports, no shuffling
    (:func:`training_order` has done it).

    TRL's own defaults are bf16 and gradient checkpointing, on a CPU too. Several processes take the
    same examples a step as one; where they cannot share them equally, TRL would train on some
    twice, and it is a StudyError.
    """
    processes, left = distributed.size(), examples % config.batch_size
    together = math.gcd(config.batch_size // processes, config.micro_batch_size)
    if processes > 1:
        problem = f"batch_size: must be a multiple of the {processes} processes"
        require(config.batch_size % processes == 0, f"{problem}, got {config.batch_size}")
        problem = f"{examples} training examples: {processes} processes cannot share the {left} of"
        remedy = f"the last step equally; train on {examples - left % processes}"
        require(left % processes == 0, f"{problem} {remedy}")
        together = math.gcd(together, left // processes)
    arguments = kind(
        output_dir=tempfile.gettempdir(),
        use_cpu=models.device().type == "cpu",  # where a trainer would take Apple's GPU
        learning_rate=config.learning_rate,
        seed=config.seed,
        per_device_train_batch_size=together,
        gradient_accumulation_steps=config.batch_size // processes // together,
        num_train_epochs=config.epochs,
        warmup_steps=config.warmup_steps(examples),
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        adam_epsilon=config.epsilon,
        max_grad_norm=CLIP,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        max_length=None,
        pad_to_multiple_of=decode.PAD_TO,
        **more,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several it would use all, a batch on each
    return arguments


class Curve(TrainerCallback):
    """Makes a table of what the trainer logs, shows a bar, and stops at a loss that is no
    number."""

    def __init__(self, stage: str, metrics: Sequence[str]):
        self.stage, self.metrics, self._bar = stage, metrics, None

    def on_train_begin(self, args, state, control, **_):
        self._bar = artifacts.progress(total=state.max_steps, desc=self.stage, unit="step")
        self._bar.update(state.global_step)

    def on_step_end(self, args, state, control, **_):
        self._bar.update(1)

    def on_train_end(self, args, state, control, **_):
        self._bar.close()

    def on_log(self, args, state, control, logs=None, **_):
        for metric in ("loss", "grad_norm"):
            value = float((logs or {}).get(metric, 0.0))
            if not math.isfinite(value):
                raise StudyError(
                    f"{self.stage}: {metric} is {value} at step {state.global_step}; "
                    "lower learning_rate, or look for a broken row in that batch"
                )

    def table(self, history: Sequence[Mapping]) -> pd.DataFrame:
        """Rows (stage, step, metric, value) of a trainer's log."""
        rows = [
            (self.stage, logs["step"], metric, float(logs[metric]))
            for logs in history
            for metric in self.metrics
            if metric in logs
        ]
        return pd.DataFrame(rows, columns=["stage", "step", "metric", "value"])


class Checkpoints(TrainerCallback):
    """TRL's checkpoints in a ``folder``, one every so many ``steps`` (0: none). A training that was
    killed goes on from the last that is whole and was made under the same ``key``."""

    def __init__(self, folder: Path, key: str, steps: int):
        self.folder, self.key, self.steps = folder, key, steps

    def on_save(self, args, state, control, **_):
        distributed.gathered(None)  # every process has written its part
        if distributed.writes():
            made = self.folder / f"checkpoint-{state.global_step}"
            keep_state(made.with_suffix(".pt"), self.key, {"hash": artifacts.sha256_of(made)})

    def last(self) -> Path | None:
        """The one to go on from. Without one, what lies there is removed."""
        for note in sorted(self.folder.glob("*.pt"), key=lambda path: -path.stat().st_mtime_ns):
            kept, made = kept_state(note, self.key), note.with_suffix("")
            if kept and made.is_dir() and kept["hash"] == artifacts.sha256_of(made):
                return made
        return self.remove()

    def remove(self) -> None:
        distributed.gathered(None)  # no process reads it any more
        if distributed.writes():
            shutil.rmtree(self.folder, ignore_errors=True)


def run_trl(trainer: Trainer, curve: Curve, checkpoints: Checkpoints | None = None) -> pd.DataFrame:
    """Train with the curve as the only thing that is shown."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curve)
    last = None
    if checkpoints and checkpoints.steps:
        trainer.add_callback(checkpoints)
        args, last = trainer.args, checkpoints.last()
        args.output_dir, args.save_steps = str(checkpoints.folder), checkpoints.steps
        args.save_strategy, args.save_total_limit = "steps", 2
    with decode.plainly(trainer.model):
        trainer.train(resume_from_checkpoint=last and str(last))
    trainer.model.eval()
    return curve.table(trainer.state.log_history)


def _train(
    trainer: Trainer, curve: Curve, base: Base, chat: Chat, about: list, out: Path, save_steps: int
) -> pd.DataFrame:
    """Train, save the adapter to ``out`` (a reward model's head with it), and give the curve.
    ``about``: what the training depends on besides model and format."""
    about = [curve.stage, base.fingerprint, chat.key, distributed.size(), training_code(), *about]
    folder, key = out.with_name(f"{out.name}.unfinished"), artifacts.content_key(*about)
    checkpoints = Checkpoints(folder, key, save_steps)
    table = run_trl(trainer, curve, checkpoints)
    score = getattr(trainer.model.base_model.model, "score", None)
    head = None if score is None else score.modules_to_save["default"].weight
    models.save_adapter(base, trainer.model, out, head)
    checkpoints.remove()
    return table


def in_order(columns: Mapping[str, list], lengths: list[int], config: TrainConfig) -> Dataset:
    """A data set of these columns in :func:`training_order`."""
    order = training_order(lengths, config.batch_size, config.seed)
    ordered = {name: [values[i] for i in order] for name, values in columns.items()}
    return Dataset.from_dict(ordered)


def sft_trainer(
    base: Base, chat: Chat, pairs: Pairs, config: TrainConfig, lora: LoRA
) -> SFTTrainer:
    """SFT on the chosen answers: L = -1/|y| Σ_t log p(y_t | x, y_<t), over answer tokens only."""
    texts = [chat.sequence(pair.prompt, pair.chosen) for pair in pairs]
    columns = {
        "input_ids": [list(text.input_ids) for text in texts],
        "completion_mask": [[0] * t.answer_start + [1] * len(t.answer_ids) for t in texts],
    }
    return SFTTrainer(
        model=models.new_adapter(base, lora, config.seed),
        args=trl_arguments(SFTConfig, config, len(pairs), completion_only_loss=True),
        train_dataset=in_order(columns, [len(text) for text in texts], config),
        processing_class=chat.tokenizer,
    )


def train_sft(
    base: Base, chat: Chat, pairs: Pairs, config: TrainConfig, lora: LoRA, out: Path, save_steps=0
) -> pd.DataFrame:
    """Train a fresh adapter with :func:`sft_trainer` and save it to ``out``; returns the curve.

    With ``save_steps`` it is kept beside ``out`` after every so many steps, and a training that was
    killed goes on from there, to the same bytes.
    """
    trainer = sft_trainer(base, chat, pairs, config, lora)
    curve = Curve("sft", ("loss", "grad_norm", "learning_rate"))
    return _train(trainer, curve, base, chat, [pairs, config, lora], out, save_steps)


def held_out_loss(model, chat: Chat, pairs: Pairs) -> np.ndarray:
    """Mean loss a token of each pair's chosen answer, in nats: array [pairs]."""
    texts, pad = [chat.sequence(p.prompt, p.chosen) for p in pairs], chat.tokenizer.pad_token_id
    sums, counts = decode.answer_logps(model, texts, pad, desc="held-out loss")
    return -sums / counts


def reward_trainer(
    base: Base, chat: Chat, pairs: Pairs, config: TrainConfig, lora: LoRA
) -> RewardTrainer:
    """The reward model: L = -log σ(r(x, y_chosen) - r(x, y_rejected)), Bradley and Terry's model of
    a choice between two: a fresh adapter and a linear head on the last token. Only the difference
    of two rewards means something."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory(base.source),
        num_labels=1,
        dtype=base.model.dtype,
        pad_token_id=chat.tokenizer.pad_token_id,
        **NO_CODE,
    ).to(base.device)
    # From zero all rewards are equal at first; a random head would begin with a preference.
    torch.nn.init.zeros_(model.score.weight)
    shape = models.lora_config(base.model, lora, task_type="SEQ_CLS", modules_to_save=["score"])
    columns = {
        "chosen_ids": [list(chat.sequence(p.prompt, p.chosen).input_ids) for p in pairs],
        "rejected_ids": [list(chat.sequence(p.prompt, p.rejected).input_ids) for p in pairs],
    }
    return RewardTrainer(
        model=get_peft_model(model, shape),
        args=trl_arguments(RewardConfig, config, len(pairs)),
        train_dataset=in_order(columns, [pair_tokens(p, chat) for p in pairs], config),
        processing_class=chat.tokenizer,
    )


def train_reward(
    base: Base, chat: Chat, pairs: Pairs, config: TrainConfig, lora: LoRA, out: Path, save_steps=0
) -> pd.DataFrame:
    """Train an adapter and its head with :func:`reward_trainer`, from the start model, and save
    both to ``out``; returns the curve. ``save_steps`` as in :func:`train_sft`."""
    trainer = reward_trainer(base, chat, pairs, config, lora)
    curve = Curve("reward", ("loss", "accuracy", "margin", "grad_norm"))
    return _train(trainer, curve, base, chat, [pairs, config, lora], out, save_steps)


def pair_rewards(model, head: torch.Tensor, chat: Chat, pairs: Pairs) -> np.ndarray:
    """Rewards of chosen and rejected answers, array [pairs, 2]."""
    texts, pad = both_answers(chat, pairs), chat.tokenizer.pad_token_id
    return decode.rewards(model, head, texts, pad, desc="held-out rewards").reshape(-1, 2)


def both_answers(chat: Chat, pairs: Pairs) -> list:
    """Each pair's two texts, next to each other: chosen_0, rejected_0, chosen_1, …"""
    return [chat.sequence(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]


def pair_examples(pairs: Pairs, chat: Chat) -> list[Example]:
    """Each pair's two texts, chosen first."""
    return [
        Example(p.id, p.source, tuple(chat.sequence(p.prompt, a) for a in (p.chosen, p.rejected)))
        for p in pairs
    ]


def dpo_trainer(
    base: Base, chat: Chat, pairs: Pairs, config: TrainConfig, beta: float, sft: Path
) -> DPOTrainer:
    """DPO: L = -log σ(β [(log π(y_c|x) - log π_sft(y_c|x)) - (log π(y_r|x) - log π_sft(y_r|x))]).

    The policy starts as the SFT adapter in ``sft`` and the reference is a frozen copy of it: for a
    PEFT model TRL copies the ``default`` adapter to one named ``ref`` (``adapter off`` would be the
    start model, and a model given without a reference can be reloaded from its path, without the
    adapter). A test proves which it is.
    """
    columns = {
        "prompt_ids": [list(chat.prompt_ids(p.prompt)) for p in pairs],
        "chosen_ids": [list(chat.answer_ids(p.chosen)) for p in pairs],
        "rejected_ids": [list(chat.answer_ids(p.rejected)) for p in pairs],
    }
    trainer = DPOTrainer(
        model=models.load_adapters(base, {"default": sft}, trainable="default"),
        args=trl_arguments(DPOConfig, config, len(pairs), beta=beta),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=chat.tokenizer,
    )
    # TRL's DPO takes text only, and tokenises a prompt together with its answer. Ours are tokenised
    # apart, as the SFT and reward trainers, evaluation and attribution see them.
    trainer.train_dataset = in_order(columns, [pair_tokens(p, chat) for p in pairs], config)
    return trainer


def train_dpo(
    base: Base,
    chat: Chat,
    pairs: Pairs,
    config: TrainConfig,
    beta: float,
    sft: Path,
    out: Path,
    save_steps: int = 0,
) -> pd.DataFrame:
    """Train with :func:`dpo_trainer` from the SFT adapter in ``sft`` and save the policy's adapter
    to ``out``; returns the curve. ``save_steps`` as in :func:`train_sft`."""
    trainer = dpo_trainer(base, chat, pairs, config, beta, sft)
    logged = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
    curve, weights = Curve("dpo", (*logged, "grad_norm")), artifacts.sha256_of(sft)
    return _train(trainer, curve, base, chat, [pairs, config, beta, weights], out, save_steps)


def pair_logps(model, chat: Chat, pairs: Pairs) -> np.ndarray:
    """Summed log-probabilities of chosen and rejected answers, array [pairs, 2]."""
    texts, pad = both_answers(chat, pairs), chat.tokenizer.pad_token_id
    return decode.answer_logps(model, texts, pad, desc="log-likelihoods of pairs")[0].reshape(-1, 2)
