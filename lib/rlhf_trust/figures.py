"""One look for every figure: the same colour for a model everywhere, intervals always drawn, nothing below 8 pt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from .artifacts import atomic_write
from .stats import mean_interval

# Okabe and Ito's palette, told apart with any colour vision.
COLOURS = {
    "start": "#666666",
    "sft": "#0072B2",
    "ppo": "#D55E00",
    "dpo": "#009E73",
    "inpo": "#CC79A7",
    "trust-sft": "#E69F00",
    "trust-aligned": "#56B4E9",
}
WORSE, BETTER, UNCLEAR = "#B2182B", "#2166AC", "#BBBBBB"
TITLES = {
    "toxicity": "Toxicity",
    "stereotype": "Stereotypical bias",
    "ethics": "Machine ethics",
    "truthfulness": "Truthfulness",
    "privacy": "Privacy",
    "grounding": "Grounded answers",
}


def use_style() -> None:
    """Set the study's look; call once at the head of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        font="DejaVu Sans",
        rc={
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
        },
    )


def colour(model: str) -> str:
    return COLOURS.get(model, "#999933")


def save(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, without the date that would make equal runs differ."""
    with atomic_write(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})


def curves(
    training: pd.DataFrame,
    metrics: Sequence[str],
    window: int = 5,
    names: dict[str, str] | None = None,
):
    """One small panel a metric, three in a row: raw values faint, a running mean over ``window`` steps on top; of few values
    (fewer than two windows) the values themselves."""
    columns = min(3, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.5 * lines), squeeze=False)
    for axis, metric in zip(axes.flat, metrics):
        rows = training[training["metric"] == metric]
        if len(rows) < 2 * window:
            axis.plot(rows["step"], rows["value"], color="#0072B2", marker="o", markersize=4)
        else:
            axis.plot(
                rows["step"], rows["value"], color="#BBBBBB", linewidth=1, marker="o", markersize=2
            )
            axis.plot(
                rows["step"],
                rows["value"].rolling(window, min_periods=1, center=True).mean(),
                color="#0072B2",
            )
        axis.set(xlabel="step", title=(names or {}).get(metric, metric))
    for axis in axes.flat[len(metrics) :]:
        axis.set_axis_off()
    return figure


def intervals(trust: pd.DataFrame, title: str, xlabel: str, over: str = "items"):
    """Point and 95 % interval of every model (colour) and label (row): columns label, model, value, ci_low, ci_high, n.

    ``over``: what the intervals are over, and what n counts."""
    labels, models = list(dict.fromkeys(trust["label"])), list(dict.fromkeys(trust["model"]))
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.24 * len(labels) * max(2, len(models))))
    for row, label in enumerate(labels):
        for place, model in enumerate(models):
            found = trust[(trust["label"] == label) & (trust["model"] == model)]
            if found.empty or np.isnan(found["value"].iloc[0]):
                continue
            point = found.iloc[0]
            y = row + 0.8 * ((place + 0.5) / len(models) - 0.5)
            axis.plot([point["ci_low"], point["ci_high"]], [y, y], color=colour(model), linewidth=2)
            axis.plot(
                point["value"],
                y,
                "o",
                color=colour(model),
                markersize=6,
                label=model if row == 0 else None,
            )
        if row:
            axis.axhline(row - 0.5, color="#DDDDDD", linewidth=0.8)
    counts = trust.groupby("label", sort=False)["n"].max()
    axis.set_yticks(range(len(labels)), [f"{label}\n(n = {counts[label]})" for label in labels])
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set(title=title, xlabel=f"{xlabel}, 95 % interval over {over}")
    axis.grid(axis="y", visible=False)
    handles, names = axis.get_legend_handles_labels()
    if len(names) < len(models):  # a model may be missing from the first row
        handles = [plt.Line2D([], [], marker="o", color=colour(m), linewidth=2) for m in models]
        names = models
    axis.legend(handles, names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def glance(changes: pd.DataFrame, verticals: Sequence[str], models: Sequence[str]):
    """What changed at a glance: one panel a vertical, one bar a model, in percent against start.

    ``changes``: columns vertical, model, percent, low, high (percent), worse (+1 where more is worse), metric, n,
    mostly_unreadable.
    A bar is red where its interval lies on the worse side of zero, blue on the better side, grey where it holds zero, and
    hatched where fewer than half of the model's answers could be read.
    """
    figure, axes = plt.subplots(1, len(verticals), figsize=(2.35 * len(verticals), 3.4))
    for axis, vertical in zip(np.atleast_1d(axes), verticals):
        rows = changes[changes["vertical"] == vertical].set_index("model")
        for place, model in enumerate(models):
            if model not in rows.index or not np.isfinite(rows.loc[model, "percent"]):
                axis.text(
                    place, 0, "no\nbase", ha="center", va="bottom", fontsize=8, color="#666666"
                )
                continue
            row = rows.loc[model]
            low, high = sorted((row["low"] * row["worse"], row["high"] * row["worse"]))
            shade = WORSE if low > 0 else BETTER if high < 0 else UNCLEAR
            axis.bar(
                place,
                row["percent"],
                color=shade,
                width=0.7,
                edgecolor="white",
                hatch="///" if row["mostly_unreadable"] else None,
            )
            axis.plot([place, place], [row["low"], row["high"]], color="black", linewidth=1.2)
        metric = rows["metric"].iloc[0].replace("_", " ") if len(rows) else ""
        count = int(rows["n"].max()) if len(rows) else 0
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(models)), models)
        axis.set_xlim(-0.6, len(models) - 0.4)
        axis.set_title(TITLES[vertical])
        axis.set_xlabel(f"{metric}\nn = {count}", fontsize=9)
        axis.grid(axis="x", visible=False)
    np.atleast_1d(axes)[0].set_ylabel("change against start, %")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (WORSE, BETTER, UNCLEAR)]
    labels = ["worse", "better", "interval holds zero"]
    if changes["mostly_unreadable"].any():
        handles.append(
            plt.Rectangle((0, 0), 1, 1, facecolor="#555555", edgecolor="white", hatch="///")
        )
        labels.append("most answers unreadable")
    figure.legend(
        handles=handles, labels=labels, loc="outside lower center", ncol=len(labels), frameon=False
    )
    return figure


def trade_offs(changes: pd.DataFrame, over: str):
    """The headline changes of every model in one picture; right of the line is worse. Columns as for :func:`intervals`, with
    vertical in place of label."""
    figure = intervals(
        changes.assign(label=changes["vertical"].map(TITLES)),
        "Changes against start",
        "change, turned so that right is worse",
        over,
    )
    figure.axes[0].axvline(0, color="black", linewidth=0.8)
    return figure


def correlations(table: pd.DataFrame, points: int):
    """Heat map of correlations between verticals over ``points`` pairs of model and seed."""
    names = [TITLES[vertical] for vertical in table.columns]
    figure, axis = plt.subplots(figsize=(6.0, 4.6))
    sns.heatmap(
        table.to_numpy(),
        annot=True,
        fmt="+.2f",
        cmap="RdBu_r",
        vmin=-1,
        vmax=1,
        ax=axis,
        linewidths=1,
        xticklabels=names,
        yticklabels=names,
        annot_kws={"fontsize": 10},
        cbar_kws={"label": "correlation"},
    )
    axis.set(
        title=f"Do verticals get worse together? n = {points} models and seeds",
        xlabel="",
        ylabel="",
    )
    axis.tick_params(axis="x", rotation=20)
    return figure


def contributions(
    summary: pd.DataFrame, stages: Sequence[str], verticals: Sequence[str], value: str, title: str
):
    """Heat map of one contribution figure per stage and vertical; a star where p_null < 0.05."""
    table = summary.pivot(index="stage", columns="vertical", values=value).reindex(
        index=stages, columns=verticals
    )
    p = summary.pivot(index="stage", columns="vertical", values="p_null").reindex(
        index=stages, columns=verticals
    )
    text = table.map(lambda v: "no change" if pd.isna(v) else f"{v:+.2f}")
    text = text + p.map(lambda v: " *" if v < 0.05 else "")
    bound = max(1e-9, float(np.nanmax(np.abs(table.to_numpy(dtype=float)), initial=0.0)))
    figure, axis = plt.subplots(figsize=(1.55 * len(verticals) + 1.6, 0.62 * len(stages) + 1.5))
    # A missing value stands for a stage that changed no answer: shown as zero, and said.
    sns.heatmap(
        table.astype(float).fillna(0.0),
        annot=text,
        fmt="",
        cmap="RdBu_r",
        center=0,
        vmin=-bound,
        vmax=bound,
        ax=axis,
        linewidths=1,
        annot_kws={"fontsize": 10},
        cbar_kws={"label": value},
    )
    axis.set(title=title, xlabel="", ylabel="")
    axis.set_xticklabels([TITLES[v] for v in verticals], rotation=20, ha="right")
    axis.set_yticklabels(stages, rotation=0)
    return figure


def forest(
    table: pd.DataFrame,
    panel: str,
    row: str,
    title: str,
    xlabel: str,
    lines: dict[str, float] | None = None,
):
    """Point and interval of every ``row``, a panel each for the values of ``panel``: columns value, ci_low, ci_high and the
    two named. ``lines``: label → where a vertical line stands (default: one at zero)."""
    panels, rows = list(dict.fromkeys(table[panel])), list(dict.fromkeys(table[row]))
    columns = len(panels) if len(panels) <= 4 else 3
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        height,
        columns,
        figsize=(max(5.6, 2.9 * columns), (0.7 + 0.26 * len(rows)) * height + 0.4),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis, name in zip(axes.flat, panels):
        part = table[table[panel] == name].set_index(row).reindex(rows)
        for place, (_, point) in enumerate(part.iterrows()):
            axis.plot(
                [point["ci_low"], point["ci_high"]], [place, place], color="#0072B2", linewidth=2
            )
            axis.plot(point["value"], place, "o", color="#0072B2", markersize=5)
        for (label, where), style in zip((lines or {"": 0.0}).items(), ("-", "--", ":")):
            axis.axvline(where, color="black", linewidth=0.8, linestyle=style, label=label or None)
        axis.set(title=name)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rows)), [name.replace("_", " ") for name in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if lines:
        axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, fontweight="bold", fontsize=11)
    figure.supxlabel(xlabel, fontsize=10)
    return figure


def learners(found: pd.DataFrame, metric: str, title: str, ylabel: str):
    """``metric`` against the share of right labels: a line a learner, a panel for each choice (row) and number (column) of
    pairs; mean and 95 % interval over seeds. Columns as of ``order_consistency.sweep``."""
    choices, amounts = list(dict.fromkeys(found["pairs"])), sorted(set(found["amount"]))
    figure, axes = plt.subplots(
        len(choices),
        len(amounts),
        figsize=(3.2 * len(amounts) + 1.6, 2.5 * len(choices) + 0.6),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for row, how in zip(axes, choices):
        for axis, amount in zip(row, amounts):
            part = found[(found["pairs"] == how) & (found["amount"] == amount)]
            for tone, (learner, of_learner) in zip(
                ("#666666", "#0072B2", "#009E73", "#D55E00"), part.groupby("learner", sort=False)
            ):
                by_beta = of_learner.groupby("beta")
                x, points = (
                    by_beta["label_accuracy"].mean(),
                    [
                        mean_interval(
                            v.to_numpy(), f"{how}/{amount}/{learner}/{b}", bounds=(-np.inf, np.inf)
                        )
                        for b, v in by_beta[metric]
                    ],
                )
                axis.errorbar(
                    x,
                    [p.value for p in points],
                    [[p.value - p.low for p in points], [p.high - p.value for p in points]],
                    fmt="-o",
                    color=tone,
                    markersize=4,
                    linewidth=1.5,
                    capsize=2,
                    label=learner.replace("_", " "),
                )
            axis.set(
                title=f"{how} prompt, {amount} pairs"
                if how in ("same", "cross")
                else f"{how}, {amount} pairs"
            )
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title, fontweight="bold", fontsize=11)
    figure.supxlabel("share of right labels", fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return figure


def style_matrices(matrices: dict[str, np.ndarray], styles: Sequence[str]):
    """RM-Bench's 3 × 3 matrix of every reward model: share of items whose right answer (row: its style) scores above the wrong
    one (column)."""
    columns = min(3, len(matrices))
    height = -(-len(matrices) // columns)
    figure, axes = plt.subplots(
        height,
        columns,
        figsize=(2.6 * columns + 1.0, 2.5 * height + 0.4),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis, (title, matrix) in zip(axes.flat, matrices.items()):
        sns.heatmap(
            matrix,
            annot=True,
            fmt=".0%",
            cmap="RdBu",
            vmin=0,
            vmax=1,
            ax=axis,
            linewidths=1,
            cbar=False,
            square=True,
            annot_kws={"fontsize": 9},
        )
        axis.set(title=title)
        axis.set_xticklabels(styles, rotation=30, ha="right")
        axis.set_yticklabels(styles, rotation=0)
    for axis in axes.flat[len(matrices) :]:
        axis.set_axis_off()
    figure.supxlabel("style of the wrong answer", fontsize=10)
    figure.supylabel("style of the right answer", fontsize=10)
    return figure


def agreements(tables: dict[str, np.ndarray], names: Sequence[str]):
    """Heat maps of rank correlations between solvers, one a stage."""
    figure, axes = plt.subplots(
        1, len(tables), figsize=(3.4 * len(tables) + 1.4, 3.9), squeeze=False, sharey=True
    )
    for axis, (title, table) in zip(axes.flat, tables.items()):
        sns.heatmap(
            table,
            annot=True,
            fmt=".1f",
            cmap="RdBu_r",
            vmin=-1,
            vmax=1,
            ax=axis,
            linewidths=1,
            cbar=False,
            xticklabels=names,
            yticklabels=names,
            annot_kws={"fontsize": 8.5},
            square=True,
        )
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=60)
    return figure


def effects(tables: dict[str, pd.DataFrame]):
    """Effect of each feature with its interval, a panel a stage: columns feature, kind, effect, ci_low, ci_high, p_holm.
    Filled where p_holm < 0.05."""
    features = list(
        dict.fromkeys(feature for table in tables.values() for feature in table["feature"])
    )
    figure, axes = plt.subplots(
        1,
        len(tables),
        figsize=(2.6 * len(tables) + 2.6, 0.9 + 0.27 * len(features)),
        squeeze=False,
        sharey=True,
    )
    for axis, (title, table) in zip(axes.flat, tables.items()):
        for place, (_, point) in enumerate(table.set_index("feature").reindex(features).iterrows()):
            clear = point["p_holm"] < 0.05
            shade = (WORSE if point["effect"] > 0 else BETTER) if clear else UNCLEAR
            axis.plot([point["ci_low"], point["ci_high"]], [place, place], color=shade, linewidth=2)
            axis.plot(
                point["effect"],
                place,
                "o",
                color=shade,
                markersize=6,
                markerfacecolor=shade if clear else "white",
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="effect, 95 % interval")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(features)), [feature.replace("_", " ") for feature in features])
    axes[0, 0].set_ylim(len(features) - 0.5, -0.5)
    return figure


def pruning(table: pd.DataFrame, outcomes: Sequence[str], target: str):
    """Change of every outcome in every arm against removing as many at random: interval over items (dark) and over draws
    (light). Columns as of ``validate.pruning_table``; log-odds on the left axis, shares of errors on the right one."""
    arms = list(dict.fromkeys(table["arm"]))
    odds, shares = (
        [o for o in outcomes if o != "ranking errors"],
        [o for o in outcomes if o == "ranking errors"],
    )
    figure, axes = plt.subplots(
        1, 2, figsize=(8.6, 0.9 + 0.24 * len(odds) * len(arms)), width_ratios=(3, 2)
    )
    for axis, names, unit in zip(
        axes, (odds, shares), ("log-odds of the bad answer, nats", "share of pairs ranked wrongly")
    ):
        for row, name in enumerate(names):
            for place, arm in enumerate(arms):
                point = table[(table["arm"] == arm) & (table["vertical"] == name)].iloc[0]
                y, shade = (
                    row + 0.7 * ((place + 0.5) / len(arms) - 0.5),
                    ("#666666", "#D55E00", "#0072B2")[place % 3],
                )
                axis.plot(
                    [point["draws_low"], point["draws_high"]],
                    [y, y],
                    color=shade,
                    linewidth=5,
                    alpha=0.25,
                    solid_capstyle="butt",
                )
                axis.plot(
                    [point["items_low"], point["items_high"]], [y, y], color=shade, linewidth=2
                )
                axis.plot(
                    point["change"],
                    y,
                    "o",
                    color=shade,
                    markersize=5,
                    label=arm if row == 0 else None,
                )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(
            range(len(names)),
            [TITLES.get(n, n) + (" (target)" if n == target else "") for n in names],
        )
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set(xlabel=f"change against random removal:\n{unit}")
        axis.grid(axis="y", visible=False)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle("What removing pairs changes", fontweight="bold", fontsize=11)
    return figure


def layer_maps(maps: dict[str, np.ndarray]):
    """Heat maps of likeness, layers of start (down) against layers of another model (across), a panel each."""
    columns = min(4, len(maps))
    height = -(-len(maps) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(2.5 * columns + 1.2, 2.6 * height + 0.4), squeeze=False
    )
    for axis, (name, values) in zip(axes.flat, maps.items()):
        shown = axis.imshow(
            values,
            cmap="viridis",
            vmin=0,
            vmax=1,
            origin="lower",
            aspect="auto",
            extent=(0.5, values.shape[1] + 0.5, 0.5, values.shape[0] + 0.5),
        )
        axis.set(title=name)
        axis.grid(visible=False)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    figure.colorbar(shown, ax=axes, label="CKA, unbiased", shrink=0.8)
    figure.supxlabel("layer of the other model", fontsize=10)
    figure.supylabel("layer of start", fontsize=10)
    return figure


def separation(told: pd.DataFrame, curves: pd.DataFrame):
    """Left, lowest likeness within the family and highest outside it, a line for each measure; right, ROC curves: of measures
    that make no error one grey line, of the others one each. Columns as of ``lineage.separation`` and ``lineage.roc``."""
    figure, (axis, right) = plt.subplots(
        1, 2, figsize=(12.6, max(3.2, 0.27 * len(told) + 1.2)), width_ratios=(4, 3)
    )
    for place, row in enumerate(told.itertuples()):
        apart = row.derived > row.unrelated
        axis.plot(
            [row.unrelated, row.derived],
            [place, place],
            color="#999999" if apart else WORSE,
            linewidth=2,
        )
        axis.plot(
            row.unrelated,
            place,
            "s",
            color="#D55E00",
            label="highest, no kin" if place == 0 else None,
        )
        axis.plot(
            row.derived,
            place,
            "o",
            color="#0072B2",
            label="lowest, derived" if place == 0 else None,
        )
    axis.axvline(0.8, color="black", linestyle="--", linewidth=1, label="the paper's 0.8")
    axis.set_yticks(
        range(len(told)), [f"{row.measure} (area {row.auc:.2f})" for row in told.itertuples()]
    )
    axis.set(xlabel="CKA of two models", ylim=(len(told) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False)
    perfect = told.loc[told["auc"] == 1.0, "measure"]
    if len(perfect):
        right.plot(
            [0, 0, 1],
            [0, 1, 1],
            color="#999999",
            linewidth=4,
            label=f"no error: {len(perfect)} of {len(told)}",
        )
    for place, (measure, curve) in enumerate(
        curves[~curves["measure"].isin(perfect)].groupby("measure", sort=False)
    ):
        right.plot(
            curve["false_positive"],
            curve["true_positive"],
            color=list(COLOURS.values())[1 + place % 6],
            linestyle=("-", "--", ":")[place // 6 % 3],
            label=measure,
        )
    first = told.iloc[0]
    right.set(
        xlabel=f"pairs with a stranger called kin (n = {first['n_unrelated']})",
        xlim=(-0.03, 1.03),
        ylabel=f"pairs of kin called kin (n = {first['n_derived']})",
        ylim=(-0.03, 1.03),
    )
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure
