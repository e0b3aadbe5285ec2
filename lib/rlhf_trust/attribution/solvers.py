"""Influence of training examples on an evaluation loss, from stored gradients.

Up-weighting training example i by a little moves the optimum by ``- H⁻¹ g_i``, so an evaluation
loss with gradient v changes by ``- vᵀ H⁻¹ g_i`` (Koh and Liang 2017, arXiv 1703.04730). Solvers
differ in what they take for H⁻¹. For layer weight l with d_l entries, training gradients g_{l,i},
i = 1..n, and evaluation gradient v_l:

===============  =================================================================================
datainf          layer by layer, the mean over examples of (g gᵀ + λ I)⁻¹ (Kwon, Wu, Wu and Zou,
                 ICLR 2024, arXiv 2310.00902):  influence_i = − Σ_l r_lᵀ g_{l,i}  with
                 r_l = 1/(n λ_l) · Σ_i ( v_l − (v_lᵀ g_{l,i}) / (λ_l + ‖g_{l,i}‖²) · g_{l,i} )
exact_layerwise  layer by layer, the inverse of H_l = mean_i g_{l,i} g_{l,i}ᵀ + λ_l I itself,
                 which DataInf replaces by swapping mean and inverse
exact_joint      the inverse of H = mean_i g_i g_iᵀ + λ I over all layers at once, g_i being all
                 weights' gradients
gradient_dot     H = I:  − vᵀ g_i
gradient_cosine  − vᵀ g_i / (‖v‖ ‖g_i‖), both over all layers
ekfac            layer by layer, H_l diagonal in a Kronecker-factored eigenbasis
trackstar        − cosine of gradients, divided by the root of their mean square and whitened
random_scores    standard normal numbers: a baseline that uses nothing
tfidf            − cosine similarity of TF-IDF vectors: a baseline that uses the texts alone
bm25             − BM25, with the item as query: texts alone
sentence_cosine  − cosine similarity of embeddings by another model than the policy: texts alone
===============  =================================================================================

The exact inverses never form a d × d matrix: by Woodbury, with the rows g_i in G [n, d] and
K = G Gᵀ [n, n],

    vᵀ (Gᵀ G / n + λ I)⁻¹ Gᵀ = n (v Gᵀ) (K + n λ I)⁻¹

Sign, here and wherever scores are read: **positive** means that up-weighting example i *raises*
the evaluation loss. With the study's proxy losses (loss of the answer after the stage against the
answer before) a negative score means that the example *drives* the change that the stage made, a
positive one that it *opposes* it. A similar text or gradient, then, has a negative score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from scipy.linalg import LinAlgError, blas, cho_factor, cho_solve
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from torch.nn.functional import normalize

from .. import StudyError
from ..decode import batches_by_length
from .store import Gradients, whole

PRECISION = 1e-5
"""Largest rounding error of float32 products, relative to an item's largest score in the layer; a
layer with a larger one is done in float64."""

Groups = Sequence[str] | None
"""A label for each evaluation item [m], such as its vertical; None: no groups."""


@dataclass(frozen=True)
class Scores:
    """Influence of n training examples on m evaluation items; for the damped solvers in units of
    the evaluation loss.

    - ``by_item`` [n, m]: summed over layers;
    - ``by_layer`` [L, n]: of the mean evaluation gradient, in the order of the gradients'
      ``layers``. Only where a layer's scores come from that layer's gradients alone (``datainf``,
      ``exact_layerwise``, ``gradient_dot``), as ``contribution.example_z`` needs; else [0, n];
    - ``groups``: label → the same for the items with that label, where solvers were given
      ``groups``. Verticals are scored together at the price of one: reading and multiplying the
      training gradients dominates the cost.

    All but cosines are linear in the evaluation gradient, so the scores of a mean gradient are the
    mean of the scores, and two margins of the [L, n, m] array are all that is needed.
    """

    by_item: np.ndarray
    by_layer: np.ndarray
    groups: dict[str, Scores] = field(default_factory=dict)

    @property
    def influence(self) -> np.ndarray:
        """Mean over items [n]: the column ``influence`` of tables."""
        return self.by_item.mean(1)


def datainf(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """DataInf scores of every training example against every evaluation item (equation above).

    Parameters
    ----------
    train
        Gradients of n training examples.
    queries
        Gradients of m evaluation items with respect to the same layer weights, all items at once.
    damping
        λ_l over the mean squared gradient entry, λ_l = damping · mean_i mean(g_{l,i}²) (the paper's
        rule, with 0.1): of each layer for the layer-wise solvers, of all layers for the others.
    groups
        A label for each item [m], such as its vertical: ``Scores.groups`` has the scores of each.

    Three products of [m, d_l] and [n, d_l] matrices a layer, in two passes over its blocks; cost
    is linear in n. Memory is a block, r_l [m, d_l] and the scores. Products are taken in float32
    and summed in float64; layers where the two terms of r_l cancel (near-parallel gradients) are
    done in float64.

    Raises
    ------
    StudyError
        If there are fewer than two training examples or no evaluation item, or all training
        gradients of a layer are zero; the message names the layer.
    """
    return _layerwise(_datainf_layer, train, queries, damping, groups)


def exact_layerwise(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """− v_lᵀ H_l⁻¹ g_{l,i} summed over layers: what DataInf approximates. Arguments as
    :func:`datainf`.

    O(n² Σ d_l) time; memory O(n² + n d_l): two n × n matrices and one layer's gradients in float64.
    """
    return _layerwise(_exact_layer, train, queries, damping, groups)


def exact_joint(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """− vᵀ H⁻¹ g_i over all layers at once, with one λ; no ``by_layer``, since every layer's
    gradients act on all. Arguments, errors, time and memory as for :func:`exact_layerwise`."""
    _check(train, queries)
    gram, products = 0.0, 0.0
    for layer in train.layers:
        of_layer = _gram(train, queries, layer)
        gram, products = gram + of_layer[0], products + of_layer[1]
    lam = _lambda(damping, train.squares.sum(1), sum(map(train.width, train.layers)))
    return of_items(_damped(gram, products, lam).T.numpy(), groups)


def gradient_dot(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """− vᵀ g_i, as after one step of gradient descent (TracIn at one checkpoint, Pruthi et al.
    2020, arXiv 2002.08484). Arguments as for :func:`datainf`; ``damping`` is ignored."""
    return _layerwise(_dot_layer, train, queries, damping, groups)


def gradient_cosine(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """− cos(v, g_i) over all layers at once; 0 for a zero gradient. Arguments as
    :func:`gradient_dot`."""
    dot = gradient_dot(train, queries).by_item
    lengths = torch.outer(train.squares.sum(1).sqrt(), queries.squares.sum(1).sqrt()).numpy()
    return of_items(dot / np.where(lengths > 0, lengths, 1.0), groups)


def ekfac(
    train: Gradients,
    queries: Gradients,
    damping: float = 0.1,
    groups: Groups = None,
    rank: int = 8,
) -> Scores:
    """− v_lᵀ H_l⁻¹ g_{l,i} summed over layers, with H_l in a Kronecker-factored eigenbasis (EK-FAC:
    George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296).

    With G_i the gradient of one LoRA matrix as a matrix, U the eigenvectors of mean_i G_i G_iᵀ and
    W those of mean_i G_iᵀ G_i:  H_l = (U ⊗ W) diag(mean_i (Uᵀ G_i W)² + λ_l) (U ⊗ W)ᵀ.  λ_l is a
    share of the mean eigenvalue, as in Grosse et al., which is the mean squared gradient entry.

    The factors come from the stored gradients (as Shampoo's do), not from inputs and output
    gradients token by token, which would have to be caught in another backward pass.

    ``rank``: of the adapter, so that a row of a layer ``….lora_B.…`` is read as [d / rank, rank]
    and of any other as [rank, d / rank]. Other arguments and errors as for :func:`datainf`;
    O(n d (rank + d / rank)) time a layer.
    """
    return _layerwise(partial(_ekfac_layer, rank), train, queries, damping, groups)


def trackstar(
    train: Gradients, queries: Gradients, damping: float = 0.1, groups: Groups = None
) -> Scores:
    """− cosine of R^(−1/2) v / √s and R^(−1/2) g_i / √s over all layers at once (TrackStar: Chang
    et al. 2024, arXiv 2410.17413); 0 for a zero gradient.

    s is the mean squared training gradient, entry by entry, where the paper has the
    optimiser's second moments; an entry of 0 leaves its weight out. R = mean_i φ_i φ_iᵀ + λ I is
    the autocorrelation of the φ_i = g_i / √s. The paper projects them at random to keep R small;
    Woodbury's identity needs products of examples alone, which a projection would only blur.

    The paper has more examples than dimensions, and no λ; it also mixes the queries'
    autocorrelation into R, for which there are too few here.

    Arguments and errors as for :func:`exact_joint`.
    """
    _check(train, queries)
    n, products = len(train), 0.0
    for layer in train.layers:
        both = torch.cat([whole(train, layer), whole(queries, layer)])
        moments = both[:n].square().mean(0)
        both /= torch.where(moments > 0, moments, torch.inf).sqrt()
        products += both @ both.T
    lam = _lambda(damping, products.diagonal()[:n], sum(map(train.width, train.layers)))
    # λ φᵀ R⁻¹ φ' between all examples and items, by Woodbury.
    products += _damped(products[:n, :n].numpy(), products[:, :n], lam) @ products[:n] / n
    lengths = products.diagonal().clamp(min=0).sqrt()
    lengths[lengths == 0] = torch.inf
    return of_items(-(products / torch.outer(lengths, lengths))[:n, n:].numpy(), groups)


def random_scores(n: int, m: int, seed: int = 0, groups: Groups = None) -> Scores:
    """Standard normal scores of n examples for m items: what a solver has to beat."""
    return of_items(np.random.default_rng(seed).standard_normal((n, m)), groups)


def tfidf(train_texts: Sequence[str], query_texts: Sequence[str]) -> Scores:
    """− cosine similarity of TF-IDF vectors (scikit-learn's defaults): [n, m] from n and m texts.

    Words and their weights are the training texts' (a word that none of them has cannot tell them
    apart), so an item's scores do not depend on the other items.
    """
    train, queries = _counted(TfidfVectorizer(), train_texts, query_texts)
    return of_items(-(train @ queries.T).toarray())


def bm25(
    train_texts: Sequence[str], query_texts: Sequence[str], k1: float = 1.5, b: float = 0.75
) -> Scores:
    """− BM25 of each training text for the item as query (Robertson and Zaragoza 2009): [n, m].

    Σ over the item's words of  log(1 + (n − df + ½) / (df + ½)) · tf (k1 + 1) / (tf + K)  with
    K = k1 (1 − b + b · length / mean length),  tf the word's count in the training text and df the
    number of training texts that have it. Words as in :func:`tfidf`.
    """
    counts, queries = _counted(CountVectorizer(dtype=float), train_texts, query_texts)
    frequency, lengths = counts.getnnz(axis=0), counts.sum(1).A1
    scale = k1 * (1 - b + b * lengths / lengths.mean())
    counts.data *= (k1 + 1) / (counts.data + np.repeat(scale, counts.getnnz(axis=1)))
    weights = np.log1p((len(train_texts) - frequency + 0.5) / (frequency + 0.5))
    return of_items(-(counts.multiply(weights) @ queries.T).toarray())


@torch.no_grad()
def sentence_cosine(train_texts: Sequence[str], query_texts: Sequence[str], encoder) -> Scores:
    """− cosine similarity of sentence embeddings, the mean over a text's tokens of the encoder's
    last states: [n, m].

    ``encoder``: a model and its tokenizer (``sources.sentence_encoder``), neither of them the
    policy's. A text is cut after 256 tokens, the length that all-MiniLM was trained for.
    """
    (model, tokenizer), texts = encoder, [*train_texts, *query_texts]
    units = torch.empty(len(texts), model.config.hidden_size, dtype=torch.float64)
    for rows in batches_by_length(list(map(len, texts)), 32):
        some, how = [texts[i] for i in rows], {"padding": True, "truncation": True}
        inputs = tokenizer(some, max_length=256, return_tensors="pt", **how).to(model.device)
        states = model(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        units[rows] = normalize(states.sum(1).double()).cpu()
    n = len(train_texts)
    return of_items(-(units[:n] @ units[n:].T).numpy())


SOLVERS: dict[str, Callable[..., Scores]] = {
    "datainf": datainf,
    "exact_layerwise": exact_layerwise,
    "exact_joint": exact_joint,
    "gradient_dot": gradient_dot,
    "gradient_cosine": gradient_cosine,
}
"""The solvers that work on gradients, all called as ``solver(train, queries, damping, groups)``.
(:func:`gradient_solvers` has more.)"""


def gradient_solvers(rank: int) -> dict[str, Callable[..., Scores]]:
    """``SOLVERS`` and what else works on gradients, for adapters of one ``rank``."""
    return SOLVERS | {"ekfac": partial(ekfac, rank=rank), "trackstar": trackstar}


def score_all(
    train: Gradients,
    queries: Gradients,
    others: Mapping[str, Scores],
    damping=0.1,
    seed=0,
    groups: Groups = None,
    solvers: Mapping[str, Callable[..., Scores]] = SOLVERS,
) -> dict[str, Scores]:
    """Scores by name: of the ``solvers``, which work on gradients, the ``others`` as given, and
    ``random``."""
    scores = {name: f(train, queries, damping, groups) for name, f in solvers.items()}
    baseline = random_scores(len(train), len(queries), seed, groups)
    return scores | {**others, "random": baseline}


# --- one layer ----------------------------------------------------------------------------------


def _lambda(damping: float, squares: torch.Tensor, width: int) -> float:
    """λ for gradients with squared norms ``squares`` [n] and ``width`` entries."""
    return damping * squares.mean().item() / width


def _layerwise(
    layer_scores, train: Gradients, queries: Gradients, damping: float, groups: Groups
) -> Scores:
    """Scores of a solver that takes layers one by one; ``layer_scores``: a layer's index and its λ
    to that layer's scores [m, n]."""
    _check(train, queries)
    members, by_layer = _members(groups), []
    by_item = torch.zeros(len(queries), len(train), dtype=torch.float64)
    parts = np.array([np.ones(len(queries)), *members.values()])
    means = torch.from_numpy(parts / parts.sum(1, keepdims=True))  # [1 + groups, m]
    for index, layer in enumerate(train.layers):
        lam = _lambda(damping, train.squares[:, index], train.width(layer))
        scores = layer_scores(train, queries, index, lam)
        if not scores.isfinite().all():
            raise StudyError(f"attribution: {layer}: gradients too large or too small for scores")
        by_item += scores
        by_layer.append(means @ scores)
    layerwise = torch.stack(by_layer, 1).numpy()  # [1 + groups, L, n]
    return _grouped(by_item.T.numpy(), layerwise, members)


def _dot_layer(train: Gradients, queries: Gradients, index: int, lam: float) -> torch.Tensor:
    """− V Gᵀ, from float32 products."""
    layer, products = train.layers[index], []
    v = whole(queries, layer).float()
    for _, g in train.blocks(layer):
        products.append((v @ g.T).double())
    return -torch.cat(products, 1)


def _datainf_layer(train: Gradients, queries: Gradients, index: int, lam: float) -> torch.Tensor:
    first, second = _datainf_terms(train, queries, index, lam, torch.float32)
    # Rounding errors of float32, as measured: a share of the terms, and of what a product of small
    # cosine adds up.
    sizes = queries.squares[:, index].sqrt() * train.squares[:, index].max().sqrt()
    rounding = 4e-7 * first.abs().amax(-1) + 2e-8 * sizes
    within = rounding <= PRECISION * (first - second).abs().amax(-1)
    if not within.all():  # also where float32 overflowed
        first, second = _datainf_terms(train, queries, index, lam, torch.float64)
    return (second - first) / lam


def _datainf_terms(
    train: Gradients, queries: Gradients, index: int, lam: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """λ rᵀ g_k = vᵀ g_k − mean_i (vᵀ g_i) / (λ + ‖g_i‖²) · g_iᵀ g_k: both terms [m, n],
    float64."""
    layer, squares = train.layers[index], train.squares[:, index]
    n, v = len(train), whole(queries, layer).to(dtype)
    first = torch.empty(len(v), n, dtype=torch.float64)
    sums = torch.zeros(len(v), train.width(layer), dtype=torch.float64)
    for rows, g in train.blocks(layer):
        first[:, rows] = (v @ g.to(dtype).T).double()
        shares = first[:, rows] / (lam + squares[rows])
        sums += shares.to(dtype) @ g.to(dtype)
    sums, second = (sums / n).to(dtype), torch.empty_like(first)
    for rows, g in train.blocks(layer):
        second[:, rows] = (sums @ g.to(dtype).T).double()
    return first, second


def _exact_layer(train: Gradients, queries: Gradients, index: int, lam: float) -> torch.Tensor:
    return _damped(*_gram(train, queries, train.layers[index]), lam)


def _ekfac_layer(
    rank: int, train: Gradients, queries: Gradients, index: int, lam: float
) -> torch.Tensor:
    layer, width = train.layers[index], train.width(train.layers[index])
    if width % rank:
        raise StudyError(f"ekfac: {layer} has {width} entries, not a multiple of rank {rank}")
    shape = (-1, rank) if ".lora_B." in layer else (rank, -1)
    g, v = (whole(some, layer).unflatten(1, shape) for some in (train, queries))
    rows = torch.linalg.eigh(torch.einsum("nij,nkj->ik", g, g)).eigenvectors
    columns = torch.linalg.eigh(torch.einsum("nij,nik->jk", g, g)).eigenvectors
    g, v = ((rows.T @ some @ columns).flatten(1) for some in (g, v))
    eigenvalues = g.square().mean(0)
    return -(v / (eigenvalues + lam)) @ g.T


def _gram(train: Gradients, queries: Gradients, layer: str) -> tuple[np.ndarray, torch.Tensor]:
    """A layer's G Gᵀ [n, n], of which only the upper triangle is filled, and V Gᵀ [m, n];
    float64."""
    g = whole(train, layer)
    # Half the work of a product; G in rows is, to BLAS, its transpose in columns: nothing is
    # copied.
    return blas.dsyrk(1.0, g.numpy().T, trans=1), whole(queries, layer) @ g.T


def _damped(gram: np.ndarray, products: torch.Tensor, lam: float) -> torch.Tensor:
    """− n V Gᵀ (K + n λ I)⁻¹ [m, n]."""
    n = len(gram)
    system = gram.copy(order="F")
    system[np.diag_indices(n)] += n * lam
    try:
        factor = cho_factor(system, overwrite_a=True, check_finite=False)
    except LinAlgError:
        raise StudyError(f"damping: λ = {lam:.1e} is too small for an exact solution") from None
    return torch.from_numpy(-n * cho_solve(factor, products.numpy().T, check_finite=False).T)


# --- what solvers share -------------------------------------------------------------------------


def _counted(vectorizer, train_texts: Sequence[str], query_texts: Sequence[str]):
    """Words of training texts [n, words] and evaluation texts [m, words], sparse; the words are the
    training texts'."""
    try:
        return vectorizer.fit_transform(train_texts), vectorizer.transform(query_texts)
    except ValueError as error:  # no word of two letters anywhere
        raise StudyError(f"text similarity: training texts have no words ({error})") from None


def _check(train: Gradients, queries: Gradients) -> None:
    if len(train) < 2:
        raise StudyError(f"attribution: {len(train)} training example(s); at least 2 are needed")
    if not len(queries):
        raise StudyError("attribution: there is no evaluation item (no answer changed?)")
    for layer, largest in zip(train.layers, train.squares.amax(0).tolist()):
        if largest == 0:
            trained = "was this adapter trained (LoRA's B starts at zero)?"
            raise StudyError(f"attribution: every training gradient of {layer} is zero; {trained}")


def of_items(by_item: np.ndarray, groups: Groups = None) -> Scores:
    """``Scores`` without layers, from scores [n, m]."""
    members = _members(groups)
    return _grouped(by_item, np.zeros((1 + len(members), 0, len(by_item))), members)


def _members(groups: Groups) -> dict[str, np.ndarray]:
    """Label → which of the items have it, bool [m]."""
    return {label: np.array([g == label for g in groups]) for label in dict.fromkeys(groups or ())}


def _grouped(by_item: np.ndarray, by_layer: np.ndarray, members: dict) -> Scores:
    parts = {}
    for (label, items), part in zip(members.items(), by_layer[1:]):
        parts[label] = Scores(by_item[:, items], part)
    return Scores(by_item, by_layer[0], parts)
