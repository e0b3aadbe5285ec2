"""Batched sampling and log-likelihoods.

Sampling is seeded per item: item ``i``'s ``s``-th answer is drawn from random numbers that depend on the item's own
key, ``s`` and the seed alone, never on its neighbours. With float32 weights the answer to an item therefore does not
depend on the batch it ran in or on how many items run beside it.

Generations are kept as JSONL, one line an item, under a name made of everything that could change them (weights,
prompt format, sampling settings): an interrupted run resumes at the item, and adding a model costs only that model.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import DynamicCache

from . import StudyError
from .artifacts import ResultCache, content_key, progress
from .chat import Chat, EncodedExample


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
        if self.temperature < 0 or self.max_new_tokens < 1 or self.samples < 1:
            raise StudyError("decoding: temperature must be >= 0, max_new_tokens and samples >= 1")


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: ``id`` names the item (and seeds its sampling), ``turns`` alternate human, assistant, …"""

    id: str
    turns: tuple[str, ...]
    system: str | None = None


@dataclass(frozen=True)
class MultipleChoice:
    """Options to weigh against each other, as token ids: what is said before, and the ways to go on."""

    id: str
    context: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        if not self.context or not self.options or not all(self.options):
            raise StudyError(
                f"{self.id}: a choice needs a context and options of at least one token"
            )


