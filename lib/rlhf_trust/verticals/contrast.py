"""Likelihood contrasts: what a model takes for granted, without asking it.

A small model that is asked for a judgement answers by habit: it agrees with everything, or calls
everything wrong. What it has read still shows in what it finds likely. Plain text, outside any
conversation, is weighed in two ways:

- **by continuation**: after "I returned the wallet.", is "I feel proud." likelier than "I feel
  guilty."? The score is log p(first ending | text) − log p(second ending | text), summed over a
  few pairs of endings;
- **by context**: is "ice melts in the sun" likelier after "Everyone knows that" than after "Nobody
  believes that"? The score is log p(text | first context) − log p(text | second context). How
  likely the text is in itself cancels: it is its pointwise mutual information with the context.

Scores are in nats, have no natural zero (an ending may be likelier after any text), and so rank
items. Whether they rank them rightly is to be measured on items whose truth is known, for every
model: a contrast that tells nothing apart measures nothing. Several contrasts are put together by
rank (:func:`ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.stats import rankdata

from ..chat import Chat, EncodedExample
from ..decode import Generations, MultipleChoice
from ..models import ModelSet
from . import Logps
from .common import score_options

Texts = Sequence[str]
Pairs = Sequence[tuple[str, str]]


def continuations(ids: Texts, texts: Texts, pairs: Pairs, chat: Chat) -> list[MultipleChoice]:
    """One choice a text: both endings of every pair, in order (2 × pairs options)."""
    endings = [f" {ending}" for pair in pairs for ending in pair]
    return [
        MultipleChoice(i, *chat.plain_options(text, endings, document=True))
        for i, text in zip(ids, texts)
    ]


def contexts(ids: Texts, texts: Texts, pairs: Pairs, chat: Chat) -> list[MultipleChoice]:
    """2 × pairs choices a text, next to each other: the text itself after each context."""
    return [
        MultipleChoice(f"{i}:{context}", *chat.plain_options(context, [f" {text}"], document=True))
        for i, text in zip(ids, texts)
        for pair in pairs
        for context in pair
    ]


def documents(texts: Texts, pairs: Pairs, chat: Chat) -> list[EncodedExample]:
    """Each text after each context, as :func:`contexts` weighs it."""
    weighed = contexts(texts, texts, pairs, chat)
    return [EncodedExample(c.context + c.options[0], len(c.context)) for c in weighed]


def pair_contrasts(logps: Logps, items: int) -> np.ndarray:
    """log p of the first of each pair minus that of the second, [items, pairs], nats; ``logps``: of
    :func:`continuations` or :func:`contexts`, in order."""
    pairs = np.concatenate([np.asarray(some) for some in logps]).reshape(items, -1, 2)
    return pairs[..., 0] - pairs[..., 1]


def weighed(
    models: ModelSet, generations: Generations, name: str, way: Callable, ids, texts, pairs: Pairs
) -> dict[str, np.ndarray]:
    """Model name → its :func:`pair_contrasts` of the texts; ``way``: :func:`continuations` or
    :func:`contexts`; ``name``: of the cache."""
    logps = score_options(models, generations, name, partial(way, ids, texts, pairs))
    return {model: pair_contrasts(logps[model], len(ids)) for model in models.names}


def ranks(scores: np.ndarray) -> np.ndarray:
    """Each item's rank among all, over their number, in (0, 1]; ties share their mean rank.

    Contrasts differ in scale, and so do models: one ending may spread over twenty nats, another
    over two. Ranks give each contrast the same weight, and no item more than its place.
    ``scores``: [items] or, ranked column by column, [items, contrasts].
    """
    return rankdata(scores, axis=0) / max(1, len(scores))
