"""Where work runs: in this process, in child processes (``EXECUTOR=local``), or as jobs of Slurm
(``EXECUTOR=slurm``).

An executor, through submitit, runs each notebook as one job (:func:`run_as_job`), and lets others
help where a notebook has pieces that do not depend on each other (:func:`fan_out`): up to ``JOBS``
processes, the notebook's own among them, take them one by one. A piece is held by a lock while it
is computed, which ends with the process that holds it, so no piece is lost and none is done twice.
What a piece is must depend on its item alone: then no byte depends on who computed it, or when.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout

from . import StudyError, printable, require
from .artifacts import NOTES, READ, SOURCES, WRITTEN, atomic_write, note

if TYPE_CHECKING:
    from submitit import Job

PLACES, OPTIONS = "RLHF_TRUST_PLACES", "RLHF_TRUST_JOB"
"""Environment variables for what a process starts: whose places it takes, its jobs' options."""

OURS = (
    "array cpus-per-task error gpus-per-node job-name mem open-mode output signal time wrap"
).split()
"""Options of sbatch that follow from the profile, or that the waiting for a job rests on."""

MOST = 7 * 24 * 60
"""Minutes that a job is given of which nothing is known."""

SUBMISSIONS = 4
"""How often a job is submitted that is killed each time."""

PAUSE = {"local": 0.2, "slurm": 5.0}
"""Seconds between two looks at what has become of jobs."""


def executor() -> str:
    """``EXECUTOR``: ``local`` or ``slurm``; empty for none."""
    name = os.environ.get("EXECUTOR", "")
    known = name in ("", "none", "local", "slurm")
    require(known, f"EXECUTOR={name}: must be one of none, local, slurm")
    # A node that runs jobs may have none.
    if name == "slurm" and "SLURM_JOB_ID" not in os.environ and not shutil.which("sbatch"):
        raise StudyError("EXECUTOR=slurm: there is no sbatch here; use a cluster's login node")
    return "" if name == "none" else name


def slurm_options() -> dict[str, str | bool]:
    """``SLURM_ARGS="--partition=<name> --account=<name> …"`` by option."""
    found: dict[str, str | bool] = {}
    for one in os.environ.get("SLURM_ARGS", "").split():
        match = re.fullmatch(r"--([a-z][a-z-]*)(?:=([^\s'\"\\]+))?", one)
        require(match, f"SLURM_ARGS: {one!r} is no --<option>=<value> of sbatch, without blanks")
        name, value = match.groups()
        if name in OURS:
            raise StudyError(
                f"SLURM_ARGS: --{name} is set by the study; minutes, memory, gpus and processes of "
                "each notebook stand in a profile's resources:"
            )
        require(name not in found, f"SLURM_ARGS: --{name} stands there twice")
        found[name] = value or True
    return found


def job_options(needs: Mapping[str, float], minutes: float) -> dict[str, Any]:
    """What a job asks for, as submitit has it; ``needs``: of ``params.resources``; ``minutes``: if
    they do not say. A job has ``OMP_NUM_THREADS`` processors for each of its processes."""
    threads = os.environ.get("OMP_NUM_THREADS") or "1"
    require(threads.isdecimal(), f"OMP_NUM_THREADS={threads}: must be a whole number")
    return {
        "timeout_min": int(needs.get("minutes", minutes)),
        "mem_gb": needs.get("memory"),
        "gpus_per_node": needs.get("gpus"),
        "cpus_per_task": needs.get("processes", 1) * int(threads),
        "slurm_additional_parameters": slurm_options(),
    }


def jobs_wanted() -> int:
    """``JOBS``: how many processes may compute at a time; 0: it is not said."""
    jobs = os.environ.get("JOBS") or "0"
    require(jobs.isdecimal(), f"JOBS={jobs}: must be the number of notebooks that run at a time")
    return int(jobs)


@contextmanager
def place(folder: Path) -> Iterator[None]:
    """Hold one of ``JOBS`` places while a notebook runs: ``make -j8`` overrides the Makefile's own
    ``--jobs``, and would load eight models at once. Without ``JOBS`` nothing is waited for."""
    folder.mkdir(parents=True, exist_ok=True)
    held, names = nullcontext(), [f".place-{number}.lock" for number in range(jobs_wanted())]
    for lock in cycle([FileLock(folder / name) for name in names]):
        with suppress(Timeout):
            held = lock.acquire(timeout=0.2)
            break
    with held:
        os.environ[PLACES] = str(folder)
        yield


