"""Every figure's style: drawn at the width at which it is printed, a page's or a column's, no text
below 7 pt; one colour a model and none for other things; intervals always drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.collections import QuadMesh

from .stats import FEW, mean_interval

# Okabe and Ito's palette, safe for colour-blind readers.
COLOURS = {
    "start": "#666666",
    "sft": "#0072B2",
    "ppo": "#D55E00",
    "dpo": "#009E73",
    "inpo": "#CC79A7",
    "grpo": "#882255",
    "rloo": "#332288",
    "trust-sft": "#E69F00",
    "trust-aligned": "#56B4E9",
}
OTHERS = cycle(["#44AA99", "#999933", "#117733", "#AA4499"])
"""Of Tol's palette, for models with other names as they are first drawn."""
INK, FAINT = "#222222", "#BBBBBB"
SERIES = (
    {"color": INK, "marker": "o", "linestyle": "-"},
    {"color": INK, "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    {"color": INK, "marker": "^", "linestyle": ":"},
    {"color": INK, "marker": "D", "linestyle": "-.", "markerfacecolor": "white"},
)
"""Lines that stand for no model."""
ENDS = ["ci_low", "ci_high"]
AT_ZERO = {"color": "black", "linewidth": 0.8}
WIDTH, COLUMN, TALLEST = 5.5, 3.25, 9.0
"""Inches: of a page's text, of one of two columns, and what fits on a page."""
LABEL = 30
"""Characters on a line of a row's label."""
TITLES = {
    "toxicity": "Toxicity",
    "stereotype": "Stereotypical bias",
    "ethics": "Machine ethics",
    "truthfulness": "Truthfulness",
    "privacy": "Privacy",
    "sycophancy": "Sycophancy",
    "refusal": "Over-refusal",
    "grounding": "Grounded answers",
    "agreement": "Planted: agreeing",
}


def use_style() -> None:
    """Set the study's style; call once at the head of a notebook."""
    settings = {
        "figure.figsize": (WIDTH, 2.6),
        "figure.dpi": 140,
        "savefig.dpi": 220,
        "pdf.fonttype": 42,
        "figure.constrained_layout.use": True,
        "font.size": 8,
        "figure.titlesize": 9,
        "figure.titleweight": "bold",
        "figure.labelsize": 8,
        "axes.titlesize": 8,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "xtick.major.pad": 2,
        "ytick.major.pad": 2,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#E5E5E5",
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "text.parse_math": False,  # names with a dollar sign are shown as they are
    }
    sns.set_theme(style="whitegrid", font="DejaVu Sans", rc=settings)


def colour(model: str) -> str:
    """A model's colour, the same in all figures of a notebook."""
    if model not in COLOURS:
        COLOURS[model] = next(OTHERS)
    return COLOURS[model]


# --- what figures share --------------------------------------------------------------------------


def _panels(count: int, columns: int, height: float, extra: float = 0.0, **shared):
    """A figure of ``count`` panels of ``height`` inches, ``columns`` a row, and its used axes."""
    rows = -(-count // columns)
    inches = (WIDTH, min(TALLEST, height * rows + extra))
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, count - columns) : count]:
        axis.tick_params(labelbottom=True)  # the lowest of its column
    return figure, axes.flat[:count]


def _wrapped(text: str, width: int) -> str:
    """At most ``width`` characters a line, with the line breaks that it has."""
    return "\n".join(fill(line, width) for line in text.split("\n"))


def _fitting(figure, characters: int) -> int:
    """Of the characters on a line of a page's width, those that fit on this figure's."""
    return int(characters * figure.get_figwidth() / WIDTH)


def _point(axis, y: float, value: float, low: float, high: float, colour: str, **dot) -> None:
    """A dot and its interval at height ``y``."""
    axis.plot([low, high], [y, y], color=colour, linewidth=1.5)
    axis.plot(value, y, "o", color=colour, **dot)


