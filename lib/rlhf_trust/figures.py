"""Every figure's style: one colour per model, intervals always drawn, no text below 8 pt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from .stats import FEW, mean_interval

# Okabe and Ito's palette, safe for colour-blind readers.
GREY, BLUE, ORANGE, GREEN = "#666666", "#0072B2", "#D55E00", "#009E73"
COLOURS = {
    "start": GREY,
    "sft": BLUE,
    "ppo": ORANGE,
    "dpo": GREEN,
    "inpo": "#CC79A7",
    "trust-sft": "#E69F00",
    "trust-aligned": "#56B4E9",
}
OTHERS = cycle(["#882255", "#44AA99", "#332288", "#999933", "#117733", "#AA4499"])
"""Of Tol's palette, for models with other names as they are first drawn."""
WORSE, BETTER, UNCLEAR = "#B2182B", "#2166AC", "#BBBBBB"
AT_ZERO = {"color": "black", "linewidth": 0.8}
TITLES = {
    "toxicity": "Toxicity",
    "stereotype": "Stereotypical bias",
    "ethics": "Machine ethics",
    "truthfulness": "Truthfulness",
    "privacy": "Privacy",
    "grounding": "Grounded answers",
    "agreement": "Planted: agreeing",
}


def use_style() -> None:
    """Set the study's style; call once at the head of a notebook."""
    settings = {
        "figure.dpi": 120,
        "savefig.dpi": 160,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.labelsize": 10,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.fontsize": 9,
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


def _panels(count: int, columns: int, size: tuple, extra: tuple = (0.0, 0.0), **shared):
    """A figure of ``count`` panels of ``size`` inches, ``columns`` in a row, and its used axes."""
    rows = -(-count // columns)
    inches = (size[0] * columns + extra[0], size[1] * rows + extra[1])
    figure, axes = plt.subplots(rows, columns, figsize=inches, squeeze=False, **shared)
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes.flat[:count]


def _point(axis, y: float, value: float, low: float, high: float, colour: str, **dot) -> None:
    """A dot and its interval at height ``y``."""
    axis.plot([low, high], [y, y], color=colour, linewidth=2)
    axis.plot(value, y, "o", color=colour, **{"markersize": 5} | dot)


def _offset(place: int, count: int, spread: float = 0.8) -> float:
    """How far from the middle of its row the ``place``-th of ``count`` points lies."""
    return spread * ((place + 0.5) / count - 0.5)


def _row_labels(axis, labels: Sequence[str], lines: bool = False) -> None:
    """Name the rows 0, 1, … from top to bottom; ``lines``: between them."""
    for row in range(1, len(labels)) if lines else ():
        axis.axhline(row - 0.5, color="#DDDDDD", linewidth=0.8)
    axis.set_yticks(range(len(labels)), [label.replace("_", " ") for label in labels])
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)


def _legend_right(axis, *handles_and_labels) -> None:
    axis.legend(*handles_and_labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _span(counts: pd.Series) -> str:
    """The least and the largest of some counts, such as ``7 to 9``; once if they are equal."""
    return " to ".join(map(str, sorted({counts.min(), counts.max()})))


def _dot_legend(axis, looks: dict[str, dict]) -> None:
    """``looks``: label → what its dot has of its own."""
    dot = {"marker": "o", "markersize": 6, "linestyle": "none", "color": GREY}
    handles = [plt.Line2D([], [], **dot | look) for look in looks.values()]
    _legend_right(axis, handles, list(looks))


def _titles(figure, title: str = "", x: str = "", y: str = "") -> None:
    """Title and axis labels of a whole figure."""
    if title:
        figure.suptitle(title, fontweight="bold", fontsize=11)
    figure.supxlabel(x, fontsize=10)
    if y:
        figure.supylabel(y, fontsize=10)


def _heat_map(axis, table, low: float, high: float, fmt: str, size: float = 10, **more) -> None:
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
    figure, axes = _panels(len(metrics), min(3, len(metrics)), (3.1, 2.5))
    for axis, metric in zip(axes, metrics):
        values = training[training["metric"] == metric].set_index("step")["value"]
        label = "step"
        if len(values) < 2 * window or metric == "learning_rate":
            axis.plot(values, color=BLUE, marker="o", markersize=4)
        else:
            label = f"step (blue: mean over {window})"
            axis.plot(values, color=UNCLEAR, linewidth=1, marker="o", markersize=2)
            axis.plot(values.rolling(window, min_periods=1, center=True).mean(), color=BLUE)
        axis.set(xlabel=label, title=(names or {}).get(metric, metric))
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def intervals(trust: pd.DataFrame, title: str, xlabel: str, over: str = "items", least: int = FEW):
    """Point and 95 % interval of every model (colour) and label (row).

    Columns label, model, value, ci_low, ci_high, n. ``over``: what the intervals are over and n
    counts. Points of fewer than ``least`` items are left out.
    """
    models, trust = list(trust["model"].unique()), trust[trust["n"] >= least]
    labels = list(trust["label"].unique()) or [f"fewer than {least} {over}: not drawn"]
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.24 * len(labels) * max(2, len(models))))
    points = trust.drop_duplicates(["label", "model"]).dropna(subset="value")
    for point in points.itertuples():
        y = labels.index(point.label) + _offset(models.index(point.model), len(models))
        ends = point.ci_low, point.ci_high
        _point(axis, y, point.value, *ends, colour(point.model), markersize=6)
    counts = trust.groupby("label", sort=False)["n"]
    named = [f"{label}\n(n = {_span(of_label)})" for label, of_label in counts]
    _row_labels(axis, named or labels, lines=True)
    axis.set(title=title, xlabel=f"{xlabel}, 95 % interval over {over}")
    _dot_legend(axis, {model: {"color": colour(model)} for model in models})
    return figure


