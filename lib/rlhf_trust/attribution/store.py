"""Per-example gradients as solvers read them: layer by layer, a block of examples at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open


class Gradients:
    """Gradients of n examples with respect to L layer weights."""

    layers: tuple[str, ...]
    """Names of the layer weights, sorted: sums over layers are then the same to the bit
    everywhere."""

    ids: tuple[str, ...]
    """The examples, in the order of the rows."""

    squares: torch.Tensor
    """Squared norms of each example's gradient by layer, [n, L], float64."""

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        """Entries d of a layer's gradient."""

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of examples in order, without gaps: (rows, float32 [len(rows), d])."""


def whole(gradients: Gradients, layer: str) -> torch.Tensor:
    """All gradients of a layer, [n, d] float64."""
    found = torch.empty(len(gradients), gradients.width(layer), dtype=torch.float64)
    for rows, block in gradients.blocks(layer):
        found[rows] = block.to(found)
    return found


class InMemory(Gradients):
    """:class:`Gradients` from tensors: layer weight name → [n, d], rows in the order of ``ids``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[str]):
        self.layers, self.ids, self._tensors = tuple(sorted(tensors)), tuple(ids), dict(tensors)
        squares = [tensors[layer].double().square().sum(1) for layer in self.layers]
        self.squares = torch.stack(squares, 1)

    def width(self, layer: str) -> int:
        return self._tensors[layer].shape[1]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(0, len(self)), self._tensors[layer]


class Scaled(Gradients):
    """:class:`Gradients` with each example's multiplied by a factor of its own, [n].

    The gradient of a mean over tokens is that of their sum, divided: no second backward pass.
    """

    def __init__(self, gradients: Gradients, factors: Sequence[float]):
        self._gradients, self._factors = gradients, torch.tensor(factors, dtype=torch.float64)
        self.layers, self.ids, self.width = gradients.layers, gradients.ids, gradients.width
        self.squares = gradients.squares * self._factors.square()[:, None]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, block in self._gradients.blocks(layer):
            yield rows, block * self._factors[rows, None].float()


class Joined(Gradients):
    """Several sets of examples as one, in order."""

    def __init__(self, *parts: Gradients):
        self._parts, self.layers, self.width = parts, parts[0].layers, parts[0].width
        self.ids = tuple(id for part in parts for id in part.ids)
        self.squares = torch.cat([part.squares for part in parts])

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        start = 0
        for part in self._parts:
            for rows, block in part.blocks(layer):
                yield slice(start + rows.start, start + rows.stop), block
            start += len(part)


class Stored(Gradients):
    """:class:`Gradients` in files, as ``gradients.stored_gradients`` writes them.

    A folder with ``manifest.json`` and one safetensors file per block of examples. A block holds,
    for b examples and L layers, each layer's gradients [b, d] and ``squares`` [b, L], see
    :func:`encoded`. Reading takes one layer of one block into memory at a time.
    """

    def __init__(self, directory: Path, manifest: dict):
        self.directory, self._widths = directory, manifest["layers"]
        self.layers, self.ids = tuple(sorted(self._widths)), tuple(manifest["ids"])
        blocks = block_files(len(self), manifest["block"])
        self._files = [(rows, directory / file) for rows, file in blocks]
        squares = []
        for _, path in self._files:
            with safe_open(path, "pt") as file:
                squares.append(file.get_tensor("squares"))
        self.squares = torch.cat(squares)

    def width(self, layer: str) -> int:
        return self._widths[layer]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, path in self._files:
            with safe_open(path, "pt") as file:
                yield rows, decoded(file.get_tensor, layer)


def block_files(n: int, block: int) -> list[tuple[slice, str]]:
    """Rows and file name of every block of ``n`` examples."""
    rows = [slice(start, min(start + block, n)) for start in range(0, n, block)]
    return [(some, f"block-{index:05}.safetensors") for index, some in enumerate(rows)]


def encoded(block: Mapping[str, torch.Tensor], number_format: str) -> dict[str, torch.Tensor]:
    """One block's tensors as they are stored, from layer → [b, d] float32.

    Beside the layers lie ``squares`` [b, L], of the gradients as they are read back (float64), and
    for float16 a ``<layer>.scale`` [b, 1] (float64). float16 has 11 bits and a narrow range
    (6·10⁻⁸ to 65,504), and gradients of one layer differ by orders of magnitude between examples.
    Each example's gradient of a layer is therefore divided by a power of two that brings its
    largest entry between 2¹⁴ and 2¹⁵. Nothing overflows, and an entry x comes back with an error
    of at most 2⁻¹¹ |x|, or 2⁻³⁹ of the example's largest entry in that layer where that is more.
    """
    tensors, squares = {}, []
    for layer in sorted(block):
        tensors[layer] = block[layer].contiguous()
        if number_format == "float16":
            _, exponents = torch.frexp(block[layer].abs().amax(1, keepdim=True).double())
            scale = torch.ldexp(torch.ones_like(exponents, dtype=torch.float64), exponents - 15)
            tensors[f"{layer}.scale"] = scale
            tensors[layer] = (block[layer].double() / scale).half()
        squares.append(decoded(tensors.__getitem__, layer).double().square().sum(1))
    return tensors | {"squares": torch.stack(squares, 1)}


def decoded(read: Callable[[str], torch.Tensor], layer: str) -> torch.Tensor:
    """A layer [b, d] of a block, in float32. ``read``: name → tensor of the block."""
    rows = read(layer)
    if rows.dtype == torch.float32:
        return rows
    return (rows.double() * read(f"{layer}.scale")).float()
