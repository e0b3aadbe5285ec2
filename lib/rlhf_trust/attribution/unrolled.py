"""Attribution through training: what a training would have ended at with other example weights.

Training is a function of the examples' weights w (all 1). With batches fixed in advance, step t is

    g_t = 1/|B_t| Σ_{i∈B_t} w_i ∇ℓ_i(θ_t)             ĝ_t = g_t · min(1, C / (‖g_t‖ + 10⁻⁶))
    m_{t+1} = β₁ m_t + (1 − β₁) ĝ_t                     v_{t+1} = β₂ v_t + (1 − β₂) ĝ_t²
    θ_{t+1} = θ_t − η_t m̂ / (√v̂ + ε),                  m̂ = m_{t+1} / (1 − β₁^{t+1}), v̂ likewise

(AdamW without weight decay, clipping and schedule as in ``training.fit``). What is asked for is one
number of its end, the query φ(θ_T), and how it moves with each weight:

    τ_i = dφ/dw_i,      φ(w) ≈ φ(1) + Σ_i (w_i − 1) τ_i,      without example i: φ − τ_i.

So a score above 0 raises the query, as with every solver here. This is MAGIC (Ilyas and Engstrom
2025, arXiv 2504.16430), by the means of REPLAY (Engstrom et al. 2025, arXiv 2503.13751): reverse
mode from kept states. Let a, b, c be the derivatives of φ by θ_{t+1}, m_{t+1}, v_{t+1} (at the end
∇φ, 0, 0), and r = √v̂. Entry by entry the update gives

    b' = b − a η_t / ((1 − β₁^{t+1}) (r + ε))
    c' = c + a η_t m̂ / ((r + ε)² · 2 r (1 − β₂^{t+1}))     (the second term is 0 where v is)
    û  = (1 − β₁) b' + 2 (1 − β₂) ĝ_t c'

for the derivative by ĝ_t, and through the clipping, where s = C / (‖g_t‖ + 10⁻⁶) is below 1,

    u  = s û − C ⟨g_t, û⟩ / (‖g_t‖ (‖g_t‖ + 10⁻⁶)²) g_t

for that by g_t. As g_t is the gradient of the batch's loss,

    τ_i += ⟨u, ∇ℓ_i(θ_t)⟩ / |B_t|,     a ← a + ∇_θ ⟨u, g_t(θ_t)⟩,     b ← β₁ b',     c ← β₂ c'.

One step takes one gradient that is differentiated once more, for all queries together. Memory is a
micro-batch's graph, whatever the number of steps; states lie on disk (``training.Trajectory``).

**Tokens.** Where ℓ_i depends on log-probabilities of answer tokens alone, ∇ℓ_i is a sum over them,
and so is τ_i = Σ_j τ_ij, τ_ij += ∂ℓ_i/∂log p_j ⟨u, ∇log p_j(θ_t)⟩ / |B_t|: what a training would
have ended at, had it learnt nothing from that token. It costs nothing more: τ_ij is the derivative
by a gate z_j = 1 on the token's gradient.

**Chains.** DPO starts where SFT ended, and its loss holds SFT's log-probabilities ρ of every pair.
So the derivative by SFT's last weights is what is left at DPO's start, a, and Σ ∂φ/∂ρ ∂ρ/∂θ_sft;
it goes on back through SFT. One pass scores the examples of both (:class:`Stage`). INPO's rounds
are such a chain.

**Smoothness.** A derivative foretells a retraining only where steps are smooth functions of their
gradients. With the usual ε of 10⁻⁸ Adam's first steps are signs of gradients; one of the gradients'
own size (``TrainConfig.epsilon``) makes them smooth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import StudyError
from ..artifacts import content_key, progress
from ..chat import preference_row
from ..decode import Example, LowerStates, answer_token_logps
from ..losses import (
    LikelihoodLoss,
    Loss,
    NextTokenLoss,
    reference_logps,
    summed_logps,
    sums_by_answer,
    tokens_content,
    training_loss,
)
from ..models import load_tokenizer, lora_weights, restore, using
from ..sources import refusing
from ..training import (
    CLIP,
    TrainConfig,
    Trajectory,
    fit,
    keep_state,
    kept_state,
    trained_weights,
    training_batches,
    training_code,
    training_content,
)
from .validate import Queries

BETA_1, BETA_2 = 0.9, 0.999
"""AdamW's defaults, which ``training.fit`` takes."""