def uniform_draws(key: str, seed: int, sample: int, steps: int) -> np.ndarray:
    """The random numbers in [0, 1) that an item's ``sample``-th answer is drawn with, shape [steps]."""
    digest = hashlib.sha256(f"{key}\0{seed}\0{sample}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).random(steps)


PAD_TO = 16
"""Batches are padded to a multiple of this: with a new shape every step the allocator keeps gigabytes."""


def pad_left(rows: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token lists flush right; returns ids and attention mask, both [rows, width]."""
    return _padded(rows, pad, device, left=True)


def pad_right(rows: Sequence[Sequence[int]], pad: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack token lists flush left; returns ids and attention mask, both [rows, width]."""
    return _padded(rows, pad, device, left=False)


def _padded(
    rows: Sequence[Sequence[int]], pad: int, device, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
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
    n, device = decoding.samples, model.device
    ids, mask = pad_left(rows, pad, device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    logits = _next_logits(model, ids, mask, positions, cache)
    if n > 1:  # the prompt was run once; from here every sample has a row of its own
        cache.batch_repeat_interleave(n)
        logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions))
    draws = torch.from_numpy(
        np.stack(
            [
                uniform_draws(key, decoding.seed, s, decoding.max_new_tokens)
                for key in keys
                for s in range(n)
            ]
        )
    )
    position = positions[:, -1:]
    rows_alive = torch.arange(len(rows) * n, device=device)
    answers: list[list[int]] = [[] for _ in range(len(rows) * n)]
    for step in range(decoding.max_new_tokens):
        if decoding.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = inverse_cdf(
                logits, decoding.temperature, draws[rows_alive.cpu(), step].to(device)
            )
        for row, token in zip(rows_alive.tolist(), tokens.tolist()):
            answers[row].append(token)
        going = (tokens != eos).nonzero().squeeze(-1)
        if step + 1 == decoding.max_new_tokens or len(going) == 0:
            break
        if len(going) < len(tokens):  # finished answers leave the batch
            cache.batch_select_indices(going)
            rows_alive, tokens, mask, position = (
                rows_alive[going],
                tokens[going],
                mask[going],
                position[going],
            )
        position = position + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = _next_logits(model, tokens[:, None], mask, position, cache)
    return [answers[i * n : (i + 1) * n] for i in range(len(rows))]


def _next_logits(model, ids, mask, positions, cache: DynamicCache) -> torch.Tensor:
    """Logits of the token after each row of ``ids`` [rows, width], which continue ``cache``: [rows, V].

    The head is given a matrix. On a slice of [rows, width, hidden] the product copies its weight for every row: 3 GB more
    for 64 rows of a 135M model.
    """
    states = backbone(model)(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        past_key_values=cache,
    ).last_hidden_state
    return output_head(model)(states[:, -1])


CDF_BLOCK, CDF_ROWS = 256, 8
"""Tokens of the vocabulary that are summed up first, and rows at a time: few enough to stay in a processor's cache."""


def inverse_cdf(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    """Sample one token per row: the first whose cumulative probability exceeds ``u``. Shapes [b, V], [b] → [b].

    Summed up in two steps, over blocks, then within the block that ``u`` falls into; both running sums are in float64, so that a
    large vocabulary does not blur neighbouring tokens. A running sum over every token costs five times as much.
    """
    return torch.cat(
        [
            _inverse_cdf(few, temperature, some)
            for few, some in zip(logits.split(CDF_ROWS), u.split(CDF_ROWS))
        ]
    )


def _inverse_cdf(logits: torch.Tensor, temperature: float, u: torch.Tensor) -> torch.Tensor:
    vocabulary = logits.shape[-1]
    weights = logits.new_zeros(
        len(logits), -(-vocabulary // CDF_BLOCK) * CDF_BLOCK, dtype=torch.float32
    )
    own = weights[:, :vocabulary].copy_(logits)
    own.sub_(own.amax(-1, keepdim=True)).div_(temperature).exp_()
    weights = weights.unflatten(-1, (-1, CDF_BLOCK))
    blocks = weights.sum(-1).double().cumsum(-1)
    target = (u * blocks[:, -1])[:, None]
    block = torch.searchsorted(blocks, target, right=True).clamp(max=blocks.shape[-1] - 1)
    before = torch.nn.functional.pad(blocks, (1, 0)).gather(1, block)
    within = (
        weights[torch.arange(len(weights), device=block.device), block.squeeze(-1)]
        .double()
        .cumsum(-1)
        + before
    )
    token = block * CDF_BLOCK + torch.searchsorted(within, target, right=True).clamp(
        max=CDF_BLOCK - 1
    )
    return token.squeeze(-1).clamp(max=vocabulary - 1)


@torch.no_grad()
def option_logps(
    model, choices: Sequence[MultipleChoice], pad: int, tokens: int = 2048, each=None
) -> list[np.ndarray]:
    """Log-probabilities of every option after its context.

    What is shared runs once: the tokens with which all contexts begin (a system text, worked examples) once in all; the
    rest of a context once, in one row with all of its options, each of which sees the context and itself, not the others
    (:func:`option_mask`). An option that stands in a choice twice runs once. The output head runs only where an option's
    token is predicted.

    Parameters
    ----------
    model
        A causal language model (or PEFT wrapper); its active adapter answers.
    tokens
        Most tokens in a batch (or one choice).
    each
        Called with (index, its array) as soon as a choice is done.

    Returns
    -------
    list
        One array [options] a choice, summed over the option's tokens, nats.
    """
    shared = _common_start([choice.context for choice in choices])
    cache = (
        DynamicCache()
    )  # of all tokens in every layer: how far a layer looks back is in the mask
    if shared:
        ids = torch.tensor([choices[0].context[:shared]], device=model.device)
        backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    unique = [list(dict.fromkeys(choice.options)) for choice in choices]
    widths = [
        len(choice.context) - shared + sum(map(len, options))
        for choice, options in zip(choices, unique)
    ]
    found: list[np.ndarray | None] = [None] * len(choices)
    for batch in _batches_by_tokens(widths, tokens):
        sums = _option_batch(
            model,
            [choices[i].context[shared:] for i in batch],
            [unique[i] for i in batch],
            copy.deepcopy(cache),
            shared,
            pad,
        )
        for index, values in zip(batch, sums):
            of_option = dict(zip(unique[index], values))
            found[index] = np.array([of_option[option] for option in choices[index].options])
            if each is not None:
                each(index, found[index])
    return found


def _common_start(contexts: Sequence[Sequence[int]]) -> int:
    """How many tokens all contexts begin with alike, at least one token of each left over."""
    first, last = min(contexts), max(contexts)  # all others lie between them in dictionary order
    limit = min(map(len, contexts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _batches_by_tokens(widths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of like width, widest first, of at most ``tokens`` tokens with their padding (or one row)."""
    batches: list[list[int]] = []
    for index in sorted(range(len(widths)), key=lambda i: (-widths[i], i)):
        if not batches or (len(batches[-1]) + 1) * widths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _option_batch(
    model, contexts, options, cache: DynamicCache, shared: int, pad: int
) -> list[list[float]]:
    """:func:`option_logps` of one batch; ``cache`` holds the ``shared`` first tokens of every context, as one row, and
    ``contexts`` what follows them."""
    device = model.device
    if shared:
        cache.batch_repeat_interleave(len(contexts))
    rows = [sum(of_row, tuple(context)) for context, of_row in zip(contexts, options)]
    ids, mask = pad_right(rows, pad, device)
    segments = torch.full_like(ids, -1)  # 0: context, from 1 on: the options, -1: padding
    positions = torch.zeros_like(ids)
    row_of, predicting, targets, owner = [], [], [], []  # one entry an option's token
    for row, (context, of_row) in enumerate(zip(contexts, options)):
        end = len(context)
        segments[row, :end] = 0
        positions[row, :end] = torch.arange(shared, shared + end)
        start = end
        for number, option in enumerate(of_row, start=1):
            stop = start + len(option)
            segments[row, start:stop] = number
            positions[row, start:stop] = torch.arange(shared + end, shared + end + len(option))
            row_of += [row] * len(option)
            predicting += [end - 1, *range(start, stop - 1)]
            targets += option
            owner += [(row, number)] * len(option)
            start = stop
    states = backbone(model)(
        input_ids=ids,
        attention_mask=option_mask(model, segments, positions, shared),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits = _logits_in_float32(model, states[row_of, predicting])
    logps = logits.gather(-1, torch.tensor(targets, device=device)[:, None]).squeeze(
        -1
    ) - logits.logsumexp(-1)
    sums: dict[tuple[int, int], float] = {}
    for key, value in zip(owner, logps.double().tolist()):
        sums[key] = sums.get(key, 0.0) + value
    return [
        [sums[row, number] for number in range(1, len(of_row) + 1)]
        for row, of_row in enumerate(options)
    ]


def _logits_in_float32(model, states: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, V] of a few states [tokens, hidden], whatever the weights' format.

    In bfloat16 a logit of 20 is rounded to the next eighth, so that options which differ by less would tie. (Against a
    float32 model: root mean square error of 120 log-odds 0.10 nats with such logits and 0.07 with these, 135M weights.)
    """
    head = output_head(model)
    return torch.nn.functional.linear(
        states.float(), head.weight.float(), None if head.bias is None else head.bias.float()
    )


def option_mask(
    model, segments: torch.Tensor, positions: torch.Tensor, shared: int = 0
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Additive attention mask [rows, 1, width, shared + width]: 0 where a token may look, the lowest number elsewhere.

    ``segments`` [rows, width]: 0 for the context, from 1 on for options, -1 for padding. Every token sees the ``shared``
    first tokens, and of those before it the context and its own option. For a model some of whose layers look back over a
    few tokens only there is one mask for each kind of layer; ``positions`` [rows, width] are counted in the text that a
    token belongs to.
    """
    looking, seen = segments[:, :, None], segments[:, None, :]
    before = torch.ones(
        segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device
    ).tril()
    visible = before & ((seen == 0) | (seen == looking))
    visible = torch.cat([visible.new_ones(*segments.shape, shared), visible], -1)

    def additive(visible):
        zeros = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(model.dtype).min)[:, None]

    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if not kinds:
        return additive(visible)
    if kinds != {"sliding_attention"}:
        raise StudyError(
            f"{model.config.model_type}: options cannot be weighed through layers of {', '.join(sorted(kinds))}"
        )
    at = torch.cat(
        [torch.arange(shared, device=positions.device).expand(len(positions), shared), positions], 1
    )
    near = positions[:, :, None] - at[:, None, :] < model.config.sliding_window
    return {"full_attention": additive(visible), "sliding_attention": additive(visible & near)}


Each = Callable[[int, float], None]
Measure = Callable[[Sequence[EncodedExample], Each], object]


def batches_by_length(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Indices in batches of at most ``rows``, longest first, neighbours of like length together (little padding)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + rows] for i in range(0, len(order), rows)]


WORTH_SHARING = 0.3
"""Share of the tokens that prompts in common must save for them to be read once (answers of unlike length then lie side by side)."""


def reading_batches(sequences: Sequence[EncodedExample], rows: int) -> list[list[int]]:
    """Indices in batches of at most ``rows``, longest first: those of like length together, or, where that saves more, those
    that share a prompt, which then runs once (:func:`_read`)."""
    prompts = [s.prompt_ids for s in sequences]
    if not _worth_sharing(sequences, prompts):
        return batches_by_length([len(s) for s in sequences], rows)
    longest: dict[Sequence[int], int] = {}
    for prompt, s in zip(prompts, sequences):
        longest[prompt] = max(longest.get(prompt, 0), len(s))
    order = sorted(
        range(len(sequences)),
        key=lambda i: (-longest[prompts[i]], prompts[i], -len(sequences[i]), i),
    )
    return [order[i : i + rows] for i in range(0, len(order), rows)]


def _worth_sharing(sequences: Sequence[EncodedExample], prompts: Sequence[Sequence[int]]) -> bool:
    """Whether reading each of the sequences' ``prompts`` once saves enough of their tokens."""
    saved = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    return saved >= WORTH_SHARING * sum(map(len, sequences))


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

    def answer(
        self, model, fingerprint: str, name: str, prompts: Sequence[Prompt], decoding: Decoding
    ) -> list[list[str]]:
        """Answers as text, ``[prompt][sample]``, in the order of ``prompts``. ``name`` is for the file and the bar."""
        if len({p.id for p in prompts}) < len(prompts):
            raise StudyError(f"{name}: two items have the same id")
        kept = self._kept(name, fingerprint, self.chat.name, asdict(decoding))
        keys = [content_key(p.id, p.turns, p.system) for p in prompts]
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            ids = {
                index: self.chat.prompt_ids(prompts[index].turns, prompts[index].system)
                for index in missing
            }
            tokenizer = self.chat.tokenizer
            with progress(total=len(missing), desc=name, unit="item") as bar:
                for places in batches_by_length(
                    [len(ids[index]) for index in missing], max(1, self.rows // decoding.samples)
                ):
                    batch = [missing[place] for place in places]
                    drawn = sample_batch(
                        model,
                        [ids[index] for index in batch],
                        [prompts[index].id for index in batch],
                        decoding,
                        tokenizer.eos_token_id,
                        tokenizer.pad_token_id,
                    )
                    for index, answers in zip(batch, drawn):
                        kept.add(
                            keys[index],
                            id=prompts[index].id,
                            answers=[self.chat.decode(answer) for answer in answers],
                        )
                    bar.update(len(batch))
        return [kept[key]["answers"] for key in keys]

    def option_logps(
        self, model, fingerprint: str, name: str, choices: Sequence[MultipleChoice]
    ) -> list[np.ndarray]:
        """Summed log-probabilities of options, one array [options] a choice (:func:`option_logps`), in order."""
        kept = self._kept(name, fingerprint, "options", "logits in float32")
        keys = [content_key(choice.context, choice.options) for choice in choices]
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            with progress(total=len(missing), desc=name, unit="item") as bar:

                def keep(place: int, values: np.ndarray) -> None:
                    kept.add(
                        keys[missing[place]], id=choices[missing[place]].id, logps=values.tolist()
                    )
                    bar.update()

                option_logps(
                    model,
                    [choices[i] for i in missing],
                    self.chat.tokenizer.pad_token_id,
                    each=keep,
                )
        return [np.array(kept[key]["logps"]) for key in keys]

    def numbers(
        self, fingerprint: str, name: str, sequences: Sequence[EncodedExample], measure: Measure
    ) -> np.ndarray:
        """One number a sequence, [n], in order. ``measure(sequences, each)`` computes those that are not kept and calls
        ``each(place, value)`` as soon as it has one (:func:`answer_logps`, :func:`rewards`)."""
        kept = self._kept(name, fingerprint, "numbers")
        keys = [content_key(s.input_ids, s.answer_start) for s in sequences]
        missing = [index for index, key in enumerate(keys) if key not in kept]
        if missing:
            measure(
                [sequences[index] for index in missing],
                lambda place, value: kept.add(keys[missing[place]], value=float(value)),
            )
        return np.array([kept[key]["value"] for key in keys])

    def _kept(self, name: str, *common: object) -> ResultCache:
        return ResultCache(self.directory / f"{name}.{content_key(*common)}.jsonl")


def token_logps(model, sequences: Sequence[EncodedExample], pad: int, hidden: bool = False):
    """Log-probabilities of every answer token, in one forward pass.

    The output head runs only at positions that predict an answer token.

    Returns
    -------
    logps : Tensor [rows, longest answer]
        log p(token | everything before it), float32; 0 where ``mask`` is 0.
    mask : Tensor [rows, longest answer]
    last_hidden : Tensor [rows, longest answer, hidden], only if ``hidden``
        Hidden states at the positions that predict each answer token.
    """
    ids, states = _read(model, sequences, pad)
    lengths = [len(s) - s.answer_start for s in sequences]
    longest = max(lengths)
    where = torch.zeros(len(sequences), longest, dtype=torch.long, device=ids.device)
    mask = torch.zeros(len(sequences), longest, device=ids.device)
    for row, (sequence, length) in enumerate(zip(sequences, lengths)):
        where[row, :length] = torch.arange(sequence.answer_start, len(sequence))
        mask[row, :length] = 1.0
    targets = ids.gather(1, where)
    # A pad position reads index 0; (0 - 1) would wrap round to the end, so it is clamped and masked.
    predicting = states.gather(
        1, (where - 1).clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
    )
    answered = mask.bool()
    logps = torch.zeros_like(mask).masked_scatter(
        answered, _target_logps(output_head(model), predicting[answered], targets[answered])
    )
    return (logps, mask, predicting) if hidden else (logps, mask)


def _read(
    model, sequences: Sequence[EncodedExample], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows, width], padded on the right, and the last hidden states [rows, width, hidden] (of padding: anything).

    Without gradients a prompt that several sequences of the batch share runs once."""
    ids, _ = pad_right([s.input_ids for s in sequences], pad, model.device)
    prompts = [s.prompt_ids for s in sequences]
    looks_back = set(getattr(model.config, "layer_types", None) or ()) - {
        "full_attention"
    }  # windows are counted in the cache
    if torch.is_grad_enabled() or looks_back or not _worth_sharing(sequences, prompts):
        # Padding comes after everything that is looked at, so that causal attention needs no mask, and leaves out half of the work.
        return ids, backbone(model)(input_ids=ids, use_cache=False).last_hidden_state
    place = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    owner = torch.tensor([place[prompt] for prompt in prompts], device=ids.device)
    cache = DynamicCache(config=model.config)
    prompt_ids, prompt_mask = pad_right(list(place), pad, ids.device)
    of_prompts = backbone(model)(
        input_ids=prompt_ids, past_key_values=cache, use_cache=True
    ).last_hidden_state
    cache.batch_select_indices(owner)
    answer_ids, answer_mask = pad_right([s.answer_ids for s in sequences], pad, ids.device)
    starts = torch.tensor([s.answer_start for s in sequences], device=ids.device)
    of_answers = backbone(model)(
        input_ids=answer_ids,
        attention_mask=torch.cat([prompt_mask[owner], answer_mask], 1),
        position_ids=starts[:, None] + torch.arange(answer_ids.shape[1], device=ids.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    states = of_prompts.new_zeros(*ids.shape, of_prompts.shape[-1])
    for row, (sequence, prompt) in enumerate(zip(sequences, owner.tolist())):
        start, end = sequence.answer_start, len(sequence)
        states[row, :start], states[row, start:end] = (
            of_prompts[prompt, :start],
            of_answers[row, : end - start],
        )
    return ids, states


LOGITS_AT_ONCE = 6_000_000
"""Logits in memory at a time (24 MB in float32): blocks that the allocator hands out again, instead of fetching new pages."""


def _target_logps(head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p(target | state) for states [tokens, hidden] and targets [tokens]: [tokens], float32."""
    rows, found = max(64, LOGITS_AT_ONCE // head.weight.shape[0]), []
    for part, wanted in zip(states.split(rows), targets.split(rows)):
        logits = head(part).float()
        found.append(logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(found)


def backbone(model):
    """The transformer without its output head, adapters included (PEFT patches it in place)."""
    causal = getattr(model, "base_model", model)
    causal = getattr(causal, "model", causal) if hasattr(model, "peft_config") else model
    return causal.base_model


def output_head(model):
    return model.get_output_embeddings()


@torch.no_grad()
def answer_logps(
    model,
    sequences: Sequence[EncodedExample],
    pad: int,
    rows: int = 16,
    desc: str = "log-likelihoods",
    each: Each | None = None,
):
    """Summed answer log-probabilities and answer lengths of many sequences, in the given order: two arrays [n]. ``each(index,
    sum)`` is called as soon as a sequence has one."""
    sums, counts = np.zeros(len(sequences)), np.zeros(len(sequences), dtype=int)
    for batch in progress(reading_batches(sequences, rows), desc=desc, unit="batch"):
        logps, mask = token_logps(model, [sequences[i] for i in batch], pad)
        sums[batch] = logps.double().sum(1).cpu().numpy()
        counts[batch] = mask.sum(1).long().cpu().numpy()
        for index in batch if each else ():
            each(index, sums[index])
    return sums, counts


@torch.no_grad()
def rewards(
    model,
    head: torch.Tensor,
    sequences: Sequence[EncodedExample],
    pad: int,
    rows: int = 16,
    desc: str = "rewards",
    each: Each | None = None,
) -> np.ndarray:
    """Scalar rewards [n] with the active (reward) adapter: head · hidden state of each sequence's last token. ``each`` as for
    :func:`answer_logps`."""
    values = np.zeros(len(sequences))
    for batch in progress(reading_batches(sequences, rows), desc=desc, unit="batch"):
        values[batch] = (
            last_token_rewards(model, head, [sequences[i] for i in batch], pad)
            .double()
            .cpu()
            .numpy()
        )
        for index in batch if each else ():
            each(index, values[index])
    return values


def last_token_rewards(
    model, head: torch.Tensor, sequences: Sequence[EncodedExample], pad: int
) -> torch.Tensor:
    """Rewards of one batch, shape [rows], with gradients."""
    states = end_states(model, sequences, pad)
    return states @ head.to(states.device)


def end_states(model, sequences: Sequence[EncodedExample], pad: int) -> torch.Tensor:
    """Last hidden state at each sequence's last token, [rows, hidden], float32, with gradients."""
    ids, states = _read(model, sequences, pad)
    last = torch.tensor([len(s) - 1 for s in sequences], device=ids.device)
    return states[torch.arange(len(sequences), device=ids.device), last].float()


@dataclass(frozen=True)
class Example:
    """One training example or evaluation item.

    ``sequences`` holds one sequence for next-token losses, two for pairwise ones: (chosen or winner, rejected or
    loser). ``id`` names it in tables and errors, ``source`` says where it came from, ``cluster`` which others it is not
    independent of (none: "").
    """

    id: str
    source: str
    sequences: tuple[EncodedExample, ...]
    cluster: str = ""


def flatten(examples: Sequence[Example]) -> list[EncodedExample]:
    """All sequences, an example's own next to each other: chosen_0, rejected_0, chosen_1, …"""
    return [sequence for example in examples for sequence in example.sequences]


def answer_token_logps(
    model, examples: Sequence[Example], pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of every answer token of ``flatten(examples)``, in order, with gradients: [tokens], float32;
    and whose they are, as an index into ``flatten(examples)``: [tokens]."""
    head = output_head(model)
    if type(head) is not torch.nn.Linear:
        raise StudyError(
            "gradients: the output head carries LoRA or is no linear layer; target other layers with LoRA"
        )
    packed = _pack(examples)
    states = _states(model, packed, pad)
    row, column = torch.tensor(packed.predicting, device=states.device).view(-1, 2).T
    targets = torch.tensor(packed.targets, device=states.device, dtype=torch.long)
    logps = _ChosenLogps.apply(states[row, column], head.weight, head.bias, targets)
    return logps, torch.tensor(packed.owner, device=states.device, dtype=torch.long)


def end_token_states(model, examples: Sequence[Example], pad: int) -> torch.Tensor:
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


def _pack(examples: Sequence[Example]) -> _Packed:
    packed = _Packed([], [], [], [], [], [], [])
    for row, example in enumerate(examples):
        shared = _common_prompt(example)
        ids, positions, segments = (
            list(example.sequences[0].input_ids[:shared]),
            list(range(shared)),
            [0] * shared,
        )
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
        raise StudyError(
            f"gradients: a token id is beyond the {vocabulary} of this model; the examples were made with "
            "another model's tokenizer"
        )
    ids, real = pad_right(packed.rows, pad, model.device)
    segments = pad_right(packed.segments, 0, ids.device)[0].masked_fill(real == 0, -1)
    positions = pad_right(packed.positions, 0, ids.device)[0]
    return backbone(model)(
        input_ids=ids,
        attention_mask=option_mask(model, segments, positions),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state


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
                derivative[part] = (
                    weight[targets[part]].float() - (shares.to(weight.dtype) @ weight).float()
                )
        context.save_for_backward(derivative)
        context.dtype = states.dtype
        return logps

    @staticmethod
    def backward(context, g):
        (derivative,) = context.saved_tensors
        return (g[:, None] * derivative).to(context.dtype), None, None, None