def forest(
    table: pd.DataFrame, panel: str, row: str, title: str, xlabel: str, lines: dict | None = None
):
    """Point and interval of every ``row``, one panel for each value of ``panel``.

    Columns value, ci_low, ci_high, n and the two named. ``lines``: label → place of a vertical line
    (default: one at zero).
    """
    panels, rows = list(table[panel].unique()), list(table[row].unique())
    columns = len(panels) if len(panels) <= 4 else 3
    size = (max(5.6 / columns, min(2.9, 9.8 / columns)), 0.7 + 0.26 * len(rows))
    figure, axes = _panels(len(panels), columns, size, (0, 0.4), sharex=True, sharey=True)
    figure.get_layout_engine().set(w_pad=0.08)  # between the tick labels of two panels
    for axis, name in zip(axes, panels):
        for point in table[table[panel] == name].to_dict("records"):
            found = (point[column] for column in ("value", "ci_low", "ci_high"))
            _point(axis, rows.index(point[row]), *found, BLUE)
        for (label, where), style in zip((lines or {"": 0.0}).items(), ("-", "--", ":")):
            axis.axvline(where, color="black", linewidth=0.8, linestyle=style, label=label or None)
        axis.set(title=name)
        _row_labels(axis, rows)
    if lines:
        _legend_right(axes[columns - 1])
    _titles(figure, title, xlabel)
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
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.32 * len(verticals) * len(stages)))
    for point in changes[changes["measurable"] & (changes["n"] >= FEW)].itertuples():
        hollow, shade = point.baseline == "start", colour(point.stage)
        y = verticals.index(point.vertical) + _offset(stages.index(point.stage), len(stages))
        y += 0.05 if hollow else -0.05
        ends = point.worse * point.ci_low, point.worse * point.ci_high
        look = {"markersize": 6, "markerfacecolor": "white" if hollow else shade}
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
    axis.set(title="What each stage changed", xlabel=xlabel)
    axis.locator_params(axis="x", nbins=6)  # long labels, where changes are small
    looks = {"minus placebo": {}, "minus start": {"markerfacecolor": "white"}}
    one = {stage: " (one checkpoint)" if seeds[stage] < seeds.max() else "" for stage in stages}
    looks |= {stage + one[stage]: {"color": colour(stage)} for stage in stages}
    _dot_legend(axis, looks)
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
    figure, axis = plt.subplots(figsize=(6.0, 4.6))
    labels = {"xticklabels": names, "yticklabels": names, "cbar_kws": {"label": "correlation"}}
    _heat_map(axis, table.to_numpy(), -1, 1, "+.2f", **labels)
    axis.set_title(f"Do verticals get worse together? n = {points} models and seeds")
    axis.tick_params(axis="x", rotation=20)
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
    cells = summary.set_index(["stage", "vertical"])[[value, "p_null"]].astype(float)
    table, p = (cells[name].unstack().reindex(stages, columns=verticals) for name in cells)
    text = table.map(lambda v: missing if pd.isna(v) else f"{v:+.2f}")
    text += p.map(lambda v: " *" if v < 0.05 else "")
    bound = max(1e-9, float(np.nanmax(np.abs(table.to_numpy()), initial=0.0)))
    figure, axis = plt.subplots(figsize=(1.55 * len(verticals) + 1.6, 0.62 * len(stages) + 1.5))
    # Missing cells are coloured as zero, and labelled.
    shown = {"annot": text, "center": 0, "cbar_kws": {"label": value}}
    _heat_map(axis, table.fillna(0.0), -bound, bound, "", **shown)
    axis.set_title(title)
    axis.set_xticklabels([TITLES[v] for v in verticals], rotation=20, ha="right")
    axis.set_yticklabels(stages, rotation=0)
    return figure


