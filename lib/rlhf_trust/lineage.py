"""Whose model is this? REEF (Zhang et al., ICLR 2025, arXiv 2410.14273): models derived from one
another represent the same texts alike.

**Representations.** The hidden state after each block at the last token of m texts, [layers, m,
hidden]. Widths may differ.

**Similarity.** Centred kernel alignment of a layer of each model. With K and L the m × m kernel
matrices (linear: K = X Xᵀ; or radial), centred to K' and L',

    CKA = ⟨K', L'⟩ / (‖K'‖ ‖L'‖).

It is invariant to permuting, rotating and rescaling features, so renaming neurons hides nothing.
Two estimators differ in the centring: H K H with H = I − 11ᵀ/m (biased, the paper's), and one that
drops the diagonal (unbiased; Song et al. 2012; as an inner product, Székely and Rizzo 2014). The
biased one grows with the number of directions in which states vary, over m: it gives 0.95 for
independent noise with 4,096 features and 200 texts. States of real models vary in few directions.
:func:`cka`

**All layers at once.** Centred and flattened, the kernel matrices of a model's layers are the rows
of one matrix; the CKA of all layer pairs of two models is the product of two such matrices. Each
model reads each text once.

**Evidence.** Depths differ, so layers are compared at equal relative depth (:func:`same_depth`),
with an interval from half-samples of the texts (:func:`interval`). Two things could make unrelated
models look similar. Chance: :func:`shuffled` permutes one model's texts; any two models that
respond to the texts at all pass this test. The texts themselves: models with random weights of the
same shape show how similar any network finds them. :func:`verdict` asks for more than both.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from . import StudyError, require
from .artifacts import TABLES, progress
from .decode import backbone, batches_by_length, pad_right
from .models import Base, load_adapters
from .sources import checked, locate, read_csv
from .stats import TAILS, Interval, generator

KERNELS = ("linear", "radial")

Kernels = Mapping[str, np.ndarray]
"""Model → kernel matrices of its layers, [layers, m, m]."""

Cubes = Mapping[tuple[str, str], np.ndarray]
"""Two models → CKA of all layer pairs, [layers of first, layers of second]."""

Known = Mapping[str, bool]
"""Model → derived from start by construction (start itself, too), or unrelated to it. A model that
is not in it is of unknown origin: it gets a verdict, and counts nowhere as an example of either."""

FEWEST = 5
"""Fewest texts that can be compared."""

DERIVED, UNRELATED = 0.8, 0.5
"""The paper's bands: derived from 0.8 on, unrelated below 0.5, open between."""

CHANCE = 0.05
"""A similarity that shuffled texts reach more often than this is no evidence."""

PAPER_DEPTH = 19 / 32
"""The paper's headline layer: its 18 of Llama-2-7b's 32 is counted from 0 (the authors' code reads
``layers[18]``), hence the state after the 19th block."""


def usable_counts(texts: int, text_counts: list[int]) -> list[int]:
    """The text counts that can be tried, ascending. Raises where there are too few texts, before a
    model is loaded."""
    counts = sorted({count for count in text_counts if FEWEST <= count <= texts})
    least, between = 2 * FEWEST, f"between {FEWEST} and {texts}"
    require(texts >= least, f"50-lineage: n_texts: {texts} texts, intervals need at least {least}")
    require(counts, f"50-lineage: text_counts: none of {text_counts} lies {between}")
    return counts


# --- representations ------------------------------------------------------------------------------


