"""Where preference rows come from: the files or splits of a source, with what their names say.

``shipped``, ``hub:`` (Anthropic's HH-RLHF) and a directory that holds ``hh-rlhf`` have HH-RLHF's
layout. Anything else is a JSONL, JSON, CSV or Parquet file, a directory of such files, one that
``datasets`` saved, or a data set of the hub by its name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .. import StudyError, require
from ..artifacts import file_sha256, note_source
from ..sources import ONLINE, locate, read_csv, read_json, read_jsonl, read_text, refusing
from .forms import HH

SUBSETS = {"harmless": "hh-rlhf/harmless-base", "helpful": "hh-rlhf/helpful-base"}
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "heldout", "holdout"}
TRAIN_WORDS = {"train", "training"}
"""Words in the name of a file or split that say on which side it is."""


@dataclass
class Part:
    """One file, or one split of a data set.

    ``name`` stands in messages, ``prefix`` in the pairs' ids; ``source`` is the group of rows that
    name none; ``side`` is ``train``, ``held_out`` or, if the name says neither, empty. Rows come
    with their number: the line, or the position from 1 where a row has no line.
    """

    name: str
    rows: list[tuple[int, dict]]
    sha256: str
    source: str
    prefix: str = ""
    side: str = ""
    form: str = ""


def sha256(*pieces: bytes) -> str:
    """Hex digest of bytes, one piece after the other."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def side_of(name: str) -> str:
    """The side that a file's or split's name speaks of; empty if it names neither, or both."""
    words = set(re.findall("[a-z]+", name.lower()))
    held_out, train = bool(words & HELD_OUT_WORDS), bool(words & TRAIN_WORDS)
    return "" if held_out == train else "train" if train else "held_out"


def group_of(name: str, default: str) -> str:
    """A file's name without folders, ending, split and number of the shard; ``default`` if nothing
    is left of it."""
    words = "|".join(sorted(HELD_OUT_WORDS | TRAIN_WORDS))
    for piece in reversed(name.split("/")):
        piece = re.sub(r"(\.(jsonl?|csv|parquet|gz))+$|-\d{5}-of-\d{5}.*$", "", piece)
        piece = re.sub(rf"(^|[-_.])({words})(?=[-_.]|$)", "", piece).strip("-_.")
        if piece not in ("", "data"):
            return piece
    return default


def hh_part(path: Path, subset: str) -> Part:
    """A file of HH-RLHF's."""
    rows, split = list(read_jsonl(path)), "train" if "train" in path.name else "test"
    prefix, side = f"{subset}.{split}", side_of(split)
    return Part(path.name, rows, file_sha256(path), subset, prefix, side, HH)


def _json_rows(path: Path) -> Iterable[tuple[int, dict]]:
    """Rows of a JSON file: a list of objects, or JSON lines under that name."""
    if not read_text(path).lstrip().startswith("["):
        return read_jsonl(path)
    rows = list(enumerate(read_json(path), start=1))
    for number, row in rows:
        got = f"expected a JSON object, got {type(row).__name__}"
        require(isinstance(row, dict), f"{path}: item {number}: {got}")
    return rows


def _parquet_rows(path: Path) -> Iterable[tuple[int, dict]]:
    # Not through datasets.load_dataset, which would keep a second copy in its cache.
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    with refusing(f"{path}: cannot be read", "fetch it again", OSError, ValueError, ArrowException):
        return enumerate(read_table(path).to_pylist(), start=1)


# datasets would read JSON and CSV too, but its errors name no line, one value of another type stops
# it, and of a CSV it reads an answer such as "None" as missing.
READERS = {
    ".jsonl": read_jsonl,
    ".json": _json_rows,
    ".csv": lambda path: read_csv(path, ()),
    ".parquet": _parquet_rows,
}


def _reader(path: Path):
    return READERS.get(Path(path.name.removesuffix(".gz")).suffix)


def file_parts(root: Path) -> list[Part]:
    """A file, or all files of a directory that can hold pairs."""
    files = [root]
    if root.is_dir():
        inside = (path for path in root.rglob("*") if _reader(path) and not path.is_dir())
        files = sorted(path for path in inside if not path.name.startswith(("dataset_info", ".")))
    for path in {root, *files}:
        note_source(path)
    if not files or not _reader(files[0]):
        raise StudyError(
            f"{root}: no preference data; needed is a file that ends in {', '.join(READERS)} (or "
            "with .gz), a directory of them or of hh-rlhf, or one that datasets saved"
        )
    parts = []
    for path in files:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        # A directory's own name says nothing of a side.
        group, side = group_of(name, root.name if root.is_dir() else name), side_of(name)
        rows = list(_reader(path)(path))
        require(rows, f"{path}: the file is empty")
        parts.append(Part(name, rows, file_sha256(path), group, side=side))
    return parts


