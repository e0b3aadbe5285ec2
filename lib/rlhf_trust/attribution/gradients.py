"""Per-example gradients of LoRA weights, many examples in one backward pass.

A LoRA layer adds ``B A x`` to its frozen layer's output. For one of its two matrices ``W`` with
inputs ``x[t]`` and output gradients ``g[t]`` at the positions ``t`` of an example's sequences,
that example's gradient is

    dW = sum_t  g[t] (outer) x[t]

Rows of a batch never mix in a transformer, so one backward pass of the summed loss gives every
row's ``g[t]``: hooks keep ``x``, catch ``g`` on its way back, and the sum over ``t`` is taken per
example instead of per batch (the "ghost" or "per-sample gradient" trick, Goodfellow 2015, arXiv
1510.01799).

Which loss stands for which stage: :mod:`..losses`.

Two more things make it fast. The prompt that both answers of a pair share runs once: one row of the
batch holds the example's prompt and all of its answers, each of which sees the prompt and itself
(``decode.pack``). The output head runs on answer tokens alone, a slice at a time, without keeping
logits. In float32 a single example nearly saturates a CPU, so most of the gain comes with bfloat16
weights (``tests/benchmarks/gradients.py``).

:func:`stored_gradients` writes gradients to files in blocks of examples, so that memory does not
grow with n and a killed run resumes at the block (:mod:`.store`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file

from .. import StudyError
from ..artifacts import (
    atomic_write,
    code_hash,
    content_key,
    progress,
    read_record,
    remove_left_over,
    sha256_of,
    write_record,
)
from ..decode import Example, LowerStates, batches_by_length, packed_length
from ..losses import Loss, tokens_content
from ..models import lora_layers, using
from .store import Stored, block_files, encoded

MANIFEST = "manifest.json"


def per_example_gradients(
    model,
    adapter: str,
    examples: Sequence[Example],
    loss: Loss,
    pad: int,
    rows: int = 8,
    allow_zero: bool = False,
    desc: str = "gradients",
    kept: LowerStates | None = None,
    bar=None,
) -> dict[str, torch.Tensor]:
    """Gradients of every example's loss with respect to one adapter's LoRA weights, in memory.

    Parameters
    ----------
    model
        A PEFT model in evaluation mode. The adapter need not be active; which adapter is, and
        which weights are trainable, is the same after the call as before.
    adapter
        Its name in the model.
    examples
        With one sequence each for :class:`NextTokenLoss`, two for pairwise losses; ids differ.
    pad
        The tokenizer's pad id (masked, so any id serves).
    rows
        Sequences in one forward pass; a pair takes two.
    allow_zero
        Accept examples whose gradient is exactly zero: for evaluation items, never for training
        examples.
    kept
        States of the lower layers, which several losses and adapters share.
    bar
        A progress bar that counts examples; by default one of its own, named ``desc``.

    Returns
    -------
    dict
        Weight name, as in ``adapter_model.safetensors`` → float32 tensor on the CPU, shape [n,
        numel], rows in the order of ``examples``, a row being ``weight.grad.flatten()``.

    Raises
    ------
    StudyError
        If the model has no such adapter or trains (dropout), if ids repeat, or if an example has
        the wrong number of sequences, a loss or gradient that is not finite, or a zero gradient;
        the message names the example.
    """
    _check_examples(examples, loss, desc)
    if any(module.training for module in model.modules()):
        raise StudyError(f"{desc}: the model is in training mode (dropout); call model.eval()")
    layers = lora_layers(model, adapter)
    weights = {name: layer.weight for name, layer in layers.items()}
    found = {name: torch.empty(len(examples), weight.numel()) for name, weight in weights.items()}
    lengths = [packed_length(example.sequences) for example in examples]
    batches = batches_by_length(lengths, max(1, rows // loss.sequences))
    counter = nullcontext(bar)
    if bar is None:
        counter = progress(total=len(examples), desc=desc, unit="example")
    with counter as bar, using(model, adapter, list(weights.values())), torch.enable_grad():
        for indices in batches:
            batch = [examples[i] for i in indices]
            # A pair of one answer with itself has no gradient, of which rounding would leave a
            # trace.
            same_twice = [len(set(example.sequences)) < loss.sequences for example in batch]
            with _catching(layers, len(batch)) as caught:
                values = loss.loss(model, batch, pad, kept)
                for example, value in zip(batch, values.tolist()):
                    if not math.isfinite(value):
                        raise StudyError(
                            f"{desc}: the {loss.name} loss of example {example.id!r} is {value}; "
                            "check its text and the adapter's training curve"
                        )
                if not values.requires_grad:
                    raise StudyError(f"{desc}: adapter {adapter!r} takes no part in the loss")
                # autograd.grad, not backward: nothing is left in the weights' .grad, and its own
                # result (the sum over the batch) is not needed, only what the hooks catch.
                torch.autograd.grad(values.sum(), list(weights.values()), allow_unused=True)
            for name, weight in weights.items():
                # The gradient of a weight that the loss does not reach is zero.
                zeros = torch.zeros(len(batch), weight.numel(), device=weight.device)
                caught.setdefault(name, zeros)[same_twice] = 0.0
            # The largest entry, not a sum of squares: tiny gradients must not underflow to "zero".
            sizes = torch.stack([block.abs().amax(1) for block in caught.values()]).amax(0).tolist()
            _check_sizes(sizes, batch, allow_zero, desc)
            for name, block in caught.items():
                found[name][indices] = block.cpu()
            bar.update(len(batch))
    return found


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
    allow_zero: bool = False,
    kept: LowerStates | None = None,
) -> Stored:
    """:func:`per_example_gradients` in files: ``<directory>/<name>.<key>/``, see
    :class:`.store.Stored`.

    The key is made of all that could change a gradient; ``rows`` and ``block`` are part of it,
    since in bfloat16 the batch plan changes the last digits. Memory is bounded by a block of
    ``block`` examples, whatever n is. Each block is written whole or not at all and then entered
    in the manifest with its hash: a killed run resumes at the block, and a damaged block is
    computed again. The batches of a block depend on its examples alone, so the result is the same
    to the byte, in bfloat16 too, however often the run was killed.

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

    With ``RLHF_TRUST_CACHE=off`` the files are written anew. Other parameters and errors as for
    :func:`per_example_gradients`; zero gradients, where not allowed, are an error also if they were
    allowed when they were stored.
    """
    _check_examples(examples, loss, name)
    parts = {
        "model": fingerprint,
        "loss": f"{loss.name} {content_key(loss.content(examples))}",
        "examples": tokens_content(examples),
        "number format": number_format,
        "batch plan": f"{rows} rows, blocks of {block}",
        "code": code_hash("decode", "losses", "attribution.gradients", "attribution.store"),
    }
    key, ids = content_key(parts), [example.id for example in examples]
    manifest = {"key": key, "parts": parts, "ids": ids, "block": block, "layers": {}, "blocks": {}}
    options = {"rows": rows, "allow_zero": allow_zero, "desc": name, "kept": kept}
    compute = partial(per_example_gradients, model, adapter, loss=loss, pad=pad, **options)
    folder = Path(directory) / f"{name}.{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.{key}.lock"):  # two notebooks may want the same
        _write_missing(folder, manifest, examples, compute, number_format, name)
    stored = Stored(folder, manifest)
    _check_sizes(stored.squares.sum(1).tolist(), examples, allow_zero, name)
    return stored


def _write_missing(
    folder: Path, manifest: dict, examples: Sequence[Example], compute, number_format, desc: str
) -> None:
    """Complete the folder, and ``manifest`` with its ``layers`` and ``blocks`` (file name →
    hash)."""
    with suppress(OSError, ValueError):  # not there, or damaged
        anew = os.environ.get("RLHF_TRUST_CACHE") == "off"
        kept = {} if anew else read_record(folder / MANIFEST)
        if kept.get("key") == manifest["key"]:
            manifest["layers"] = kept["layers"]
            for file, digest in kept["blocks"].items():
                if (folder / file).is_file() and sha256_of(folder / file) == digest:
                    manifest["blocks"][file] = digest
    remove_left_over(folder)
    blocks = block_files(len(examples), manifest["block"])
    missing = [(rows, file) for rows, file in blocks if file not in manifest["blocks"]]
    done = len(examples) - sum(len(examples[rows]) for rows, _ in missing)
    with progress(total=len(examples), desc=desc, unit="example") as bar:
        bar.update(done)
        for rows, file in missing:
            gradients = compute(examples=examples[rows], bar=bar)
            manifest["layers"] = {layer: part.shape[1] for layer, part in gradients.items()}
            with atomic_write(folder / file) as aside:
                # No metadata: safetensors writes it in an order of its own, and bytes must not
                # differ between runs.
                save_file(encoded(gradients, number_format), aside)
            manifest["blocks"][file] = sha256_of(folder / file)
            write_record(folder / MANIFEST, manifest)


def _check_examples(examples: Sequence[Example], loss: Loss, desc: str) -> None:
    if not examples:
        raise StudyError(f"{desc}: there is no example")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise StudyError(f"{desc}: two examples have the id {example.id!r}")
        seen.add(example.id)
        count = len(example.sequences)
        if count != loss.sequences:
            needed = f"the {loss.name} loss needs {loss.sequences}"
            raise StudyError(f"{desc}: example {example.id!r} has {count} sequence(s), {needed}")


def _check_sizes(
    sizes: Sequence[float], examples: Sequence[Example], allow_zero: bool, desc: str
) -> None:
    """``sizes``: anything that is 0 for a gradient of zeros, and not finite for one that is not."""
    for example, size in zip(examples, sizes):
        if not math.isfinite(size):
            raise StudyError(f"{desc}: the gradient of example {example.id!r} is not finite")
    zeros = [example for example, size in zip(examples, sizes) if size == 0]
    if zeros and not allow_zero:
        reasons = "equal or empty answers, or a saturated loss"
        if len(zeros) == len(examples) > 1:
            reasons += "; or, as all of its batch have none, an adapter that was never trained"
        raise StudyError(
            f"{desc}: the gradient of example {zeros[0].id!r} is exactly zero ({reasons}); "
            "remove it from the training data"
        )


@contextmanager
def _catching(layers: dict[str, torch.nn.Linear], n: int) -> Iterator[dict[str, torch.Tensor]]:
    """Fills the dict that it yields, during a backward pass: weight name → per-example gradients
    [n, numel]."""
    caught: dict[str, torch.Tensor] = {}

    def keep(name: str, layer, inputs, output):
        (x,) = inputs
        if x.shape[0] != n:
            raise StudyError(
                f"gradients: {name} sees {x.shape[0]} rows for {n} examples; a layer that "
                "mixes rows (mixture of experts) has no per-example gradient here"
            )

        def catch(g):
            # dW_i = sum_t g[i, t] (outer) x[i, t]; padding has g = 0.
            block = torch.bmm(g.float().transpose(1, 2), x.detach().float()).flatten(1)
            caught[name] = caught[name] + block if name in caught else block

        if output.requires_grad:
            output.register_hook(catch)

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
        yield caught
