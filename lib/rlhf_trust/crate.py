"""A run described for those who find it elsewhere (``make crate``), by files in its folder.

``ro-crate-metadata.json``, from its manifests: RO-Crate 1.1 (https://w3id.org/ro/crate/1.1) with
the profile Process Run Crate 0.5, the files that are there with their sizes and sha256, and each
notebook's run with what it read and wrote. ``croissant.json``: the shipped data, copied to
``data/``, in Croissant 1.0 (http://mlcommons.org/croissant/1.0). ``sbom.cdx.json``: the
environment's packages in CycloneDX 1.6 (https://cyclonedx.org).
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import re
import shutil
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from . import ROOT, __version__, command, require
from .artifacts import Build, atomic_write, file_sha256, read_manifests, write_text
from .sources import SHIPPED, read_json, read_jsonl

CONTEXT = [
    "https://w3id.org/ro/crate/1.1/context",
    "https://w3id.org/ro/terms/workflow-run/context",
]
NAME = "ro-crate-metadata.json"
CRATE, PROFILE = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
LICENCE = "Notebooks: Apache-2.0. Results: as whoever publishes this run states here."
CC_BY, APACHE = (
    "https://creativecommons.org/licenses/by/4.0/",
    "https://www.apache.org/licenses/LICENSE-2.0",
)
APART = "data/truthfulqa/primer.txt"
"""The one shipped file that is under Apache's licence, as it is its authors'."""
DEPOSIT = read_json(ROOT / ".zenodo.json")

CROISSANT = "http://mlcommons.org/croissant/1.0"
TERMS = (
    "citeAs column equivalentProperty extract field fileProperty fileObject fileSet format "
    "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated "
    "replace samplingRate separator source subField transform"
).split()
MEANING = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
} | {term: f"cr:{term}" for term in TERMS}
"""Croissant's ``@context``."""
TYPES = {"int64": "sc:Integer", "float64": "sc:Float", "bool": "sc:Boolean", "str": "sc:Text"}

mimetypes.add_type("application/jsonlines", ".jsonl")


