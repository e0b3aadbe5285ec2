"""Published runs: their tables are kept, a reader's run is held against them, and what they found
is written into the README and the docs.

The tables of a published run (numbers only) are in ``tests/reference/<profile>/``:

``python -m rlhf_trust.reference <profile>``
    where does a reader's run differ from the reference beyond the intervals? (``make compare``;
    ``--with <run>``: from another run)
``python -m rlhf_trust.reference <profile> --save``
    make the run in ``build/<profile>`` the reference;
``python -m rlhf_trust.reference <profile> --docs``
    write the reference's results into the README and ``lib/docs``.

A figure differs when the reader's value lies outside the reference's interval *and* the reference's
value outside the reader's. Exit code 1 if a headline figure differs, 2 without anything to compare.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys

import matplotlib.pyplot as plt
import pandas as pd

from . import ROOT, command, figures, require, visible
from .artifacts import Build, read_csv_table, read_manifests, read_table, write_text
from .headline import clear_verdict, gated, headline_words
from .render import as_markdown, prose
from .report import arm_words, as_published, headline_rows
from .rewards import rm_bench
from .stats import FEW, UNCLEAR, Interval, interval_words
from .verticals import HEADLINE, PUBLISHED

REFERENCE = ROOT / "tests" / "reference"
PAGES = (ROOT / "README.md", ROOT / "lib" / "docs" / "results.md")
"""Where markers say which results belong."""
PICTURE = ROOT / "lib" / "docs" / "headline.svg"
SAVED = (
    "trust trust_change headline validity arms distance training checks attribution_summary "
    "validation mitigation rm_bench grounding grounding_change lineage lineage_separation"
).split()
"""The tables of a reference run."""
KEYS = ["model", "vertical", "metric", "condition"]


def differences(run: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Rows of both trust tables joined by what they measure, with ``differs`` and ``only_in``.

    ``differs``: each value lies outside the other's interval. ``only_in``: the table of a row that
    the other lacks, else empty.
    """
    ends = ("_run", "_reference")
    joined = run.merge(reference, "outer", on=KEYS, suffixes=ends, indicator="only_in")
    names = {"left_only": "run", "right_only": "reference", "both": ""}
    joined["only_in"] = joined["only_in"].map(names).astype(str)

    def outside(one: str, other: str) -> pd.Series:
        value = joined[f"value_{one}"]
        return (value < joined[f"ci_low_{other}"]) | (value > joined[f"ci_high_{other}"])

    return joined.assign(differs=outside("run", "reference") & outside("reference", "run"))


def reference_table(profile: str, table: str) -> pd.DataFrame:
    path = REFERENCE / profile / f"{table}.csv"
    problem = f"{path.relative_to(ROOT)}: no reference run of profile {profile!r}"
    require(path.exists(), problem)
    return read_csv_table(path, table)


def compare(run: str, other: str = "") -> int:
    """Print where the run differs from its profile's reference, or from another run; 1 if a
    headline figure does, else 0."""
    reference = read_table(Build(other), "trust") if other else reference_table(run, "trust")
    joined = differences(read_table(Build(run), "trust"), reference)
    against = other or "reference"
    both = joined[joined["only_in"] == ""]
    require(len(both), f"{run} and {against} have no figure in common")
    differing = both[both["differs"]]
    for row in differing.itertuples():
        what = visible(f"{row.model}, {row.vertical}, {row.metric}, {row.condition}")
        found = f"{row.value_run:.3f} [{row.ci_low_run:.3f}, {row.ci_high_run:.3f}]"
        ends = f"[{row.ci_low_reference:.3f}, {row.ci_high_reference:.3f}]"
        print(f"differs: {what}: {found}, {against} {row.value_reference:.3f} {ends}")
    for where in ("run", "reference"):
        if count := int((joined["only_in"] == where).sum()):
            name = run if where == "run" else against
            print(f"{count} figures are only in {name}: do its parameters differ?")
    agree = f"{len(both) - len(differing)} of {len(both)} figures agree with {against}"
    print(f"{agree} within their intervals.")
    return int(any(len(headline_rows(differing, of)) for of in (HEADLINE, PUBLISHED)))


