"""Random projection of gradients: fewer numbers an example, inner products kept up to a known error.

A sparse Johnson-Lindenstrauss matrix S [k, d] in the block construction of Kane and Nelson (Sparser
Johnson-Lindenstrauss Transforms, J. ACM 61, 2014, arXiv 1012.1577): the k rows stand in s groups, and every column has
one entry ±1/√s in each group, at a random place with a random sign. One group alone is the count sketch. For vectors
x and y, over the draw of S:

    E  <Sx, Sy> = <x, y>
    Var <Sx, Sy> = ( |x|² |y|² + <x, y>² − 2 Σ_i x_i² y_i² ) / k

A group is a count sketch with k/s rows, whose variance is the above with k/s for k, and <Sx, Sy> is the mean of s
independent ones; so s does not change the variance, only the tails: with k of order ε⁻² log(1/δ) and s of order
ε⁻¹ log(1/δ), ``| |Sx|² − |x|² | > ε |x|²`` has a probability of at most δ.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.sparse import csr_array

from .. import StudyError
from .store import Gradients


@dataclass(frozen=True)
class Projection:
    """A projection of each layer's gradient to ``dimension`` numbers, drawn from ``seed`` and the layer's name.

    ``nonzeros``: entries s a column. Layers that are no wider than ``dimension`` stay as they are.
    """

    dimension: int
    seed: int = 0
    nonzeros: int = 4

    def __post_init__(self):
        if self.nonzeros < 1 or self.dimension < 1 or self.dimension % self.nonzeros:
            raise StudyError(
                f"projection: dimension must be a multiple of nonzeros, got {self.dimension} and "
                f"{self.nonzeros}"
            )

    def width(self, width: int) -> int:
        """Entries after projection of a layer with ``width`` entries."""
        return min(width, self.dimension)

    def __call__(self, layer: str, block: torch.Tensor) -> torch.Tensor:
        """[n, d] → [n, width(d)], float32; the same input gives the same output, whatever else is in the block."""
        if block.shape[1] <= self.dimension:
            return block
        return torch.from_numpy(block.numpy() @ _matrix(self, layer, block.shape[1]))

    def variance(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Var <Sx, Sy> of rows x, y [n, d] of one layer, over the draw of S: [n], float64."""
        x, y = x.double(), y.double()
        if x.shape[-1] <= self.dimension:
            return torch.zeros(x.shape[:-1], dtype=torch.float64)
        squares = x.square().sum(-1) * y.square().sum(-1)
        return (squares + (x * y).sum(-1).square() - 2 * (x * y).square().sum(-1)) / self.dimension


@lru_cache(maxsize=512)  # s × d numbers a layer: 74 KB for d = 4,608
def _matrix(projection: Projection, layer: str, width: int) -> csr_array:
    """Sᵀ [d, k], float32."""
    digest = hashlib.sha256(f"{projection.seed}\0{layer}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    s, group = projection.nonzeros, projection.dimension // projection.nonzeros
    places = rng.integers(group, size=(width, s)) + group * np.arange(s)
    values = rng.choice([-1.0, 1.0], size=(width, s)) / np.sqrt(s)
    starts = np.arange(0, width * s + 1, s)
    return csr_array(
        (values.ravel().astype(np.float32), places.ravel(), starts),
        shape=(width, projection.dimension),
    )


@dataclass(frozen=True)
class ProjectionError:
    """Errors of projected inner products <Sx, Sy> − <x, y>, over |x| |y|, of ``pairs`` pairs of examples.

    ``measured``: their root mean square for gradients of all layers taken together; ``predicted``: what the variance
    says it is on average over seeds; ``largest``: the largest; ``layerwise`` and ``layerwise_predicted``: root mean
    squares layer by layer, over |x_l| |y_l|.
    """

    measured: float
    predicted: float
    largest: float
    layerwise: float
    layerwise_predicted: float
    pairs: int


def projection_error(
    gradients: Gradients, projection: Projection, pairs: int = 200, seed: int = 0
) -> ProjectionError:
    """The error of ``projection`` on pairs of examples drawn from unprojected ``gradients``.

    Examples come from the first block of the gradients, so memory is bounded by it. Pairs of different examples, with
    replacement. Raises a ``StudyError`` where there are fewer than two examples with a gradient.
    """
    squares = None
    totals, layerwise = {}, []
    for layer in gradients.layers:
        rows, block = next(iter(gradients.blocks(layer)))
        if squares is None:
            squares = gradients.squares[rows]
            usable = squares.sum(1).nonzero().squeeze(1).numpy()
            if len(usable) < 2:
                raise StudyError(
                    "projection error: needs two examples whose gradients are not zero"
                )
            rng = np.random.default_rng(seed)
            first, second = np.stack(
                [rng.choice(usable, 2, replace=False) for _ in range(pairs)], 1
            )
        projected, exact = projection(layer, block).double(), block.double()
        errors = (projected[first] * projected[second]).sum(1) - (exact[first] * exact[second]).sum(
            1
        )
        variance = projection.variance(exact[first], exact[second])
        norms = (exact[first].square().sum(1) * exact[second].square().sum(1)).sqrt()
        layerwise.append(
            (errors[norms > 0] / norms[norms > 0], variance[norms > 0] / norms[norms > 0].square())
        )
        for name, value in (
            ("error", errors),
            ("variance", variance),
        ):  # independent draws: variances of layers add up
            totals[name] = totals.get(name, 0) + value
    norms = (squares[first].sum(1) * squares[second].sum(1)).sqrt()
    relative, by_layer = totals["error"] / norms, [torch.cat(values) for values in zip(*layerwise)]
    return ProjectionError(
        measured=relative.square().mean().sqrt().item(),
        predicted=(totals["variance"] / norms.square()).mean().sqrt().item(),
        largest=relative.abs().max().item(),
        layerwise=by_layer[0].square().mean().sqrt().item(),
        layerwise_predicted=by_layer[1].mean().sqrt().item(),
        pairs=pairs,
    )
