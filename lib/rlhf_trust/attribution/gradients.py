"""Per-example gradients of LoRA weights, many examples in one backward pass.

A LoRA layer adds ``B A x`` to its frozen layer's output. For one of its two matrices ``W`` with inputs ``x[t]`` and
output gradients ``g[t]`` at the positions ``t`` of an example's sequences, that example's gradient is

    dW = sum_t  g[t] (outer) x[t]

Rows of a batch never mix in a transformer, so one backward pass of the summed loss gives every row's ``g[t]``:
hooks keep ``x``, catch ``g`` on its way back, and the sum over ``t`` is taken per example instead of per batch (the
"ghost" or "per-sample gradient" trick, Goodfellow 2015, arXiv 1510.01799).

The loss stands for the stage that is explained (the study's spec, "Data attribution"):

=====  ==========================================================  =========================
stage  loss of a training example                                  class
=====  ==========================================================  =========================
SFT    - sum_t log p(y_t | x, y_<t)  over the answer's tokens      :class:`NextTokenLoss`
PPO    - log sigmoid( r(chosen) - r(rejected) )                    :class:`RewardLoss`
PPO    its own clipped surrogate of an answer                      :class:`PPOSurrogateLoss`
DPO    - log sigmoid( beta [ (log p - log p_ref)(chosen)
         - (log p - log p_ref)(rejected) ] )                       :class:`DPOLoss`
=====  ==========================================================  =========================

and :class:`LogOddsLoss` for what a vertical measures.

What makes it fast, besides batches: the prompt that both answers of a pair share runs once, one row of the batch
holding the example's prompt and all of its answers, each of which sees the prompt and itself (:func:`_pack`); the
output head runs on answer tokens alone, a slice at a time, without keeping logits (:class:`_ChosenLogps`). In float32 a
CPU is as good as saturated by one example, so most of what there is to gain comes with bfloat16 weights
(``tests/benchmarks/gradients.py``).

:func:`stored_gradients` writes them to files in blocks of examples, so that memory does not grow with n and a killed
run goes on at the block (:mod:`.store`).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch.nn.functional import linear, logsigmoid

from .. import StudyError
from ..artifacts import content_key, replacing, sha256_of, write_text
from ..chat import Sequence
from ..decode import answer_logps, backbone, batches_by_length, option_mask, output_head, pad_right
from ..progress import progress
from .projection import Projection
from .store import MANIFEST, NUMBER_FORMATS, Stored, block_names, check_parts, encoded, read_manifest


@dataclass(frozen=True)
class Example:
    """One training example or evaluation item.

    ``sequences`` holds one sequence for next-token losses, two for pairwise ones: (chosen or winner, rejected or
    loser). ``id`` names it in tables and errors, ``source`` says where it came from, ``cluster`` which others it is not
    independent of (none: "").
    """

    id: str
    source: str
    sequences: tuple[Sequence, ...]
    cluster: str = ""


class Loss(Protocol):
    """What :func:`per_example_gradients` needs of a loss."""

    sequences: int
    """Sequences per example."""

    @property
    def name(self) -> str:
        """Short name, for the ``loss`` column of tables."""

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        """Values [n] from ONE forward pass, whose rows are the examples in order (the hooks rely on both):
        :func:`answer_token_logps` or :func:`end_token_states`."""

    def content(self, examples: Seq[Example]) -> list:
        """All that the values depend on besides model and sequences, as JSON: part of the cache's key."""


def flatten(examples: Seq[Example]) -> list[Sequence]:
    """All sequences, an example's own next to each other: chosen_0, rejected_0, chosen_1, …"""
    return [sequence for example in examples for sequence in example.sequences]


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

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        return -_answer_logps(model, examples, pad, self.reduction)[:, 0]

    def content(self, examples: Seq[Example]) -> list:
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

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        states = end_token_states(model, examples, pad).float()
        rewards = states @ self.head.detach().float().to(states.device)
        return -logsigmoid(rewards[:, 0] - rewards[:, 1])

    def content(self, examples: Seq[Example]) -> list:
        return [self.name, self.head.detach().float().cpu().tolist()]


