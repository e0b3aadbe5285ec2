"""A run described as an RO-Crate."""

from __future__ import annotations

import json
from urllib.parse import unquote

import pytest
from rlhf_trust import StudyError
from rlhf_trust.artifacts import WRITTEN, Build, file_sha256, write_record, write_text
from rlhf_trust.crate import main, ro_crate


def ids(entity: object) -> list[str]:
    """Every ``@id`` that an entity refers to."""
    if isinstance(entity, dict):
        own = [entity["@id"]] if "@id" in entity else []
        return own + [name for value in entity.values() for name in ids(value)]
    return [name for part in entity for name in ids(part)] if isinstance(entity, list) else []


def test_a_crate_says_which_notebook_made_which_file_from_what(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    with pytest.raises(StudyError, match="no such run"):
        ro_crate(Build("tiny"))
    made = {"01-sft": "tables/parts/a b.csv", "90-report": "tables/a.csv"}
    for name in ("report.html", *made.values(), *(f"notebooks/{stage}.ipynb" for stage in made)):
        write_text(tmp_path / name, name)
    digests = {name: file_sha256(tmp_path / name) for name in made.values()}
    reads = {
        "01-sft": {"model: hub:a/b": "0"},
        "90-report": {made["01-sft"]: digests[made["01-sft"]]},
    }
    for stage, name in made.items():
        manifest = {"stage": stage, "parameters": {"seed": 0}, "sources": {"lib/data.csv": "1"}}
        manifest |= {"inputs": reads[stage], "outputs": {name: digests[name], "models/gone": "2"}}
        write_record(tmp_path / "manifests" / f"{stage}.json", manifest)
    WRITTEN.clear()
    assert main(["tiny"]) == 0
    crate = json.loads((tmp_path / "ro-crate-metadata.json").read_text(encoding="utf-8"))
    by_id = {entity["@id"]: entity for entity in crate["@graph"]}
    assert len(by_id) == len(crate["@graph"])
    outside = {
        name for name in ids(crate["@graph"]) if name.startswith("https://w3id.org/ro/crate")
    }
    assert {*ids(crate["@graph"])} - outside == {*by_id}
    parts = [unquote(part["@id"]) for part in by_id["./"]["hasPart"]]
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert sorted(parts) == sorted(there - {"ro-crate-metadata.json"})
    assert all(
        by_id[f"{p.replace(' ', '%20')}"]["sha256"] == file_sha256(tmp_path / p) for p in parts
    )
    first, last = (by_id[f"#{stage}"] for stage in made)
    assert {"@id": "#model%3A%20hub%3Aa/b"} in first["object"]
    assert {"@id": "tables/parts/a%20b.csv"} in first["result"] and last["object"]
    assert last["instrument"] == {"@id": "notebooks/90-report.ipynb"}
