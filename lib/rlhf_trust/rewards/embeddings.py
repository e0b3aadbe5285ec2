"""Answers as the start model sees them, and rewards that are learnt on that."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from .. import decode
from ..align.rollout import Judge, with_end
from ..chat import Chat, Sequence
from ..progress import progress
from .order_consistency import Reward


@torch.no_grad()
def embed(model, answers: Seq[Sequence], chat: Chat, rows: int = 16, desc: str = "") -> np.ndarray:
    """The backbone's last hidden state at each answer's end token, adapters switched off: [n, hidden], float32.

    An answer that was cut off is given an end token. ``model``: a PEFT model, or the backbone itself. ``desc`` shows a
    progress bar of that name.
    """
    eos, pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id
    ids = [a.input_ids for a in with_end(answers, eos)]
    found = np.zeros((len(ids), model.config.hidden_size), dtype=np.float32)
    batches = decode.batches_by_length([len(i) for i in ids], rows)
    with decode.without_adapters(model):
        for batch in progress(batches, desc=desc, unit="batch") if desc else batches:
            padded, mask = decode.pad_right([ids[i] for i in batch], pad, model.device)
            states = decode.backbone(model)(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state
            ends = torch.tensor([len(ids[i]) - 1 for i in batch], device=states.device)
            found[batch] = states[torch.arange(len(batch), device=states.device), ends].float().cpu().numpy()
    return found


def judge(model, reward: Reward, chat: Chat, rows: int = 16) -> Judge:
    """A learnt reward as a judge of answers, for PPO and INPO."""
    return lambda answers: torch.tensor(reward(embed(model, answers, chat, rows)), dtype=torch.float32)
