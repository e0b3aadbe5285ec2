"""Direct preference optimisation from the SFT model:
L = -log σ(β [(log π(y_c|x) - log π_sft(y_c|x)) - (log π(y_r|x) - log π_sft(y_r|x))]).

TRL's ``DPOTrainer``. The policy starts as the SFT adapter and the reference is a frozen copy of it: for a PEFT model
TRL copies the ``default`` adapter to one named ``ref`` (``adapter off`` would be the start model, and a model given
without a reference can be reloaded from its path, without the adapter). A test proves which it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from ..chat import Chat
from ..data.preferences import PreferencePair
from ..decode import answer_logps
from ..models import Base, load_adapters, save_adapter
from .trl import Curve, TrainConfig, run, training_order, trl_arguments


class TokenDPOTrainer(DPOTrainer):
    """Takes our own tokens as they are (``prompt_ids``, ``chosen_ids``, ``rejected_ids``); SFT and reward trainers
    accept tokens by themselves."""

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        return dataset


def dpo_dataset(pairs: Sequence[PreferencePair], chat: Chat, config: TrainConfig) -> Dataset:
    rows = [{"prompt_ids": list(chat.prompt_ids(p.prompt)), "chosen_ids": list(chat.answer_ids(p.chosen)),
             "rejected_ids": list(chat.answer_ids(p.rejected))} for p in pairs]
    lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
    return Dataset.from_list([rows[index] for index in training_order(lengths, config.batch, config.seed)])


def make_trainer(base: Base, chat: Chat, pairs: Sequence[PreferencePair], config: TrainConfig, beta: float,
                 sft: Path) -> DPOTrainer:
    """The trainer with policy = SFT adapter and reference = a frozen copy of it."""
    model = load_adapters(base, {"default": sft}, trainable="default")
    return TokenDPOTrainer(
        model=model, args=trl_arguments(DPOConfig, config, len(pairs), beta=beta),
        train_dataset=dpo_dataset(pairs, chat, config), processing_class=chat.tokenizer,
    )


def train(base: Base, chat: Chat, pairs: Sequence[PreferencePair], config: TrainConfig, beta: float, sft: Path,
          out: Path) -> pd.DataFrame:
    """Train from the SFT adapter in ``sft`` and save the policy's adapter to ``out``; returns the curve."""
    trainer = make_trainer(base, chat, pairs, config, beta, sft)
    curve = run(trainer, Curve("dpo", ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen",
                                       "logps/rejected", "grad_norm")))
    save_adapter(base, trainer.model, out)
    return curve


def pair_logps(model, chat: Chat, pairs: Sequence[PreferencePair], rows: int = 16) -> np.ndarray:
    """Summed log-probabilities of chosen and rejected answers, array [pairs, 2]."""
    sequences = [chat.sequence(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    sums, _ = answer_logps(model, sequences, chat.tokenizer.pad_token_id, rows, desc="log-likelihoods of pairs")
    return sums.reshape(-1, 2)


def margins(policy_logps: np.ndarray, reference_logps: np.ndarray, beta: float) -> np.ndarray:
    """DPO's implicit reward of chosen minus rejected, β[(log π - log π_ref)_c - (log π - log π_ref)_r]: array [pairs]."""
    implicit = beta * (policy_logps - reference_logps)
    return implicit[:, 0] - implicit[:, 1]
