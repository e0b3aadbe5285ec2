"""Influence of training examples on an evaluation loss, from stored gradients.

Up-weighting training example i by a little moves the optimum by ``- H⁻¹ g_i``, so an evaluation loss with gradient v
changes by ``- vᵀ H⁻¹ g_i`` (Koh and Liang 2017, arXiv 1703.04730). Solvers differ in what they take for H⁻¹. For
layer weight l with d_l entries, training gradients g_{l,i}, i = 1..n, and evaluation gradient v_l:

==================  ================================================================================================
datainf             layer by layer, the mean over examples of (g gᵀ + λ I)⁻¹ (Kwon, Wu, Wu and Zou, ICLR 2024, arXiv
                    2310.00902):  influence_i = − Σ_l r_lᵀ g_{l,i}  with
                    r_l = 1/(n λ_l) · Σ_i ( v_l − (v_lᵀ g_{l,i}) / (λ_l + ‖g_{l,i}‖²) · g_{l,i} )
exact_layerwise     layer by layer, the inverse of H_l = mean_i g_{l,i} g_{l,i}ᵀ + λ_l I itself, which DataInf replaces
                    by swapping mean and inverse
exact_joint         the inverse of H = mean_i g_i g_iᵀ + λ I over all layers at once, g_i being all weights' gradients
gradient_dot        H = I:  − vᵀ g_i
gradient_cosine     − vᵀ g_i / (‖v‖ ‖g_i‖), both over all layers
random_scores       nothing: standard normal numbers
tfidf               the texts alone, nothing of the model: − cosine similarity of TF-IDF vectors
==================  ================================================================================================

The exact inverses never make a matrix of size d × d: by Woodbury, with the rows g_i in G [n, d] and K = G Gᵀ [n, n],

    vᵀ (Gᵀ G / n + λ I)⁻¹ Gᵀ = n (v Gᵀ) (K + n λ I)⁻¹

Sign, here and in all that reads scores: **positive** means that up-weighting example i *raises* the evaluation loss.
With the study's proxy losses (loss of the answer after the stage against the answer before) a negative score means
that the example *drives* the change that the stage made, a positive one that it *opposes* it; whether that is good or
bad is the vertical's to say. A similar text or gradient, then, has a negative score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite

import numpy as np
import torch
from scipy.linalg import LinAlgError, blas, cho_factor, cho_solve
from sklearn.feature_extraction.text import TfidfVectorizer

from .. import StudyError
from .store import Gradients

CHUNK = 128
"""Rows turned into float64 at a time: they stay in the processor's cache."""

PRECISION = 1e-5
"""What float32 products may cost, relative to an item's largest score in the layer; else the layer is done in float64."""


@dataclass(frozen=True)
class Damping:
    """λ: ``factor`` times the mean squared gradient entry, the paper's rule with 0.1, unless it is a fixed ``value``.

    The mean is over examples and entries, λ_l = factor · mean_i mean(g_{l,i}²): of each layer for the layer-wise
    solvers, of all layers for ``exact_joint``. A ``value`` (units of a squared gradient) is the same for every layer.
    """

    factor: float = 0.1
    value: float | None = None

    def __post_init__(self):
        given = self.factor if self.value is None else self.value
        if not (given > 0 and isfinite(given)):
            raise StudyError(f"damping: must be a number above 0, got {given}")

    def of(self, squares: torch.Tensor, width: int) -> float:
        """λ for gradients with squared norms ``squares`` [n] and ``width`` entries."""
        return self.factor * squares.mean().item() / width if self.value is None else self.value


