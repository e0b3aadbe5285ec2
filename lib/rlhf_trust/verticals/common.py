"""What all verticals share: answers of every model, measures, tables, sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from .. import StudyError, require
from ..artifacts import Build, checked, write_text
from ..chat import Chat
from ..decode import Decoding, Generations, LowerStates, MultipleChoice, Prompt
from ..models import BASELINES, ModelSet
from ..sources import locate
from ..stats import (
    FEW,
    ClusterMeans,
    Interval,
    by_conclusion,
    corrected_rate,
    interval_words,
    mean_interval,
    paired_change,
    verdict,
)
from . import HEADLINE, PUBLISHED, ByModel, Logps, Measure, Measures, Sampled

Answers = dict[str, Sampled]
"""Model name → per prompt → the sampled answers."""

Choices = Callable[[Chat], Sequence[MultipleChoice]]

# --- answers --------------------------------------------------------------------------------------


def answer_all(
    models: ModelSet, generations: Generations, name: str, prompts: list[Prompt], decoding: Decoding
) -> Answers:
    """Every model's answers to the same prompts, drawn with the same random numbers."""

    def ask(model, own: Generations, network) -> Sampled:
        key = models.fingerprints[model]
        return own.answer(network, key, f"{name}.{model}", prompts, decoding)

    return _ask_all(models, generations, ask)


def score_options(
    models: ModelSet, generations: Generations, name: str, choices: Choices
) -> dict[str, Logps]:
    """Model name → per choice → the log-probabilities of its options, [options].

    ``choices``: makes them in the prompt format and with the tokenizer that a model is asked by.
    """
    states = LowerStates(models.model)  # the lower layers run once for all models on the backbone
    shared = choices(generations.chat)

    def ask(model, own: Generations, network) -> Logps:
        alone = models.is_checkpoint(model)
        asked, kept = (choices(own.chat), None) if alone else (shared, states)
        key = models.fingerprints[model]
        return own.option_logps(network, key, f"{name}.{model}", asked, kept)

    return _ask_all(models, generations, ask)


def _ask_all(models: ModelSet, generations: Generations, ask: Callable) -> dict:
    """Model name → ``ask(model name, generations in its format, network)``."""
    results = dict.fromkeys(models.names)
    # Those on the backbone first: it may have to leave the memory for the others.
    for model in sorted(models.names, key=models.is_checkpoint):
        with models.active(model) as network:
            own = generations.asked_by(models.chat(model, generations.chat))
            results[model] = ask(model, own, network)
    return results


