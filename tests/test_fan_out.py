"""Executors: the same bytes whoever computes, what is killed is done again, and one line where
something is wrong. Slurm's are skipped where Debian's ``slurm-wlm`` and ``munge`` are not there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from rlhf_trust import ROOT, StudyError, fan_out, params, run
from rlhf_trust.artifacts import ResultCache

SLURM = ROOT / "tests" / "slurm"
WORKER = "submitit.core._submit"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The configuration of a Slurm of one node, which runs as long as the tests do."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("no slurmctld here: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([SLURM / "up", folder], capture_output=True, text=True)
    assert up.returncode == 0, up.stderr
    yield str(folder / "slurm.conf")
    subprocess.run([SLURM / "down", folder], check=True)


def cancel_all() -> None:
    subprocess.run(["scancel", "--me"], check=True)
    wait_for(lambda: not queue())


@pytest.fixture(params=["local", pytest.param("slurm", marks=pytest.mark.slow)])
def where(request, monkeypatch):
    """Each executor in turn, three processes at a time."""
    if request.param == "slurm":
        monkeypatch.setenv("SLURM_CONF", request.getfixturevalue("slurm"))
        request.addfinalizer(cancel_all)
    monkeypatch.setenv("EXECUTOR", request.param)
    monkeypatch.setenv("JOBS", "3")
    monkeypatch.delenv(fan_out.PLACES, raising=False)
    monkeypatch.delenv(fan_out.OPTIONS, raising=False)
    return request.param


def workers(folder: Path) -> list[psutil.Process]:
    """The processes of jobs whose logs lie in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or [""]
        if WORKER in words and words[-1] == str(folder) and "python" in words[0]:
            found.append(process)
    return found


def wait_for(condition, seconds: float = 600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


# --- pieces ---------------------------------------------------------------------------------------


def test_without_an_executor_or_a_second_process_it_is_a_loop(tmp_path, monkeypatch):
    calls, items = [], {"a": 1, "b": 2}
    for executor, jobs in (("", "8"), ("none", "8"), ("local", "1"), ("local", "")):
        monkeypatch.setenv("EXECUTOR", executor)
        monkeypatch.setenv("JOBS", jobs)
        for key, found in fan_out.fan_out(lambda n: calls.append(n) or -n, items, tmp_path / "x"):
            assert found == -items[key]
    assert calls == [1, 2] * 4 and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_helpers_compute_as_this_process_would(where, tmp_path, monkeypatch):
    monkeypatch.setattr(fan_out, "compute", lambda *_: False)  # here: they do it all
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    torch.manual_seed(0)
    weight, asked = torch.randn(40, 40), {f"k{n}": n for n in range(5)}

    def piece(n):
        product = (weight * n) @ weight
        return product, torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()

    found = dict(fan_out.fan_out(piece, asked, tmp_path / "pieces"))
    assert found.keys() == asked.keys() and not (tmp_path / "pieces").exists()
    for key, (product, threads, gpus, pid) in found.items():
        assert torch.equal(product, piece(asked[key])[0]) and pid != os.getpid()
        assert (threads, gpus) == (torch.get_num_threads(), "3,1")
    wait_for(lambda: not workers(tmp_path / "pieces"))


@pytest.mark.slow
def test_an_error_of_a_piece_is_raised_here_and_the_helpers_end(where, tmp_path):
    def piece(n):
        if n == 2:
            raise StudyError("row 2: no prompt")
        return n

    with pytest.raises(StudyError, match="row 2: no prompt"):
        list(fan_out.fan_out(piece, {f"k{n}": n for n in range(4)}, tmp_path / "pieces"))
    assert not workers(tmp_path / "pieces") and not (tmp_path / "pieces").exists()


@pytest.mark.slow
def test_twenty_kills_of_eight_helpers_lose_and_double_no_row(tmp_path):
    """In a process of its own, without torch, so that helpers begin in a second."""
    program = """
import os, sys, time
from pathlib import Path
from rlhf_trust.artifacts import ResultCache
from rlhf_trust.fan_out import fan_out
folder, parent = Path(sys.argv[1]), os.getpid()

def piece(n):
    with open(folder / "begun", "a") as begun:
        print(os.getpid(), file=begun, flush=True)
    # Until enough have been killed helpers stay at their pieces, and the parent, which looks for
    # them in between, is slow.
    tries = 10 if os.getpid() == parent else 10_000
    while tries and not (folder / "enough").exists():
        tries -= 1
        time.sleep(0.05)
    return n * n

kept = ResultCache(folder / "rows.jsonl")
for key, square in fan_out(piece, {f"k{n}": n for n in range(600)}, folder / "pieces"):
    kept.add(key, square=square)
assert "torch" not in sys.modules
"""
    environment = os.environ | {"EXECUTOR": "local", "JOBS": "9", "PYTHONPATH": str(ROOT / "lib")}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment)
    rng, killed, begun = random.Random(0), set(), tmp_path / "begun"

    def at_work():
        assert parent.poll() is None, "it ended before it was disturbed"
        known = set(begun.read_text().split()) if begun.exists() else set()
        return [p for p in workers(tmp_path / "pieces") if {str(p.pid)} & known - killed]

    for _ in range(20):
        victim = rng.choice(wait_for(at_work))
        time.sleep(rng.random() / 4)
        killed.add(str(victim.pid))
        victim.kill()
    (tmp_path / "enough").touch()
    assert parent.wait(600) == 0
    rows = ResultCache(tmp_path / "rows.jsonl")
    assert {key: row["square"] for key, row in rows.items()} == {f"k{n}": n * n for n in range(600)}
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 600
    tries = Counter(begun.read_text().split())
    assert len(killed) == 20 and 600 < sum(tries.values()) <= 620
    assert not workers(tmp_path / "pieces") and not (tmp_path / "pieces").exists()


