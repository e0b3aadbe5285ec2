"""The launcher: a notebook stands in its place only when every cell of it ran."""

from __future__ import annotations

import errno
import os
import signal

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from rlhf_trust import artifacts, params, run


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of one notebook ``01-x``: returns a function that writes it with this code and
    runs."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for module in (params, run):
        monkeypatch.setattr(module, "NOTEBOOKS", notebooks)
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    monkeypatch.delenv("RLHF_TRUST_PROGRESS", raising=False)
    made = tmp_path / "build" / "notebooks"
    made.mkdir(parents=True)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # A shell starts background jobs with interrupts ignored, and the tests may be part of one.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def execute(code: str) -> int:
        tagged = {"tags": ["parameters"]}
        cells = [
            new_code_cell("steps: int = 8  # how many", metadata=tagged),
            new_code_cell(code),
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
        nbformat.write(notebook, notebooks / "01-x.ipynb")
        return run.main(["stage", "01-x"])

    execute.made = made
    yield execute
    for number, handler in before.items():
        signal.signal(number, handler)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_success_takes_its_place_and_clears_a_former_failure(study, capsys):
    (study.made / "01-x.failed.ipynb").write_text("a former failure")
    code = study(
        "import os\nfrom pathlib import Path\n"
        "Path(os.environ['RLHF_TRUST_PROGRESS']).write_text('half way')\nprint('steps', steps + 1)"
    )
    assert code == 0, capsys.readouterr().err
    assert names(study.made) == ["01-x.ipynb"]  # no failed one, no part, no progress file
    assert "RLHF_TRUST_PROGRESS" not in os.environ
    text = (study.made / "01-x.ipynb").read_text()
    assert "steps 9" in text and '"papermill"' not in text and str(study.made) not in text


def test_failure_is_kept_beside_and_an_older_result_is_gone(study, capsys):
    (study.made / "01-x.ipynb").write_text("an older result")
    code = study(
        "from rlhf_trust import StudyError\nprint('seen before it')\n"
        "raise StudyError('hh.jsonl:3: no chosen\\nmore')"
    )
    error = capsys.readouterr().err.splitlines()
    assert code == 1
    assert names(study.made) == ["01-x.failed.ipynb"]
    assert "seen before it" in (study.made / "01-x.failed.ipynb").read_text()
    (line,) = [line for line in error if line.startswith("error:")]
    assert line.startswith("error: 01-x: hh.jsonl:3: no chosen␊more (see ")
    assert "01-x.failed.ipynb" in line


def test_interrupt_ends_with_130_and_leaves_no_result(study, capsys):
    (study.made / "01-x.ipynb").write_text("an older result")
    code = study("import os, signal, time\nos.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)")
    assert code == 130
    assert names(study.made) in (["01-x.failed.ipynb"], [])
    assert "error: 01-x: interrupted" in capsys.readouterr().err


def test_full_disk_is_one_line_and_leaves_no_result(study, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    assert study("pass") == 1
    assert "error: 01-x: No space left on device: somewhere" in capsys.readouterr().err
    # The disk may also fill up when the finished notebook is written.
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda source, target, *_, **__: os.link(source, target)
    )
    monkeypatch.setattr(run, "publishable", full)
    assert study("pass") == 1
    assert "error: 01-x: No space left on device: somewhere" in capsys.readouterr().err
    assert names(study.made) == ["01-x.failed.ipynb"]


MANIFEST = """
from rlhf_trust.artifacts import Build, Manifest
Manifest(Build('embedded'), '01-x', {'steps': steps}).write()
print('made')
"""


def test_of_two_runs_at_once_the_second_takes_what_the_first_made(study, capsys, monkeypatch):
    assert study(MANIFEST) == 0
    monkeypatch.setattr(run.time, "time", lambda: 0.0)  # the second had begun before
    assert study(MANIFEST) == 0
    assert "01-x: made by another run just now" in capsys.readouterr().out
    monkeypatch.setenv("SET", "01-x.steps=9")
    assert study(MANIFEST) == 0
    assert "01-x: done" in capsys.readouterr().out


def test_what_a_finished_notebook_shows_is_held_against_its_hash(study, capsys):
    assert study(MANIFEST) == 0
    build, path = artifacts.Build("embedded"), study.made / "01-x.ipynb"
    assert run.reason_to_repeat(build, "01-x") == ""
    path.write_text(path.read_text().replace("made\\n", "mode\\n"))
    assert run.reason_to_repeat(build, "01-x") == f"{path}: missing, or not as it was written"


def test_unknown_stage_names_the_known_ones(study, capsys):
    cell = new_code_cell("steps: int = 1  # how many", metadata={"tags": ["parameters"]})
    nbformat.write(new_notebook(cells=[cell]), params.NOTEBOOKS / "01-x.ipynb")
    assert run.main(["stage", "02-y"]) == 2
    assert capsys.readouterr().err == "error: no notebook '02-y'; there are 01-x\n"


def test_kernel_has_the_network_only_where_a_parameter_names_the_hub(tmp_path):
    progress = tmp_path / "progress"
    assert run.kernel_environment({"model": "wheel:x"}, progress)["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in run.kernel_environment({"model": "hub:x/y@1"}, progress)


def test_publishable_drops_what_only_this_machine_knows():
    widget = new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
    shown = new_output("stream", text="kept")
    cell = new_code_cell("1", outputs=[widget, shown])
    cell.metadata = {"papermill": {"duration": 1}, "execution": {}, "tags": ["kept"]}
    notebook = new_notebook(cells=[cell, new_markdown_cell("text")])
    notebook.metadata = {"papermill": {"output_path": "somewhere/out.ipynb"}, "widgets": {}}
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    cleaned = run.publishable(notebook)
    assert list(cleaned.metadata) == ["kernelspec"]
    assert cleaned.cells[0].metadata == {"tags": ["kept"]} and cleaned.cells[0].outputs == [shown]