@torch.no_grad()
def last_token_states(
    model, tokenizer, texts: Sequence[str], rows: int = 16, desc: str = "states"
) -> np.ndarray:
    """States after every block at each text's last token, [layers, texts, hidden], float32.

    The model's own tokenizer is used, without a chat template; each text is read once for all
    layers. ``model`` may be any transformer that keeps its blocks in one list (decoders, encoders),
    with or without an output head.
    """
    blocks = _blocks(model)
    ids = [tuple(tokenizer(text).input_ids) for text in texts]
    if () in ids:
        raise StudyError(f"lineage: {desc}: text {ids.index(()) + 1} has no tokens; leave it out")
    found = np.zeros((len(blocks), len(texts), model.config.hidden_size), dtype=np.float32)

    def keep(layer: int, module, inputs, output) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found[layer, batch] = states[torch.arange(len(batch)), last].float().cpu().numpy()

    batches = batches_by_length([len(i) for i in ids], rows)
    with ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_hook(partial(keep, i)))
        for batch in progress(batches, desc=desc, unit="batch"):
            chosen = [ids[i] for i in batch]
            padded, mask = pad_right(chosen, tokenizer.pad_token_id or 0, model.device)
            last = mask.sum(1) - 1
            backbone(model)(input_ids=padded, attention_mask=mask)
    finite = np.isfinite(found).all((1, 2))
    layer, mend = int(finite.argmin()) + 1, "load the model in float32, or look for broken weights"
    require(finite.all(), f"lineage: {desc}: states of layer {layer} are not finite; {mend}")
    return found


def _blocks(model) -> torch.nn.ModuleList:
    """The transformer's blocks, in order."""
    both = getattr(model.config, "is_encoder_decoder", False)
    name = type(model).__name__
    require(not both, f"lineage: {name} is an encoder with a decoder; states are read of one stack")
    depth = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    raise StudyError(f"lineage: {name} has no list of {depth} blocks to read from")


# --- similarity -----------------------------------------------------------------------------------