TOLERANCE = 1e-2
"""Largest relative difference between a step's gradient as it was and as it is computed again."""

Weights = dict[str, torch.Tensor]
"""Weight name → tensor; of derivatives, with the queries as a leading dimension."""


@dataclass(frozen=True)
class Stage:
    """One training of a chain.

    ``examples``, ``loss``, ``config``: as given to ``training.fit``, which kept ``trajectory``
    (:func:`train_stages` does).
    ``reference``: where the loss holds log-probabilities by weights of this chain, their
    coefficients by the number of the stage that starts with those weights: ``{1: 1.0}`` for DPO as
    stage 1 after SFT as stage 0; ``{1: tau / eta, 2: 1 - tau / eta}`` for the second round of INPO.
    Empty: these numbers are constants.
    """

    examples: Sequence[Example]
    loss: Loss
    config: TrainConfig
    trajectory: Trajectory | None = None
    reference: Mapping[int, float] = field(default_factory=dict)


def train_stages(
    network,
    adapter: str,
    stages: Sequence[Stage],
    pad: int,
    kept: LowerStates | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    folder: Path | None = None,
) -> list[Stage]:
    """Run a chain from the present weights, in place; the stages as they ran, for
    :func:`unrolled_scores`.

    A loss with a ``Stage.reference`` is given the log-probabilities that it refers to as this run
    makes them. ``weights``: a factor for each example of each stage, by default 1. ``folder``:
    where the states of stage k are kept, under ``stage-k``."""
    ran, logps = [], [np.zeros((len(stage.examples), 2)) for stage in stages]
    for number, stage in enumerate(stages):
        for later, other in enumerate(stages):
            if coefficient := other.reference.get(number):
                found = reference_logps(network, adapter, other.examples, pad, kept=kept)
                logps[later] += coefficient * np.array([found[e.id] for e in other.examples])
        loss = stage.loss
        if stage.reference:
            by_id = zip((example.id for example in stage.examples), logps[number].tolist())
            loss = replace(loss, reference=dict(by_id))
        trajectory = None if folder is None else Trajectory(folder / f"stage-{number}")
        own = None if weights is None else weights[number]
        more = {"kept": kept, "weights": own, "trajectory": trajectory}
        fit(network, adapter, stage.examples, loss, pad, stage.config, **more)
        ran.append(replace(stage, loss=loss, trajectory=trajectory))
    return ran


def unrolled_scores(
    network,
    adapter: str,
    stages: Sequence[Stage],
    queries: Mapping[str, Queries],
    pad: int,
    kept: LowerStates | None = None,
    resume: Path | None = None,
    desc: str = "replay",
    by_token: bool = False,
) -> list:
    """τ of every example of every stage for every query: arrays [examples, queries], one a stage.

    Parameters
    ----------
    network
        The PEFT model that was trained, in float32 (or float64) and evaluation mode. ``adapter``
        lends its place to each state in turn and has its own weights again afterwards.
    stages
        In the order in which they ran, each from the weights with which the one before ended.
    queries
        By name: φ is the mean of the loss over the examples, at the end of the last stage.
        Reference log-probabilities in a query's loss are constants.
    resume
        A file that keeps what is done after every step, for a run that may be killed.
    by_token
        Return instead for each stage, example and answer an array [answer's tokens, queries], whose
        sum over all tokens of an example is its score. A loss of other things than answers'
        log-probabilities has no tokens: one array [1, queries] an example.

    Raises
    ------
    StudyError
        If states are missing or of another training, a stage did not start where the one before
        ended, weights are too coarse (bfloat16), a gradient is not what it was in training, a
        number is not finite, or a query has no gradient.
    """
    for name, query in queries.items():
        if not query.examples:
            raise StudyError(f"unrolled: the query {name!r} has no examples")
    _check_precision(network)
    weights = [trained_weights(network, adapter, stage.loss) for stage in stages]
    saved = [{name: w.detach().clone() for name, w in some.items()} for some in weights]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            replay = _Replay(network, adapter, stages, weights, pad, kept)
            replay.run(queries, resume, desc)
            return replay.by_token() if by_token else replay.by_example()
    finally:
        for some, before in zip(weights, saved):
            _put(some, before)


