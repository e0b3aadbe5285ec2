"""A reader's run against the reference run, and what README and docs say against the reference's
tables."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rlhf_trust import ROOT, StudyError, params, reference
from rlhf_trust.artifacts import WRITTEN, file_sha256, write_record, write_text
from rlhf_trust.reference import (
    NUMBERS,
    PAGES,
    PICTURE,
    REFERENCE,
    differences,
    verify,
    with_results,
)
from scipy.stats import norm as normal, t as student

PROFILES = sorted(path.parent.name for path in REFERENCE.glob("*/run.json"))


def estimates(**of: tuple[float, float, float]) -> pd.DataFrame:
    """Of each name: a value and the ends of its interval."""
    return pd.DataFrame.from_dict(of, "index", columns=["value", "ci_low", "ci_high"])


def test_two_estimates_differ_beyond_their_joint_error():
    # Each value of a and c lies outside the other's interval; c's are not a joint error apart.
    run = estimates(a=(0.9, 0.85, 0.95), b=(0.5, 0.4, 0.6), c=(0.5, 0.4, 0.6), d=(1, 1, 1))
    other = estimates(a=(0.5, 0.4, 0.6), b=(0.5, 0.4, 0.6), c=(0.61, 0.51, 0.71), d=(0, 0, 0))
    found = differences(run, other)
    assert found["differs"].to_dict() == {"a": True, "b": False, "c": False, "d": True}
    assert found["p"]["c"] == pytest.approx(2 * normal.sf(1.959964 * 0.11 / 0.02**0.5))
    assert found["p"]["b"] == 1 and found["p"]["d"] == 0
    # Only the halves that face each other count.
    wide = estimates(a=(0.9, 0.2, 0.95), b=(0.5, 0.5, 0.5))
    assert not differences(wide, other)["differs"].any()
    assert differences(estimates(a=(0.9, float("nan"), 1)), other)["differs"].tolist() == [False]


def test_one_honest_repetition_in_twenty_fails():
    random, failed = np.random.default_rng(0), 0
    for _ in range(400):
        error = random.uniform(0.1, 1, (2, 60))
        value = random.normal(0, error)
        ends = [value, value - 1.959964 * error, value + 1.959964 * error]
        run, other = (pd.DataFrame(dict(zip(NUMBERS, x))) for x in np.stack(ends, 1))
        failed += differences(run, other)["differs"].any()
    assert 8 <= failed <= 34  # 20 expected


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Makes a run whose notebook wrote the reference's tables, changed by a function of both."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    record = json.loads((REFERENCE / "embedded" / "run.json").read_text(encoding="utf-8"))

    def make(change=lambda table, rows: rows):
        for path in (REFERENCE / "embedded").glob("*.csv"):
            rows = change(path.stem, pd.read_csv(path))
            for name in (f"{path.stem}.csv", f"parts/{path.stem}.x.csv"):
                write_text(
                    tmp_path / "tables" / name, rows.to_csv(index=False, float_format="%.6g")
                )
        outputs = {
            file.relative_to(tmp_path).as_posix(): file_sha256(file)
            for file in tmp_path.rglob("*.csv")
        }
        manifest = {
            "stage": "90-report",
            "parameters": record["parameters"]["90-report"],
            "outputs": outputs,
            "inputs": {"model: path:/home/a": "0"},
            "sources": {},
            "code": {},
            "versions": record["versions"] | {"torch": "0"},
            "seconds": 1,
        }
        write_record(tmp_path / "manifests" / "90-report.json", manifest)
        WRITTEN.clear()
        return tmp_path

    return make


def failures(capsys) -> list[str]:
    return re.findall("^error: (.+)$", capsys.readouterr().out, re.MULTILINE)


def test_what_was_published_holds_in_the_same_run_and_in_one_a_little_different(run, capsys):
    before = sorted(run().rglob("*"))
    assert verify("embedded") == 0
    said = capsys.readouterr().out
    assert "16 of 16 equal the published ones byte for byte" in said
    assert re.search(r"versions: torch 0 \(published 2\..+\)$", said, re.MULTILINE)
    assert sorted(run().rglob("*")) == before
    numbers = ["change", *NUMBERS]
    run(lambda table, rows: rows.assign(**{n: 1.01 * rows[n] for n in numbers if n in rows}))
    assert verify("embedded-seed1") == 0
    assert "16 of 16" not in capsys.readouterr().out


def test_a_number_that_another_seed_does_not_confirm_is_named(run, capsys):
    def moved(table, rows):
        if table == "checks":
            rows.loc[0, NUMBERS] = 0.2, 0.1, 0.3
        return rows[rows["model"] != "start"] if table == "validity" else rows

    run(moved)
    assert verify("embedded-seed1") == 1
    *gone, differs = failures(capsys)
    assert len(gone) == 5 and all(line.endswith("not in this run") for line in gone)
    assert differs.startswith("checks.csv: sft, held-out loss falls: differs: +0.200 (+0.100")


def test_a_table_changed_by_hand_is_named_though_its_value_lies_within_the_interval(run, capsys):
    path = run() / "tables" / "headline.csv"
    rows = pd.read_csv(path)
    rows.loc[rows["stage"].eq("dpo") & rows["vertical"].eq("ethics"), "change"] += 0.001
    rows.to_csv(path, index=False)
    assert verify("embedded") == 1
    assert failures(capsys) == [
        "headline.csv: dpo, ethics, placebo: not as its notebook wrote it",
        "headline.csv: dpo, ethics, start: not as its notebook wrote it",
        "tables/headline.csv: missing, or not as 90-report wrote it",
    ]


def test_there_is_a_reference_run():
    assert {"embedded", "hh-cpu"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_docs_show_the_reference_tables_as_they_are(profile):
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert re.search(f"<!-- (results|attribution):{profile} -->", "".join(pages))
    assert [with_results(page, profile) for page in pages] == pages, (
        f"run `python -m rlhf_trust.reference {profile} --docs`"
    )


def test_the_picture_is_drawn_from_the_reference_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "PICTURE", tmp_path / "headline.svg")
    reference.headline_picture("embedded")
    assert (tmp_path / "headline.svg").read_bytes() == PICTURE.read_bytes(), (
        "run `python -m rlhf_trust.reference embedded --docs`"
    )


def test_a_marker_without_an_end_is_named():
    with pytest.raises(StudyError, match="the line <!-- end of results --> is missing"):
        with_results("<!-- results:hh-cpu -->\n", "hh-cpu")


DOCS = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *(ROOT / "lib/docs").iterdir()]


def anchors(page: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", [p for p in DOCS if p.suffix == ".md"], ids=lambda p: p.stem)
def test_links_of_the_docs_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


CONSTANTS = {
    "0.05": "a level",
    "5 %": "a level",
    "2 %": "how close arms are matched",
    "80 %": "the power of a detectable change",
    "90 %": "of an interval",
    "95 %": "of an interval",
    "1.96": "standard errors to the end of an interval",
    "0.5": "chance, and lineage's and toxicity's thresholds",
    "0.8": "lineage's threshold",
    "0.1": "a damping, an example, rounding in bfloat16",
    "0.25": "a step of bfloat16",
    "0.000004": "a step of float32",
    "0.69": "log 2",
    "1.5": "an example of a ratio",
    "73 %": "the logistic function of 1",
    "50 %": "chance",
    "0.000": "rewards before training",
    "1.4": "billion weights of the paper's smallest model",
    **dict.fromkeys(["31 %", "150 %", "25 %", "12 %"], "the paper's results, quoted as such"),
    **dict.fromkeys(["3.11", "3.12"], "versions of Python"),
    **dict.fromkeys(["2.0", "4.0"], "versions of licences"),
}
"""Numbers that may be typed, and what they are. Results are computed."""


def typed_numbers(text: str) -> set[str]:
    """Decimals and percentages, other than arXiv's numbers."""
    found = re.findall(r"\d+\.\d+ ?%|\d+ ?%|\d+\.\d+", text)
    return {number for number in found if not re.fullmatch(r"\d{4}\.\d{5}", number)}