def save(profile: str) -> None:
    """Copy a finished run's tables, with its parameters (without directories), versions and
    minutes.

    Minutes are those of each notebook's last run, which may have reused cached answers.
    """
    build, target = Build(profile), REFERENCE / profile
    read_table(build, "trust")
    target.mkdir(parents=True, exist_ok=True)
    for table in SAVED:
        saved = target / f"{table}.csv"
        # `make flagship` leaves out the chapters of some.
        saved.unlink(missing_ok=True)
        if build.table(table).exists():
            shutil.copyfile(build.table(table), saved)
    manifests = read_manifests(build)
    record = {
        "parameters": {stage: m["parameters"] for stage, m in manifests.items()},
        "dtype": manifests["01-sft"]["facts"]["dtype"],
        "versions": manifests["90-report"]["versions"],
        "minutes_last_run": {stage: round(m["seconds"] / 60, 1) for stage, m in manifests.items()},
    }
    text = re.sub(r'"path:(?:[^"\\]|\\.)*"', '"path:<directory>"', json.dumps(record, indent=1))
    write_text(target / "run.json", text + "\n")


def findings_markdown(profile: str) -> str:
    """What the reference run found, in a few points: the effects of the preferences, those of all
    training, what cannot be measured, and whether attribution and acting on it hold."""
    headline, validity = (reference_table(profile, name) for name in ("headline", "validity"))
    table = gated(headline, validity)
    tested = table[table["measurable"] & (table["n"] >= FEW)]
    causes = {
        "placebo": "**Effects of the preferences**, against placebos at the same distance from SFT",
        "start": "**Changes by the training as a whole**, against the start model",
    }
    points = []
    for baseline, cause in causes.items():
        rows = tested[tested["baseline"] == baseline]
        clear = [
            f"{row.stage} on {row.vertical} {interval_words(Interval.of_row(row, 'change'))}, "
            f"{found}"
            for row in rows.itertuples()
            if (found := clear_verdict(row)) != UNCLEAR
        ]
        power = rows["min_detectable"]
        points.append(
            f"{cause}: {len(clear) or 'none'} of {len(rows)} comparisons of stage and vertical "
            f"{'are' if len(clear) > 1 else 'is'} clear after Holm's correction"
            f"{': ' + '; '.join(clear) if clear else ''}. Four of five such studies would find a "
            f"change of {power.min():.3f} to {power.max():.3f}, depending on the comparison, "
            "before that correction."
        )
    missing = [*dict.fromkeys(table.loc[~table["measurable"], "vertical"])]
    if missing:
        points.append(f"**Not measurable** on some of the models compared: {', '.join(missing)}.")
    return "\n".join(f"- {point}" for point in [*points, *attribution_points(profile)])


def attribution_points(profile: str) -> list[str]:
    """Does attribution foretell retraining, and does acting on it help?"""
    points = []
    validation = reference_table(profile, "validation")
    through = validation[validation["test"] == "through training, other orders"]
    if len(through):
        by_solver, said = through.set_index(["target", "solver"]), []
        for stage in through["target"].unique():
            found = interval_words(Interval.of_row(by_solver.loc[stage, "unrolled"]), ".2f")
            best = by_solver.loc[stage, "noise ceiling"]["value"]
            said.append(f"{stage} {found[:-1]}; perfect scores would reach {best:.2f})")
        points.append(
            "**Which examples**: scores through every step of a training foretell retraining in "
            f"other orders of the examples with rank correlations of {'; '.join(said)}."
        )
    mitigation = reference_table(profile, "mitigation")
    own = mitigation["target"] == mitigation["vertical"]
    arms = mitigation[own & (mitigation["selection"] == "harmful")]
    clear = [
        f"to {arm_words(row)} changes {row.target} by "
        f"{interval_words(Interval.of_row(row, 'change'), '+.2f')} nats"
        for row in arms[arms["p_holm"] < 0.05].itertuples()
    ]
    points.append(
        f"**Acting on them**: {len(clear) or 'none'} of {len(arms)} ways to remove, flip or "
        "down-weight the pairs called harmful "
        f"{'change' if len(clear) > 1 else 'changes'} its target clearly beyond the same done to "
        f"random pairs{': ' + '; '.join(clear) if clear else ''}."
    )
    return points


