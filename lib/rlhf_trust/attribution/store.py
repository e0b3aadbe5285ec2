"""Per-example gradients as solvers read them: layer by layer, a block of examples at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from .. import StudyError

MANIFEST = "manifest.json"
NUMBER_FORMATS = ("float32", "float16")


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

    def __init__(self, tensors: Mapping[str, torch.Tensor], ids: Sequence[str]):
        if not tensors:
            raise StudyError("gradients: there is no layer")
        self.layers, self.ids = tuple(sorted(tensors)), tuple(ids)
        for layer in self.layers:
            if tensors[layer].ndim != 2 or len(tensors[layer]) != len(self.ids):
                raise StudyError(
                    f"gradients: {layer} has the shape {tuple(tensors[layer].shape)} for {len(self.ids)} examples"
                )
        self._tensors = dict(tensors)
        self.squares = torch.stack(
            [tensors[layer].double().square().sum(1) for layer in self.layers], 1
        )

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        return self._tensors[layer].shape[1]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(0, len(self)), self._tensors[layer]


class Scaled:
    """:class:`Gradients` with each example's multiplied by a factor of its own, [n]: of a mean over tokens from its sum."""

    def __init__(self, gradients: Gradients, factors: Sequence[float]):
        self._gradients, self._factors = gradients, torch.tensor(factors, dtype=torch.float64)
        if len(self._factors) != len(gradients):
            raise StudyError(
                f"gradients: {len(self._factors)} factors for {len(gradients)} examples"
            )
        self.layers, self.ids = gradients.layers, gradients.ids
        self.squares = gradients.squares * self._factors.square()[:, None]

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        return self._gradients.width(layer)

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows, block in self._gradients.blocks(layer):
            yield rows, block * self._factors[rows, None].float()


