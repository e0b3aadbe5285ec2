"""Supervised fine-tuning on the chosen answers: L = -1/|y| Σ_t log p(y_t | x, y_<t), over answer tokens only.

TRL's ``SFTTrainer`` on our own tokens, so that training, evaluation and attribution see the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from ..chat import Chat
from ..data.preferences import PreferencePair
from ..decode import answer_logps
from ..models import Base, new_adapter, save_adapter
from .trl import Curve, TrainConfig, run, training_order, trl_arguments


def sft_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    """Prompt + chosen answer with a mask over the answer."""
    sequences = [chat.sequence(pair.prompt, pair.chosen) for pair in pairs]
    order = training_order([len(s) for s in sequences], config.batch, config.seed)
    return Dataset.from_list([
        {"input_ids": list(s.input_ids), "completion_mask": [0] * s.answer_start + [1] * (len(s) - s.answer_start)}
        for s in (sequences[index] for index in order)
    ])


def train(base: Base, chat: Chat, pairs: Sequence[PreferencePair], config: TrainConfig, rank: int, alpha: int,
          targets: list[str] | None, out: Path) -> pd.DataFrame:
    """Train a fresh LoRA adapter on the chosen answers and save it to ``out``; returns the curve."""
    model = new_adapter(base, rank, alpha, targets, seed=config.seed)
    trainer = SFTTrainer(
        model=model, args=trl_arguments(SFTConfig, config, len(pairs), completion_only_loss=True),
        train_dataset=sft_dataset(pairs, chat, config), processing_class=chat.tokenizer,
    )
    curve = run(trainer, Curve("sft", ("loss", "grad_norm", "learning_rate")))
    save_adapter(base, model, out)
    return curve


def held_out_loss(model, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16) -> np.ndarray:
    """Mean loss a token of each pair's chosen answer, in nats: array [pairs]."""
    sums, counts = answer_logps(model, [chat.sequence(p.prompt, p.chosen) for p in pairs], chat.tokenizer.pad_token_id,
                                rows, desc="held-out loss")
    return -sums / counts
