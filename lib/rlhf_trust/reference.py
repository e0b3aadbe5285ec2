"""Published runs: their tables are kept, a reader's run is held against them, and what they found
is written into the README and the docs.

The tables of a published run (numbers only) are in ``tests/reference/<profile>/``:

``python -m rlhf_trust.reference <run>``
    where do a run's trust figures differ from the reference? (``make compare``; ``--with <run>``:
    from another run)
``python -m rlhf_trust.reference <run> --verify``
    does what was published hold in a run, and are its tables as its notebooks wrote them? (``make
    verify``)
``python -m rlhf_trust.reference <profile> --save``
    make the run in ``build/<profile>`` the reference;
``python -m rlhf_trust.reference <profile> --docs``
    write the reference's results into the README and ``lib/docs``.

Exit codes: 1 if a claim does not hold or a headline figure differs (:func:`differences`), 2 without
anything to compare. Both print, and write nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.special import ndtr

from . import ROOT, command, figures, require, visible
from .artifacts import (
    TABLES,
    Build,
    changed_files,
    file_sha256,
    read_csv_table,
    read_manifests,
    read_table,
    write_text,
)
from .headline import clear_verdict, gated, headline_words
from .render import as_markdown, prose
from .report import (
    arm_words,
    as_published,
    headline_rows,
    mitigation_words,
    planted_words,
    unrolled_words,
)
from .rewards import rm_bench
from .stats import FEW, LEVEL, NORMAL, UNCLEAR, Interval, found_in, holm, interval_words
from .verticals import HEADLINE, PUBLISHED

REFERENCE = ROOT / "tests" / "reference"
PAGES = (ROOT / "README.md", ROOT / "lib" / "docs" / "results.md")
"""Where markers say which results belong."""
PICTURE = ROOT / "lib" / "docs" / "headline.svg"
SAVED = (
    "trust trust_change headline validity arms distance training checks attribution_summary "
    "validation mitigation rm_bench grounding grounding_change lineage lineage_separation "
    "dose dose_change dose_trend"
).split()
"""The tables of a reference run."""

NUMBERS = ["value", "ci_low", "ci_high"]
RULE = (
    "Rule: two estimates differ if the gap between them is more than √(h₁² + h₂²), h₁ and h₂ being "
    "the halves of their 95 % intervals that face each other, after Holm's correction over all "
    "that are compared. Both are estimates, and of many, some would differ by chance alone."
)
Read = Callable[[str], pd.DataFrame]
"""The name of a table → its rows."""

CLAIMS: dict[str, tuple[str, Callable[[Read], pd.DataFrame]]] = {
    "headline": (
        "Effects of the preferences (placebo) and changes by the training as a whole (start)",
        lambda read: gated(read("headline"), read("validity")).query("measurable"),
    ),
    "validity": ("Can it be measured?", lambda read: read("validity").query("model == 'start'")),
    "trust_change": (
        "Changes of single checkpoints, by the measures as published",
        lambda read: headline_rows(read("trust_change"), PUBLISHED),
    ),
    "checks": ("Did training do its job?", lambda read: read("checks")),
    "rm_bench": (
        "Rewards on RM-Bench",
        lambda read: read("rm_bench").query(
            "domain not in @rm_bench.DOMAINS and level != 'normal'"
        ),
    ),
    "validation": (
        "Which examples: scores through training, and the most that scores could reach",
        lambda read: read("validation").query(
            "test == 'through training, other orders' and solver in ['unrolled', 'noise ceiling']"
        ),
    ),
    "mitigation": (
        "Acting on them",
        lambda read: read("mitigation").query("target == vertical and selection == 'harmful'"),
    ),
}
"""Tables with numbers that README and results give with an interval → what is said of them, and the
rows that hold them."""


def named_rows(table: str, rows: pd.DataFrame) -> pd.DataFrame:
    """``value``, ``ci_low`` and ``ci_high`` of a table's rows, by their names: ``headline.csv: ppo,
    ethics, start``."""
    columns = TABLES[table]
    value = "change" if "change" in columns else "value"
    keys = [name for name in columns[: columns.index(value)] if name != "holds"]
    names = [", ".join(map(str, row)) for row in rows[keys].itertuples(index=False)]
    named = rows.set_axis([visible(f"{table}.csv: {name}") for name in names])
    return named.rename(columns={value: "value"})[NUMBERS].astype(float)


def differences(run: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """:func:`named_rows` that both have, side by side, with ``p`` and ``differs``.

    Both are estimates, so a value outside the other's interval shows nothing. The two differ where
    their difference exceeds √(h₁² + h₂²), the hᵢ being the halves of the 95 % intervals that face
    each other (MOVER, G. Y. Zou and A. Donner 2008); and with many rows, where its p-value, by the
    normal distribution, stays below .05 after Holm's correction. Runs that share items are closer
    than independent ones, so a difference is then found more rarely. Without an interval p is NaN.
    """
    ends = ("_run", "_reference")
    joined = run.merge(reference, left_index=True, right_index=True, suffixes=ends)
    gap = joined["value_run"] - joined["value_reference"]

    def facing(upper: str, lower: str) -> pd.Series:
        down = joined[f"value_{upper}"] - joined[f"ci_low_{upper}"]
        return np.hypot(down, joined[f"ci_high_{lower}"] - joined[f"value_{lower}"])

    joint = facing("run", "reference").where(gap > 0, facing("reference", "run"))
    # Of intervals without width, equal values agree and others differ.
    joined["p"] = 2 * ndtr(-NORMAL * (gap.abs() / joint).mask((gap == 0) & (joint == 0), 0))
    tested = joined["p"].notna()
    joined["differs"] = False
    joined.loc[tested, "differs"] = holm(joined.loc[tested, "p"]) < 1 - LEVEL
    return joined


def reference_table(profile: str, table: str) -> pd.DataFrame:
    path = REFERENCE / profile / f"{table}.csv"
    problem = f"{path.relative_to(ROOT)}: no reference run of profile {profile!r}"
    require(path.exists(), problem)
    return read_csv_table(path, table)


def profile_of(run: str) -> str:
    """``embedded`` of ``embedded-seed1``."""
    return re.sub(r"-seed\d+$", "", run)


def both_words(row, against: str = "published") -> str:
    """``+0.020 (-0.010 to +0.050), published +0.012 (…)`` of a row of :func:`differences`."""
    run, reference = (
        "{:+.3f} ({:+.3f} to {:+.3f})".format(*(getattr(row, f"{name}_{of}") for name in NUMBERS))
        for of in ("run", "reference")
    )
    return f"{run}, {against} {reference}"


def compare(run: str, other: str = "") -> int:
    """Print which trust figures of the run differ from its profile's reference, or from another
    run; 1 if a headline figure does, else 0."""
    against, ours = other or "reference", read_table(Build(run), "trust")
    theirs = other and read_table(Build(other), "trust")
    theirs = theirs if other else reference_table(profile_of(run), "trust")
    here, there = (named_rows("trust", table) for table in (ours, theirs))
    both = differences(here, there)
    require(len(both), f"{run} and {against} have no figure in common")
    differing = both[both["differs"]]
    for row in differing.itertuples():
        print(f"differs: {row.Index}: {both_words(row, against)}")
    for name, one, two in ((run, here, there), (against, there, here)):
        if count := len(one.index.difference(two.index)):
            print(f"{count} figures are only in {name}: do its parameters differ?")
    print(f"{len(both) - len(differing)} of {len(both)} figures agree with {against}. {RULE}")
    main = (named_rows("trust", headline_rows(ours, of)) for of in (HEADLINE, PUBLISHED))
    return int(any(rows.index.isin(differing.index).any() for rows in main))


def verify(run: str) -> int:
    """Print every published number beside the run's, whether the run's tables are as its notebooks
    wrote them, and what else it shares with the reference run; 1 unless all of it holds."""
    build, profile, problems = Build(run), profile_of(run), {}
    tables = [name for name in CLAIMS if (REFERENCE / profile / f"{name}.csv").exists()]
    require(tables, f"tests/reference/{profile}: no reference run of profile {profile!r}")
    manifests = read_manifests(build)
    require(manifests, f"{build.root}: no such run; run `make reproduce PROFILE={profile}` first")
    written = [name for made in manifests.values() for name in made["outputs"]]

    def read(table: str, pattern: str) -> pd.DataFrame:
        paths = (build.root / name for name in written if fnmatch(name, f"tables/{pattern}"))
        found = [read_csv_table(path, table) for path in paths if path.exists()]
        return pd.concat(found or [pd.DataFrame(columns=TABLES[table])])

    merged = {table: read(table, f"{table}.csv") for table in tables}
    here = pd.concat(named_rows(table, rows) for table, rows in merged.items())
    made = pd.concat(named_rows(table, read(table, f"parts/{table}.*.csv")) for table in tables)
    made = made[~made.index.duplicated()].reindex(here.index)
    edited = here.index[(here.fillna(np.inf) != made.fillna(np.inf)).any(axis=1)]
    reader = partial(reference_table, profile)
    said = {table: named_rows(table, CLAIMS[table][1](reader)).dropna() for table in tables}
    published = pd.concat(said.values())
    both = differences(here, published)

    if {"headline", "validation", "mitigation"} <= {t for t in tables if len(merged[t])}:
        print(f"Published findings:\n{findings_markdown(reader)}\n")
        print(f"Findings of this run:\n{findings_markdown(merged.get)}\n")
    for table, rows in said.items():
        print(f"{CLAIMS[table][0]} ({table}.csv)")
        for claim in rows.index:
            if claim not in both.index:
                problems[claim] = "not in this run"
                continue
            row = next(both.loc[[claim]].itertuples())
            if claim in edited:
                problems[claim] = "not as its notebook wrote it"
            elif np.isnan(row.p):
                problems[claim] = "no interval in this run"
            elif row.differs:
                problems[claim] = f"differs: {both_words(row)}"
            state = problems.get(claim, "holds").partition(":")[0]
            print(f"  {claim.partition(': ')[2]}: {both_words(row)}: {state}")
    print(RULE, *shared(build, profile, manifests), sep="\n")
    for stage, manifest in manifests.items():
        for path in changed_files(build, manifest, "tables"):
            problems[path.relative_to(build.root)] = f"missing, or not as {stage} wrote it"
    for name, problem in problems.items():
        print(f"error: {name}: {problem}")
    held = len(published.index.difference([*problems]))
    print(f"{held} of {len(published)} published numbers hold in {run}.")
    return int(bool(problems))


def shared(build: Build, profile: str, manifests: Mapping[str, dict]) -> list[str]:
    """What of a run equals the reference run, in lines; for information."""
    folder, here = REFERENCE / profile, record_of(manifests)
    there = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    names = [path.name for path in folder.glob("*.csv")]
    equal = [file_sha256(folder / n) == file_sha256(build.root / "tables" / n) for n in names]
    lines = [f"tables: {sum(equal)} of {len(names)} equal the published ones byte for byte"]
    for kind in ("dtype", "versions", "parameters", "data", "code"):
        then, now = (flat(of.get(kind), kind) for of in (there, here))
        other = [key for key in now if now[key] != then.get(key)]
        told = [
            key[-1]
            if kind in ("data", "code")
            else f"{key[-1]} {now[key]} (published {then.get(key)})"
            for key in other
        ]
        told = ", ".join(dict.fromkeys(told)) or "all equal"
        lines.append(f"{kind}: {told if kind in there else 'not recorded with the published run'}")
    return lines


def flat(entry: object, *key: str) -> dict[tuple[str, ...], object]:
    """Values of nested dicts by the keys that lead to them."""
    if not isinstance(entry, dict):
        return {key: entry}
    return {k: value for name, of in entry.items() for k, value in flat(of, *key, name).items()}


def record_of(manifests: Mapping[str, dict]) -> dict[str, dict]:
    """How a run was made, without directories: parameters, versions, hashes of the data and models
    that it began with and of the code, minutes."""
    made = manifests.values()
    files = {name: of for m in made for name, of in (m["sources"] | m["inputs"]).items()}
    record = {
        "parameters": {stage: m["parameters"] for stage, m in manifests.items()},
        "dtype": manifests.get("01-sft", {"facts": {}})["facts"].get("dtype"),
        "versions": manifests[max(manifests)]["versions"],
        "data": {name: of for name, of in files.items() if name.startswith(("lib/", "model: "))},
        "code": {name: of for m in made for name, of in m["code"].items()},
        "minutes_last_run": {stage: round(m["seconds"] / 60, 1) for stage, m in manifests.items()},
    }
    return json.loads(re.sub(r'path:(?:[^"\\]|\\.)*"', 'path:<directory>"', json.dumps(record)))


def save(profile: str) -> None:
    """Copy a finished run's tables, with how it was made.

    Minutes are those of each notebook's last run, which may have reused cached answers.
    """
    build, target = Build(profile), REFERENCE / profile
    if not any(build.table(table).exists() for table in SAVED):
        read_table(build, "trust")  # says how to make it
    target.mkdir(parents=True, exist_ok=True)
    for table in SAVED:
        saved = target / f"{table}.csv"
        # `make flagship` leaves out the chapters of some.
        saved.unlink(missing_ok=True)
        if build.table(table).exists():
            shutil.copyfile(build.table(table), saved)
    record = record_of(read_manifests(build))
    write_text(target / "run.json", json.dumps(record, indent=1) + "\n")


def findings_markdown(read: Read) -> str:
    """What a run found, in a few points: the effects of the preferences, those of all
    training, what cannot be measured, and whether attribution and acting on it hold."""
    table = gated(read("headline"), read("validity"))
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
            f"{found}{' (one checkpoint)' if row.seeds < 2 else ''}"
            for row in rows.itertuples()
            if (found := clear_verdict(row)) != UNCLEAR
        ]
        power = rows["min_detectable"]
        points.append(
            f"{cause}: {len(clear) or 'none'} of {len(rows)} comparisons of stage and vertical "
            f"{'are' if len(clear) > 1 else 'is'} clear after Holm's correction"
            f"{': ' + '; '.join(clear) if clear else ''}. A change of {power.min():.3f} to "
            f"{power.max():.3f}, depending on the comparison, would be found in "
            f"{found_in(rows['seeds'].max())} such studies, before that correction."
        )
    missing = [*dict.fromkeys(table.loc[~table["measurable"], "vertical"])]
    if missing:
        points.append(f"**Not measurable** on some of the models compared: {', '.join(missing)}.")
    return "\n".join(f"- {point}" for point in [*points, *attribution_points(read)])


def attribution_points(read: Read) -> list[str]:
    """Does attribution foretell retraining, and does acting on it help?"""
    points = []
    validation = read("validation")
    through = validation[validation["test"] == "through training, other orders"]
    if len(through):
        by_solver, said = through.set_index(["target", "solver"]), []
        for stage in through["target"].unique():
            found = interval_words(Interval.of_row(by_solver.loc[stage, "unrolled"]), ".2f")
            scores = by_solver.loc[stage, "value"]
            others = scores.drop(["unrolled", "noise ceiling"], errors="ignore")
            best = f"{others.idxmax().replace('_', ' ')} {others.max():.2f}"
            limit = ""
            if "noise ceiling" in scores:  # known from two other orders on
                limit = f"; perfect scores would reach {scores['noise ceiling']:.2f}"
            said.append(f"{stage} {found[:-1]}; best of the simpler ones: {best}{limit})")
        points.append(
            "**Which examples**: scores through every step of a small, smooth training foretell "
            "its repetition on random halves, in other orders of the examples, with rank "
            f"correlations of {'; '.join(said)}."
        )
    mitigation = read("mitigation")
    own = mitigation["target"] == mitigation["vertical"]
    arms = mitigation[own & (mitigation["selection"] == "harmful")]
    clear = [
        f"to {arm_words(row)} changes {row.target} by "
        f"{interval_words(Interval.of_row(row, 'change'), '+.2f')} nats"
        for row in arms[arms["p_holm"] < 0.05].itertuples()
    ]
    power = arms["min_detectable"]
    points.append(
        f"**Acting on them**: {len(clear) or 'none'} of {len(arms)} ways to remove, flip or "
        "down-weight the pairs called harmful "
        f"{'change' if len(clear) > 1 else 'changes'} its target clearly beyond the same done to "
        f"random pairs{': ' + '; '.join(clear) if clear else ''}. A change of {power.min():.2f} to "
        f"{power.max():.2f} nats would be found in {found_in(arms['draws'].max())} such "
        "comparisons, before correction."
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


def repeated_markdown(profile: str) -> str:
    """Where another run of the same seeds, in ``<profile>-again``, differs from the reference
    (:func:`differences`)."""
    ours, theirs = (partial(reference_table, f"{profile}{end}") for end in ("-again", ""))
    points = []
    for table in ("headline", "validity", "checks", "trust_change"):
        what, claimed = CLAIMS[table]
        both = differences(*(named_rows(table, claimed(read)).dropna() for read in (ours, theirs)))
        names = [
            f"{row.Index.partition(': ')[2]}: {both_words(row)}"
            for row in both[both["differs"]].itertuples()
        ]
        found = f": {'; '.join(names)}" if names else ""
        points.append(f"{what}: {len(names) or 'none'} of {len(both)} numbers differ{found}.")
    headline, validity = ours("headline"), ours("validity")
    clear = [
        f"{row.stage}, {row.vertical}, against {row.baseline}: {found}, "
        f"{interval_words(Interval.of_row(row, 'change'))}, p = {row.p_holm:.3f} after Holm"
        for row in gated(headline, validity).query("measurable").itertuples()
        if (found := clear_verdict(row)) != UNCLEAR
    ]
    points.append(f"Clear in that run: {'; '.join(clear) or 'nothing'}.")
    return "\n".join(f"- {prose(point)}" for point in points)


def attribution_markdown(profile: str) -> str:
    """What the notebooks 22 and 23 of a kept run found, each in its own words."""
    validation, acted = (reference_table(profile, name) for name in ("validation", "mitigation"))
    through = validation["test"].str.startswith("through training")
    words = [
        *unrolled_words(validation[through]),
        *(said for target in acted["target"].unique() for said in mitigation_words(acted, target)),
        *planted_words(validation),
    ]
    return "".join(words).strip()


def with_results(text: str, profile: str) -> str:
    """A page with what stands between the profile's markers replaced."""
    read = partial(reference_table, profile)
    kinds = {
        "findings": partial(findings_markdown, read),
        "results": partial(results_markdown, profile),
        "repeated": partial(repeated_markdown, profile),
        "attribution": partial(attribution_markdown, profile),
    }
    for kind, made in kinds.items():
        begin, end = f"<!-- {kind}:{profile} -->", f"<!-- end of {kind} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        require(closed or not found, f"the line {end} is missing after {begin}")
        if found:
            text = f"{before}{begin}\n{made()}\n{end}{after}"
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
    sides, drawn = re.compile(r'(width|height)="([\d.]+)pt"'), PICTURE.read_text(encoding="utf-8")
    # Larger than in print, as a page's text is.
    drawn = sides.sub(lambda side: f'{side[1]}="{1.4 * float(side[2]):g}pt"', drawn, count=2)
    write_text(PICTURE, drawn)
    plt.close(figure)


@command
def main(argv: list[str] | None = None) -> int:
    about = "Hold a run against its profile's reference."
    parser = argparse.ArgumentParser("python -m rlhf_trust.reference", description=about)
    parser.add_argument("run", help="a profile, or the name of a run's folder")
    parser.add_argument("--with", dest="other", default="", help="another run, not the reference")
    parser.add_argument("--verify", action="store_true", help="does what was published hold in it?")
    parser.add_argument("--save", action="store_true", help="make this run the reference")
    parser.add_argument("--docs", action="store_true", help="put its results into the docs")
    arguments = parser.parse_args(argv)
    if arguments.save:
        save(arguments.run)
    if arguments.docs:
        for page in PAGES:
            text = with_results(page.read_text(encoding="utf-8"), arguments.run)
            write_text(page, text)
            if f"<!-- findings:{arguments.run} -->" in text:
                headline_picture(arguments.run)
    if arguments.save or arguments.docs:
        return 0
    return verify(arguments.run) if arguments.verify else compare(arguments.run, arguments.other)


if __name__ == "__main__":
    sys.exit(main())
