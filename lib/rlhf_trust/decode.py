"""Batched sampling and log-likelihoods.

Sampling is seeded per item: item ``i``'s ``s``-th answer is drawn from random numbers that depend
on the item's own key, ``s`` and the seed alone, never on its neighbours. With float32 weights the
answer to an item therefore does not depend on the batch it ran in or on how many items run beside
it.

Generations are kept as JSONL, one line an item, under a name made of everything that could change
them (weights, prompt format, sampling settings): an interrupted run resumes at the item, and adding
a model costs only that model."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear, pad as pad_to
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from . import StudyError
from .artifacts import ResultCache, code_hash, content_key, note, progress
from .chat import Chat, EncodedExample
from .stats import generator


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. ``temperature`` 0 is greedy (then ``samples`` must be 1)."""

    max_new_tokens: int
    temperature: float = 0.0
    samples: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.temperature == 0 and self.samples != 1:
            raise StudyError(
                "samples: greedy decoding (temperature 0) gives one answer, ask for 1 sample"
            )


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: ``id`` names the item (and seeds its sampling), ``turns`` alternate
    human, assistant, …"""

    id: str
    turns: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class MultipleChoice:
    """Options to weigh against each other, as token ids: what is said before, and the ways to go
    on."""

    id: str
    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.context or not self.options or not all(self.options):
            raise StudyError(
                f"{self.id}: a choice needs a context and options of at least one token"
            )

    @property
    def group(self) -> Group:
        """The context with each different option, in order, as texts that share a row."""
        start = len(self.context)
        options = dict.fromkeys(self.options)
        return tuple(EncodedExample(self.context + option, start) for option in options)


def uniform_draws(key: str, seed: int, sample: int, steps: int) -> np.ndarray:
    """The random numbers in [0, 1) that an item's ``sample``-th answer is drawn with, shape
    [steps]."""
    return generator(f"{key}\0{seed}\0{sample}").random(steps)


PAD_TO = 16
"""Batches are padded to a multiple of this: with a new shape every step the allocator keeps
gigabytes."""


def padded_width(rows: Sequence) -> int:
    """Length of the longest row, rounded up to a multiple of ``PAD_TO``."""
    return -(-max(map(len, rows)) // PAD_TO) * PAD_TO


def pad_right(rows: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token lists flush left; returns ids and attention mask, both [rows, width]."""
    return _padded(rows, pad, device, left=False)


