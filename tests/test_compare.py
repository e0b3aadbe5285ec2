"""A reader's run against the reference run, and what README and docs say against the reference's
tables."""

from __future__ import annotations

import re

import pandas as pd
import pytest
from rlhf_trust import ROOT, StudyError, reference
from rlhf_trust.reference import PAGES, PICTURE, REFERENCE, differences, with_results
from scipy.stats import t as student

PROFILES = sorted(path.parent.name for path in REFERENCE.glob("*/run.json"))


def table(**figures: tuple[float, float, float]) -> pd.DataFrame:
    """Of each model: its value and the ends of its interval."""
    columns = ["value", "ci_low", "ci_high"]
    rows = pd.DataFrame.from_dict(figures, "index", columns=columns).rename_axis("model")
    same = {"vertical": "ethics", "metric": "accuracy", "condition": "main", "n": 60, "seed": 0}
    return rows.reset_index().assign(**same)


def test_only_a_figure_outside_the_other_runs_interval_on_both_sides_differs():
    run = table(a=(0.5, 0.4, 0.6), b=(0.9, 0.85, 0.95), c=(0.65, 0.4, 0.9), only=(0, 0, 0))
    reference = table(a=(0.55, 0.5, 0.7), b=(0.5, 0.4, 0.6), c=(0.5, 0.45, 0.55))
    joined = differences(run, reference).set_index("model")
    assert joined["differs"].to_dict() == {"a": False, "b": True, "c": False, "only": False}
    assert joined["only_in"].to_dict() == {"a": "", "b": "", "c": "", "only": "run"}


def test_there_is_a_reference_run():
    assert {"embedded", "hh-cpu"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_the_docs_show_the_reference_tables_as_they_are(profile):
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    assert any(f"<!-- results:{profile} -->" in page for page in pages)
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


def test_the_readme_is_short_and_opens_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 100 and any(line.startswith("![") for line in lines[:12])


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
    assert f"{kl.mean():.2f} nats an answer ({kl.min():.2f} to {kl.max():.2f})" in said
