"""Do influence scores say what happens? Models trained again on other data, and examples whose part is known.

- **Linear datamodeling score** (Park et al. 2023, TRAK, arXiv 2303.14186, eq. 3). Train on random halves S of a pool and
  note each evaluation item's loss. Influence i is a slope, so what the scores predict for S is Σ_{i∈S} influence_i; the
  score of a solver is Spearman's correlation of prediction and outcome over halves, averaged over items.
- **Leaving out** the top and the bottom of a ranking, against leaving out as many at random.
- **Planted examples**: mislabelled pairs, and copies of evaluation items among the training examples.
- **Pruning**: does a vertical get better without the examples that harm it, more than without any others?

Sign everywhere: a score above 0 means that more weight on the example *raises* the evaluation loss. Where that loss is
the log-odds of a bad answer (:mod:`.metric`), above 0 is harmful.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from .. import StudyError
from ..artifacts import content_key, progress, write_text
from ..data.preferences import PreferencePair
from ..decode import Example
from ..losses import DPOLoss, Loss, NextTokenLoss, reference_logps, tokens_content
from ..models import restore, snapshot
from ..stats import (
    DETECTED,
    DRAWS,
    TAILS,
    Change,
    Interval,
    generator,
    holm,
    mean_interval,
    paired_change,
)
from ..training import Recipe, example_losses, fit

Outcomes = dict[str, np.ndarray]
"""Name of a measurement → its values [subsets, items], a row for each retraining."""


# --- which examples, and what came of them -------------------------------------------------------------------------


def random_halves(n: int, count: int, seed: int) -> np.ndarray:
    """``count`` random halves of ``n`` examples: bool [count, n], n/2 true in each row. Fewer are the head of more."""
    if n < 2 or n % 2:
        raise StudyError(f"random halves: the pool must be even and not empty, got {n}")
    return ~_without(random_sets(n, n // 2, count, seed), n)


def random_sets(n: int, k: int, draws: int, seed: int) -> np.ndarray:
    """``draws`` random sets of ``k`` of ``n`` examples: indices [draws, k], ascending. Fewer are the head of more."""
    if not 0 < k <= n or draws < 1:
        raise StudyError(f"random sets: cannot draw {draws} sets of {k} from {n}")
    rng = np.random.default_rng(seed)
    return np.array([np.sort(rng.permutation(n)[:k]) for _ in range(draws)])


def _without(removed: np.ndarray, n: int) -> np.ndarray:
    """Indices [count, k] of what is left out → what is kept, bool [count, n]."""
    keep = np.ones((len(removed), n), dtype=bool)
    np.put_along_axis(keep, removed, False, axis=1)
    return keep


def retrained(
    directory: Path | str,
    name: str,
    key: object,
    subsets: np.ndarray,
    measure: Callable[[np.ndarray, int], Mapping[str, np.ndarray]],
    seed: int = 0,
) -> Outcomes:
    """Retrain on each subset and measure, keeping every result: a killed run goes on at the subset where it was.

    Parameters
    ----------
    directory, name
        Results lie in ``<directory>/<name>.<hash of key>.jsonl``, one line a subset, written whole or not at all.
    key
        All that the results depend on besides the subsets and ``seed``, as JSON.
    subsets
        bool [count, n]: the examples to train on.
    measure
        ``measure(indices, seed)`` → name → values [items]. It must depend on nothing but its arguments (restore the
        start!): then results are the same with and without an interruption. Subset s gets the seed ``seed + s``.

    With ``RLHF_TRUST_CACHE=off`` nothing is read or written.
    """
    if not len(subsets) or not subsets.any(1).all():
        raise StudyError(f"{name}: there is no subset to train on, or one is empty")
    keeps = os.environ.get("RLHF_TRUST_CACHE") != "off"
    path = Path(directory) / f"{name}.{content_key(key, seed)}.jsonl"
    kept: dict[str, dict] = {}
    if keeps and path.exists():
        kept = {
            row["subset"]: row
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        }
    rows = []
    for number, subset in enumerate(progress(subsets, desc=name, unit="retraining")):
        indices = np.flatnonzero(subset)
        of_subset = content_key(number, indices.tolist())
        if of_subset not in kept:
            values = {
                what: np.asarray(v, dtype=float).tolist()
                for what, v in measure(indices, seed + number).items()
            }
            kept[of_subset] = {"subset": of_subset, "outcomes": values}
            if keeps:
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept.values()))
        rows.append(kept[of_subset]["outcomes"])
    return {what: np.array([row[what] for row in rows]) for what in rows[0]}


@dataclass(frozen=True)
class Queries:
    """Evaluation items and the loss that they are looked at through."""

    examples: Sequence[Example]
    loss: Loss


def retrain_halves(
    directory: Path | str,
    name: str,
    fingerprint: str,
    network,
    adapter: str,
    pool: Sequence[Example],
    loss: Loss,
    queries: Mapping[str, Queries],
    halves: np.ndarray,
    recipe: Recipe,
    pad: int,
    seed: int = 0,
) -> Outcomes:
    """Fit an adapter to each half of a pool, always from its present weights, and evaluate the queries' losses.

    Parameters
    ----------
    fingerprint
        Of the backbone (``Base.fingerprint``). The adapter's present weights are looked at themselves.
    pool, loss
        Training examples and what is minimised.
    queries
        By a name: several losses can be looked at for one retraining. Their losses must not hang on the adapter that
        is trained (a ``DPOLoss`` holds its reference's log-probabilities, so it may be used).
    halves
        bool [count, pool], :func:`random_halves`. Half s is fitted with seed ``seed + s``.

    Returns
    -------
    dict
        As ``queries``: losses [count, items] after each retraining. The adapter has its present weights again.
    """
    if halves.ndim != 2 or halves.shape[1] != len(pool):
        raise StudyError(f"halves: shape {halves.shape} for a pool of {len(pool)}")
    start = snapshot(network, adapter)
    key = [
        fingerprint,
        weights_content(start),
        loss.content(pool),
        tokens_content(pool),
        asdict(recipe),
        [
            [what, q.loss.content(q.examples), tokens_content(q.examples)]
            for what, q in sorted(queries.items())
        ],
    ]

    def measure(indices: np.ndarray, own_seed: int) -> dict[str, np.ndarray]:
        restore(network, adapter, start)
        fit(network, adapter, [pool[i] for i in indices], loss, pad, recipe, own_seed)
        return {
            what: example_losses(network, adapter, q.examples, q.loss, pad)
            for what, q in queries.items()
        }

    try:
        return retrained(directory, name, key, halves, measure, seed)
    finally:
        restore(network, adapter, start)


def weights_content(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of weights (``models.snapshot``), for the key of :func:`retrained`."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].cpu().numpy().tobytes())
    return digest.hexdigest()


# --- linear datamodeling score -------------------------------------------------------------------------------------


def lds(influence: np.ndarray, halves: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Linear datamodeling score of each item: [items], in [-1, 1].

    Parameters
    ----------
    influence
        Scores [n, items], above 0 where an example raises the item's loss.
    halves, outcomes
        bool [count, n] and the items' losses after training on each: [count, items].

    Spearman's correlation over halves of Σ_{i∈S} influence_i and the loss. An item for which the scores predict the
    same for every half scores 0 (they say nothing); one whose loss never changes has no score (NaN).
    """
    _check_lds(influence, halves, outcomes)
    return _spearman(
        scipy_stats.rankdata(_predicted(influence, halves), axis=0),
        scipy_stats.rankdata(outcomes, axis=0),
    )


def _check_lds(influence: np.ndarray, halves: np.ndarray, outcomes: np.ndarray) -> None:
    if (
        influence.ndim != 2
        or influence.shape[0] != halves.shape[1]
        or outcomes.shape != (len(halves), influence.shape[1])
    ):
        raise StudyError(
            f"LDS: influence {influence.shape}, halves {halves.shape} and outcomes {outcomes.shape} do not "
            "fit; needed are [examples, items], [halves, examples] and [halves, items]"
        )
    if len(halves) < 3:
        raise StudyError(f"LDS: {len(halves)} halves; a correlation needs at least 3")
    if not (np.isfinite(influence).all() and np.isfinite(outcomes).all()):
        raise StudyError("LDS: a score or an outcome is not finite")


def _spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's correlation of the columns of two arrays of ranks [count, items] → [items]."""
    a, b = (ranks - ranks.mean(0) for ranks in (a, b))
    covariance, scale = (a * b).sum(0), np.sqrt((a * a).sum(0) * (b * b).sum(0))
    found = np.divide(covariance, scale, out=np.zeros(scale.shape), where=scale > 0)
    return np.where((b * b).sum(0) > 0, found, np.nan)


def _lds_draws(
    solvers: Mapping[str, np.ndarray],
    halves: np.ndarray,
    outcomes: np.ndarray,
    name: str,
    draws: int,
) -> dict[str, np.ndarray]:
    """Mean LDS of each solver in resamples of halves and of items, both drawn with replacement: solver → [draws].

    All solvers see the same resamples, so that they can be compared pair by pair. Resampling both ways at once (the
    pigeonhole bootstrap, A. B. Owen 2007) errs, if at all, towards wide intervals.
    """
    rng, (count, items) = generator(f"lds/{name}"), outcomes.shape
    weights, of_items = (
        rng.multinomial(size, np.full(size, 1 / size), size=draws).astype(float)
        for size in (count, items)
    )
    values = {solver: np.empty((draws, items)) for solver in solvers}
    predicted = {solver: _predicted(influence, halves) for solver, influence in solvers.items()}
    for item in range(items):
        ranks = _resampled_ranks(outcomes[:, item], weights)
        spread = (weights * ranks**2).sum(1)
        for solver in solvers:
            of_solver = _resampled_ranks(predicted[solver][:, item], weights)
            scale = np.sqrt((weights * of_solver**2).sum(1) * spread)
            found = np.divide(
                (weights * ranks * of_solver).sum(1), scale, out=np.zeros(draws), where=scale > 0
            )
            values[solver][:, item] = np.where(spread > 0, found, np.nan)
    scored = {solver: of_items * ~np.isnan(of_solver) for solver, of_solver in values.items()}
    with np.errstate(invalid="ignore"):  # a resample may hold no item that changes: NaN
        return {
            solver: (scored[solver] * np.nan_to_num(of_solver)).sum(1) / scored[solver].sum(1)
            for solver, of_solver in values.items()
        }


def _resampled_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Midranks of ``values`` [count] less their mean in each resample, where value i stands weights[draw, i] times:
    [draws, count]. Sorted once for all draws: a rank is what lies below and half of what is equal."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    last = np.flatnonzero(np.diff(place[order], append=place.max() + 1))  # of equal values
    up_to = weights[:, order].cumsum(1)[:, last]
    below = np.concatenate([np.zeros((len(weights), 1)), up_to[:, :-1]], 1)
    return ((below + up_to) / 2)[:, place] - weights.sum(1, keepdims=True) / 2


def _predicted(influence: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """Σ_{i∈S} influence_i of each half and item, [halves, items], up to an item's scale (only ranks are read)."""
    predictions = halves @ influence
    # Equal sums that were added in another order differ in their last digits, and must stay ties.
    return np.round(predictions / (np.abs(predictions).max(0) + (predictions == 0).all(0)), 12)


def lds_interval(
    influence: np.ndarray,
    halves: np.ndarray,
    outcomes: np.ndarray,
    name: str = "",
    draws: int = DRAWS // 2,
) -> Interval:
    """Mean LDS over items with its 95 % interval over halves and items (percentiles of :func:`_lds_draws`)."""
    return _lds_interval(
        lds(influence, halves, outcomes),
        _lds_draws({"": influence}, halves, outcomes, name, draws)[""],
    )


def _lds_interval(values: np.ndarray, resampled: np.ndarray) -> Interval:
    scored = values[~np.isnan(values)]
    if not len(scored):
        raise StudyError(
            "LDS: no item's loss changes between retrainings; train longer or with a higher learning_rate"
        )
    low, high = np.nanquantile(resampled, TAILS)
    return Interval(float(scored.mean()), float(low), float(high), len(scored))


def lds_compare(
    a: np.ndarray,
    b: np.ndarray,
    halves: np.ndarray,
    outcomes: np.ndarray,
    name: str = "",
    draws: int = DRAWS // 2,
) -> Change:
    """Mean LDS of scores ``a`` less that of ``b``, on the same halves and items.

    Interval as :func:`lds_interval`'s; p, two-sided: twice the share of resamples on the other side of 0 (add-one
    corrected); ``min_detectable`` as in ``stats.paired_change``.
    """
    resampled = _lds_draws({"a": a, "b": b}, halves, outcomes, name, draws)
    return _lds_change(
        lds(a, halves, outcomes), lds(b, halves, outcomes), resampled["a"], resampled["b"]
    )


def _lds_change(a: np.ndarray, b: np.ndarray, drawn_a: np.ndarray, drawn_b: np.ndarray) -> Change:
    difference, resampled = (a - b)[~np.isnan(a)], (drawn_a - drawn_b)[~np.isnan(drawn_a)]
    low, high = np.quantile(resampled, TAILS)
    p = 2 * (1 + min((resampled <= 0).sum(), (resampled >= 0).sum())) / (1 + len(resampled))
    return Change(
        float(difference.mean()),
        float(low),
        float(high),
        float(min(1.0, p)),
        float(DETECTED * resampled.std()),
        len(difference),
    )


def lds_table(
    solvers: Mapping[str, np.ndarray],
    halves: np.ndarray,
    outcomes: np.ndarray,
    against: Sequence[str] = ("random", "tfidf"),
    name: str = "",
    draws: int = DRAWS // 2,
) -> pd.DataFrame:
    """Every solver's mean LDS, and how far above the baselines ``against`` (names among ``solvers``) it lies.

    Columns solver, lds, ci_low, ci_high, items, halves; for each baseline b above_b, above_b_low, above_b_high,
    above_b_p, above_b_p_holm (corrected over the solvers held against b). All from the same resamples. Whether a solver
    beats scores drawn at random can be seen from its own interval too, since the LDS of random scores is 0 on average.
    """
    missing = [baseline for baseline in against if baseline not in solvers]
    if missing:
        raise StudyError(f"LDS: no baseline {missing[0]!r} among the solvers {', '.join(solvers)}")
    values = {solver: lds(influence, halves, outcomes) for solver, influence in solvers.items()}
    resampled = _lds_draws(solvers, halves, outcomes, name, draws)
    rows = []
    for solver in solvers:
        mean = _lds_interval(values[solver], resampled[solver])
        row = {
            "solver": solver,
            "lds": mean.value,
            "ci_low": mean.low,
            "ci_high": mean.high,
            "items": mean.n,
            "halves": len(halves),
        }
        for baseline in against:
            if solver not in against:
                change = _lds_change(
                    values[solver], values[baseline], resampled[solver], resampled[baseline]
                )
                row |= {
                    f"above_{baseline}": change.value,
                    f"above_{baseline}_low": change.low,
                    f"above_{baseline}_high": change.high,
                    f"above_{baseline}_p": change.p,
                }
        rows.append(row)
    table = pd.DataFrame(rows)
    for baseline in against:
        if f"above_{baseline}_p" in table:
            tested = table[f"above_{baseline}_p"].notna()
            table.loc[tested, f"above_{baseline}_p_holm"] = holm(
                table.loc[tested, f"above_{baseline}_p"].to_numpy()
            )
    return table


def lds_words(table: pd.DataFrame) -> list[str]:
    """Of every solver of :func:`lds_table` that is no baseline, in words: does it lie above the baselines?"""
    baselines = [
        column.removeprefix("above_").removesuffix("_p_holm")
        for column in table
        if column.endswith("_p_holm")
    ]
    sentences = []
    for row in table.to_dict("records"):
        if row["solver"] in baselines:
            continue
        held = []
        for b in baselines:
            low, high = row[f"above_{b}_low"], row[f"above_{b}_high"]
            clear = row[f"above_{b}_p_holm"] < 0.05
            verdict = (
                "above"
                if clear and low > 0
                else "below"
                if clear and high < 0
                else "not clearly above"
            )
            held.append(
                f"{verdict} {b} ({row[f'above_{b}']:+.3f}, {low:+.3f} to {high:+.3f}, Holm-corrected p = "
                f"{row[f'above_{b}_p_holm']:.3f})"
            )
        sentences.append(
            f"{row['solver']} has an LDS of {row['lds']:.3f} (95 % interval {row['ci_low']:.3f} to "
            f"{row['ci_high']:.3f}, {row['items']} items, {row['halves']} halves): {' and '.join(held)}."
        )
    return sentences


# --- arms: what is left out ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablations:
    """Training sets to compare: ``names``, one a retraining (``random`` several times), and ``subsets``, bool
    [retrainings, n], for :func:`retrained`."""

    names: tuple[str, ...]
    subsets: np.ndarray


def top_and_bottom(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the ``k`` highest scores (they raise the loss most), highest first, and of the ``k`` lowest, lowest first;
    of equal ones the first in the list."""
    scores = np.asarray(scores, dtype=float)
    if not 0 < k <= len(scores) // 2:
        raise StudyError(
            f"top and bottom: k = {k} of {len(scores)} examples; at most half can be taken at each end"
        )
    if not np.isfinite(scores).all():
        raise StudyError("top and bottom: a score is not finite")
    return np.argsort(-scores, kind="stable")[:k], np.argsort(scores, kind="stable")[:k]


def most_harmful(scores: np.ndarray, share: float) -> np.ndarray:
    """Indices of the ``share`` of examples (rounded, at least one) with the highest scores, highest first."""
    scores = np.asarray(scores)
    if not 0 < share <= 0.5:
        raise StudyError(f"share: must be above 0 and at most 0.5, got {share}")
    return top_and_bottom(scores, max(1, round(share * len(scores))))[0]


def most_similar(similarity: np.ndarray, share: float) -> np.ndarray:
    """Indices of the ``share`` of examples most alike in text, most similar first; ``similarity`` [n], higher is more
    alike (a solver that gives similarity a negative sign must be turned round)."""
    return most_harmful(similarity, share)


def leave_out_arms(scores: np.ndarray, k: int, draws: int, seed: int) -> Ablations:
    """Leave out the top ``k``, the bottom ``k``, and ``k`` at random ``draws`` times."""
    return _arms(
        len(scores), dict(zip(("top", "bottom"), top_and_bottom(scores, k))), k, draws, seed
    )


def pruning_arms(
    scores: np.ndarray, similarity: np.ndarray, share: float, draws: int, seed: int
) -> Ablations:
    """``full``: all examples; ``pruned``: without the most harmful ``share``; ``similar``: without as many that are most
    alike in text; ``random``: without as many at random, ``draws`` times."""
    removed = {
        "full": np.zeros(0, dtype=int),
        "pruned": most_harmful(scores, share),
        "similar": most_similar(similarity, share),
    }
    return _arms(len(scores), removed, len(removed["pruned"]), draws, seed)


def _arms(n: int, removed: Mapping[str, np.ndarray], k: int, draws: int, seed: int) -> Ablations:
    at_random = random_sets(n, k, draws, seed)
    kept = [_without(indices[None], n) for indices in removed.values()] + [_without(at_random, n)]
    return Ablations((*removed, *["random"] * draws), np.concatenate(kept))


def pruning_table(
    names: Sequence[str],
    outcomes: Outcomes,
    clusters: Mapping[str, Sequence[str] | None] | None = None,
) -> pd.DataFrame:
    """Every arm against the mean of the random ones, by what was measured. (For leaving out as well.)

    Parameters
    ----------
    names, outcomes
        ``Ablations.names`` and what :func:`retrained` gave for ``Ablations.subsets``: name → [retrainings, items]. Above 0 is worse
        for log-odds of bad answers; reward accuracy can be among the outcomes as 0 and 1.
    clusters
        Name → a label an item, as ``metric.clusters`` gives it.

    Two things are uncertain, and each has its interval for the same change:

    - ``items_low`` to ``items_high``, p_items: other items could have been asked; paired by item, random arms averaged.
    - ``draws_low`` to ``draws_high``, p_draws: another random set, or the same set trained with another seed, would have
      given another mean. Student's t on the arms' means over items: arm − mean(random) ± t · s · √(1/a + 1/r) with a
      retrainings of the arm, r random ones, s the spread pooled within arms and a + r − 2 degrees of freedom. One
      retraining of an arm is taken to be as uncertain as one of the random arms. With r = 3 and a = 1 that is
      ± 4.97 s: only large effects can show. No interval (NaN) for a single random draw.

    ``p`` is the larger of the two (a change is only believed if neither chance explains it), ``p_holm`` corrects it over
    the outcomes of an arm. Columns arm, vertical, change, …, p, p_holm, draws (random ones), n (items).
    """
    arms = list(dict.fromkeys(names))
    if "random" not in arms or len(arms) < 2:
        raise StudyError(f"pruning: needs a random arm and another, got {', '.join(arms)}")
    where = {arm: [i for i, name in enumerate(names) if name == arm] for arm in arms}
    rows = []
    for arm in arms:
        for vertical, values in outcomes.items() if arm != "random" else ():
            if len(values) != len(names):
                raise StudyError(
                    f"pruning: {vertical} has {len(values)} retrainings, there are {len(names)} arms"
                )
            of_arm, at_random = values[where[arm]], values[where["random"]]
            over_items = paired_change(
                of_arm.mean(0),
                at_random.mean(0),
                f"pruning/{arm}/{vertical}",
                (clusters or {}).get(vertical),
            )
            low, high, p = _between_draws(of_arm.mean(1), at_random.mean(1))
            rows.append(
                {
                    "arm": arm,
                    "vertical": vertical,
                    "change": over_items.value,
                    "items_low": over_items.low,
                    "items_high": over_items.high,
                    "p_items": over_items.p,
                    "draws_low": low,
                    "draws_high": high,
                    "p_draws": p,
                    "p": np.max([over_items.p, p]),
                    "draws": len(at_random),
                    "n": over_items.n,
                }
            )
    table = pd.DataFrame(rows)
    for _, part in table[table["p"].notna()].groupby("arm"):
        table.loc[part.index, "p_holm"] = holm(part["p"].to_numpy())
    return table.assign(p_holm=table.get("p_holm", np.nan))


def _between_draws(arm: np.ndarray, at_random: np.ndarray) -> tuple[float, float, float]:
    """Interval and p-value of the difference of two means of retrainings, [a] and [r], with pooled spread."""
    a, r = len(arm), len(at_random)
    degrees = a + r - 2
    if r < 2:
        return float("nan"), float("nan"), float("nan")
    change = arm.mean() - at_random.mean()
    spread = sqrt(
        (np.square(arm - arm.mean()).sum() + np.square(at_random - at_random.mean()).sum())
        / degrees
    )
    error = spread * sqrt(1 / a + 1 / r)
    half = scipy_stats.t.ppf(TAILS[1], degrees) * error
    p = 2 * scipy_stats.t.sf(abs(change) / error, degrees) if error > 0 else float(change == 0)
    return float(change - half), float(change + half), float(p)


# --- planted examples ----------------------------------------------------------------------------------------------


def mislabel(
    items: Sequence[PreferencePair] | Sequence[Example], share: float, seed: int
) -> tuple[list, np.ndarray]:
    """Swap chosen and rejected in a random ``share`` of preference pairs (or of examples of two sequences).

    Returns the items, in order, and which were swapped, bool [n]. A swapped :class:`Example` gets another id
    (``…:swapped``): a ``DPOLoss`` looks up its reference by id, and the old one would be the wrong way round.
    """
    count = round(share * len(items))
    if not 0 < count < len(items):
        raise StudyError(
            f"mislabel: {share:g} of {len(items)} items is {count}; some must be swapped and some not"
        )
    swapped = set(Random(f"mislabel/{seed}").sample(range(len(items)), count))
    mask = np.array([index in swapped for index in range(len(items))])
    return [_swapped(item) if wrong else item for item, wrong in zip(items, mask)], mask


def _swapped(item: PreferencePair | Example) -> PreferencePair | Example:
    if isinstance(item, PreferencePair):
        return replace(item, chosen=item.rejected, rejected=item.chosen)
    if len(item.sequences) != 2:
        raise StudyError(
            f"mislabel: example {item.id!r} has {len(item.sequences)} sequence(s), not two to swap"
        )
    return replace(item, id=f"{item.id}:swapped", sequences=item.sequences[::-1])


def planted_auc(
    scores: np.ndarray, planted: np.ndarray, name: str = "", draws: int = DRAWS
) -> Interval:
    """Area under the ROC curve of finding the ``planted`` [n] by high ``scores`` [n]: the probability that a planted
    example scores above another, ties counting half.

    95 % interval: percentiles of a bootstrap of planted examples and of the others, each drawn with replacement. ``n``
    counts all. (Where a low score marks them, pass −scores.)
    """
    scores, planted = np.asarray(scores, dtype=float), np.asarray(planted, dtype=bool)
    if planted.all() or not planted.any():
        raise StudyError("planted examples: some must be planted and some not")
    ahead = scores[planted][:, None] - scores[~planted]
    won = (ahead > 0) + 0.5 * (ahead == 0)  # its weighted mean is the area of a resample
    rng = generator(f"planted/{name}")
    rows, columns = (
        rng.multinomial(size, np.full(size, 1 / size), size=draws) / size for size in won.shape
    )
    low, high = np.quantile(((rows @ won) * columns).sum(1), TAILS)
    return Interval(float(roc_auc_score(planted, scores)), float(low), float(high), len(scores))


def auc_ceiling(accuracy: float) -> float:
    """The area under the ROC curve that mislabelled pairs can be found with by a reward model of this held-out accuracy.

    Let the reward model's margin m = r(better) − r(worse) be normal over pairs, m ~ N(μ, σ²). Its accuracy is
    a = P(m > 0) = Φ(μ/σ), hence μ/σ = Φ⁻¹(a). As labelled, a good pair has the margin m, and a swapped one −m. The area
    is the probability that a good pair's margin m₁ lies above a swapped one's −m₂; m₁ + m₂ ~ N(2μ, 2σ²), so

        AUC = P(m₁ + m₂ > 0) = Φ(2μ / (√2 σ)) = Φ(√2 · Φ⁻¹(a))

    No other function of the margin does better, as the likelihood ratio of the two normals rises with the margin. What
    a model cannot order for a pair that it has not seen, it cannot find mislabelled: .64 at an accuracy of 60 %, .76 at
    69 %. A half-right model (.5) finds nothing (.5). That people's own labels are noisy is in ``accuracy`` already.
    """
    if not 0 <= accuracy <= 1:
        raise StudyError(f"accuracy: must lie between 0 and 1, got {accuracy}")
    return float(scipy_stats.norm.cdf(sqrt(2) * scipy_stats.norm.ppf(accuracy)))


def plant_copies(
    training: Sequence[Example], queries: Sequence[Example], seed: int
) -> tuple[list[Example], np.ndarray]:
    """Put a copy of each query among the training examples, at random places.

    Returns the examples and, for each, the number of the query that it copies (−1: none), [n + queries]. Copies are named
    ``copy of <query>`` and must have as many sequences as the training loss needs. A copy shares all of its words with its
    query: text similarity ranks it first by construction, so what this checks is that a solver does not miss the obvious.
    """
    examples = [*training, *(replace(query, id=f"copy of {query.id}") for query in queries)]
    owner = np.r_[np.full(len(training), -1), np.arange(len(queries))]
    order = np.random.default_rng(seed).permutation(len(examples))
    return [examples[i] for i in order], owner[order]


def copy_ranks(influence: np.ndarray, owner: np.ndarray, raises: bool = False) -> np.ndarray:
    """The rank of each query's copy among all training examples, from 1 (ties: their mean): [queries].

    ``influence`` [n, queries]. A copy lowers its query's own training loss, so the lowest score ranks first;
    ``raises``: the highest does, where a copy of a bad answer is to raise its log-odds.
    """
    influence, owner = np.asarray(influence, dtype=float), np.asarray(owner)
    copies = [np.flatnonzero(owner == query) for query in range(influence.shape[1])]
    if len(owner) != len(influence) or any(len(of_query) != 1 for of_query in copies):
        raise StudyError(
            f"copies: influence {influence.shape} and the owners of {len(owner)} examples must have exactly one "
            "copy for each query"
        )
    ranks = scipy_stats.rankdata(-influence if raises else influence, axis=0)
    return np.array([ranks[index, query] for query, (index,) in enumerate(copies)])


def copy_table(
    solvers: Mapping[str, np.ndarray], owner: np.ndarray, k: int = 10, raises: bool = False
) -> pd.DataFrame:
    """How well each solver finds the copies: columns solver, metric, value, ci_low, ci_high, n.

    ``recall@k``: share of queries whose copy is among the first k; ``percentile``: mean share of the other examples that
    rank behind the copy (1/2 by chance).
    """
    rows = []
    for solver, influence in solvers.items():
        ranks = copy_ranks(influence, owner, raises)
        for metric, values in (
            (f"recall@{k}", (ranks <= k).astype(float)),
            ("percentile", 1 - (ranks - 1) / max(1, len(owner) - 1)),
        ):
            found = mean_interval(values, f"copies/{solver}/{metric}", bounds=(0, 1))
            rows.append(
                {
                    "solver": solver,
                    "metric": metric,
                    "value": found.value,
                    "ci_low": found.low,
                    "ci_high": found.high,
                    "n": found.n,
                }
            )
    return pd.DataFrame(rows)


def sft_then_dpo(
    network,
    start: dict[str, torch.Tensor],
    chosen: Sequence[Example],
    pairs: Sequence[Example],
    beta: float,
    sft: Recipe,
    dpo: Recipe,
    pad: int,
    seed: int,
) -> None:
    """The study's order anew, in place: adapter ``sft`` from ``start`` on the chosen answers (mean loss a token), then
    ``dpo`` from it on the pairs, against it. ``chosen``, ``pairs``: ``metric.training_examples`` of either stage."""
    restore(network, "sft", start)
    fit(network, "sft", chosen, NextTokenLoss("mean"), pad, sft, seed)
    restore(network, "dpo", snapshot(network, "sft"))
    fit(
        network,
        "dpo",
        pairs,
        DPOLoss(beta, reference_logps(network, "sft", pairs, pad)),
        pad,
        dpo,
        seed,
    )


def implicit_accuracy(network, pairs: Sequence[Example], beta: float, pad: int) -> np.ndarray:
    """Which pairs DPO's implicit reward (adapter ``dpo`` against ``sft``) ranks as people did, 0 or 1: [pairs]."""
    return ranked_right(
        example_losses(
            network, "dpo", pairs, DPOLoss(beta, reference_logps(network, "sft", pairs, pad)), pad
        )
    )


def ranked_right(pair_losses: np.ndarray) -> np.ndarray:
    """Which pairs a model ranks as people did, 0 or 1, from their reward or DPO losses [n]: −log σ(margin) lies below
    log 2 exactly where the margin is above 0. The mean is the (implicit) reward accuracy."""
    return (np.asarray(pair_losses) < math.log(2)).astype(float)
