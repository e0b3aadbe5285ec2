"""The losses of every stage: the same object trains a stage and is attributed through.

=======  ===============================================================  =======================
stage    loss of a training example                                       class
=======  ===============================================================  =======================
SFT      - sum_t log p(y_t | x, y_<t)  over the answer's tokens           :class:`NextTokenLoss`
reward   - log sigmoid( r(chosen) - r(rejected) )                         :class:`RewardLoss`
DPO      - log sigmoid( beta [ (log p - log p_ref)(chosen)
         - (log p - log p_ref)(rejected) ] )                              :class:`DPOLoss`
INPO     ( (log p - mixed reference)(winner)
         - (log p - mixed reference)(loser) - 1 / (2 eta) )^2             :class:`INPOLoss`
=======  ===============================================================  =======================

PPO is attributed through the reward model's loss, the way its training pairs acted. :class:`LogOddsLoss` and
:class:`RewardGapLoss` train nothing: they are what a vertical measures, as an evaluation loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from . import StudyError
from .artifacts import content_key
from .decode import (
    Example,
    MultipleChoice,
    answer_logps,
    answer_token_logps,
    end_token_states,
    flatten,
    option_logps,
)
from .models import only_adapter, without_adapters


class Loss(Protocol):
    """What :func:`per_example_gradients` needs of a loss."""

    sequences: int
    """Sequences per example."""

    @property
    def name(self) -> str:
        """Short name, for the ``loss`` column of tables."""

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        """Values [n] from ONE forward pass, whose rows are the examples in order (the hooks rely on both):
        :func:`answer_token_logps` or :func:`end_token_states`."""

    def content(self, examples: Sequence[Example]) -> list:
        """All that the values depend on besides model and sequences, as JSON: part of the cache's key."""


@dataclass(frozen=True)
class NextTokenLoss:
    """- log p(answer | prompt): summed over the answer's tokens, or their ``mean``.

    The sum is the likelihood itself, and ranks long answers first; the mean shows what is left without length.
    """

    reduction: str = "sum"
    sequences = 1

    def __post_init__(self):
        _check_reduction(self.reduction)

    @property
    def name(self) -> str:
        return f"next_token_{self.reduction}"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        return -_answer_logps(model, examples, pad, self.reduction)[:, 0]

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name]


@dataclass(frozen=True, eq=False)
class RewardLoss:
    """- log sigmoid(r(chosen) - r(rejected)), the Bradley-Terry loss of the reward model.

    ``head``, shape [hidden], is a constant: gradients are those of the reward adapter alone.
    """

    head: torch.Tensor
    sequences = 2

    @property
    def name(self) -> str:
        return "reward"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        states = end_token_states(model, examples, pad).float()
        rewards = states @ self.head.detach().float().to(states.device)
        return -logsigmoid(rewards[:, 0] - rewards[:, 1])

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.head.detach().float().cpu().tolist()]


@dataclass(frozen=True, eq=False)
class RewardGapLoss:
    """r(counts) - r(other): what the reward model would pay for the answer that a vertical's own metric counts, against
    the other one. :class:`LogOddsLoss` of the reward model; ``head`` as for :class:`RewardLoss`."""

    head: torch.Tensor
    sequences = 2
    name = "reward_gap"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        rewards = end_token_states(model, examples, pad).float() @ self.head.detach().float().to(
            model.device
        )
        return rewards[:, 0] - rewards[:, 1]

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.head.detach().float().cpu().tolist()]


@dataclass(frozen=True, eq=False)
class DPOLoss:
    """- log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)) (Rafailov et al. 2023, arXiv 2305.18290).

    Parameters
    ----------
    beta
        As in training.
    reference
        Example id → (chosen, rejected): *summed* answer log-probabilities under the reference (the SFT adapter), see
        :func:`reference_logps`.
    reduction
        ``sum`` is DPO's own loss; ``mean`` divides every log-probability by its answer's number of tokens.
    """

    beta: float
    reference: Mapping[str, tuple[float, float]]
    reduction: str = "sum"
    sequences = 2

    def __post_init__(self):
        _check_reduction(self.reduction)

    @property
    def name(self) -> str:
        return f"dpo_{self.reduction}"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        policy = _answer_logps(model, examples, pad, self.reduction)
        reference = torch.tensor(_reference_of(self, examples), dtype=torch.float64)
        if self.reduction == "mean":
            reference = reference / torch.tensor(
                [[len(s.answer_ids) for s in e.sequences] for e in examples]
            )
        ratios = policy - reference.to(policy)
        return -logsigmoid(self.beta * (ratios[:, 0] - ratios[:, 1]))

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.beta, _reference_of(self, examples)]


