"""How effects grow with the amount of preference data, and whether another set does the same.

DPO is trained from SFT on growing amounts of pairs of each set, under several seeds, and beside
every **true** arm a **placebo** of as many pairs (``align.arms``). A seed draws an order of its own
of a set's pairs, one group in turn, and an amount is the beginning of it: larger amounts contain
the smaller ones, and which pairs a small amount holds is part of the seeds' spread. Epochs and
batch are held fixed, so steps grow with the pairs, and with them the distance to SFT. A true arm
and its placebo are therefore compared as in the headline, at one KL to SFT.

    effect     d(a) = mean over seeds and items of y_true(a) − y_placebo(a)
    trend      b = Σ_a w_a d(a),  w_a = (x_a − x̄) / Σ_a (x_a − x̄)²,  x_a = log₂ a

b is the change of an effect by a doubling of the pairs: the least-squares slope over the amounts
above 0, where an effect is 0 by construction. It is taken of every seed and item first, and its
interval is the crossed one over both (``stats.crossed_change``): amounts of a seed share pairs and
items, so they are not independent. To permute labels within seeds would need more seeds than a
study has: with three there are eight ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from . import models, require
from .align.arms import PLACEBO, SEED_STEP, TRUE, Arm, Trainer, match_arms
from .artifacts import TABLES, Build, content_key, note
from .chat import Chat
from .data import choose
from .data.preferences import PreferencePair, Preferences
from .decode import LowerStates
from .fan_out import fan_out
from .headline import (
    ByVertical,
    arm_names,
    by_item,
    change_words,
    changes_of,
    clear_verdict,
    compared_at,
    gated,
    headline_table,
    one_measure,
)
from .stats import UNCLEAR, CrossedChange, crossed_change, found_in, holm
from .verticals import HEADLINE, ByModel
from .verticals.common import COLUMNS, spelled

Sets = Mapping[str, Sequence[PreferencePair]]
"""Name of a preference set → its training pairs."""

ALL, MOST_GROUPS = "all", 3
"""The set of all pairs; with more groups than this, or with odd names, they are no sets."""
DOUBLING = "a doubling"
"""The contrast of a trend."""


@dataclass(frozen=True)
class DoseArm(Arm):
    """A DPO training on ``amount`` pairs of the set ``subset``."""

    subset: str
    amount: int

    @property
    def is_stage(self) -> bool:
        return False

    @property
    def name(self) -> str:
        return f"dose-{self.subset}-{self.amount}-{self.kind}-seed{self.seed}"


def preference_sets(pairs: Sequence[PreferencePair], also: Sets) -> Sets:
    """The pairs' groups if they are two or three (of HH-RLHF ``harmless`` and ``helpful``), ``all``
    of them together, and the sets ``also``."""
    groups, sets = sorted({pair.source for pair in pairs}), {}
    plain = all(re.fullmatch(r"[\w.-]+", group) for group in groups)
    if 1 < len(groups) <= MOST_GROUPS and plain:
        sets = {group: [pair for pair in pairs if pair.source == group] for group in groups}
    sets[ALL] = pairs
    for name in also:
        require(name not in sets, f"also: {name!r} is a set already; give it another name")
    return sets | also


def dose_arms(sets: Sets, amounts: Sequence[int], seeds: int) -> list[DoseArm]:
    """True and placebo arms of every set, seed and amount (0 is SFT itself). An amount that a set
    has not is left out with a note.

    Raises :class:`StudyError` for amounts that do not rise, or that no set has.
    """
    doses, sizes = [amount for amount in amounts if amount], {n: len(p) for n, p in sets.items()}
    rise = list(amounts) == sorted(set(amounts)) and doses and doses[0] > 1
    require(rise, f"amounts: must rise, from 2 pairs on (and may begin with 0), got {amounts}")
    listed, most = ", ".join(f"{name} {n}" for name, n in sizes.items()), max(sizes.values())
    problem = f"amounts: {doses[-1]} pairs are more than any set has ({listed}); name fewer"
    require(doses[-1] <= most, problem)
    for name, size in sizes.items():
        if missing := [f"{amount}" for amount in doses if amount > size]:
            note(f"{name} has {size} pairs: without {' and '.join(missing)} of them")
        if alike := [f"{amount}" for amount in doses if size / 2 < amount <= size]:
            note(
                f"{name}: most of {' and '.join(alike)} of {size} pairs are the same under all "
                "seeds, so intervals there are about these pairs"
            )
    return [
        DoseArm("dpo", kind, seed, name, amount)
        for name, size in sizes.items()
        for seed in range(seeds)
        for amount in doses
        if amount <= size
        for kind in (TRUE, PLACEBO)
    ]


def pairs_of(arm: DoseArm, sets: Sets, seed: int) -> list[PreferencePair]:
    """The pairs of an arm: of all of its set's in the seed's order the first."""
    order = seed + SEED_STEP * arm.seed
    return choose(sets[arm.subset], arm.amount, order, by=lambda pair: pair.source)


def train_all(
    base: models.Base,
    chat: Chat,
    build: Build,
    sets: Sets,
    settings: Mapping,
    arms: Sequence[DoseArm],
) -> None:
    """Train the arms that are not there (``Trainer.train``), spread where there is an executor.

    ``settings``: of DPO's chapter, whose epochs, batch and learning rate all arms have.
    """

    def trainer(arm: DoseArm, kept: LowerStates | None = None) -> Trainer:
        own = {"dpo": dict(settings) | {"n_dpo": arm.amount}}
        pairs = Preferences(pairs_of(arm, sets, settings["seed"]), [])
        return Trainer(base, chat, build, pairs, own, kept)

    def train(some: Sequence[DoseArm]) -> None:
        kept = None  # the texts of a set and seed are the same in all of its arms
        for arm in some:
            one = trainer(arm, kept)
            one.train(arm)
            kept = one.kept

    groups: dict[tuple, list[DoseArm]] = {}
    for arm in arms:
        groups.setdefault((arm.subset, arm.seed), []).append(arm)
    pieces = {content_key(*(trainer(a).about(a) for a in of)): of for of in groups.values()}
    for _ in fan_out(train, pieces, build.path("jobs", "dose")):
        pass


def distances_of(base, chat, build, arms, prompts, seed) -> pd.DataFrame:
    """``arms.match_arms`` without documents; ``stage`` names the set and the amount. Of each true
    arm and the placebo of as many pairs, the one that moved further is brought back."""
    found = match_arms(base, chat, build, arms, prompts, seed, {})
    return found.assign(stage=[_label(of.subset, of.amount) for of in found.itertuples()])


def _label(subset: str, amount: int) -> str:
    return f"{subset}, {amount} pairs"


# --- tables ---------------------------------------------------------------------------------------


def value_table(measures: ByVertical, distances: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``dose.csv``: every arm's headline values, as it was trained (alpha 1) and brought
    back; ``start``, and ``sft``, which is amount 0, once each."""
    none = pd.DataFrame({"name": ["start", "sft"], "arm": ["start", "sft"], "amount": 0})
    arms, tables = pd.concat([none, distances]), []
    for vertical, found in measures.items():
        metric, condition = HEADLINE[vertical][:2]
        values = [one_measure(found[name], metric, condition).item_values for name in arms["name"]]
        of = {"value": [*map(np.nanmean, values)], "n": [np.isfinite(v).sum() for v in values]}
        tables.append(arms.assign(vertical=vertical, metric=metric, **of))
    return pd.concat(tables)[TABLES["dose"]]


