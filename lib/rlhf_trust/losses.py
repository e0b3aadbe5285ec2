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

PPO is attributed through the reward model's loss, the way its training pairs acted.
:class:`LogOddsLoss` and :class:`RewardGapLoss` train nothing: they are what a vertical measures, as
an evaluation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from . import StudyError
from .artifacts import content_key, progress
from .decode import (
    Example,
    LowerStates,
    MultipleChoice,
    answer_token_logps,
    batches_by_length,
    end_token_states,
    option_logps,
    packed_length,
    wide,
)
from .distributed import gathered, share
from .models import lora_weights, using


class Loss:
    """What training and attribution need of a loss."""

    name: str
    """Short name, for the ``loss`` column of tables."""

    sequences = 2
    """Texts per example."""

    def loss(
        self, model, examples: Sequence[Example], pad: int, kept: LowerStates | None = None
    ) -> torch.Tensor:
        """Values [n] from ONE forward pass, whose rows are the examples in order (per-example
        gradients rely on both). ``kept``: states of the lower layers to start from."""
        raise NotImplementedError

    def content(self, examples: Sequence[Example]) -> list:
        """All that the values depend on besides model and texts, as JSON: part of a cache's key."""
        return [self.name]

    def denominator(self, examples: Sequence[Example]) -> float:
        """What training divides the sum of a batch's values by."""
        return float(len(examples))

    def parameters(self) -> list[torch.nn.Parameter]:
        """Weights that are trained beside the adapter's."""
        return []


class LikelihoodLoss(Loss):
    """A loss that depends on the answers' log-probabilities alone."""

    def of_logps(self, logps: torch.Tensor, examples: Sequence[Example]) -> torch.Tensor:
        """[n, texts per example], nats, each summed over its answer's tokens → values [n]."""
        raise NotImplementedError

    def loss(self, model, examples, pad, kept=None) -> torch.Tensor:
        return self.of_logps(summed_logps(model, examples, pad, kept), examples)


@dataclass(frozen=True)
class NextTokenLoss(LikelihoodLoss):
    """- log p(answer | prompt): summed over the answer's tokens, or their ``mean``.

    The sum is the likelihood itself, and ranks long answers first; the mean shows what is left
    without length. Training on sums divides a batch by its answer tokens, as TRL does.
    """

    reduction: str = "sum"
    sequences = 1

    def __post_init__(self):
        if self.reduction not in ("sum", "mean"):
            raise StudyError(f"reduction: must be sum or mean, got {self.reduction!r}")

    @property
    def name(self) -> str:
        return f"next_token_{self.reduction}"

    def of_logps(self, logps, examples) -> torch.Tensor:
        logps = logps[:, 0]
        return -logps / logps.new_tensor(_tokens(examples)) if self.reduction == "mean" else -logps

    def denominator(self, examples: Sequence[Example]) -> float:
        return float(sum(_tokens(examples)) if self.reduction == "sum" else len(examples))


def _tokens(examples: Sequence[Example]) -> list[int]:
    return [len(example.sequences[0].answer_ids) for example in examples]


@dataclass(frozen=True, eq=False)
class RewardGapLoss(Loss):
    """r(counts) - r(other): by how much the reward model prefers the answer that a vertical's own
    metric counts. :class:`LogOddsLoss` of the reward model.

    ``head``, shape [hidden]: reward = head · last hidden state of the answer's end token.
    """

    head: torch.Tensor
    name = "reward_gap"

    def loss(self, model, examples, pad, kept=None) -> torch.Tensor:
        states = wide(end_token_states(model, examples, pad, kept))
        rewards = states @ self.head.to(states)
        return rewards[:, 0] - rewards[:, 1]

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.head.detach().float().cpu().tolist()]

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.head] if isinstance(self.head, torch.nn.Parameter) else []


@dataclass(frozen=True, eq=False)
class RewardLoss(RewardGapLoss):
    """- log sigmoid(r(chosen) - r(rejected)), the Bradley-Terry loss of the reward model.

    A ``head`` that is an ``nn.Parameter`` is trained beside the adapter; any other is a constant.
    """

    name = "reward"

    def loss(self, model, examples, pad, kept=None) -> torch.Tensor:
        return -logsigmoid(super().loss(model, examples, pad, kept))


@dataclass(frozen=True, eq=False)
class DPOLoss(LikelihoodLoss):
    """- log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)) (Rafailov et al. 2023,
    arXiv 2305.18290).

    Parameters
    ----------
    beta
        As in training.
    reference
        Example id → (chosen, rejected): *summed* answer log-probabilities under the reference (the
        SFT adapter), see :func:`reference_logps`.
    """

    beta: float
    reference: Mapping[str, tuple[float, float]]
    name = "dpo"

    def of_logps(self, logps, examples) -> torch.Tensor:
        return -logsigmoid(self.beta * _ratio_gap(self, logps, examples))

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.beta, _reference_of(self, examples).tolist()]


@dataclass(frozen=True, eq=False)
class INPOLoss(LikelihoodLoss):
    """(h - 1/(2 eta))^2 with h = log p(winner)/p(loser) - its mixed reference (arXiv 2407.00617,
    eq. 8).

    Parameters
    ----------
    eta
        As in training, above 0.
    reference
        Example id → (winner, loser): (tau/eta) log p_ref + (1 - tau/eta) log p_t, *summed* answer
        log-probabilities, of the round that the pair comes from (``align.inpo.mixed_reference``).
    """

    eta: float
    reference: Mapping[str, tuple[float, float]]
    name = "inpo"

    def of_logps(self, logps, examples) -> torch.Tensor:
        return (_ratio_gap(self, logps, examples) - 1 / (2 * self.eta)) ** 2

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.eta, _reference_of(self, examples).tolist()]


