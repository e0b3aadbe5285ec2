"""The launcher: strict parameters, then papermill, then a whole notebook in place or a failed one beside it.

``python -m rlhf_trust.run resolve --profile smoke``
    check every parameter and write ``build/smoke/params/<stage>.yaml``, only where it changed (make sees which);
``python -m rlhf_trust.run stage 01-sft --profile smoke``
    run one notebook with them;
``python -m rlhf_trust.run params --profile smoke``
    print what would run.

Exit codes: 0 done, 1 a notebook failed, 2 a parameter is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import yaml

from . import StudyError, build_root
from .params import NOTEBOOKS, notebook_parameters, resolve, stages, terms_accepted
from .sources import ACCEPTED, TERMS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_trust.run", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("resolve", "check parameters and write them where they changed"),
        ("params", "print the parameters of every notebook"),
        ("stage", "run one notebook"),
    ):
        command = commands.add_parser(name, help=about)
        if name == "stage":
            command.add_argument("stage")
        command.add_argument("--profile", default="embedded")
        command.add_argument(
            "--data", default="", help="directory with HH-RLHF and benchmark files"
        )
        command.add_argument(
            "--seed", default="", help="of everything; the run is named <profile>-seed<seed>"
        )
    arguments = parser.parse_args(argv)
    try:
        overrides = data_overrides(arguments.data) | seed_overrides(arguments.seed)
        run = f"{arguments.profile}-seed{arguments.seed}" if arguments.seed else arguments.profile
        parameters = resolve(arguments.profile, overrides, run)
        if arguments.command == "params":
            print_parameters(run, parameters)
            print_estimate(parameters)
            return 0
        accept_terms(arguments.profile, parameters)
        if arguments.command == "resolve":
            write_resolved(run, parameters)
        else:
            return run_stage(arguments.stage, run, parameters)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def accept_terms(profile: str, parameters: dict[str, dict]) -> None:
    """Refuse a model under terms of its own unless the profile accepts them; then its notebooks know that, too."""
    if terms_accepted(profile):
        os.environ[ACCEPTED] = "true"
    source = next(
        (values["model"] for values in parameters.values() if values.get("model") in TERMS), None
    )
    if source is not None and os.environ.get(ACCEPTED) != "true":
        raise StudyError(
            f"params/{profile}.yaml: its model, {source}, comes under {TERMS[source]}; read them, then write "
            "accept_gemma_terms: true into the file, outside of any section"
        )


def data_overrides(directory: str) -> dict[str, str]:
    """``DATA=<directory>`` on the command line: preferences and benchmarks from there, in every notebook."""
    if not directory:
        return {}
    path = Path(directory).expanduser().resolve()
    if not path.is_dir():
        raise StudyError(f"DATA={directory}: no such directory")
    return {"preferences": f"path:{path}", "benchmarks": f"path:{path}"}


def seed_overrides(seed: str) -> dict[str, int]:
    """``SEED=<number>`` on the command line: one seed for every notebook."""
    if seed and not seed.isdecimal():
        raise StudyError(f"SEED={seed}: must be a whole number from 0 on")
    return {"seed": int(seed)} if seed else {}


def write_resolved(run: str, parameters: dict[str, dict]) -> None:
    folder = build_root(run) / "params"
    folder.mkdir(parents=True, exist_ok=True)
    for stage, values in parameters.items():
        path, text = (
            folder / f"{stage}.yaml",
            yaml.safe_dump(values, sort_keys=False, allow_unicode=True),
        )
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def print_parameters(run: str, parameters: dict[str, dict]) -> None:
    """Every notebook's parameters with their meaning; a star marks what the profile changed."""
    for stage, values in parameters.items():
        print(f"\n{stage}")
        declared = notebook_parameters(NOTEBOOKS / f"{stage}.ipynb")
        for name, value in values.items():
            star = "*" if value != declared[name].default else " "
            print(f" {star} {name:<22} {value!r:<34} {declared[name].comment}")


def print_estimate(parameters: dict[str, dict]) -> None:
    """What each notebook is likely to take on this machine."""
    from . import estimate
    from .models import parse_dtype

    source, dtype = next(
        (values["model"], parse_dtype(values.get("dtype", "auto")))
        for values in parameters.values()
        if "model" in values
    )
    shape = estimate.shape_of(source)
    if shape is None:
        print(
            f"\nNo estimate of hours and memory: the size of {source} is not known before it is fetched."
        )
        return
    speed = estimate.machine_speed(dtype)
    print(
        f"\nEstimate, good to a factor of two, for {source} ({shape.weights / 1e6:,.0f} million weights, {str(dtype).removeprefix('torch.')}) "
        f"on this machine: {speed / 1e12:.2f} TFLOP/s measured for one notebook"
    )
    print(f"  {'':<28}{'hours':>9}{'memory GB':>11}{'disk GB':>9}")
    total = 0.0
    for stage, work in estimate.works(parameters).items():
        values = parameters[stage]
        total += (hours := estimate.hours(work, shape, speed))
        kept = estimate.gradient_bytes(work, values, shape)
        print(
            f"  {stage:<28}{hours:>9.2f}{estimate.memory(stage, values, shape, dtype.itemsize) / 1e9:>11.1f}{kept / 1e9:>9.1f}"
        )
    print(f"  {'notebook hours in all':<28}{total:>9.2f}")