@dataclass(frozen=True, eq=False)
class RewardGapLoss:
    """r(counts) - r(other): what the reward model would pay for the answer that a vertical's own metric counts, against
    the other one. :class:`LogOddsLoss` of the reward model; ``head`` as for :class:`RewardLoss`."""

    head: torch.Tensor
    sequences = 2
    name = "reward_gap"

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        rewards = end_token_states(model, examples, pad).float() @ self.head.detach().float().to(model.device)
        return rewards[:, 0] - rewards[:, 1]

    def content(self, examples: Seq[Example]) -> list:
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

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        policy = _answer_logps(model, examples, pad, self.reduction)
        reference = torch.tensor(_reference_of(self, examples), dtype=torch.float64)
        if self.reduction == "mean":
            reference = reference / torch.tensor([[len(s.answer_ids) for s in e.sequences] for e in examples])
        ratios = policy - reference.to(policy)
        return -logsigmoid(self.beta * (ratios[:, 0] - ratios[:, 1]))

    def content(self, examples: Seq[Example]) -> list:
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

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        ratios = _answer_logps(model, examples, pad, "sum")
        ratios = ratios - torch.tensor(_reference_of(self, examples), dtype=torch.float64).to(ratios)
        return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * self.eta)) ** 2

    def content(self, examples: Seq[Example]) -> list:
        return [self.name, self.eta, _reference_of(self, examples)]


def _reference_of(loss: DPOLoss | INPOLoss, examples: Seq[Example]) -> list[tuple[float, float]]:
    missing = [e.id for e in examples if e.id not in loss.reference]
    if missing:
        raise StudyError(f"{loss.name}: no reference log-probabilities for example {missing[0]!r}"
                         f" ({len(missing)} missing); compute them with reference_logps")
    return [tuple(map(float, loss.reference[e.id])) for e in examples]


@dataclass(frozen=True, eq=False)
class PPOSurrogateLoss:
    """- sum_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t), ratio_t = exp(log p_t - log p_old,t): PPO's clipped
    surrogate of one sampled answer (arXiv 1707.06347, eq. 7; ``align.ppo.policy_loss`` is its mean over tokens).

    Parameters
    ----------
    old_logps, advantages
        Example id → one number per answer token (end token included): log p [nats] under the policy that drew the
        answer, and the advantage.
    clip_range
        eps, as in training.

    Where every token is clipped the gradient is zero: such an answer taught the policy nothing.
    """

    old_logps: Mapping[str, Seq[float]]
    advantages: Mapping[str, Seq[float]]
    clip_range: float = 0.2
    sequences = 1
    name = "ppo_surrogate"

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        logps, owner = answer_token_logps(model, examples, pad)
        old, advantages = (logps.new_tensor(sum(kept, [])) for kept in self._kept(examples))
        ratio = torch.exp(logps - old)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return logps.new_zeros(len(examples)).index_add(0, owner, -torch.minimum(ratio * advantages, clipped * advantages))

    def content(self, examples: Seq[Example]) -> list:
        return [self.name, self.clip_range, *self._kept(examples)]

    def _kept(self, examples: Seq[Example]) -> tuple[list[list[float]], list[list[float]]]:
        """Old log-probabilities and advantages of every example, a list an example each."""
        found: tuple[list[list[float]], list[list[float]]] = ([], [])
        for what, mapping, lists in zip(("old log-probabilities", "advantages"), (self.old_logps, self.advantages), found):
            for example in examples:
                values, tokens = mapping.get(example.id), len(example.sequences[0].answer_ids)
                if values is None or len(values) != tokens:
                    raise StudyError(f"{self.name}: example {example.id!r} needs {tokens} {what}, one an answer token, "
                                     f"and has {'none' if values is None else len(values)}; take them from the PPO step "
                                     "that sampled it")
                lists.append([float(value) for value in values])
        return found


