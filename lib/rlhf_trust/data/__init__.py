"""Data sets as typed rows: preference pairs here, the benchmarks in ``verticals``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import zip_longest


def shuffle_key(text: str, seed: int) -> str:
    """Sorting by this key shuffles: the same order everywhere for one seed."""
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


def choose(items: Sequence, n: int, seed: int, by: Callable = lambda item: None) -> list:
    """Up to ``n`` items in a seeded order of their ids, one from each group in turn.

    ``by``: names an item's group. Groups that run out are skipped.
    """
    groups: dict = {}
    for item in sorted(items, key=lambda item: shuffle_key(item.id, seed)):
        groups.setdefault(by(item), []).append(item)
    rounds = zip_longest(*(groups[key] for key in sorted(groups, key=str)))
    return [item for one_each in rounds for item in one_each if item is not None][:n]