def change_table(
    measures: ByVertical, distances: pd.DataFrame, validity: pd.DataFrame
) -> pd.DataFrame:
    """Rows of ``dose_change.csv``, by set, amount and vertical: the true arms against the placebos
    (at the same KL) and, as trained, against start, as of ``headline.headline_table``; and both
    arms at that KL against SFT, without correction. SFT's own change is amount 0."""
    names, curves = arm_names(distances), []
    claims = gated(headline_table(measures, names, validity), validity).assign(arm=TRUE)
    against = claims[claims["baseline"] == "placebo"].set_index(["stage", "vertical"])
    for vertical, found in measures.items():
        (metric, condition, worse), of = HEADLINE[vertical][:3], found | {"start": found["sft"]}
        for arm in (TRUE, PLACEBO):
            arms = {s: {TRUE: kinds[f"matched_{arm}"]} for s, kinds in names.items() if s != "sft"}
            rows = changes_of(of, arms, metric, condition)
            curves.append(rows.assign(arm=arm, baseline="sft", vertical=vertical, worse=worse))
    curves = pd.concat(curves).join(against["measurable"], on=against.index.names)
    of = distances[["stage", "subset", "amount"]].drop_duplicates()
    claims = claims.merge(compared_at(distances), "left")
    found = pd.concat([claims, curves]).merge(of, "left", "stage").fillna({"amount": 0})
    return found[TABLES["dose_change"]]