def test_helpers_wait_for_a_place(tmp_path, monkeypatch):
    """Of two places this process holds one and a notebook the other."""
    monkeypatch.setenv("EXECUTOR", "local")
    monkeypatch.setenv("JOBS", "2")
    folder, began = tmp_path / "pieces", threading.Event()
    monkeypatch.setattr(fan_out.pickle, "loads", lambda _: began.set() or (abs, {}, 0))
    folder.mkdir()
    (folder / "work").touch()
    with fan_out.place(tmp_path):
        with fan_out.place(tmp_path):
            helper = threading.Thread(target=fan_out.help_with, args=(folder, os.getpid()))
            helper.start()
            assert not began.wait(1)
        assert began.wait(10)
        helper.join()


# --- notebooks ------------------------------------------------------------------------------------

CODE = """
import os, pathlib, time
begun = pathlib.Path(os.environ["BEGUN"])
if not begun.exists():  # the first try is to be disturbed
    begun.write_text(str(os.getpid()))
    time.sleep(600)
print("steps", steps + 1)
"""


@pytest.fixture
def study(tmp_path):
    """A checkout of one notebook ``01-x``: returns a function that runs it in the background."""
    lib, begun = tmp_path / "lib" / "rlhf_trust", tmp_path / "begun"
    shutil.copytree(ROOT / "lib/rlhf_trust", lib, ignore=shutil.ignore_patterns("shipped", "__py*"))
    (tmp_path / "params").mkdir()
    needs = "resources: {all: {minutes: 60}, 01-x: {processes: 1}}"
    (tmp_path / "params" / "small.yaml").write_text(needs)
    started = []

    def start(code: str = CODE, **environment: str) -> subprocess.Popen:
        cells = [new_code_cell("steps: int = 8  # how many", metadata={"tags": ["parameters"]})]
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        notebook = new_notebook(cells=[*cells, new_code_cell(code)])
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell{number}"
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        notebook.metadata["kernelspec"] = kernel
        nbformat.write(notebook, tmp_path / "notebooks" / "01-x.ipynb")
        added = os.pathsep + os.environ.get("PYTHONPATH", "")
        environment = {"PYTHONPATH": f"{lib.parent}{added}", "BEGUN": str(begun)} | environment
        command = [sys.executable, "-m", "rlhf_trust.run", "stage", "01-x", "--profile", "small"]
        kinds = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        started.append(subprocess.Popen(command, env=os.environ | environment, **kinds))
        return started[-1]

    start.begun, start.build = begun, tmp_path / "build" / "small"
    start.made, start.jobs = start.build / "notebooks/01-x.ipynb", start.build / "jobs/01-x"
    yield start
    for launcher in started:  # of a test that failed: it would start its job again
        launcher.kill()