def saved_parts(root: Path) -> list[Part]:
    """The splits of what ``save_to_disk`` of ``datasets`` wrote."""
    import datasets

    # A damaged folder ends in whatever the readers of its JSON and Arrow files trip over.
    with refusing(f"{root}: cannot be read", "save it again", Exception):
        found = datasets.load_from_disk(str(root))
        splits = found if isinstance(found, dict) else {"": found}
        read = {split: list(enumerate(rows, start=1)) for split, rows in splits.items()}
    for path in (root, *root.rglob("*.arrow")):
        note_source(path)
    parts = []
    for split, rows in read.items():
        arrow = sorted((root / split).glob("*.arrow"))
        digest = sha256(*(path.read_bytes() for path in arrow))
        name = f"{root.name}.{split}" if split else root.name
        parts.append(Part(name, rows, digest, root.name, side=side_of(split)))
    return parts


def hub_splits(rest: str):
    """A data set of the hub, ``<owner>/<name>[/<folder>][@<revision>]``, fetched on first use."""
    import datasets

    path, _, revision = rest.partition("@")
    dataset, folder = "/".join(path.split("/")[:2]), "/".join(path.split("/")[2:])
    remedy = f"check its name and revision, {ONLINE}, or use path:<file or directory>"
    kinds = OSError, ValueError, datasets.exceptions.DatasetsError
    with refusing(f"preferences hub:{rest}: cannot be had", remedy, *kinds):
        return datasets.load_dataset(dataset, data_dir=folder or None, revision=revision or None)


def hub_parts(place: str) -> tuple[str, list[Part]]:
    """What a data set of the hub, ``<owner>/<name>[/<folder>][@<revision>][:<splits>]``, is called,
    and its splits. Their hashes are over the rows as JSON."""
    rest, _, wanted = place.partition(":")
    path, found = rest.partition("@")[0], hub_splits(rest)
    splits = list(filter(None, wanted.split(","))) or list(found)
    if unknown := [split for split in splits if split not in found]:
        known = f"no split {unknown[0]!r}; it has {', '.join(found)}"
        raise StudyError(f"preferences hub:{rest}: {known}")
    if len([split for split in splits if side_of(split) == "train"]) > 1:
        raise StudyError(
            f"preferences hub:{rest}: several splits for training; choose among "
            f"{', '.join(found)}, such as hub:{rest}:{splits[0]}"
        )
    parts = []
    for split in splits:
        rows = list(enumerate(found[split], start=1))
        digest = sha256(*(json.dumps(row, sort_keys=True, default=str).encode() for _, row in rows))
        group = path.split("/")[:2][-1]  # without the owner and the folder
        parts.append(Part(f"{path}.{split}", rows, digest, group, side=side_of(split)))
    return place, parts


def hh_parts(source: str) -> list[Part]:
    """HH-RLHF's files: those of the test split are required, of the training split both or none."""
    paths = {}
    for subset, stem in SUBSETS.items():
        paths[subset, "test"] = locate(source, f"{stem}.test.jsonl")
        paths[subset, "train"] = locate(source, f"{stem}.train.jsonl", without="")
    missing = [SUBSETS[subset] for subset in SUBSETS if not paths[subset, "train"]]
    if len(missing) == 1:
        raise StudyError(
            f"preferences {source}: {missing[0]}.train.jsonl (or .gz) is missing, and the other "
            "half is there; add it, or name the files that you mean by path:<file or directory>"
        )
    return [hh_part(path, subset) for (subset, _), path in paths.items() if path]


def find_parts(source: str) -> tuple[str, list[Part]]:
    """What a source (without options) is called in the report, and its parts."""
    kind, _, rest = source.partition(":")
    root = Path(rest).expanduser()
    if source == "shipped":
        return "the shipped pairs", hh_parts(source)
    if source == "hub:":
        return "Anthropic's HH-RLHF pairs", hh_parts(source)
    if kind == "hub":
        return hub_parts(rest)
    if kind != "path" or not rest:
        raise StudyError(
            f"preferences {source!r}: must be shipped, path:<file or directory>, hub: (HH-RLHF) or "
            "hub:<dataset>@<revision>"
        )
    require(root.exists(), f"preferences {source}: no such file or directory")
    if (root / "hh-rlhf").is_dir():
        return "pairs from files in HH-RLHF's layout", hh_parts(source)
    saved = any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return root.resolve().name, saved_parts(root) if saved else file_parts(root)