@dataclass(frozen=True)
class LogOddsLoss(LikelihoodLoss):
    """log p(counts) - log p(other): the log-odds [nats] of the answer that a vertical's own metric
    counts.

    Texts: (the answer that counts, the other one), summed over their tokens as the verticals do.
    The value is the metric's raw material and no training loss: its sign is that of the metric, so
    whoever wants positive scores to worsen a vertical orients the gradients (by a factor -1 where a
    high value is good).
    """

    name = "log_odds"

    def of_logps(self, logps, examples) -> torch.Tensor:
        return logps[:, 0] - logps[:, 1]


def summed_logps(model, examples: Sequence[Example], pad: int, kept=None) -> torch.Tensor:
    """Log-probabilities of the answers, [examples, texts per example], with gradients."""
    return sums_by_answer(*answer_token_logps(model, examples, pad, kept), examples)


def sums_by_answer(logps: torch.Tensor, owner: torch.Tensor, examples) -> torch.Tensor:
    """``decode.answer_token_logps`` → [examples, texts per example]."""
    texts = sum(len(example.sequences) for example in examples)
    return logps.new_zeros(texts).index_add(0, owner, logps).view(len(examples), -1)


def _ratio_gap(loss: DPOLoss | INPOLoss, logps: torch.Tensor, examples) -> torch.Tensor:
    """log-ratio to the reference of the first answer less that of the second, [n]."""
    ratios = logps - _reference_of(loss, examples).to(logps)
    return ratios[:, 0] - ratios[:, 1]


def _reference_of(loss: DPOLoss | INPOLoss, examples: Sequence[Example]) -> torch.Tensor:
    """[examples, 2], float64; with gradients where the reference has them."""
    missing = [e.id for e in examples if e.id not in loss.reference]
    if missing:
        raise StudyError(
            f"{loss.name}: no reference log-probabilities for example {missing[0]!r}"
            f" ({len(missing)} missing); compute them with reference_logps"
        )
    rows = [torch.as_tensor(loss.reference[e.id], dtype=torch.float64) for e in examples]
    return torch.stack(rows)


def reference_logps(
    model,
    adapter: str,
    examples: Sequence[Example],
    pad: int,
    rows: int = 16,
    kept: LowerStates | None = None,
) -> dict[str, tuple[float, float]]:
    """Summed answer log-probabilities of each pair under one adapter: id → (chosen, rejected), for
    :class:`DPOLoss`. ``rows``: texts in one pass."""
    examples, found = share(examples), {}
    batches = batches_by_length([packed_length(e.sequences) for e in examples], max(1, rows // 2))
    with using(model, adapter), torch.no_grad():
        for batch in progress(batches, desc="reference", unit="batch"):
            some = [examples[i] for i in batch]
            sums = summed_logps(model, some, pad, kept).double().tolist()
            found |= {example.id: tuple(pair) for example, pair in zip(some, sums)}
    return {key: pair for part in gathered(found) for key, pair in part.items()}


def training_loss(
    stage: str,
    network,
    adapter: str,
    examples: Sequence[Example],
    pad: int,
    kept: LowerStates | None = None,
    beta: float = 0.1,
    eta: float = 0.1,
) -> Loss:
    """The loss by which ``stage`` (sft, reward, dpo or inpo) trains an adapter from where it is.

    DPO's and INPO's refer to its present weights, on all ``examples``, held-out ones included. So
    INPO's is that of a first round, where both references are one policy. A reward model gets a
    head of its own that starts from zero."""
    if stage == "sft":
        return NextTokenLoss()
    if stage == "reward":
        weight = next(iter(lora_weights(network, adapter).values()))
        return RewardLoss(torch.nn.Parameter(weight.new_zeros(network.config.hidden_size)))
    if stage not in ("dpo", "inpo"):
        raise StudyError(f"loss: must be one of sft, reward, dpo, inpo, got {stage!r}")
    reference = reference_logps(network, adapter, examples, pad, kept=kept)
    return DPOLoss(beta, reference) if stage == "dpo" else INPOLoss(eta, reference)


def tokens_content(examples: Sequence[Example]) -> str:
    """A hash of examples' ids and tokens, for keys of what is computed from them."""
    texts = [[e.id, [[s.input_ids, s.answer_start] for s in e.sequences]] for e in examples]
    return content_key(texts)


def log_odds(
    model,
    adapter: str | None,
    examples: Sequence[Example],
    pad: int,
    kept: LowerStates | None = None,
) -> np.ndarray:
    """Log-odds of the bad answer, [items], nats, in the order of ``examples``.

    ``adapter``: by name, whichever is active; None for the backbone alone (the start model). What
    the prompts of a vertical share, such as worked examples, runs once (``decode.option_logps``).
    """
    found = np.zeros(len(examples))
    with using(model, adapter):
        for vertical in dict.fromkeys(e.source for e in examples):
            places = [i for i, e in enumerate(examples) if e.source == vertical]
            choices = [_choice(examples[i]) for i in places]
            logps = option_logps(model, choices, pad, kept=kept)
            found[places] = [bad - good for bad, good in logps]
    return found


def _choice(example: Example) -> MultipleChoice:
    if len({text.prompt_ids for text in example.sequences}) > 1:
        raise StudyError(f"{example.id}: log-odds are of two answers to one prompt")
    options = tuple(text.answer_ids for text in example.sequences)
    return MultipleChoice(example.id, example.sequences[0].prompt_ids, options)
