"""The reward model: L = -log σ(r(x, y_chosen) - r(x, y_rejected)), Bradley and Terry's model of a choice between two.

TRL's ``RewardTrainer`` on the same backbone with an adapter of its own and a linear head on the last token. Only the
difference of two rewards means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from ..chat import Chat
from ..data.preferences import PreferencePair
from ..decode import rewards
from ..models import Base, lora_config, model_directory, save_adapter
from .trl import Curve, TrainConfig, run, training_order, trl_arguments


def reward_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    rows = [{"chosen_ids": list(chat.sequence(p.prompt, p.chosen).input_ids),
             "rejected_ids": list(chat.sequence(p.prompt, p.rejected).input_ids)} for p in pairs]
    order = training_order([max(map(len, row.values())) for row in rows], config.batch, config.seed)
    return Dataset.from_list([rows[index] for index in order])


def train(base: Base, chat: Chat, pairs: Sequence[PreferencePair], config: TrainConfig, rank: int, alpha: int,
          targets: list[str] | None, out: Path) -> pd.DataFrame:
    """Train a reward adapter and head from the start model and save both to ``out``; returns the curve."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory(base.source), num_labels=1, dtype=base.model.dtype, pad_token_id=chat.tokenizer.pad_token_id,
    ).to(base.device)
    # From zero all rewards are equal at first; a random head would begin with a preference of its own.
    torch.nn.init.zeros_(model.score.weight)
    model = get_peft_model(model, lora_config(base.model, rank, alpha, targets, task_type="SEQ_CLS",
                                              modules_to_save=["score"]))
    trainer = RewardTrainer(
        model=model, args=trl_arguments(RewardConfig, config, len(pairs)),
        train_dataset=reward_dataset(pairs, chat, config), processing_class=chat.tokenizer,
    )
    curve = run(trainer, Curve("reward", ("loss", "accuracy", "margin", "grad_norm")))
    save_adapter(base, model, out, head=reward_head(model))
    return curve


def reward_head(model) -> torch.Tensor:
    """The trained head of a PEFT-wrapped reward model, shape [1, hidden]."""
    return model.base_model.model.score.modules_to_save["default"].weight


def pair_rewards(model, head: torch.Tensor, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16) -> np.ndarray:
    """Rewards of chosen and rejected answers, array [pairs, 2]."""
    sequences = [chat.sequence(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    return rewards(model, head, sequences, chat.tokenizer.pad_token_id, rows, desc="held-out rewards").reshape(-1, 2)
