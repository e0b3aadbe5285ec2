"""What PPO and INPO share: answers drawn from an adapter, their rewards, and looks at held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch

from .. import StudyError, decode, models
from ..chat import Chat, EncodedExample

ROWS = 64
"""Most answers that are drawn at once."""

RewardFn = Callable[[Sequence[EncodedExample]], torch.Tensor]
"""Rewards of answers, [n], in any unit."""

RewardFnMaker = Callable[[torch.nn.Module], RewardFn]
"""From the PEFT model that is trained."""


def sample_answers(
    model,
    adapter: str,
    chat: Chat,
    prompts: Sequence[decode.Prompt],
    keys: Sequence[str],
    decoding: decode.Decoding,
    bar=None,
) -> list[list[EncodedExample]]:
    """``decoding.samples`` answers to each prompt by one adapter, [prompts][samples]; ``keys`` [prompts] seed the draws."""
    model.set_adapter(adapter, inference_mode=True)
    ids = [chat.prompt_ids(prompt.turns, prompt.system) for prompt in prompts]
    answers: list[list[EncodedExample]] = [[] for _ in ids]
    for batch in decode.batches_by_length([len(i) for i in ids], max(1, ROWS // decoding.samples)):
        drawn = decode.sample_batch(
            model,
            [ids[i] for i in batch],
            [keys[i] for i in batch],
            decoding,
            chat.tokenizer.eos_token_id,
            chat.tokenizer.pad_token_id,
        )
        for i, samples in zip(batch, drawn):
            answers[i] = [EncodedExample(ids[i] + tuple(tokens), len(ids[i])) for tokens in samples]
        if bar is not None:
            bar.update(len(batch) * decoding.samples)
    return answers


def has_end(answer: EncodedExample, eos: int) -> bool:
    """Did the policy stop by itself? (Otherwise the length limit cut it off.)"""
    return answer.input_ids[-1] == eos


def with_end(answers: Sequence[EncodedExample], eos: int) -> list[EncodedExample]:
    """The answers as they are read at their end token, which one that was cut off is given."""
    return [
        a if has_end(a, eos) else EncodedExample(a.input_ids + (eos,), a.answer_start)
        for a in answers
    ]


class RewardModel:
    """A judge: the reward adapter of a model and its head, [hidden]."""

    def __init__(
        self, model, head: torch.Tensor, chat: Chat, rows: int = 8, adapter: str = "reward"
    ):
        if head.shape != (model.config.hidden_size,):
            raise StudyError(
                f"reward model: its head reads {head.shape[-1]} numbers, this model's states have "
                f"{model.config.hidden_size}; run 02-reward again on this model"
            )
        self.model, self.head, self.rows, self.adapter = model, head, rows, adapter
        self.eos, self.pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, answers: Sequence[EncodedExample]) -> torch.Tensor:
        ended = with_end(answers, self.eos)
        self.model.set_adapter(self.adapter, inference_mode=True)
        scores = torch.zeros(len(ended), device=self.model.device)
        for batch in decode.reading_batches(ended, self.rows):
            scores[batch] = decode.last_token_rewards(
                self.model, self.head, [ended[i] for i in batch], self.pad
            )
        return scores


@contextmanager
def policy_and_judge(
    base: models.Base, chat: Chat, sft: Path, reward: Path | RewardFnMaker, rows: int
) -> Iterator[tuple]:
    """A model with the SFT adapter as ``policy``, to be trained, and as ``reference``, and what judges its answers: the
    reward model in a folder, or what the function makes. The backbone is left as it came.

    The judge raises a StudyError where a reward is not finite; its rewards lie on the model's device.
    """
    is_folder = isinstance(reward, Path)
    model = models.load_adapters(
        base,
        {"policy": sft, "reference": sft} | ({"reward": reward} if is_folder else {}),
        trainable="policy",
    )

    def finite(judge: RewardFn) -> RewardFn:
        def judged(answers: Sequence[EncodedExample]) -> torch.Tensor:
            rewards = judge(answers).to(model.device)
            if not torch.isfinite(rewards).all():
                raise StudyError(
                    f"{int((~torch.isfinite(rewards)).sum())} of {len(rewards)} rewards are not finite; look at the reward "
                    "model's training curve in 02-reward"
                )
            return rewards

        return judged

    try:
        yield (
            model,
            finite(
                RewardModel(model, models.load_reward_head(reward), chat, rows)
                if is_folder
                else reward(model)
            ),
        )
    finally:
        model.unload()  # adapters sit inside the backbone


@torch.no_grad()
def answer_kl(
    model,
    answers: Sequence[EncodedExample],
    pad: int,
    rows: int,
    policy: str = "policy",
    reference: str = "reference",
) -> torch.Tensor:
    """log π − log π_ref of each answer, nats, [n]: its mean over answers of π estimates KL(π‖π_ref)."""
    sums = []
    for adapter in (policy, reference):
        model.set_adapter(adapter, inference_mode=True)
        of_adapter = torch.zeros(len(answers), device=model.device)
        for batch in decode.batches_by_length([len(a) for a in answers], rows):
            of_adapter[batch] = decode.token_logps(model, [answers[i] for i in batch], pad)[0].sum(
                1
            )
        sums.append(of_adapter)
    return sums[0] - sums[1]


def evaluate(
    model,
    judge: RewardFn,
    chat: Chat,
    held_out: Sequence[decode.Prompt],
    decoding: decode.Decoding,
    rows: int,
    step: int,
    bar=None,
) -> pd.DataFrame:
    """The policy's answers to held-out prompts after ``step`` steps, one row each: step, id, reward (raw), kl (nats), answer (text).

    At step 0 the policy is the reference weight for weight, so the KL is 0 without a pass.
    """
    answers = [
        a
        for (a,) in sample_answers(
            model, "policy", chat, held_out, [p.id for p in held_out], decoding, bar
        )
    ]
    rewards = judge(answers)
    kl = (
        answer_kl(model, answers, chat.tokenizer.pad_token_id, rows)
        if step
        else torch.zeros(len(answers))
    )
    return pd.DataFrame(
        {
            "step": step,
            "id": [prompt.id for prompt in held_out],
            "reward": rewards.double().cpu().numpy(),
            "kl": kl.double().cpu().numpy(),
            "answer": [chat.decode(a.answer_ids) for a in answers],
        }
    )


def check_spread(first_look: pd.DataFrame) -> None:
    """Stop before the first step if the judge gives every held-out answer the same reward: there is nothing to climb."""
    rewards = first_look["reward"]
    if rewards.max() - rewards.min() <= 1e-6:
        raise StudyError(
            f"the rewards of all {len(rewards)} held-out answers are alike ({rewards.iloc[0]:.3g}), so there is nothing to climb; "
            + ("look at the reward model" if len(rewards) > 1 else "ask for more held-out prompts")
        )


def before_and_after(eval_history: pd.DataFrame) -> pd.DataFrame:
    """The first and the last look side by side: id, reward_before, reward_after, kl_after, answer_before,
    answer_after."""
    before, after = (
        eval_history[eval_history["step"] == step].reset_index(drop=True)
        for step in (eval_history["step"].min(), eval_history["step"].max())
    )
    return pd.DataFrame(
        {
            "id": before["id"],
            "reward_before": before["reward"],
            "reward_after": after["reward"],
            "kl_after": after["kl"],
            "answer_before": before["answer"],
            "answer_after": after["answer"],
        }
    )
