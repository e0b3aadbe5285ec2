"""Figures as they are printed: as wide as a page's text or one of two columns, nothing below 7 pt,
nothing cut off or on top of something else."""

from __future__ import annotations

import inspect
import json
import re
import zlib
from itertools import combinations, product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.patches import Patch
from matplotlib.text import Text
from rlhf_trust import figures, render
from rlhf_trust.params import NOTEBOOKS
from sklearn.metrics import roc_curve

MODELS = "start sft ppo dpo inpo trust-sft trust-aligned".split()
VERTICALS = "toxicity stereotype ethics truthfulness privacy agreement".split()
SOLVERS = (
    "datainf exact_layerwise exact_joint ekfac trackstar gradient_dot gradient_cosine tfidf bm25 "
    "sentence_cosine activation_difference random"
).split()
TOPICS = (
    "being good at driving,being lazy,being likely to lie,carrying diseases,committing crimes,"
    "dealing drugs,earning little,stealing,taking jobs from others,terrorism"
).split(",")
RANDOM = np.random.default_rng(0)
STEPS = range(1, 31)


def measured(*n: int, **labels) -> pd.DataFrame:
    """A row with an interval for every combination of ``labels``; ``n`` is drawn from those."""
    table = pd.DataFrame(product(*labels.values()), columns=[*labels])
    value = RANDOM.uniform(-0.3, 0.9, len(table))
    ends = {"ci_low": value - 0.12, "ci_high": value + 0.1}
    return table.assign(value=value, **ends, n=RANDOM.choice(n or (40,), len(table)))


def forest(panel, row, rows, panels, *n, title="A title", lines=None, x="share", **more):
    table = measured(*n, **{panel: panels, row: rows}).assign(**more)
    return figures.forest(table, panel, row, title, f"{x}, 95 % interval over items", lines)


def headline():
    stages = ["sft", "ppo", "dpo", "inpo"]
    table = measured(8, 40, vertical=VERTICALS[:5], stage=stages, baseline=["placebo", "start"])
    measurable = ~table["vertical"].eq("truthfulness") | table["stage"].eq("dpo")
    table = table.assign(seeds=table["stage"].map(lambda s: 1 if s == "sft" else 3), worse=1)
    return figures.headline(table.assign(measurable=measurable, change=table["value"]))


def training(names):
    rows = [(step, name, 1000 / step) for name in names for step in STEPS]
    table = pd.DataFrame(rows, columns=["step", "metric", "value"])
    return figures.curves(table, list(names), 3, names)


def contributions():
    cells = measured(8, 36, stage=["sft", "reward", "dpo", "ppo", "inpo"], vertical=VERTICALS)
    cells["value"], cells["p_null"] = -9.46, RANDOM.uniform(0, 0.2, len(cells))
    cells.loc[cells.index[:7], ["value", "p_null", "n"]] = np.nan, np.nan, 0
    stages = cells["stage"].unique()
    title = "Sum over all examples for the metric, standardised, 240 pairs"
    return figures.contributions(cells, stages, VERTICALS, "value", title)


def effects():
    features = [f"topic: harm, people, words {i}" for i in range(8)]
    features += [
        "similarity to the evaluated texts",
        "chosen answer is longer",
        "subset = harmless",
    ]
    table = measured(feature=features).rename(columns={"value": "effect"})
    table["p_holm"] = [0.01, 0.9] * 5 + [0.04]
    return figures.effects({stage: table for stage in ("sft", "reward", "dpo", "ppo", "inpo")})


def doses():
    named = {"action": ["remove", "flip", "down-weight"], "selection": ["harmful", "similar"]}
    own = {"target": ["stereotype", "agreement"], "share": [0.05, 0.1, 0.2]}
    table = measured(24, **named, **own).rename(columns={"value": "change"})
    return figures.doses(table.assign(vertical=table["target"], draws=8))


def dose_curves(subsets=("harmless", "helpful", "all"), amounts=(30, 60, 120, 240)):
    labels = {"vertical": VERTICALS[1:5], "subset": subsets, "arm": ["true", "placebo"]}
    table = measured(26, 72, **labels, amount=amounts).rename(columns={"value": "change"})
    return figures.dose_curves(table.assign(baseline="sft", measurable=True, worse=1, seeds=3))


def learners():
    named = {"pairs": ["same", "cross"], "amount": [100, 200, 400, 800], "beta": [0.5, 2, 5]}
    kinds = ["Bradley-Terry_MLP", "classification_MLP", "order-consistent", "random_forest"]
    table = measured(learner=kinds, seed=range(4), **named)
    accuracy = {"label_accuracy": 0.5 + table["beta"] / 12}
    title = "Best of 16, golden reward: the study's reward model"
    return figures.learners(table.assign(**accuracy), "value", title, "gain, SD within a prompt")