RECIPE = TrainConfig(learning_rate=1e-2, epsilon=1e-2, epochs=2)
"""A short training of smooth steps, as in ``23-through-training``."""


def attribute(
    network,
    examples: Sequence[Mapping],
    loss: str,
    queries: Mapping[str, Sequence[Mapping] | Queries],
    config: TrainConfig = RECIPE,
    folder: Path | str | None = None,
    tokenizer=None,
    beta: float = 0.1,
    eta: float = 0.1,
) -> pd.DataFrame:
    """Attribution of any run: trains the active adapter and scores every example for every query.

    Parameters
    ----------
    network
        A PEFT model with LoRA on linear layers, in float32 and evaluation mode. Its active adapter
        is trained in place, from where it is.
    examples
        Rows of a preference data set as TRL's trainers read them: ``prompt``, ``chosen`` and
        ``rejected``, as texts or lists of messages (``chat.preference_row``).
    loss
        ``sft`` (on the chosen answers alone), ``reward``, ``dpo`` (with ``beta``) or ``inpo`` (with
        ``eta``): ``losses.training_loss``.
    queries
        By name: rows whose mean loss of the same kind is asked for (SFT's as a mean a token), or
        :class:`.validate.Queries` of rows and another loss. ``Queries(rows, LogOddsLoss())`` asks
        for the mean of log p(chosen) − log p(rejected).
    config
        How to train. Only smooth steps have scores that foretell retraining (module docstring).
    folder
        Where the states of all steps are kept. A training that an earlier call kept there is taken
        instead of a new one. By default states are forgotten.
    tokenizer
        By default the one beside the model's weights.

    Returns
    -------
    DataFrame
        τ [examples, queries], rows in the order of ``examples``. Without an example the query is
        predicted to be lower by τ: above 0, the example raises it.

    Raises
    ------
    StudyError
        If a row cannot be read, the model has no adapter or no tokenizer, or as ``training.fit``
        and :func:`unrolled_scores` do.
    """
    if not isinstance(network, PeftModel):
        raise StudyError("attribute: the model has no adapter; make one with peft.get_peft_model")
    _check_precision(network)
    if not isinstance(queries, Mapping) or not queries:
        raise StudyError("attribute: queries must be a mapping from names to rows, at least one")
    if tokenizer is None:
        tokenizer = _own_tokenizer(network)
    adapter, pad, kept = network.active_adapter, tokenizer.pad_token_id or 0, LowerStates(network)
    sides = ("chosen",) if loss == "sft" else ("chosen", "rejected")
    pool, asked = _encoded(examples, "the examples", tokenizer, sides), {}
    for name, query in queries.items():
        query = query if isinstance(query, Queries) else Queries(query, None)
        own = ("chosen", "rejected")[: query.loss.sequences] if query.loss else sides
        some = _encoded(query.examples, f"the query {name!r}", tokenizer, own)
        asked[name] = replace(query, examples=some)
    referring = [e for query in asked.values() if query.loss is None for e in query.examples]
    with nullcontext(folder) if folder else TemporaryDirectory() as place:
        trajectory = Trajectory(place)
        ended = trajectory.ended
        if ended:
            start = trajectory.state(0)["weight"]
            own = (name for name in lora_weights(network, adapter) if name in start)
            restore(network, adapter, {name: start[name] for name in own})
        trained = training_loss(loss, network, adapter, pool + referring, pad, kept, beta, eta)
        if not ended:
            more = {"kept": kept, "trajectory": trajectory}
            fit(network, adapter, pool, trained, pad, config, "training", **more)
        default = NextTokenLoss("mean") if loss == "sft" else trained
        asked = {name: replace(query, loss=query.loss or default) for name, query in asked.items()}
        stage = Stage(pool, trained, config, trajectory)
        (scores,) = unrolled_scores(network, adapter, [stage], asked, pad, kept)
        if ended:
            end = trajectory.state(len(trajectory.read()[1]))["weight"]
            _put(trained_weights(network, adapter, trained), end)
    return pd.DataFrame(scores, columns=list(queries))