@dataclass(frozen=True, eq=False)
class INPOLoss:
    """(h - 1/(2 eta))^2 with h = log p(winner)/p(loser) - its mixed reference (arXiv 2407.00617, eq. 8).

    Parameters
    ----------
    eta
        As in training, above 0.
    reference
        Example id → (winner, loser): (tau/eta) log p_ref + (1 - tau/eta) log p_t, *summed* answer log-probabilities, of the
        round that the pair comes from (``align.inpo.mixed_reference``).
    """

    eta: float
    reference: Mapping[str, tuple[float, float]]
    sequences = 2
    name = "inpo"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        ratios = _answer_logps(model, examples, pad, "sum")
        ratios = ratios - torch.tensor(_reference_of(self, examples), dtype=torch.float64).to(
            ratios
        )
        return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * self.eta)) ** 2

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.eta, _reference_of(self, examples)]


def _reference_of(
    loss: DPOLoss | INPOLoss, examples: Sequence[Example]
) -> list[tuple[float, float]]:
    missing = [e.id for e in examples if e.id not in loss.reference]
    if missing:
        raise StudyError(
            f"{loss.name}: no reference log-probabilities for example {missing[0]!r}"
            f" ({len(missing)} missing); compute them with reference_logps"
        )
    return [tuple(map(float, loss.reference[e.id])) for e in examples]


@dataclass(frozen=True)
class LogOddsLoss:
    """log p(counts) - log p(other): the log-odds [nats] of the answer that a vertical's own metric counts.

    Sequences: (the answer that counts, the other one), summed over their tokens as the verticals do. The value is the
    metric's raw material and no training loss: its sign is that of the metric, so whoever wants positive scores to
    worsen a vertical orients the gradients (by a factor -1 where a high value is good).
    """

    sequences = 2
    name = "log_odds"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        logps = _answer_logps(model, examples, pad, "sum")
        return logps[:, 0] - logps[:, 1]

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name]


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise StudyError(f"reduction: must be sum or mean, got {reduction!r}")


def _answer_logps(model, examples: Sequence[Example], pad: int, reduction: str) -> torch.Tensor:
    """Log-probabilities of the answers, shape [examples, sequences per example], with gradients."""
    logps, owner = answer_token_logps(model, examples, pad)
    sequences = flatten(examples)
    sums = logps.new_zeros(len(sequences)).index_add(0, owner, logps)
    if reduction == "mean":
        sums = sums / sums.new_tensor([len(sequence.answer_ids) for sequence in sequences])
    return sums.view(len(examples), -1)


def reference_logps(
    model,
    adapter: str,
    examples: Sequence[Example],
    pad: int,
    rows: int = 16,
    desc: str = "reference",
) -> dict[str, tuple[float, float]]:
    """Summed answer log-probabilities of each pair under one adapter: id → (chosen, rejected), for :class:`DPOLoss`."""
    with only_adapter(model, adapter):
        sums, _ = answer_logps(model, flatten(examples), pad, rows, desc)
    return {
        e.id: (float(chosen), float(rejected))
        for e, (chosen, rejected) in zip(examples, sums.reshape(-1, 2))
    }


def tokens_content(examples: Sequence[Example]) -> str:
    """A hash of examples' ids and tokens, for keys of what is computed from them."""
    return content_key(
        [[e.id, [[s.input_ids, s.answer_start] for s in e.sequences]] for e in examples]
    )


def log_odds(model, adapter: str | None, examples: Sequence[Example], pad: int) -> np.ndarray:
    """Log-odds of the bad answer, [items], nats, in the order of ``examples``.

    ``adapter``: by name, whichever is active; None for the backbone alone (the start model). What the prompts of a
    vertical share, such as worked examples, runs once (``decode.option_logps``).
    """
    found = np.zeros(len(examples))
    with only_adapter(model, adapter) if adapter is not None else without_adapters(model):
        for vertical in dict.fromkeys(e.source for e in examples):
            indices = [i for i, e in enumerate(examples) if e.source == vertical]
            choices = [
                MultipleChoice(
                    e.id,
                    e.sequences[0].input_ids[: e.sequences[0].answer_start],
                    tuple(s.answer_ids for s in e.sequences),
                )
                for e in (examples[i] for i in indices)
            ]
            found[indices] = [bad - good for bad, good in option_logps(model, choices, pad)]
    return found