def separation():
    measures = product(("biased", "unbiased"), ("", " standardised"), (" at one depth", ""))
    table = pd.DataFrame({"measure": ["".join(name) for name in measures], "auc": 0.99})
    sides = {"derived": 0.9, "unrelated": 0.4, "n_derived": 55, "n_unrelated": 36}
    return figures.separation(table.assign(**sides))


def margins():
    texts = pd.DataFrame({"texts": [10, 20, 50, 100, 200]}).assign(low=0.1, median=0.3, high=0.5)
    depth = pd.Series(RANDOM.uniform(0, 1, 10), np.linspace(0.1, 1, 10))
    return figures.margins({"unbiased at all depths": texts, "biased at all depths": texts}, depth)


def frontier():
    named = {"method": ["ppo", "dpo", "inpo", "grpo", "rloo"], "judge": ["reward", "judge"]}
    walked = measured(60, **named, seed=range(3), share=[0.33, 0.67, 1.0])
    walked = walked.assign(kl=7 * walked["share"] ** 2, score=walked["share"] + walked["value"])
    at_sft = pd.DataFrame({"method": "sft", "judge": named["judge"], "seed": 0, "share": 1.0})
    table = pd.concat([at_sft.assign(kl=0, score=0, n=60), walked.assign(tokens=30)])
    table["tokens"] = table["tokens"].fillna(28)
    labels = {method: f"{method} (128 answers)" for method in named["method"]}
    titles = {"reward": "reward it was trained on", "judge": "another reward model"}
    return figures.frontier(table, titles, labels)


def intervals(labels, models=MODELS, over="items", title="Machine ethics", x="rate or area"):
    return figures.intervals(measured(9, 40, label=labels, model=models), title, x, over)


MAPS = ["dpo", "SmolLM2 pruned in wheel", "start renamed", "gemma-3-270m-it", "start trained anew"]
FIGURES = {
    "frontier": frontier,
    "histogram": lambda: figures.histogram(
        RANDOM.normal(0, 1, 200), "Held-out margins after DPO", "margin", "held-out pairs"
    ),
    "curves": lambda: training(
        {
            "held_out_reward": "reward, held-out prompts",
            "held_out_kl": "KL to SFT, held-out, nats",
            "loss": "trust-aligned: loss, nats a pair",
            "gap": "gap of a round's pairs (goal 1.66667)",
        }
    ),
    "intervals": lambda: intervals(
        ["expected maximum toxicity", "toxic continuations, error removed", "detector: ROC area"],
        title="Does it prefer the right option? (line: chance)",
        x="share of wrong options below the right one − 1/2",
        over="held-out questions, clustered by topic",
    ),
    "intervals, many": lambda: intervals(
        [f"openings probability, permitted {i}" for i in "12345678"]
    ),
    "intervals, none": lambda: figures.intervals(
        measured(3, label=["a"], model=MODELS), "Few items", "share"
    ),
    "forest, solvers": lambda: forest(
        "test", "solver", [*SOLVERS, "noise ceiling"], ["answers", *VERTICALS[:5]], 12, 24
    ),
    "forest, through training": lambda: forest(
        "test",
        "solver",
        [*SOLVERS[:9], "unrolled", "noise ceiling"],
        [f"{s}, {o} order" for s in ("sft", "reward", "dpo", "inpo") for o in ("same", "other")],
        12,
    ),
    "forest, counting": lambda: forest(
        "metric",
        "judge",
        [f"{m}, {way} (18 + 20)" for way in ("readable", "all", "by option") for m in MODELS],
        ["false negative rate", "false positive rate", "balanced accuracy"],
        *(18, 20, 38),
        title="Three ways to count (wrong + acceptable acts)",
        x="rate (12 rates of fewer than 8 acts left out)",
        lines={"one half": 0.5},
    ),
    "forest, models": lambda: figures.forest(
        measured(part=["Trust-Score", "F1 refusal", "F1 correct", "F1 citation"], model=MODELS),
        *("part", "model", "Grounded answers (entailment model: lexical)", "95 % interval"),
    ),
    "forest, lineage": lambda: forest(
        "relation",
        "suspect",
        [*MODELS[1:], "dpo pruned", "start trained from scratch", "SmolLM2-360M-Instruct-GGUF"],
        ["derived", "unrelated", "of unknown origin"],
        *(200, 199),
        title="Similarity to start",
        lines={"derived from here": 0.8, "unrelated below": 0.5},
        x="CKA, unbiased, mean over depths",
    ),
    "forest, identities": lambda: forest(
        "scorer", "term", [f"people with {i}" for i in range(26)], ["profanity", "tox-block"], 8
    ),
    "headline": headline,
    "trade_offs": lambda: figures.trade_offs(
        measured(3, vertical=[*VERTICALS[:5], "grounding"], model=MODELS),
        "n = 3 runs with different seeds",
    ),
    "correlations": lambda: figures.correlations(
        pd.DataFrame(np.eye(5), VERTICALS[:5], VERTICALS[:5]), 15
    ),
    "contributions": contributions,
    "agreements": lambda: figures.agreements(
        {stage: RANDOM.uniform(-1, 1, (12, 12)) for stage in ("sft", "reward", "dpo", "inpo")},
        [name.replace("_", " ") for name in SOLVERS],
    ),
    "effects": effects,
    "doses": doses,
    "dose_curves": dose_curves,
    "dose_curves, paper": lambda: dose_curves(
        ("harmless", "helpful", "all", "ultrafeedback"), (2500, 10000, 40000, 80000)
    ),
    "learners": learners,
    "style_matrices": lambda: figures.style_matrices(
        {f"{name}\nn = 24": RANDOM.uniform(0, 1, (3, 3)) for name in [*MODELS[3:], "reward model"]},
        ["concise", "detailed", "markdown"],
    ),
    "layer_maps": lambda: figures.layer_maps({n: RANDOM.uniform(0, 1, (30, 18)) for n in MAPS}),
    "separation": separation,
    "margins": margins,
}


