"""From answers to tables: what every vertical does alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .. import StudyError
from ..artifacts import Build, write_text
from ..decode import Decoding, Generations, MultipleChoice, Prompt
from ..models import BASELINES, ModelSet
from ..stats import item_means, mean_interval, paired_change
from . import HEADLINE

Answers = dict[str, list[list[str]]]
"""Model name → per prompt → the sampled answers."""


@dataclass(frozen=True)
class Measure:
    """One metric under one condition.

    ``values``: one an item, [items], or one a sample, [items, samples]; NaN where no answer could be read.
    ``clusters``: a label an item, where items of one label (statements of a topic) are not independent.
    ``signed``: the metric runs from -1 to 1, as a difference of two rates does, and not from 0 to 1.
    """

    metric: str
    condition: str
    item_ids: tuple[str, ...]
    values: np.ndarray
    clusters: tuple[str, ...] | None = None
    signed: bool = False

    @property
    def bounds(self) -> tuple[float, float]:
        return (-1.0 if self.signed else 0.0, 1.0)

    @property
    def of_items(self) -> np.ndarray:
        """One value an item, [items]."""
        return item_means(self.values)


def answer_all(
    model_set: ModelSet,
    generations: Generations,
    name: str,
    prompts: Sequence[Prompt],
    decoding: Decoding,
) -> Answers:
    """Every model's answers to the same prompts, drawn with the same random numbers."""
    answers = {}
    for model in model_set.names:
        with model_set.active(model) as network:
            answers[model] = generations.answer(
                network, model_set.fingerprints[model], f"{name}.{model}", prompts, decoding
            )
    return answers


def score_options(
    model_set: ModelSet, generations: Generations, name: str, choices: Sequence[MultipleChoice]
) -> dict[str, list[np.ndarray]]:
    """Model name → per choice → the log-probabilities of its options, [options]."""
    logps = {}
    for model in model_set.names:
        with model_set.active(model) as network:
            logps[model] = generations.option_logps(
                network, model_set.fingerprints[model], f"{name}.{model}", choices
            )
    return logps


def trust_table(vertical: str, measures: dict[str, list[Measure]], seed: int) -> pd.DataFrame:
    """Rows of ``trust.csv``: each metric of each model with n and a 95 % interval over items."""
    rows = []
    for model, of_model in measures.items():
        for m in of_model:
            interval = mean_interval(
                m.values, f"{vertical}/{model}/{m.metric}/{m.condition}", m.clusters, m.bounds
            )
            rows.append(
                {
                    "model": model,
                    "vertical": vertical,
                    "metric": m.metric,
                    "condition": m.condition,
                    "value": interval.value,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "n": interval.n,
                    "seed": seed,
                }
            )
    return pd.DataFrame(rows)


def change_table(vertical: str, measures: dict[str, list[Measure]], seed: int) -> pd.DataFrame:
    """Rows of ``trust_change.csv``: paired by item, each model against start and against sft."""
    rows = []
    indexed = {
        model: {(m.metric, m.condition): m for m in of_model}
        for model, of_model in measures.items()
    }
    for baseline in BASELINES:
        for model in measures:
            if (
                model == baseline
                or baseline not in measures
                or (baseline == "sft" and model == "start")
            ):
                continue
            for key, after in indexed[model].items():
                before = indexed[baseline][key]
                if before.item_ids != after.item_ids:
                    raise StudyError(
                        f"{vertical}: {model} and {baseline} were measured on different items"
                    )
                change = paired_change(
                    after.values,
                    before.values,
                    f"{vertical}/{model}-{baseline}/{'/'.join(key)}",
                    after.clusters,
                    after.bounds,
                )
                rows.append(
                    {
                        "model": model,
                        "baseline": baseline,
                        "vertical": vertical,
                        "metric": key[0],
                        "condition": key[1],
                        "change": change.value,
                        "ci_low": change.low,
                        "ci_high": change.high,
                        "p": change.p,
                        "min_detectable": change.min_detectable,
                        "n": change.n,
                        "seed": seed,
                    }
                )
    return pd.DataFrame(rows)


def save_answers(
    build: Build, vertical: str, condition: str, prompts: Sequence[Prompt], answers: Answers
) -> None:
    """Keep every model's answers beside their prompts in ``generations/<vertical>.<condition>.jsonl``: what the
    attribution and the report's samples are made from."""
    lines = [
        json.dumps(
            {
                "id": prompt.id,
                "turns": prompt.turns,
                "system": prompt.system,
                "answers": {model: of_model[index] for model, of_model in answers.items()},
            },
            ensure_ascii=False,
        )
        for index, prompt in enumerate(prompts)
    ]
    write_text(build.path("generations", f"{vertical}.{condition}.jsonl"), "\n".join(lines) + "\n")


