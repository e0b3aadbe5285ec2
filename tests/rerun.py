"""Run the rendered notebooks of a profile again, cell by cell, in an empty build folder: ``python
tests/rerun.py smoke``.

nbval compares every cell's output with the rendered one; afterwards the two runs' tables must be
equal byte for byte. Training, sampling (10), attribution and retraining read nothing that the first
run kept: this tests the computation, not the cache. The other chapters find the first run's answers
under the weights' hash, so a model that came out differently has to answer again.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from rlhf_trust import ROOT

COMPUTED = ("01", "02", "03", "04", "05", "10", "20", "21", "22", "23")
"""Notebooks that read no answers of the first run."""

# Notebooks with the same letter do not need each other and run side by side, as under make.
WAVES = {
    "01": "a",
    "02": "a",
    "03": "b",
    "04": "b",
    "05": "b",
    "1": "c",
    "2": "d",
    "3": "d",
    "4": "d",
    "5": "e",
    "6": "e",
    "90": "f",
}


def wave(notebook: Path) -> str:
    return WAVES.get(notebook.name[:2]) or WAVES[notebook.name[:1]]


def nbval(notebook: Path, environment: dict[str, str]) -> int:
    """Run one notebook under nbval; prints what pytest said and returns its exit code."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-cell-timeout",
        "1800",
        "--nbval-sanitize-with",
        str(ROOT / "tests" / "nbval_sanitize.cfg"),
        "-q",
        "--rootdir",
        str(ROOT),
        "-p",
        "no:cacheprovider",
        str(notebook),
    ]
    if notebook.name.startswith(COMPUTED):
        environment = environment | {"RLHF_TRUST_CACHE": "off"}
    finished = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = finished.stdout if finished.returncode else finished.stdout.strip().splitlines()[-1]
    print(f"{notebook.stem}: {said}", flush=True)
    return finished.returncode


def main(profile: str, jobs: int = 2) -> int:
    first, second = ROOT / "build" / profile, ROOT / "build" / f"{profile}-again"
    shutil.rmtree(second, ignore_errors=True)
    kept = "generations", "cache"
    shutil.copytree(first.joinpath(*kept), second.joinpath(*kept))
    environment = os.environ | {
        "RLHF_TRUST_BUILD": str(second),
        "HF_HUB_OFFLINE": "1",
        "RLHF_TRUST_PROGRESS": os.devnull,
    }
    notebooks = sorted(
        p
        for p in (first / "notebooks").glob("[0-9][0-9]-*.ipynb")
        if not p.name.endswith(".failed.ipynb")
    )
    if not notebooks:
        folder = first / "notebooks"
        print(f"error: {folder}: no notebooks; run `make reproduce` first", file=sys.stderr)
        return 2
    for _, together in groupby(notebooks, key=wave):
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(lambda notebook: nbval(notebook, environment), together))
        if any(codes):
            return max(codes)
    tables = sorted((first / "tables").glob("*.csv"))
    different = [
        p.name for p in tables if not filecmp.cmp(p, second / "tables" / p.name, shallow=False)
    ]
    if different:
        print(f"error: two runs with one seed differ in {', '.join(different)}", file=sys.stderr)
        return 1
    print(f"{len(tables)} tables of two runs are equal byte for byte")
    shutil.rmtree(second)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
