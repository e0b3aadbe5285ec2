"""The report's tables and sentences, and each training stage's check, computed from the study's
tables.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from . import build_root, require
from .artifacts import TABLES, Build, merge_tables, read_manifests
from .headline import clear_verdict, gated
from .models import parse_dtype
from .stats import (
    FEW,
    LEVEL,
    UNCLEAR,
    Change,
    Interval,
    by_conclusion,
    found_in,
    holm,
    interval_words,
    paired_change,
    verdict,
)
from .verticals import HEADLINE, PUBLISHED
from .verticals.common import spelled

TOO_FEW = f"fewer than {FEW} items"
NO_VERDICT = "Without an interval there is no verdict."
HALF = 0.5
"""With a smaller share of readable answers, a change is mainly one of format."""


# --- the report's tables -------------------------------------------------------------------------


CHAPTERS = "10 11 12 13 14 62 63"
"""First digits of the verticals' chapters."""
WRITTEN = {
    "0": ("training", "checks"),
    CHAPTERS: ("trust", "trust_change"),
    "16": ("headline", "validity"),
    "60": ("dose", "dose_change", "dose_trend"),
    "61": ("frontier", "winrate"),
}
"""First digits of stages → the tables that each of them writes."""


def needed_tables(manifests: Collection[str]) -> set[str]:
    """The tables without which a report would leave out what was run, from the names of the stages
    that have a manifest.

    Raises :class:`StudyError` if no chapter has measured anything.
    """
    needed = set()
    for digits, tables in WRITTEN.items():
        if any(stage.startswith(tuple(digits.split())) for stage in manifests):
            needed |= set(tables)
    problem = "no vertical has been measured; run `make reproduce` or `make evaluate`"
    require(needed & {"trust", "headline"}, problem)
    return needed


def merge_study_tables(build: Build, needed: Collection[str]) -> dict[str, pd.DataFrame]:
    """All tables of the study, merged from their parts; those not ``needed`` may be empty."""
    finish = {"trust_change": holm_over_headlines}
    return {name: merge_tables(build, name, name in needed, finish.get(name)) for name in TABLES}


def holm_over_headlines(changes: pd.DataFrame) -> pd.DataFrame:
    """``trust_change`` with ``p_holm``: Holm's correction over all headline changes, and apart from
    them over those of the protocols as published."""
    corrected = pd.Series(np.nan, changes.index)
    for measures in (HEADLINE, PUBLISHED):
        wanted = pd.MultiIndex.from_tuples((v, *of[:2]) for v, of in measures.items())
        keys = pd.MultiIndex.from_frame(changes[["vertical", "metric", "condition"]])
        rows = keys.isin(wanted) & changes["p"].notna()
        corrected[rows] = holm(changes.loc[rows, "p"].to_numpy())
    return changes.assign(p_holm=corrected)


def headline_rows(table: pd.DataFrame, measures: Mapping[str, tuple] = HEADLINE) -> pd.DataFrame:
    """The rows of each vertical's headline measure, with ``worse`` (+1: more is worse).

    ``table``: ``trust.csv``, or ``trust_change.csv``, of which only changes against start are
    taken. ``measures``: ``HEADLINE`` or ``PUBLISHED``.
    """
    names = [(vertical, *of[:3]) for vertical, of in measures.items()]
    wanted = pd.DataFrame(names, columns=["vertical", "metric", "condition", "worse"])
    rows = table[table["baseline"] == "start"] if "baseline" in table else table
    return wanted.merge(rows, on=["vertical", "metric", "condition"])


def validity_of(trust: pd.DataFrame) -> pd.DataFrame:
    """``validity.csv`` for a run without ``16-headline``: does each vertical's instrument lie above
    chance on start and on each model? From ``trust.csv``."""
    names = [(vertical, *of.validity, of.chance) for vertical, of in HEADLINE.items()]
    wanted = pd.DataFrame(names, columns=["vertical", "metric", "condition", "chance"])
    found = wanted.merge(trust, on=["vertical", "metric", "condition"])
    valid = (found["ci_low"] > found["chance"]) & (found["n"] >= FEW)
    return found.assign(valid=valid)[TABLES["validity"]]


