"""Files that stages pass to each other: where they are, written atomically, with a manifest.

Stages share files, never memory: adapters (safetensors), generations (JSONL) and tidy tables (CSV)
under ``build/<profile>/``. Each file is written to a temporary name, brought to the disk and moved
into place when complete, so an interrupted stage leaves nothing that could be mistaken for a
result. A stage's manifest has the sha256 of all that it wrote, and :func:`checked` holds a file
against it before another stage reads it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path

import pandas as pd
import psutil
from tqdm.auto import tqdm
from tqdm.std import tqdm as terminal_bar

from . import ROOT, StudyError, build_root, require

PACKAGES = (
    "torch transformers trl peft datasets accelerate numpy pandas scikit-learn alt-profanity-check"
).split()
"""The packages whose versions a manifest records."""

CHANGE = "change ci_low ci_high p p_holm min_detectable"
"""A change's columns, with its interval and its test."""
OVER_SEEDS = "n seeds seed_sd worse compared validity_change validity_low validity_high"
"""Further ones, of a change over items and seeds."""

TABLES = {
    table: columns.split()
    for table, columns in {
        "trust": "model vertical metric condition value ci_low ci_high n seed",
        "trust_change": f"model baseline vertical metric condition {CHANGE} n seed",
        "distance": "model text loss ci_low ci_high perplexity n",
        "training": "stage step metric value",
        "attribution": "stage vertical solver loss example_id source influence normalised z",
        "attribution_summary": (
            "stage vertical solver loss contribution standardised ci_low ci_high p_null n"
        ),
        "reward_models": "golden learner pairs beta amount seed metric value",
        "rm_bench": "model domain level value ci_low ci_high n",
        "grounding": "model judge metric value ci_low ci_high n seed",
        "grounding_change": f"model baseline judge metric {CHANGE} n seed",
        "lineage": "suspect derived measure value ci_low ci_high p shuffled twins verdict n",
        "lineage_separation": "measure auc derived unrelated n_derived n_unrelated",
        "validation": "test target solver value ci_low ci_high p n",
        "mitigation": f"target action selection share pairs vertical {CHANGE} draws n seed",
        "arms": "stage arm seed kl alpha kl_stereotype kl_ethics",
        "headline": (f"stage vertical baseline {CHANGE} {OVER_SEEDS} kl alpha"),
        "validity": "model vertical metric condition value ci_low ci_high chance valid n",
        "dose": "subset amount arm seed kl alpha vertical metric value n",
        "dose_change": (
            f"subset amount vertical arm baseline {CHANGE} {OVER_SEEDS} kl alpha measurable"
        ),
        "dose_trend": (f"subset contrast vertical {CHANGE} {OVER_SEEDS} clear_from measurable"),
        "frontier": "method judge seed share kl score tokens ended n",
        "winrate": (
            "judge measure model baseline value ci_low ci_high p p_holm ties longer n seeds"
        ),
        "checks": "stage check holds value ci_low ci_high n sentence",
    }.items()
}
"""The tables of the study and their columns.

``checks``: did each training stage do its job? ``distance``: loss of each kind of text under each
model. ``validation``: do influence scores predict retraining? ``mitigation``: effect of removing,
flipping or down-weighting the pairs called harmful, against random ones. ``reward_models``: how
well rewards learnt on embeddings rank answers. ``rm_bench``: RM-Bench. ``grounding``: Trust-Score
and its parts by one entailment judge, and ``grounding_change`` what training did to them.
``lineage``: similarity of each model to start (``derived`` is empty where its origin is unknown),
and ``lineage_separation`` how well each measure separates derived from unrelated models. ``arms``:
how far each training of a stage, true or placebo, moved from SFT, and how far it was brought back
(alpha); ``kl_<vertical>``: on the documents that the vertical reads. ``headline``: what each stage
changed against start and against its placebo, over items and seeds (SFT against start alone), and
``validity`` whether the vertical's instrument measures anything on each model. ``dose``: every
arm's headlines by amount and set of pairs; ``dose_change`` what an amount changed, ``dose_trend``
how changes grow with it. ``frontier``: score by a reward model against KL to SFT, along each
method's way from SFT, and ``winrate`` how often one method's answers are preferred to another's.
"""


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

    def table(self, name: str) -> Path:
        return self.path("tables", f"{name}.csv")

    @property
    def remedy(self) -> str:
        """What mends a product of this run."""
        found = re.fullmatch(r"(.+)-seed(\d+)", self.profile)
        profile, seed = found.groups() if found else (self.profile, "")
        command = f"make reproduce PROFILE={profile}{f' SEED={seed}' if seed else ''}"
        return f"`{command}`, with the run's other options, makes it again"