def _own_tokenizer(network):
    """The tokenizer beside the weights of a PEFT model."""
    place = network.get_base_model().name_or_path
    with refusing(f"attribute: no tokenizer beside the model {place}", "pass one", Exception):
        return load_tokenizer(Path(place))


def _encoded(
    rows: Sequence[Mapping], name: str, tokenizer, answers: Sequence[str]
) -> list[Example]:
    found = []
    for number, row in enumerate(rows):
        try:
            texts = preference_row(row, tokenizer, answers)
        except ValueError as error:
            raise StudyError(f"attribute: row {number} of {name} {error}") from None
        found.append(Example(f"row {number} of {name}", name, texts))
    if not found:
        raise StudyError(f"attribute: {name} must have at least one row")
    return found


class _Replay:
    """Walks a chain backwards. In the words of the module: ``a``, ``b``, ``c`` are the derivatives
    of the queries by the present state, ``scores`` τ by unit (an answer's token; an example where
    the loss has no tokens; ``units`` says where each example's begin) and ``by_reference`` the
    derivatives by the numbers that each stage's loss refers to, [queries, examples, 2]."""

    def __init__(self, network, adapter, stages: Sequence[Stage], weights, pad: int, kept):
        self.network, self.adapter, self.pad, self.kept = network, adapter, pad, kept
        self.stages, self.weights = stages, weights
        self.keys, self.rates, end = [], [], None
        for number, (stage, own) in enumerate(zip(stages, weights)):
            if stage.trajectory is None:
                raise StudyError(f"unrolled: stage {number} has no trajectory; keep its states")
            place = stage.trajectory.folder
            key, rates = stage.trajectory.read()
            start = stage.trajectory.state(0)["weight"]
            if {n: w.shape for n, w in start.items()} != {n: w.shape for n, w in own.items()}:
                raise StudyError(f"{place}: these states are of another adapter or loss")
            _put(own, start)  # the loss's own weights are part of its content
            if key != content_key(training_content(stage.examples, stage.loss, stage.config)):
                raise StudyError(
                    f"{place}: these states are of other examples, another loss or other settings "
                    "than given"
                )
            shared = start.keys() & (end or start).keys()  # a reward head is one stage's own
            if end and not all(torch.equal(start[name], end[name]) for name in shared):
                raise StudyError(f"unrolled: stage {number} did not start where the last one ended")
            end = stage.trajectory.state(len(rates))["weight"]
            self.keys.append(key)
            self.rates.append(rates)
        counts = ([sum(_units(stage.loss, e)) for e in stage.examples] for stage in stages)
        self.units = [np.cumsum([0, *of_examples]) for of_examples in counts]

    def by_example(self) -> list[np.ndarray]:
        return [np.add.reduceat(s.T.numpy(), u[:-1]) for s, u in zip(self.scores, self.units)]

    def by_token(self) -> list[list[list[np.ndarray]]]:
        found = []
        for stage, scores, units in zip(self.stages, self.scores, self.units):
            of_examples = np.split(scores.T.numpy(), units[1:-1])
            ends = [np.cumsum(_units(stage.loss, example))[:-1] for example in stage.examples]
            found.append([np.split(own, end) for own, end in zip(of_examples, ends)])
        return found

    def run(self, queries: Mapping[str, Queries], resume: Path | None, desc: str) -> None:
        asked = [
            [name, q.loss.content(q.examples), tokens_content(q.examples)]
            for name, q in queries.items()
        ]
        references = [sorted(stage.reference.items()) for stage in self.stages]
        code = training_code("attribution.unrolled")
        key, count = content_key("by token", self.keys, references, asked, code), len(queries)
        walk = [(n, t) for n, rates in enumerate(self.rates) for t in range(len(rates))][::-1]
        done = self._resumed(resume, key)
        if not done:
            wide = {"dtype": torch.float64}
            self.scores = [torch.zeros(count, int(units[-1]), **wide) for units in self.units]
            sizes = [(count, len(stage.examples), 2) for stage in self.stages]
            self.by_reference = [torch.zeros(size, **wide) for size in sizes]
            self._begin(self._query_gradients(queries))
        batches = [training_batches(stage.examples, stage.config) for stage in self.stages]
        with progress(total=len(walk), desc=desc, unit="step") as bar:
            bar.update(done)
            for number, step in walk[done:]:
                self._step(number, step, batches[number][step])
                if number and not step:
                    self._begin(self._through_references(number))
                done += 1
                self._keep(resume, key, done)
                bar.update(1)

    def _begin(self, gradients: Weights) -> None:
        """At the end of a stage: the optimiser's moments are nobody's business any more."""
        self.a = gradients
        self.b = {name: torch.zeros_like(tensor) for name, tensor in gradients.items()}
        self.c = {name: torch.zeros_like(tensor) for name, tensor in gradients.items()}

    def _query_gradients(self, queries: Mapping[str, Queries]) -> Weights:
        stage, own = self.stages[-1], self.weights[-1]
        _put(own, stage.trajectory.state(len(self.rates[-1]))["weight"])
        found: dict[str, list] = {name: [] for name in own}
        for name, query in queries.items():
            total = {weight: torch.zeros_like(tensor) for weight, tensor in own.items()}
            for start in range(0, len(query.examples), stage.config.micro_batch_size):
                some = query.examples[start : start + stage.config.micro_batch_size]
                with using(self.network, self.adapter, list(own.values())), torch.enable_grad():
                    values = query.loss.loss(self.network, some, self.pad, self.kept)
                    part = values.sum() / len(query.examples)
                    _add(total, _derivatives(part, own))
            if not any(tensor.any() for tensor in total.values()):
                raise StudyError(f"unrolled: the query {name!r} has no gradient at the end")
            _finite(total.values(), f"the gradient of the query {name!r}")
            for weight, tensor in total.items():
                found[weight].append(tensor)
        return {weight: torch.stack(some) for weight, some in found.items()}

    def _step(self, number: int, step: int, places: Sequence[int]) -> None:
        stage, own = self.stages[number], self.weights[number]
        state = stage.trajectory.state(step, self.network.device)
        _put(own, state["weight"])
        u = self._through_update(state, self.rates[number][step], stage.config.epsilon, step + 1)
        gradient = {name: torch.zeros_like(weight) for name, weight in own.items()}
        denominator = stage.loss.denominator([stage.examples[i] for i in places])
        for start in range(0, len(places), stage.config.micro_batch_size):
            some = places[start : start + stage.config.micro_batch_size]
            self._through_gradient(number, some, denominator, u, gradient)
        _check_gradient(gradient, state["g"], f"stage {number}, step {step + 1}")
        where = f"the derivative by the state before step {step + 1} of stage {number}"
        _finite([*self.a.values(), *self.b.values(), *self.c.values()], where)

    def _through_update(
        self, state: dict[str, Weights], rate: float, epsilon: float, t: int
    ) -> Weights:
        """``u``, the derivative by step t's gradient; ``b`` and ``c`` go to the state before."""
        g = state["g"]
        norm = float(torch.stack([tensor.norm() for tensor in g.values()]).norm())
        scale = min(1.0, CLIP / (norm + 1e-6))
        u = {}
        for name in self.a:
            clipped = g[name] * scale
            m = BETA_1 * state["m"][name] + (1 - BETA_1) * clipped
            v = BETA_2 * state["v"][name] + (1 - BETA_2) * clipped.square()
            root, m_hat = (v / (1 - BETA_2**t)).sqrt(), m / (1 - BETA_1**t)
            divisor, a = root + epsilon, self.a[name] * rate
            curved = m_hat / (divisor.square() * 2 * root * (1 - BETA_2**t))
            b = self.b[name] - a / ((1 - BETA_1**t) * divisor)
            c = self.c[name] + a * torch.where(v > 0, curved, torch.zeros_like(v))
            u[name] = (1 - BETA_1) * b + 2 * (1 - BETA_2) * clipped * c
            self.b[name], self.c[name] = BETA_1 * b, BETA_2 * c
        if scale < 1:
            along = sum((u[name] * g[name]).flatten(1).sum(1) for name in u)
            along = along * CLIP / (norm * (norm + 1e-6) ** 2)
            for name in u:
                shape = (-1, *[1] * g[name].dim())
                u[name] = u[name] * scale - along.view(shape) * g[name]
        return u

    def _through_gradient(
        self, number: int, places: Sequence[int], denominator: float, u: Weights, gradient: Weights
    ) -> None:
        """One micro-batch: its share of ``gradient``, and ⟨u, gradient⟩ differentiated by the
        weights of the network, by the gates and, if they are not constants, by what the loss refers
        to."""
        stage, own = self.stages[number], self.weights[number]
        examples, loss = [stage.examples[i] for i in places], stage.loss
        inputs = dict(own)
        if stage.reference:
            rows = [loss.reference[example.id] for example in examples]
            inputs["reference"] = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
            by_id = {example.id: row for example, row in zip(examples, inputs["reference"])}
            loss = replace(loss, reference=by_id)
        with using(self.network, self.adapter, list(own.values())), torch.enable_grad():
            values, inputs["gates"] = _gated(loss, self.network, examples, self.pad, self.kept)
            part = values.sum() / denominator
            first = _derivatives(part, own, create_graph=True)
            _add(gradient, {name: tensor.detach() for name, tensor in first.items()})
            second = _derivatives(first, inputs, u)
        units = self.units[number]
        columns = np.concatenate([np.arange(units[i], units[i + 1]) for i in places])
        self.scores[number][:, columns] += second.pop("gates").cpu()
        if stage.reference:
            self.by_reference[number][:, places] += second.pop("reference").cpu()
        _add(self.a, second)

    def _through_references(self, number: int) -> Weights:
        """The derivative by the weights with which a stage starts, as the end of the one before:
        through its first step, ``a``, and through the numbers that this and later stages refer
        to."""
        own, before = self.weights[number], self.weights[number - 1]
        adapter = {name: own[name] for name in own if name in before}
        count = len(self.scores[number])
        total = {
            name: self.a[name] if name in adapter else weight.new_zeros(count, *weight.shape)
            for name, weight in before.items()
        }
        _put(own, self.stages[number].trajectory.state(0)["weight"])
        for later, stage in enumerate(self.stages):
            coefficient = stage.reference.get(number, 0.0)
            if not coefficient:
                continue
            at_once = stage.config.micro_batch_size
            for start in range(0, len(stage.examples), at_once):
                some = slice(start, start + at_once)
                with using(self.network, self.adapter, list(own.values())), torch.enable_grad():
                    examples = stage.examples[some]
                    logps = summed_logps(self.network, examples, self.pad, self.kept)
                    by_logps = coefficient * self.by_reference[later][:, some].to(logps)
                    _add(total, _derivatives({"logps": logps}, adapter, {"logps": by_logps}))
        return total

    # --- a run that may be killed ---

    def _keep(self, resume: Path | None, key: str, done: int) -> None:
        if resume is not None:
            keep_state(resume, key, {"done": done} | {part: getattr(self, part) for part in PARTS})

    def _resumed(self, resume: Path | None, key: str) -> int:
        """Puts back what is kept of this very replay; how many steps were done."""
        if resume is None or os.environ.get("RLHF_TRUST_CACHE") == "off":
            return 0
        kept = kept_state(resume, key, self.network.device)
        for part in PARTS if kept else ():
            setattr(self, part, kept[part])
        if kept:
            self.scores = [some.cpu() for some in self.scores]
            self.by_reference = [some.cpu() for some in self.by_reference]
        return kept.get("done", 0)


