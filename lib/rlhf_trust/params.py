"""Parameters: the notebooks' defaults and one profile's overrides; typos are errors.

A notebook's ``parameters`` cell holds typed, commented defaults (``temperature: float = 0.7  #
sampling temperature``): they are the ``embedded`` profile. ``params/<profile>.yaml`` holds what a
profile changes, by notebook, or under ``all:`` for every notebook that has the name. papermill only
warns of an unknown key and passes ``1e-5`` on as text; here both are errors before anything runs.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import os
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import ROOT, StudyError, check_name

NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "params"
ACCEPTS, EXTENDS = "accept_gemma_terms", "extends"
"""Keys of a profile beside its parameters: are terms accepted, and which profile does it change?"""

TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's ``parameters`` cell."""

    name: str
    type: str
    default: Any
    comment: str

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` in the declared type, or raise a :class:`StudyError` that names
        ``where``."""
        if _fits(value, self.type):
            return float(value) if self.type == "float" else value
        hint = ""
        if self.type == "float" and str(value).lstrip("+-.")[:1].isdigit():
            hint = " (YAML reads 1e-5 as text: write 1.0e-5)"
        elif self.type == "str" and isinstance(value, (int, float)):
            hint = " (write it in quotes)"
        raise StudyError(
            f"{where}: {self.name} must be {self.type}, "
            f"got {value!r} of type {type(value).__name__}{hint}"
        )


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind.startswith("list[") and kind.endswith("]"):
        return isinstance(value, list) and all(_fits(item, kind[5:-1]) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    return kind in TYPES and isinstance(value, TYPES[kind])


def stages() -> list[str]:
    """Names of all stage notebooks, in reading order."""
    found = sorted(path.stem for path in NOTEBOOKS.glob("[0-9][0-9]-*.ipynb"))
    for stage in found:
        if not re.fullmatch(r"\d\d-[a-z][a-z-]*", stage):
            raise StudyError(
                f"notebooks/{stage}.ipynb: would be run as a part of the study; remove this copy, "
                "or give it a number and a name of its own, such as 17-mine"
            )
    return found


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """Read the typed defaults from the cell tagged ``parameters`` without running it."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = (cell for cell in cells if cell["cell_type"] == "code")
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise StudyError(f"{path.name}: needs one code cell tagged `parameters`, has {len(tagged)}")
    source = "".join(tagged[0]["source"])
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in ast.parse(source).body:
        typed = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if not typed or node.value is None:
            raise StudyError(
                f"{path.name}, parameters cell, line {node.lineno}: "
                "write `name: type = default  # what it is`"
            )
        name, kind = node.target.id, ast.unparse(node.annotation)
        parameter = Parameter(name, kind, None, comments.get(node.end_lineno, ""))
        default = parameter.check(ast.literal_eval(node.value), f"{path.name}, parameters cell")
        found[name] = Parameter(name, kind, default, parameter.comment)
    return found


class KeysOnce(yaml.SafeLoader):
    """Reads YAML, and refuses a key that stands twice, of which it would drop the first."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{name!r} stands there twice", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_profile(profile: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """A profile's overrides by notebook; ``embedded`` without a file of its own is the notebooks'
    defaults.

    With ``extends`` they lie over those of another profile (``below`` are the profiles that led
    here).
    """
    check_name(profile)
    path, file = PROFILES / f"{profile}.yaml", f"params/{profile}.yaml"
    if not path.exists():
        if profile == "embedded":
            return {}
        known = [*(path.stem for path in PROFILES.glob("*.yaml")), "embedded"]
        where = f"params/{below[-1]}.yaml: {EXTENDS}: " if below else ""
        raise StudyError(f"{where}{file}: no such profile{_nearest(profile, known)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), KeysOnce) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise StudyError(f"{file}: not valid YAML: {problem}") from None
    sections = content.items() if isinstance(content, dict) else [("", content)]
    if not all(isinstance(v, dict) or k in (ACCEPTS, EXTENDS) for k, v in sections):
        raise StudyError(f"{file}: must map `all` or a notebook's name to its parameters")
    if EXTENDS not in content:
        return content
    extended = str(content.pop(EXTENDS))
    if extended in (*below, profile):
        circle = " -> ".join((*below, profile, extended))
        raise StudyError(f"{file}: {EXTENDS}: {circle} goes in a circle")
    merged = read_profile(extended, (*below, profile))
    # Terms are not inherited: they are accepted in the file that is run.
    merged.pop(ACCEPTS, None)
    for section, values in content.items():
        merged[section] = values if section == ACCEPTS else merged.get(section, {}) | values
    return merged


def terms_accepted(profile: str) -> bool:
    """Does the profile accept the terms of its model, if that has any (``sources.TERMS``)?"""
    return read_profile(profile).get(ACCEPTS) is True


def resolve(
    profile: str,
    overrides: dict[str, Any] | None = None,
    run: str | None = None,
    settings: dict[str, dict[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """All parameters of every notebook under a profile: ``{stage: {name: value}}``.

    ``overrides`` come from the command line and hold for every notebook that knows the name, as do
    ``settings``, which are laid out as a profile and lie over it; ``run`` names the build folder
    where it is not the profile. Raises :class:`StudyError` for an unknown notebook or key (with the
    nearest name) and for a wrong type.
    """
    known = {stage: notebook_parameters(NOTEBOOKS / f"{stage}.ipynb") for stage in stages()}
    content, file, overrides = read_profile(profile), f"params/{profile}.yaml", overrides or {}
    content.pop(ACCEPTS, None)
    for section, values in (settings or {}).items():
        file = f"SET, or params/{profile}.yaml"
        content[section] = content.get(section, {}) | values
    _refuse_unknown(f"{file}: no notebook", content, [*known, "all"])
    general = content.get("all", {})
    every_name = {name for parameters in known.values() for name in parameters}
    _refuse_unknown(f"{file}: all: unknown parameter", general | overrides, every_name)
    resolved = {}
    for stage, parameters in known.items():
        special = content.get(stage, {})
        _refuse_unknown(f"{file}: {stage}: unknown parameter", special, parameters)
        given = general | special | overrides | {"profile": run or profile}
        resolved[stage] = {}
        for name, parameter in parameters.items():
            where = f"{file}: {stage if name in special else 'all'}"
            value = parameter.check(given.get(name, parameter.default), where)
            resolved[stage][name] = _whole_paths(value)
    return resolved


def _whole_paths(value: Any) -> Any:
    """``path:`` from the repository's root on, since notebooks run in a folder of their own."""
    if isinstance(value, list):
        return [_whole_paths(item) for item in value]
    if not isinstance(value, str) or not (
        found := re.fullmatch(r"(([\w.-]+=)?path:|perspective:)(.+)", value)
    ):
        return value
    return f"{found[1]}{ROOT / Path(found[3]).expanduser()}"


def shown_path(path: str) -> str:
    """A path as a page may publish it: from the repository's root on if it is inside, else its last
    part, after an ellipsis."""
    whole = os.path.normpath(ROOT / path)
    if Path(whole).is_relative_to(ROOT):
        return os.path.relpath(whole, ROOT)
    return f"…/{os.path.basename(whole)}"


def shown_source(source: str) -> str:
    """A model's or a data set's source, of a path what :func:`shown_path` shows."""
    kind, _, place = source.partition("path:")
    return (
        f"{kind}path:{shown_path(place)}" if re.fullmatch(r"([^:]+=)?", kind) and place else source
    )


def _refuse_unknown(complaint: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise StudyError(f"{complaint} {name!r}{_nearest(name, known)}")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