Side = Sequence[tuple[float, Sequence[str]]]
"""A sum over arms: factors, and the models' names seed by seed."""


def contrasts(distances: pd.DataFrame) -> list[tuple[dict, list[str], Side, Side]]:
    """What ``dose_trend.csv`` compares: labels, sets, and two sums over arms of which the second is
    taken from the first."""
    names, found, by_set = arm_names(distances), [], {}
    for subset, amount in distances[["subset", "amount"]].drop_duplicates().to_numpy():
        by_set.setdefault(subset, {})[amount] = names[_label(subset, amount)]
    for subset, of in by_set.items():
        x = np.log2([*of]) - np.log2([*of]).mean()
        if len(of) > 1:
            sides = [
                [(w, arms[f"matched_{arm}"]) for w, arms in zip(x / (x**2).sum(), of.values())]
                for arm in (TRUE, PLACEBO)
            ]
            found.append(({"subset": subset, "contrast": DOUBLING}, [subset], *sides))
    # All pairs stand for a set where they have no groups.
    apart = [subset for subset in by_set if subset != ALL or subset == [*by_set][0]]
    for pair in combinations(apart, 2):
        if both := by_set[pair[0]].keys() & by_set[pair[1]].keys():
            labels = {"subset": " less ".join(pair), "contrast": f"at {max(both)} pairs"}
            arms = [by_set[subset][max(both)] for subset in pair]
            sides = [[(1, of["matched_true"]), (-1, of["matched_placebo"])] for of in arms]
            found.append((labels, [*pair], *sides))
    return found


def contrast_of(
    measures: ByModel, after: Side, before: Side, metric: str, condition: str
) -> CrossedChange:
    """One sum over arms less another, of every item and seed: its mean with its interval."""
    like = one_measure(measures["start"], metric, condition)
    of = [
        sum(factor * by_item(measures, names, metric, condition) for factor, names in side)
        for side in (after, before)
    ]
    ends = [sorted(factor * bound for bound in like.bounds) for factor, _ in after]
    return crossed_change(*of, like.clusters, tuple(map(sum, zip(*ends))))


def clear_from(effects: pd.DataFrame) -> float:
    """The smallest amount from which on the effect is clear and of one sign; NaN if not clear at
    the largest."""
    rows = effects.sort_values("amount", ascending=False)
    found = [clear_verdict(row) for row in rows.itertuples()]
    same = [said == found[0] != UNCLEAR for said in found]
    return float(rows["amount"].where(np.logical_and.accumulate(same)).min())


def trend_table(
    measures: ByVertical, distances: pd.DataFrame, changes: pd.DataFrame, validity: pd.DataFrame
) -> pd.DataFrame:
    """Rows of ``dose_trend.csv``, by set and vertical.

    Contrast ``a doubling``: how much the effect (true arms against placebos at the same KL) grows
    as pairs double; ``clear_from``: of :func:`clear_from`. Contrast ``at <n> pairs``: the effect of
    one set less that of another, at the largest amount that both have. A vertical without measures,
    as it cannot be measured on start, has rows without numbers.

    ``p_holm``: over the sets and verticals that can be measured, for either kind of contrast.
    ``changes``: of :func:`change_table`.
    """
    effects, rows = changes[changes["baseline"] == "placebo"], []
    for vertical in validity["vertical"].unique():
        which, found = HEADLINE[vertical], measures.get(vertical)
        for labels, subsets, *sides in contrasts(distances):
            row = labels | {"vertical": vertical, "worse": which.worse, "compared": 1.0, "n": 0}
            row["seeds"] = distances["seed"].nunique()
            if found:
                row |= vars(contrast_of(found, *sides, which.metric, which.condition))
                if which.told:
                    told = contrast_of(found, *sides, *which.told)
                    row |= {"validity_low": told.low, "validity_high": told.high}
                    row["validity_change"] = told.value
            own = effects[effects["subset"].isin(subsets) & (effects["vertical"] == vertical)]
            row["measurable"] = len(own) > 0 and own["measurable"].all()
            row["clear_from"] = clear_from(own) if found and len(subsets) == 1 else np.nan
            rows.append(row)
    table = pd.DataFrame(rows).rename(columns=COLUMNS | {"value": "change"})
    table = table.reindex(columns=TABLES["dose_trend"])
    tested = table[table["measurable"].eq(True) & table["p"].notna()]
    p_holm = tested.groupby(tested["contrast"] == DOUBLING)["p"].transform(holm)
    return table.assign(p_holm=p_holm)