def _offset(place: int, count: int, spread: float = 0.8) -> float:
    """How far from the middle of its row the ``place``-th of ``count`` points lies."""
    return spread * ((place + 0.5) / count - 0.5)


def _pitch(labels: Sequence[str]) -> float:
    """Inches from one row to the next, by the longest of their labels."""
    return 0.17 + 0.1 * (max(map(len, labels)) > LABEL)


def _row_labels(axis, labels: Sequence[str], lines: bool = False) -> None:
    """Name the rows 0, 1, … from top to bottom; ``lines``: between them."""
    for row in range(1, len(labels)) if lines else ():
        axis.axhline(row - 0.5, color="#DDDDDD", linewidth=0.8)
    named = [_wrapped(label.replace("_", " "), LABEL) for label in labels]
    axis.set_yticks(range(len(labels)), named)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _span(counts: pd.Series) -> str:
    """The least and the largest of some counts, such as ``7 to 9``; once if they are equal."""
    return " to ".join(map(str, sorted({counts.min(), counts.max()})))


def legend_below(figure, handles: Sequence, labels: Sequence[str], **more) -> None:
    """A legend of a whole figure under its panels, in as many columns as fit."""
    fitting = _fitting(figure, 84) // (max(map(len, labels), default=1) + 7)
    columns = max(1, min(len(labels), fitting))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, **more)


def _dot_legend(figure, looks: dict[str, dict]) -> None:
    """``looks``: label → what its dot has of its own."""
    dot = {"marker": "o", "markersize": 5, "linestyle": "none", "color": INK}
    legend_below(figure, [plt.Line2D([], [], **dot | look) for look in looks.values()], [*looks])