@dataclass(frozen=True)
class Scores:
    """Influence of n training examples on m evaluation items; for the damped solvers in units of the evaluation loss.

    - ``by_item`` [n, m]: summed over layers;
    - ``by_layer`` [L, n]: of the mean evaluation gradient, in the order of ``layers``. Only where a layer's scores come
      from that layer's gradients alone (``datainf``, ``exact_layerwise``, ``gradient_dot``), since that is what
      ``contribution.example_z`` reads from them; else [0, n] and ``layers`` is empty;
    - ``groups``: label → the same for the items with that label, where solvers were given ``groups``. (Verticals are
      scored together for the price of one: reading and multiplying the training gradients is what costs.)

    All but cosines are linear in the evaluation gradient, so the scores of a mean gradient are the mean of the scores,
    and nothing is lost by keeping two margins of the [L, n, m] array.
    """

    layers: tuple[str, ...]
    by_item: np.ndarray
    by_layer: np.ndarray
    groups: dict[str, Scores] = field(default_factory=dict)

    @property
    def influence(self) -> np.ndarray:
        """Mean over items [n]: what tables call ``influence``."""
        return self.by_item.mean(1)


def datainf(
    train: Gradients,
    queries: Gradients,
    damping: Damping = Damping(),
    groups: Sequence[str] | None = None,
) -> Scores:
    """DataInf scores of every training example against every evaluation item (equation above).

    Parameters
    ----------
    train
        Gradients of n training examples.
    queries
        Gradients of m evaluation items with respect to the same layer weights, all items at once.
    damping
        λ_l.
    groups
        A label for each item [m], such as its vertical: ``Scores.groups`` has the scores of each.

    Three products of [m, d_l] and [n, d_l] matrices a layer, in two passes over its blocks; cost is linear in n. Memory
    is a block, r_l [m, d_l] and the scores. Products are taken in float32 and summed in float64; layers where the two
    terms of r_l cancel (near-parallel gradients) are done again in float64.

    Raises
    ------
    StudyError
        If the layers differ, there are fewer than two training examples or no evaluation item, a gradient is not
        finite, or all training gradients of a layer are zero; the message names the layer.
    """
    return _datainf(train, queries, [damping], groups)[0]


def exact_layerwise(
    train: Gradients,
    queries: Gradients,
    damping: Damping = Damping(),
    groups: Sequence[str] | None = None,
) -> Scores:
    """− v_lᵀ H_l⁻¹ g_{l,i} summed over layers: what DataInf approximates. Arguments and errors as for :func:`datainf`.

    O(n² Σ d_l) time; memory O(n² + n d_l): two n × n matrices and one layer's gradients in float64.
    """
    return _exact_layerwise(train, queries, [damping], groups)[0]


def exact_joint(
    train: Gradients,
    queries: Gradients,
    damping: Damping = Damping(),
    groups: Sequence[str] | None = None,
) -> Scores:
    """− vᵀ H⁻¹ g_i over all layers at once, with one λ; no ``by_layer``, since every layer's gradients act on all.

    Arguments, errors, time and memory (three n × n matrices) as for :func:`exact_layerwise`.
    """
    return _exact_joint(train, queries, [damping], groups)[0]


def gradient_dot(
    train: Gradients,
    queries: Gradients,
    damping: Damping | None = None,
    groups: Sequence[str] | None = None,
) -> Scores:
    """− vᵀ g_i, as after one step of gradient descent (TracIn, Pruthi et al. 2020, arXiv 2002.08484, at one checkpoint).

    Arguments and errors as for :func:`datainf`; ``damping`` has no part in it (solvers take the same arguments).
    """
    _check(train, queries)
    margins = _Margins(len(train), len(queries), groups)
    for layer in train.layers:
        margins.add(layer, -_products(train, layer, _whole(queries, layer)))
    return margins.scores()


def gradient_cosine(
    train: Gradients,
    queries: Gradients,
    damping: Damping | None = None,
    groups: Sequence[str] | None = None,
) -> Scores:
    """− cos(v, g_i) over all layers at once; 0 for a gradient that is zero. Arguments as for :func:`gradient_dot`."""
    dot = gradient_dot(train, queries).by_item
    lengths = torch.outer(train.squares.sum(1).sqrt(), queries.squares.sum(1).sqrt()).numpy()
    return of_items(dot / np.where(lengths > 0, lengths, 1.0), groups)


