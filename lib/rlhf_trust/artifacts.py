"""Files that stages pass to each other: where they lie, written whole or not at all, with a manifest.

A stage never hands memory to the next one. It writes adapters (safetensors), generations (JSONL) and tidy
tables (CSV) under ``build/<profile>/``, each to a temporary name first and moved into place when complete, so
that an interrupted stage leaves nothing that the next one could mistake for a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm as notebook_bar
from tqdm.std import tqdm as terminal_bar

from . import StudyError, build_root

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "pandas",
    "scikit-learn",
    "alt-profanity-check",
)
"""The packages whose versions a manifest records."""

TABLES = {
    "trust": [
        "model",
        "vertical",
        "metric",
        "condition",
        "value",
        "ci_low",
        "ci_high",
        "n",
        "seed",
    ],
    "trust_change": [
        "model",
        "baseline",
        "vertical",
        "metric",
        "condition",
        "change",
        "ci_low",
        "ci_high",
        "p",
        "p_holm",
        "min_detectable",
        "n",
        "seed",
    ],
    "distance": ["model", "text", "loss", "ci_low", "ci_high", "perplexity", "n"],
    "training": ["stage", "step", "metric", "value"],
    "attribution": [
        "stage",
        "vertical",
        "solver",
        "loss",
        "example_id",
        "source",
        "influence",
        "normalised",
        "z",
    ],
    "attribution_summary": [
        "stage",
        "vertical",
        "solver",
        "loss",
        "contribution",
        "standardised",
        "ci_low",
        "ci_high",
        "p_null",
        "n",
    ],
    "reward_models": ["golden", "learner", "pairs", "beta", "amount", "seed", "metric", "value"],
    "rm_bench": ["model", "domain", "level", "value", "ci_low", "ci_high", "n"],
    "grounding": ["model", "judge", "metric", "value", "ci_low", "ci_high", "n", "seed"],
    "grounding_change": [
        "model",
        "baseline",
        "judge",
        "metric",
        "change",
        "ci_low",
        "ci_high",
        "p",
        "p_holm",
        "min_detectable",
        "n",
        "seed",
    ],
    "lineage": [
        "suspect",
        "derived",
        "measure",
        "value",
        "ci_low",
        "ci_high",
        "p",
        "shuffled",
        "twins",
        "verdict",
        "n",
    ],
    "lineage_separation": ["measure", "auc", "derived", "unrelated", "n_derived", "n_unrelated"],
    "validation": ["test", "target", "solver", "value", "ci_low", "ci_high", "p", "n"],
    "pruning": [
        "target",
        "share",
        "removed",
        "arm",
        "vertical",
        "change",
        "items_low",
        "items_high",
        "p_items",
        "draws_low",
        "draws_high",
        "p_draws",
        "p",
        "p_holm",
        "draws",
        "n",
        "seed",
    ],
    "checks": ["stage", "check", "holds", "value", "ci_low", "ci_high", "n", "sentence"],
}
"""The tables of the study and their columns. ``checks`` says, per training stage, whether it did what it is for;
``distance`` how strange each kind of text is to each model; ``validation`` whether influence scores foretell what
retraining does; ``pruning`` what leaving out the pairs called harmful changed; ``reward_models`` how well rewards learnt on
embeddings order answers; ``rm_bench`` RM-Bench; ``grounding`` Trust-Score and its parts, by one judge of entailment,
``grounding_change`` what training did to them; ``lineage`` how like the start model each model is, ``lineage_separation`` how
well each measure of likeness tells kin from strangers."""


@dataclass(frozen=True)
class Build:
    """One profile's folder of products (:func:`rlhf_trust.build_root`)."""

    profile: str

    @property
    def root(self) -> Path:
        return build_root(self.profile)

    def path(self, *parts: str) -> Path:
        """A path under the build folder, its parent made."""
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def model(self, name: str) -> Path:
        return self.path("models", name)

    def figure(self, name: str) -> Path:
        return self.path("figures", f"{name}.png")

    def table(self, name: str) -> Path:
        return self.path("tables", f"{name}.csv")


def sha256_of(path: Path | str, length: int = 64) -> str:
    """Hex digest of a file's bytes, or of a folder's files (names and bytes, in order; ``manifest.json`` left out,
    since it holds the time the stage took)."""
    path = Path(path)
    digest = hashlib.sha256()
    files = (
        sorted(p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json")
        if path.is_dir()
        else [path]
    )
    if not files:
        raise StudyError(f"{path}: nothing there to read")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:length]


def content_key(*parts: object, length: int = 16) -> str:
    """A short hash of anything JSON can hold: the name under which a cached result is kept."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


class ResultCache:
    """Results of a long computation, one line each in a JSONL file: an interrupted run goes on where it stopped.

    The file's name says what all its results have in common (weights, settings), a row's ``key`` what it is about. With
    ``RLHF_TRUST_CACHE=off`` nothing kept is read.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RLHF_TRUST_CACHE") == "off":
            self.path.unlink(missing_ok=True)
        self._rows = {row["key"]: row for row in _complete_lines(self.path)}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict:
        return self._rows[key]

    def add(self, key: str, **row: object) -> None:
        """Keep what was found for ``key``; written before it returns."""
        self._rows[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(self._rows[key], ensure_ascii=False) + "\n")


