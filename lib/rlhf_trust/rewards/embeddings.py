"""Answers as the start model represents them, and rewards learnt on that."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .. import decode, models
from ..align.rollout import RewardFn, with_end
from ..chat import Chat, EncodedExample
from .order_consistency import Reward


@torch.no_grad()
def embed(
    model, answers: Sequence[EncodedExample], chat: Chat, rows: int = 16, desc: str = ""
) -> np.ndarray:
    """The backbone's last hidden state at each answer's end token, adapters off: [n, hidden],
    float32.

    Truncated answers get an end token. ``model``: a PEFT model, or the backbone itself. ``desc``
    names a progress bar.
    """
    eos, pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id
    ended = with_end(answers, eos)
    with models.using(model, None):
        return decode.end_states(model, ended, pad, rows, desc)


def reward_fn(model, reward: Reward, chat: Chat) -> RewardFn:
    """A learnt reward as the reward function of PPO or INPO."""
    return lambda answers: torch.tensor(reward(embed(model, answers, chat))).float()