def agreements(tables: dict[str, np.ndarray], names: Sequence[str]):
    """Heat maps of rank correlations between solvers, one per stage."""
    figure, axes = _panels(len(tables), min(2, len(tables)), (3.8, 4.1), (1.4, 0), sharey=True)
    for axis, (title, table) in zip(axes, tables.items()):
        table = np.round(table, 1) + 0.0  # no -0.0
        shown = {"cbar": False, "xticklabels": names, "yticklabels": names, "square": True}
        _heat_map(axis, table, -1, 1, ".1f", 8.5, **shown)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=60)
    return figure


def effects(tables: dict[str, pd.DataFrame]):
    """Effect of each feature with its interval, one panel per stage; filled where p_holm < 0.05.

    Columns feature, effect, ci_low, ci_high, p_holm.
    """
    features = list(pd.concat(tables.values())["feature"].unique())
    size = (3.2, 0.9 + 0.27 * len(features))
    figure, axes = _panels(len(tables), min(2, len(tables)), size, (2.6, 0), sharey=True)
    for axis, (title, table) in zip(axes, tables.items()):
        for point in table.itertuples():
            clear = point.p_holm < 0.05
            shade = (WORSE if point.effect > 0 else BETTER) if clear else UNCLEAR
            dot = {"markersize": 6, "markerfacecolor": shade if clear else "white"}
            found = point.effect, point.ci_low, point.ci_high
            _point(axis, features.index(point.feature), *found, shade, **dot)
        axis.axvline(0, **AT_ZERO)
        axis.set(title=title, xlabel="effect, 95 % interval")
        _row_labels(axis, features)
    return figure