WRITTEN: dict[Path, str] = {}
READ: dict[str, str] = {}
SOURCES: dict[str, str] = {}
"""What this process has written (file → sha256) since its last manifest; and since it began one the
products and models that it read (name → hash), and the files of data that it looked for (path →
:func:`state_of`)."""


def file_sha256(path: Path | str) -> str:
    """A file's sha256, as ``sha256sum`` gives it; empty if it is missing or cannot be read."""
    with suppress(OSError), Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
    return ""


LARGE = 1 << 24
"""Bytes above which a source is known by its size and time, not by what is in it."""


def state_of(path: Path) -> str:
    """Stands for a file of data, or for the names of a folder's; empty if there is none."""
    if path.is_dir():
        inside = (p for p in path.rglob("[!.]*") if p.is_file())
        return content_key(sorted(str(p.relative_to(path)) for p in inside))
    if not path.is_file():
        return ""
    size, changed = path.stat().st_size, path.stat().st_mtime_ns
    return file_sha256(path) if size <= LARGE else f"{size} bytes, {changed}"


def note_source(path: Path) -> None:
    """Note a file or folder of data as looked for, by its path from the checkout on."""
    path = path.absolute()
    SOURCES[str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)] = state_of(path)


@cache
def code_hash(*modules: str) -> str:
    """Of the code of these modules of the library (``align.ppo``), without comments and layout:
    other code may make other results."""
    files = (ROOT.joinpath("lib", __package__, *name.split(".")) for name in modules)
    files = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files)
    return content_key([ast.dump(ast.parse(f.read_bytes())) for f in files if f.is_file()])


def loaded_code() -> dict[str, str]:
    """The library's modules that are loaded → their hash when this was first asked."""
    names = [name for name in sorted(sys.modules) if name.partition(".")[0] == __package__]
    return {name: code_hash(name.partition(".")[2]) for name in names}


def file_hash(path: Path) -> str:
    """:func:`sha256_of` a file, which is read once as long as its size and time stay."""
    found = path.stat()
    return _hash_of_state(path, found.st_size, found.st_mtime_ns)


@cache
def _hash_of_state(path: Path, size: int, changed: int) -> str:
    return sha256_of(path)


def sha256_of(path: Path | str, length: int = 64) -> str:
    """Hex digest of a file's bytes, or of a folder's files (names and bytes, in order).

    A folder's ``manifest.json`` is left out, since it contains the time the stage took.
    """
    path, digest = Path(path), hashlib.sha256()
    inside = (p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json")
    files = [path] if path.is_file() else sorted(inside)
    require(files, f"{path}: no files to read")
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:length]


def content_key(*parts: object) -> str:
    """A short hash of anything JSON can represent: the key of a cached result."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


class ResultCache(dict):
    """Results of a long computation by key, one line each in a JSONL file, so that a run can be
    resumed.

    The file's name stands for what its results share (weights, settings), a row's ``key`` for its
    item. Each line begins with the hash of its rest: one that was changed is passed over, so that
    its item runs again. With ``RLHF_TRUST_CACHE=off`` the file is started anew.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get("RLHF_TRUST_CACHE") == "off":
            self.path.unlink(missing_ok=True)
        super().__init__((row["key"], row) for row in _complete_lines(self.path))

    def add(self, key: str, **row: object) -> None:
        """Store the result for ``key``; it is on disk when this returns."""
        self[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_hashed(json.dumps(self[key], ensure_ascii=False)) + "\n")


def _hashed(line: str) -> str:
    """A line of JSON with the hash of what it holds put in front."""
    return f'{{"sha256": "{hashlib.sha256(line.encode()).hexdigest()[:16]}", {line[1:]}'


def _complete_lines(path: Path) -> list[dict]:
    """Rows of a JSONL file. An incomplete last line is removed from the file; a line that cannot be
    read (zeros, after a crash of the machine) or has not its hash is passed over. Lines of earlier
    versions have none, and begin with their key."""
    if not path.exists():
        return []
    data = path.read_bytes()  # the cut may be inside a character
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    rows = []
    for line in whole.split(b"\n"):
        with suppress(ValueError):
            text = line.decode()
            plain = "{" + text[31:]
            if _hashed(plain) == text or (plain := text).startswith('{"key": '):
                rows.append(json.loads(plain))
    return rows


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Write a file or folder to a temporary path; move it into place if the block raises no error.

    Yields the temporary path (its parent exists; make the folder yourself). On an error the
    temporary is removed and ``path`` stays as it was. For one writer at a time: a file is swapped
    in one step, a folder in two, so a folder that other processes use needs a lock. What was moved
    is noted for the stage's manifest.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(aside)
    try:
        yield aside
        move(aside, path)
        note_written(path)
    finally:
        _remove(aside)


