"""A run as an RO-Crate, ``ro-crate-metadata.json`` in its folder, from its manifests (``make
crate``).

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1) with the profile Process Run Crate 0.5: the files that
are there with their sizes and sha256, and each notebook's run with what it read and wrote.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import sys
from datetime import UTC, datetime
from urllib.parse import quote

from . import command, require
from .artifacts import Build, file_sha256, read_manifests, write_text

CONTEXT = [
    "https://w3id.org/ro/crate/1.1/context",
    "https://w3id.org/ro/terms/workflow-run/context",
]
CRATE, PROFILE = "https://w3id.org/ro/crate/1.1", "https://w3id.org/ro/wfrun/process/0.5"
LICENCE = "Notebooks: Apache-2.0. Results: as whoever publishes this run states here."


def ro_crate(build: Build) -> dict:
    """The crate of a run: the files that are there, and its notebooks' runs in reading order."""
    manifests, root = read_manifests(build), build.root
    require(manifests, f"{root}: no such run; run `make reproduce` first")
    entities = {}

    def refer(name: str, digest: str, *kinds: str) -> dict[str, str]:
        """Refer to a file of the run, or else to what the run only names (sources, models)."""
        entity = {"@id": f"#{quote(name)}", "@type": "CreativeWork", "name": name, "sha256": digest}
        if (root / name).is_file():
            kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
            entity |= {"@id": quote(name), "@type": ["File", *kinds], "encodingFormat": kind}
            entity["contentSize"] = str((root / name).stat().st_size)
        return {"@id": entities.setdefault(name, entity)["@id"]}

    actions = []
    for stage, made in manifests.items():
        record, notebook = f"manifests/{stage}.json", f"notebooks/{stage}.ipynb"
        ended = datetime.fromtimestamp((root / record).stat().st_mtime, UTC)
        read, wrote = made["sources"] | made["inputs"], made["outputs"]
        action = {
            "@id": f"#{stage}",
            "@type": "CreateAction",
            "name": stage,
            "description": json.dumps(made["parameters"], ensure_ascii=False),
            "endTime": ended.isoformat(timespec="seconds"),
            "instrument": refer(notebook, file_sha256(root / notebook), "SoftwareSourceCode"),
            "object": [refer(*entry) for entry in read.items()],
            "result": [
                *(refer(*entry) for entry in wrote.items()),
                refer(record, file_sha256(root / record)),
            ],
        }
        actions.append(action)
    for page in sorted([*root.glob("*.html"), *root.glob("*.pdf")]):
        refer(page.name, file_sha256(page))
    dataset = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"More RLHF, more trust? Run {build.profile}",
        "description": "Notebooks, tables and figures of one run of the study, as it made them",
        "datePublished": max(action["endTime"] for action in actions),
        "license": {"@id": "#licence"},
        "conformsTo": {"@id": PROFILE},
        "hasPart": [{"@id": e["@id"]} for e in entities.values() if "File" in e["@type"]],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    about = [
        {"@id": "ro-crate-metadata.json", "about": {"@id": "./"}, "conformsTo": {"@id": CRATE}},
        {"@id": PROFILE, "name": "Process Run Crate", "version": "0.5"},
        {"@id": "#licence", "name": "Licence", "description": LICENCE},
    ]
    about = [{"@type": "CreativeWork"} | entity for entity in about]
    return {"@context": CONTEXT, "@graph": [*about, dataset, *entities.values(), *actions]}


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m rlhf_trust.crate", description="Describe a run.")
    parser.add_argument("run", help="the name of its folder in build/")
    build = Build(parser.parse_args(argv).run)
    path = build.root / "ro-crate-metadata.json"
    write_text(path, json.dumps(ro_crate(build), indent=1, ensure_ascii=False) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
