"""Per-example gradients as solvers read them: layer by layer, a block of examples at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence as Seq
from typing import Protocol

import torch

from .. import StudyError


class Gradients(Protocol):
    """Gradients of n examples with respect to L layer weights."""

    layers: tuple[str, ...]
    """Names of the layer weights, sorted: sums over layers are then the same to the bit, wherever they were read."""

    ids: tuple[str, ...]
    """The examples, in the order of the rows."""

    squares: torch.Tensor
    """Squared norms of each example's gradient by layer, [n, L], float64."""

    def __len__(self) -> int:
        """n."""

    def width(self, layer: str) -> int:
        """Entries d of a layer's gradient."""

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """The layer's gradients in blocks of examples: (rows, float32 [len(rows), d]), in order, without gaps."""


class InMemory:
    """:class:`Gradients` from tensors: layer weight name → [n, d], rows in the order of ``ids``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ids: Seq[str]):
        if not tensors:
            raise StudyError("gradients: there is no layer")
        self.layers, self.ids = tuple(sorted(tensors)), tuple(ids)
        for layer in self.layers:
            if tensors[layer].ndim != 2 or len(tensors[layer]) != len(self.ids):
                raise StudyError(f"gradients: {layer} has the shape {tuple(tensors[layer].shape)} for {len(self.ids)} examples")
        self._tensors = dict(tensors)
        self.squares = torch.stack([tensors[layer].double().square().sum(1) for layer in self.layers], 1)

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        return self._tensors[layer].shape[1]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(0, len(self)), self._tensors[layer]
