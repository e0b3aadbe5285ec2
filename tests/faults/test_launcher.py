"""Disk, keyboard, terminal and other people's kernels: a command ends in one line, or works."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from rlhf_trust import (
    ROOT,
    StudyError,
    artifacts,
    card,
    command,
    params,
    printable,
    reference,
    render,
    run,
    score,
)

ENVIRONMENT = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}
ENVIRONMENT["PYTHONPATH"] = str(ROOT / "lib") + os.pathsep + os.environ.get("PYTHONPATH", "")


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    return artifacts.Build("embedded")


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "/some/file")


def trust_table(build, text: str | None = None) -> None:
    columns = ",".join(artifacts.TABLES["trust"])
    build.table("trust").parent.mkdir(parents=True, exist_ok=True)
    build.table("trust").write_text(columns if text is None else text, encoding="utf-8")


def executed(build, text: str) -> None:
    build.path("notebooks", "90-report.ipynb").write_text(text, encoding="utf-8")


NOTEBOOK = nbformat.writes(new_notebook(cells=[new_code_cell("1")]))


@pytest.mark.parametrize(
    ("main", "argv", "patched"),
    [
        (run.main, ["resolve"], "rlhf_trust.run.write_resolved"),
        (run.main, ["lab"], "rlhf_trust.run.lay_out"),
        (run.main, ["params"], "rlhf_trust.run.print_parameters"),
        (render.main, ["report", "embedded"], "rlhf_trust.render.write_text"),
        (render.main, ["appendix", "embedded"], "rlhf_trust.render.write_text"),
        (reference.main, ["a", "--with", "b"], "rlhf_trust.reference.read_table"),
        (reference.main, ["embedded", "--save"], "rlhf_trust.reference.save"),
        (card.main, ["embedded"], "rlhf_trust.card.write_card"),
        (score.main, ["ask", "ethics"], "rlhf_trust.score.messages"),
    ],
)
def test_a_full_disk_is_one_line_of_every_command(build, monkeypatch, capsys, main, argv, patched):
    executed(build, NOTEBOOK)
    monkeypatch.setattr(patched, full)
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: /some/file: No space left on device\n"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            StudyError("a.jsonl:3: no\nprompt \x1b[2J\u202e\ud83d"),
            2,
            "a.jsonl:3: no␊prompt ␛[2J[U+202E][U+D83D]",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "build/x"), 2, "build/x: Permission"),
        (OSError("no more handles"), 2, "no more handles"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_faults_of_a_command_are_one_line(raised, code, line, capsys):
    @command
    def main(argv=None):
        raise raised

    assert main([]) == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {line}") and said.count("\n") == 1
    assert said.removesuffix("\n").isprintable()
    with pytest.raises(ZeroDivisionError):  # a fault of the program keeps its traceback
        command(lambda argv: 1 / 0)([])


def test_what_does_not_print_is_marked():
    assert printable("a\x00\x1b[1m\u202e\u200b é→\n b") == "a␀␛[1m[U+202E][U+200B] é→␊ b"


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (render.main, []),
        (render.main, ["report"]),
        (render.main, ["pages", "embedded"]),
        (render.main, ["report", "a", "b"]),
        (card.main, []),
        (reference.main, []),
        (score.main, ["ask"]),
        (run.main, ["stage"]),
        (run.main, ["resolv"]),
    ],
)
def test_wrong_arguments_are_answered_by_the_usage(main, argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2 and capsys.readouterr().err.startswith("usage: ")


BROKEN_NOTEBOOKS = ["", "{", "[]", "{}", "null", '{"cells": 1}', "\x00" * 64, NOTEBOOK[:-20]]


@pytest.mark.parametrize("page", ["report", "appendix"])
@pytest.mark.parametrize("text", BROKEN_NOTEBOOKS)
def test_a_broken_notebook_is_not_rendered(build, capsys, page, text):
    executed(build, text)
    assert render.main([page, "embedded"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "90-report.ipynb: is no executed notebook (" in said


def test_nothing_to_render_is_one_line(build, capsys):
    for page, expected in (
        ("report", "is no executed notebook"),
        ("appendix", "no notebook has run"),
    ):
        assert render.main([page, "embedded"]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1 and "make reproduce" in said


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is no table (No columns to parse from file)"),
        ("model,vertical\n", "has no column 'metric'"),
        ("\x00\x00", "trust.csv: "),
        ('a,b\n"1', "is no table ("),
        (None, "embedded and reference have no figure in common"),
    ],
)
def test_a_table_without_figures_is_not_compared(build, monkeypatch, capsys, text, expected):
    empty = pd.DataFrame(columns=artifacts.TABLES["trust"])
    monkeypatch.setattr(reference, "reference_table", lambda *_: empty)
    trust_table(build, text)
    assert reference.main(["embedded"]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_a_broken_manifest_is_named(build):
    build.path("manifests", "01-sft.json").write_text("{", encoding="utf-8")
    with pytest.raises(StudyError, match="01-sft.json: is damaged"):
        artifacts.read_manifests(build)


def test_a_broken_source_notebook_is_named(build, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(params, "NOTEBOOKS", tmp_path)
    (tmp_path / "01-sft.ipynb").write_text("{", encoding="utf-8")
    assert run.main(["params"]) == 2
    assert "01-sft.ipynb: is not a notebook (" in capsys.readouterr().err


# --- the real processes ---------------------------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command_line = [sys.executable, "-m", *arguments]
    # As on a terminal: what nohup started ignores Ctrl-C, and so do its children.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    environment = ENVIRONMENT | environment
    return subprocess.Popen(command_line, env=environment, preexec_fn=heard, **streams)


def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path):
    """``rlhf_trust`` itself is there, and a library of its is still at it."""
    (tmp_path / "papermill.py").write_text("", encoding="utf-8")
    (tmp_path / "ruamel.py").write_text(
        "import sys, time\nprint('here', flush=True)\ntime.sleep(60)", encoding="utf-8"
    )
    # First on the path, so that it stands for the library.
    where = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    process = python("rlhf_trust.run", "params", PYTHONPATH=where)
    assert process.stdout.readline() == b"here\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said == b"error: interrupted\n"
    assert process.returncode == -signal.SIGINT  # a shell's 130


def test_a_latin_terminal_and_a_full_one(tmp_path):
    strange = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="latin-1")
    source = "from rlhf_trust import command\nmain = command(lambda argv: print('→ é') or 0)\n"
    (tmp_path / "said.py").write_text(f"{source}raise SystemExit(main())", encoding="utf-8")
    where = os.pathsep.join([str(tmp_path), ENVIRONMENT["PYTHONPATH"]])
    process = python("said", PYTHONPATH=where, **strange)
    assert process.communicate() == (rb"\u2192 " + "é\n".encode("latin-1"), b"")
    with open("/dev/full", "wb") as full_disk:
        done = subprocess.run(
            [sys.executable, "-m", "said"],
            env=ENVIRONMENT | {"PYTHONPATH": where},
            stdout=full_disk,
            stderr=subprocess.PIPE,
        )
    assert (done.returncode, done.stderr) == (
        2,
        b"error: standard output: No space left on device\n",
    )


def test_the_kernel_is_this_pythons_whatever_others_are_called(tmp_path, monkeypatch):
    """A kernelspec python3 that starts nothing stands before all others."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    broken = {
        "argv": ["/bin/false", "{connection_file}"],
        "display_name": "x",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(broken), encoding="utf-8")
    for name in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    manager = run.own_kernel()(kernel_name="python3")
    assert manager.kernel_spec.argv[0] == sys.executable