def run_stage(stage: str, run: str, parameters: dict[str, dict]) -> int:
    """Execute one notebook; move it into place only when every cell ran."""
    if stage not in parameters:
        raise StudyError(f"no notebook {stage!r}; there are {', '.join(stages())}")
    import logging

    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = build_root(run) / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    done, failed, aside = (
        folder / f"{stage}.ipynb",
        folder / f"{stage}.failed.ipynb",
        folder / f".{stage}.part.ipynb",
    )
    environment = kernel_environment(parameters[stage], aside.with_suffix(".progress"))
    started = time.monotonic()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a stopped job ends like Ctrl-C, cleanly
    print(f"{stage}: running", flush=True)
    reason, code = None, 1
    try:
        with _Follow(stage, Path(environment["RLHF_TRUST_PROGRESS"])), _environment(environment):
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{stage}.ipynb"),
                str(aside),
                parameters=parameters[stage],
                kernel_name="python3",
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                extra_arguments=["--IPKernelApp.log_level=40"],
            )
        nbformat.write(publishable(nbformat.read(aside, as_version=4)), aside)
    except PapermillExecutionError as error:
        lines = str(error.evalue).strip().splitlines() or ["no message"]
        reason = lines[0] if error.ename == "StudyError" else f"{error.ename}: {lines[0]}"
    except DeadKernelError:
        reason = (
            "the kernel died (out of memory?); close other programs or lower the sizes in params/"
        )
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    except RuntimeError as error:  # such as a kernel that does not answer in time
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    except OSError as error:
        reason = f"{error.strerror or error}: {error.filename or folder}"
    if reason is None:
        os.replace(aside, done)
        failed.unlink(missing_ok=True)
        print(f"{stage}: done in {time.monotonic() - started:.0f} s", flush=True)
        return 0
    done.unlink(missing_ok=True)
    where = ""
    if whole(aside):
        os.replace(aside, failed)
        where = f" (see {os.path.relpath(failed)})"
    aside.unlink(missing_ok=True)
    print(
        f"error: {stage}: {reason}{where}; `make reproduce` carries on from here",
        file=sys.stderr,
        flush=True,
    )
    return code


def whole(path: Path) -> bool:
    """Was the notebook written to its end? On a full disk it may not be, and half of one helps nobody."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def kernel_environment(values: dict, progress: Path) -> dict[str, str]:
    """What a stage's kernel runs with: no network unless a parameter names the hub."""
    online = any(str(value).startswith("hub:") for value in values.values())
    return {"RLHF_TRUST_PROGRESS": str(progress)} | ({} if online else {"HF_HUB_OFFLINE": "1"})


class _environment:
    """Sets environment variables for a while (the kernel inherits them)."""

    def __init__(self, values: dict[str, str]):
        self.values = values

    def __enter__(self):
        self.before = {name: os.environ.get(name) for name in self.values}
        os.environ.update(self.values)

    def __exit__(self, *_):
        for name, value in self.before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


class _Follow:
    """Shows on the terminal what the kernel's progress bars write to a file (see ``progress``)."""

    def __init__(self, stage: str, path: Path, every: float = 10.0):
        self.stage, self.path, self.every, self.stop = stage, path, every, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self):
        self.path.unlink(missing_ok=True)
        self.thread.start()

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.path.unlink(missing_ok=True)

    def _run(self):
        """The latest state of the bar, a line every few seconds: stages may run side by side on one terminal."""
        shown, latest = "", ""
        while not self.stop.wait(self.every):
            if self.path.exists():
                with self.path.open("rb") as handle:
                    handle.seek(max(0, self.path.stat().st_size - 400))
                    states = [
                        line
                        for line in re.split(r"[\r\n]+", handle.read().decode(errors="replace"))
                        if line.strip()
                    ]
                latest = states[-1].strip() if states else shown
            if latest != shown:
                print(f"{self.stage}: {latest}", file=sys.stderr, flush=True)
                shown = latest


def publishable(notebook):
    """Remove what only this run on this machine knows: paths, widget state, per-cell times."""
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                o
                for o in cell.outputs
                if "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
            ]
    return notebook


if __name__ == "__main__":
    if sys.argv[1:2] == ["params"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `make params | head` ends without a word
    sys.exit(main())