def prose(notebook: Path) -> str:
    """A notebook's Markdown, and what its code has to say."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            strings = (getattr(node, "value", "") for node in ast.walk(ast.parse(source)))
            parts += [text for text in strings if isinstance(text, str) and " " in text]
    return "\n".join(parts)


@pytest.mark.parametrize("stage", params.stages())
def test_no_result_is_typed_into_a_notebooks_prose(stage):
    assert typed_numbers(prose(params.NOTEBOOKS / f"{stage}.ipynb")) <= {*CONSTANTS}
    assert typed_numbers("rises by 0.123 (95 % interval 0.1 to 7.5%)") - {*CONSTANTS} == {
        "0.123",
        "7.5%",
    }


def test_no_result_is_typed_into_the_readme():
    text = PAGES[0].read_text(encoding="utf-8")
    made = re.sub("<!-- findings:.*?<!-- end of findings -->", "", text, flags=re.DOTALL)
    assert made != text and typed_numbers(made) <= {*CONSTANTS}


def test_the_readme_is_short_and_opens_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and any(line.startswith("<img src=") for line in lines[:12])


@pytest.mark.parametrize("profile", PROFILES)
def test_a_reference_holds_numbers_and_names_no_directory(profile):
    for path in (REFERENCE / profile).iterdir():
        assert path.suffix in (".csv", ".json") and path.stat().st_size < 200_000
        assert "path:/" not in path.read_text()


def test_the_docs_say_what_ppo_did_over_seeds():
    seeds = pd.read_csv(REFERENCE / "ppo-hh-seeds.csv")
    change, kl = seeds["reward_change"], seeds["kl_to_sft"]
    half = student.ppf(0.975, len(seeds) - 1) * change.std() / len(seeds) ** 0.5
    said = " ".join(PAGES[1].read_text(encoding="utf-8").split())
    ends = f"{change.mean() - half:+.3f} to {change.mean() + half:+.3f}"
    assert f"Over {len(seeds)} seeds on HH-RLHF's prompts" in said
    assert f"{change.mean():+.3f} (95 % t interval over seeds {ends})" in said
    assert f"{kl.mean():.2f} nats an answer (range {kl.min():.2f} to {kl.max():.2f})" in said