def drawn_by(stage: str, name: str, **given) -> list:
    """The figures that a notebook's cells show under names that begin with ``name``."""
    shown = []
    study = SimpleNamespace(show=lambda *given: shown.append(given[0]))
    libraries = {"figures": figures, "plt": plt, "np": np, "pd": pd, "sns": sns, "Patch": Patch}
    space = libraries | {"study": study} | given
    for cell in json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if f'"{name}' in (code := "".join(cell["source"])):
            exec(code, space)  # noqa: S102
    return shown


def path_of_ppo():
    rows = [
        (s, m, s * f)
        for s in (0, 8, 16)
        for m, f in zip(("held_out_kl", "held_out_reward"), (0.2, 0.1))
    ]
    curve = pd.DataFrame(rows, columns=["step", "metric", "value"])
    return drawn_by("03-ppo", "ppo-reward-kl", curve=curve, held_out=range(24))


def game():
    steps = {"mirror_step": lambda now, *_: now * 0.9, "equilibrium": lambda *_: [0.2, 0.3, 0.5]}
    start = {"reference": np.array([0.3, 0.3, 0.4]), "preference": np.eye(3), "rounds": 3}
    given = {"inpo": SimpleNamespace(**steps), "tau": 0.01, "eta": 0.005} | start
    return drawn_by("05-inpo", "inpo-game", **given)


def grid():
    groups = [f"people from {i} places" for i in range(24)]
    cells = pd.DataFrame(RANDOM.uniform(0, 1, (24, len(TOPICS))), groups, TOPICS)
    maps = {"shifts": dict.fromkeys(MODELS[1:5], cells)}
    sizes = {
        "groups": groups,
        "start": cells,
        "bound": 0.4,
        "dots": [(0.5, 0.5)],
        "weighed": range(48),
    }
    return drawn_by("11-stereotype", "stereotype-grid", **maps, **sizes)


def roc():
    acts = np.arange(60) % 2
    rows = measured(60, model=MODELS).assign(metric="roc_auc", condition="answers=options")
    rates = [
        measured(model=MODELS).assign(metric=f"false_{k}_rate", condition="main")
        for k in ("positive", "negative")
    ]
    given = {
        "ethics": SimpleNamespace(acts=lambda items: items),
        "items": acts,
        "roc_curve": roc_curve,
    }
    given["scores"] = {m: RANDOM.uniform(0, 1, 60) for m in MODELS}
    given |= {"models": SimpleNamespace(names=MODELS), "trust": pd.concat([rows, *rates])}
    return drawn_by("12-ethics", "ethics-roc", **given)


FIGURES |= {
    "03-ppo": lambda: path_of_ppo()[0],
    "05-inpo": lambda: game()[0],
    "11-stereotype, start": lambda: grid()[0],
    "11-stereotype, change": lambda: grid()[1],
    "12-ethics": lambda: roc()[0],
}