# --- jobs -----------------------------------------------------------------------------------------


class Call:
    """A function call as a job. It starts anew when its time is up, or when it is preempted."""

    def __init__(self, function: Callable, *given: object):
        self.function, self.given = function, given
        self.gpus = os.environ.get("CUDA_VISIBLE_DEVICES")

    def __call__(self) -> Any:
        if executor() == "local":  # where submitit hides the GPUs
            del os.environ["CUDA_VISIBLE_DEVICES"]
            os.environ |= {} if self.gpus is None else {"CUDA_VISIBLE_DEVICES": self.gpus}
        # A cancelled job ends at once, as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self.function(*self.given)

    def checkpoint(self) -> Any:
        """What submitit starts anew."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(call: Call, count: int, folder: Path, options: Mapping[str, Any]) -> list[Job]:
    """Submit a call ``count`` times; logs lie in ``folder``. In Slurm several are one array."""
    from submitit import AutoExecutor
    from submitit.helpers import clean_env

    where = {name: os.environ[name] for name in ("SLURM_CONF",) if name in os.environ}
    try:
        made = AutoExecutor(folder, cluster=executor())
        made.update_parameters(name=f"rlhf-{folder.name}", **options)
        with clean_env():  # of a job that submits others
            os.environ |= where
            with made.batch():
                return [made.submit(call) for _ in range(count)]
    except RuntimeError as error:
        *_, said = str(error).strip().splitlines()
        raise StudyError(f"{folder.name}: could not be submitted: {said}") from None


def running(jobs: Sequence[Job]) -> list[Job]:
    """Those that have not ended: they run, wait, or are about to start anew.

    Of Slurm's jobs the queue says so, since many clusters keep no accounts to ask (``sacct``)."""
    if executor() == "local" or not jobs:
        return [job for job in jobs if not job.done()]
    command = "squeue --me --array --noheader --format=%i".split()
    queue = subprocess.run(command, capture_output=True, text=True)
    # A controller that does not answer says nothing.
    listed = queue.stdout.split()
    return [job for job in jobs if queue.returncode or job.job_id in listed]


def succeeded(job: Job) -> bool:
    """Has an ended job returned? If not it raised an error, or was killed."""
    path = job.paths.result_pickle
    if executor() == "slurm" and not path.exists():
        time.sleep(PAUSE["slurm"])  # a network's file system may show it later
    return path.exists() and job.exception() is None


def cancel(jobs: Sequence[Job]) -> None:
    """End them, and wait until they have ended."""
    while jobs := running(jobs):
        for job in jobs:
            if executor() == "local":  # by the process that forwards it to the job's own
                os.kill(int(job.job_id), signal.SIGTERM)
            else:
                job.cancel(check=False)
        time.sleep(1.0)


def last_lines(job: Job, count: int = 5) -> tuple[list[str], Path]:
    """The end of a job's log, and where it is."""
    for text, path in ((job.stderr(), job.paths.stderr), (job.stdout(), job.paths.stdout)):
        lines = [line for line in (text or "").splitlines() if line and line[:9] != "submitit "]
        if lines:
            return [printable(line) for line in lines[-count:]], path
    return [], job.paths.stdout