def random_scores(n: int, m: int, seed: int = 0, groups: Sequence[str] | None = None) -> Scores:
    """Standard normal scores of n examples for m items: what a solver has to beat."""
    return of_items(np.random.default_rng(seed).standard_normal((n, m)), groups)


def tfidf(
    train_texts: Sequence[str], query_texts: Sequence[str], groups: Sequence[str] | None = None
) -> Scores:
    """− cosine similarity of TF-IDF vectors (scikit-learn's defaults): [n, m] from n training and m evaluation texts.

    Words and their weights are the training texts' (a word that none of them has cannot tell them apart), so an item's
    scores do not depend on the other items.
    """
    if not len(train_texts) or not len(query_texts):
        raise StudyError("TF-IDF: there is no training text or no evaluation text")
    vectorizer = TfidfVectorizer()
    try:
        train = vectorizer.fit_transform(train_texts)
    except ValueError as error:  # no word of two letters anywhere
        raise StudyError(f"TF-IDF: the training texts have no words ({error})") from None
    return of_items(-(train @ vectorizer.transform(query_texts).T).toarray(), groups)


SOLVERS: dict[str, Callable[..., Scores]] = {
    "datainf": datainf,
    "exact_layerwise": exact_layerwise,
    "exact_joint": exact_joint,
    "gradient_dot": gradient_dot,
    "gradient_cosine": gradient_cosine,
}
"""The solvers that work on gradients, all called as ``solver(train, queries, damping, groups)``."""


def damping_sweep(
    train: Gradients,
    queries: Gradients,
    solver: str,
    factors: Sequence[float],
    groups: Sequence[str] | None = None,
) -> dict[float, Scores]:
    """Scores under λ = factor · mean squared entry, by factor; equal to the solver's own, one factor at a time.

    What does not depend on λ is done once: reading the gradients, and their products with evaluation gradients
    (DataInf) or with one another (exact solvers: a Cholesky decomposition of K + n λ I for each λ takes a fraction of
    the time that K takes, and of the eigendecomposition that would serve all of them).

    Raises
    ------
    StudyError
        If the solver has no damping, there is no factor, or as for :func:`datainf`.
    """
    if solver not in _DAMPED:
        raise StudyError(
            f"damping sweep: {solver!r} has no damping; solvers that have: {', '.join(_DAMPED)}"
        )
    if not len(factors):
        raise StudyError("damping sweep: there is no factor")
    return dict(
        zip(factors, _DAMPED[solver](train, queries, [Damping(f) for f in factors], groups))
    )


# --- for several λ at once -----------------------------------------------------------------------------------------


def _datainf(train: Gradients, queries: Gradients, dampings: list[Damping], groups) -> list[Scores]:
    _check(train, queries)
    margins = [_Margins(len(train), len(queries), groups) for _ in dampings]
    for index, layer in enumerate(train.layers):
        v, squares = _whole(queries, layer), train.squares[:, index]
        lams = torch.tensor(
            [d.of(squares, train.width(layer)) for d in dampings], dtype=torch.float64
        )
        first, second = _datainf_terms(train, layer, v, squares, lams, torch.float32)
        # Rounding errors of float32, as measured: a share of the terms, and of what a product of small cosine adds up.
        rounding = (
            4e-7 * first.abs().amax(-1)
            + 2e-8 * queries.squares[:, index].sqrt() * squares.max().sqrt()
        )
        if not (
            rounding <= PRECISION * (first - second).abs().amax(-1)
        ).all():  # also where float32 overflowed
            first, second = _datainf_terms(train, layer, v, squares, lams, torch.float64)
        for of_lam, lam, some in zip(margins, lams, first - second):
            of_lam.add(layer, -some / lam)
    return [m.scores() for m in margins]