def titles(figure, title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels of a whole figure. Under ``x`` there is no room for a legend."""
    if title:
        wrapped = _wrapped(title, _fitting(figure, 62))
        figure.suptitle(wrapped, x=0.01, horizontalalignment="left")
    if x:
        figure.supxlabel(_wrapped(x, _fitting(figure, 80)))
    if y:
        figure.supylabel(y)


def narrow(figure) -> bool:
    """Lay a figure out anew for a column: panels below each other, as high as they were, and longer
    legends. Nothing is done, and False returned, where a page is too short for that, and for heat
    maps, whose cells and names would be too small."""
    panels = [axis for axis in figure.axes if axis.axison]
    coloured = any(axis.images or axis.findobj(QuadMesh) for axis in panels)
    height = 0.6 + figure.get_figheight() / panels[0].get_gridspec().nrows * len(panels)
    if coloured or height > TALLEST:
        return False
    figure.set_size_inches(COLUMN, height)
    for axis in {*figure.axes} - {*panels}:
        axis.remove()
    for axis, place in zip(panels, figure.add_gridspec(len(panels), 1)):
        axis.set_subplotspec(place)
        axis.tick_params(labelleft=True, labelbottom=True)
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.set_xlabel(fill(axis.get_xlabel(), _fitting(figure, 46)))
        axis.set_ylabel(fill(axis.get_ylabel(), 36))
        axis.set_title(_wrapped(axis.get_title("left"), _fitting(figure, 62)))
    drawn = [zip(*axis.get_legend_handles_labels()) for axis in panels]
    whole = {label: handle for of_axis in drawn for handle, label in of_axis}
    for legend in (*figure.legends, *filter(None, (axis.get_legend() for axis in panels))):
        legend.remove()
        shown = zip(legend.get_texts(), legend.legend_handles)
        looks = {text.get_text(): whole.get(text.get_text(), part) for text, part in shown}
        title = legend.get_title().get_text()
        legend_below(figure, [*looks.values()], [*looks], title=title, title_fontsize=7.5)
    broken = figure.get_suptitle(), figure.get_supxlabel()
    titles(figure, *(text.replace("\n", " ") for text in broken))
    return True


def _heat_map(axis, table, low: float, high: float, fmt: str, size: float = 7.5, **more) -> None:
    """Numbers on colours from ``low`` (blue) to ``high`` (red)."""
    options = {"annot": True, "cmap": "RdBu_r", "linewidths": 1, "annot_kws": {"fontsize": size}}
    sns.heatmap(table, vmin=low, vmax=high, fmt=fmt, ax=axis, **options | more)
    axis.set(xlabel="", ylabel="")


# --- figures of several chapters -----------------------------------------------------------------


def curves(
    training: pd.DataFrame, metrics: Sequence[str], window: int = 5, names: dict | None = None
):
    """One small panel per metric: raw values faint, a running mean over ``window`` steps on top.

    ``names``: metric → title of its panel (default: the metric).
    With fewer than two windows of values, and for the learning rate, the values themselves.
    """
    figure, axes = _panels(len(metrics), min(3, len(metrics)), 1.75)
    for axis, metric in zip(axes, metrics):
        values = training[training["metric"] == metric].set_index("step")["value"]
        label = "step"
        if len(values) < 2 * window or metric == "learning_rate":
            axis.plot(values, color=INK, marker="o", markersize=2.5)
        else:
            label = f"step (black: mean over {window})"
            axis.plot(values, color=FAINT, linewidth=1, marker="o", markersize=1.5)
            axis.plot(values.rolling(window, min_periods=1, center=True).mean(), color=INK)
        axis.set(xlabel=label, title=_wrapped((names or {}).get(metric, metric), 24))
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        axis.yaxis.get_major_locator().set_params(nbins=5)
    return figure


def histogram(values: np.ndarray, title: str, xlabel: str, ylabel: str, shade: str = INK):
    """How many of some ``values`` lie where; one of the edges between bins is zero."""
    bound, bins = np.abs(values).max() or 1.0, 12
    edges = np.linspace(-bound, bound, 2 * bins + 1)
    figure, axis = plt.subplots(figsize=(WIDTH, 2.1))
    axis.hist(values, edges, color=shade)
    axis.axvline(0, **AT_ZERO)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    titles(figure, f"{title}, n = {len(values)}")
    return figure


def intervals(trust: pd.DataFrame, title: str, xlabel: str, over: str = "items", least: int = FEW):
    """Point and 95 % interval of every model (colour) and label (row).

    Columns label, model, value, ci_low, ci_high, n. ``over``: what the intervals are over and n
    counts. Points of fewer than ``least`` items are left out.
    """
    models, trust = list(trust["model"].unique()), trust[trust["n"] >= least]
    labels = list(trust["label"].unique()) or [f"fewer than {least} {over}: not drawn"]
    height = 1.0 + max(0.42, 0.12 * len(models) + 0.06) * len(labels)
    figure, axis = plt.subplots(figsize=(WIDTH, min(TALLEST, height)))
    points = trust.drop_duplicates(["label", "model"]).dropna(subset="value")
    for point in points.itertuples():
        y = labels.index(point.label) + _offset(models.index(point.model), len(models))
        _point(axis, y, point.value, point.ci_low, point.ci_high, colour(point.model))
    counts = trust.groupby("label", sort=False)["n"]
    named = [f"{label}\n(n = {_span(of_label)})" for label, of_label in counts]
    _row_labels(axis, named or labels, lines=True)
    axis.set_xlabel(_wrapped(f"{xlabel}, 95 % interval over {over}", 56))
    axis.locator_params(axis="x", nbins=7)
    titles(figure, title)
    _dot_legend(figure, {model: {"color": colour(model)} for model in models})
    return figure


def forest(
    table: pd.DataFrame, panel: str, row: str, title: str, xlabel: str, lines: dict | None = None
):
    """Point and interval of every ``row``, one panel for each value of ``panel``.

    Columns value, ci_low, ci_high, n and the two named. The study's models have their colours, by
    the column model or by the row. ``lines``: label → place of a vertical line (default: one at
    zero).
    """
    panels, rows = list(table[panel].unique()), list(table[row].unique())
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    by_row, by_panel = (table.groupby(by, sort=False)["n"] for by in (row, panel))
    names, heads = list(rows), [_wrapped(str(name), 54 // columns) for name in panels]
    if table["n"].nunique() == 1:
        xlabel += f", n = {table['n'].iloc[0]}"
    elif by_row.nunique().max() == 1:
        names = [f"{name} (n = {_span(counts)})" for name, counts in by_row]
    else:
        heads = [f"{head}\n(n = {_span(n)})" for head, (_, n) in zip(heads, by_panel)]
    height = 0.6 + _pitch(names) * len(rows)
    figure, axes = _panels(len(panels), columns, height, 0.6, sharex=True, sharey=True)
    for axis, name, head in zip(axes, panels, heads):
        for point in table[table[panel] == name].to_dict("records"):
            found = (point[column] for column in ("value", "ci_low", "ci_high"))
            shade = COLOURS.get(point.get("model", point[row]), INK)
            _point(axis, rows.index(point[row]), *found, shade)
        for where, style in zip((lines or {"": 0.0}).values(), ("-", "--", ":")):
            axis.axvline(where, linestyle=style, **AT_ZERO)
        axis.set_title(head)
        axis.locator_params(axis="x", nbins=4)
        _row_labels(axis, names)
    kinds = zip(("solid", "dashed", "dotted"), lines or ())
    legend = "; ".join(f"{kind} line: {label}" for kind, label in kinds)
    titles(figure, title, f"{xlabel}\n({legend})" if lines else xlabel)
    return figure


# --- the report ----------------------------------------------------------------------------------


def headline(changes: pd.DataFrame):
    """Every stage's change (colour) of every vertical (row), signed so that right is worse.

    Filled: true arm minus placebo; hollow: true arm minus start, for SFT one checkpoint.
    ``changes``: of ``headline.gated``; what is not measurable, or rests on fewer than ``FEW``
    items, is not drawn.
    """
    verticals, stages = list(changes["vertical"].unique()), list(changes["stage"].unique())
    seeds = changes.groupby("stage")["seeds"].max()
    height = 1.2 + max(0.55, 0.16 * len(stages)) * len(verticals)
    figure, axis = plt.subplots(figsize=(WIDTH, min(TALLEST, height)))
    for point in changes[changes["measurable"] & (changes["n"] >= FEW)].itertuples():
        hollow, shade = point.baseline == "start", colour(point.stage)
        y = verticals.index(point.vertical) + _offset(stages.index(point.stage), len(stages))
        y += 0.05 if hollow else -0.05
        ends = point.worse * point.ci_low, point.worse * point.ci_high
        look = {"markerfacecolor": "white" if hollow else shade}
        _point(axis, y, point.worse * point.change, *ends, shade, **look)
    labels = []
    for vertical, rows in changes.groupby("vertical", sort=False):
        absent = rows.loc[~rows["measurable"], "stage"].unique()
        arms = rows[rows["stage"] != "sft"]
        label = f"{TITLES[vertical]}\n(n = {_span(rows['n'])}, seeds = {_span(arms['seeds'])})"
        labels.append(label + (f"\nnot measurable: {', '.join(absent)}" if len(absent) else ""))
    _row_labels(axis, labels, lines=True)
    axis.axvline(0, **AT_ZERO)
    over = "items and seeds" if seeds.max() > 1 else "items: one checkpoint of each"
    xlabel = f"change, signed so that right is worse; 95 % interval over {over}, not corrected"
    axis.set_xlabel(_wrapped(xlabel, 56))
    titles(figure, "What each stage changed")
    axis.locator_params(axis="x", nbins=6)  # long labels, where changes are small
    looks = {"minus placebo": {}, "minus start": {"markerfacecolor": "white"}}
    one = {stage: " (one checkpoint)" if seeds[stage] < seeds.max() else "" for stage in stages}
    looks |= {stage + one[stage]: {"color": colour(stage)} for stage in stages}
    _dot_legend(figure, looks)
    return figure


def trade_offs(changes: pd.DataFrame, over: str):
    """The headline changes of every model on one axis; right of the line is worse.

    Columns as for :func:`intervals`, with vertical in place of label.
    """
    labelled = changes.assign(label=changes["vertical"].map(TITLES))
    xlabel = "change, signed so that right is worse"
    least = FEW if over == "items" else 1  # else n counts runs
    figure = intervals(labelled, "Changes against start", xlabel, over, least)
    figure.axes[0].axvline(0, **AT_ZERO)
    return figure


def correlations(table: pd.DataFrame, points: int):
    """Heat map of correlations between verticals over ``points`` pairs of model and seed."""
    names = [TITLES[vertical] for vertical in table.columns]
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    labels = {"xticklabels": names, "yticklabels": names, "cbar": False}
    _heat_map(axis, table.to_numpy(), -1, 1, "+.2f", **labels)
    axis.set_xticklabels(names, rotation=25, ha="right")
    title = "Do verticals get worse together?"
    titles(figure, title, f"correlation over n = {points} models and seeds")
    return figure


# --- attribution ---------------------------------------------------------------------------------


def contributions(
    summary: pd.DataFrame,
    stages: Sequence[str],
    verticals: Sequence[str],
    value: str,
    title: str,
    missing: str = "no change",
):
    """Heat map of one contribution statistic per stage and vertical; a star where p_null < 0.05.

    ``missing``: what a cell without a number says (by default, that the stage changed no answer).
    """
    cells = summary.set_index(["stage", "vertical"])[[value, "p_null", "n"]].astype(float)
    table, p, n = (cells[name].unstack().reindex(stages, columns=verticals) for name in cells)
    text = table.map(lambda v: missing if pd.isna(v) else f"{v:+.2f}")
    text += p.map(lambda v: " *" if v < 0.05 else "") + n.map(lambda v: f"\nn = {v:.0f}" * (v > 0))
    bound = max(1e-9, float(np.nanmax(np.abs(table.to_numpy()), initial=0.0)))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.4 * len(stages) + 1.4))
    # Missing cells are coloured as zero, and labelled.
    shown = {"annot": text, "center": 0, "cbar": False}
    _heat_map(axis, table.fillna(0.0), -bound, bound, "", 7, **shown)
    axis.set_xticklabels([TITLES[v] for v in verticals], rotation=25, ha="right")
    axis.set_yticklabels(stages, rotation=0)
    note = (
        "* p < 0.05 against each cell's own null, whose spread differs: of two numbers the larger"
    )
    titles(figure, title, f"n: items. {note} need not be the clearer")
    return figure


def agreements(tables: dict[str, np.ndarray], names: Sequence[str]):
    """Heat maps of rank correlations between solvers, one per stage."""
    columns, height = min(2, len(tables)), 0.35 + 0.15 * len(names)
    figure, axes = _panels(len(tables), columns, height, 1.3, sharex=True, sharey=True)
    look = {"annot": False, "cbar": False, "xticklabels": names, "yticklabels": names}
    for axis, (title, table) in zip(axes, tables.items()):
        _heat_map(axis, table, -1, 1, "", **look)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=90)
    shown = {"orientation": "horizontal", "aspect": 40, "label": "rank correlation of two solvers"}
    figure.colorbar(axes[0].collections[0], ax=figure.axes, **shown)
    return figure


def effects(tables: dict[str, pd.DataFrame]):
    """Effect of each feature with its interval, one panel per stage; filled where p_holm < 0.05.

    Columns feature, effect, ci_low, ci_high, p_holm.
    """
    features = list(pd.concat(tables.values())["feature"].unique())
    height, shared = 0.4 + _pitch(features) * len(features), {"sharex": True, "sharey": True}
    figure, axes = _panels(len(tables), min(2, len(tables)), height, 0.4, **shared)
    for axis, (title, table) in zip(axes, tables.items()):
        for point in table.itertuples():
            face = INK if point.p_holm < 0.05 else "white"
            found = point.effect, point.ci_low, point.ci_high
            _point(axis, features.index(point.feature), *found, INK, markerfacecolor=face)
        axis.axvline(0, **AT_ZERO)
        axis.set_title(title)
        axis.locator_params(axis="x", nbins=5)
        _row_labels(axis, features)
    titles(figure, x="effect, 95 % interval; filled: p < 0.05 after Holm's correction")
    return figure


def doses(table: pd.DataFrame):
    """Change of each target (panel) against the share of pairs acted on, one line an action;
    pale: the pairs most similar in text.

    Columns as of the table ``mitigation``; only rows that measure the target itself.
    """
    targets, actions = list(table["target"].unique()), list(table["action"].unique())
    figure, axes = _panels(len(targets), min(2, len(targets)), 2.5, 0.6)
    for axis, target in zip(axes, targets):
        own = table[(table["target"] == target) & (table["vertical"] == target)]
        shares = sorted(own["share"].unique())
        lines = own.groupby(["action", "selection"], sort=False)
        for place, ((action, selection), rows) in enumerate(lines):
            look = {"capsize": 2} | SERIES[actions.index(action)]
            if similar := selection == "similar":
                look |= {"linestyle": "none", "color": FAINT}
            label = f"{action}, most similar" if similar else action
            ends = [rows["change"] - rows["ci_low"], rows["ci_high"] - rows["change"]]
            x = rows["share"] + _offset(place, len(lines), 0.014)
            axis.errorbar(x, rows["change"], ends, label=label, **look)
        axis.axhline(0, **AT_ZERO)
        axis.set_xticks(shares, [f"{share:.0%}".replace("%", " %") for share in shares])
        title = f"{TITLES.get(target, target)} (n = {own['n'].iloc[0]})"
        axis.set(title=title, xlim=(0, table["share"].max() + 0.02), xlabel="share of all pairs")
    found = [zip(*axis.get_legend_handles_labels()) for axis in axes]
    labelled = {label: handle for of_axis in found for handle, label in of_axis}
    legend_below(figure, [*labelled.values()], [*labelled])
    unit = "log-odds of the bad answer, nats:\nchange against random pairs"
    title = f"What acting on the most harmful pairs changes, {table['draws'].iloc[0]} random draws"
    titles(figure, title, y=unit)
    return figure


def dose_curves(changes: pd.DataFrame):
    """Change of each vertical against SFT by the amount of pairs, a panel for each vertical and
    set, signed so that up is worse: DPO's true arms filled, their placebos hollow, both at one KL
    to SFT.

    ``changes``: of the table ``dose_change``; what cannot be measured is not drawn. None if nothing
    can.
    """
    shown = changes[changes["baseline"].eq("sft") & changes["measurable"] & (changes["n"] >= FEW)]
    if shown.empty:
        return None
    panels, amounts = ["vertical", "subset"], [0, *sorted(shown["amount"].astype(int).unique())]
    columns = min(3, shown["subset"].nunique())
    count = len(shown[panels].drop_duplicates())
    figure, axes = _panels(count, columns, 1.3, 0.9, sharex=True, sharey=True)
    for axis, ((vertical, subset), rows) in zip(axes, shown.groupby(panels, sort=False)):
        for place, (arm, points) in enumerate(rows.groupby("arm", sort=False)):
            value, ends = (points[some].mul(points["worse"], 0) for some in ("change", ENDS))
            bars = [value - ends.min(axis=1), ends.max(axis=1) - value]
            x = points["amount"].map(amounts.index) + _offset(place, 2, 0.24)
            look = {"markerfacecolor": "white", "linestyle": "--"} if arm == "placebo" else {}
            look |= {"color": colour("dpo"), "marker": "o", "capsize": 2}
            axis.errorbar(x, value, bars, label=f"dpo, {arm} arms", **look)
        axis.plot(0, 0, "o", color=colour("sft"), label="sft")
        axis.axhline(0, **AT_ZERO)
        axis.set_xticks(
            range(len(amounts)), [f"{a}" if a < 1000 else f"{a / 1000:g}k" for a in amounts]
        )
        axis.set_title(_wrapped(f"{TITLES[vertical]}\n{subset} (n = {_span(rows['n'])})", 20))
    legend_below(figure, *axes[0].get_legend_handles_labels())
    over = f"items and {_span(shown['seeds'])} seeds" if shown["seeds"].max() > 1 else "items"
    title = f"Change by the amount of preference pairs, 95 % interval over {over}"
    titles(figure, title, y="change against sft, up is worse")
    return figure


# --- rewards -------------------------------------------------------------------------------------


def learners(found: pd.DataFrame, metric: str, title: str, ylabel: str):
    """``metric`` against the share of correct labels, one line per kind of reward model.

    One panel for each choice (row) and number (column) of pairs; mean and 95 % interval over seeds.
    Columns as of ``order_consistency.sweep``.
    """
    amounts, unbounded = sorted(set(found["amount"])), (-np.inf, np.inf)
    panels = list(product(found["pairs"].unique(), amounts))
    columns = len(amounts) if len(amounts) <= 3 else 2
    shared = {"sharex": True, "sharey": True}
    figure, axes = _panels(len(panels), columns, 1.8, 0.7, **shared)
    for axis, (how, amount) in zip(axes, panels):
        part = found[(found["pairs"] == how) & (found["amount"] == amount)]
        by_learner = part.groupby("learner", sort=False)
        for place, (learner, rows) in enumerate(by_learner):
            by_beta, points = rows.groupby("beta"), []
            for beta, values in by_beta[metric]:
                name = f"{how}/{amount}/{learner}/{beta}"
                points.append(mean_interval(values.to_numpy(), name, bounds=unbounded))
            means, low, high = np.array([(one.value, one.low, one.high) for one in points]).T
            shares = by_beta["label_accuracy"].mean() + _offset(place, len(by_learner), 0.02)
            look = {"label": learner.replace("_", " "), "capsize": 2} | SERIES[place % len(SERIES)]
            axis.errorbar(shares, means, [means - low, high - means], **look)
        kind = f"{how} prompt" if how in ("same", "cross") else how
        axis.set_title(_wrapped(f"{kind}, {amount} pairs", 24))
    for axis in axes[-columns:]:
        axis.set_xlabel("share of correct labels")
    legend_below(figure, *axes[0].get_legend_handles_labels())
    titles(figure, f"{title}; 95 % interval over n = {found['seed'].nunique()} seeds", y=ylabel)
    return figure


def style_matrices(matrices: dict[str, np.ndarray], styles: Sequence[str]):
    """RM-Bench's 3 × 3 matrix of every reward model.

    Share of items whose right answer (row: its style) scores above the wrong one (column).
    """
    columns, shared = min(3, len(matrices)), {"sharex": True, "sharey": True}
    figure, axes = _panels(len(matrices), columns, 1.7, 0.7, **shared)
    for axis, (title, matrix) in zip(axes, matrices.items()):
        _heat_map(axis, matrix, 0, 1, ".0%", cmap="RdBu", cbar=False, square=True)
        axis.set_title(_wrapped(title, 22))
        axis.set_xticklabels(styles, rotation=30, ha="right")
        axis.set_yticklabels(styles, rotation=0)
    titles(figure, x="style of the wrong answer", y="style of the right answer")
    return figure


def frontier(table: pd.DataFrame, judges: dict[str, str], labels: dict[str, str]):
    """Score by each judge and length of answers (panels) against KL to SFT, along each method's way
    from SFT; a line a seed, the larger point where it ends.

    Columns as of the table ``frontier``. ``judges``: name → title of its panel. ``labels``: method
    → what the legend calls it.
    """
    at_sft, walked = table[table["method"] == "sft"], table[table["method"].isin(labels)]
    figure, axes = _panels(len(judges) + 1, len(judges) + 1, 2.1, 0.6, sharex=True)
    panels = [(judge, "score", title) for judge, title in judges.items()]
    panels.append((next(iter(judges)), "tokens", "length of answers"))
    for axis, (judge, column, title) in zip(axes, panels):
        for (method, _), rows in walked[walked["judge"] == judge].groupby(["method", "seed"]):
            own = pd.concat([at_sft[at_sft["judge"] == judge], rows.sort_values("share")])
            axis.plot(own["kl"], own[column], "-o", color=colour(method), markersize=2)
            axis.plot(*own[["kl", column]].iloc[-1], "o", color=colour(method))
        what = "tokens" if column == "tokens" else "SD of SFT's answers"
        axis.set(title=_wrapped(f"{title}, {what}", 24), xlabel="KL to SFT, nats an answer")
        axis.locator_params(nbins=4)
    _dot_legend(figure, {label: {"color": colour(m)} for m, label in labels.items()})
    n, seeds = table["n"].max(), walked.groupby("method")["seed"].nunique()
    title = f"What each method gains for its distance, n = {n} prompts, {_span(seeds)} seeds"
    titles(figure, title)
    return figure


# --- lineage -------------------------------------------------------------------------------------


def layer_maps(maps: dict[str, np.ndarray]):
    """Heat maps of similarity: layers of start (up) against layers of another model (across)."""
    figure, axes = _panels(len(maps), min(3, len(maps)), 1.7, 0.7)
    look = {"cmap": "viridis", "vmin": 0, "vmax": 1, "origin": "lower", "aspect": "auto"}
    for axis, (name, values) in zip(axes, maps.items()):
        rows, columns = values.shape
        shown = axis.imshow(values, extent=(0.5, columns + 0.5, 0.5, rows + 0.5), **look)
        axis.set_title(_wrapped(name, 20))
        axis.grid(visible=False)
    figure.colorbar(shown, ax=figure.axes, label="CKA, unbiased", shrink=0.8)
    titles(figure, x="layer of the other model", y="layer of start")
    return figure


def separation(told: pd.DataFrame):
    """Least similar derived and most similar unrelated model, by measure, with the area under the
    ROC curve that tells pairs apart. Columns as of ``lineage.separation``."""
    named = [f"{row.measure} ({row.auc:.2f})" for row in told.itertuples()]
    figure, axis = plt.subplots(figsize=(WIDTH, 1.1 + _pitch(named) * len(told)))
    places, first = range(len(told)), told.iloc[0]
    axis.hlines(places, told["unrelated"], told["derived"], color=INK, linewidth=1.2)
    ends = {"unrelated": {"markerfacecolor": "white"}, "derived": {}}
    for kind, look in ends.items():
        which = "least" if kind == "derived" else "most"
        label = f"{which} similar {kind} pair (of {first[f'n_{kind}']})"
        axis.plot(told[kind], places, "o", color=INK, label=label, **look)
    axis.axvline(0.8, label="the paper's 0.8", **AT_ZERO | {"linestyle": "--"})
    _row_labels(axis, named)
    axis.set_xlabel("CKA of two models (in brackets: area under the ROC curve)")
    legend_below(figure, *axis.get_legend_handles_labels())
    return figure


def margins(by_texts: dict[str, pd.DataFrame], by_depth: pd.Series):
    """Margin between derived and unrelated pairs: left by number of texts (median, and middle 90 %
    of random subsets), right by relative depth.

    ``by_texts``: measure → as of ``lineage.margin_by_texts``.
    """
    figure, (axis, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.4), sharey=True)
    for (measure, rows), look in zip(by_texts.items(), SERIES):
        axis.fill_between(rows["texts"], rows["low"], rows["high"], color=FAINT, alpha=0.4)
        axis.plot(rows["texts"], rows["median"], label=measure, **look)
    axis.set(xlabel="texts", ylabel="margin, CKA", title="by number of texts")
    legend_below(figure, *axis.get_legend_handles_labels())
    right.plot(by_depth.index, by_depth, **SERIES[0])
    right.set(xlabel="relative depth", title="by depth, unbiased")
    for each in (axis, right):
        each.axhline(0, **AT_ZERO)
    return figure
