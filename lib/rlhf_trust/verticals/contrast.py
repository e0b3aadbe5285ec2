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
model: a contrast that tells nothing apart measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..chat import Chat
from ..decode import MultipleChoice

Pairs = Sequence[tuple[str, str]]


def continuations(
    ids: Sequence[str], texts: Sequence[str], pairs: Pairs, chat: Chat
) -> list[MultipleChoice]:
    """One choice a text: both endings of every pair, in order (2 × pairs options)."""
    endings = [f" {ending}" for pair in pairs for ending in pair]
    return [
        MultipleChoice(i, *chat.plain_options(text, endings, document=True))
        for i, text in zip(ids, texts)
    ]


def contexts(
    ids: Sequence[str], texts: Sequence[str], pairs: Pairs, chat: Chat
) -> list[MultipleChoice]:
    """2 × pairs choices a text, next to each other: the text itself after each context."""
    return [
        MultipleChoice(f"{i}:{context}", *chat.plain_options(context, [f" {text}"], document=True))
        for i, text in zip(ids, texts)
        for pair in pairs
        for context in pair
    ]


def contrasts(logps: Sequence[np.ndarray], items: int) -> np.ndarray:
    """Sum over pairs of log p of the first minus that of the second, [items], nats; ``logps``: of
    :func:`continuations` or :func:`contexts`, in order."""
    pairs = np.concatenate([np.asarray(some) for some in logps]).reshape(items, -1, 2)
    return (pairs[..., 0] - pairs[..., 1]).sum(1)
