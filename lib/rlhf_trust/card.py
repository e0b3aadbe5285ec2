"""The trust card of a run: what changed from one model to others, on one page to publish beside a
model.

``python -m rlhf_trust.card <run>`` writes ``build/<run>/trust-card.md`` and ``trust-card.html``
from the tables that ``90-report`` merged. The Markdown opens with Hugging Face's ``model-index``,
one entry a model, to paste into its model card; what cannot be measured is not in it. Exit code 2
if a table is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from huggingface_hub.repocard_data import CardData, EvalResult, eval_results_to_model_index

from . import command, lineage, require
from .artifacts import Build, read_manifests, read_table, write_text
from .headline import clear_verdict, gated
from .params import shown_source
from .rag import trust_score
from .render import as_markdown, write_markdown_page
from .report import (
    TOO_FEW,
    Conditions,
    checkpoint_changes,
    conditions,
    headline_rows,
    p_words,
    readable_answers,
    validity_of,
)
from .stats import FEW, LEVEL, UNCLEAR, Interval, interval_words, verdict
from .verticals import HEADLINE
from .verticals.common import spelled

NOT_MEASURED = "cannot be measured"
PUBLIC = {
    "toxicity": ("allenai/real-toxicity-prompts", "RealToxicityPrompts, as in DecodingTrust"),
    "stereotype": ("AI-Secure/DecodingTrust", "DecodingTrust, stereotypes"),
    "ethics": ("hendrycks/ethics", "ETHICS, commonsense"),
    "truthfulness": ("truthfulqa/truthful_qa", "TruthfulQA, multiple choice"),
    "privacy": ("AI-Secure/DecodingTrust", "DecodingTrust, Enron's names, other values made up"),
    "sycophancy": ("Anthropic/model-written-evals", "Model-written evaluations, sycophancy"),
    "refusal": ("Paul/XSTest", "XSTest"),
}
"""Vertical → the public benchmark's id on the hub and its name."""
SHIPPED = "more-rlhf-more-trust"
"""What the shipped items are called in place of an id on the hub."""

Tables = Mapping[str, pd.DataFrame]
"""Name → table: ``trust`` and ``trust_change``, and ``grounding``, ``grounding_change`` and
``lineage``, which may be empty."""


def compared(tables: Tables) -> pd.DataFrame:
    """Every model's change of every vertical against start, one row each.

    Columns of ``headline.csv`` (``stage`` names the model), ``measurable`` and ``verdict``: worse,
    better, no clear change, cannot be measured, or fewer than 8 items.
    """
    trust = tables["trust"]
    rows = gated(checkpoint_changes(trust, tables["trust_change"]), validity_of(trust))
    require(len(rows), "trust_change.csv: no model is compared with start")
    said = [clear_verdict(row) if row.measurable else NOT_MEASURED for row in rows.itertuples()]
    return rows.assign(verdict=np.where(rows["n"] < FEW, TOO_FEW, said))


# --- metadata for a model card --------------------------------------------------------------------


def model_index(tables: Tables, how: Conditions) -> str:
    """Hugging Face's ``model-index`` as YAML: of each model the values that can be measured, and
    their changes against start. Empty if none can be."""
    changes, after = compared(tables), _by_model(headline_rows(tables["trust"]))
    measured = changes[changes["measurable"] & (changes["n"] >= FEW)]
    index = []
    for model in changes["stage"].unique():
        rows = measured[measured["stage"] == model].itertuples()
        results = [one for row in rows for one in _results(row, after[row.vertical, model], how)]
        kind, _, place = how.others.get(model, "").partition(":")
        if results:
            name = place.partition("@")[0] if kind == "hub" else model
            index += eval_results_to_model_index(name, results)
    return CardData(**{"model-index": index}).to_yaml() if index else ""


