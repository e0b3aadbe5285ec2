"""Parameters: the notebooks' defaults and one profile's overrides; typos are errors.

A notebook's ``parameters`` cell holds typed, commented defaults (``temperature: float = 0.7  #
sampling temperature; > 0``): they are the ``embedded`` profile. The end of the comment declares
what a value, or each of a list, may be: ``> 0``, ``0 or more``, ``> 0, < 1``, ``0 to 1`` or
``one of shipped, hub:, path:<directory>``, where ``<…>`` stands for any text (``<numbers>`` for
20-29, 1/3 or 4) and ``[…]`` may be left out. A list holds nothing twice, and is empty only if its
default is or its comment says what ``[]:`` means.

``params/<profile>.yaml`` (YAML 1.2: ``010`` is 10, ``yes`` is text) holds what a profile changes,
by notebook, or under ``all:`` for every notebook that has the name. papermill only warns of an
unknown key; here it is an error before anything runs, and so is a value that is not allowed.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import os
import re
import sys
import tokenize
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from . import ROOT, StudyError, check_name, require

NOTEBOOKS = ROOT / "notebooks"
PROFILES = ROOT / "params"
ACCEPTS, EXTENDS, RESOURCES = "accept_gemma_terms", "extends", "resources"
"""Keys of a profile beside its parameters: are terms accepted, which profile does it change, and
what does each notebook need as a job (:func:`resources`)?"""

TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}


CHOICES, RANGE = "one of ", re.compile(r"([\d.]+) to ([\d.]+)")
BOUND = re.compile(r"([<>]=?) ([\d.]+)")
COMPARE = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's ``parameters`` cell."""

    name: str
    type: str
    default: Any
    comment: str

    @property
    def rule(self) -> str:
        """What the end of the comment declares; "" if nothing."""
        # In a comment: papermill does not read a line with two "=".
        end = re.sub(r"([\d.]+) or more", r">= \1", self.comment.rpartition("; ")[2])
        bounds = all(BOUND.fullmatch(bound) for bound in end.split(", "))
        return end if end.startswith(CHOICES) or RANGE.fullmatch(end) or bounds else ""

    def check(self, value: Any, where: str) -> Any:
        """Return ``value`` in the declared type, or raise a :class:`StudyError` that names
        ``where``."""
        start = f"{where}: {self.name} must be"
        if not _fits(value, self.type):
            hint = ""
            if self.type == "bool":
                hint = " (write true or false)"
            elif self.type == "str" and isinstance(value, (int, float)):
                hint = " (write it in quotes)"
            found = f"{value!r} of type {type(value).__name__}"
            raise StudyError(f"{start} {self.type}, got {found}{hint}")
        items = value if isinstance(value, list) else [value]
        if isinstance(value, list):
            names = [str(item).partition("=")[0] for item in items]
            if twice := [name for name in names if names.count(name) > 1]:
                raise StudyError(f"{where}: {self.name} names {twice[0]!r} twice")
            if not items and self.default and "[]:" not in self.comment:
                raise StudyError(f"{start} a list of one value or more, got none")
        for item in items:
            # Neither .nan nor .inf, nor a whole number that is no float.
            if isinstance(item, (int, float)) and not abs(item) <= sys.float_info.max:
                raise StudyError(f"{start} a finite number, got {str(item)[:20]}")
            if item is not None and self.rule and not _allowed(self.rule, item):
                raise StudyError(f"{start} {self.rule}, got {item!r}")
        return float(value) if self.type == "float" else value


def _allowed(rule: str, value: Any) -> bool:
    if rule.startswith(CHOICES):
        # Commas inside quotes and <…> are part of a choice.
        choices = re.findall(r'(?:"[^"]*"|<[^>]*>|[^,"<])+', rule.removeprefix(CHOICES))
        return any(re.fullmatch(_pattern(choice.strip()), value) for choice in choices)
    if ends := RANGE.fullmatch(rule):
        return float(ends[1]) <= value <= float(ends[2])
    return all(COMPARE[sign](float(value), float(end)) for sign, end in BOUND.findall(rule))


def _pattern(choice: str) -> str:
    """A choice as an expression; quotes only mark where it begins and ends."""
    special = {"[": "(?:", "]": ")?", '"': ""}
    special["<numbers>"] = r"\d[\d,/ -]*"
    parts = re.findall(r"<[^>]+>|.", choice)
    return "".join(special.get(p, ".+" if p[1:] else re.escape(p)) for p in parts)


