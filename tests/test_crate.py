"""A run described as an RO-Crate, its data in Croissant's terms, its environment as an SBOM."""

from __future__ import annotations

import json
from importlib.metadata import version
from urllib.parse import unquote

import pandas as pd
import pytest
from rlhf_trust import ROOT, StudyError
from rlhf_trust.artifacts import WRITTEN, Build, file_sha256, write_record, write_text
from rlhf_trust.crate import main, ro_crate
from rlhf_trust.sources import SHIPPED


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
    acts = SHIPPED / "ethics" / "cm_test.csv"
    sources = {acts.relative_to(ROOT).as_posix(): file_sha256(acts), "lib/data.csv": "1"}
    sources[(SHIPPED / "README.md").relative_to(ROOT).as_posix()] = "as it was before"
    for stage, name in made.items():
        manifest = {"stage": stage, "parameters": {"seed": 0}, "sources": sources}
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
    assert {"@id": "data/ethics/cm_test.csv"} in first["object"]
    licences = [by_id[f"data/truthfulqa/{n}"]["license"] for n in ("mc_task.json", "primer.txt")]
    assert [by_id[each["@id"]]["name"] for each in licences] == ["CC BY 4.0", "Apache-2.0"]
    assert {"@id": "data/README.md"} not in first["object"] and "data/README.md" in parts
    check_croissant(tmp_path)
    packages = json.loads((tmp_path / "sbom.cdx.json").read_text(encoding="utf-8"))
    found = {part["name"]: part for part in packages["components"]}
    assert found["torch"]["version"] == version("torch") and found["ruamel-yaml"]["licenses"]
    needs = {each["ref"]: each["dependsOn"] for each in packages["dependencies"]}
    assert "torch" in needs["rlhf-trust"] and "pytest" not in needs["rlhf-trust"]
    assert {name for names in needs.values() for name in names} <= {*needs} == {*found}


def check_croissant(root):
    """Its files are those shipped, and its columns have the values that it says."""
    about = json.loads((root / "croissant.json").read_text(encoding="utf-8"))
    files = {file["contentUrl"].removeprefix("data/"): file for file in about["distribution"]}
    shipped = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert {*files} == {path.relative_to(SHIPPED).as_posix() for path in shipped}
    assert all(file_sha256(SHIPPED / name) == file["sha256"] for name, file in files.items())
    fields = {
        field["@id"]: field["dataType"] for rows in about["recordSet"] for field in rows["field"]
    }
    kinds = {"label": "Integer", "input": "Text", "is_short": "Boolean", "edited": "Boolean"}
    assert [*kinds] == [*pd.read_csv(SHIPPED / "ethics" / "cm_test.csv")]
    said = {name: fields[f"ethics/cm_test/{name}"].removeprefix("sc:") for name in kinds}
    assert said == kinds and "toxicity-controls/terms/mentions" in fields
    assert {"hh-rlhf/harmless-base.train/chosen", "trust-score/list/question"} <= {*fields}