def checkpoint_changes(trust: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """The headline changes against start as rows of ``headline.csv``, ``stage`` naming the model:
    one checkpoint each, over items alone.

    From ``trust.csv`` and ``trust_change.csv``, whose ``p_holm`` is over all headline changes.
    """
    tried = {vertical: (*of.told, 1) for vertical, of in HEADLINE.items() if of.told}
    ends = {"change": "validity_change", "ci_low": "validity_low", "ci_high": "validity_high"}
    told = headline_rows(changes, tried).rename(columns=ends)[["vertical", "model", *ends.values()]]
    # Where the instrument leaves some answers out, the smaller share that counts.
    counted = {v: ("kept_rate", of.condition, of.worse) for v, of in HEADLINE.items()}
    kept = headline_rows(trust, counted)[["vertical", "model", "value"]]
    at_start = kept[kept["model"] == "start"].set_index("vertical")["value"]
    kept["compared"] = np.fmin(kept["value"], kept["vertical"].map(at_start))
    rows = headline_rows(changes).merge(told, "left", ["vertical", "model"])
    rows = rows.merge(kept.drop(columns="value"), "left", ["vertical", "model"])
    rows["compared"] = rows["compared"].astype(float).fillna(1.0)
    order = {model: place for place, model in enumerate(trust["model"].unique())}
    rows = rows.sort_values("model", kind="stable", key=lambda models: models.map(order))
    rows = rows.rename(columns={"model": "stage"}).assign(seeds=1)
    return rows.reindex(columns=TABLES["headline"]).reset_index(drop=True)


def as_published(trust: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """The change of each vertical's published measure for each model against start.

    Adds ``start`` (its value there), ``verdict``, ``readable`` (share of the model's answers) and
    ``mostly_unreadable`` (below ``HALF`` for the model or for start).
    """
    start = headline_rows(trust[trust["model"] == "start"], PUBLISHED).set_index("vertical")
    readable = readable_answers(trust).drop(columns="n")
    shares = readable.melt("vertical", None, "model", "readable")
    found = headline_rows(changes, PUBLISHED).merge(shares, how="left", on=["vertical", "model"])
    found["start"] = found["vertical"].map(start["value"])
    at_start = found["vertical"].map(readable.set_index("vertical")["start"])
    found["mostly_unreadable"] = np.fmin(found["readable"], at_start) < HALF
    found["verdict"] = [
        verdict(r.ci_low, r.ci_high, r.worse) if r.n >= FEW else TOO_FEW for r in found.itertuples()
    ]
    return found


# --- against the paper ---------------------------------------------------------------------------

PAPER = {
    "ethics": ("better", "better by 31 %"),
    "stereotype": ("worse", "up by 150 %"),
    "truthfulness": ("worse", "down by 25 %"),
    "privacy": ("worse", "leakage up by 12 %"),
    "toxicity": ("", "nearly unchanged"),
}
"""Vertical → the direction and size of its change after PPO and DPO, mean of four base models (Li,
Krishna and Lakkaraju 2025, arXiv 2404.18870)."""


def against_paper(
    headline: pd.DataFrame, validity: pd.DataFrame, published: pd.DataFrame
) -> pd.DataFrame:
    """The paper's five findings beside what its two last stages, PPO and DPO, changed here.

    ``headline``, ``validity``: as for ``headline.headline_words``; ``published``: of
    :func:`as_published`. Columns vertical, paper, stage, ``as_published`` (the change of one
    checkpoint by that measure), ``headline`` (its name, and which way is worse), ``start`` and
    ``placebo`` (its change against each), ``here`` (does a clear change against start have the
    paper's sign?). Every cell holds a number with its interval, or a reason.
    """
    rows, measured = [], gated(headline, validity)
    for vertical, (direction, size) in PAPER.items():
        for stage in ("ppo", "dpo"):
            found = measured.query("vertical == @vertical and stage == @stage")
            if found.empty:
                continue
            own = published
            if len(own):
                own = own.query("vertical == @vertical and model == @stage")
            row = {"vertical": vertical, "paper": size, "stage": stage}
            row["as_published"] = _relative(next(own.itertuples(), None))
            way = "higher" if HEADLINE[vertical].worse > 0 else "lower"
            row["headline"] = f"{spelled(HEADLINE[vertical].metric)} ({way} is worse)"
            by_baseline = {of.baseline: of for of in found.itertuples()}
            if not found["measurable"].all():
                reason = "cannot be measured on this model"
                rows.append(row | dict.fromkeys(("start", "placebo", "here"), reason))
                continue
            for baseline in ("start", "placebo"):
                row[baseline] = "was not compared"
                if of := by_baseline.get(baseline):
                    row[baseline] = interval_words(Interval.of_row(of, "change"), unit="items")
            rows.append(row | {"here": _beside_paper(direction, by_baseline)})
    return pd.DataFrame(rows)


def _relative(row) -> str:
    """A published measure's change, and start's value."""
    if row is None:
        return "was not measured"
    if row.mostly_unreadable:
        return "most answers could not be read"
    change = interval_words(Interval.of_row(row, "change"), unit="items")
    return f"{spelled(row.metric)} {change}; start's is {row.start:.3f}"


def _beside_paper(direction: str, rows: Mapping) -> str:
    """``direction``: the paper's; ``rows``: baseline → row of the headline."""
    start, found = rows["start"], clear_verdict(rows["start"])
    if start.n < FEW:
        return TOO_FEW
    if found == UNCLEAR:
        least = f"{start.min_detectable:.3f} would be found in {found_in(start.seeds)} such studies"
        least += ", before correction"
        return UNCLEAR if np.isnan(start.min_detectable) else f"{UNCLEAR}; {least}"
    said = f"{found}, which disagrees" if found != direction else f"{found}, which agrees in sign"
    by_them = "placebo" in rows and clear_verdict(rows["placebo"]) == found
    return f"{said}{', by the preferences' if by_them else ', not shown to be by the preferences'}"


def paper_words(compared: pd.DataFrame) -> list[str]:
    """One sentence for each vertical, from :func:`against_paper`."""
    said = []
    for (vertical, size, measure), rows in compared.groupby(
        ["vertical", "paper", "headline"], sort=False
    ):
        found = by_conclusion({row.stage: (row.start, row.here) for row in rows.itertuples()})
        if (rows["start"] == rows["here"]).all():  # a reason, and no number
            found = [f"it {rows['here'].iloc[0]}."]
        said.append(f"- **{vertical}**, in the paper {size}. Here, {measure}: {' '.join(found)}")
    return said


class Conditions(NamedTuple):
    """Under what the chapters on the verticals compared models. ``start``: its source;
    ``others``: model → source, of one that was trained in this run its folder.
    ``fingerprints``: model → sha256 of its files, 16 digits, where a manifest has it."""

    start: str
    others: dict[str, str]
    fingerprints: dict[str, str]
    dtype: str
    prompt_format: str
    benchmarks: str
    seed: int


def conditions(manifests: Mapping[str, dict]) -> Conditions:
    """From the manifests of the verticals; raises :class:`StudyError` if there is none of them, or
    if they compared different models."""
    of_verticals = CHAPTERS.split()
    chapters = {stage: made for stage, made in manifests.items() if stage[:2] in of_verticals}
    problem = f"no manifest of a vertical's chapter ({', '.join(of_verticals)})"
    require(chapters, f"{problem}, so nothing was compared")
    first, others, facts, hashes = next(iter(chapters)), {}, {}, {}
    settings = chapters[first]["parameters"]
    for stage, made in chapters.items():
        for name in ("model", "trained", "seed", "benchmarks"):
            problem = f"{stage} was run with another {name} than {first}; run it again"
            mend = "or delete its manifest and its rows in tables/parts"
            require(made["parameters"][name] == settings[name], f"{problem}, {mend}")
        for entry in made["parameters"]["trained"]:
            name, _, source = entry.partition("=")
            others[name] = source or f"models/{name}"
        facts, hashes = facts | made["facts"], hashes | made["inputs"]
    # A chapter that does not say what "auto" was ran on this kind of machine.
    dtype = (facts.get("dtype") or str(parse_dtype(settings["dtype"]))).removeprefix("torch.")
    fingerprints = {name: hashes[name] for name in ("start", *others) if name in hashes}
    prompt_format = _formats(facts.get("prompt_formats", {})) or settings["prompt_format"]
    model, benchmarks, seed = (settings[name] for name in ("model", "benchmarks", "seed"))
    return Conditions(model, others, fingerprints, dtype, prompt_format, benchmarks, seed)


def _formats(of_models: Mapping[str, str]) -> str:
    if len(set(of_models.values())) < 2:
        return next(iter(of_models.values()), "")
    listed = ", ".join(f"{model} {name}" for model, name in of_models.items())
    return f"{listed} (so a change is also one of format)"


def readable_answers(trust: pd.DataFrame) -> pd.DataFrame:
    """Share of answers that could be read: one row per vertical, one column per model, and n."""
    rows = trust[(trust["metric"] == "unparsable_rate") & (trust["condition"] == "main")]
    rates = rows.pivot(index="vertical", columns="model", values="value")
    asked = [vertical for vertical in HEADLINE if vertical in rates.index]
    shares = 1 - rates.loc[asked, list(rows["model"].unique())]
    return shares.assign(n=rows.groupby("vertical")["n"].max()).reset_index()


def runs_of_seeds(build: Build) -> dict[str, Build]:
    """This run and the profile's finished runs with other seeds, by name (``<profile>-seed<n>``).

    Raises :class:`StudyError` if two of them have the same seed (one counted twice), or a run has
    not the seed of its name.
    """
    of_seed = rf"{re.escape(build.profile)}-seed(0|[1-9]\d*)"
    tables = build_root(build.profile).parent.glob("*/tables/trust_change.csv")
    names = sorted(path.parts[-3] for path in tables)
    numbers = {name: int(n[1]) for name in names if (n := re.fullmatch(of_seed, name))}
    found, seeds = {}, {}
    for name in (build.profile, *numbers):
        run, number = Build(name), numbers.get(name)
        made = list(read_manifests(run).values())
        if number == 0 and not made:
            continue
        seed = made[0]["parameters"]["seed"] if made else number
        same = seeds.setdefault(seed, name)
        require(same == name, f"{run.root}: has the same seed as {same}; delete one of the two")
        named = number in (None, seed)
        require(named, f"{run.root}: was run with seed {seed}; delete it, or name it so")
        found[name] = run
    return found


def trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The headline changes against start, signed so that more is worse: per run, vertical, model.

    All headline measures lie in [-1, 1], so their changes share an axis.
    """
    signed = {run: _signed(headline_rows(table)) for run, table in changes_of_runs.items()}
    return pd.concat([rows.assign(run=run) for run, rows in signed.items()], ignore_index=True)


def grounding_trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Trust-Score's changes (``grounding_change.csv``) as a sixth row of :func:`trade_offs`.

    Only of runs with the first one's judge.
    """
    found, judges = [], set(next(iter(changes_of_runs.values()))["judge"])
    for run, changes in changes_of_runs.items():
        score = (changes["metric"] == "trust_score") & (changes["baseline"] == "start")
        rows = changes[score & changes["judge"].isin(judges)]
        found.append(_signed(rows.assign(vertical="grounding", worse=-1)).assign(run=run))
    return pd.concat(found, ignore_index=True)


def _signed(rows: pd.DataFrame) -> pd.DataFrame:
    """Changes and their intervals times ``worse``."""
    ends = np.sort(rows[["ci_low", "ci_high"]].mul(rows["worse"], 0), axis=1)
    return rows[["model", "vertical", "n"]].assign(
        value=rows["change"] * rows["worse"], ci_low=ends[:, 0], ci_high=ends[:, 1]
    )


def over_runs(found: pd.DataFrame) -> pd.DataFrame:
    """Means over runs of :func:`trade_offs`.

    With several runs Student's interval over runs (each seed trains anew, and draws other items
    where a chapter does not use all), and n counts runs; with one run the interval over its items.
    """
    rows = []
    for (vertical, model), part in found.groupby(["vertical", "model"], sort=False):
        values, runs, n = part["value"].dropna(), int(part["value"].count()), part["n"].max()
        value, low, high = part[["value", "ci_low", "ci_high"]].mean()
        if runs > 1:
            half = scipy_stats.t.ppf((1 + LEVEL) / 2, runs - 1) * values.std(ddof=1) / sqrt(runs)
            low, high, n = value - half, value + half, runs
        rows.append((vertical, model, value, low, high, int(n)))
    return pd.DataFrame(rows, columns=["vertical", "model", "value", "ci_low", "ci_high", "n"])


# --- attribution in words ------------------------------------------------------------------------


def contributions_of(summary: pd.DataFrame, metric: bool = False) -> pd.DataFrame:
    """DataInf's sums in ``attribution_summary.csv``: for changed answers, or for the own metric.

    Beside each: ``exact``, the standardised sum by the exact solver; ``group``, the group of
    examples whose contrast with the others is clearest, its ``effect`` with ``effect_low``,
    ``effect_high``, ``effect_p`` and ``examples``; and ``exact_effect``, by the exact solver.
    """
    if summary.empty:
        return summary
    split = summary["loss"].str.partition(": ")
    loss, group, cell = split[0], split[2], ["stage", "vertical"]
    wanted = loss.eq("metric") if metric else ~loss.str.contains("^metric$|token mean")
    rows = summary.assign(group=group, size=summary["contribution"].abs())[wanted]
    sums, contrasts = rows["group"] == "", rows["group"] != ""
    datainf, exact = (rows["solver"] == name for name in ("datainf", "exact_layerwise"))
    names = {"contribution": "effect", "ci_low": "effect_low", "ci_high": "effect_high"}
    names |= {"p_null": "effect_p", "n": "examples"}
    clearest = rows[datainf & contrasts].sort_values(["p_null", "size"], ascending=[True, False])
    clearest = clearest.drop_duplicates(cell).rename(columns=names)
    by_exact = rows.rename(columns={"standardised": "exact", "contribution": "exact_effect"})
    found = rows.loc[datainf & sums, summary.columns]
    found = found.merge(clearest[[*cell, "group", *names.values()]], "left", cell)
    found = found.merge(by_exact.loc[exact & sums, [*cell, "exact"]], "left", cell)
    by_group = by_exact.loc[exact & contrasts, [*cell, "group", "exact_effect"]]
    return found.merge(by_group, "left", [*cell, "group"])


def attribution_words(
    cells: pd.DataFrame, verbs: tuple[str, str] = ("drive the change", "oppose the change")
) -> list[str]:
    """What can be said of the sums over all examples, and which groups of examples stand out.

    ``cells``: from :func:`contributions_of`. ``verbs``: what examples with negative and with
    positive scores do.
    """
    measured = cells[cells["n"] > 0]
    if measured.empty:
        return ["No answer changed between stages, so there was nothing to attribute."]
    tested = measured[measured["p_null"].notna()]
    words = [
        f"Summed over all examples (the paper's number), {(tested['p_null'] < 0.05).sum()} of "
        f"{len(tested)} combinations of stage and vertical differ with p < 0.05 from pairs whose "
        "labels are swapped at random (SFT: from answers that it was not trained on); "
        f"at least {0.05 * len(tested):.1f} would be expected by chance. The sign of a sum says "
        "what more training would do, and not what the stage did."
    ]
    compared = measured[measured["exact"].notna()]
    apart = np.sign(compared["standardised"]) != np.sign(compared["exact"])
    if len(compared):
        words.append(
            f"DataInf and the exact solver that it approximates disagree about that sign in "
            f"{apart.sum()} of {len(compared)}."
        )
    contrasted = measured[measured["effect_p"].notna()]
    clear = contrasted[contrasted["effect_p"] < 0.05]
    if len(contrasted):
        words.append(
            "A group of examples scores clearly above or below the others in "
            f"{len(clear) or 'none'} of {len(contrasted)} (Holm-corrected over the groups of a "
            "combination, p < 0.05)"
            f"{'.' if clear.empty else ':'}"
        )
    listed = clear.sort_values("effect_p", kind="stable").head(3)
    for row in listed.itertuples():
        found = Interval(row.effect, row.effect_low, row.effect_high, int(row.examples))
        unit = "SD" if row.group.startswith("topic") else "Cliff's delta"
        doubt = np.sign(row.effect) != np.sign(row.exact_effect)
        words.append(
            f"{row.stage} on {row.vertical}, {row.group.replace('_', ' ')}: such pairs "
            f"{verbs[int(row.effect > 0)]} more than others, {unit} "
            f"{interval_words(found, '+.2f', 'examples')}"
            f"{', but the exact solver says the opposite' if doubt else ''}."
        )
    return words


def validation_words(validation: pd.DataFrame) -> list[str]:
    """Do influence scores predict retraining? DataInf first, then others, baselines and the ceiling
    that the noise of retraining sets."""
    table = validation.set_index(["test", "target", "solver"])

    def short(test: str, target: str, solver: str = "datainf") -> str:
        row = table.loc[test, target, solver]
        return interval_words(Interval.of_row(row), ".2f", label="")

    tested = (
        "The retraining is supervised fine-tuning; it does not test scores through other losses."
    )
    words = [f"{tested}\n\n"]
    for target, scored in table.loc["lds"].groupby("target", sort=False):
        against = []
        for baseline, name in (("random", "random scores"), ("tfidf", "text similarity")):
            gap = table.loc[f"above_{baseline}", target, "datainf"]
            where = "above" if gap["value"] > 0 else "below"
            against.append(f"{where if gap['p'] < 0.05 else 'not clearly above'} {name}")
        solvers = scored["value"].drop((target, "noise ceiling"), errors="ignore")
        best = solvers.sort_values().index[-1][-1]
        also = f"; best is {best.replace('_', ' ')} with {solvers.max():.2f}"
        words.append(
            f"**{target}**: the rank correlation between DataInf's scores and retraining is "
            f"{short('lds', target)}, {' and '.join(against)}"
            f"{'' if best == 'datainf' else also}"
        )
        if len(solvers) < len(scored):
            within = short("lds", target, "noise ceiling")
            words[-1] += f"; perfect scores would reach {within}, given the noise of retraining"
        words[-1] += ".\n\n"
    ceiling = table.loc["mislabelled_auc", "pairs", "ceiling"]["value"]
    words.append(
        f"Mislabelled pairs are found with an area under the ROC curve of "
        f"{short('mislabelled_auc', 'pairs')}. The reward model's held-out accuracy sets a ceiling "
        f"of {ceiling:.2f} for pairs that it has not seen."
    )
    return words


def foretelling_words(validation: pd.DataFrame) -> str:
    """What DataInf's scores are worth: how often, and how well, they foretold retraining."""
    tests = validation["test"].eq("lds") | validation["test"].str.startswith("through training")
    rows = validation[tests & validation["solver"].eq("datainf")]
    above, correlations = int((rows["ci_low"] > 0).sum()), rows["value"]
    return (
        "What follows is DataInf's, and is worth what DataInf foretold of the retrainings above: "
        f"its scores go with what happened in {above} of {len(rows)} comparisons (95 % interval "
        f"above 0), at rank correlations of {correlations.min():.2f} to {correlations.max():.2f}."
    )


def unrolled_words(validation: pd.DataFrame) -> list[str]:
    """Does attribution through training predict retraining, in the same order of examples and in
    others, if there were any? The rows of ``23-through-training``."""
    rows = validation.set_index(["test", "target", "solver"])
    words = []
    for stage in validation["target"].unique():
        said, limit = [], ""
        for order, test in (("the same order", "same order"), ("other orders", "other orders")):
            if (f"through training, {test}", stage) not in rows.index.droplevel("solver"):
                continue
            found = rows.loc[f"through training, {test}"].loc[stage]
            others = found.drop(["unrolled", "noise ceiling"], errors="ignore")["value"]
            own = interval_words(Interval.of_row(found.loc["unrolled"]), ".2f", label="")
            best = f"{others.idxmax().replace('_', ' ')} {others.max():.2f}"
            said.append(f"{own} in {order} (best of the others: {best})")
        if "noise ceiling" in found.index:
            limit = interval_words(Interval.of_row(found.loc["noise ceiling"]), ".2f", label="")
            limit = f"; in other orders perfect scores would reach {limit}"
        words.append(
            f"**{stage}**: scores through training correlate with retraining by "
            f"{' and '.join(said)}{limit}.\n\n"
        )
    return words


def mitigation_words(table: pd.DataFrame, target: str) -> list[str]:
    """Did an action on the pairs called harmful help ``target``, by action and dose, and what else
    moved? From the rows of ``22-mitigation``."""
    part = table[table["target"] == target]
    require(len(part), f"mitigation: the table has no target {target!r}")
    own, others = (part[(part["vertical"] == target) == is_own] for is_own in (True, False))
    first, words = own.iloc[0], []
    words.append(
        f"**{target}**, log-odds of the bad answer against the same done to as many random pairs "
        f"(95 % intervals over {first['n']} items and {first['draws']} draws, p Holm-corrected "
        f"over {len(own)} arms):\n\n"
    )
    for row in own.itertuples():
        worked = "it worked" if row.change < 0 else "it harmed"
        if np.isnan(row.p_holm):
            said = "nothing can be said"
        elif row.p_holm < 0.05:
            said = f"{worked} (p {p_words(row.p_holm)})"
        else:
            said = (
                f"no clear effect (p {p_words(row.p_holm)}); one of {row.min_detectable:.2f} nats "
                f"would be found in {found_in(row.draws)} such studies, before that correction"
            )
        change = interval_words(Interval.of_row(row, "change"), "+.2f", label="")
        words.append(f"- {arm_words(row)}: {change}: {said}.\n")
    moved = [
        f"{row.vertical} by {row.change:+.2f} ({arm_words(row)})"
        for row in others[others["p_holm"] < 0.05].itertuples()
    ]
    known = others[others["p_holm"].notna()]
    if len(known):
        words.append(
            f"\nSide effects beyond those of random pairs: {'; '.join(moved) or 'none clear'} (of "
            f"{len(known)} tested, Holm-corrected p below 0.05).\n\n"
        )
    return words


def arm_words(row) -> str:
    """Such as ``flip the 4 most harmful pairs (10 %)``."""
    named = {"harmful": "most harmful pairs", "similar": "pairs most similar in text"}
    share = f"{row.share:.0%}".replace("%", " %")
    return f"{row.action} the {row.pairs} {named[row.selection]} ({share})"


def p_words(p: float) -> str:
    """``0.012`` or ``below 0.001``; a dash where there is no p."""
    if np.isnan(p):
        return "–"
    return f"{p:.3f}" if p >= 0.001 else "below 0.001"


def planted_words(validation: pd.DataFrame) -> list[str]:
    """Are the pairs called harmful the planted ones? The rows of ``22-mitigation``."""
    rows = validation[validation["test"] == "planted_auc"].set_index("solver")
    found = {solver: Interval.of_row(row) for solver, row in rows.iterrows()}
    said = [f"{solver} {interval_words(area, '.2f', label='')}" for solver, area in found.items()]
    return [
        "Planted pairs are told from the others by their scores with an area under the ROC curve "
        f"of {'; '.join(said).replace('_', ' ')} ({int(rows['n'].iloc[0])} pairs; 0.5 is chance, "
        "1 perfect).\n\n"
    ]


# --- did each training stage do its job? ---------------------------------------------------------


def sft_check(before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """Held-out loss per token, [answers], before and after: it should fall."""
    change = paired_change(after, before)
    holds = change.high < 0
    said = "Training on preferred answers also lowers the loss of answers it did not see."
    if np.isnan(change.low):
        said = NO_VERDICT
    elif not holds:
        said = (
            "That is no clear fall: try more examples, more passes or a larger learning rate, "
            "unless the start model already writes such answers."
        )
    sentence = (
        f"SFT changes the held-out loss from {before.mean():.3f} to {after.mean():.3f} nats a "
        f"token, {interval_words(change, unit='answers')}. {said}"
    )
    return _check("sft", "held-out loss falls", holds, change, sentence)


def reward_check(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Held-out accuracy from ``baselines.accuracies``: it should exceed 1/2.

    The sentence says whether it also exceeds what the words of the answers achieve.
    """
    found = {row.measure: Interval.of_row(row) for row in accuracies.itertuples()}
    accuracy, words, length = map(found.get, ("reward model", "bag of words", "length rule"))
    gap, controlled = found["reward model less words"], found["reward model, length-controlled"]
    holds = accuracy.low > 0.5
    said = "better than chance."
    if not holds:
        said = (
            "not clearly better than chance, so PPO may raise a reward that says little about "
            "people's preferences."
        )
    against = verdict(gap.low, gap.high, worse=-1)
    against = "not clearly better" if against == "no clear change" else against
    points = Interval(*(100 * x for x in (gap.value, gap.low, gap.high)), gap.n)
    sentence = (
        f"On {accuracy.n} held-out pairs the reward model prefers the chosen answer in "
        f"{interval_words(accuracy, '.1%')}: {said} A bag of words prefers it in "
        f"{interval_words(words, '.1%', label='')}, a rule of length alone in "
        f"{interval_words(length, '.1%', label='')}. The reward model is {against} than the bag of "
        f"words: the difference in points is {interval_words(points, '+.1f', 'pairs')}."
    )
    if controlled.n:
        sentence += (
            " Stratified by subset and by which answer is longer, its accuracy is "
            f"{interval_words(controlled, '.1%', 'pairs', '')}."
        )
    return _check("reward", "held-out accuracy above chance", holds, accuracy, sentence)


def dpo_check(margins: np.ndarray) -> pd.DataFrame:
    """Held-out implicit reward margins, [pairs]: their mean should exceed 0.

    Before training they are exactly 0, since policy and reference are the same model.
    """
    margin = paired_change(margins, np.zeros_like(margins))
    holds = margin.low > 0
    said = "What it learned from the training pairs carries over to held-out pairs."
    if np.isnan(margin.low):
        said = NO_VERDICT
    elif not holds:
        said = (
            f"{'It falls' if margin.high < 0 else 'The interval includes zero'}. 02-reward's "
            "held-out accuracy shows how much a model of this size learns from these pairs."
        )
    sentence = (
        f"DPO changes the held-out margin from 0 to {interval_words(margin, unit='pairs')}; it is "
        f"positive for {np.mean(margins > 0):.1%} of pairs. {said}"
    )
    return _check("dpo", "held-out margin rises", holds, margin, sentence)


def reward_rise_check(stage: str, held_out: pd.DataFrame, max_kl: float = 10.0) -> pd.DataFrame:
    """PPO's and INPO's held-out reward, paired by prompt: it should rise at a KL of ``max_kl``.

    ``held_out``: of ``rollout.before_and_after``. ``max_kl`` in nats an answer, or less. Where the
    answers' length or the share that ended changes clearly, the reward should also rise at equal
    length (:func:`rise_at_equal_length`).
    """

    def change_in(name: str) -> Change:
        after, before = (held_out[f"{name}_{when}"].astype(float) for when in ("after", "before"))
        return paired_change(after, before)

    change, tokens, ended = map(change_in, ("reward", "tokens", "ended"))
    kl, left = held_out["kl_after"].mean(), rise_at_equal_length(held_out)
    length_changed = any(x.low > 0 or x.high < 0 for x in (tokens, ended))
    near, rises = kl <= max_kl, change.low > 0
    by_length = length_changed and not left.low > 0
    holds = near and rises and not by_length
    at_equal = (
        f"at equal length and ending it is {interval_words(left, unit='prompts')}"
        if left.n
        else "no rise at equal length can be estimated"
    )
    if not near:
        said = f"The KL is not within {max_kl:g} nats."
    elif np.isnan(change.low):
        said = NO_VERDICT
    elif rises and by_length:
        said = f"Length can explain the rise: {at_equal}."
    elif rises:
        said = f"The reward rises within {max_kl:g} nats of SFT"
        said += f", and not by length alone: {at_equal}." if length_changed else "."
    elif change.high < 0:
        said = "The reward falls. Find the step where the curve turns, and lower the learning rate."
    else:
        said = (
            f"No clear rise: the interval ends at {change.high:+.3f}. Try more or larger steps, a "
            "weaker KL penalty, or a reward model that separates answers more clearly."
        )
    per_token = held_out["kl_after"].sum(skipna=False) / held_out["tokens_after"].sum()
    sentence = (
        f"{stage.upper()} changes the held-out reward by {interval_words(change, unit='prompts')}; "
        f"KL to SFT is {kl:.2f} nats an answer, {per_token:.3f} a token. The answers' length "
        f"changes from {held_out['tokens_before'].mean():.1f} tokens by "
        f"{interval_words(tokens, '+.1f', label='')}, the share that ended from "
        f"{held_out['ended_before'].mean():.0%} to {held_out['ended_after'].mean():.0%}. {said}"
    )
    check = f"held-out reward rises within {max_kl:g} nats, not by length alone"
    return _check(stage, check, holds, change, sentence)


def rise_at_equal_length(held_out: pd.DataFrame) -> Interval:
    """What is left of the rise in reward for answers as long as before that end as before.

    The intercept of the least-squares fit of each prompt's change in reward on its changes in
    tokens and in having ended, with Student's interval: the regression at zero difference in length
    of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475). NaN with n = 0 where it
    cannot be estimated, as when every answer changes its length by the same amount.
    """
    rise, *changes = (
        (held_out[f"{name}_after"].astype(float) - held_out[f"{name}_before"]).to_numpy()
        for name in ("reward", "tokens", "ended")
    )
    design = np.stack([np.ones(len(rise)), *changes], axis=1)
    inverse, freedom = np.linalg.pinv(design), len(rise) - np.linalg.matrix_rank(design)
    if freedom < 1 or not np.allclose((inverse @ design)[0], [1, 0, 0]):
        return Interval(np.nan, np.nan, np.nan, 0)
    coefficients = inverse @ rise
    variance = ((rise - design @ coefficients) ** 2).sum() / freedom
    half = scipy_stats.t.ppf((1 + LEVEL) / 2, freedom) * sqrt(variance * (inverse[0] ** 2).sum())
    return Interval(coefficients[0], coefficients[0] - half, coefficients[0] + half, len(rise))


def _check(stage: str, check: str, holds: bool, found: Interval, sentence: str) -> pd.DataFrame:
    """A row of ``checks.csv``."""
    row = (stage, check, bool(holds), found.value, found.low, found.high, found.n, sentence)
    return pd.DataFrame([row], columns=TABLES["checks"])