# --- in words -------------------------------------------------------------------------------------


def dose_words(trend: pd.DataFrame, changes: pd.DataFrame) -> list[str]:
    """Do effects grow with the amount of preferences, beyond the placebos'; does another set do the
    same; and by set and vertical, from which amount on is an effect clear? From the rows of
    ``dose_trend.csv`` and ``dose_change.csv``."""
    can, doubling = trend["measurable"].eq(True), trend["contrast"] == DOUBLING
    slopes, others = trend[can & doubling], trend[can & ~doubling]
    if slopes.empty:
        return ["No trend over the amounts can be measured on this model."]
    effects = changes[changes["baseline"] == "placebo"].sort_values("amount")
    at_most, said, grow = effects.groupby(["subset", "vertical"])["change"].last(), [], 0
    for row in slopes.itertuples():
        found, why = clear_verdict(row), ""
        if row.change * at_most[row.subset, row.vertical] <= 0:
            why = ", as an effect shrinks"
        elif np.isnan(row.clear_from):
            why = ", though no effect is clear"
        grow += found != UNCLEAR and not why
        how = "no clear trend" if found == UNCLEAR else f"**{found} with more pairs**{why}"
        since = "is not clear at the largest amount"
        since = (
            since if np.isnan(row.clear_from) else f"is clear from {row.clear_from:.0f} pairs on"
        )
        metric = spelled(HEADLINE[row.vertical].metric)
        change = f"{change_words(row)} a doubling; the effect {since}"
        said.append(f"{row.subset}, {row.vertical} ({metric}): {how}, {change}.")
    for vertical, rows in trend[~can & doubling].groupby("vertical", sort=False):
        where = f"on arms of {', '.join(rows['subset'])}" if rows["n"].any() else "on this model"
        said.append(f"{vertical}: cannot be measured {where}.")
    single = slopes["seeds"].max() < 2
    single = " With one seed, each is about single checkpoints." if single else ""
    lead = (
        "Effects of the preferences (true arms less placebos of as many pairs, each two at one KL "
        "to SFT, which differs by amount and set; more pairs are also more steps) "
        f"clearly grow with their amount in {grow or 'none'} of {len(slopes)} combinations of set "
        f"and vertical.{single} "
        f"{_power(slopes)} a doubling."
    )
    # Of two sets neither is the baseline: an instrument may tell less on either one's arms.
    clear = [
        row
        for row in others.itertuples()
        if clear_verdict(row) != UNCLEAR and not row.validity_low > 0
    ]
    listed = [f"{r.subset}, {r.vertical}, {r.contrast}: {change_words(r)}" for r in clear]
    alone = trend.loc[doubling, "subset"].iloc[-1] == ALL
    stand_in = ", for which the groups of the pairs stand in" if alone else ""
    more = (
        f"Another set of preferences{stand_in}: effects clearly differ between two sets in "
        f"{len(clear) or 'none'} of {len(others)} comparisons{': ' if clear else ''}"
        f"{'; '.join(listed)}. {_power(others)}."
    )
    return [f"{lead}\n\n{more}" if len(others) else lead, *said]


def _power(rows: pd.DataFrame) -> str:
    found = "{:.3f} to {:.3f}".format(*rows["min_detectable"].agg(["min", "max"]))
    often = found_in(rows["seeds"].max())
    return f"Before Holm's correction, {often} such studies would find {found}"