def run_as_job(call: Call, folder: Path, options: Mapping[str, Any]) -> int:
    """Run a call in a job and return its exit code, once that is there.

    What the job printed is printed here; of one that failed the end of its log. One that is killed
    or interrupted is submitted again. Ctrl-C cancels it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for _ in range(SUBMISSIONS):
        jobs = submit(call, 1, folder, options)
        try:
            while running(jobs):
                time.sleep(PAUSE[executor()])
        except BaseException:
            cancel(jobs)
            raise
        (job,) = jobs
        code = job.result() if succeeded(job) else None
        if code == 0:
            lines = (job.stdout() or "").splitlines()
            print("\n".join(line for line in lines if not line.startswith("submitit ")), flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            return code
        name, (lines, path) = f"{folder.name}: job {job.job_id}", last_lines(job)
        for line in lines:
            print(f"{name}: {line}", file=sys.stderr)
        log = f"its log: {os.path.relpath(path)}"
        if job.paths.result_pickle.exists() and code != 130:
            raise StudyError(f"{name}: failed; {log}")
        print(f"{name}: was killed; {log}", file=sys.stderr, flush=True)
    raise StudyError(f"{folder.name}: was killed {SUBMISSIONS} times; {log}")


# --- pieces ---------------------------------------------------------------------------------------


def fan_out(
    function: Callable, items: Mapping[str, Any], folder: Path
) -> Iterator[tuple[str, Any]]:
    """Yield ``(key, function(item))`` of all items as they are done, in any order.

    Parameters
    ----------
    function
        Goes to other processes with all that it refers to, models too. Its result must depend on
        its argument alone.
    items
        Content key (of all that a result depends on) → item.
    folder
        Where the pieces meet, removed at the end. What is to be kept the caller keeps.

    Without an executor, or with ``JOBS=1``, a plain loop. Else ``JOBS - 1`` jobs take pieces as
    this process does, each on as many threads. One that is killed is submitted again, and what it
    was at is done by another. A piece that fails is tried here in the end, and raises its error.
    This process goes on alone where no job can help it.
    """
    others = min(jobs_wanted(), len(items)) - 1 if executor() else 0
    if others < 1:
        for key, item in items.items():
            yield key, function(item)
        return
    import cloudpickle

    results = {key: folder / f"{key}.pkl" for key in items}
    for path in results.values():
        path.unlink(missing_ok=True)
    torch = sys.modules.get("torch")
    work = function, dict(items), torch.get_num_threads() if torch else 0
    with atomic_write(folder / "work") as aside:
        aside.write_bytes(cloudpickle.dumps(work))
    options = json.loads(os.environ.get(OPTIONS, "null")) or job_options({}, MOST)
    call, spare = Call(help_with, folder, os.getpid()), SUBMISSIONS * others
    jobs, missing, looked = [], others, 0.0
    try:
        while results:
            if time.monotonic() - looked > PAUSE[executor()]:
                before, jobs, looked = jobs, running(jobs), time.monotonic()
                for job in before:
                    if job not in jobs and not succeeded(job):
                        said = " ".join(last_lines(job, 1)[0]) or "it was killed"
                        tell(f"{folder.name}: helper {job.job_id} ended early: {said}")
                        missing += 1
                if missing and spare > 0:
                    spare -= missing
                    try:
                        jobs += submit(call, missing, folder, options)
                    except StudyError as error:  # such as on a node that may not submit
                        tell(f"{error}; no helper")
                        spare = 0
                    missing = 0
            worked = any(compute(function, items[key], results[key]) for key in [*results])
            for key in [key for key, path in results.items() if path.exists()]:
                result, notes, *noted = pickle.loads(results.pop(key).read_bytes())
                for own, theirs in zip((WRITTEN, READ, SOURCES), noted):
                    own.update(theirs)
                for sentence in notes:
                    note(sentence)
                yield key, result
            if results and not worked:
                time.sleep(PAUSE["local"])
    finally:
        cancel(jobs)
        shutil.rmtree(folder, ignore_errors=True)


def tell(line: str) -> None:
    """On the launcher's terminal, not in the notebook, which is the same whoever helped."""
    path = os.environ.get("RLHF_TRUST_PROGRESS")
    with open(path, "a", encoding="utf-8") if path else nullcontext(sys.stderr) as shown:
        print(line, file=shown)


def compute(function: Callable, item: Any, result: Path) -> bool:
    """Compute a piece, unless it is there or another process is at it."""
    import cloudpickle

    try:
        lock = FileLock(f"{result}.lock").acquire(timeout=0)
    except Timeout:
        return False
    with lock:
        if result.exists():
            return False
        # For the manifest of the notebook: what it does in another way, has written and read.
        made = cloudpickle.dumps((function(item), NOTES, WRITTEN, READ, SOURCES))
        with atomic_write(result) as aside:
            aside.write_bytes(made)
        return True


def help_with(folder: Path, asked_by: int) -> None:
    """What a job of :func:`fan_out` does: pieces that nobody is at, until there are none.

    A child process waits for a place before it loads anything, and ends with its parent."""
    local = executor() == "local"
    with place(Path(os.environ[PLACES])) if local and PLACES in os.environ else nullcontext():
        function, items, threads = pickle.loads((folder / "work").read_bytes())
        if threads:
            import torch

            torch.set_num_threads(threads)
        for key, item in items.items():
            if not local or psutil.pid_exists(asked_by):
                compute(function, item, folder / f"{key}.pkl")