PARTS = "a", "b", "c", "scores", "by_reference"
"""What changes from step to step of a replay."""


def _units(loss: Loss, example: Example) -> list[int]:
    """How many scores each of its answers has; [1] for the example as a whole."""
    if not isinstance(loss, LikelihoodLoss):
        return [1]
    return [len(text.answer_ids) for text in example.sequences]


def _gated(
    loss: Loss, network, examples: Sequence[Example], pad: int, kept
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each example, and ones that scale the gradient of each unit (:func:`_units`)."""
    if not isinstance(loss, LikelihoodLoss):
        values = loss.loss(network, examples, pad, kept)
        gates = torch.ones_like(values, requires_grad=True)
        return values * gates, gates
    logps, owner = answer_token_logps(network, examples, pad, kept)
    gates = torch.ones_like(logps, requires_grad=True)
    # No gate moves the values, so that the slope of the loss at them stays what it is.
    logps = logps.detach() + gates * (logps - logps.detach())
    return loss.of_logps(sums_by_answer(logps, owner, examples), examples), gates


def _check_precision(network) -> None:
    coarse = {weight.dtype for weight in network.parameters()} - {torch.float32, torch.float64}
    if coarse:
        raise StudyError(
            f"unrolled: second derivatives need float32 weights, and some are {coarse.pop()}; load "
            "the model with dtype float32 and train it so"
        )


def _derivatives(
    values: torch.Tensor | Weights,
    by: Weights,
    along: Weights | None = None,
    create_graph: bool = False,
) -> Weights:
    """Derivatives of a number by each of ``by``; or those of ⟨along, values⟩ for every query in
    ``along``, [queries, …]. Zero where nothing depends on it."""
    if along is None:
        found = torch.autograd.grad(
            values, list(by.values()), create_graph=create_graph, materialize_grads=True
        )
        return dict(zip(by, found))
    reached = [name for name in along if values[name].requires_grad]
    found = torch.autograd.grad(
        [values[name] for name in reached],
        list(by.values()),
        [along[name] for name in reached],
        is_grads_batched=True,
        materialize_grads=True,
    )
    return dict(zip(by, found))


def _add(total: Weights, more: Weights) -> None:
    for name, tensor in more.items():
        total[name] = total[name] + tensor


def _put(weights: Weights, values: Weights) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def _finite(tensors, what: str) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise StudyError(
            f"unrolled: {what} is not finite; lower learning_rate or raise epsilon in the training"
        )


def _check_gradient(now: Weights, then: Weights, where: str) -> None:
    apart = torch.stack([(now[name] - then[name].to(now[name])).norm() for name in now]).norm()
    size = torch.stack([tensor.norm() for tensor in then.values()]).norm()
    if not float(apart) <= TOLERANCE * float(size):
        raise StudyError(
            f"unrolled: {where}: the gradient is not what it was in training (off by "
            f"{float(apart / size):.1%}); is it the same model, adapter and examples?"
        )
