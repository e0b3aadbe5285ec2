"""What the three TRL stages share: arguments, batches of like length, a curve, and a stop at the first bad loss."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from unittest.mock import patch

import pandas as pd
import trl.trainer.utils
from transformers import Trainer, TrainerCallback

from .. import StudyError
from ..decode import PAD_TO, batches_by_length
from ..progress import progress


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
        output_dir=tempfile.gettempdir(), learning_rate=config.learning_rate, seed=config.seed,
        per_device_train_batch_size=at_once, gradient_accumulation_steps=config.batch // at_once,
        num_train_epochs=config.epochs,
        warmup_steps=round(config.warmup * steps), lr_scheduler_type="cosine", weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, logging_nan_inf_filter=False, disable_tqdm=True, report_to="none", save_strategy="no",
        eval_strategy="no", bf16=False, gradient_checkpointing=False, dataloader_num_workers=0,
        train_sampling_strategy="sequential", dataloader_pin_memory=False, max_length=None, pad_to_multiple_of=PAD_TO,
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
                    raise StudyError(f"{self.stage}: {metric} is {value} at step {state.global_step}; "
                                     "lower learning_rate, or look for a broken row in that batch")
                self.rows.append({"stage": self.stage, "step": state.global_step, "metric": metric, "value": value})

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows, columns=["stage", "step", "metric", "value"])


def run(trainer: Trainer, curve: Curve) -> pd.DataFrame:
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