def doses(table: pd.DataFrame):
    """Change of each target (panel) against the share of pairs acted on, one line an action; open
    squares: the pairs most similar in text.

    Columns as of the table ``mitigation``; only rows that measure the target itself.
    """
    targets, actions = list(table["target"].unique()), list(table["action"].unique())
    figure, axes = _panels(len(targets), len(targets), (4.2, 3.6), (1.4, 0))
    for axis, target in zip(axes, targets):
        own = table[(table["target"] == target) & (table["vertical"] == target)]
        shares = sorted(own["share"].unique())
        lines = own.groupby(["action", "selection"], sort=False)
        for place, ((action, selection), rows) in enumerate(lines):
            similar, shade = selection == "similar", (BLUE, ORANGE, GREEN)[actions.index(action)]
            look = {"color": shade, "markerfacecolor": "white" if similar else shade}
            look |= {"fmt": "s" if similar else "-o", "markersize": 5, "capsize": 2}
            label = f"{action}, most similar" if similar else action
            ends = [rows["change"] - rows["ci_low"], rows["ci_high"] - rows["change"]]
            x = rows["share"] + _offset(place, len(lines), 0.014)
            axis.errorbar(x, rows["change"], ends, label=label, **look)
        axis.axhline(0, **AT_ZERO)
        axis.set_xticks(shares, [f"{share:.0%}".replace("%", " %") for share in shares])
        title = f"{TITLES.get(target, target)} (n = {own['n'].iloc[0]})"
        axis.set(title=title, xlim=(0, table["share"].max() + 0.02))
    _legend_right(axes[len(targets) - 1])
    unit = "log-odds of the bad answer, nats:\nchange against random pairs"
    title = f"What acting on the most harmful pairs changes, {table['draws'].iloc[0]} random draws"
    _titles(figure, title, "share of all pairs", unit)
    return figure


# --- rewards -------------------------------------------------------------------------------------


def learners(found: pd.DataFrame, metric: str, title: str, ylabel: str):
    """``metric`` against the share of correct labels, one line per kind of reward model.

    One panel for each choice (row) and number (column) of pairs; mean and 95 % interval over seeds.
    Columns as of ``order_consistency.sweep``.
    """
    amounts, unbounded = sorted(set(found["amount"])), (-np.inf, np.inf)
    panels = list(product(found["pairs"].unique(), amounts))
    size, shared = (3.2, 2.5), {"sharex": True, "sharey": True}
    figure, axes = _panels(len(panels), len(amounts), size, (1.6, 0.6), **shared)
    look = {"fmt": "-o", "markersize": 4, "linewidth": 1.5, "capsize": 2}
    for axis, (how, amount) in zip(axes, panels):
        part = found[(found["pairs"] == how) & (found["amount"] == amount)]
        by_learner = part.groupby("learner", sort=False)
        for tone, (learner, rows) in zip((GREY, BLUE, GREEN, ORANGE), by_learner):
            by_beta, points = rows.groupby("beta"), []
            for beta, values in by_beta[metric]:
                name = f"{how}/{amount}/{learner}/{beta}"
                points.append(mean_interval(values.to_numpy(), name, bounds=unbounded))
            means, low, high = np.array([(one.value, one.low, one.high) for one in points]).T
            shares, label = by_beta["label_accuracy"].mean(), learner.replace("_", " ")
            ends = [means - low, high - means]
            axis.errorbar(shares, means, ends, color=tone, label=label, **look)
        kind = f"{how} prompt" if how in ("same", "cross") else how
        axis.set(title=f"{kind}, {amount} pairs")
    _legend_right(axes[len(amounts) - 1])
    _titles(figure, title, "share of correct labels", ylabel)
    return figure


def style_matrices(matrices: dict[str, np.ndarray], styles: Sequence[str]):
    """RM-Bench's 3 × 3 matrix of every reward model.

    Share of items whose right answer (row: its style) scores above the wrong one (column).
    """
    columns = min(3, len(matrices))
    figure, axes = _panels(len(matrices), columns, (2.6, 2.5), (1.0, 0.4), sharex=True, sharey=True)
    for axis, (title, matrix) in zip(axes, matrices.items()):
        _heat_map(axis, matrix, 0, 1, ".0%", 9, cmap="RdBu", cbar=False, square=True)
        axis.set(title=title)
        axis.set_xticklabels(styles, rotation=30, ha="right")
        axis.set_yticklabels(styles, rotation=0)
    _titles(figure, x="style of the wrong answer", y="style of the right answer")
    return figure