def move(aside: Path, path: Path) -> None:
    """Move a file or folder into place, in the place of another, and bring both to the
    disk: first what it holds, then its name. After a power cut it is there whole or not at all."""
    for inside in aside.rglob("*"):
        _to_disk(inside)
    _to_disk(aside)
    if aside.is_dir() and path.is_dir():
        _remove(path)
    os.replace(aside, path)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # which some file systems do not sync
            raise
    finally:
        os.close(handle)


def note_written(path: Path) -> None:
    """Note a file, or a folder's files, as this stage's."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            WRITTEN[file.absolute()] = file_sha256(file)


def remove_left_over(folder: Path) -> None:
    """Remove what :func:`atomic_write` was at when its process was killed."""
    for path in folder.rglob(".*.part"):
        number = path.name.split(".")[-2]
        if number.isdecimal() and not psutil.pid_exists(int(number)):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def write_text(path: Path | str, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_table(build: Build, table: str, part: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Write one stage's rows to ``tables/parts/<table>.<part>.csv`` and return them as written.

    Columns must be among those of ``TABLES``; missing ones (``p_holm``, which needs all parts) are
    left empty. Floats are rounded to 6 significant digits, so that equal runs give equal bytes.
    """
    unknown = sorted(set(frame.columns) - set(TABLES[table]))
    require(not unknown, f"table {table}: unknown columns {unknown}; known are {TABLES[table]}")
    path = build.path("tables", "parts", f"{table}.{part}.csv")
    _write_csv(path, table, frame)
    return pd.read_csv(path)


def _write_csv(path: Path, table: str, frame: pd.DataFrame) -> None:
    with atomic_write(path) as aside:
        frame.reindex(columns=TABLES[table]).to_csv(aside, index=False, float_format="%.6g")


def merge_tables(
    build: Build,
    table: str,
    required: bool = True,
    finish: Callable[[pd.DataFrame], pd.DataFrame] | None = None,
) -> pd.DataFrame:
    """Join a table's parts in the order of their names and write ``tables/<table>.csv``.

    Only those that a stage has written, and as it wrote them: any other file there (a copy, an
    earlier run's) is named on standard error and left out. Without parts: an error, or an empty
    table if not ``required``. ``finish`` adds what needs all parts, such as a correction for
    multiple tests.
    """
    folder = build.path("tables", "parts")
    parts = sorted({*folder.glob(f"{table}.*.csv")} - warn_of_strays(build))
    if not parts:
        build.table(table).unlink(missing_ok=True)
        require(not required, f"{folder}: no parts of {table}; run `make reproduce` first")
        return pd.DataFrame(columns=TABLES[table])
    frames = [frame for path in parts if len(frame := read_csv_table(checked(path), table))]
    merged = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=TABLES[table])
    merged = finish(merged) if finish else merged
    _write_csv(build.table(table), table, merged)
    return merged


def read_csv_table(path: Path, table: str) -> pd.DataFrame:
    """A file of a table's rows; a :class:`StudyError` if it is not that."""
    try:
        frame = pd.read_csv(path)
        # The further ones were added over time, and a run may be older.
        missing = [name for name in TABLES[table][:3] if name not in frame]
        problem = missing and f"has no column {missing[0]!r}"
    except ValueError as error:  # empty, no CSV, or not UTF-8
        problem = f"is no table ({error})"
    require(not problem, f"{path}: {problem}; remove it and run its notebook again")
    return frame


def read_table(build: Build, table: str, required: bool = True) -> pd.DataFrame:
    """A merged table; if it is missing, an error, or an empty table if not ``required``."""
    path = build.table(table)
    if checked(path).exists():
        return read_csv_table(path, table)
    if required:
        raise StudyError(f"{path}: no such file; run `make report PROFILE={build.profile}` first")
    return pd.DataFrame(columns=TABLES[table])


def versions() -> dict[str, str]:
    """Python's and the main packages' versions, for manifests and the report."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version()} | packages


NOTES: list[str] = []
"""What this chapter does because something that may be there is missing, for its manifest."""


def note(sentence: str) -> None:
    """Say that something is done in another way than one might believe: here, in the manifest, on
    the launcher's terminal and in the report."""
    if sentence not in NOTES:
        NOTES.append(sentence)
        print(f"note: {sentence}")


