"""Files written whole or not at all, and tables that keep to their contract."""

from __future__ import annotations

import errno

import pandas as pd
import pytest
from conftest import NAN
from rlhf_trust import StudyError
from rlhf_trust.artifacts import (
    Build,
    ResultCache,
    atomic_write,
    merge_tables,
    read_table,
    sha256_of,
    write_table,
)
from rlhf_trust.report import holm_over_headlines
from rlhf_trust.verticals import HEADLINE, PUBLISHED


def test_a_line_of_zeros_is_passed_over(tmp_path):
    path = tmp_path / "cache.jsonl"
    path.write_bytes(b'{"key": "a", "value": 1}\n' + bytes(60) + b'\n{"key": "b", "value": 2}\n')
    kept = ResultCache(path)
    kept.add("c", value=3)
    assert [key in ResultCache(path) for key in "abc"] == [True] * 3


@pytest.fixture
def build(tmp_path, monkeypatch) -> Build:
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    return Build("any")


ERRORS = (RuntimeError("a bug"), OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_keeps_the_old_and_leaves_nothing(tmp_path, kind, error):
    path = tmp_path / "product"

    def fill(target, text):
        if kind == "folder":
            target.mkdir()
            target = target / "inside"
        target.write_text(text)
        return target

    fill(path, "old")
    with pytest.raises(type(error)), atomic_write(path) as aside:
        assert fill(aside, "half").exists()
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["product"]
    assert ((path / "inside") if kind == "folder" else path).read_text() == "old"


def test_success_replaces_files_and_folders_whole(tmp_path):
    with atomic_write(tmp_path / "deep" / "file") as aside:
        aside.write_text("new")
        assert not (tmp_path / "deep" / "file").exists()
    assert (tmp_path / "deep" / "file").read_text() == "new"
    for content in ("a", "b"):
        with atomic_write(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    # Nothing of the former one mixed in.
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "folder"]


def test_folder_hash_sees_names_and_bytes(tmp_path):
    (tmp_path / "x").mkdir()
    file = tmp_path / "x" / "a"
    file.write_text("1")
    first = sha256_of(tmp_path / "x")
    (tmp_path / "x" / "manifest.json").write_text("seconds differ")
    assert sha256_of(tmp_path / "x") == first
    file.rename(tmp_path / "x" / "b")
    renamed = sha256_of(tmp_path / "x")
    (tmp_path / "x" / "b").write_text("2")
    assert len({first, renamed, sha256_of(tmp_path / "x")}) == 3


def test_unknown_columns_are_refused(build):
    frame = pd.DataFrame({"stage": ["01-sft"], "step": [1], "metric": ["loss"], "valu": [1.0]})
    with pytest.raises(StudyError, match=r"table training: unknown columns \['valu'\]"):
        write_table(build, "training", "01-sft", frame)
    assert not list(build.root.rglob("*.csv"))


def test_equal_frames_give_equal_bytes(build):
    values = [1 / 3, 2.0]
    frame = pd.DataFrame({"stage": "01-sft", "step": [1, 2], "metric": "loss", "value": values})
    write_table(build, "training", "a", frame)
    # Another order of columns and a difference far below what is reported.
    other = frame.assign(value=frame["value"] + 1e-12)[frame.columns[::-1]]
    write_table(build, "training", "b", other)
    parts = build.root / "tables" / "parts"
    text = (parts / "training.a.csv").read_bytes()
    assert text == (parts / "training.b.csv").read_bytes()
    assert text.splitlines()[1] == b"01-sft,1,loss,0.333333"


def test_holm_is_over_headline_rows_of_all_parts(build):
    def write(part, vertical, p, metric=None, condition=None):
        row = {"model": "sft", "baseline": "start", "vertical": vertical, "p": p, "n": 60}
        row["metric"] = metric or HEADLINE[vertical].metric
        row["condition"] = condition or HEADLINE[vertical].condition
        write_table(build, "trust_change", part, pd.DataFrame([row | {"seed": 0}]))

    write("10", "toxicity", 0.01)
    write("10b", "toxicity", 0.0001, condition="scorer")
    write("11", "ethics", 0.04)
    write("12", "privacy", None)
    write("13", "truthfulness", 0.03)
    write("14", "privacy", 0.0001, "other")
    write("15", "privacy", 0.02, *PUBLISHED["privacy"][:2])
    merged = merge_tables(build, "trust_change", finish=holm_over_headlines)
    # Three headline p-values .01 .03 .04: times 3, 2, 1, and never below the one before. What was
    # published is a family of its own.
    wanted = [0.03, NAN, 0.06, NAN, 0.06, NAN, 0.02]
    assert merged["p_holm"].tolist() == pytest.approx(wanted, nan_ok=True)
    pd.testing.assert_frame_equal(read_table(build, "trust_change"), merged)


def test_a_table_that_is_not_there_says_what_to_run(build):
    with pytest.raises(StudyError, match="make report PROFILE=any"):
        read_table(build, "trust")
    with pytest.raises(StudyError, match="no parts of trust"):
        merge_tables(build, "trust")
    build.table("rm_bench").write_text("of an earlier run")
    assert merge_tables(build, "rm_bench", required=False).empty
    assert not build.table("rm_bench").exists()