def _padded(
    rows: Sequence[Sequence[int]], pad: int, device, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, or with ``left`` flush right."""
    width = padded_width(rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def sample_batch(
    model,
    rows: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    eos: int,
    pad: int,
) -> list[list[list[int]]]:
    """Draw answers for one batch of prompts.

    Parameters
    ----------
    model
        A causal language model (or PEFT wrapper); its active adapter answers.
    rows
        Prompts as token ids.
    keys
        One name per prompt, which seeds its draws.

    Returns
    -------
    list
        ``[prompt][sample]`` → generated token ids, the end token included where one was drawn.
    """
    n, steps, device = decoding.samples, decoding.max_new_tokens, model.device
    order, logits, mask, cache = _read_prompts(model, rows, pad, steps)
    if n > 1:  # the prompt was run once; from here every sample has a row of its own
        cache.batch_repeat_interleave(n)
        logits, mask = (x.repeat_interleave(n, 0) for x in (logits, mask))
    draws = [uniform_draws(key, decoding.seed, s, steps) for key in keys for s in range(n)]
    draws = torch.from_numpy(np.stack(draws))
    position = mask.sum(1, keepdim=True) - 1
    rows_alive = torch.tensor([i * n + s for i in order for s in range(n)], device=device)
    answers: list[list[int]] = [[] for _ in range(len(rows) * n)]
    for step in range(steps):
        if decoding.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            u = draws[rows_alive.cpu(), step].to(device)
            tokens = inverse_cdf(logits, decoding.temperature, u)
        for row, token in zip(rows_alive.tolist(), tokens.tolist()):
            answers[row].append(token)
        going = (tokens != eos).nonzero().squeeze(-1)
        if step + 1 == steps or len(going) == 0:
            break
        if len(going) < len(tokens):  # finished answers leave, the last rows take their places
            kept = torch.arange(len(going), device=device)
            kept[tokens[: len(going)] == eos] = going[going >= len(going)]
            cache.batch_select_indices(kept)
            rows_alive, tokens, mask, position = (
                x[kept] for x in (rows_alive, tokens, mask, position)
            )
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = _next_logits(model, tokens[:, None], mask, position, cache)
    return [answers[i * n : (i + 1) * n] for i in range(len(rows))]


PROMPT_TOKENS = 512
"""Tokens of prompts, padding included, that are read at a time: enough for full speed, and short
prompts are not padded to the length of the longest."""


def _read_prompts(
    model, rows: Sequence[Sequence[int]], pad: int, room: int
) -> tuple[list[int], torch.Tensor, torch.Tensor, Cache]:
    """Read every prompt, in batches of like length.

    Returns
    -------
    order : list
        Which prompt each row of what follows belongs to.
    logits : Tensor [rows, V]
        Of the token after each prompt.
    mask : Tensor [rows, width]
        Attention mask of the prompts, flush right.
    cache : Cache
        The prompts' keys and values, with room for ``room`` more tokens.
    """
    widths = [padded_width([row]) for row in rows]
    batches, read, logits = _batches_by_tokens(widths, PROMPT_TOKENS), [], []
    for batch in batches:
        ids, mask = _padded([rows[i] for i in batch], pad, model.device, left=True)
        read.append(DynamicCache(config=model.config))
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits.append(_next_logits(model, ids, mask, positions, read[-1]))
    order = [i for batch in batches for i in batch]
    _, mask = _padded([rows[i] for i in order], pad, model.device, left=True)
    layers = [  # a layer that shares another's keys and values (Gemma 3n) keeps none of its own
        RoomyLayer(parts, mask.shape[1], room) if isinstance(parts[0], DynamicLayer) else parts[0]
        for parts in zip(*(cache.layers for cache in read))
    ]
    return order, torch.cat(logits), mask, Cache(layers)


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [rows, key heads, width + room, size], with room for all tokens
    to come: each is written into its place, where ``DynamicLayer`` copies everything at every
    token. A layer that looks back over a window keeps every token too; the mask hides those before
    it.

    Parameters
    ----------
    parts
        The same layer in caches that hold the rows, in order.
    width, room
        Tokens of the prompts (padding included), which end flush, and most tokens to come.
    """

    def __init__(self, parts: Sequence[DynamicLayer], width: int, room: int):
        super().__init__()
        self.length, self.is_initialized = width, True
        self.keys, self.values = (
            torch.cat([pad_to(part, (0, 0, width - part.shape[2], room)) for part in states])
            for states in zip(*((part.keys, part.values) for part in parts))
        )

    def update(self, key_states, value_states, *args, **kwargs):
        """Add keys and values [rows, key heads, tokens, size]; returns views of all so far."""
        start, self.length = self.length, self.length + key_states.shape[2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order; copies only those that change places."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for states in (self.keys, self.values):
            states[moved] = states[indices[moved]]
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]


def _next_logits(model, ids, mask, positions, cache: Cache) -> torch.Tensor:
    """Logits of the token after each row of ``ids`` [rows, width], which continue ``cache``: [rows,
    V].

    The head is given a matrix. On a slice of [rows, width, hidden] the product copies its weight
    for every row: 3 GB more for 64 rows of a 135M model."""
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    states = backbone(model)(**inputs, use_cache=True, past_key_values=cache).last_hidden_state
    return output_head(model)(states[:, -1])


CDF_BLOCK, CDF_ROWS = 256, 8
"""Tokens of the vocabulary that are summed up first, and rows at a time: few enough to stay in a
processor's cache."""


def inverse_cdf(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    """Sample one token per row: the first whose cumulative probability exceeds ``u``. Shapes [b,
    V], [b] → [b].

    Summed up in two steps, over blocks, then within the block that ``u`` falls into; both running
    sums are in float64, so that a large vocabulary does not blur neighbouring tokens. A running sum
    over every token costs five times as much."""
    parts = zip(logits.split(CDF_ROWS), u.split(CDF_ROWS))
    return torch.cat([_inverse_cdf(few, temperature, some) for few, some in parts])


def _inverse_cdf(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    rows, vocabulary = logits.shape
    padded = -(-vocabulary // CDF_BLOCK) * CDF_BLOCK
    weights = logits.new_zeros(rows, padded, dtype=torch.float32)
    own = weights[:, :vocabulary].copy_(logits)
    own.sub_(own.amax(-1, keepdim=True)).div_(temperature).exp_()
    weights = weights.unflatten(-1, (-1, CDF_BLOCK))
    blocks = weights.sum(-1).double().cumsum(-1)
    target = (u * blocks[:, -1])[:, None]
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[-1] - 1)
    before = pad_to(blocks, (1, 0)).gather(1, block)
    own = weights[torch.arange(rows, device=block.device), block.squeeze(-1)]
    within = own.double().cumsum(-1) + before
    place = torch.searchsorted(within, target, right=True).clamp(max=CDF_BLOCK - 1)
    return (block * CDF_BLOCK + place).squeeze(-1).clamp(max=vocabulary - 1)


# --- one packed forward pass ----------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One training example or evaluation item.

    ``sequences`` holds one text for next-token losses, two for pairwise ones: (chosen or winner,
    rejected or loser). ``id`` names it in tables and errors, ``source`` says where it came from,
    ``cluster`` which others it is not independent of (none: "").
    """

    id: str
    source: str
    sequences: tuple[EncodedExample, ...]
    cluster: str = ""


Group = tuple[EncodedExample, ...]
"""Texts that begin alike: a pair, the options of a question, several answers to one prompt."""


def backbone(model):
    """The transformer without its output head, adapters included (PEFT patches it in place)."""
    causal = getattr(model, "base_model", model)
    causal = getattr(causal, "model", causal) if hasattr(model, "peft_config") else model
    return causal.base_model


def output_head(model):
    """The linear layer that turns hidden states into logits."""
    return model.get_output_embeddings()


@dataclass
class Packed:
    """A batch with one row a group: what its texts begin with once, then what follows in each.

    ``rows``, ``positions``, ``segments`` (0 what is shared, from 1 on the texts): a list a row, a
    number a token; a ``prefix`` that all rows begin with lies in a cache and is left out of them.
    ``predicting`` (row, column), ``targets`` and ``owner`` (index into all texts): an entry an
    answer token. ``ends``: (row, column) of each text's last token.
    """

    rows: list[list[int]] = field(default_factory=list)
    positions: list[list[int]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    predicting: list[tuple[int, int]] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    ends: list[tuple[int, int]] = field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Is every row a single text, which causal attention reads without a mask?"""
        return len(self.ends) == len(self.rows)


def pack(groups: Sequence[Group], prefix: int = 0) -> Packed:
    """Lay groups out as rows. ``prefix``: tokens with which all texts begin, left out."""
    packed = Packed()
    for row, group in enumerate(groups):
        shared = _shared(group)
        ids, positions = list(group[0].input_ids[prefix:shared]), list(range(prefix, shared))
        segments = [0] * len(ids)
        for number, text in enumerate(group, start=1):
            columns = [*range(shared - prefix), *range(len(ids), len(ids) + len(text) - shared)]
            ids += text.input_ids[shared:]
            positions += range(shared, len(text))
            segments += [number] * (len(text) - shared)
            answer = range(text.answer_start, len(text))
            packed.predicting += [(row, columns[place - 1 - prefix]) for place in answer]
            packed.targets += text.answer_ids
            packed.owner += [len(packed.ends)] * len(answer)
            packed.ends.append((row, columns[-1]))
        packed.rows.append(ids)
        packed.positions.append(positions)
        packed.segments.append(segments)
    return packed


def _shared(group: Group) -> int:
    """How many tokens the prompts of a group's texts begin with alike."""
    return len(os.path.commonprefix([text.prompt_ids for text in group]))


def packed_length(group: Group) -> int:
    """Tokens of a group's row."""
    shared = _shared(group)
    return shared + sum(len(text) - shared for text in group)


@dataclass(frozen=True)
class Prefix:
    """Tokens that all rows begin with, as keys and values: of the layers that a pass runs through,
    and, where a pass starts from kept states, of the layers below (``lower``)."""

    ids: tuple[int, ...] = ()
    cache: DynamicCache | None = None
    lower: DynamicCache | None = None

    def repeated(self, rows: int, lower: bool = False) -> DynamicCache | None:
        """A copy of the cache for ``rows`` rows, which the pass then extends."""
        cache = self.lower if lower else self.cache
        if cache is None:
            return None
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(rows)
        return cache


def first_adapted_layer(model) -> int:
    """The lowest layer that any adapter of the model changes (0 where that is not known)."""
    adapters = getattr(model, "peft_config", {}).values()
    return min((min(a.layers_to_transform or [0]) for a in adapters), default=0)


class _PassOn(torch.nn.Module):
    """Stands in for a layer that need not run: hands its input on and keeps it, or hands on
    ``given`` states."""

    def __init__(self, given: torch.Tensor | None = None):
        super().__init__()
        self.given = given

    def forward(self, hidden_states, *args, **kwargs):
        self.states = hidden_states if self.given is None else self.given
        return self.states


@contextmanager
def only_layers(
    model, start: int, stop: int | None = None, states: torch.Tensor | None = None
) -> Iterator[Sequence[torch.nn.Module]]:
    """Only layers ``start`` to ``stop`` run; the others hand their input on. Yields all of them.

    ``states`` [rows, width, hidden]: what ``start`` is given instead of the embedded tokens. (Given
    as ``inputs_embeds``, GPT-2 would add its positions to them once more.)"""
    stack = backbone(model)
    layers = stack.layers if hasattr(stack, "layers") else stack.h
    everyone = list(layers)
    try:
        for index in [*range(start), *range(stop or len(everyone), len(everyone))]:
            layers[index] = _PassOn(states if index == start - 1 else None)
        yield layers
    finally:
        for index, layer in enumerate(everyone):
            layers[index] = layer


class LowerStates:
    """Hidden states below the first adapted layer: the same for every adapter and training step.

    Training, gradients and scoring of several models start from them and so run the lower layers
    once. A row is read by itself: what is kept depends on its tokens alone, never on a batch, and
    is the same in a run that was interrupted. Memory: hidden size numbers a token.

    Parameters
    ----------
    model
        Whose adapters leave the layers below ``first`` alone. With ``first`` 0 nothing is saved.
    """

    def __init__(self, model):
        self.first = first_adapted_layer(model)
        self._embeddings = model.get_input_embeddings().weight
        self._rows: dict[object, torch.Tensor] = {}
        self._prefixes: dict[tuple[int, ...], tuple[torch.Tensor, DynamicCache]] = {}

    def batch(self, model, packed: Packed, prefix: Prefix) -> torch.Tensor:
        """States of all rows, padded on the right: [rows, width, hidden]."""
        self._check(model)
        rows = [self._row(model, packed, row, prefix) for row in range(len(packed.rows))]
        width = padded_width(rows)
        states = rows[0].new_zeros(len(rows), width, rows[0].shape[-1])
        for row, found in enumerate(rows):
            states[row, : len(found)] = found
        return states

    def prefix(self, model, ids: tuple[int, ...]) -> tuple[torch.Tensor, DynamicCache]:
        """States of a prefix [1, width, hidden], and its keys and values in the lower layers."""
        self._check(model)
        if ids not in self._prefixes:
            cache = DynamicCache()
            tokens = torch.tensor([ids], device=model.device)
            self._prefixes[ids] = self._run(model, input_ids=tokens, past_key_values=cache), cache
        return self._prefixes[ids]

    def _check(self, model) -> None:
        if self.first > first_adapted_layer(model):
            raise StudyError(f"kept states: this model's adapters begin below layer {self.first}")
        if model.get_input_embeddings().weight is not self._embeddings:
            raise StudyError("kept states: they are of another backbone; make them of this one")

    def _row(self, model, packed: Packed, row: int, prefix: Prefix) -> torch.Tensor:
        ids, segments = packed.rows[row], packed.segments[row]
        key = prefix.ids, tuple(ids), tuple(segments)
        if key not in self._rows:
            one = Packed([ids], [packed.positions[row]], [segments])
            inputs = _inputs(model, one, 0, prefix, plain=max(segments) < 2 and not prefix.ids)
            inputs["past_key_values"] = prefix.repeated(1, lower=True)
            self._rows[key] = self._run(model, **inputs)[0, : len(ids)].clone()
        return self._rows[key]

    @torch.no_grad()
    def _run(self, model, **inputs) -> torch.Tensor:
        with only_layers(model, 0, self.first) as layers:
            backbone(model)(**inputs, use_cache=inputs.get("past_key_values") is not None)
            return layers[self.first].states


def read_prefix(model, ids: tuple[int, ...], kept: LowerStates | None = None) -> Prefix:
    """Run the tokens that all texts begin with."""
    if not ids:
        return Prefix()
    _check_vocabulary(model, [ids])
    cache = DynamicCache()  # all tokens in every layer: how far a layer looks back is in the mask
    lower, layers = None, nullcontext()
    if kept and kept.first:
        states, lower = kept.prefix(model, ids)
        layers = only_layers(model, kept.first, states=states)
    with layers:
        tokens = torch.tensor([ids], device=model.device)
        backbone(model)(input_ids=tokens, past_key_values=cache, use_cache=True)
    return Prefix(ids, cache, lower)


def packed_states(
    model, packed: Packed, pad: int, kept: LowerStates | None = None, prefix: Prefix = Prefix()
) -> torch.Tensor:
    """Last hidden states [rows, width, hidden], with gradients: a token sees the prefix, what its
    row's texts share, and its own text before it.

    ``kept``: start from these states instead of token ids.
    """
    inputs = _inputs(model, packed, pad, prefix, packed.plain and not prefix.ids)
    inputs |= {"past_key_values": prefix.repeated(len(packed.rows)), "use_cache": bool(prefix.ids)}
    layers = nullcontext()
    if kept and kept.first:
        layers = only_layers(model, kept.first, states=kept.batch(model, packed, prefix))
    with layers:
        return backbone(model)(**inputs).last_hidden_state


def _inputs(model, packed: Packed, pad: int, prefix: Prefix, plain: bool) -> dict[str, object]:
    """Token ids of a batch, and mask and positions unless it is ``plain``: padding comes after all
    that is looked at, so that causal attention needs no mask and leaves out half of the work."""
    _check_vocabulary(model, packed.rows)
    ids, real = pad_right(packed.rows, pad, model.device)
    if plain:
        return {"input_ids": ids}
    segments = pad_right(packed.segments, 0, ids.device)[0].masked_fill(real == 0, -1)
    positions = pad_right(packed.positions, 0, ids.device)[0]
    mask = option_mask(model, segments, positions, len(prefix.ids))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def _check_vocabulary(model, rows: Sequence[Sequence[int]]) -> None:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if max(map(max, rows)) >= vocabulary:
        raise StudyError(
            f"a token id is beyond the {vocabulary} of this model; the texts were made with "
            "another model's tokenizer"
        )


def note_beyond_context(model, lengths: Sequence[int], what: str) -> None:
    """Count texts of these ``lengths`` [tokens] that are longer than the model's context: a note,
    or, where it has no position for their tokens at all, a StudyError."""
    context = getattr(model.config, "max_position_embeddings", None)
    beyond = sum(length > context for length in lengths) if context else 0
    counts = f"{what}: {beyond} of {len(lengths)} texts are longer than the model's context"
    if beyond and hasattr(backbone(model), "wpe"):  # a table of positions, as GPT-2's
        raise StudyError(f"{counts} of {context} tokens; leave them out, or take another model")
    if beyond:
        note(f"{counts} of {context} tokens, for which it was not made")


def option_mask(
    model, segments: torch.Tensor, positions: torch.Tensor, shared: int = 0
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive attention mask [rows, 1, width, shared + width]: 0 where a token may look, the
    lowest number elsewhere.

    ``segments`` [rows, width]: 0 for the context, from 1 on for options, -1 for padding. Every
    token sees the ``shared`` first tokens, and of those before it the context and its own option.
    For a model some of whose layers look back over a few tokens only there is one mask for each
    kind of layer; ``positions`` [rows, width] are counted in the text that a token belongs to."""
    looking, seen = segments[:, :, None], segments[:, None, :]
    width = segments.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=segments.device).tril()
    visible = before & ((seen == 0) | (seen == looking))
    visible = torch.cat([visible.new_ones(*segments.shape, shared), visible], -1)

    def additive(visible):
        zeros = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(model.dtype).min)[:, None]

    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if not kinds and (window is None or hasattr(model.config, "layer_types")):
        return additive(visible)
    if kinds - {"sliding_attention"}:
        raise StudyError(
            f"{model.config.model_type}: options cannot be weighed through layers of "
            f"{', '.join(sorted(kinds))}"
        )
    at = torch.arange(shared, device=positions.device).expand(len(positions), shared)
    at = torch.cat([at, positions], 1)
    near = positions[:, :, None] - at[:, None, :] < window
    if not kinds:  # as Mistral: all of its layers
        return additive(visible & near)
    return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}


def wide(numbers: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


MOST_SCORES = 2**22
"""Attention scores of one layer that :func:`plain_attention` keeps: 16 MB in float32, as for 4 rows
of 340 tokens with 9 heads."""


def plain_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **more
) -> tuple[torch.Tensor, None]:
    """softmax(q k^T scaling + mask) v, written out: [rows, heads, width, size] → [rows, width,
    heads, size]; ``key`` and ``value`` may have fewer heads.

    For short texts: on a CPU, torch's fused attention is slower there, mostly on the way back, and
    it cannot be differentiated twice. Anything else is handed to it: long texts (whose scores would
    fill the memory), dropout, a bias on positions.
    """
    rows, heads, width, size = query.shape
    short = rows * heads * width * key.shape[2] <= MOST_SCORES
    causal = attention_mask is not None or (is_causal is not False and width == key.shape[2])
    special = dropout or any(more.get(name) is not None for name in ("position_bias", "softcap"))
    if not (short and causal) or special:
        fused = AttentionInterface()["sdpa"]
        more |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return fused(module, query, key, value, attention_mask, **more)
    queries, keys, values = (
        states.reshape(rows * key.shape[1], -1, states.shape[-1]) for states in (query, key, value)
    )
    scores = torch.bmm(wide(queries) * (scaling or size**-0.5), wide(keys).mT)
    scores = scores.view(rows, key.shape[1], -1, width, key.shape[2])
    if attention_mask is None:
        visible = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    else:
        visible = attention_mask[:, :, None]
    if visible.dtype == torch.bool:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    else:
        scores = scores + visible
    weights = scores.softmax(-1).to(values.dtype).view(len(values), -1, key.shape[2])
    read = torch.bmm(weights, values).view(rows, heads, width, -1)
    return read.transpose(1, 2).contiguous(), None


PLAIN = "rlhf_trust_plain"
AttentionInterface.register(PLAIN, plain_attention)
AttentionMaskInterface.register(PLAIN, AttentionMaskInterface()["sdpa"])


@contextmanager
def plainly(model) -> Iterator[None]:
    """On a CPU the model's fused attention is written out; any other it was loaded with stays.

    For whole training steps, passes without gradients among them: then PPO's ratio starts at
    exactly 1 and its KL at exactly 0. Scoring stays with the fused one, whose numbers do not depend
    on the batch.
    """
    if model.config._attn_implementation != "sdpa" or model.device.type != "cpu":
        yield
        return
    model.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class _ChosenLogps(torch.autograd.Function):
    """log softmax(head(state))[target] of every row: [rows, hidden], [V, hidden], [V] or None,
    [rows] → [rows].

    A row's value depends on that row alone, so its derivative, W[target] − Σ_v p_v W[v], can be
    taken on the way forward, while the logits of a slice of rows are at hand; the way back only
    multiplies. Logits [rows, V] are never kept, unless the derivative is to be differentiated.
    """

    ROWS = 128  # 25 MB of logits for V = 49,152: blocks that the allocator hands out again

    @staticmethod
    def forward(context, states, weight, bias, targets):
        derivative = torch.empty_like(wide(states))
        logps = derivative.new_empty(len(states))
        for start in range(0, len(states), _ChosenLogps.ROWS):
            part = slice(start, start + _ChosenLogps.ROWS)
            logits = wide(linear(states[part], weight, bias))
            logits.sub_(logits.amax(-1, keepdim=True))
            chosen = logits.gather(-1, targets[part, None]).squeeze(-1)
            odds = logits.exp_()
            total = odds.sum(-1)
            logps[part] = chosen - total.log()
            if context.needs_input_grad[0]:
                expected = wide(odds.to(weight.dtype) @ weight) / total[:, None]
                derivative[part] = wide(weight[targets[part]]) - expected
        context.save_for_backward(states, weight, bias, targets, derivative)
        return logps

    @staticmethod
    def backward(context, g):
        states, weight, bias, targets, derivative = context.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            chances = wide(linear(states, weight, bias)).softmax(-1)
            derivative = wide(weight[targets]) - wide(chances.to(weight.dtype) @ weight)
        return (g[:, None] * derivative).to(states.dtype), None, None, None


def chosen_logps(
    model, states: torch.Tensor, targets: torch.Tensor, exact: bool = False
) -> torch.Tensor:
    """log p(target | state), [tokens], float32, with gradients; states [tokens, hidden].

    ``exact``: logits in float32 whatever the weights' format. In bfloat16 a logit of 20 is rounded
    to the next eighth, so that options which differ by less would tie. (Against a float32 model:
    root mean square error of 120 log-odds 0.10 nats with such logits and 0.07 with exact ones, 135M
    weights.)
    """
    head = output_head(model)
    if type(head) is not torch.nn.Linear:
        raise StudyError(
            "the output head carries LoRA or is no linear layer; target other layers with LoRA"
        )
    weight, bias = head.weight, head.bias
    if exact:
        states, weight = states.float(), weight.float()
        bias = None if bias is None else bias.float()
    return _ChosenLogps.apply(states, weight, bias, targets)


def answer_token_logps(
    model, examples: Sequence[Example], pad: int, kept: LowerStates | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every answer token of all texts, an example's own next to each other
    (chosen_0, rejected_0, chosen_1, …), with gradients: [tokens], float32; and whose they are, as
    an index into these texts: [tokens]."""
    packed = pack([example.sequences for example in examples])
    with plainly(model):
        predicting, targets, owner = _predictions(model, packed, pad, kept)
    return chosen_logps(model, predicting, targets), owner


def _predictions(
    model, packed: Packed, pad: int, kept: LowerStates | None, prefix: Prefix = Prefix()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every answer token: the state that predicts it [tokens, hidden], it, and its text."""
    states = packed_states(model, packed, pad, kept, prefix)
    row, column = torch.tensor(packed.predicting, device=states.device).long().view(-1, 2).T
    targets, owner = torch.tensor([packed.targets, packed.owner], device=states.device).long()
    return states[row, column], targets, owner


def end_token_states(
    model, examples: Sequence[Example], pad: int, kept: LowerStates | None = None
) -> torch.Tensor:
    """Last hidden state at each text's end: [examples, texts an example, hidden], with
    gradients."""
    with plainly(model):
        found = _end_states(model, [example.sequences for example in examples], pad, kept)
    return found.view(len(examples), -1, found.shape[-1])


def _end_states(model, groups: Sequence[Group], pad: int, kept=None) -> torch.Tensor:
    packed = pack(groups)
    states = packed_states(model, packed, pad, kept)
    row, column = torch.tensor(packed.ends, device=states.device).T
    return states[row, column]


def token_logps(
    model,
    sequences: Sequence[EncodedExample],
    pad: int,
    hidden: bool = False,
    kept: LowerStates | None = None,
):
    """Log-probabilities of every answer token, in one forward pass, with gradients.

    Returns
    -------
    logps : Tensor [rows, longest answer]
        log p(token | everything before it), float32; 0 where ``mask`` is 0.
    mask : Tensor [rows, longest answer]
    last_hidden : Tensor [rows, longest answer, hidden], only if ``hidden``
        Hidden states at the positions that predict each answer token, 0 where ``mask`` is 0.
    """
    packed = pack([(sequence,) for sequence in sequences])
    with plainly(model):
        predicting, targets, owner = _predictions(model, packed, pad, kept)
    lengths = torch.bincount(owner, minlength=len(sequences))
    answered = torch.arange(int(lengths.max()), device=owner.device) < lengths[:, None]
    chosen, mask = chosen_logps(model, predicting, targets), answered.float()
    logps = torch.zeros_like(mask).masked_scatter(answered, chosen)
    if not hidden:
        return logps, mask
    last_hidden = predicting.new_zeros(*mask.shape, predicting.shape[-1])
    return logps, mask, last_hidden.masked_scatter(answered[..., None], predicting)


# --- scoring many texts ---------------------------------------------------------------------------


Each = Callable[[int, float], None]
Measure = Callable[[Sequence[EncodedExample], Each], object]


def batches_by_length(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices in batches of at most ``rows``, longest first, neighbours of like length together
    (little padding)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


WORTH_SHARING = 0.3
"""Share of the tokens that prompts in common must save for them to be read once: packed rows need
an attention mask, and hold answers of unlike length."""

ANSWERS_A_ROW = 8
"""Most answers to one prompt that share a row: every token of a row pays for its width."""


def _groups(sequences: Sequence[EncodedExample]) -> list[list[int]]:
    """Indices of the texts that share a row: those with one prompt where that saves enough."""
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, sequence in enumerate(sequences):
        of_prompt.setdefault(sequence.prompt_ids, []).append(index)
    saved = sum((len(some) - 1) * len(prompt) for prompt, some in of_prompt.items())
    if saved < WORTH_SHARING * sum(map(len, sequences)):
        return [[index] for index in range(len(sequences))]
    return [
        some[start : start + ANSWERS_A_ROW]
        for some in of_prompt.values()
        for start in range(0, len(some), ANSWERS_A_ROW)
    ]


@torch.no_grad()
def _read_all(
    read: Callable[[list[Group]], torch.Tensor],
    sequences: Sequence[EncodedExample],
    rows: int,
    desc: str,
    each: Each | None = None,
) -> np.ndarray:
    """What ``read`` gives for each text, [n, …], in batches of about ``rows`` texts; ``each(index,
    value)`` is called as soon as a text has its own."""
    groups, found = _groups(sequences), [np.nan] * len(sequences)
    texts = [tuple(sequences[i] for i in group) for group in groups]
    together = max(1, rows // max(map(len, groups), default=1))
    batches = batches_by_length([packed_length(group) for group in texts], together)
    for batch in progress(batches, desc=desc, unit="batch") if desc else batches:
        values = read([texts[place] for place in batch]).cpu().numpy()
        for index, value in zip([i for place in batch for i in groups[place]], values):
            found[index] = value
            if each:
                each(index, value)
    return np.array(found)


def answer_logps(
    model,
    sequences: Sequence[EncodedExample],
    pad: int,
    rows: int = 16,
    desc: str = "log-likelihoods",
    each: Each | None = None,
    kept: LowerStates | None = None,
    power: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed answer log-probabilities (each to this ``power``) and answer lengths of many texts, in
    the given order: two arrays [n]. ``each(index, sum)`` is called as soon as a text has one."""

    def sums(groups: list[Group]) -> torch.Tensor:
        predicting, targets, owner = _predictions(model, pack(groups), pad, kept)
        logps = chosen_logps(model, predicting, targets).double() ** power
        return logps.new_zeros(sum(map(len, groups))).index_add(0, owner, logps)

    found = _read_all(sums, sequences, rows, desc, each)
    return found, np.array([len(s.answer_ids) for s in sequences], dtype=int)


def end_states(
    model, sequences: Sequence[EncodedExample], pad: int, rows: int = 16, desc: str = ""
) -> np.ndarray:
    """Last hidden state at each text's last token, [n, hidden], float32."""
    return _read_all(lambda some: _end_states(model, some, pad).float(), sequences, rows, desc)


def rewards(
    model,
    head: torch.Tensor,
    sequences: Sequence[EncodedExample],
    pad: int,
    rows: int = 16,
    desc: str = "rewards",
    each: Each | None = None,
) -> np.ndarray:
    """Scalar rewards [n] with the active (reward) adapter: head · hidden state of each text's last
    token. ``each`` as for :func:`answer_logps`."""

    def scores(groups: list[Group]) -> torch.Tensor:
        states = _end_states(model, groups, pad).float()
        return (states @ head.to(states)).double()

    return _read_all(scores, sequences, rows, desc, each)


@torch.no_grad()
def option_logps(
    model,
    choices: Sequence[MultipleChoice],
    pad: int,
    tokens: int = 2048,
    each=None,
    kept: LowerStates | None = None,
    shared: int | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of every option after its context.

    What is shared runs once: the tokens with which all contexts begin (a system text, worked
    examples) once in all; the rest of a context once, in one row with all of its options, each of
    which sees the context and itself, not the others. An option that stands in a choice twice runs
    once. The output head runs only where an option's token is predicted.

    Parameters
    ----------
    model
        A causal language model (or PEFT wrapper); its active adapter answers.
    tokens
        Most tokens in a batch (or one choice).
    each
        Called with (index, its array) as soon as a choice is done.
    kept
        Start from these states, which several models share.
    shared
        How many tokens all contexts begin with, where these choices are left over of more.

    Returns
    -------
    list
        One array [options] a choice, summed over the option's tokens, nats.
    """
    ids = choices[0].context[: _common_start(choices) if shared is None else shared]
    prefix = read_prefix(model, ids, kept)
    groups = [choice.group for choice in choices]
    widths = [packed_length(group) - len(ids) for group in groups]
    found: list[np.ndarray | None] = [None] * len(choices)
    for batch in _batches_by_tokens(widths, tokens):
        packed = pack([groups[i] for i in batch], len(ids))
        predicting, targets, owner = _predictions(model, packed, pad, kept, prefix)
        logps = chosen_logps(model, predicting, targets, exact=True).double()
        sums = iter(logps.new_zeros(len(packed.ends)).index_add(0, owner, logps).tolist())
        for index in batch:
            of_option = {text.answer_ids: next(sums) for text in groups[index]}
            found[index] = np.array([of_option[option] for option in choices[index].options])
            if each is not None:
                each(index, found[index])
    return found


def _common_start(choices: Sequence[MultipleChoice]) -> int:
    """How many tokens all contexts begin with alike, at least one token of each left over."""
    contexts = [choice.context for choice in choices]
    return min(len(os.path.commonprefix(contexts)), min(map(len, contexts)) - 1)


def _batches_by_tokens(widths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of like width, widest first, of at most ``tokens`` tokens with their
    padding (or one row)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(widths)), key=lambda i: (-widths[i], i)):
        if not batches or (len(batches[-1]) + 1) * widths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


class Generations:
    """Answers of one model to a list of prompts, cached by content.

    Parameters
    ----------
    directory
        Where the JSONL files lie.
    fingerprint
        Identifies the weights (``models.adapter_fingerprint``).

    With ``RLHF_TRUST_CACHE=off`` nothing kept is read.
    """

    def __init__(self, directory: Path, chat: Chat, rows: int = 64):
        self.directory, self.chat, self.rows = Path(directory), chat, rows

    def asked_by(self, chat: Chat) -> Generations:
        """The same files, for a model that is asked in another format."""
        return Generations(self.directory, chat, self.rows)

    def answer(
        self, model, fingerprint: str, name: str, prompts: Sequence[Prompt], decoding: Decoding
    ) -> list[list[str]]:
        """Answers as text, ``[prompt][sample]``, in the order of ``prompts``. ``name`` is for the
        file and the bar."""
        if len({p.id for p in prompts}) < len(prompts):
            raise StudyError(f"{name}: two items have the same id")
        kept = self._kept(name, fingerprint, self.chat.key, asdict(decoding))
        asked = [self.chat.prompt_ids(p.turns, p.system) for p in prompts]
        longest = [len(ids) + decoding.max_new_tokens for ids in asked]
        note_beyond_context(model, longest, f"{name}, with their answers")
        keys = [content_key(p.id, p.turns, p.system) for p in prompts]
        missing = [given for given in zip(keys, prompts, asked) if given[0] not in kept]
        if missing:
            ids = [prompt_ids for *_, prompt_ids in missing]
            batches = batches_by_length(list(map(len, ids)), max(1, self.rows // decoding.samples))
            ends = self.chat.tokenizer.eos_token_id, self.chat.tokenizer.pad_token_id
            with progress(total=len(missing), desc=name, unit="item") as bar:
                for batch in batches:
                    rows, names = [ids[i] for i in batch], [missing[i][1].id for i in batch]
                    drawn = sample_batch(model, rows, names, decoding, *ends)
                    for i, id, answers in zip(batch, names, drawn):
                        texts = [self.chat.decode(answer) for answer in answers]
                        kept.add(missing[i][0], id=id, answers=texts)
                    bar.update(len(batch))
        return [kept[key]["answers"] for key in keys]

    def option_logps(
        self,
        model,
        fingerprint: str,
        name: str,
        choices: Sequence[MultipleChoice],
        states: LowerStates | None = None,
    ) -> list[np.ndarray]:
        """Summed log-probabilities of options, one array [options] a choice (:func:`option_logps`),
        in order."""
        note_beyond_context(model, [max(map(len, choice.group)) for choice in choices], name)
        kept = self._kept(name, fingerprint, "options", "logits in float32")
        keys = [content_key(choice.context, choice.options) for choice in choices]
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            with progress(total=len(missing), desc=name, unit="item") as bar:

                def keep(place: int, values: np.ndarray) -> None:
                    index = missing[place]
                    kept.add(keys[index], id=choices[index].id, logps=values.tolist())
                    bar.update()

                some, pad = [choices[i] for i in missing], self.chat.tokenizer.pad_token_id
                more = {"each": keep, "kept": states, "shared": _common_start(choices)}
                option_logps(model, some, pad, **more)
        return [np.array(kept[key]["logps"]) for key in keys]

    def numbers(
        self, fingerprint: str, name: str, sequences: Sequence[EncodedExample], measure: Measure
    ) -> np.ndarray:
        """One number a sequence, [n], in order. ``measure(sequences, each)`` computes those that
        are not kept and calls ``each(place, value)`` as soon as it has one (:func:`answer_logps`,
        :func:`rewards`)."""
        kept = self._kept(name, fingerprint, "numbers")
        keys = [content_key(s.input_ids, s.answer_start) for s in sequences]
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            some = [sequences[index] for index in missing]
            measure(some, lambda place, value: kept.add(keys[missing[place]], value=float(value)))
        return np.array([kept[key]["value"] for key in keys])

    def _kept(self, name: str, *common: object) -> ResultCache:
        key = content_key(*common, code_hash("chat", "decode"))
        return ResultCache(self.directory / f"{name}.{key}.jsonl")
