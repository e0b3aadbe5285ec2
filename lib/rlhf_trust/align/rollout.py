"""What PPO and INPO share: answers sampled from an adapter, their rewards, and evaluation on
held-out prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from .. import StudyError, decode, models, require
from ..chat import Chat, EncodedExample
from ..decode import Decoding, Prompt
from ..distributed import shared

SAMPLED_AT_ONCE = 64
"""Most answers that are sampled in one batch."""

RewardFn = Callable[[Sequence[EncodedExample]], torch.Tensor]
"""Rewards of answers, [n], in any unit."""

RewardFnMaker = Callable[[torch.nn.Module], RewardFn]
"""Makes a reward function from the PEFT model that is trained."""


def sample_answers(
    model, adapter: str, chat: Chat, prompts: Sequence[Prompt], keys, decoding: Decoding, bar=None
) -> list[list[EncodedExample]]:
    """Sample ``decoding.samples`` answers to each prompt from one adapter, [prompts][samples].

    ``keys`` (strings, [prompts]) seed the draws; ``bar`` is a progress bar that counts answers.
    """
    ids = [chat.prompt_ids(prompt.turns, prompt.system) for prompt in prompts]
    answers: list[list[EncodedExample]] = [[] for _ in ids]
    batch_size = max(1, SAMPLED_AT_ONCE // decoding.samples)
    eos, pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id
    for batch in decode.batches_by_length([len(i) for i in ids], batch_size):
        rows, own_keys = [ids[i] for i in batch], [keys[i] for i in batch]
        with models.using(model, adapter):
            drawn = decode.sample_batch(model, rows, own_keys, decoding, eos, pad)
        for i, samples in zip(batch, drawn):
            answers[i] = [EncodedExample(ids[i] + tuple(tokens), len(ids[i])) for tokens in samples]
        if bar is not None:
            bar.update(len(batch) * decoding.samples)
    return answers


def with_end(answers: Sequence[EncodedExample], eos: int) -> list[EncodedExample]:
    """The answers, with EOS appended to the truncated ones."""
    return [
        a if a.input_ids[-1] == eos else EncodedExample(a.input_ids + (eos,), a.answer_start)
        for a in answers
    ]


class RewardModel:
    """The reward function of an adapter and its head, [hidden].

    EOS is appended to truncated answers.
    """

    def __init__(
        self, model, head: torch.Tensor, chat: Chat, batch_size: int = 8, adapter: str = "reward"
    ):
        width = model.config.hidden_size
        if head.shape != (width,):
            sizes = f"head of {head.shape[-1]} numbers for states of {width}"
            raise StudyError(f"reward model: {sizes}; run 02-reward again on this model")
        self.model, self.head, self.batch_size = model, head, batch_size
        self.adapter = adapter
        self.eos, self.pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id

    @torch.no_grad()
    def __call__(self, answers: Sequence[EncodedExample]) -> torch.Tensor:
        def read(some):
            return decode.rewards(self.model, self.head, some, self.pad, self.batch_size, "")

        with models.using(self.model, self.adapter):
            rewards = shared(read, with_end(answers, self.eos))
        return torch.tensor(rewards, dtype=torch.float32, device=self.model.device)


@contextmanager
def policy_and_reward(
    base: models.Base, chat: Chat, sft: Path, reward: Path | RewardFnMaker, batch_size: int
) -> Iterator[tuple[torch.nn.Module, RewardFn]]:
    """A model with the SFT adapter twice, as trainable ``policy`` and as ``reference``, and the
    reward function.

    ``reward`` is the folder of a reward model or makes another reward function. Rewards come on the
    model's device; a StudyError says when one is not finite. The backbone is bare again afterwards.
    """
    adapters = {"policy": sft, "reference": sft}
    if isinstance(reward, Path):
        adapters["reward"], head = reward, models.load_reward_head(reward)
        reward = partial(RewardModel, head=head, chat=chat, batch_size=batch_size)
    with models.adapted(base, adapters, trainable="policy") as model:
        reward_fn = reward(model)

        def finite_rewards(answers: Sequence[EncodedExample]) -> torch.Tensor:
            rewards = reward_fn(answers).to(model.device)
            broken = int((~torch.isfinite(rewards)).sum())
            counts = f"{broken} of {len(rewards)} rewards are not finite"
            require(not broken, f"{counts}; look at the training curve in 02-reward")
            return rewards

        yield model, finite_rewards


@torch.no_grad()
def answer_kl(model, answers: Sequence[EncodedExample], pad: int, batch_size: int) -> torch.Tensor:
    """log π − log π_ref of each answer, nats, [n], from the adapters ``policy`` and ``reference``.

    Its mean over answers of π estimates KL(π‖π_ref).
    """
    kept = decode.LowerStates(model)

    def log_ratios(own: Sequence[EncodedExample]) -> list[float]:
        batches = decode.batches_by_length([len(a) for a in own], batch_size)
        logps = torch.zeros(2, len(own), device=model.device)
        for row, adapter in zip(logps, ("policy", "reference")):
            with models.using(model, adapter):
                for batch in batches:
                    some = [own[i] for i in batch]
                    row[batch] = decode.token_logps(model, some, pad, kept=kept)[0].sum(1)
        return (logps[0] - logps[1]).tolist()

    return torch.tensor(shared(log_ratios, answers), device=model.device)


def described(answers: Sequence[EncodedExample], chat: Chat) -> dict[str, list]:
    """Columns tokens (end token included), ended (whether an answer stopped before the limit) and
    answer (text)."""
    eos = chat.tokenizer.eos_token_id
    return {
        "tokens": [len(answer.answer_ids) for answer in answers],
        "ended": [answer.input_ids[-1] == eos for answer in answers],
        "answer": [chat.decode(answer.answer_ids) for answer in answers],
    }


@dataclass
class Run:
    """What PPO and INPO carry from step to step: model, reward, held-out prompts and measurements.

    Attributes
    ----------
    decoding
        Of held-out answers, one a prompt. The random numbers are the same at every step, so
        evaluations are paired.
    max_kl
        KL to the reference, nats per answer, beyond which the run stops.
    bar
        A progress bar that counts answers.
    curve
        (step, metric, value) of everything measured.
    eval_history
        A table per evaluation, one row a prompt: step, id, reward (raw), kl (nats,
        :func:`answer_kl`) and what :func:`described` gives.
    """

    model: torch.nn.Module
    reward_fn: RewardFn
    chat: Chat
    held_out: Sequence[Prompt]
    decoding: Decoding
    batch_size: int
    max_kl: float
    bar: tqdm
    curve: list[tuple[int, str, float]] = field(default_factory=list)
    eval_history: list[pd.DataFrame] = field(default_factory=list)

    def sample(self, prompts, keys, decoding: Decoding) -> list[list[EncodedExample]]:
        """:func:`sample_answers` from the policy."""

        def answer(own: Sequence[int]) -> list[list[EncodedExample]]:
            asked = [prompts[i] for i in own], [keys[i] for i in own]
            self.bar.update((len(prompts) - len(own)) * decoding.samples)  # the others'
            return sample_answers(self.model, "policy", self.chat, *asked, decoding, self.bar)

        return shared(answer, range(len(prompts)))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        self.curve += [(step, metric, float(value)) for metric, value in metrics.items()]

    def check_kl(self, step: int, kl: float) -> None:
        if not kl <= self.max_kl:
            raise StudyError(
                f"step {step}: the KL to the SFT model is {kl:.1f} nats per answer (max_kl "
                f"{self.max_kl:g}); lower learning_rate, or raise PPO's kl_coef or INPO's eta"
            )

    def check_spread(self) -> None:
        """Stop before the first step if all held-out answers have the same reward."""
        rewards = self.eval_history[0]["reward"]
        if rewards.max() - rewards.min() <= 1e-6:
            raise StudyError(
                f"the rewards of all {len(rewards)} held-out answers are alike "
                f"({rewards.iloc[0]:.3g}): use more held-out prompts, or look at the reward model"
            )

    def evaluate(self, step: int) -> None:
        """Answer the held-out prompts after ``step`` steps; add to ``curve`` and ``eval_history``.

        At step 0 policy and reference are the same weights: the KL is 0 without a forward pass.
        """
        keys = [prompt.id for prompt in self.held_out]
        answers = [answer for (answer,) in self.sample(self.held_out, keys, self.decoding)]
        rewards, kl = self.reward_fn(answers), torch.zeros(len(answers))
        if step:
            pad = self.chat.tokenizer.pad_token_id
            kl = answer_kl(self.model, answers, pad, self.batch_size)
        rows = pd.DataFrame({"step": step, "id": keys})
        rows["reward"], rows["kl"] = rewards.double().cpu().numpy(), kl.double().cpu().numpy()
        rows = rows.assign(**described(answers, self.chat))
        self.check_kl(step, rows["kl"].mean())
        self.record(step, {f"held_out_{name}": rows[name].mean() for name in ("reward", "kl")})
        self.eval_history.append(rows)

    def state(self) -> dict:
        """What changes while the policy is trained, for ``keep_state``."""
        history = [rows.to_dict("list") for rows in self.eval_history]
        weights = models.snapshot(self.model, "policy")
        return {"curve": self.curve, "eval_history": history, "policy": weights}

    def restore(self, state: dict) -> None:
        """Go back to where :meth:`state` was asked for."""
        self.curve = state["curve"]
        self.eval_history = [pd.DataFrame(rows) for rows in state["eval_history"]]
        models.restore(self.model, "policy", state["policy"])

    def tables(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """``curve`` (columns step, metric, value) and ``eval_history`` as one table each."""
        curve = pd.DataFrame(self.curve, columns=["step", "metric", "value"])
        return curve, pd.concat(self.eval_history, ignore_index=True)


def before_and_after(eval_history: pd.DataFrame) -> pd.DataFrame:
    """The first and the last evaluation side by side: id and, each with the suffixes ``_before``
    and ``_after``, step, reward, kl, tokens, ended and answer."""
    first, *_, last = (rows for _, rows in eval_history.groupby("step"))
    return first.merge(last, on="id", suffixes=("_before", "_after"), validate="one_to_one")