# --- make -----------------------------------------------------------------------------------------


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    names = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONUTF8")
    clean = {name: text for name, text in ENVIRONMENT.items() if name not in names}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_make_uses_the_active_environment_when_asked(tmp_path):
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        done = make("--dry-run", "lint", "PYTHON_ENV=active", **{name: str(tmp_path)})
        assert f"{tmp_path}/bin/ruff" in done.stdout and ".venv" not in done.stdout, done.stderr
    asked = "--eval=shown: ; @echo $(BIN) $$PYTHONUTF8"
    assert make(asked, "shown").stdout == ".venv/bin 1\n"
    done = make(asked, "shown", "PYTHON_ENV=active")
    assert done.returncode == 2 and "no conda or virtual environment is active" in done.stderr
    done = make(asked, "shown", "PYTHON_ENV=yes")
    assert done.returncode == 2 and "PYTHON_ENV must be active, or empty" in done.stderr


def test_an_active_environment_without_the_study_is_one_line(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to("/bin/false")
    done = make("setup", "PYTHON_ENV=active", VIRTUAL_ENV=str(tmp_path))
    assert f"PYTHON_ENV=active: {tmp_path} lacks this study; there, run: pip install" in done.stderr
    assert done.returncode == 2 and not done.stdout


def test_make_names_the_pythons_that_fit(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\necho "$2" >&2; exit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = make(
        "--always-make", ".venv/.installed", f"PYTHON={old}", "--eval=.PHONY: .venv/.installed"
    )
    assert done.returncode == 2 and "Python 3.11 or 3.12 is needed" in done.stderr
    for version, code in (((3, 10), 1), ((3, 11), 0), ((3, 12), 0), ((3, 13), 1)):
        check = done.stderr.splitlines()[0].replace("sys.version_info[:2]", str(version))
        asked = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
        assert (asked.returncode, asked.stderr.count("\n")) == (code, code)


def test_clean_removes_one_run_alone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("smoke", "smoke-seed1", "embedded"):
        (tmp_path / "build" / name / "tables").mkdir(parents=True)
    subprocess.run(["make", "clean", "PROFILE=smoke"], cwd=tmp_path, env=ENVIRONMENT, check=True)
    assert sorted(path.name for path in (tmp_path / "build").iterdir()) == [
        "embedded",
        "smoke-seed1",
    ]