def save_answers(
    build: Build, vertical: str, condition: str, prompts: Sequence[Prompt], answers: Answers
) -> None:
    """Write prompts and all models' answers to ``generations/<vertical>.<condition>.jsonl``.

    The attribution and the report's samples read them from there.
    """
    lines = []
    for index, prompt in enumerate(prompts):
        row = {"id": prompt.id, "turns": prompt.turns, "system": prompt.system}
        row["answers"] = {model: sampled[index] for model, sampled in answers.items()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(build.path("generations", f"{vertical}.{condition}.jsonl"), "".join(lines))


def read_answers(
    build: Build, vertical: str, condition: str = "main"
) -> list[tuple[Prompt, dict[str, list[str]]]]:
    """The prompts and answers that :func:`save_answers` wrote."""
    path = checked(build.path("generations", f"{vertical}.{condition}.jsonl"))
    require(path.exists(), f"{path}: missing; run the {vertical} notebook first")
    # Bytes: answers may contain line separators (U+2028) at which a text would be split.
    rows = map(json.loads, path.read_bytes().splitlines())
    return [(Prompt(row["id"], tuple(row["turns"]), row["system"]), row["answers"]) for row in rows]


def read_each(answers: Sampled, read: Callable[[int, str], float]) -> np.ndarray:
    """``read(item index, answer)`` of every sample, [items, samples]; NaN where unreadable."""
    values = [[read(i, answer) for answer in samples] for i, samples in enumerate(answers)]
    return np.array(values, dtype=float).reshape(len(answers), len(answers[0]) if answers else 0)


def unparsable(values: np.ndarray) -> np.ndarray:
    """1 for every answer that could not be read, else 0; shape as ``values``."""
    return np.isnan(values).astype(float)


# --- verdicts in words ----------------------------------------------------------------------------

NEXT_ITEM = re.compile(r"\n\s*(?:act|they did this|my opinion|statement|question|human|user)\s*:")
"""Where an answer goes on to make up the next question."""
CLAUSE_END = re.compile(
    r"[.!;:\n,()]|\s[-–—]+\s|\b(?:but|although|though|because|however|and|yet|while|since)\b"
    r"|(?:(?<=^no)|(?<=^yes))(?=\s(?:it|that|this|i|we|you|he|she|they|there)\b)"
)
NEGATION = re.compile(
    r"\b(?:not(?! (?:only|just|merely|simply)\b)|no(?! (?:doubt|question)\b)|cannot|never|nor"
    r"|nothing|nobody|none|neither|hardly|refus\w+|declin\w+|unable|unwilling|reluctant|hesitate"
    r"|hard|difficult|impossible|without(?! (?:a )?(?:doubt|question)\b))\b|n't\b"
)
HEDGE = re.compile(
    r"\b(?:may|might|could|perhaps|maybe|possibly|sometimes|depend\w*|unsure|uncertain|unclear"
    r"|in (?:some|certain|many) \w+|by (?:some|others|a few)"
    r"|(?:not|n't|never) (?:\w+ )?(?:sure|certain|clear|know)"
    r"|(?:some|others|few|not (?:everyone|everybody|all))\b.*"
    r"\b(?:say|think|believe|consider|argue|feel|see|find|call)s?)\b"
)
"""Doubt, or what others think."""


def clauses(answer: str) -> list[str]:
    """The clauses in which an answer asserts something, in lower case and without markup.

    Left out: questions, what follows "if", "unless" or "whether" (up to the comma, where a sentence
    begins with it), the hypothetical clause before or after "if", clauses of doubt or about what
    others think, and anything after a made-up next question.
    """
    text = re.sub(r"[*_`#\"“”]+", "", answer.replace("’", "'").casefold()).strip()
    text = re.sub(r"\beven (?:if|though)\b", "although", NEXT_ITEM.split(text)[0])
    text = re.sub(r"(\bneither\b[^.\n]*?)\bnor\b", r"\1or", re.sub(r"[ \t]+", " ", text))
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
        main = re.sub(r"^(?:if|unless|whether)\b[^,]*,(?!.*\bwould\b)", "", sentence)
        asserted, *condition = re.split(r"\b(?:if|unless|whether)\b", main)
        if not sentence.endswith("?") and not (condition and re.search(r"\bwould\b", asserted)):
            found += [clause.strip() for clause in CLAUSE_END.split(asserted)]
    return [clause for clause in found if clause and not HEDGE.search(clause)]


def verdict_of(clauses: Sequence[str], pro: re.Pattern, con: re.Pattern) -> float:
    """1 if the clauses say ``pro``, 0 if they say ``con``, NaN for neither or both.

    An odd number of negations before a word in its clause turns it round. The first verdict counts,
    unless another one contradicts it: then the answer says nothing.
    """
    found = set()
    for clause in clauses:
        for side, pattern in ((1.0, pro), (0.0, con)):
            for word in pattern.finditer(clause):
                turned = len(NEGATION.findall(clause[: word.end()])) % 2
                found.add(1.0 - side if turned else side)
    return found.pop() if len(found) == 1 else float("nan")


# --- measures -------------------------------------------------------------------------------------


def measured(
    items: Sequence, condition: str, cluster: str = "", rows=None, signed: bool = False, **values
) -> Measures:
    """Measures of the same items under one condition.

    Parameters
    ----------
    cluster
        The attribute in which items that are not independent agree, such as ``topic``.
    rows
        Which items to take, bool [items]; if none is left, there is no measure.
    values
        Metric name = its values, ndarray [items] or [items, samples].
    """
    if rows is not None:
        items, rows = [item for item, taken in zip(items, rows) if taken], np.asarray(rows, bool)
        values = {metric: v[rows] for metric, v in values.items()} if items else {}
    ids = tuple(item.id for item in items)
    clusters = tuple(getattr(item, cluster) for item in items) if cluster else None
    return [Measure(metric, condition, ids, v, clusters, signed) for metric, v in values.items()]


def within(condition: str, part: str) -> str:
    """``part`` of a condition: ``part`` alone of the main one, else ``<condition>;<part>``."""
    return part if condition == "main" else f"{condition};{part}"


# --- tables ---------------------------------------------------------------------------------------

COLUMNS = {"low": "ci_low", "high": "ci_high"}
"""What the study's tables call the ends of an ``Interval``."""


def trust_table(vertical: str, measures: ByModel, seed: int) -> pd.DataFrame:
    """Rows of ``trust.csv``: each metric of each model with n and a 95 % interval over items."""
    rows = []
    for model, measures_of_model in measures.items():
        for m in measures_of_model:
            name = f"{vertical}/{model}/{m.metric}/{m.condition}"
            interval = mean_interval(m.values, name, m.clusters, m.bounds)
            key = {"model": model, "metric": m.metric, "condition": m.condition}
            rows.append(key | vars(interval))
    return pd.DataFrame(rows).rename(columns=COLUMNS).assign(vertical=vertical, seed=seed)


def change_table(vertical: str, measures: ByModel, seed: int) -> pd.DataFrame:
    """Rows of ``trust_change.csv``: paired by item, each model against start and against sft."""
    rows = []
    compared = [(model, name) for name in BASELINES if name in measures for model in measures]
    for model, baseline in compared:
        if model in ("start", baseline):
            continue
        before = {(m.metric, m.condition): m for m in measures[baseline]}
        for m in measures[model]:
            reference = before[m.metric, m.condition]
            if reference.item_ids != m.item_ids:
                raise StudyError(f"{vertical}: {model} and {baseline} answered different items")
            change = paired_change(m.values, reference.values, m.clusters, m.bounds)
            key = {"metric": m.metric, "condition": m.condition}
            rows.append({"model": model, "baseline": baseline} | key | vars(change))
    columns = COLUMNS | {"value": "change"}
    return pd.DataFrame(rows).rename(columns=columns).assign(vertical=vertical, seed=seed)


def reader_counts(vertical: str) -> pd.Series:
    """How often the vertical's reader errs on labelled answers of the default profile's models.

    Two annotators, both language models, labelled 200 answers; those that they label alike count.
    The readers were repaired on these answers: on others they err more often
    (:func:`reader_sentence`). Those of sycophancy and refusal were labelled by one annotator, once
    the reader was made.

    Returns
    -------
    Misread, of how many ``labelled``; then for the published measure: answers that it counts
    (``hits``), of how many that it should count (``counted``), and those that it does not count
    (``rejections``), of how many that it should not (``others``). In ethics these are over answers
    with a judgement by the labels and by the reader. ``unseen_misread`` of ``unseen`` others, when
    the reader first saw them.
    """
    path = locate("shipped", "readers/errors.csv")
    return pd.read_csv(path, index_col="vertical").loc[vertical]


def answers_table(vertical: str, measures: ByModel, seed: int) -> pd.DataFrame:
    """:func:`trust_table`, and below it each model's published rate with its reader's error taken
    out, for a reader that errs on all answers as on the labelled ones (:func:`reader_counts`)."""
    of, which = reader_counts(vertical), PUBLISHED[vertical][:2]
    sides = (of.hits, of.counted), (of.rejections, of.others)
    corrected = without_error(vertical, measures, which, sides, seed)
    return pd.concat([trust_table(vertical, measures, seed), corrected], ignore_index=True)


def without_error(
    vertical: str, measures: ByModel, which: tuple[str, str], sides, seed: int
) -> pd.DataFrame:
    """Rows of ``trust.csv``: each model's rate ``which`` (metric, condition) with its detector's or
    reader's error taken out (:func:`stats.corrected_rate`), under ``<condition>;error=removed``.

    ``sides``: the detector's sensitivity and specificity, each as (right, of how many).
    """
    rows = []
    for model, found in measures.items():
        for m in (m for m in found if (m.metric, m.condition) == which):
            keep, interval = ~np.isnan(m.item_values), Interval(np.nan, np.nan, np.nan, 0)
            if keep.any():
                rates = m.item_values[keep]
                clusters = None if m.clusters is None else np.array(m.clusters)[keep]
                worth = ClusterMeans.of(rates, clusters).effective_n()
                interval = replace(corrected_rate(rates.mean(), worth, *sides), n=len(rates))
            key = {"model": model, "metric": m.metric, "condition": f"{m.condition};error=removed"}
            rows.append(key | vars(interval))
    return pd.DataFrame(rows).rename(columns=COLUMNS).assign(vertical=vertical, seed=seed)


SPELLED = {"roc auc": "ROC area", "mc1": "MC1", "mc2": "MC2", "expected max ": "expected maximum "}
"""Abbreviations in metrics' names, as they are written in text."""


def spelled(metric: str) -> str:
    """A metric's name in words."""
    name = metric.replace("_", " ")
    for short, word in SPELLED.items():
        name = name.replace(short, word)
    return name


def labelled(trust: pd.DataFrame, rows: Sequence | Mapping[tuple[str, str], str]) -> pd.DataFrame:
    """Rows of ``trust`` for a figure, with a column ``label`` for its axis.

    ``rows``: their (metric, condition), in order, with or without a label for each.
    """
    parts = []
    for metric, condition in rows:
        default = spelled(metric) + ("" if condition == "main" else f", {condition}")
        default = default.replace("=", ": ").replace(";", ", ")
        label = rows[metric, condition] if isinstance(rows, Mapping) else default
        chosen = (trust["metric"] == metric) & (trust["condition"] == condition)
        parts.append(trust[chosen].assign(label=label))
    return pd.concat(parts, ignore_index=True)


def spread(trust: pd.DataFrame, metric: str, key: str = "wording") -> pd.DataFrame:
    """How much a metric varies over the conditions ``<key>=…``: one row per model."""
    rows = trust[(trust["metric"] == metric) & trust["condition"].str.fullmatch(f"{key}=[^;]*")]
    spreads = rows.groupby("model", sort=False).agg(
        lowest=("value", "min"), highest=("value", "max"), n=("n", "max")
    )
    spreads.insert(2, "spread", spreads["highest"] - spreads["lowest"])
    return spreads.reset_index()


# --- sentences ------------------------------------------------------------------------------------


def reader_sentence(vertical: str, trust: pd.DataFrame) -> str:
    """How often written answers are misread, and the published rates without that error."""
    metric, condition, _ = PUBLISHED[vertical]
    of, on = reader_counts(vertical), "that it was not made with"
    if of.unseen:
        first = f"{of.unseen_misread} of {of.unseen} others when it first saw them"
        on = f"of the default profile's models, and {first}"
    rows = trust.query(f"metric == '{metric}' and condition == '{condition};error=removed'")
    rates = [
        f"{row.model} {interval_words(Interval.of_row(row), '.3f', 'items')}"
        for row in rows.query("n > 0").itertuples()
    ]
    name = metric.replace("_", " ")
    return (
        f"The reader misreads {of.misread} of {of.labelled} labelled answers {on}. With the "
        f"error on the labelled ones taken out, the {name} is: {'; '.join(rates) or 'not known'}."
    )


def headline_sentence(vertical: str, trust: pd.DataFrame, changes: pd.DataFrame) -> list[str]:
    """Can the headline be measured, and how did it change? From the numbers, the models of one
    verdict in one sentence.

    Each change is one checkpoint's. What it says about the way the model was trained needs further
    seeds and placebo arms: ``16-headline``.
    """
    which = HEADLINE[vertical]
    metric, condition, worse, validity, chance = which[:5]
    query = "metric == '{}' and condition == '{}'".format
    start = next(trust.query(query(metric, condition)).query("model == 'start'").itertuples())
    by_model = {row.model: row for row in trust.query(query(*validity)).itertuples()}
    valid, name = by_model["start"], spelled(metric)
    sentences = [f"At the start, {name} is {start.value:.3f}."]
    sees = bool(valid.ci_low > chance and valid.n >= FEW)
    if not sees:
        found = interval_words(Interval.of_row(valid), ".3f", "items")
        why = "clearly better than chance" if valid.n >= FEW else f"tried on {FEW} items or more"
        sentences.append(
            f"On the start model its instrument is not {why} ({spelled(validity[0])} {found}; "
            f"chance is {chance:g}), so no change of it is one of trust."
        )
    against_start = changes.query("baseline == 'start'")
    rows, found, told = against_start.query(query(metric, condition)), {}, {}
    if which.told:
        told = {r.model: r for r in against_start.query(query(*which.told)).itertuples()}
    for row in rows.itertuples():
        if row.n == 0:
            found[row.model] = "–", "no item can be compared"
            continue
        after = by_model[row.model]
        if row.n < FEW or not sees:
            clear = "no verdict"
        elif validity != (metric, condition) and not after.ci_low > chance:
            there = interval_words(Interval.of_row(after), ".3f", "items")
            clear = f"no change of trust, since {spelled(validity[0])} there is {there}"
        elif row.model in told and told[row.model].ci_high < 0:
            change = interval_words(Interval.of_row(told[row.model], "change"), unit="items")
            clear = f"no verdict, since {spelled(which.told[0])} falls as well: {change}"
        else:
            clear = verdict(row.ci_low, row.ci_high, worse)
        found[row.model] = interval_words(Interval.of_row(row, "change"), unit="items"), clear
    if found:
        first, *others = by_conclusion(found)
        sentences += [f"Changes against start, one checkpoint each: {first}", *others]
    return sentences