def results_markdown(profile: str) -> str:
    """What the reference run found: every comparison of its headline, if it has placebo arms, its
    measures as published, its checks and RM-Bench results, in Markdown."""
    lines = []
    if (REFERENCE / profile / "headline.csv").exists():
        headline, validity = (reference_table(profile, name) for name in ("headline", "validity"))
        words = headline_words(headline, validity)
        lines += ["Several seeds, against placebo and start:", "", *(f"- {w}" for w in words), ""]
    trust, changes = (reference_table(profile, name) for name in ("trust", "trust_change"))
    glance = as_published(trust, changes)
    record = json.loads((REFERENCE / profile / "run.json").read_text(encoding="utf-8"))
    models = list(dict.fromkeys(glance["model"]))
    heads = ["vertical", "metric (worse when)", "n", "start", *map(as_markdown, models)]
    lines += [
        f"Profile `{profile}`, {record['dtype'].removeprefix('torch.')}, "
        f"seed {record['parameters']['01-sft']['seed']}. The measures as published, by written "
        "answers: change of one checkpoint each against start, with its 95 % interval paired by "
        "item. **Bold** where it excludes zero over 8 items or more; † (never bold) where fewer "
        "than half of the answers of start or of the model could be read: the change is first of "
        "all one of format.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for vertical, rows in glance.groupby("vertical", sort=False):
        n, first = rows["n"].max(), rows.iloc[0]
        worse = "higher" if first["worse"] > 0 else "lower"
        metric = f"{first['metric'].replace('_', ' ')} ({worse})"
        cells = [vertical, metric, str(n), f"{first['start']:.3f}"]
        for row in rows.set_index("model").loc[models].itertuples():
            text = interval_words(Interval.of_row(row, "change"), label="")
            clear = row.verdict in ("worse", "better") and not row.mostly_unreadable
            text = f"**{text}**" if clear else text
            fewer = f", n = {row.n}" if row.n < n else ""
            cells.append(f"{text}{fewer}{' †' if row.mostly_unreadable else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {prose(said)}" for said in reference_table(profile, "checks")["sentence"])]
    if (REFERENCE / profile / "rm_bench.csv").exists():
        words = rm_bench.words(reference_table(profile, "rm_bench"))
        lines += ["", "Rewards on RM-Bench:", "", *(f"- {prose(said)}" for said in words)]
    return "\n".join(lines)


def with_results(text: str, profile: str) -> str:
    """A page with what stands between the profile's markers replaced."""
    for kind, made in (("findings", findings_markdown), ("results", results_markdown)):
        begin, end = f"<!-- {kind}:{profile} -->", f"<!-- end of {kind} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        require(closed or not found, f"the line {end} is missing after {begin}")
        if found:
            text = f"{before}{begin}\n{made(profile)}\n{end}{after}"
    return text


def headline_picture(profile: str) -> None:
    """The reference's headline as ``lib/docs/headline.svg``, which the README shows: the same bytes
    for the same tables."""
    figures.use_style()
    figure = figures.headline(
        gated(*(reference_table(profile, n) for n in ("headline", "validity")))
    )
    with plt.rc_context({"svg.hashsalt": profile}):
        figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> int:
    about = "Hold a run against its profile's reference."
    parser = argparse.ArgumentParser("python -m rlhf_trust.reference", description=about)
    parser.add_argument("profile", help="or the name of a run's folder")
    parser.add_argument("--with", dest="other", default="", help="another run, not the reference")
    parser.add_argument("--save", action="store_true", help="make this run the reference")
    parser.add_argument("--docs", action="store_true", help="put its results into the docs")
    arguments = parser.parse_args(argv)
    if arguments.save:
        save(arguments.profile)
    if arguments.docs:
        for page in PAGES:
            text = with_results(page.read_text(encoding="utf-8"), arguments.profile)
            write_text(page, text)
            if f"<!-- findings:{arguments.profile} -->" in text:
                headline_picture(arguments.profile)
    return 0 if arguments.save or arguments.docs else compare(arguments.profile, arguments.other)


if __name__ == "__main__":
    sys.exit(main())