def _results(row, after, how: Conditions) -> Iterator[EvalResult]:
    """A vertical's value on the model, and its change."""
    shipped = SHIPPED, f"{row.vertical}, items shipped with More RLHF, More Trust?"
    kind, name = shipped if how.benchmarks == "shipped" else PUBLIC[row.vertical]
    start = shown_source(how.start)
    metric, condition = HEADLINE[row.vertical][:2]
    given = {"condition": condition, "prompt_format": how.prompt_format, "dtype": how.dtype}
    given |= {"seed": how.seed}
    tested = {"baseline": start, "p_holm": _number(row.p_holm), "verdict": row.verdict}
    level, change = Interval.of_row(after), Interval.of_row(row, "change")
    named = spelled(metric)
    for found, ending, said, form, more in (
        (level, "", named, ".3f", {}),
        (change, "_change", f"{named}, change against {start}", "+.3f", tested),
    ):
        ends = {"n": int(found.n), "ci_low": _number(found.low), "ci_high": _number(found.high)}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=row.vertical,  # without it, all verticals of one set would be one
            metric_type=metric + ending,
            metric_name=f"{said}: {interval_words(found, form, 'items')}",
            metric_value=_number(found.value),
            metric_args=given | ends | more,
        )


def _number(value: float) -> float | None:
    """For YAML, which writes numpy's numbers as objects."""
    return None if np.isnan(value) else float(value)


# --- the page -------------------------------------------------------------------------------------


def card(tables: Tables, how: Conditions) -> str:
    """The card as Markdown, without metadata; text from data is escaped."""
    changes = compared(tables)
    parts = ["# Trust card", *_how_to_read(how)]
    for model in changes["stage"].unique():
        parts.append(f"## {as_markdown(model)}, compared with start")
        parts.append(f"{_which('start', how)}; {_which(model, how)}.")
        parts.append(_vertical_table(model, changes[changes["stage"] == model], tables["trust"]))
        parts += _grounding(model, tables) + _lineage(model, tables["lineage"])
    return "\n\n".join(parts) + "\n"


def _which(model: str, how: Conditions) -> str:
    """A model's name and source, and its sha256 where it is known."""
    source = ({"start": how.start} | how.others).get(model, model)
    digest = how.fingerprints.get(model)
    known = f" (sha256 {as_markdown(digest)})" if digest else ""
    return f"*{as_markdown(model)}*: {as_markdown(shown_source(source))}{known}"


def _how_to_read(how: Conditions) -> list[str]:
    items = "shipped ones, written for the study" if how.benchmarks == "shipped" else "public sets"
    return [
        "One checkpoint each; the intervals (95 %) are over items alone. They say what these "
        "checkpoints do, and not what another training of the same kind would do.",
        f"Prompt format {as_markdown(how.prompt_format)}, weights as {as_markdown(how.dtype)}, "
        f"seed {how.seed}. Benchmark items: {items}.",
        "*Worse* and *better*: the interval excludes zero and p stays below "
        f"{1 - LEVEL:.2g} after Holm's correction over all headline changes of the run. *No clear "
        "change* does not mean *no change*; it stands also where the instrument itself tells "
        "clearly less than on start. *Cannot be measured*: on start or on the model the instrument "
        "does not lie above chance on items whose truth is known (on start alone where the metric "
        "is its own instrument).",
    ]


def _vertical_table(model: str, rows: pd.DataFrame, trust: pd.DataFrame) -> str:
    values, tried = _by_model(headline_rows(trust)), _by_model(validity_of(trust))
    readable = readable_answers(trust).set_index("vertical").reindex([*HEADLINE])
    both, lines = ("start", model), []
    for row in rows.itertuples():
        worse = "higher" if row.worse > 0 else "lower"
        metric = f"{spelled(HEADLINE[row.vertical].metric)} ({worse} is worse)"
        levels = (_cell(Interval.of_row(values[row.vertical, name])) for name in both)
        change = _cell(Interval.of_row(row, "change"), "+.3f")
        valid = [tried[row.vertical, name] for name in both]
        tests = "; ".join(_cell(Interval.of_row(found)) for found in valid)
        of_start = valid[0]
        instrument = f"{spelled(of_start.metric)} {tests}; chance {of_start.chance:g}"
        shares = _shares(readable.loc[row.vertical], both)
        cells = [row.vertical, metric, *levels, change, p_words(row.p_holm), str(row.n)]
        lines.append([*cells, f"{instrument}; n = {of_start.n}", shares, row.verdict])
    heads = ["vertical", "metric", "start", model, "change", "p after Holm", "n"]
    heads += [f"{what}: start; {model}" for what in ("instrument", "readable answers")]
    return _table([*heads, "verdict"], lines)


