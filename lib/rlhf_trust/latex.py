r"""A run for a paper in LaTeX: its main tables (booktabs), its headline numbers as macros, its
figures as PDF, as wide as a page's text or as a column.

``\TrustDpoToxicity`` is what DPO changed in toxicity against its placebo, with its interval;
``\TrustDpoToxicityStart`` against start; with a ``P`` or an ``N`` behind it, p after Holm's
correction and the number of items. Names are letters alone: a digit is spelled. What cannot be
measured says so in the place of a number.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys

import numpy as np
import pandas as pd

from . import command, require, visible
from .artifacts import TABLES, Build, atomic_write, checked, read_csv_table
from .headline import clear_verdict, gated
from .reference import REFERENCE
from .report import as_published, checkpoint_changes, p_words, validity_of
from .stats import FEW, Interval, interval_words
from .verticals.common import spelled

DIGITS = "Zero One Two Three Four Five Six Seven Eight Nine".split()
UNMEASURED = "not measurable"
SIGNS = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
HEADS = {"baseline": "against", "p_holm": "p after Holm", "valid": "above chance"}
HEADS |= {name: f"{name} [95 % interval]" for name in ("change", "value")}
HEADS |= {"min_detectable": "detectable in 4 of 5 studies", "readable": "share readable"}


def escaped(text: object) -> str:
    """A text for LaTeX, with minus signs before numbers."""
    signs = re.sub(r"[\\~^&%$#_{}]", lambda s: SIGNS.get(s[0], f"\\{s[0]}"), visible(str(text)))
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", signs)


def macro_name(*parts: str) -> str:
    """Of letters alone: every word begins with a capital, a digit is spelled."""
    words = re.findall(r"[A-Za-z]+|\d", " ".join(parts))
    return "".join(DIGITS[int(w)] if w.isdigit() else w[0].upper() + w[1:] for w in words)


def macros(changes: pd.DataFrame) -> dict[str, str]:
    """Macro → text, from the rows of ``headline.gated``."""
    found = {}
    for (stage, vertical), rows in changes.groupby(["stage", "vertical"], sort=False):
        by_baseline = {row.baseline: row for row in rows.itertuples()}
        for baseline, end in (("placebo", ""), ("start", "Start")):
            told = ("not compared with a placebo",) * 3
            if row := by_baseline.get(baseline):
                label = f"95 % interval over items{' and seeds' * (row.seeds > 1)} "
                told = (UNMEASURED,) * 3
                if row.measurable and row.n >= FEW:
                    said = interval_words(Interval.of_row(row, "change"), label=label)
                    told = said, p_words(row.p_holm), str(row.n)
            for kind, text in zip(("", "P", "N"), told):
                name = macro_name("trust", stage, vertical, end, kind)
                require(name not in found, f"two numbers would be \\{name}; rename a model")
                found[name] = text
    return found


def tables(of: dict[str, pd.DataFrame], changes: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Name → a table of texts with headings in words. ``of``: the run's tables; ``changes``: of
    ``headline.gated``."""
    measured = changes["measurable"] & (changes["n"] >= FEW)
    rows = changes.drop(columns="measurable")
    rows["reading"] = [clear_verdict(row) for row in rows.itertuples()]
    numbers = ["change", "ci_low", "ci_high", "p_holm", "min_detectable"]
    rows.loc[~measured, [*numbers, "reading"]] = [*[np.nan] * len(numbers), UNMEASURED]
    lds = of["validation"].query("test == 'lds'")
    acted = of["mitigation"].query("target == vertical and selection == 'harmful'")
    published = as_published(of["trust"], of["trust_change"]) if len(of["trust"]) else of["trust"]
    shown = {
        "headline": (rows, "stage vertical baseline change p_holm min_detectable n seeds reading"),
        "validity": (of["validity"], "model vertical metric value chance valid n"),
        "published": (published, "vertical metric model start change p_holm n readable"),
        "checks": (of["checks"], "stage check value n holds"),
        "validation": (lds, "target solver value p n"),
        "mitigation": (acted, "target action share change p_holm n"),
    }
    return {name: _texts(*given) for name, given in shown.items() if len(given[0])}


def _texts(rows: pd.DataFrame, columns: str) -> pd.DataFrame:
    """The columns as texts, a number with its interval in one cell."""

    def text(row, name: str) -> str:
        cell = getattr(row, name)
        if name in ("change", "value") and not pd.isna(row.ci_low):
            form = "+.3f" if name == "change" else ".3f"
            return f"{cell:{form}} [{row.ci_low:{form}}, {row.ci_high:{form}}]"
        if name in ("p", "p_holm") and not pd.isna(cell):
            return p_words(cell)
        if isinstance(cell, float):
            return "--" if pd.isna(cell) else f"{cell:.3f}"
        if name in ("metric", "solver"):
            return spelled(cell)
        return {"True": "yes", "False": "no"}.get(str(cell), str(cell))

    names = columns.split()
    found = [[escaped(text(row, name)) for name in names] for row in rows.itertuples()]
    return pd.DataFrame(found, columns=[escaped(HEADS.get(name, name)) for name in names])


@command
def main(argv: list[str] | None = None) -> int:
    about = "A run's tables, headline numbers and figures for LaTeX."
    parser = argparse.ArgumentParser("python -m rlhf_trust.latex", description=about)
    parser.add_argument("run", help="the name of its folder in build/")
    parser.add_argument("--reference", action="store_true", help="of the profile's reference run")
    given = parser.parse_args(argv)
    build, of = Build(given.run), {}
    folder = REFERENCE / given.run if given.reference else build.path("tables")
    for name in "trust trust_change headline validity checks validation mitigation".split():
        path = checked(folder / f"{name}.csv")
        no_rows = pd.DataFrame(columns=TABLES[name])
        of[name] = read_csv_table(path, name) if path.exists() else no_rows
    if of["headline"].empty:  # no placebo arms
        require(len(of["trust"]), f"{folder}: no trust.csv; run `make report` first")
        of["headline"] = checkpoint_changes(of["trust"], of["trust_change"])
        of["validity"] = validity_of(of["trust"])
    changes = gated(of["headline"], of["validity"])
    with atomic_write(build.path("latex")) as out:
        (out / "figures").mkdir(parents=True)
        for name, table in tables(of, changes).items():
            styler = table.style.hide(axis="index")
            (out / f"{name}.tex").write_text(styler.to_latex(hrules=True), encoding="utf-8")
        lines = (f"\\newcommand{{\\{n}}}{{{escaped(t)}}}\n" for n, t in macros(changes).items())
        (out / "macros.tex").write_text("".join(lines), encoding="utf-8")
        for figure in [] if given.reference else build.path("figures").glob("*.pdf"):
            shutil.copyfile(figure, out / "figures" / figure.name)
    print(build.path("latex"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
