"""The headline: what a stage changed against its placebo and against start, in tables and words.

``headline.csv`` has a row for each stage, vertical and baseline; ``validity.csv`` says on which
models the vertical's instrument measures anything. A claim needs three things: an instrument above
chance on every model compared, an interval without zero, and p < .05 after Holm's correction over
all rows of one baseline that can be measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

import numpy as np
import pandas as pd

from . import StudyError
from .artifacts import content_key
from .decode import Generations
from .fan_out import fan_out
from .models import ModelSet
from .stats import (
    FEW,
    LEVEL,
    UNCLEAR,
    Interval,
    crossed_change,
    holm,
    interval_words,
    mean_interval,
    verdict,
)
from .verticals import HEADLINE, ByModel, Measure, Measures
from .verticals.common import COLUMNS, spelled

ArmNames = Mapping[str, Sequence[str]]
"""``true``, ``matched_true`` and ``matched_placebo`` → names of a stage's models, seed by seed. SFT
has ``true`` alone."""
Stages = Mapping[str, ArmNames]
ByVertical = Mapping[str, ByModel]
"""Vertical → model → the measures of the vertical's instrument."""


def measure_all(
    models: ModelSet, generations: Generations, benchmarks: str, sizes: Mapping[str, int], seed: int
) -> ByVertical:
    """Vertical → every model's measures by its instrument. ``sizes``: vertical → items (0: all)."""

    def measure(name: str) -> ByModel:
        instrument = import_module(f".verticals.{name}", __package__).instrument
        return instrument(models, generations, benchmarks, sizes[name], seed)

    own = benchmarks, generations.chat.key, seed, models.fingerprints
    keys = {content_key(name, n, *own): name for name, n in sizes.items()}
    found = dict(fan_out(measure, keys, generations.directory.parents[1] / "jobs" / "headline"))
    return {name: found[key] for key, name in keys.items()}


def one_measure(measures: Measures, metric: str, condition: str) -> Measure:
    """The measure of that name."""
    (found,) = (m for m in measures if (m.metric, m.condition) == (metric, condition))
    return found


def by_item(measures: ByModel, models: Sequence[str], metric: str, condition: str) -> np.ndarray:
    """One measure of several models, [models, items]; their items must be the same."""
    found = [one_measure(measures[model], metric, condition) for model in models]
    if any(m.item_ids != found[0].item_ids for m in found):
        raise StudyError(f"{metric}, {condition}: {', '.join(models)} answered different items")
    return np.array([m.item_values for m in found])


def arm_names(distances: pd.DataFrame) -> Stages:
    """The models that each stage is compared by, from the table of ``arms.match_arms``; SFT, which
    all of them start from, comes first."""
    found = {"sft": {"true": ["sft"]}}
    for stage, rows in distances.groupby("stage", sort=False):
        trained = rows[rows["alpha"] == 1].sort_values("seed").groupby("arm")["name"].agg(list)
        matched = rows.loc[rows["alpha"] < 1, "name"]
        back = {name.removesuffix("-matched"): name for name in matched}
        found[stage] = {"true": trained["true"]}
        for arm in ("true", "placebo"):
            found[stage][f"matched_{arm}"] = [back.get(name, name) for name in trained[arm]]
    return found


def changes_of(measures: ByModel, arms: Stages, metric: str, condition: str) -> pd.DataFrame:
    """The change of one measure of a vertical, a row for each stage and baseline: against start
    (arms as they were trained) and against the placebo (both at the same KL to SFT), over items and
    seeds.

    ``compared``: share of items × seeds with a value in both arms; if less, the smaller share of
    an arm's samples that count (``kept_rate``), where the instrument leaves some out.
    """
    like, rows = one_measure(measures["start"], metric, condition), []
    kept = [m for m in measures["start"] if (m.metric, m.condition) == ("kept_rate", condition)]
    for stage, names in arms.items():
        against = {"start": (names["true"], ["start"])}
        if "matched_placebo" in names:
            placebo = names["matched_true"], names["matched_placebo"]
            against = {"placebo": placebo} | against
        for baseline, both in against.items():
            after, before = (by_item(measures, m, metric, condition) for m in both)
            change = crossed_change(after, before, like.clusters, like.bounds)
            rows.append({"stage": stage, "baseline": baseline} | vars(change))
            shares = [np.isfinite(after - before).mean()]
            if kept:
                shares += [by_item(measures, m, "kept_rate", condition).mean() for m in both]
            rows[-1]["compared"] = min(shares)
    return pd.DataFrame(rows).rename(columns=COLUMNS | {"value": "change"})


def headline_table(measures: ByVertical, arms: Stages, validity: pd.DataFrame) -> pd.DataFrame:
    """Rows of ``headline.csv``: :func:`changes_of` every vertical's headline, stage by stage. SFT,
    one checkpoint, is compared with start alone: its share of what every stage changed.

    ``measures``: by vertical and model; ``arms``: by stage; ``validity``: of
    :func:`validity_table`. ``p_holm`` is over all rows of one baseline that can be measured, which
    is decided without a look at any change of a headline (:func:`not_valid`). ``validity_change``,
    with its interval: how the measure changed that must not fall (``Instrument.told``).
    """
    tables = []
    for vertical, found in measures.items():
        which = HEADLINE[vertical]
        table = changes_of(found, arms, which.metric, which.condition)
        told = np.nan
        if which.told:
            told = changes_of(found, arms, *which.told)[["change", "ci_low", "ci_high"]]
        table[["validity_change", "validity_low", "validity_high"]] = told
        tables.append(table.assign(vertical=vertical, worse=which.worse))
    order = [*arms].index
    table = pd.concat(tables).sort_values("stage", kind="stable", key=lambda s: s.map(order))
    table = table.reset_index(drop=True)
    tested = gated(table, validity)["measurable"] & table["p"].notna()
    return table.assign(p_holm=table[tested].groupby("baseline")["p"].transform(holm))


def compared_at(distances: pd.DataFrame) -> pd.DataFrame:
    """Where each stage's arms were compared: columns stage, baseline, ``kl`` to SFT (nats an
    answer, mean over seeds) and ``alpha``, the smallest share of its way that an arm was at."""
    by_name, rows = distances.set_index("name"), [("sft", "start", 0.0, 1.0)]
    for stage, names in arm_names(distances).items():
        if stage == "sft":
            continue
        rows.append((stage, "start", by_name.loc[names["true"], "kl"].mean(), 1.0))
        matched = by_name.loc[[*names["matched_true"], *names["matched_placebo"]]]
        kl = by_name.loc[names["matched_true"], "kl"].mean()
        rows.append((stage, "placebo", kl, matched["alpha"].min()))
    return pd.DataFrame(rows, columns=["stage", "baseline", "kl", "alpha"])


def distance_words(distances: pd.DataFrame) -> list[str]:
    """How far each stage's arms lie from SFT, as compared with each other, on SFT's answers and on
    documents. ``distances``: of ``arms.match_arms``."""
    by_name, said = distances.set_index("name"), []
    for stage, names in arm_names(distances).items():
        if stage == "sft":
            continue
        both = (by_name.loc[names[arm]] for arm in ("matched_true", "matched_placebo"))
        true, placebo = (arms.filter(regex="^kl").mean() for arms in both)
        parts = [
            f"{true[kind]:.3f} and {placebo[kind]:.3f} ({kind.removeprefix('kl_')})"
            for kind in true.index.drop("kl")
        ]
        said.append(
            f"{stage}: true arms and placebos are compared at {true['kl']:.2f} and "
            f"{placebo['kl']:.2f} nats an answer of SFT's; on documents they lie "
            f"{', '.join(parts)} nats a text from SFT."
        )
    return said


def validity_table(measures: ByVertical, arms: Stages) -> pd.DataFrame:
    """Rows of ``validity.csv``: does the instrument lie above chance on start, and on each stage's
    arms, as trained (``<stage>``) and at the same KL (``<stage>-matched``, ``<stage>-placebo``)?
    Means over seeds; ``valid`` if it does in each of them."""
    groups, ends = {"start": ["start"]}, {"matched_true": "-matched", "matched_placebo": "-placebo"}
    for stage, names in arms.items():
        groups |= {stage + ends.get(kind, ""): of_seeds for kind, of_seeds in names.items()}
    rows = []
    for vertical, found in measures.items():
        (metric, condition), chance = HEADLINE[vertical].validity, HEADLINE[vertical].chance
        like = one_measure(found["start"], metric, condition)
        key = {"vertical": vertical, "metric": metric, "condition": condition}
        for model, names in groups.items():
            values = by_item(found, names, metric, condition).T
            name = f"{vertical}/{model}/{metric}/{condition}"
            interval = mean_interval(values, name, like.clusters, like.bounds)
            of_seeds = [mean_interval(v, name, like.clusters, like.bounds) for v in values.T]
            valid = all(x.low > chance and x.n >= FEW for x in of_seeds)
            gate = {"chance": chance, "valid": valid}
            rows.append({"model": model} | key | vars(interval) | gate)
    return pd.DataFrame(rows).rename(columns=COLUMNS)


# --- in words -------------------------------------------------------------------------------------

EFFECT = "effect of the preferences"
HALF = 0.5
"""With a smaller share of pairs or samples that can be compared, the sentence says so."""


def headline_words(headline: pd.DataFrame, validity: pd.DataFrame) -> list[str]:
    """One sentence or two for each stage and vertical: an effect of the preferences or no clear
    one, with both comparisons, or not measurable after this training. SFT is only compared with
    start. What cannot be measured on start is said once for all stages, at the end.

    ``headline``, ``validity``: as of :func:`headline_table` and :func:`validity_table`; of single
    checkpoints as of ``report.checkpoint_changes`` and ``report.validity_of``.
    """
    said, on_start, placebos = [], {}, headline["baseline"].eq("placebo").any()
    for (stage, vertical), rows in headline.groupby(["stage", "vertical"], sort=False):
        failed = not_valid(validity, stage, vertical)
        head = f"{stage}, {vertical}"
        if failed["model"].eq("start").any():
            on_start[vertical] = f"{vertical}: {_not_measurable(failed, placebos)}"
        elif len(failed):
            said.append(f"{head}: {_not_measurable(failed, placebos)}")
        else:
            by_baseline = {row.baseline: row for row in rows.itertuples()}
            metric = spelled(HEADLINE[vertical].metric)
            said.append(f"{head} ({metric}): {_comparisons(by_baseline, placebos)}")
    return [*said, *on_start.values()]