def _datainf_terms(
    train: Gradients,
    layer: str,
    v: torch.Tensor,
    squares: torch.Tensor,
    lams: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """λ rᵀ g_k = vᵀ g_k − mean_i (vᵀ g_i) / (λ + ‖g_i‖²) · g_iᵀ g_k: the first term [m, n] and, for every λ, the second
    [λs, m, n]; float64."""
    n, m, v = len(train), len(v), v.to(dtype)
    first = torch.empty(m, n, dtype=torch.float64)
    sums = torch.zeros(len(lams) * m, train.width(layer), dtype=torch.float64)
    for rows, g in _chunks(train, layer, dtype):
        first[:, rows] = (v @ g.T).double()
        shares = first[:, rows] / (lams[:, None, None] + squares[rows])  # [λs, m, rows]
        sums += shares.flatten(0, 1).to(dtype) @ g
    sums = (sums / n).to(dtype)
    second = torch.empty(len(sums), n, dtype=torch.float64)
    for rows, g in _chunks(train, layer, dtype):
        second[:, rows] = (sums @ g.T).double()
    return first, second.view(len(lams), m, n)


def _exact_layerwise(
    train: Gradients, queries: Gradients, dampings: list[Damping], groups
) -> list[Scores]:
    _check(train, queries)
    margins = [_Margins(len(train), len(queries), groups) for _ in dampings]
    for index, layer in enumerate(train.layers):
        gram, products = _gram(train, queries, layer)
        for of_lam, damping in zip(margins, dampings):
            of_lam.add(
                layer,
                _damped(gram, products, damping.of(train.squares[:, index], train.width(layer))),
            )
    return [m.scores() for m in margins]


def _exact_joint(
    train: Gradients, queries: Gradients, dampings: list[Damping], groups
) -> list[Scores]:
    _check(train, queries)
    gram, products = 0.0, 0.0
    for layer in train.layers:
        of_layer = _gram(train, queries, layer)
        gram, products = gram + of_layer[0], products + of_layer[1]
    squares, width = train.squares.sum(1), sum(map(train.width, train.layers))
    return [
        of_items(_damped(gram, products, d.of(squares, width)).T.numpy(), groups) for d in dampings
    ]


_DAMPED = {"datainf": _datainf, "exact_layerwise": _exact_layerwise, "exact_joint": _exact_joint}


def _gram(train: Gradients, queries: Gradients, layer: str) -> tuple[np.ndarray, torch.Tensor]:
    """A layer's G Gᵀ [n, n], of which only the upper triangle is filled, and V Gᵀ [m, n]; float64."""
    g = _whole(train, layer)
    # Half the work of a product; G in rows is, to BLAS, its transpose in columns, so nothing is copied.
    return blas.dsyrk(1.0, g.numpy().T, trans=1), _whole(queries, layer) @ g.T


def _damped(gram: np.ndarray, products: torch.Tensor, lam: float) -> torch.Tensor:
    """− n V Gᵀ (K + n λ I)⁻¹ [m, n]."""
    n = len(gram)
    system = gram.copy(order="F")
    system[np.diag_indices(n)] += n * lam
    try:
        factor = cho_factor(system, overwrite_a=True, check_finite=False)
    except LinAlgError:
        raise StudyError(
            f"damping: λ = {lam:.1e} is too small beside the gradients for an exact solution"
        ) from None
    return torch.from_numpy(-n * cho_solve(factor, products.numpy().T, check_finite=False).T)


# --- what solvers share --------------------------------------------------------------------------------------------


def _check(train: Gradients, queries: Gradients) -> None:
    n, m = len(train), len(queries)
    if train.layers != queries.layers:
        odd = (sorted(set(train.layers) ^ set(queries.layers)) or ["their order"])[0]
        raise StudyError(
            f"attribution: training and evaluation gradients differ in their layers ({odd}); take both from "
            "the same adapter"
        )
    if n < 2:
        raise StudyError(
            f"attribution: {n} training example(s); influence compares examples, so it needs at least 2"
        )
    if m == 0:
        raise StudyError(
            "attribution: no evaluation item is left; where no answer changed, report 'no change' instead"
        )
    for layer in train.layers:
        if train.width(layer) != queries.width(layer):
            raise StudyError(
                f"attribution: {layer} has {train.width(layer)} entries in training gradients and "
                f"{queries.width(layer)} in evaluation gradients; take both from the same adapter and projection"
            )
    for which, gradients in (("training", train), ("evaluation", queries)):
        bad = (~gradients.squares.isfinite()).nonzero().tolist()
        if bad:
            example, layer = bad[0]
            raise StudyError(
                f"attribution: the {which} gradient of example {gradients.ids[example]!r} is not finite in "
                f"{gradients.layers[layer]}; check its text and loss"
            )
    for layer, largest in zip(train.layers, train.squares.amax(0).tolist()):
        if largest == 0:
            raise StudyError(
                f"attribution: every training gradient of {layer} is zero, and so is its damping λ; was this "
                "adapter trained (LoRA's B starts at zero, and A's gradient with it)?"
            )


def _whole(gradients: Gradients, layer: str) -> torch.Tensor:
    """A layer's gradients, [examples, d] float64."""
    whole = torch.empty(len(gradients), gradients.width(layer), dtype=torch.float64)
    for rows, block in gradients.blocks(layer):
        whole[rows] = block.to(whole)
    return whole


def _chunks(
    gradients: Gradients, layer: str, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Blocks as they come, or ``CHUNK`` rows at a time in another number format, in memory that the next will overwrite
    (new memory for each costs as much as a product)."""
    if dtype == torch.float32:
        yield from gradients.blocks(layer)
        return
    chunk = torch.empty(CHUNK, gradients.width(layer), dtype=dtype)
    for rows, block in gradients.blocks(layer):
        for start in range(0, len(block), CHUNK):
            part = block[start : start + CHUNK]
            yield (
                slice(rows.start + start, rows.start + start + len(part)),
                chunk[: len(part)].copy_(part),
            )


def _products(train: Gradients, layer: str, v: torch.Tensor) -> torch.Tensor:
    """V Gᵀ [m, n] in float64, from float32 products."""
    products, v = torch.empty(len(v), len(train), dtype=torch.float64), v.float()
    for rows, g in train.blocks(layer):
        products[:, rows] = (v @ g.T).double()
    return products


class _Margins:
    """Collects ``Scores`` layer by layer from that layer's scores [m, n]."""

    def __init__(self, n: int, m: int, groups: Sequence[str] | None):
        self.labels = _labels(groups, m)
        self.layers, self.by_item, self.by_layer = [], torch.zeros(m, n, dtype=torch.float64), []
        parts = [np.ones(m, bool), *(self.labels == label for label in dict.fromkeys(self.labels))]
        self.means = torch.from_numpy(
            np.array([part / part.sum() for part in parts])
        )  # [1 + groups, m]

    def add(self, layer: str, scores: torch.Tensor) -> None:
        if not scores.isfinite().all():
            raise StudyError(
                f"attribution: {layer} gives scores that are not finite; its gradients are too large or small"
            )
        self.layers.append(layer)
        self.by_item += scores
        self.by_layer.append(self.means @ scores)

    def scores(self) -> Scores:
        by_layer = torch.stack(self.by_layer, 1).numpy()  # [1 + groups, L, n]
        return _grouped(tuple(self.layers), self.by_item.T.numpy(), by_layer, self.labels)


def of_items(by_item: np.ndarray, groups: Sequence[str] | None = None) -> Scores:
    """``Scores`` without layers, from scores [n, m]."""
    labels = _labels(groups, by_item.shape[1])
    return _grouped((), by_item, np.zeros((1 + len(set(labels)), 0, len(by_item))), labels)


def _labels(groups: Sequence[str] | None, m: int) -> np.ndarray:
    if groups is not None and len(groups) != m:
        raise StudyError(f"attribution: {len(groups)} group labels for {m} evaluation items")
    return np.array([] if groups is None else list(groups), dtype=object)


def _grouped(
    layers: tuple[str, ...], by_item: np.ndarray, by_layer: np.ndarray, labels: np.ndarray
) -> Scores:
    groups = {
        label: Scores(layers, by_item[:, labels == label], of_group)
        for label, of_group in zip(dict.fromkeys(labels), by_layer[1:])
    }
    return Scores(layers, by_item, by_layer[0], groups)
