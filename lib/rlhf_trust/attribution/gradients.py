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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file

from .. import StudyError
from ..artifacts import atomic_write, content_key, progress, sha256_of, write_text
from ..decode import Example, _packed_length, answer_token_logps, batches_by_length
from ..losses import Loss, tokens_content
from ..models import lora_layers, only_adapter
from .projection import Projection
from .store import (
    MANIFEST,
    NUMBER_FORMATS,
    Stored,
    block_names,
    check_parts,
    encoded,
    read_manifest,
)


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

    old_logps: Mapping[str, Sequence[float]]
    advantages: Mapping[str, Sequence[float]]
    clip_range: float = 0.2
    sequences = 1
    name = "ppo_surrogate"

    def loss(self, model, examples: Sequence[Example], pad: int) -> torch.Tensor:
        logps, owner = answer_token_logps(model, examples, pad)
        old, advantages = (logps.new_tensor(sum(kept, [])) for kept in self._kept(examples))
        ratio = torch.exp(logps - old)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return logps.new_zeros(len(examples)).index_add(
            0, owner, -torch.minimum(ratio * advantages, clipped * advantages)
        )

    def content(self, examples: Sequence[Example]) -> list:
        return [self.name, self.clip_range, *self._kept(examples)]

    def _kept(self, examples: Sequence[Example]) -> tuple[list[list[float]], list[list[float]]]:
        """Old log-probabilities and advantages of every example, a list an example each."""
        found: tuple[list[list[float]], list[list[float]]] = ([], [])
        for what, mapping, lists in zip(
            ("old log-probabilities", "advantages"), (self.old_logps, self.advantages), found
        ):
            for example in examples:
                values, tokens = mapping.get(example.id), len(example.sequences[0].answer_ids)
                if values is None or len(values) != tokens:
                    raise StudyError(
                        f"{self.name}: example {example.id!r} needs {tokens} {what}, one an answer token, "
                        f"and has {'none' if values is None else len(values)}; take them from the PPO step "
                        "that sampled it"
                    )
                lists.append([float(value) for value in values])
        return found


def per_example_gradients(
    model,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    rows: int = 8,
    allow_zero: bool = False,
    desc: str = "gradients",
) -> dict[str, torch.Tensor]:
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