def not_valid(validity: pd.DataFrame, stage: str, vertical: str) -> pd.DataFrame:
    """Of the models that a stage is compared by, the rows of those on which the vertical's
    instrument does not lie above chance.

    Where the headline is its own validity, only start is looked at: an arm's validity is then
    start's plus the very change asked for, and a gate on it would take out the largest harms.
    """
    which = HEADLINE[vertical]
    compared = ["start"]
    if which.validity != (which.metric, which.condition):
        compared += [stage, f"{stage}-matched", f"{stage}-placebo"]
    gates = validity[validity["vertical"].eq(vertical) & validity["model"].isin(compared)]
    return gates[~gates["valid"].astype(bool)]


def gated(headline: pd.DataFrame, validity: pd.DataFrame) -> pd.DataFrame:
    """``headline`` with ``measurable``: was the instrument tried on start, and above chance on all
    models compared?"""
    failed = [len(not_valid(validity, row.stage, row.vertical)) for row in headline.itertuples()]
    tried = headline["vertical"].isin(validity.loc[validity["model"] == "start", "vertical"])
    return headline.assign(measurable=np.equal(failed, 0) & tried)


def clear_verdict(row) -> str:
    """``worse`` or ``better`` where the interval and p after Holm's correction agree, else ``no
    clear change``; also where the instrument itself reads clearly less than before, as whatever it
    measures then shrinks, or where harmful requests are refused less as well."""
    blunter, clear = row.validity_high < 0, row.p_holm < 1 - LEVEL
    return verdict(row.ci_low, row.ci_high, row.worse) if clear and not blunter else UNCLEAR


def _not_measurable(failed: pd.DataFrame, placebos: bool) -> str:
    """Which models the instrument fails on, with the numbers; start alone if on start."""
    on_start = failed[failed["model"] == "start"]
    parts = []
    for row in (on_start if len(on_start) else failed).itertuples():
        value = interval_words(Interval.of_row(row), ".3f", "items")
        parts.append(f"on {row.model} {spelled(row.metric)} is {value}")
    where = "after this training" if placebos and on_start.empty else "on this model"
    chance = f"not above chance ({failed['chance'].iloc[0]:g}) over {FEW} items or more"
    if failed["n"].ge(FEW).all():
        chance = f"not above chance ({failed['chance'].iloc[0]:g})"
    return f"cannot be measured {where}: {'; '.join(parts)}, {chance}."


def _comparisons(rows: Mapping, placebos: bool) -> str:
    """``placebos``: has any stage one? Without, none is missed."""
    start, overall = rows["start"], clear_verdict(rows["start"])
    after = f"{overall}." if start.n >= FEW else "no verdict."
    if "placebo" not in rows:
        against = "no placebo. Against" if placebos else "against"
        return f"{against} start {change_words(start)}: {after}"
    placebo, found = rows["placebo"], clear_verdict(rows["placebo"])
    one = placebo.seeds < 2
    if placebo.n < FEW:
        said = "no verdict"
    elif found == UNCLEAR:
        said = "no clear " + ("difference between the two checkpoints" if one else EFFECT)
    elif one:
        said = f"the two checkpoints differ ({found}), by the preferences or by one training's luck"
    else:
        said = f"**{EFFECT}, {found}**"
    if found == UNCLEAR != overall:
        after = (
            f"{overall}, an effect of the training (SFT included), not shown to be one of the "
            "preferences."
        )
    where = f"{placebo.kl:.2f} nats an answer, {placebo.alpha:.0%} or more of each arm's way"
    against = f"{change_words(placebo)} against the placebo at the same KL to SFT ({where})"
    return f"{said}: {against}. Against start {change_words(start)}: {after}"


def change_words(row) -> str:
    """``+0.080 (95 % interval +0.020 to +0.140; p = 0.012 after Holm, n = 36 items, 3 seeds)``."""
    seeds = f"{row.seeds} seeds" if row.seeds > 1 else "one checkpoint"
    change = interval_words(Interval.of_row(row, "change"))[:-1]
    if np.isnan(row.ci_low):
        return f"{change}; {seeds})"
    p = f"p = {row.p_holm:.3f}" if row.p_holm >= 0.001 else "p < 0.001"
    few = f", only {row.compared:.0%} of the answers comparable" if row.compared < HALF else ""
    told = Interval(row.validity_change, row.validity_low, row.validity_high, row.n)
    kept = HEADLINE[row.vertical].kept
    falls = f"{spelled(kept[0])} falls as well" if kept else "the instrument itself tells less"
    blunt = f"; {falls}, {interval_words(told, label='')}"
    blunt = blunt if row.validity_high < 0 else ""
    return f"{change}; {p} after Holm, n = {row.n} items, {seeds}{few}{blunt})"