@pytest.fixture(autouse=True)
def style():
    with plt.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def faults(figure, monkeypatch, widest=5.5) -> list[str]:
    """What a reader of a printed figure would miss."""
    drawn, draw = {}, Text.draw

    def drawn_too(text, renderer, *more, **named):
        if text.get_visible() and text.get_text().strip():
            drawn[text] = text.get_window_extent(renderer)
        return draw(text, renderer, *more, **named)

    figure.canvas.draw()  # places everything
    monkeypatch.setattr(Text, "draw", drawn_too)
    figure.canvas.draw()
    monkeypatch.undo()
    width, height = figure.get_size_inches()
    said = [f"{width:.1f} × {height:.1f} inches"] * bool(width > widest or height > 9)
    for text, box in drawn.items():
        name = repr(text.get_text())
        if text.get_fontsize() < 7:
            said.append(f"{name} has {text.get_fontsize()} pt")
        if min(*box.min, *(figure.bbox.max - box.max)) < -1:
            said.append(f"{name} is cut off")
    level = [item for item in drawn.items() if item[0].get_rotation() % 90 == 0]
    for (one, box), (other, further) in combinations(level, 2):
        if box.padded(-1).overlaps(further.padded(-1)):
            said.append(f"{one.get_text()!r} on {other.get_text()!r}")
    return said


def test_every_figure_is_drawn_here():
    helpers = {"use_style", "colour", "legend_below", "titles", "narrow"}
    own = inspect.getmembers(figures, inspect.isfunction)
    names = {n for n, f in own if f.__module__ == figures.__name__ and n[0] != "_"} - helpers
    assert names == {name.partition(",")[0] for name in FIGURES if name[0].isalpha()}


HEAT_MAPS = "11-stereotype agreements contributions correlations layer_maps style_matrices".split()
TOO_HIGH = "forest, solvers;forest, through training;forest, counting;forest, identities".split(";")
NOT_NARROW = {*HEAT_MAPS, *TOO_HIGH, "dose_curves", "effects", "learners"}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_can_be_read_in_print(name, monkeypatch):
    figure = FIGURES[name]()
    assert faults(figure, monkeypatch) == []
    narrow = figures.narrow(figure)
    assert narrow != bool({name, name.partition(",")[0]} & NOT_NARROW)
    if narrow:
        assert faults(figure, monkeypatch, widest=3.25) == []


def test_faults_are_found(monkeypatch):
    figure, axis = plt.subplots(figsize=(8, 2), layout="none")
    axis.set_xticks([0, 0.01], ["one", "two"], fontsize=6)
    axis.set_position([0, 0, 1, 1])
    said = "\n".join(faults(figure, monkeypatch))
    assert all(part in said for part in ("8.0 ×", "6.0 pt", "'one' is cut off", "'one' on 'two'"))


def test_models_have_their_colours_and_nothing_else_has(monkeypatch):
    models = {figures.colour(model) for model in MODELS}
    for name, figure in ((name, FIGURES[name]()) for name in ("forest, models", "forest, solvers")):
        dots = {
            line.get_color()
            for axis in figure.axes
            for line in axis.lines
            if line.get_marker() == "o"
        }
        assert dots == (models if name == "forest, models" else {figures.INK})
    for axis in figures.curves(measured(metric=["loss"], step=STEPS), ["loss"]).axes:
        assert not {line.get_color() for line in axis.lines} & models


def test_a_figure_is_kept_as_png_and_pdf_alike_each_time(tmp_path):
    kept = [tmp_path / f"{turn}" / "margins.png" for turn in range(2)]
    for path in kept:
        render.show(figures.histogram(np.arange(-4, 5), "Margins", "margin", "pairs"), path, "alt")
    for end, width in ((".png", 0), (".pdf", 5.5), ("-column.pdf", 3.25)):
        one, other = (path.with_name(path.stem + end).read_bytes() for path in kept)
        assert one == other
        if width:
            assert b"/FontFile2" in other and b"CreationDate" not in other
            assert float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", other)[1]) == width * 72
            streams = re.findall(rb"(?s)/FlateDecode.*?>>\s*stream\n(.*?)endstream", other)
            drawn = b"".join(zlib.decompressobj().decompress(stream) for stream in streams)
            sizes = [float(size) for size in re.findall(rb"/\S+ ([\d.]+) Tf", drawn)]
            assert len(sizes) > 9 and min(sizes) >= 7
    path = tmp_path / "map" / "contributions.png"
    render.show(contributions(), path, "alt")
    assert {p.name for p in path.parent.iterdir()} == {"contributions.png", "contributions.pdf"}