def _kind(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def _published(build: Build) -> str:
    """When the run's last notebook ended."""
    manifests = read_manifests(build)
    require(manifests, f"{build.root}: no such run; run `make reproduce` first")
    return max(_ended(build, stage) for stage in manifests)


def _ended(build: Build, stage: str) -> str:
    ended = (build.root / "manifests" / f"{stage}.json").stat().st_mtime
    return datetime.fromtimestamp(ended, UTC).isoformat(timespec="seconds")


def ro_crate(build: Build) -> dict:
    """The crate of a run: the files that are there, and its notebooks' runs in reading order."""
    published, manifests, root = _published(build), read_manifests(build), build.root
    entities = {}

    def refer(name: str, digest: str, *kinds: str) -> dict[str, str]:
        """Refer to a file of the run, or else to what the run only names (sources, models)."""
        entity = {"@id": f"#{quote(name)}", "@type": "CreativeWork", "name": name, "sha256": digest}
        if (root / name).is_file():
            entity |= {"@id": quote(name), "@type": ["File", *kinds], "encodingFormat": _kind(name)}
            entity["contentSize"] = str((root / name).stat().st_size)
        return {"@id": entities.setdefault(name, entity)["@id"]}

    copies = {}
    for path in _data(root):
        name, digest = path.relative_to(root).as_posix(), file_sha256(path)
        original = SHIPPED / path.relative_to(root / "data")
        copies[original.relative_to(ROOT).as_posix(), digest] = name
        refer(name, digest)
        entities[name]["license"] = {"@id": APACHE if name == APART else CC_BY}
    actions = []
    for stage, made in manifests.items():
        record, notebook = f"manifests/{stage}.json", f"notebooks/{stage}.ipynb"
        read, wrote = made["sources"] | made["inputs"], made["outputs"]
        action = {
            "@id": f"#{stage}",
            "@type": "CreateAction",
            "name": stage,
            "description": json.dumps(made["parameters"], ensure_ascii=False),
            "endTime": _ended(build, stage),
            "instrument": refer(notebook, file_sha256(root / notebook), "SoftwareSourceCode"),
            "object": [refer(copies.get(entry, entry[0]), entry[1]) for entry in read.items()],
            "result": [
                *(refer(*entry) for entry in wrote.items()),
                refer(record, file_sha256(root / record)),
            ],
        }
        actions.append(action)
    for path in sorted(path for kind in ("html", "pdf", "json") for path in root.glob(f"*.{kind}")):
        if path.name != NAME:
            refer(path.name, file_sha256(path))
    dataset = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"More RLHF, more trust? Run {build.profile}",
        "description": "Notebooks, tables and figures of one run of the study, as it made them",
        "datePublished": published,
        "license": {"@id": "#licence"},
        "conformsTo": {"@id": PROFILE},
        "hasPart": [{"@id": e["@id"]} for e in entities.values() if "File" in e["@type"]],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    about = [
        {"@id": NAME, "about": {"@id": "./"}, "conformsTo": {"@id": CRATE}},
        {"@id": PROFILE, "name": "Process Run Crate", "version": "0.5"},
        {"@id": "#licence", "name": "Licence", "description": LICENCE},
        {"@id": CC_BY, "name": "CC BY 4.0"},
        {"@id": APACHE, "name": "Apache-2.0"},
    ]
    about = [{"@type": "CreativeWork"} | entity for entity in about]
    return {"@context": CONTEXT, "@graph": [*about, dataset, *entities.values(), *actions]}


def _data(root: Path) -> list[Path]:
    return [path for path in sorted((root / "data").rglob("*")) if path.is_file()]


def croissant(root: Path, published: str) -> dict:
    """The data in ``root``'s folder ``data`` in Croissant's terms: its files, and their columns
    that hold one number, yes or no, or text a row. ``published``: a date."""
    files, records = [], []
    for path in _data(root):
        name, kind = path.relative_to(root).as_posix(), _kind(path.name)
        about = {"name": name, "contentUrl": name, "encodingFormat": kind}
        about |= {"contentSize": f"{path.stat().st_size} B", "sha256": file_sha256(path)}
        files.append({"@type": "cr:FileObject", "@id": name} | about)
        table, fields = name.removeprefix("data/").rpartition(".")[0], []
        for column, values in _rows(path).items():
            where = {"jsonPath": f"$[*].{column}"} if path.suffix == ".json" else {"column": column}
            source = {"fileObject": {"@id": name}, "extract": where}
            about = {"@id": f"{table}/{column}", "name": column, "source": source}
            fields.append({"@type": "cr:Field", "dataType": TYPES[str(values.dtype)]} | about)
        if fields:
            about = {"@id": table, "name": table, "field": fields}
            records.append({"@type": "cr:RecordSet"} | about)
    creators = [{"@type": "Organization"} | creator for creator in DEPOSIT["creators"]]
    named = ", ".join(creator["name"] for creator in creators)
    return {
        "@context": MEANING,
        "@type": "sc:Dataset",
        "conformsTo": CROISSANT,
        "name": "more-rlhf-more-trust",
        "description": f"The data of: {DEPOSIT['title']}. data/README.md is their datasheet. "
        f"CC BY 4.0, but for {APART}: Apache-2.0.",
        "license": [CC_BY, APACHE],
        "version": __version__,
        "datePublished": published,
        "creator": creators,
        "citeAs": f"{named}: {DEPOSIT['title']}, version {__version__}",
        "isLiveDataset": False,
        "distribution": files,
        "recordSet": records,
    }


def _rows(path: Path) -> pd.DataFrame:
    """A file's rows, where it has any, and those columns that have one of ``TYPES``."""
    rows = pd.DataFrame()
    if path.suffix == ".csv":
        rows = pd.read_csv(path)
    elif path.suffix == ".jsonl":
        rows = pd.DataFrame([row for _, row in read_jsonl(path)])
    elif path.suffix == ".json" and isinstance(listed := read_json(path), list):
        rows = pd.DataFrame(listed).dropna(axis="columns")  # a path finds nothing where none is
    return rows.select_dtypes([*TYPES])


def sbom() -> dict:
    """The packages of this environment with their licences, by their own account, and which needs
    which."""
    found = {_normal(each.metadata["Name"]): each for each in metadata.distributions()}
    parts, needs = [], []
    for name, package in sorted(found.items()):
        about, version = package.metadata, package.version
        part = {"type": "library", "bom-ref": name, "name": name, "version": version}
        part["purl"] = f"pkg:pypi/{name}@{quote(version)}"
        named = [c for c in about.get_all("Classifier", []) if c.startswith("License ::")]
        if expression := about.get("License-Expression"):
            part["licenses"] = [{"expression": expression}]
        elif named:
            part["licenses"] = [{"license": {"name": c.rpartition(" :: ")[2]}} for c in named]
        parts.append(part)
        asked = [each for each in package.requires or [] if "extra" not in each.partition(";")[2]]
        names = {_normal(re.match(r"[\w.-]+", each)[0]) for each in asked}
        needs.append({"ref": name, "dependsOn": sorted(names & {*found})})
    document = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return document | {"components": parts, "dependencies": needs}


def _normal(name: str) -> str:
    """A package's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m rlhf_trust.crate", description="Describe a run.")
    parser.add_argument("run", help="the name of its folder in build/")
    build = Build(parser.parse_args(argv).run)
    published = _published(build)
    with atomic_write(build.path("data")) as aside:
        shutil.copytree(SHIPPED, aside)
    _write(build.root / "croissant.json", croissant(build.root, published))
    _write(build.root / "sbom.cdx.json", sbom())
    _write(build.root / NAME, ro_crate(build))
    return 0


def _write(path: Path, document: dict) -> None:
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
