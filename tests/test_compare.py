"""A reader's run against the reference run, and the README's results against the reference's
tables."""

from __future__ import annotations

import pandas as pd
import pytest
from rlhf_trust import ROOT
from rlhf_trust.report import REFERENCE, differences, with_results
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
    assert "hh-cpu" in PROFILES


@pytest.mark.parametrize("profile", PROFILES)
def test_the_readme_shows_the_reference_tables_as_they_are(profile):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_results(readme, profile) == readme, (
        f"run `python -m rlhf_trust.report {profile} --readme`"
    )


@pytest.mark.parametrize("profile", PROFILES)
def test_a_reference_holds_numbers_and_names_no_directory(profile):
    for path in (REFERENCE / profile).iterdir():
        assert path.suffix in (".csv", ".json") and path.stat().st_size < 200_000
        assert "path:/" not in path.read_text()


def test_the_readme_says_what_ppo_did_over_seeds():
    seeds = pd.read_csv(REFERENCE / "ppo-hh-seeds.csv")
    change, kl = seeds["reward_change"], seeds["kl_to_sft"]
    half = student.ppf(0.975, len(seeds) - 1) * change.std() / len(seeds) ** 0.5
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ends = f"{change.mean() - half:+.3f} to {change.mean() + half:+.3f}"
    assert f"Over {len(seeds)} seeds on HH-RLHF's prompts" in readme
    assert f"{change.mean():+.3f} (95 % t interval over seeds {ends})" in readme
    assert f"{kl.mean():.2f} nats an answer ({kl.min():.2f} to {kl.max():.2f})" in readme