def kernel_matrices(
    states: np.ndarray, kernel: str = "linear", standardised: bool = False, name: str = "model"
) -> np.ndarray:
    """K of every layer, [layers, m, m], from states [layers, m, hidden].

    ``radial``: exp(−d²/2σ²), σ² the median of the non-zero squared distances (as in the authors'
    code). ``standardised``: features are first brought to mean 0 and variance 1 over the texts, as
    in the authors' code though not in the paper; a rotated copy then no longer looks the same.
    Features that are the same for every text say nothing and stay 0.
    """
    require(kernel in KERNELS, f"kernel: must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if isinstance(states, torch.Tensor):
        states = states.double().cpu()  # NumPy has no bfloat16
    x = np.asarray(states, dtype=np.float64)
    fine = x.ndim == 3 and x.shape[1] >= FEWEST
    require(fine, f"lineage: {name}: states must be [layers, {FEWEST} or more texts, hidden]")
    varies = np.ptp(x, axis=1) > 0  # [layers, hidden]; before centring, which leaves rounding
    same = f"layer {int(varies.any(1).argmin()) + 1} has the same state for every text"
    require(varies.any(1).all(), f"lineage: {name}: {same}")
    x = x - x.mean(1, keepdims=True)
    if standardised:
        x = x / np.where(varies[:, None], x.std(1, ddof=1, keepdims=True), 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        products = x @ x.transpose(0, 2, 1)
        fine = (np.diagonal(products, axis1=1, axis2=2).sum(1) ** 2).max() < np.inf
    require(fine, f"lineage: {name}: states too large to multiply, or not finite")
    if kernel == "linear":
        return products
    squares = np.diagonal(products, axis1=1, axis2=2)
    distances = np.maximum(squares[:, :, None] + squares[:, None, :] - 2 * products, 0.0)
    return np.stack([np.exp(-d / (2 * np.median(d[d > 1e-12 * d.max()]))) for d in distances])


def centred(kernels: np.ndarray, unbiased: bool) -> np.ndarray:
    """Kernel matrices [..., m, m] centred, so that ⟨K', L'⟩ is (m − 1)² times the biased HSIC or
    m(m − 3) times the unbiased."""
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
    """Kernel matrices [layers, m, m], centred and scaled to norm 1, as rows [layers, m²]: the
    product of two rows is a CKA."""
    flat = centred(kernels, unbiased).reshape(len(kernels), -1)
    flat /= np.sqrt(np.einsum("ij,ij->i", flat, flat))[:, None]
    return flat


def aligned(first: np.ndarray, second: np.ndarray, unbiased: bool = True) -> np.ndarray:
    """CKA of all layer pairs, [layers of first, layers of second], from their kernel matrices
    [layers, m, m]."""
    return directions(first, unbiased) @ directions(second, unbiased).T


def alignments(kernels: Kernels, unbiased: bool = True) -> Cubes:
    """:func:`aligned` of every two models, in their order."""
    flat = {name: directions(own, unbiased) for name, own in kernels.items()}
    return {pair: flat[pair[0]] @ flat[pair[1]].T for pair in combinations(kernels, 2)}


def cka(first: np.ndarray, second: np.ndarray, unbiased: bool = True, **kernel) -> np.ndarray:
    """CKA of all layer pairs, [layers of first, layers of second], from states [layers, m, hidden];
    ``kernel``: options of :func:`kernel_matrices`."""
    return aligned(*(kernel_matrices(states, **kernel) for states in (first, second)), unbiased)


# --- which layers, and how sure -------------------------------------------------------------------


def same_depth(first: int, second: int, depth: float | None = None) -> list[tuple[int, int]]:
    """Which layers of two models with ``first`` and ``second`` layers are compared: pairs of
    indices from 0.

    Those at one relative ``depth`` (0 to 1); without one, every layer of the shallower model with
    its partner in the deeper.
    """
    share = depth is None or 0 < depth <= 1
    require(share, f"depth: a share of the layers, above 0 and up to 1, got {depth}")
    fewer = min(first, second)
    shares = [(i + 1) / fewer for i in range(fewer)] if depth is None else [depth]
    return [tuple(max(1, round(share * n)) - 1 for n in (first, second)) for share in shares]


def one_number(pairs: np.ndarray, depth: float | None = None, best: bool = False) -> np.ndarray:
    """CKA of all layer pairs, [..., layers of first, layers of second], as one number, [...]: the
    mean over layers at equal depth, that of the layers at one ``depth``, or the ``best`` of all
    pairs."""
    if best:
        return pairs.max((-2, -1))
    first, second = zip(*same_depth(*pairs.shape[-2:], depth))
    return pairs[..., first, second].mean(-1)


def shuffled(first: np.ndarray, second: np.ndarray, draws: int = 199, name: str = "") -> np.ndarray:
    """Unbiased CKA of all layer pairs when the second model reads the texts in another order, [1 +
    draws, layers of first, layers of second]; the first is in the true order.

    Shuffling texts permutes rows and columns of a centred kernel matrix, so nothing is computed
    anew.
    """
    left, right = directions(first, True), directions(second, True).reshape(second.shape)
    rng, m = generator(f"lineage/{name}/null"), second.shape[1]
    found = []
    for order in [np.arange(m), *(rng.permutation(m) for _ in range(draws))]:
        reordered = right[:, order[:, None], order].reshape(len(right), -1)
        found.append(left @ reordered.T)
    return np.array(found)


def p_value(values: np.ndarray) -> float:
    """Permutation p-value: the share of ``values`` (:func:`shuffled`, as one number each) that
    reach the first, itself among them."""
    return float(np.mean(values >= values[0] - 1e-12))


def interval(first: np.ndarray, second: np.ndarray, draws: int = 200, name: str = "") -> Interval:
    """Mean unbiased CKA over layers at equal depth with a 95 % interval over texts, from kernel
    matrices [layers, m, m].

    From half-samples drawn without replacement, whose statistic varies around its mean as the whole
    sample's does around the truth. (A bootstrap draws copies, and any kernel finds two copies of a
    text similar: unrelated models would look alike.)
    """
    m, rng = first.shape[1], generator(f"lineage/{name}/halves")
    a, b = map(list, zip(*same_depth(len(first), len(second))))
    first, second = first[a], second[b]

    def similarity(texts: np.ndarray) -> float:
        left, right = (directions(k[:, texts[:, None], texts], True) for k in (first, second))
        return float(np.vdot(left, right) / len(left))

    halves = np.array([similarity(rng.permutation(m)[: m // 2]) for _ in range(draws)])
    value = similarity(np.arange(m))
    low, high = value + np.quantile(halves - halves.mean(), TAILS)
    return Interval(value, max(float(low), -1.0), min(float(high), 1.0), m)


def verdict(found: Interval, p: float, random_init: float) -> str:
    """``derived``, ``unrelated`` or ``open``.

    Derived: shuffled texts do not reach the similarity, and the whole interval lies in the paper's
    band and above ``random_init``, the highest similarity of models with random weights. Unrelated:
    the interval lies below the lower band, or shuffled texts reach the similarity.
    """
    if p > CHANCE or found.high < UNRELATED:
        return "unrelated"
    return "derived" if found.low >= DERIVED and found.low > random_init else "open"


# --- all models of a study ------------------------------------------------------------------------

STUDY, PAPER = "unbiased at all depths", "biased at one depth"
BEST = "unbiased, best pair of layers"
AT_ONE_DEPTH = {"depth": PAPER_DEPTH}
MEASURES = {
    STUDY: ("linear", False, True, {}),
    "unbiased standardised at all depths": ("linear", True, True, {}),
    "biased at all depths": ("linear", False, False, {}),
    "biased standardised at all depths": ("linear", True, False, {}),
    "unbiased radial at all depths": ("radial", False, True, {}),
    "unbiased radial standardised at all depths": ("radial", True, True, {}),
    "biased radial at all depths": ("radial", False, False, {}),
    "biased radial standardised at all depths": ("radial", True, False, {}),
    "unbiased at one depth": ("linear", False, True, AT_ONE_DEPTH),
    "unbiased standardised at one depth": ("linear", True, True, AT_ONE_DEPTH),
    PAPER: ("linear", False, False, AT_ONE_DEPTH),
    "biased standardised at one depth": ("linear", True, False, AT_ONE_DEPTH),
    BEST: ("linear", False, True, {"best": True}),
}
"""Ways to express the similarity of two models as one number: name → kernel, standardised,
unbiased, options of :func:`one_number`. The first is the study's; ``PAPER`` is the paper's, and its
standardised variant that of the authors' code."""


def similarities(states: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Similarity of every two models by each of ``MEASURES``: columns first, second, measure,
    value.

    ``states``: model → [layers, m, hidden].
    """
    cubes = {}  # kernel, standardised, unbiased → CKA of all layer pairs of every two models
    for how in product(KERNELS, (False, True)):
        kernels = {name: kernel_matrices(own, *how, name=name) for name, own in states.items()}
        cubes |= {(*how, unbiased): alignments(kernels, unbiased) for unbiased in (True, False)}
    rows = [
        (*names, measure, float(one_number(pairs, **layers)))
        for measure, (*how, layers) in MEASURES.items()
        for names, pairs in cubes[tuple(how)].items()
    ]
    return pd.DataFrame(rows, columns=["first", "second", "measure", "value"])


def _sides(pairs: Iterable[tuple[str, str, float]], known: Known) -> tuple[np.ndarray, np.ndarray]:
    """Of pairs (two models, their similarity): the similarities where both are derived, and where
    at least one is unrelated. Pairs with a model of unknown origin are left out."""
    sides = {True: [], False: []}
    for first, second, value in pairs:
        if first in known and second in known:
            sides[known[first] and known[second]].append(value)
    return np.array(sides[True]), np.array(sides[False])


def separation(table: pd.DataFrame, known: Known) -> pd.DataFrame:
    """How well each measure separates pairs of derived models from all other pairs of ``known``:
    columns measure, auc (area under the ROC curve), derived (lowest), unrelated (highest),
    n_derived, n_unrelated. No rows where no two models are known to be derived, or none to be
    unrelated.

    ``table``: as :func:`similarities` gives it.
    """
    rows = []
    for measure, part in table.groupby("measure", sort=False):
        derived, unrelated = _sides(zip(part["first"], part["second"], part["value"]), known)
        if len(derived) and len(unrelated):
            auc = float((1 + np.sign(derived[:, None] - unrelated)).mean() / 2)
            ends = derived.min(), unrelated.max()
            rows.append((measure, auc, *ends, len(derived), len(unrelated)))
    return pd.DataFrame(rows, columns=TABLES["lineage_separation"])


def margin(cubes: Cubes, known: Known, depth: float | None = None) -> float:
    """Similarity of the least similar derived pair less that of the most similar other pair: where
    it is above 0, a threshold separates them without error. NaN where :func:`separation` has no
    rows. ``cubes``: as :func:`alignments` gives it."""
    values = ((*pair, float(one_number(cube, depth))) for pair, cube in cubes.items())
    derived, unrelated = _sides(values, known)
    return float(min(derived, default=np.nan) - max(unrelated, default=np.nan))


def margin_by_texts(
    kernels: Kernels, known: Known, counts: Sequence[int], unbiased: bool = True
) -> pd.DataFrame:
    """:func:`margin` over 20 random subsets of the texts: columns texts, median, low, high (5 and
    95 %).

    There is one subset of all texts; near their number subsets share most texts, and the band
    understates the uncertainty.
    """
    m, rows = next(iter(kernels.values())).shape[1], []
    for count in progress(counts, desc="fewer texts", unit="count"):
        rng, margins = generator(f"lineage/texts/{count}"), []
        for _ in range(20 if count < m else 1):
            texts = np.sort(rng.permutation(m)[:count])
            subset = {name: own[:, texts[:, None], texts] for name, own in kernels.items()}
            margins.append(margin(alignments(subset, unbiased), known))
        rows.append((count, *np.quantile(margins, (0.5, 0.05, 0.95))))
    return pd.DataFrame(rows, columns=["texts", "median", "low", "high"])


def enough(by_texts: pd.DataFrame) -> int | None:
    """The smallest count of :func:`margin_by_texts` from which on ``low`` is above 0 for every
    count; None without one."""
    safe = (by_texts.set_index("texts").sort_index(ascending=False)["low"] > 0).cummin()
    return int(safe.index[safe].min()) if safe.any() else None


def against_start(
    kernels: Kernels, pairwise: pd.DataFrame, known: Known, random_init, draws: int = 199
) -> pd.DataFrame:
    """Every other model against the first: the table ``lineage``.

    Column derived: as in ``known``, empty for models of unknown origin. Interval and verdict belong
    to the study's measure; p, and shuffled (the 95 % quantile under shuffled texts), also to the
    best pair of layers, which is a maximum and as such high by chance. Column twins: the highest
    similarity to start of the models with random weights whose kernel matrices are ``random_init``.
    ``kernels``: linear, by model; ``pairwise``: :func:`similarities` of the same models.
    """
    start, *suspects = kernels
    values = pairwise[pairwise["first"] == start].set_index(["second", "measure"])["value"]
    highest = max(float(one_number(aligned(kernels[start], other))) for other in random_init)
    rows = []
    for name in progress(suspects, desc="against start", unit="model"):
        found = interval(kernels[start], kernels[name], name=name)
        cubes = shuffled(kernels[start], kernels[name], draws, name=name)
        evidence = {}
        for measure in (STUDY, BEST):
            null = one_number(cubes, best=measure == BEST)
            evidence[measure] = {"p": p_value(null), "shuffled": np.quantile(null[1:], 0.95)}
        evidence[STUDY] |= {"ci_low": found.low, "ci_high": found.high, "twins": highest}
        evidence[STUDY]["verdict"] = verdict(found, evidence[STUDY]["p"], highest)
        for measure in MEASURES:
            row = {"suspect": name, "derived": known.get(name), "measure": measure, "n": found.n}
            row |= {"value": values[name, measure], "verdict": ""}
            rows.append(row | evidence.get(measure, {}))
    return pd.DataFrame(rows, columns=TABLES["lineage"])


def words(table: pd.DataFrame, told: pd.DataFrame) -> list[str]:
    """The tables ``lineage`` and ``lineage_separation`` in sentences.

    First the verdicts on models of unknown origin (``derived`` is empty); all that follows is about
    the others.
    """
    own, best, paper = (table[table["measure"] == measure] for measure in (STUDY, BEST, PAPER))
    unknown, derived, unrelated = _by_origin(own)
    how = f" ({STUDY} with start, 95 % interval over {own['n'].iloc[0]} texts)"
    rule, sentences = "The rule", []
    if len(unknown):
        sentences.append(f"**Models of unknown origin**{how}: {_listed(unknown)}.")
        if (unknown["verdict"] == "derived").any():
            sentences[0] += (
                " *derived* has no direction: one of the two models descends from the other, or "
                "both from a third."
            )
        how, rule = "", "Of the other models, the rule"
    if len(derived):
        sentences.append(f"**Derived models**{how}: {_listed(derived)}.")
    missed = pd.concat(
        [derived[derived["verdict"] != "derived"], unrelated[unrelated["verdict"] != "unrelated"]]
    )
    _, below, above = _by_origin(paper)
    below, above = below[below["value"] < DERIVED], above[above["value"] >= DERIVED]
    overlooked = f", and {_listed(below, 'no derived model')} would be missed"
    sentences += [
        f"**Unrelated models**: {_listed(unrelated)}. The most similar of the models "
        f"with random weights: {own['twins'].iloc[0]:.3f}.",
        f"{rule} misses {_listed(missed, 'no model')}.",
        f"By the paper's number alone ({PAPER}, derived from {DERIVED} on), "
        f"{_listed(above, 'no unrelated model')} would be called derived"
        f"{overlooked if len(derived) else ''}.",
    ]
    _, least, most = _by_origin(best)
    least = least.nsmallest(1, "value").assign(which="least similar derived")
    most = most.nlargest(1, "value").assign(which="most similar unrelated")
    sentences += [
        f"At the best of all pairs of layers, the {row.which} model reaches {row.value:.3f} "
        f"({row.suspect}; 95 % of shuffled texts stay below {row.shuffled:.3f}, p = {row.p:.3f})."
        for row in pd.concat([least, most]).itertuples()
    ]
    if len(told):
        widest = told.loc[(told["derived"] - told["unrelated"]).idxmax()]
        imperfect = told.loc[told["auc"] < 1, "measure"]
        others = f" (the others: {'; '.join(imperfect)})" if len(imperfect) else ""
        sentences.append(
            f"Over all pairs of models ({widest['n_derived']} derived, {widest['n_unrelated']} "
            f"unrelated), {len(told) - len(imperfect)} of {len(told)} measures separate without "
            f"error{others}. The widest margin is that of {widest['measure']}: at least "
            f"{widest['derived']:.2f} for derived pairs, at most {widest['unrelated']:.2f} for "
            "others."
        )
    return sentences


def _by_origin(rows: pd.DataFrame) -> tuple[pd.DataFrame, ...]:
    """Rows of the table ``lineage`` on models of unknown origin, on derived and on unrelated
    ones."""
    derived = rows["derived"]  # bool, or objects where places are empty
    return rows[derived.isna()], rows[derived.eq(True)], rows[derived.eq(False)]


def _listed(rows: pd.DataFrame, nothing: str = "none") -> str:
    """Models with what the table says about each."""
    listed = []
    for row in rows.itertuples():
        evidence = ""
        if not math.isnan(row.ci_low):  # the study's measure alone has it
            evidence = f", {row.ci_low:.3f} to {row.ci_high:.3f}, p = {row.p:.3f}, {row.verdict}"
        listed.append(f"{row.suspect} ({row.value:.3f}{evidence})")
    return "; ".join(listed) or nothing


# --- unrelated models -----------------------------------------------------------------------------


def random_init(base: Base, seed: int = 0):
    """A model of the backbone's shape with random weights."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(base.model.config, dtype=base.model.dtype)
    return model.to(base.device).eval()


def trained_from_scratch(
    base: Base, texts: Sequence[tuple[int, ...]], steps: int, batch=8, learning_rate=6e-4, seed=1
):
    """:func:`random_init` after ``steps`` steps of next-token prediction on the study's own texts,
    all weights trained: it shares training text with the study's models, but no weights. (The
    ``seed`` of another :func:`random_init` would make it a descendant of that one.)"""
    model = random_init(base, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    rng, size = np.random.default_rng(seed), min(batch, len(texts))
    model.train()
    for step in progress(range(steps), desc="from scratch", unit="step"):
        chosen = [texts[i] for i in rng.choice(len(texts), size, replace=False)]
        ids, mask = pad_right(chosen, base.tokenizer.pad_token_id, base.device)
        warm = min(1.0, (step + 1) / max(1, steps // 10))
        optimizer.param_groups[0]["lr"] = learning_rate * warm
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        problem = f"lineage: training from scratch: at step {step} the loss is {loss}"
        require(torch.isfinite(loss), problem)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# --- copies that hide their origin ----------------------------------------------------------------


def merged(base: Base, adapter: Path):
    """A copy of the backbone with an adapter merged into its weights."""
    alone = replace(base, model=copy.deepcopy(base.model))
    return load_adapters(alone, {"adapter": adapter}).merge_and_unload()


def pruned(model, share: float):
    """A copy without the smallest ``share`` of each matrix's weights (by magnitude)."""
    require(0 < share < 1, f"share: must lie between 0 and 1, got {share}")

    def cut(weight: torch.Tensor) -> torch.Tensor:
        size = weight.abs()
        line = size.flatten().kthvalue(max(1, math.ceil(share * weight.numel()))).values
        return torch.where(size > line, weight, 0.0)

    return _changed(model, cut)


def rounded(model):
    """A copy with matrices rounded to 8 bits, one scale a row."""

    def to_int8(weight: torch.Tensor) -> torch.Tensor:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round() * scale

    return _changed(model, to_int8)


@torch.no_grad()
def _changed(model, change):
    """A copy with the matrices of all blocks changed; embedding, head and norms stay."""
    copied = copy.deepcopy(model)
    for parameter in _blocks(copied).parameters():
        if parameter.ndim == 2:
            parameter.copy_(change(parameter.float()).to(parameter.dtype))
    return copied


def _untied(model):
    """A copy of a Llama model with an output head of its own."""
    kind = model.config.model_type
    problem = f"lineage: copies are disguised in Llama models only, this is {kind!r}"
    require(kind == "llama", problem)
    copied = copy.deepcopy(model)
    copied.config.tie_word_embeddings = False
    head = model.get_output_embeddings().weight.detach().clone()
    copied.lm_head.weight = torch.nn.Parameter(head, requires_grad=False)
    return copied


def _weights(model, *layers: str) -> list[torch.nn.Parameter]:
    """The weights of all layers of these names."""
    return [weight for name, weight in model.named_parameters() if name.split(".")[-2] in layers]


@torch.no_grad()
def permuted(model, seed: int = 0):
    """A copy that computes the same function with its features renamed: the hidden units of the
    residual stream and of every feed-forward layer."""
    copied, rng = _untied(model), torch.Generator().manual_seed(seed)
    order = torch.randperm(model.config.hidden_size, generator=rng)
    norms = "norm input_layernorm post_attention_layernorm".split()
    readers = "lm_head embed_tokens q_proj k_proj v_proj gate_proj up_proj".split()
    for weight in _weights(copied, *norms, *readers):
        weight.copy_(weight[..., order])
    for weight in _weights(copied, "o_proj", "down_proj"):
        weight.copy_(weight[order])
    for block in copied.model.layers:
        inner = torch.randperm(model.config.intermediate_size, generator=rng)
        for weight in _weights(block, "gate_proj", "up_proj"):
            weight.copy_(weight[inner])
        block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, inner])
    return copied


@torch.no_grad()
def rescaled(model, factor: float = 0.8):
    """A copy whose residual stream is ``factor`` times as large everywhere, which its normalisation
    takes out again."""
    copied = _untied(model)
    for weight in _weights(copied, "embed_tokens", "o_proj", "down_proj"):
        weight.mul_(factor)
    return copied


def load_statements(source: str, n: int) -> list[str] | None:
    """The first ``n`` statements that REEF compares models on (TruthfulQA's questions with an
    answer); None where the source has none."""
    path = locate(source, "reef/truthfulqa.csv", "models are compared on the preference prompts")
    if path is None:
        return None
    rows = read_csv(path, ("statement",), ("label",))
    statements = [checked(row["statement"], "statement", f"{path}:{line}") for line, row in rows]
    return statements[:n]