def _complete_lines(path: Path) -> list[dict]:
    """Rows of a JSONL file; a last line cut off by an interruption is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()  # the cut may go through a character
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Write a file or folder aside, and move it into place when the block ends without an error.

    Yields the temporary path (its parent exists; for a folder, make it). On any error the temporary is removed and
    what stood at ``path`` before stays as it was. For one writer at a time: a folder that another process reads or
    writes as well needs a lock (a file is swapped in one step, a folder in two).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(aside)
    try:
        yield aside
        if aside.is_dir() and path.is_dir():
            _remove(path)
        os.replace(aside, path)
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write a text file whole or not at all."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_table(build: Build, table: str, part: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Write one stage's rows of a study table to ``tables/parts/<table>.<part>.csv`` and return them as written.

    Columns must be those of the contract (``TABLES``); missing ones that only the merge can know (``p_holm``) are
    left empty. Floats are rounded to 6 significant digits, so that equal runs give equal bytes.
    """
    columns = TABLES[table]
    unknown = sorted(set(frame.columns) - set(columns))
    if unknown:
        raise StudyError(f"table {table}: unknown columns {unknown}; the contract has {columns}")
    frame = frame.reindex(columns=columns)
    path = build.path("tables", "parts", f"{table}.{part}.csv")
    with atomic_write(path) as aside:
        frame.to_csv(aside, index=False, float_format="%.6g")
    return pd.read_csv(path)


def merge_tables(
    build: Build,
    table: str,
    required: bool = True,
    finish: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Join the parts of one table in the order of their names and write ``tables/<table>.csv``; without any part an error, or
    an empty table where none is ``required``.

    ``finish`` adds what only all parts together show, such as a correction for their number.
    """
    parts = sorted(build.path("tables", "parts", "x").parent.glob(f"{table}.*.csv"))
    if not parts:
        if not required:
            build.table(table).unlink(missing_ok=True)
            return pd.DataFrame(columns=TABLES[table])
        raise StudyError(
            f"{build.root / 'tables'}: no parts of {table}; run `make reproduce` first"
        )
    frames = [frame for frame in map(pd.read_csv, parts) if len(frame)]
    merged = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=TABLES[table])
    if finish is not None:
        merged = finish(merged)
    with atomic_write(build.table(table)) as aside:
        merged.reindex(columns=TABLES[table]).to_csv(aside, index=False, float_format="%.6g")
    return merged


def read_table(build: Build, table: str, required: bool = True) -> pd.DataFrame:
    """A merged table; one that is not ``required`` may be missing, and is then empty."""
    path = build.table(table)
    if not path.exists():
        if not required:
            return pd.DataFrame(columns=TABLES[table])
        raise StudyError(f"{path}: not there yet; run `make report PROFILE={build.profile}`")
    return pd.read_csv(path)


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, for manifests and the report."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


@dataclass
class Manifest:
    """What made a stage's products: its inputs' hashes, parameters, seed, versions and seconds.

    Start it at the head of a notebook, ``write`` it at the end.
    """

    build: Build
    stage: str
    parameters: dict
    inputs: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def write(self) -> None:
        record = {
            "stage": self.stage,
            "parameters": self.parameters,
            "inputs": self.inputs,
            "facts": self.facts,
            "versions": versions(),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        write_text(
            self.build.path("manifests", f"{self.stage}.json"),
            json.dumps(record, indent=1, sort_keys=True),
        )


def read_manifests(build: Build) -> dict[str, dict]:
    """All stages' manifests, by stage name in reading order."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((build.root / "manifests").glob("*.json"))
    }


def progress(
    items: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it"
):
    """A tqdm bar. Interactive: in the notebook. Headless: in the file that the launcher set up
    (``RLHF_TRUST_PROGRESS``) and shows on the terminal, so that no bar ends up in the notebook's outputs."""
    path = os.environ.get("RLHF_TRUST_PROGRESS")
    if path:
        return terminal_bar(
            items,
            desc=desc,
            total=total,
            unit=unit,
            leave=False,
            mininterval=2.0,
            ncols=88,
            ascii=True,
            file=_Sink(path),
        )
    if "ipykernel" in sys.modules:
        return notebook_bar(items, desc=desc, total=total, unit=unit, leave=False)
    return terminal_bar(
        items, desc=desc, total=total, unit=unit, leave=False, disable=not sys.stderr.isatty()
    )


class _Sink:
    """Appends to a file, opened anew for each write so that nothing is held back or left open."""

    def __init__(self, path: str):
        self.path = path

    def write(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(text)

    def flush(self) -> None:
        pass
