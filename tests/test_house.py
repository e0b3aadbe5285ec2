"""The library's rooms: each imports only from those below it, and has what notebooks use."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import rlhf_trust
import yaml
from rlhf_trust import params

PACKAGE = Path(rlhf_trust.__file__).parent
ROOMS = (
    "__init__ masking params artifacts fan_out distributed stats sources chat data decode models "
    "losses training align verticals headline dose attribution rewards rag lineage distance "
    "figures render report reference card pdf latex crate score estimate study run"
).split()
"""From the ground up."""


def room(parts: list[str]) -> str:
    return parts[0] if parts and parts[0] in ROOMS else "__init__"


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports from, at its head or inside a function."""
    parts, found = list(path.relative_to(PACKAGE).with_suffix("").parts), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = parts[: len(parts) - node.level] + (
                node.module.split(".") if node.module else []
            )
            found |= {room(origin or [alias.name]) for alias in node.names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            assert not any(name.startswith("rlhf_trust") for name in names), (
                f"{path}: relative imports only"
            )
    return found


def test_every_module_belongs_to_a_room():
    assert {room([part]) for part in ROOMS} == set(ROOMS)
    names = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.name != "__pycache__"
    }
    assert names - {"py"} == set(ROOMS)


def test_no_room_imports_from_one_above_it():
    upwards = []
    for path in sorted(PACKAGE.rglob("*.py")):
        own = room(list(path.relative_to(PACKAGE).with_suffix("").parts))
        upwards += [
            f"{path.relative_to(PACKAGE)} imports from {other}"
            for other in imported_rooms(path)
            if ROOMS.index(other) > ROOMS.index(own)
        ]
    assert not upwards


def missing_names(source: str) -> list[str]:
    """Names that a chapter takes from the library, by import or as ``module.name``, and that it
    has not."""
    found, tree, missing = {}, ast.parse(source), []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.module.startswith("rlhf_trust"):
            continue
        for alias in node.names:
            try:
                found[alias.asname or alias.name] = pkgutil.resolve_name(
                    f"{node.module}.{alias.name}"
                )
            except AttributeError:
                missing.append(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = found.get(node.value.id)
            if isinstance(owner, ModuleType) and not hasattr(owner, node.attr):
                missing.append(f"{owner.__name__}.{node.attr}")
    return missing


@pytest.mark.parametrize("stage", params.stages())
def test_the_library_has_what_a_notebook_uses(stage):
    cells = json.loads((params.NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert missing_names("\n".join(code)) == []


def test_a_missing_name_is_found():
    source = "from rlhf_trust import stats\nfrom rlhf_trust.data import nothing\nstats.nobody()"
    assert missing_names(source) == ["rlhf_trust.data.nothing", "rlhf_trust.stats.nobody"]


SHOWN = ("say", "paragraphs", "table", "samples", "show")


def lost_outputs(source: str) -> list[str]:
    """Calls that make something to show, in a place whose value a notebook does not show."""
    body = ast.parse(source).body
    unseen = body[:-1] if body and isinstance(body[-1], ast.Expr) else body
    calls = [
        node.value
        for top in unseen
        for node in ast.walk(top)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    names = [getattr(call.func, "id", getattr(call.func, "attr", "")) for call in calls]
    return [name for name in names if name in SHOWN]


@pytest.mark.parametrize("stage", params.stages())
def test_whatever_a_cell_makes_to_show_is_shown(stage):
    cells = json.loads((params.NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert lost_outputs("".join(cell["source"])) == [], cell["id"]
    assert lost_outputs("say('a')\nif b:\n    table(b)") == ["say", "table"]


def test_every_pinned_package_has_its_hashes():
    lib, hashes = rlhf_trust.ROOT / "lib", r"(?:    --hash=sha256:[0-9a-f]{64}.*\n)+"
    text = (lib / "hashes.txt").read_text(encoding="utf-8")
    hashed = re.findall(rf"(?m)^([\w.-]+)==([^ ;]+).*\\\n{hashes}", text)
    assert len(hashed) == text.count("==") - text.count(" == ") and "://" not in text
    pins = [line.split("==") for line in (lib / "constraints.txt").read_text().split()]
    same = re.compile("[-_.]+")
    assert {(same.sub("-", name).lower(), version) for name, version in pins} <= {*hashed}


def test_one_version_is_cited():
    project = tomllib.loads((rlhf_trust.ROOT / "lib" / "pyproject.toml").read_text())["project"]
    cited = yaml.safe_load((rlhf_trust.ROOT / ".github" / "CITATION.cff").read_text())
    deposit = json.loads((rlhf_trust.ROOT / ".zenodo.json").read_text())
    assert {project["version"], cited["version"], deposit["version"]} == {rlhf_trust.__version__}
    assert project["license"] == cited["license"] == deposit["license"]
    assert project["description"] == cited["title"] == deposit["title"]