def read_answers(
    build: Build, vertical: str, condition: str = "main"
) -> list[tuple[Prompt, dict[str, list[str]]]]:
    """The prompts and answers that :func:`save_answers` kept."""
    path = build.path("generations", f"{vertical}.{condition}.jsonl")
    if not path.exists():
        raise StudyError(f"{path}: missing; run the {vertical} notebook first")
    # Bytes: answers may hold line separators (U+2028) at which a text would be split.
    rows = map(json.loads, path.read_bytes().splitlines())
    return [(Prompt(row["id"], tuple(row["turns"]), row["system"]), row["answers"]) for row in rows]


def read_each(answers: list[list[str]], read: Callable[[int, str], float]) -> np.ndarray:
    """Apply ``read(item index, answer)`` to every sample: array [items, samples], NaN where unreadable."""
    return np.array(
        [[read(index, answer) for answer in samples] for index, samples in enumerate(answers)],
        dtype=float,
    )


def within(condition: str, part: str) -> str:
    """``part`` of a condition: ``answers=all`` of the main one, ``prefix=game;answers=all`` of ``prefix=game``."""
    return part if condition == "main" else f"{condition};{part}"


def unparsable(values: np.ndarray) -> np.ndarray:
    """1 for every sample that could not be read, else 0: [items, samples]."""
    return np.isnan(values).astype(float)


def labelled(trust: pd.DataFrame, rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The rows of ``trust`` with these (metric, condition), in this order, with a ``label`` for a figure's axis."""
    found = []
    for metric, condition in rows:
        part = trust[(trust["metric"] == metric) & (trust["condition"] == condition)]
        name = metric.replace("_", " ")
        found.append(part.assign(label=name if condition == "main" else f"{name}, {condition}"))
    return pd.concat(found, ignore_index=True)


def spread(trust: pd.DataFrame, metric: str, key: str = "wording") -> pd.DataFrame:
    """How far a metric moves with one thing varied (rows with condition ``<key>=…``): one row a model."""
    rows = trust[(trust["metric"] == metric) & trust["condition"].str.fullmatch(f"{key}=[^;]*")]
    found = rows.groupby("model", sort=False).agg(
        lowest=("value", "min"), highest=("value", "max"), n=("n", "max")
    )
    found.insert(2, "spread", found["highest"] - found["lowest"])
    return found.reset_index()


def headline_sentence(vertical: str, trust: pd.DataFrame, changes: pd.DataFrame) -> list[str]:
    """What the headline metric of a vertical did, one sentence a model, made from the numbers."""
    metric, worse = HEADLINE[vertical]
    value = trust[(trust["metric"] == metric) & (trust["condition"] == "main")].set_index("model")
    name = metric.replace("_", " ")
    start = value.loc["start"]
    sentences = [
        f"At the start {name} is {start['value']:.3f}."
        if start["n"]
        else f"At the start no answer can be read, so there is no {name}."
    ]
    main = changes[
        (changes["metric"] == metric)
        & (changes["condition"] == "main")
        & (changes["baseline"] == "start")
    ]
    for row in main.itertuples():
        if row.n == 0:
            sentences.append(f"For {row.model} no item can be compared.")
            continue
        clear = row.ci_low > 0 or row.ci_high < 0
        verdict = ("worse" if row.change * worse > 0 else "better") if clear else "no clear change"
        sentences.append(
            f"{row.model} changes it by {row.change:+.3f} (95 % interval {row.ci_low:+.3f} to {row.ci_high:+.3f}, "
            f"n = {row.n}): {verdict}."
        )
    return sentences


def choose(items: Sequence, n: int, seed: int, by: Callable = lambda item: None) -> list:
    """``n`` items in a seeded order, the groups named by ``by`` taking turns (all of them when ``n`` is larger)."""
    groups: dict = {}
    for item in sorted(
        items, key=lambda item: hashlib.sha256(f"{seed}\0{item.id}".encode()).hexdigest()
    ):
        groups.setdefault(by(item), []).append(item)
    queues, chosen = [groups[key] for key in sorted(groups, key=str)], []
    while len(chosen) < min(n, len(items)):
        for queue in queues:
            if queue and len(chosen) < n:
                chosen.append(queue.pop(0))
    return chosen


def not_empty(items: list, vertical: str, source: str) -> list:
    if not items:
        raise StudyError(f"{vertical} data of {source}: the file is empty")
    return items