@dataclass(frozen=True)
class LogOddsLoss:
    """log p(counts) - log p(other): the log-odds [nats] of the answer that a vertical's own metric counts.

    Sequences: (the answer that counts, the other one), summed over their tokens as the verticals do. The value is the
    metric's raw material and no training loss: its sign is that of the metric, so whoever wants positive scores to
    worsen a vertical orients the gradients (by a factor -1 where a high value is good).
    """

    sequences = 2
    name = "log_odds"

    def loss(self, model, examples: Seq[Example], pad: int) -> torch.Tensor:
        logps = _answer_logps(model, examples, pad, "sum")
        return logps[:, 0] - logps[:, 1]

    def content(self, examples: Seq[Example]) -> list:
        return [self.name]


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise StudyError(f"reduction: must be sum or mean, got {reduction!r}")


def _answer_logps(model, examples: Seq[Example], pad: int, reduction: str) -> torch.Tensor:
    """Log-probabilities of the answers, shape [examples, sequences per example], with gradients."""
    logps, owner = answer_token_logps(model, examples, pad)
    sequences = flatten(examples)
    sums = logps.new_zeros(len(sequences)).index_add(0, owner, logps)
    if reduction == "mean":
        sums = sums / sums.new_tensor([len(sequence.answer_ids) for sequence in sequences])
    return sums.view(len(examples), -1)