class Stored:
    """:class:`Gradients` in files, as ``gradients.stored_gradients`` writes them.

    A folder with one safetensors file per block of examples (``block-00000.safetensors``, …) and ``manifest.json``. A
    block holds, for b examples and L layers, each layer's gradients [b, d] in float32 or float16, ``squares`` [b, L]
    (float64, of the gradients as they are read back) and for float16 ``scales`` [b, L] (float64): see :func:`encoded`.
    Reading takes one layer of one block into memory at a time.
    """

    def __init__(self, directory: Path, manifest: dict, holder: object = None):
        self.directory, self._manifest = directory, manifest
        self._holder = holder  # a temporary folder lives as long as this
        self.ids, self.layers = tuple(manifest["ids"]), tuple(sorted(manifest["layers"]))
        self.squares = torch.cat([self._read(path, "squares") for _, path in self._files()])

    @classmethod
    def open(cls, directory: Path | str) -> Stored:
        """The gradients in ``directory``; a ``StudyError`` where there are none, or not all."""
        directory = Path(directory)
        manifest = read_manifest(directory)
        if manifest is None:
            raise StudyError(
                f"{directory}: no stored gradients there (no readable {MANIFEST}); compute them with "
                "stored_gradients"
            )
        done, wanted = len(manifest["blocks"]), -(-len(manifest["ids"]) // manifest["block"])
        if done < wanted:
            raise StudyError(
                f"{directory}: {done} of {wanted} blocks are there; run stored_gradients again, it goes on "
                "where it stopped"
            )
        return cls(directory, manifest)

    @property
    def parts(self) -> dict[str, str]:
        """What the gradients are of, part by part: a hash each, by a name that a message can use."""
        return dict(self._manifest["parts"])

    @property
    def key(self) -> str:
        """Identifies the gradients and all that could change them."""
        return self._manifest["key"]

    def check(self, parts: Mapping[str, str]) -> None:
        """Raises a ``StudyError`` that names those of ``parts`` (``gradients.content_parts``) that differ."""
        check_parts(self.directory, self.parts, parts)

    def __len__(self) -> int:
        return len(self.ids)

    def width(self, layer: str) -> int:
        return self._manifest["layers"][layer]

    def blocks(self, layer: str) -> Iterator[tuple[slice, torch.Tensor]]:
        column = self.layers.index(layer)
        for rows, path in self._files():
            yield rows, decoded(lambda name: self._read(path, name), layer, column)

    def in_memory(self) -> InMemory:
        """All of it at once: for evaluation items, of which there are few."""
        return InMemory(
            {layer: torch.cat([block for _, block in self.blocks(layer)]) for layer in self.layers},
            self.ids,
        )

    def _files(self) -> Iterator[tuple[slice, Path]]:
        for start, stop, name in block_names(len(self.ids), self._manifest["block"]):
            yield slice(start, stop), self.directory / name

    def _read(self, path: Path, name: str) -> torch.Tensor:
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            reason = (str(error).splitlines() or ["no message"])[0]
            raise StudyError(
                f"{path}: cannot be read ({reason}); run stored_gradients again, it computes it anew"
            ) from None


def same_adapter(first: Stored, second: Stored) -> None:
    """Raises a ``StudyError`` unless both are gradients of one adapter of one base model: others have no inner
    product that means anything."""
    parts = {part: first.parts[part] for part in ("base model", "adapter")}
    check_parts(second.directory, second.parts, parts)


def check_parts(directory: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises a ``StudyError`` that names the parts that differ."""
    odd = [
        f"{part}: {found.get(part)}, not {value}"
        for part, value in wanted.items()
        if found.get(part) != value
    ]
    if odd:
        raise StudyError(
            f"{directory}: the stored gradients are not of what was asked for ({'; '.join(odd)}); delete the "
            "folder, or read the one that belongs to this run"
        )


def block_names(n: int, block: int) -> list[tuple[int, int, str]]:
    """First row, end row and file name of every block."""
    return [
        (start, min(start + block, n), f"block-{index:05}.safetensors")
        for index, start in enumerate(range(0, n, block))
    ]


def read_manifest(directory: Path) -> dict | None:
    """A folder's manifest; None where it is missing or damaged."""
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def encoded(block: Mapping[str, torch.Tensor], number_format: str) -> dict[str, torch.Tensor]:
    """One block's tensors as they are stored: layer → [b, d] float32, with ``squares`` (and ``scales``).

    float16 has 11 bits and a narrow range (6·10⁻⁸ to 65,504), and gradients of one layer differ by orders of magnitude
    between examples. Each example's gradient of a layer is therefore divided by a power of two, ``scales`` [b, L], that
    brings its largest entry between 2¹⁴ and 2¹⁵: none overflows, and an entry x comes back with an error of at most
    2⁻¹¹ |x|, or 2⁻³⁹ of the example's largest entry in that layer where that is more.
    """
    layers, tensors, squares, scales = sorted(block), {}, [], []
    for column, layer in enumerate(layers):
        rows = block[layer]
        if number_format == "float16":
            _, exponents = torch.frexp(rows.abs().amax(1).double())
            scale = torch.ldexp(torch.ones(len(rows), dtype=torch.float64), exponents - 15)
            scales.append(scale)
            tensors[layer] = (rows.double() / scale[:, None]).half()
            rows = _scaled_back(tensors[layer], scale)
        else:
            tensors[layer] = rows.contiguous()
        squares.append(rows.double().square().sum(1))
    tensors["squares"] = torch.stack(squares, 1)
    if scales:
        tensors["scales"] = torch.stack(scales, 1)
    return tensors


def decoded(read: Callable[[str], torch.Tensor], layer: str, column: int) -> torch.Tensor:
    """A layer [b, d] of a block, in float32. ``read``: name → tensor of the block; ``column``: the layer's in ``scales``."""
    rows = read(layer)
    return rows if rows.dtype == torch.float32 else _scaled_back(rows, read("scales")[:, column])


def _scaled_back(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (rows.double() * scale[:, None]).float()