def queue(*more: str) -> list[str]:
    command = ["squeue", "--me", "--noheader", "--format=%i", *more]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def content_of(path: Path) -> list[tuple]:
    """What a notebook holds, but for the random name of the cell that papermill adds."""
    cells = nbformat.read(path, as_version=4).cells
    return [(cell.source, cell.outputs, cell.execution_count) for cell in cells]


UNDISTURBED: list[tuple] = []
"""What the notebook holds without an executor, once it has run."""

WAYS = ["killed", "cancelled", "out of time", "its node lost"]
REQUEUED = WAYS[2:]
"""After these the same job starts anew; submitit sees to the time, Slurm to the node."""


def lose_node() -> None:
    """Kill all that runs on Slurm's node, without a word; say that it is down, as Slurm itself
    would after minutes; and start the node's daemon again."""
    own = os.environ["SLURM_CONF"]
    daemon = int(Path(own).with_name("slurmd.pid").read_text())

    def is_ours(started: psutil.Process) -> bool:
        with suppress(psutil.Error):  # one that has just ended
            return started.environ().get("SLURM_CONF") == own
        return False

    steps = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "slurmstepd"]
    # By what a step has started: its title is written over its own environment.
    ours = [p for p in steps if any(map(is_ours, p.children(recursive=True)))]
    assert ours, steps
    for process in [psutil.Process(daemon), *ours]:
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    (node,) = subprocess.check_output(["sinfo", "--noheader", "--format=%n"], text=True).split()
    down = ["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"]
    subprocess.run(down, check=True)
    wait_for(lambda: not psutil.pid_exists(daemon), 30)
    path = f"{os.environ['PATH']}:/usr/sbin"
    subprocess.run([shutil.which("slurmd", path=path)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_disturbed_notebook_ends_in_the_same_bytes(where, study, way):
    if where == "local" and way in ("cancelled", "its node lost"):
        pytest.skip("of Slurm alone")
    first = study()
    wait_for(study.begun.exists)
    (worker,) = workers(study.jobs)
    if way == "killed":
        worker.kill()
    elif way == "its node lost":
        lose_node()
    elif way == "cancelled":
        subprocess.run(["scancel", *queue()], check=True)
    else:  # as submitit is told that the time is nearly up
        worker.send_signal(signal.SIGUSR2)
    if where == "slurm" and way in REQUEUED:  # it waits for two minutes before it starts them
        (job,) = wait_for(lambda: queue("--states=PENDING"))
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)
    out, errors = first.communicate(timeout=600)
    assert first.returncode == 0, errors
    assert "01-x: done in" in out and not study.jobs.exists()
    assert ("was killed; its log: build/small/jobs/01-x/" in errors) == (way not in REQUEUED)
    disturbed = content_of(study.made)
    if not UNDISTURBED:
        assert study(EXECUTOR="none").wait(600) == 0
        UNDISTURBED.extend(content_of(study.made))
    assert "steps 9" in str(disturbed) and disturbed == UNDISTURBED


@pytest.mark.slow
def test_an_interrupted_launcher_cancels_its_job(where, study):
    launcher = study()
    wait_for(study.begun.exists)
    launcher.terminate()
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 130 and errors.splitlines()[-1] == "error: interrupted"
    assert not workers(study.jobs) and not study.made.exists()
    assert where == "local" or not queue("--states=PENDING,RUNNING")  # it may still be cleaned up
    wait_for(lambda: not psutil.pid_exists(int(study.begun.read_text())), 30)  # its kernel


@pytest.mark.slow
def test_a_failed_notebook_shows_the_end_of_its_log_and_where_it_is(where, study):
    launcher = study("from rlhf_trust import StudyError\nraise StudyError('hh.jsonl:3: no chosen')")
    out, errors = launcher.communicate(timeout=600)
    *_, said, last = errors.splitlines()
    assert launcher.returncode == 2
    assert "hh.jsonl:3: no chosen (see " in said and said.startswith("01-x: job ")
    assert last.startswith("error: 01-x: job ") and "failed; its log: build/small/jobs" in last
    assert (study.build.parents[1] / last.rpartition(" ")[2]).is_file()


# --- what is asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("EXECUTOR", "ray", "EXECUTOR=ray: must be one of none, local, slurm"),
        ("SLURM_ARGS", "-p gpu", "SLURM_ARGS: '-p' is no --<option>=<value> of sbatch"),
        ("SLURM_ARGS", "--account=a b", "SLURM_ARGS: 'b' is no --<option>=<value> of sbatch"),
        ("SLURM_ARGS", "--qos=a --qos=b", "SLURM_ARGS: --qos stands there twice"),
        ("SLURM_ARGS", "--time=60", "SLURM_ARGS: --time is set by the study; minutes, memory"),
        ("SLURM_ARGS", "--comment='x", 'SLURM_ARGS: "--comment=\'x" is no --<option>=<value>'),
    ],
)
def test_what_is_no_executor_or_option_is_one_line(monkeypatch, capsys, name, value, said):
    monkeypatch.setenv(name, value)
    assert run.main(["params", "--profile", "smoke"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_slurm_without_slurm_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("EXECUTOR", "slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert run.main(["params", "--profile", "smoke"]) == 2
    assert "error: EXECUTOR=slurm: there is no sbatch here" in capsys.readouterr().err


def test_a_notebook_on_a_node_that_may_not_submit_goes_on_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXECUTOR", "slurm")
    monkeypatch.setenv("JOBS", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("RLHF_TRUST_PROGRESS", raising=False)
    found = fan_out.fan_out(abs, {"a": -1, "b": -2}, tmp_path / "pieces")
    assert dict(found) == {"a": 1, "b": 2}
    assert "pieces: could not be submitted: " in capsys.readouterr().err


def test_a_refused_job_is_one_line(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", slurm)
    monkeypatch.setenv("EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_ARGS", "--partition=nowhere")
    with pytest.raises(StudyError, match="^01-x: could not be submitted: .*(artition|Batch job)"):
        options = fan_out.job_options({}, 1)
        fan_out.submit(fan_out.Call(abs, 1), 1, tmp_path / "01-x", options)


def test_options_of_slurm_and_needs_reach_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_ARGS", "--partition=gpu --account=me --exclusive")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    given = fan_out.job_options({"minutes": 90, "memory": 12.5, "processes": 2}, minutes=5)
    assert given.pop("slurm_additional_parameters") == {
        "partition": "gpu",
        "account": "me",
        "exclusive": True,
    }
    wanted = {"timeout_min": 90, "mem_gb": 12.5, "gpus_per_node": None, "cpus_per_task": 8}
    assert given == wanted and fan_out.job_options({}, minutes=5)["timeout_min"] == 5


def test_resources_lie_over_those_of_the_profile_below(tmp_path, monkeypatch):
    monkeypatch.setattr(params, "PROFILES", tmp_path)
    below = "resources:\n  all: {minutes: 60, gpus: 1}\n  01-sft: {memory: 8}\n"
    (tmp_path / "below.yaml").write_text(below)
    (tmp_path / "mine.yaml").write_text("extends: below\nresources:\n  01-sft: {minutes: 90}\n")
    found = params.resources("mine")
    assert found["01-sft"] == {"minutes": 90, "gpus": 1, "memory": 8.0}
    assert found["02-reward"] == {"minutes": 60, "gpus": 1}
    assert params.resolve("mine") == params.resolve("embedded", run="mine")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("resources: 5", "resources: must map parameters to values, got 5"),
        ("resources: {01-sft: 5}", "resources: 01-sft: must map parameters to values, got 5"),
        ("resources: {01-stf: {}}", "resources: no notebook '01-stf'; did you mean '01-sft'?"),
        ("resources: {all: {minute: 5}}", "resources: all: unknown 'minute'; did you mean 'minu"),
        ("resources: {all: {gpus: -1}}", "resources: all: gpus must be >= 0, got -1"),
        ("resources: {all: {memory: big}}", "resources: all: memory must be float, got 'big'"),
        ("resource: {all: {gpus: 1}}", "no notebook 'resource'"),
    ],
)
def test_wrong_resources_are_one_line(tmp_path, monkeypatch, capsys, text, said):
    monkeypatch.setattr(params, "PROFILES", tmp_path)
    (tmp_path / "x.yaml").write_text(text)
    assert run.main(["params", "--profile", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: params/x.yaml: {said}") and error.count("\n") == 1
