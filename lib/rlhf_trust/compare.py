"""Runs against the reference run of their profile, whose tables (numbers only) are in ``tests/reference/<profile>/``.

``python -m rlhf_trust.compare <profile>``
    say where a reader's run differs from the reference beyond its interval (``make compare``);
``python -m rlhf_trust.compare <profile> --save``
    make the run in ``build/<profile>`` the reference;
``python -m rlhf_trust.compare <profile> --readme``
    write the reference's results table into the README.

A figure differs when the reader's value lies outside the reference's interval *and* the reference's value outside the
reader's. Exit code 1 if any headline figure differs, 2 if there is nothing to compare, else 0.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import pandas as pd

from . import ROOT, StudyError
from .artifacts import Build, read_manifests, read_table, write_text
from .report import at_a_glance
from .rewards import rm_bench

REFERENCE = ROOT / "tests" / "reference"
SAVED = ("trust", "trust_change", "distance", "training", "checks", "attribution_summary", "validation", "pruning", "rm_bench", "grounding", "grounding_change", "lineage", "lineage_separation")
KEYS = ["model", "vertical", "metric", "condition"]


def differences(run: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Rows of both trust tables joined by what they measure, with ``differs`` where each value lies outside the
    other's interval; ``only_in`` names the table of a row that the other has not."""
    joined = run.merge(reference, on=KEYS, how="outer", suffixes=("_run", "_reference"), indicator=True)
    joined["only_in"] = joined["_merge"].map({"left_only": "run", "right_only": "reference", "both": ""}).astype(str)
    outside_reference = (joined["value_run"] < joined["ci_low_reference"]) | (joined["value_run"] > joined["ci_high_reference"])
    outside_run = (joined["value_reference"] < joined["ci_low_run"]) | (joined["value_reference"] > joined["ci_high_run"])
    joined["differs"] = outside_reference & outside_run
    return joined


def reference_table(profile: str, table: str) -> pd.DataFrame:
    path = REFERENCE / profile / f"{table}.csv"
    if not path.exists():
        raise StudyError(f"{path.relative_to(ROOT)}: there is no reference run of profile {profile!r}")
    return pd.read_csv(path)


def compare(profile: str) -> int:
    joined = differences(read_table(Build(profile), "trust"), reference_table(profile, "trust"))
    both = joined[joined["only_in"] == ""]
    differing = both[both["differs"]]
    for row in differing.itertuples():
        print(f"differs: {row.model}, {row.vertical}, {row.metric}, {row.condition}: {row.value_run:.3f} "
              f"[{row.ci_low_run:.3f}, {row.ci_high_run:.3f}], reference {row.value_reference:.3f} "
              f"[{row.ci_low_reference:.3f}, {row.ci_high_reference:.3f}]")
    for where in ("run", "reference"):
        count = int((joined["only_in"] == where).sum())
        if count:
            print(f"{count} figures are only in the {where}: were its parameters changed?")
    print(f"{len(both) - len(differing)} of {len(both)} figures agree with the reference run within their intervals.")
    return int((differing["condition"] == "main").any())


def save(profile: str) -> None:
    """Copy a finished run's tables, with its parameters, versions and minutes (of each notebook's last run, which may have
    found answers and retrainings of an earlier one); directories are left out of these."""
    build, target = Build(profile), REFERENCE / profile
    read_table(build, "trust")
    target.mkdir(parents=True, exist_ok=True)
    for table in SAVED:
        if build.table(table).exists():
            shutil.copyfile(build.table(table), target / f"{table}.csv")
        else:  # of a chapter that `make flagship` leaves out
            (target / f"{table}.csv").unlink(missing_ok=True)
    manifests = read_manifests(build)
    record = {
        "parameters": {stage: {name: _public(value) for name, value in m["parameters"].items()} for stage, m in manifests.items()},
        "dtype": manifests["01-sft"]["facts"]["dtype"],
        "versions": manifests["90-report"]["versions"],
        "minutes_last_run": {stage: round(m["seconds"] / 60, 1) for stage, m in manifests.items()},
    }
    write_text(target / "run.json", json.dumps(record, indent=1) + "\n")


def _public(value):
    return "path:<directory>" if isinstance(value, str) and value.startswith("path:") else value


def results_markdown(profile: str) -> str:
    """The headline figures of a reference run: value at the start, then each model's change with interval and n; what its
    training checks found and, if 30-reward-models ran, each reward's RM-Bench."""
    trust, changes = reference_table(profile, "trust"), reference_table(profile, "trust_change")
    glance = at_a_glance(trust, changes)
    record = json.loads((REFERENCE / profile / "run.json").read_text())
    models = list(dict.fromkeys(glance["model"]))
    lines = [f"Profile `{profile}`, {record['dtype'].removeprefix('torch.')}, seed {record['parameters']['01-sft']['seed']}. "
             "Change against start, with its 95 % interval paired by item; "
             "**bold** where it excludes zero, † where fewer than half of the model's answers could be read (its change is "
             "first of all one of format).", "",
             "| vertical | metric (worse when) | n | start | " + " | ".join(models) + " |", "|---" * (4 + len(models)) + "|"]
    for vertical, rows in glance.groupby("vertical", sort=False):
        first = rows.iloc[0]
        cells = []
        for model in models:
            r = rows[rows["model"] == model].iloc[0]
            text = f"{r['change']:+.3f} ({r['ci_low']:+.3f} to {r['ci_high']:+.3f})"
            text = f"**{text}**" if r["ci_low"] > 0 or r["ci_high"] < 0 else text
            fewer = f", n = {r['n']}" if r["n"] < rows["n"].max() else ""
            cells.append(f"{text}{fewer}{' †' if r['mostly_unreadable'] else ''}")
        lines.append(f"| {vertical} | {first['metric'].replace('_', ' ')} ({'higher' if first['worse'] > 0 else 'lower'}) "
                     f"| {rows['n'].max()} | {first['start']:.3f} | " + " | ".join(cells) + " |")
    checks = reference_table(profile, "checks")
    lines += ["", *(f"- {sentence}" for sentence in checks["sentence"])]
    if (REFERENCE / profile / "rm_bench.csv").exists():
        sentences = rm_bench.words(reference_table(profile, "rm_bench"))
        lines += ["", "Rewards on RM-Bench:", "", *(f"- {sentence}" for sentence in sentences)]
    return "\n".join(lines)


def with_results(readme: str, profile: str) -> str:
    """The README's text with the results table between its markers made anew."""
    begin, end = f"<!-- results:{profile} -->", "<!-- end of results -->"
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise StudyError(f"README.md: the lines {begin} and {end} are missing")
    return f"{before}{begin}\n{results_markdown(profile)}\n{end}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rlhf_trust.compare", description=__doc__.split("\n")[0])
    parser.add_argument("profile")
    parser.add_argument("--save", action="store_true", help="make this run the reference")
    parser.add_argument("--readme", action="store_true", help="write the reference's results into the README")
    arguments = parser.parse_args(argv)
    readme: Path = ROOT / "README.md"
    try:
        if arguments.save:
            save(arguments.profile)
        if arguments.readme:
            write_text(readme, with_results(readme.read_text(encoding="utf-8"), arguments.profile))
        return 0 if arguments.save or arguments.readme else compare(arguments.profile)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