def _gradients(
    model,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    rows: int,
    allow_zero: bool,
    desc: str,
    bar,
) -> dict[str, torch.Tensor]:
    if any(module.training for module in model.modules()):
        raise StudyError(
            f"{desc}: the model is in training mode, where dropout would act; call model.eval() first"
        )
    layers = lora_layers(model, adapter)
    weights = [layer.weight for layer in layers.values()]
    gradients = {
        name: torch.empty(len(examples), layer.weight.numel()) for name, layer in layers.items()
    }
    batches = batches_by_length(
        [_packed_length(example) for example in examples], max(1, rows // loss.sequences)
    )
    with only_adapter(model, adapter, weights), torch.enable_grad():
        for indices in batches:
            batch = [examples[i] for i in indices]
            # A pair of one answer with itself has no gradient, of which rounding would leave a trace.
            same_twice = torch.tensor(
                [len(set(example.sequences)) < loss.sequences for example in batch]
            )
            with _catching(layers, len(batch)) as caught:
                values = loss.loss(model, batch, pad)
                for example, value in zip(batch, values.tolist()):
                    if not abs(value) < float("inf"):  # also false for nan
                        raise StudyError(
                            f"{desc}: the {loss.name} loss of example {example.id!r} is {value}; check "
                            "its text, and the adapter's training curve"
                        )
                if not values.requires_grad:
                    raise StudyError(
                        f"{desc}: adapter {adapter!r} takes no part in the loss (disabled or merged?)"
                    )
                # autograd.grad, not backward: nothing is left in the weights' .grad, and its own result (the sum
                # over the batch) is not needed, only what the hooks catch.
                torch.autograd.grad(values.sum(), weights, allow_unused=True)
            for name, weight in zip(
                layers, weights
            ):  # a weight that the loss does not reach: its gradient is zero
                block = caught.setdefault(
                    name, torch.zeros(len(batch), weight.numel(), device=weight.device)
                )
                block[same_twice.to(block.device)] = 0.0
            # The largest entry, not a sum of squares: tiny gradients must not underflow to "zero".
            sizes = torch.stack([block.abs().amax(1) for block in caught.values()]).amax(0).tolist()
            _check_sizes(sizes, batch, allow_zero, desc)
            for name, block in caught.items():
                gradients[name][indices] = block.cpu()
            bar.update(len(batch))
    return gradients


def stored_gradients(
    directory: Path | str,
    name: str,
    fingerprint: str,
    model,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    rows: int = 8,
    block: int = 64,
    number_format: str = "float32",
    projection: Projection | None = None,
    allow_zero: bool = False,
) -> Stored:
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
        raise StudyError(
            f"number_format: must be {' or '.join(NUMBER_FORMATS)}, got {number_format!r}"
        )
    if block < 1:
        raise StudyError(f"block: must be at least 1 example, got {block}")
    parts = content_parts(fingerprint, examples, loss, rows, block, number_format, projection)
    key = content_key(parts)
    manifest = {
        "key": key,
        "parts": parts,
        "ids": [example.id for example in examples],
        "loss": loss.name,
        "block": block,
        "number_format": number_format,
        "projection": projection and asdict(projection),
        "layers": {},
        "blocks": {},
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    compute = partial(
        _gradients, model, adapter, loss=loss, pad=pad, rows=rows, allow_zero=allow_zero, desc=name
    )
    if os.environ.get("RLHF_TRUST_CACHE") == "off":
        holder = tempfile.TemporaryDirectory(prefix=f".{name}.", dir=directory)
        _write_missing(Path(holder.name), manifest, examples, compute, projection, name)
        stored = Stored(Path(holder.name), manifest, holder)
    else:
        with FileLock(directory / f".{name}.{key}.lock"):  # two notebooks may want the same
            _write_missing(
                directory / f"{name}.{key}", manifest, examples, compute, projection, name
            )
        stored = Stored.open(directory / f"{name}.{key}")
    _check_sizes(
        stored.squares.sum(1).tolist(), examples, allow_zero, name
    )  # zeros may have been allowed when written
    return stored


def content_parts(
    fingerprint: str,
    examples: Sequence[Example],
    loss: Loss,
    rows: int = 8,
    block: int = 64,
    number_format: str = "float32",
    projection: Projection | None = None,
) -> dict[str, str]:
    """All that could change stored gradients, a hash (or the thing itself) a part, for ``Stored.check``.

    ``rows`` and ``block`` are among them: in bf16 the batch plan changes the last digits.
    """
    base, _, adapter = fingerprint.partition("-")
    return {
        "base model": base,
        "adapter": adapter or "none",
        "loss": f"{loss.name} {content_key(loss.content(examples))}",
        "set of examples": tokens_content(examples),
        "number format": number_format,
        "projection": json.dumps(asdict(projection)) if projection else "none",
        "batch plan": f"{rows} rows, blocks of {block}",
    }


def _write_missing(
    directory: Path,
    manifest: dict,
    examples: Sequence[Example],
    compute,
    projection: Projection | None,
    desc: str,
) -> None:
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
        if (
            kept is not None
            and file in kept["blocks"]
            and path.is_file()
            and sha256_of(path) == kept["blocks"][file]
        ):
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
            with atomic_write(directory / file) as aside:
                # No metadata: safetensors writes it in an order of its own, and bytes must not differ between runs.
                save_file(encoded(gradients, manifest["number_format"]), aside)
            del gradients
            manifest["blocks"][file] = sha256_of(directory / file)
            write_text(directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))


def _check_examples(examples: Sequence[Example], loss: Loss, desc: str) -> None:
    if not examples:
        raise StudyError(f"{desc}: there is no example")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise StudyError(f"{desc}: two examples have the id {example.id!r}")
        seen.add(example.id)
        if len(example.sequences) != loss.sequences:
            raise StudyError(
                f"{desc}: example {example.id!r} has {len(example.sequences)} sequence(s), the "
                f"{loss.name} loss needs {loss.sequences}"
            )


def _check_sizes(
    sizes: Sequence[float], examples: Sequence[Example], allow_zero: bool, desc: str
) -> None:
    """``sizes``: anything that is 0 for a gradient of zeros, and not finite for one that is not."""
    for example, size in zip(examples, sizes):
        if not size < float("inf"):
            raise StudyError(
                f"{desc}: the gradient of example {example.id!r} is not finite ({size})"
            )
    zeros = [example for example, size in zip(examples, sizes) if size == 0]
    if zeros and not allow_zero:
        reasons = "equal or empty answers, or a saturated loss"
        if len(zeros) == len(examples) > 1:
            reasons += "; or, as all of its batch have none, an adapter that was never trained or is not in use"
        raise StudyError(
            f"{desc}: the gradient of example {zeros[0].id!r} is exactly zero ({reasons}); remove it from the "
            "training data"
        )


@contextmanager
def _catching(layers: dict[str, torch.nn.Linear], n: int) -> Iterator[dict[str, torch.Tensor]]:
    """Fills the dict that it yields, during a backward pass: weight name → per-example gradients [n, numel]."""
    caught: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def forward_hook(layer, inputs, output):
            (x,) = inputs
            if x.shape[0] != n:
                raise StudyError(
                    f"gradients: {name} sees {x.shape[0]} rows for {n} examples; a layer that mixes rows "
                    "(mixture of experts) has no per-example gradient here"
                )

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