def answer_token_logps(model, examples: Seq[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every answer token of ``flatten(examples)``, in order, with gradients: [tokens], float32;
    and whose they are, as an index into ``flatten(examples)``: [tokens]."""
    head = output_head(model)
    if type(head) is not torch.nn.Linear:
        raise StudyError("gradients: the output head carries LoRA or is no linear layer; target other layers with LoRA")
    packed = _pack(examples)
    states = _states(model, packed, pad)
    row, column = torch.tensor(packed.predicting, device=states.device).view(-1, 2).T
    targets = torch.tensor(packed.targets, device=states.device, dtype=torch.long)
    logps = _ChosenLogps.apply(states[row, column], head.weight, head.bias, targets)
    return logps, torch.tensor(packed.owner, device=states.device, dtype=torch.long)


def end_token_states(model, examples: Seq[Example], pad: int) -> torch.Tensor:
    """Last hidden state at each sequence's end: [examples, sequences per example, hidden], with gradients."""
    packed = _pack(examples)
    states = _states(model, packed, pad)
    row, column = torch.tensor(packed.ends, device=states.device).T
    return states[row, column].view(len(examples), -1, states.shape[-1])


@dataclass
class _Packed:
    """A batch with one row an example: its sequences' common prompt once, then what follows in each sequence.

    ``rows``, ``positions``, ``segments`` (0 the common prompt, from 1 on the sequences): one list a row, of one number a
    token. ``predicting`` (row, column), ``targets`` and ``owner``: one entry an answer token. ``ends``: (row, column) of
    each sequence's last token.
    """

    rows: list[list[int]]
    positions: list[list[int]]
    segments: list[list[int]]
    predicting: list[tuple[int, int]]
    targets: list[int]
    owner: list[int]
    ends: list[tuple[int, int]]


def _pack(examples: Seq[Example]) -> _Packed:
    packed = _Packed([], [], [], [], [], [], [])
    for row, example in enumerate(examples):
        shared = _common_prompt(example)
        ids, positions, segments = list(example.sequences[0].input_ids[:shared]), list(range(shared)), [0] * shared
        for number, sequence in enumerate(example.sequences, start=1):
            columns = [*range(shared), *range(len(ids), len(ids) + len(sequence) - shared)]
            ids += sequence.input_ids[shared:]
            positions += range(shared, len(sequence))
            segments += [number] * (len(sequence) - shared)
            answer = range(sequence.answer_start, len(sequence))
            packed.predicting += [(row, columns[place - 1]) for place in answer]
            packed.targets += sequence.answer_ids
            packed.owner += [len(packed.ends)] * len(answer)
            packed.ends.append((row, columns[-1]))
        packed.rows.append(ids)
        packed.positions.append(positions)
        packed.segments.append(segments)
    return packed


def _common_prompt(example: Example) -> int:
    """How many tokens the prompts of the example's sequences begin with alike."""
    return len(os.path.commonprefix([sequence.prompt_ids for sequence in example.sequences]))


def _packed_length(example: Example) -> int:
    shared = _common_prompt(example)
    return shared + sum(len(sequence) - shared for sequence in example.sequences)


def _states(model, packed: _Packed, pad: int) -> torch.Tensor:
    """Last hidden states [examples, width, hidden]: a token sees the common prompt and its own sequence before it."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(map(max, packed.rows)) >= vocabulary:
        raise StudyError(f"gradients: a token id is beyond the {vocabulary} of this model; the examples were made with "
                         "another model's tokenizer")
    ids, real = pad_right(packed.rows, pad, model.device)
    segments = pad_right(packed.segments, 0, ids.device)[0].masked_fill(real == 0, -1)
    positions = pad_right(packed.positions, 0, ids.device)[0]
    return backbone(model)(input_ids=ids, attention_mask=option_mask(model, segments, positions), position_ids=positions,
                           use_cache=False).last_hidden_state


class _ChosenLogps(torch.autograd.Function):
    """log softmax(head(state))[target] of every row: [rows, hidden], [V, hidden], [V] or None, [rows] → [rows].

    A row's value depends on that row alone, so its derivative, W[target] − Σ_v p_v W[v], can be taken on the way
    forward, while the logits of a slice of rows are at hand; the way back only multiplies. Logits [rows, V] are never
    kept, and memory is bounded by a slice (50 MB for V = 49,152).
    """

    ROWS = 256

    @staticmethod
    def forward(context, states, weight, bias, targets):
        logps = torch.empty(len(states), device=states.device)
        derivative = torch.empty_like(states, dtype=torch.float32)
        for start in range(0, len(states), _ChosenLogps.ROWS):
            part = slice(start, start + _ChosenLogps.ROWS)
            logits = linear(states[part], weight, bias).float()
            norms = logits.logsumexp(-1, keepdim=True)
            logps[part] = (logits.gather(-1, targets[part, None]) - norms).squeeze(-1)
            if context.needs_input_grad[0]:
                shares = logits.sub_(norms).exp_()
                derivative[part] = weight[targets[part]].float() - (shares.to(weight.dtype) @ weight).float()
        context.save_for_backward(derivative)
        context.dtype = states.dtype
        return logps

    @staticmethod
    def backward(context, g):
        (derivative,) = context.saved_tensors
        return (g[:, None] * derivative).to(context.dtype), None, None, None


def reference_logps(model, adapter: str, examples: Seq[Example], pad: int, rows: int = 16,
                    desc: str = "reference") -> dict[str, tuple[float, float]]:
    """Summed answer log-probabilities of each pair under one adapter: id → (chosen, rejected), for :class:`DPOLoss`."""
    with only_adapter(model, adapter):
        sums, _ = answer_logps(model, flatten(examples), pad, rows, desc)
    return {e.id: (float(chosen), float(rejected)) for e, (chosen, rejected) in zip(examples, sums.reshape(-1, 2))}


def per_example_gradients(model, adapter: str, examples: Seq[Example], loss: Loss, pad: int, rows: int = 8,
                          allow_zero: bool = False, desc: str = "gradients") -> dict[str, torch.Tensor]:
    """Gradients of every example's loss with respect to one adapter's LoRA weights, in memory.

    Parameters
    ----------
    model
        A PEFT model in evaluation mode. The adapter need not be active; which adapter is, and which weights are
        trainable, is the same after the call as before.
    adapter
        Its name in the model.
    examples
        With one sequence each for :class:`NextTokenLoss`, two for pairwise losses; ids differ.
    pad
        The tokenizer's pad id (masked, so any id serves).
    rows
        Sequences in one forward pass; a pair takes two.
    allow_zero
        Accept examples whose gradient is exactly zero: for evaluation items, never for training examples.

    Returns
    -------
    dict
        Weight name, as in ``adapter_model.safetensors`` → float32 tensor on the CPU, shape [n, numel], rows in the
        order of ``examples``, a row being ``weight.grad.flatten()``.

    Raises
    ------
    StudyError
        If the model has no such adapter or trains (dropout), if ids repeat, or if an example has the wrong number of
        sequences, a loss or gradient that is not finite, or a zero gradient; the message names the example.
    """
    _check_examples(examples, loss, desc)
    with progress(total=len(examples), desc=desc, unit="example") as bar:
        return _gradients(model, adapter, examples, loss, pad, rows, allow_zero, desc, bar)


def _gradients(model, adapter: str, examples: Seq[Example], loss: Loss, pad: int, rows: int, allow_zero: bool, desc: str,
               bar) -> dict[str, torch.Tensor]:
    if any(module.training for module in model.modules()):
        raise StudyError(f"{desc}: the model is in training mode, where dropout would act; call model.eval() first")
    layers = lora_layers(model, adapter)
    weights = [layer.weight for layer in layers.values()]
    gradients = {name: torch.empty(len(examples), layer.weight.numel()) for name, layer in layers.items()}
    batches = batches_by_length([_packed_length(example) for example in examples], max(1, rows // loss.sequences))
    with only_adapter(model, adapter, weights), torch.enable_grad():
        for indices in batches:
            batch = [examples[i] for i in indices]
            # A pair of one answer with itself has no gradient, of which rounding would leave a trace.
            same_twice = torch.tensor([len(set(example.sequences)) < loss.sequences for example in batch])
            with _catching(layers, len(batch)) as caught:
                values = loss.loss(model, batch, pad)
                for example, value in zip(batch, values.tolist()):
                    if not abs(value) < float("inf"):  # also false for nan
                        raise StudyError(f"{desc}: the {loss.name} loss of example {example.id!r} is {value}; check "
                                         "its text, and the adapter's training curve")
                if not values.requires_grad:
                    raise StudyError(f"{desc}: adapter {adapter!r} takes no part in the loss (disabled or merged?)")
                # autograd.grad, not backward: nothing is left in the weights' .grad, and its own result (the sum
                # over the batch) is not needed, only what the hooks catch.
                torch.autograd.grad(values.sum(), weights, allow_unused=True)
            for name, weight in zip(layers, weights):  # a weight that the loss does not reach: its gradient is zero
                block = caught.setdefault(name, torch.zeros(len(batch), weight.numel(), device=weight.device))
                block[same_twice.to(block.device)] = 0.0
            # The largest entry, not a sum of squares: tiny gradients must not underflow to "zero".
            sizes = torch.stack([block.abs().amax(1) for block in caught.values()]).amax(0).tolist()
            _check_sizes(sizes, batch, allow_zero, desc)
            for name, block in caught.items():
                gradients[name][indices] = block.cpu()
            bar.update(len(batch))
    return gradients


def stored_gradients(directory: Path | str, name: str, fingerprint: str, model, adapter: str, examples: Seq[Example],
                     loss: Loss, pad: int, rows: int = 8, block: int = 64, number_format: str = "float32",
                     projection: Projection | None = None, allow_zero: bool = False) -> Stored:
    """:func:`per_example_gradients` in files: ``<directory>/<name>.<key>/``, see :class:`.store.Stored`.

    The key is made of all that could change a gradient (:func:`content_parts`). Memory is bounded by a block of
    ``block`` examples, whatever n is. Each block is written whole or not at all and then entered in the manifest, with
    its hash: a killed run goes on at the block, and a damaged block is computed again. The batches of a block depend on
    its examples alone, so what comes out is the same to the byte, in bf16 too, however often the run was killed.

    Parameters
    ----------
    name
        For the folder and the progress bar.
    fingerprint
        ``models.adapter_fingerprint``: backbone, number format, adapter.
    block
        Examples a block: 118 MB in float32 for 64 examples at rank 8 on SmolLM2's q and v.
    number_format
        ``float32``, or ``float16`` (:func:`.store.encoded`), half the size.
    projection
        Applied to every layer before it is written; None: no projection.

    With ``RLHF_TRUST_CACHE=off`` nothing kept is read; what is computed lies in a temporary folder as long as the result
    is in use. Other parameters and errors as for :func:`per_example_gradients`, also where a folder of this name holds
    gradients of other content; zero gradients, where not allowed, are an error as well if kept ones hold them.
    """
    _check_examples(examples, loss, name)
    if number_format not in NUMBER_FORMATS:
        raise StudyError(f"number_format: must be {' or '.join(NUMBER_FORMATS)}, got {number_format!r}")
    if block < 1:
        raise StudyError(f"block: must be at least 1 example, got {block}")
    parts = content_parts(fingerprint, examples, loss, rows, block, number_format, projection)
    key = content_key(parts)
    manifest = {
        "key": key, "parts": parts, "ids": [example.id for example in examples], "loss": loss.name, "block": block,
        "number_format": number_format, "projection": projection and asdict(projection), "layers": {}, "blocks": {},
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    compute = partial(_gradients, model, adapter, loss=loss, pad=pad, rows=rows, allow_zero=allow_zero, desc=name)
    if os.environ.get("RLHF_TRUST_CACHE") == "off":
        holder = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=directory)
        _write_missing(Path(holder.name), manifest, examples, compute, projection, name)
        stored = Stored(Path(holder.name), manifest, holder)
    else:
        with FileLock(directory / f".{name}.{key}.lock"):  # two notebooks may want the same
            _write_missing(directory / f"{name}.{key}", manifest, examples, compute, projection, name)
        stored = Stored.open(directory / f"{name}.{key}")
    _check_sizes(stored.squares.sum(1).tolist(), examples, allow_zero, name)  # zeros may have been allowed when written
    return stored


def content_parts(fingerprint: str, examples: Seq[Example], loss: Loss, rows: int = 8, block: int = 64,
                  number_format: str = "float32", projection: Projection | None = None) -> dict[str, str]:
    """All that could change stored gradients, a hash (or the thing itself) a part, for ``Stored.check``.

    ``rows`` and ``block`` are among them: in bf16 the batch plan changes the last digits.
    """
    base, _, adapter = fingerprint.partition("-")
    return {
        "base model": base, "adapter": adapter or "none", "loss": f"{loss.name} {content_key(loss.content(examples))}",
        "set of examples": tokens_content(examples), "number format": number_format,
        "projection": json.dumps(asdict(projection)) if projection else "none",
        "batch plan": f"{rows} rows, blocks of {block}",
    }


def tokens_content(examples: Seq[Example]) -> str:
    """A hash of examples' ids and tokens, for keys of what is computed from them."""
    return content_key([[e.id, [[s.input_ids, s.answer_start] for s in e.sequences]] for e in examples])


def _write_missing(directory: Path, manifest: dict, examples: Seq[Example], compute, projection: Projection | None,
                   desc: str) -> None:
    """Complete the folder, and ``manifest`` with its ``layers`` and ``blocks`` (file name → hash)."""
    kept = read_manifest(directory)
    if kept is not None:
        check_parts(directory, kept["parts"], manifest["parts"])
        manifest["layers"] = kept["layers"]
    for left_over in directory.glob(".*.part"):  # by a run that was killed while it wrote
        left_over.unlink()
    names = block_names(len(examples), manifest["block"])
    for _, _, file in names:
        path = directory / file
        if kept is not None and file in kept["blocks"] and path.is_file() and sha256_of(path) == kept["blocks"][file]:
            manifest["blocks"][file] = kept["blocks"][file]
    missing = [(start, stop, file) for start, stop, file in names if file not in manifest["blocks"]]
    if not missing:
        return
    with progress(total=len(examples), desc=desc, unit="example") as bar:
        bar.update(len(examples) - sum(stop - start for start, stop, _ in missing))
        for start, stop, file in missing:
            gradients = compute(examples=examples[start:stop], bar=bar)
            if projection is not None:
                gradients = {layer: projection(layer, rows) for layer, rows in gradients.items()}
            manifest["layers"] = {layer: rows.shape[1] for layer, rows in gradients.items()}
            with replacing(directory / file) as aside:
                # No metadata: safetensors writes it in an order of its own, and bytes must not differ between runs.
                save_file(encoded(gradients, manifest["number_format"]), aside)
            del gradients
            manifest["blocks"][file] = sha256_of(directory / file)
            write_text(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def _check_examples(examples: Seq[Example], loss: Loss, desc: str) -> None:
    if not examples:
        raise StudyError(f"{desc}: there is no example")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise StudyError(f"{desc}: two examples have the id {example.id!r}")
        seen.add(example.id)
        if len(example.sequences) != loss.sequences:
            raise StudyError(f"{desc}: example {example.id!r} has {len(example.sequences)} sequence(s), the "
                             f"{loss.name} loss needs {loss.sequences}")


def _check_sizes(sizes: Seq[float], examples: Seq[Example], allow_zero: bool, desc: str) -> None:
    """``sizes``: anything that is 0 for a gradient of zeros, and not finite for one that is not."""
    for example, size in zip(examples, sizes):
        if not size < float("inf"):
            raise StudyError(f"{desc}: the gradient of example {example.id!r} is not finite ({size})")
    zeros = [example for example, size in zip(examples, sizes) if size == 0]
    if zeros and not allow_zero:
        reasons = "equal or empty answers, or a saturated loss"
        if len(zeros) == len(examples) > 1:
            reasons += "; or, as all of its batch have none, an adapter that was never trained or is not in use"
        raise StudyError(f"{desc}: the gradient of example {zeros[0].id!r} is exactly zero ({reasons}); remove it from the "
                         "training data")


def lora_layers(model, adapter: str) -> dict[str, torch.nn.Linear]:
    """The adapter's A and B matrices in the model's order, under the names they are saved by."""
    layers = {}
    for name, module in model.named_modules():
        for part in ("lora_A", "lora_B"):
            matrices = getattr(module, part, None)
            if isinstance(matrices, torch.nn.ModuleDict) and adapter in matrices:
                if not isinstance(matrices[adapter], torch.nn.Linear):
                    raise StudyError(f"gradients: {name} is no linear layer; target linear layers with LoRA")
                layers[f"{name}.{part}.weight"] = matrices[adapter]
    if not layers:
        raise StudyError(f"the model has no LoRA layer of an adapter {adapter!r}; it has "
                         f"{', '.join(getattr(model, 'peft_config', {})) or 'none'}")
    return layers


@contextmanager
def only_adapter(model, adapter: str, weights: Seq[torch.nn.Parameter] = ()) -> Iterator[None]:
    """The adapter alone is active and ``weights`` alone are trainable; both as before afterwards."""
    active = model.active_adapter
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.set_adapter(adapter)
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        model.set_adapter(active)
        for parameter, before in trainable:
            parameter.requires_grad_(before)


@contextmanager
def _catching(layers: dict[str, torch.nn.Linear], n: int) -> Iterator[dict[str, torch.Tensor]]:
    """Fills the dict that it yields, during a backward pass: weight name → per-example gradients [n, numel]."""
    caught: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def forward_hook(layer, inputs, output):
            (x,) = inputs
            if x.shape[0] != n:
                raise StudyError(f"gradients: {name} sees {x.shape[0]} rows for {n} examples; a layer that mixes rows "
                                 "(mixture of experts) has no per-example gradient here")

            def backward_hook(g):
                # dW_i = sum_t g[i, t] (outer) x[i, t]; padding has g = 0.
                block = torch.bmm(g.float().transpose(1, 2), x.detach().float()).flatten(1)
                caught[name] = caught[name] + block if name in caught else block

            if output.requires_grad:
                output.register_hook(backward_hook)

        return forward_hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