# --- lineage -------------------------------------------------------------------------------------


def layer_maps(maps: dict[str, np.ndarray]):
    """Heat maps of similarity: layers of start (up) against layers of another model (across)."""
    figure, axes = _panels(len(maps), min(4, len(maps)), (2.5, 2.6), (1.2, 0.4))
    look = {"cmap": "viridis", "vmin": 0, "vmax": 1, "origin": "lower", "aspect": "auto"}
    for axis, (name, values) in zip(axes, maps.items()):
        rows, columns = values.shape
        shown = axis.imshow(values, extent=(0.5, columns + 0.5, 0.5, rows + 0.5), **look)
        axis.set(title=name)
        axis.grid(visible=False)
    figure.colorbar(shown, ax=figure.axes, label="CKA, unbiased", shrink=0.8)
    _titles(figure, x="layer of the other model", y="layer of start")
    return figure


def separation(told: pd.DataFrame, curves: pd.DataFrame):
    """Left: least similar derived and most similar unrelated model, by measure. Right: ROC curves.

    One grey curve stands for all measures without an error. Columns as of ``lineage.separation``
    and ``lineage.roc``.
    """
    size = (12.6, max(3.2, 0.27 * len(told) + 1.2))
    figure, (axis, right) = plt.subplots(1, 2, figsize=size, width_ratios=(4, 3))
    places, apart = range(len(told)), told["derived"] > told["unrelated"]
    shades = apart.map({True: "#999999", False: WORSE})
    axis.hlines(places, told["unrelated"], told["derived"], color=shades, linewidth=2)
    axis.plot(told["unrelated"], places, "s", color=ORANGE, label="most similar unrelated model")
    axis.plot(told["derived"], places, "o", color=BLUE, label="least similar derived model")
    axis.axvline(0.8, color="black", linestyle="--", linewidth=1, label="the paper's 0.8")
    _row_labels(axis, [f"{row.measure} (area {row.auc:.2f})" for row in told.itertuples()])
    axis.set(xlabel="CKA of two models")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    perfect = told.loc[told["auc"] == 1.0, "measure"]
    if len(perfect):
        label = f"no error: {len(perfect)} of {len(told)}"
        right.plot([0, 0, 1], [0, 1, 1], color="#999999", linewidth=4, label=label)
    others = curves[~curves["measure"].isin(perfect)].groupby("measure", sort=False)
    shades = list(COLOURS.values())[1:]
    for place, (measure, curve) in enumerate(others):
        shade, style = shades[place % 6], ("-", "--", ":")[place // 6 % 3]
        points = curve["false_positive"], curve["true_positive"]
        right.plot(*points, color=shade, linestyle=style, label=measure)
    first = told.iloc[0]
    right.set_xlabel(f"unrelated pairs called derived (n = {first['n_unrelated']})")
    right.set_ylabel(f"derived pairs called derived (n = {first['n_derived']})")
    right.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    _legend_right(right)
    return figure


def margins(by_texts: dict[str, pd.DataFrame], by_depth: pd.Series):
    """Margin between derived and unrelated pairs: left by number of texts (median, and middle 90 %
    of random subsets), right by relative depth.

    ``by_texts``: measure → as of ``lineage.margin_by_texts``.
    """
    figure, (axis, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
    for (measure, rows), tone in zip(by_texts.items(), (BLUE, ORANGE)):
        band = {"color": tone, "alpha": 0.2, "linewidth": 0}
        axis.fill_between(rows["texts"], rows["low"], rows["high"], **band)
        axis.plot(rows["texts"], rows["median"], "o-", color=tone, label=measure)
    axis.set(xlabel="texts", ylabel="margin, CKA", title="by number of texts")
    axis.legend(frameon=False)
    right.plot(by_depth.index, by_depth, "o-", color=GREEN)
    right.set(xlabel="relative depth", title="by depth, unbiased")
    for each in (axis, right):
        each.axhline(0, color="black", linewidth=0.8)
    return figure