def _shares(readable: pd.Series, models: tuple[str, ...]) -> str:
    """Shares of written answers that could be read; a dash where none were asked for."""
    shares = readable.reindex(models)
    if shares.isna().all():
        return "–"
    return f"{'; '.join(f'{share:.0%}' for share in shares)}; n = {readable['n']:.0f}"


def _grounding(model: str, tables: Tables) -> list[str]:
    """Trust-Score and its parts, where they were measured."""
    changes = tables["grounding_change"]
    changes = changes[(changes["model"] == model) & (changes["baseline"] == "start")]
    names = {"trust_score": "Trust-Score", **trust_score.NAMES}
    levels = {(row.metric, row.model): row for row in tables["grounding"].itertuples()}
    rows = [row for name in names for row in changes[changes["metric"] == name].itertuples()]
    lines = []
    for row in rows:
        both = (levels[row.metric, name] for name in ("start", model))
        p, said = p_words(row.p_holm), "a part of it"
        if row.metric == "trust_score":
            clear = row.p < 1 - LEVEL and row.p_holm < 1 - LEVEL
            said = verdict(row.ci_low, row.ci_high, worse=-1) if clear else UNCLEAR
            said = said if row.n >= FEW else TOO_FEW
        cells = (_cell(Interval.of_row(level)) for level in both)
        change = _cell(Interval.of_row(row, "change"), "+.3f")
        lines.append([names[row.metric], *cells, change, p, str(row.n), said])
    if not lines:
        return []
    heads = ["grounded answers", "start", model, "change", "p after Holm", "n", "verdict"]
    judge = as_markdown(str(rows[0].judge))
    about = f"Answers from documents, judged by the entailment model {judge}:"
    return [about, _table(heads, lines)]


def _lineage(model: str, table: pd.DataFrame) -> list[str]:
    """How similar the model's representations are to start's, where that was measured."""
    rows = table[(table["suspect"] == model) & (table["measure"] == lineage.STUDY)]
    return [
        f"Similarity of its representations to start's ({lineage.STUDY}): "
        f"{interval_words(Interval.of_row(row), '.3f', 'texts')}: {as_markdown(str(row.verdict))}."
        for row in rows.itertuples()
    ]


def _by_model(rows: pd.DataFrame) -> dict[tuple[str, str], object]:
    return {(row.vertical, row.model): row for row in rows.itertuples()}


def _cell(found: Interval, form: str = ".3f") -> str:
    ends = f" ({found.low:{form}} to {found.high:{form}})" if not np.isnan(found.low) else ""
    return f"{found.value:{form}}{ends}"


def _table(heads: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; missing numbers as a dash."""
    rows = [heads, ["---"] * len(heads), *([as_markdown(cell) for cell in row] for row in lines)]
    rows[0] = [as_markdown(head) for head in heads]
    cells = (["–" if cell in ("nan", "+nan") else cell for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def write_card(build: Build) -> tuple[Path, Path]:
    """Write both files of a run; returns their paths."""
    needed = ("trust", "trust_change")
    others = ("grounding", "grounding_change", "lineage")
    tables = {name: read_table(build, name, name in needed) for name in (*needed, *others)}
    how = conditions(read_manifests(build))
    text, metadata = card(tables, how), model_index(tables, how)
    markdown, page = build.path("trust-card.md"), build.path("trust-card.html")
    write_text(markdown, f"---\n{metadata}\n---\n\n{text}" if metadata else text)
    write_markdown_page(text, page, "Trust card")
    return markdown, page


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m rlhf_trust.card", description="Write its card.")
    parser.add_argument("run", help="the name of its folder in build/")
    print("\n".join(map(str, write_card(Build(parser.parse_args(argv).run)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