def _fits(value: Any, kind: str) -> bool:
    if kind.endswith(" | None"):
        return value is None or _fits(value, kind.removesuffix(" | None"))
    if kind.startswith("list[") and kind.endswith("]"):
        return isinstance(value, list) and all(_fits(item, kind[5:-1]) for item in value)
    if isinstance(value, bool):
        return kind == "bool"
    return kind in TYPES and isinstance(value, TYPES[kind])


NEEDS = {
    "minutes": Parameter("minutes", "int", None, "> 0"),
    "memory": Parameter("memory", "float", None, "> 0"),  # GB
    "gpus": Parameter("gpus", "int", None, "0 or more"),
    "processes": Parameter("processes", "int", None, "> 0"),
}
"""What ``resources:`` may say of a notebook, or under ``all:`` of each."""


def resources(profile: str) -> dict[str, dict[str, float]]:
    """Notebook → what it needs as a job, as far as the profile says: minutes until it is stopped
    (and started anew), memory in GB, GPUs, processes. Raises :class:`StudyError` as
    :func:`resolve`."""
    file, asked = f"params/{profile}.yaml: {RESOURCES}", {}
    for name, values in read_profile(profile).items():
        if name.startswith(f"{RESOURCES}: "):
            asked[name.removeprefix(f"{RESOURCES}: ")] = values
    _refuse_unknown(f"{file}: no notebook", asked, [*stages(), "all"])
    for section, values in asked.items():
        for name in values:
            _refuse_unknown(f"{file}: {section}: unknown", [name], NEEDS)
            values[name] = NEEDS[name].check(values[name], f"{file}: {section}")
    return {stage: asked.get("all", {}) | asked.get(stage, {}) for stage in stages()}


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


