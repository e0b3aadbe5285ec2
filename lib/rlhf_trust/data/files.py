"""Where data come from: the set shipped with this package, a directory of the user's, or their authors' pages."""

from __future__ import annotations

import csv
import gzip
import io
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from .. import ROOT, StudyError
from ..artifacts import replacing

SHIPPED = Path(__file__).parent / "shipped"

HH = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
DECODING_TRUST = "https://raw.githubusercontent.com/AI-secure/DecodingTrust/161ae8321ced62f45fcd9ceb412e05b47c603cd4/data"
RM_BENCH = "https://raw.githubusercontent.com/THU-KEG/RM-Bench/main/data"
TRUST_SCORE = "https://huggingface.co/datasets/declare-lab/Trust-Data/resolve/main/Trust-Score"
BBQ = "https://raw.githubusercontent.com/nyu-mll/BBQ/main/data"

HUB_FILES = {
    # path in a data directory -> where its authors keep it
    "hh-rlhf/harmless-base.train.jsonl.gz": f"{HH}/harmless-base/train.jsonl.gz",
    "hh-rlhf/harmless-base.test.jsonl.gz": f"{HH}/harmless-base/test.jsonl.gz",
    "hh-rlhf/helpful-base.train.jsonl.gz": f"{HH}/helpful-base/train.jsonl.gz",
    "hh-rlhf/helpful-base.test.jsonl.gz": f"{HH}/helpful-base/test.jsonl.gz",
    "real-toxicity-prompts/toxic.jsonl": f"{DECODING_TRUST}/toxicity/user_prompts/toxic.jsonl",
    "real-toxicity-prompts/nontoxic.jsonl": f"{DECODING_TRUST}/toxicity/user_prompts/nontoxic.jsonl",
    "decodingtrust-stereotype/user_prompts.csv": f"{DECODING_TRUST}/stereotype/dataset/user_prompts.csv",
    "ethics/cm_test.csv": f"{DECODING_TRUST}/machine_ethics/ethics/commonsense/cm_test.csv",
    "truthfulqa/mc_task.json": "https://raw.githubusercontent.com/sylinrl/TruthfulQA/main/data/mc_task.json",
    "enron/name2email.json": f"{DECODING_TRUST}/privacy/enron_data/name2email.json",
    **{f"rm-bench/{name}_filtered.json": f"{RM_BENCH}/{name}_filtered.json"
       for name in ("chat", "math", "code", "safety-refuse", "safety-response")},
    "reef/truthfulqa.csv": "https://raw.githubusercontent.com/tmylla/REEF/7498ff2012eb5f53f337f23f51599ac88f468f77/src/datasets/truthfulqa.csv",
    **{f"trust-score/{name}_eval_top100_calibrated.json": f"{TRUST_SCORE}/{name}_eval_top100_calibrated.json"
       for name in ("asqa", "qampari", "eli5", "expertqa")},
    "bbq/Age.jsonl": f"{BBQ}/Age.jsonl",
    "bbq/Disability_status.jsonl": f"{BBQ}/Disability_status.jsonl",
    "bbq/Physical_appearance.jsonl": f"{BBQ}/Physical_appearance.jsonl",
}
"""What ``hub:`` fetches, once, into ``build/data``. A file that moved can be put into a directory by hand."""

DOWNLOADS = ROOT / "build" / "data"


def locate(source: str, name: str, required: bool = True) -> Path | None:
    """Find the file ``name`` of a data source.

    Parameters
    ----------
    source
        ``shipped``, ``path:<directory>`` or ``hub:`` (the sets of ``HUB_FILES``).
    name
        Path inside a data directory, such as ``ethics/cm_test.csv``; ``.gz`` beside it is found as well, and HH-RLHF's
        own layout (``harmless-base/test.jsonl.gz``).
    required
        Raise when missing instead of returning ``None``.
    """
    if source == "shipped":
        found = _first_existing(SHIPPED, name)
    elif source.startswith("path:"):
        root = Path(source.removeprefix("path:")).expanduser()
        if not root.is_dir():
            raise StudyError(f"data source {source}: no such directory")
        found = _first_existing(root, name)
    elif source.startswith("hub:"):
        return _from_hub(name, required)
    else:
        raise StudyError(f"data source {source!r}: must be shipped, path:<directory> or hub:")
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


def _from_hub(name: str, required: bool) -> Path | None:
    """Fetch a file once; what was fetched is an ordinary data directory, ``build/data``."""
    found = _first_existing(DOWNLOADS, name)
    if found:
        return found
    stored = next((key for key in (name, f"{name}.gz") if key in HUB_FILES), None)
    if stored is None:
        if required:
            raise StudyError(f"data source hub: {name} is not known there; use path:<directory>")
        return None
    try:
        with urllib.request.urlopen(HUB_FILES[stored], timeout=60) as response, replacing(DOWNLOADS / stored) as aside:
            aside.write_bytes(response.read())
    except OSError as error:  # URLError and timeouts among them
        raise StudyError(f"data source hub: {HUB_FILES[stored]} cannot be had ({error}); check the network, or put the "
                         f"file into a directory as {name} and use path:<directory>") from None
    return DOWNLOADS / stored


def read_text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode("utf-8")
        return path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read ({error}); fetch it again") from None


def read_json(path: Path):
    """What a JSON file holds; one that is not valid is an error that names the line."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise StudyError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of every line; a line that is no JSON object is an error that names it."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise StudyError(f"{path}:{number}: not valid JSON ({error.msg}, column {error.colno}); mend or remove "
                             "the line") from None
        if not isinstance(row, dict):
            raise StudyError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and row of every CSV row; missing columns or cells are errors that name the place."""
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