@dataclass
class Manifest:
    """How a stage's files were made: hashes of its inputs, parameters, facts, versions, seconds.

    Create it at the head of a notebook, ``write`` it at the end. It lists every file that the stage
    wrote (``outputs``, by their path in the build folder, with their sha256), and what it read:
    products and models (``inputs``), files of data (``sources``) and the library's ``code``.
    """

    build: Build
    stage: str
    parameters: dict
    inputs: dict[str, str] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        READ.clear()
        SOURCES.clear()
        loaded_code()

    def write(self) -> None:
        folders = [self.build.root / folder for folder in PRODUCTS]
        outputs = {
            path.relative_to(self.build.root).as_posix(): digest
            for path, digest in WRITTEN.items()
            if path.is_file() and any(map(path.is_relative_to, folders))
        }
        record = {
            "stage": self.stage,
            "parameters": self.parameters,
            "inputs": READ | self.inputs,
            "sources": SOURCES,
            "code": loaded_code(),
            "outputs": outputs,
            "facts": self.facts | ({"notes": NOTES} if NOTES else {}),
            "versions": versions(),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        write_record(self.build.path("manifests", f"{self.stage}.json"), record)
        WRITTEN.clear()


PRODUCTS = "models", "tables", "figures", "generations"
"""Folders of a build whose files stages write for each other, or for a reader."""


def write_record(path: Path, record: dict) -> None:
    """Write a JSON file that holds its own hash, for :func:`read_record`."""
    record = json.loads(json.dumps(record, sort_keys=True))
    write_text(path, json.dumps({"sha256": content_key(record)} | record, indent=1))


def read_record(path: Path) -> dict:
    """What :func:`write_record` wrote; a ValueError if it was changed since. (Those of earlier
    versions have no hash.)"""
    record = json.loads(path.read_text(encoding="utf-8"))
    said = record.pop("sha256", None) if isinstance(record, dict) else ""
    if said not in (None, content_key(record)):
        raise ValueError("it was changed since it was written")
    return record


def read_manifests(build: Build) -> dict[str, dict]:
    """All stages' manifests, by stage name in reading order. Copies under another name are none."""
    found = {}
    for path in sorted((build.root / "manifests").glob("*.json")):
        try:
            manifest = read_record(path)
        except (OSError, ValueError) as error:
            raise StudyError(f"{path}: is damaged ({error}); {build.remedy}") from None
        if manifest.get("stage", path.stem) == path.stem:
            found[path.stem] = manifest
    return found


def changed_files(build: Build, manifest: dict, inside: str = "") -> list[Path]:
    """A stage's files that are missing, or not as it wrote them; of a file or folder ``inside`` the
    build, or of all."""
    outputs = manifest.get("outputs", {})
    paths = {build.root / name: digest for name, digest in outputs.items()}
    return [
        path
        for path, digest in paths.items()
        if path.is_relative_to(build.root / inside) and path not in WRITTEN
        if file_sha256(path) != digest
    ]


def checked(path: Path) -> Path:
    """A file or folder that is about to be read, noted as an input of this stage.

    Raises :class:`StudyError` if it is not as the stage that made it left it. What no manifest
    lists, or this process wrote, passes."""
    path = Path(path).absolute()
    owners = (Build(root.name) for root in path.parents if (root / "manifests").is_dir())
    build = next((owner for owner in owners if path.is_relative_to(owner.root)), None)
    if build is None or any(own.is_relative_to(path) for own in WRITTEN):
        return path
    name = path.relative_to(build.root).as_posix()
    for stage, manifest in read_manifests(build).items():
        for file in changed_files(build, manifest, name):
            problem = f"not as {stage} wrote it" if file.exists() else "missing"
            raise StudyError(f"{file}: {problem}; {build.remedy}")
    if path.exists():
        READ[name] = sha256_of(path, 16) if path.is_dir() else file_sha256(path)
    return path


def warn_of_strays(build: Build) -> set[Path]:
    """Files among the tables' parts that no stage has written, each named on standard error."""
    outputs = (made.get("outputs", {}) for made in read_manifests(build).values())
    known = {build.root / name for some in outputs for name in some}.union(WRITTEN)
    strays = {*(build.root / "tables" / "parts").glob("[!.]*")} - known
    for path in sorted(strays):
        print(f"warning: {path}: left out, as no stage that ended wrote it", file=sys.stderr)
    return strays


def progress(
    items: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "it"
):
    """A tqdm bar: in the notebook, on a terminal, or in the file ``RLHF_TRUST_PROGRESS``.

    The launcher sets that variable and shows the file on its terminal, so that no bar ends up in
    the notebook's outputs.
    """
    shown = {"desc": desc, "total": total, "unit": unit, "leave": False}
    if path := os.environ.get("RLHF_TRUST_PROGRESS"):
        return terminal_bar(items, mininterval=2.0, ncols=88, ascii=True, file=_Sink(path), **shown)
    # None: not where standard error is a file.
    return tqdm(items, disable=None, **shown)


class _Sink:
    """Appends to a file, opened for each write so that nothing is buffered or left open."""

    def __init__(self, path: str):
        self.path = path

    def write(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(text)