def read_cells(path: Path) -> list[dict]:
    """A notebook's cells as its file has them."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{path}: is not a notebook ({error}); take it from the repository again"
        raise StudyError(problem) from None


def notebook_parameters(path: Path) -> dict[str, Parameter]:
    """Read the typed defaults from the cell tagged ``parameters`` without running it."""
    code = (cell for cell in read_cells(path) if cell["cell_type"] == "code")
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    problem = f"{path.name}: needs one code cell tagged `parameters`, has {len(tagged)}"
    require(len(tagged) == 1, problem)
    source, place, found = "".join(tagged[0]["source"]), f"{path.name}, parameters cell", {}
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", 1)
        raise StudyError(f"{place}, line {line}: is no Python ({error.args[0]})") from None
    comments, last = {}, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text, line = token.string.lstrip("# "), token.start[0]
            # One that ends in a semicolon goes on in the next line.
            if comments.get(last, "").endswith(";") and token.line.lstrip().startswith("#"):
                comments[last] += f" {text}"
            else:
                comments[line], last = text, line
    for node in body:
        try:
            name, kind = node.target.id, ast.unparse(node.annotation)
            default = ast.literal_eval(node.value)
        # No annotated name, or no plain value.
        except (AttributeError, ValueError):
            problem = "write `name: type = default  # what it is`, the default a plain value"
            raise StudyError(f"{place}, line {node.lineno}: {problem}") from None
        parameter = Parameter(name, kind, None, comments.get(node.end_lineno, ""))
        found[name] = replace(parameter, default=parameter.check(default, place))
    return found


def read_yaml(text: str, where: str) -> Any:
    """A YAML text's value; a :class:`StudyError` names the line of what is not plain YAML 1.2, or
    of a key that stands there twice.

    Anchors, tags, ``<<`` and directives are refused: a profile says what it says where it stands.
    """

    reader = YAML(typ="safe", pure=True)
    try:
        for event in reader.parse(text):
            odd = any(getattr(event, name, None) for name in ("anchor", "tag", "version"))
            if odd or getattr(event, "value", "") == "<<":
                problem = "anchors, tags, << and %YAML are not read; write it out"
                raise MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return reader.load(text)
    # A ValueError: such as a number of 5,000 digits, or the 32nd of a month.
    except (YAMLError, ValueError, RecursionError) as error:
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        if found := re.search(r'duplicate key "(.*?)" with value', problem):
            problem = f"{found[1]!r} stands there twice"
        if (mark := getattr(error, "problem_mark", None)) and where.endswith(".yaml"):
            where = f"{where}:{mark.line + 1}"
        raise StudyError(f"{where}: not valid YAML: {problem}") from None


def read_profile(profile: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """A profile's overrides by notebook; ``embedded`` without a file of its own is the notebooks'
    defaults.

    With ``extends`` they lie over those of another profile (``below`` are the profiles that led
    here).
    """
    led = f"params/{below[-1]}.yaml: {EXTENDS}: " if below else ""
    check_name(profile, where=led)
    path, file = PROFILES / f"{profile}.yaml", f"params/{profile}.yaml"
    if not path.exists():
        if profile == "embedded":
            return {}
        known = [*(path.stem for path in PROFILES.glob("*.yaml")), "embedded"]
        raise StudyError(f"{led}{file}: no such profile{_nearest(profile, known)}")
    try:
        content = read_yaml(path.read_text(encoding="utf-8-sig"), file)
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise StudyError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise StudyError(f"{file}: cannot be read ({error.strerror})") from None
    content = {} if content is None else content
    if isinstance(content, dict) and isinstance(asked := content.get(RESOURCES), dict):
        # Sections of their own, so that they lie over another profile's as all others do.
        content |= {f"{RESOURCES}: {name}": values for name, values in asked.items()}
        del content[RESOURCES]
    if not isinstance(content, dict) or any(not isinstance(name, str) for name in content):
        raise StudyError(f"{file}: must map `all` or a notebook's name to its parameters")
    for name, values in content.items():
        named = name != EXTENDS or isinstance(values, str)
        require(named, f"{file}: {EXTENDS} must be the name of a profile, got {values!r}")
        if name in (ACCEPTS, EXTENDS):
            continue
        # A heading whose lines are all commented out.
        content[name] = values = {} if values is None else values
        if not isinstance(values, dict) or any(not isinstance(key, str) for key in values):
            raise StudyError(f"{file}: {name}: must map parameters to values, got {values!r}")
    if EXTENDS not in content:
        return content
    extended = content.pop(EXTENDS)
    circle = f"{' -> '.join((*below, profile, extended))} goes in a circle"
    require(extended not in (*below, profile), f"{file}: {EXTENDS}: {circle}")
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
    content = {name: of for name, of in content.items() if name.split(": ")[0] != RESOURCES}
    for section, values in (settings or {}).items():
        file = f"SET, or params/{profile}.yaml"
        content[section] = content.get(section, {}) | values
        if both := overrides.keys() & values.keys():
            name = both.pop()
            also = f"DATA, SEED or BEFORE and AFTER set {name} as well; leave out one of them"
            raise StudyError(f"SET: {section}.{name}: {also}")
    _refuse_unknown(f"{file}: no notebook", content, [*known, "all"])
    if any("profile" in values for values in content.values()):
        raise StudyError(f"{file}: profile: is the name of the run, which the launcher sets")
    general = content.get("all", {})
    every_name = {name for parameters in known.values() for name in parameters}
    _refuse_unknown(f"{file}: all: unknown parameter", general | overrides, every_name)
    resolved = {}
    for stage, parameters in known.items():
        special = content.get(stage, {})
        _refuse_unknown(f"{file}: {stage}: unknown parameter", special, parameters)
        given = general | special | overrides | {"profile": run or profile}
        where = {name: f"{file}: {stage if name in special else 'all'}" for name in given}
        where |= dict.fromkeys(overrides, "the command line")
        resolved[stage] = {}
        for name, parameter in parameters.items():
            value = parameter.default
            if name in given:
                value = parameter.check(given[name], where[name])
            resolved[stage][name] = whole_paths(value)
    return resolved


def whole_paths(value: Any) -> Any:
    """``path:`` from the repository's root on, since notebooks run in a folder of their own."""
    if isinstance(value, list):
        return [whole_paths(item) for item in value]
    if not isinstance(value, str) or not (
        found := re.fullmatch(r"(([^:]+=)?path:|perspective:)(.+)", value)
    ):
        return value
    return f"{found[1]}{ROOT / os.path.expanduser(found[3])}"


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
    is_path = place and re.fullmatch(r"([^:]+=)?", kind)
    return f"{kind}path:{shown_path(place)}" if is_path else source


def _refuse_unknown(complaint: str, names, known) -> None:
    for name in names:
        if name not in known:
            raise StudyError(f"{complaint} {name!r}{_nearest(name, known)}")


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(known))}"
