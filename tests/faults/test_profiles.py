"""Bad profiles, settings and seeds end in one line that names the file, the key and what to do."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from rlhf_trust import StudyError, params, run
from rlhf_trust.attribution.solvers import SOLVERS
from rlhf_trust.chat import FORMATS
from rlhf_trust.models import parse_dtype
from rlhf_trust.rewards import order_consistency
from rlhf_trust.verticals import FIVE, scorers

TINY = "all:\n  n_train: 4\n  n_held_out: 4\n  seed: 3\n"
DUPLICATE_SECTIONS = """\
extends: tiny
all:
  seed: 5
01-sft:
  learning_rate: 2.0e-4
  epochs: 3
03-ppo:
  steps: 4
01-sft:
  batch: 2
all:
  n_train: 20
"""


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """``resolve`` with this profile, in a build of its own: exit code, errors, parameters."""
    profiles = tmp_path / "params"
    profiles.mkdir()
    (profiles / "tiny.yaml").write_text(TINY, encoding="utf-8")
    for module in (params, run):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(params, "PROFILES", profiles)
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))

    def resolve(profile: str | bytes, **environment: str):
        text = profile if isinstance(profile, bytes) else profile.encode("utf-8")
        (profiles / "p.yaml").write_bytes(text)
        with monkeypatch.context() as patched:
            for name, value in environment.items():
                patched.setenv(name, value)
            code = run.main(["resolve", "--profile", "p"])
        said = capsys.readouterr()
        if code:
            made = tmp_path / "build"
            assert not [*made.rglob("*.yaml")], "nothing half-written"
            assert said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
        return code, said.err, None if code else params.resolve("p")

    return resolve


def everywhere(**values) -> str:
    return "all: {" + ", ".join(f"{name}: {value}" for name, value in values.items()) + "}"


REFUSED = {
    # --- the file
    "sections twice": (DUPLICATE_SECTIONS, r"params/p\.yaml:9: .*'01-sft' stands there twice"),
    "keys twice": (
        "01-sft:\n  epochs: 2\n  epochs: 3",
        r"p\.yaml:3: .*'epochs' stands there twice",
    ),
    "cp1252": (
        "extends: tiny\nall:\n  seed: 1  # run for André\n".encode("cp1252"),
        r"params/p\.yaml:3: not UTF-8 text; save the file as UTF-8",
    ),
    "utf-16": ("all: {seed: 1}".encode("utf-16"), r"p\.yaml:1: not UTF-8 text"),
    "a list": ("- all", "must map `all` or a notebook's name to its parameters"),
    "a word": ("smoke", "must map `all` or a notebook's name to its parameters"),
    "a number as section": ("1: {seed: 2}", "must map `all` or a notebook's name"),
    "a number as key": ("all: {1: 2}", "all: must map parameters to values"),
    "a list as section": ("[all]: {seed: 2}", "must map `all` or a notebook's name"),
    "a value as section": ("01-sft: 3", "p.yaml: 01-sft: must map parameters to values, got 3"),
    "a list in a section": ("01-sft: [epochs]", "01-sft: must map parameters to values"),
    "a tab": ("all:\n\tseed: 1", r"p\.yaml:2: not valid YAML: .*'\\t'"),
    "a quote left open": ("all: {seed: '1}", r"p\.yaml:1: not valid YAML"),
    "NUL": (b"all: {seed: 1\0}", "not valid YAML: unacceptable character"),
    "an anchor": (
        "all: &a {seed: 1}",
        r"p\.yaml:1: not valid YAML: anchors, tags, << and %YAML are not read",
    ),
    "an alias": ("all: *a", r"p\.yaml:1: .*anchors, tags"),
    "a merge": ("all:\n  <<: {seed: 1}", r"p\.yaml:2: .*anchors, tags"),
    "a tag": ("all: {seed: !!int '1'}", r"p\.yaml:1: .*anchors, tags"),
    "code in a tag": ("all: {model: !!python/object/apply:os.getcwd []}", "anchors, tags"),
    "another version": ("%YAML 1.1\n---\nall: {relative_reward: yes}", "anchors, tags"),
    "two documents": (
        "all: {seed: 1}\n---\nall: {seed: 2}",
        "params/p.yaml:.*but found another document",
    ),
    "deep": (
        "all: {betas: " + "[" * 1500 + "]" * 1500 + "}",
        "p.yaml: not valid YAML: maximum recursion depth",
    ),
    "deep maps": ("{a: " * 3000 + "}" * 3000, "p.yaml: not valid YAML: maximum recursion depth"),
    "a long number": (everywhere(seed="9" * 5000), "params/p.yaml: not valid YAML"),
    "no such day": (everywhere(seed="2024-13-45"), "params/p.yaml: not valid YAML"),
    "extends nothing": ("extends: tinny", "extends: params/tinny.yaml: no such profile; did you"),
    "extends another folder": ("extends: ../x", "p.yaml: extends: '../x' is no name of a profile"),
    "extends a number": ("extends: 1", "extends must be the name of a profile, got 1"),
    "extends null": ("extends:", "extends must be the name of a profile, got None"),
    "extends several": (
        "extends: [tiny]",
        r"extends must be the name of a profile, got \['tiny'\]",
    ),
    "extends itself": ("extends: p", "p -> p goes in a circle"),
    "the launcher's": (everywhere(profile="x"), "profile: is the name of the run"),
    # --- YAML 1.1's readings of text
    "sixty to the base": (everywhere(seed="1:40"), "seed must be int, got '1:40' of type str"),
    "yes": (
        everywhere(relative_reward="yes"),
        r"must be bool, got 'yes' .*\(write true or false\)",
    ),
    "off": (everywhere(align="off"), "align must be bool, got 'off'"),
    "a date": (everywhere(seed="2024-01-02"), "seed must be int"),
    # --- types
    "null": (everywhere(seed="null"), "seed must be int, got None"),
    "null for a list": (everywhere(trained="null"), r"trained must be list\[str\], got None"),
    "null in a list": (everywhere(betas="[null]"), r"betas must be list\[float\]"),
    "a list for one": (everywhere(n_train="[1]"), r"n_train must be int, got \[1\]"),
    "one for a list": (everywhere(trained="sft"), r"trained must be list\[str\], got 'sft'"),
    "half": (everywhere(epochs="1.5"), "epochs must be int, got 1.5"),
    "a number as text": (everywhere(model="7"), r"must be str, got 7 .*\(write it in quotes\)"),
    # --- ranges
    **{
        f"{name} {value}": (everywhere(**{name: value}), f"{name} must be .*got {value}")
        for name, value in (
            ("n_train", "0"),
            ("n_train", "-1"),
            ("n_sft", "-1"),
            ("max_length", "0"),
            ("epochs", "0"),
            ("batch_size", "-2"),
            ("lora_rank", "0"),
            ("beta", "-1"),
            ("beta", "0.0"),
            ("learning_rate", "-0.001"),
            ("tau", "-0.1"),
            ("gamma", "1.5"),
            ("lam", "-0.5"),
            ("evaluate_every", "-1"),
            ("temperature", "-0.1"),
            ("planted_share", "1.0"),
            ("pruned_share", "0.0"),
            ("alpha", "1.01"),
            ("n_stereotype", "-1"),
            ("n_ethics", "-1"),
            ("topics", "1"),
            ("n_examples", "1"),
            ("n_random", "1"),
            ("seed", "-1"),
            ("seed", "4294967296"),
        )
    },
    "nan": (everywhere(beta=".nan"), "beta must be a finite number, got nan"),
    "inf": (everywhere(max_kl=".inf"), "max_kl must be a finite number, got inf"),
    "minus inf": (everywhere(kl_coef="-.inf"), "kl_coef must be a finite number"),
    "too large for a float": (everywhere(beta="1e400"), "beta must be a finite number"),
    "a whole one that is": (everywhere(n_train="1" + "0" * 400), "n_train must be a finite number"),
    "nan in a list": (everywhere(betas="[0.3, .nan]"), "betas must be a finite number, got nan"),
    "one of a list": (everywhere(shares="[0.1, 1.5]"), "shares must be > 0, < 1, got 1.5"),
    "a size of a list": (everywhere(amounts="[300, 0]"), "amounts must be >= 2, got 0"),
    # --- choices
    **{
        f"{name}: {value}": (
            everywhere(**{name: value}),
            f"{name} must be one of .*, got '?{value}",
        )
        for name, value in (
            ("dtype", "float8"),
            ("dtype", "Float32"),
            ("prompt_format", "chatlm"),
            ("lora_layers", "lower 1/3"),
            ("lora_layers", "some"),
            ("mode", "practice"),
            ("scorer", "perspektive"),
            ("second_scorer", "none"),
            ("judge", "lexica"),
            ("vertical", "fairness"),
            ("solver", "datain"),
            ("gradient_format", "float64"),
            ("model", "smollm2"),
            ("model", "path:"),
            ("preferences", "ship"),
            ("benchmarks", "hub:mine"),
            ("questions", "lexical"),
            ("preference_model", "reward"),
        )
    },
    "no text": (everywhere(dtype='""'), "dtype must be one of .*, got ''"),
    "one stage": (
        "16-headline: {stages: [dpo, kto]}",
        "stages must be one of ppo, dpo, inpo, grpo, rloo, got",
    ),
    "one learner": (everywhere(learners="[xgboost]"), "learners must be one of"),
    "one pair choice": (everywhere(pair_choices="[same, sme]"), "pair_choices must be one of"),
    # --- lists
    "twice": ("10-toxicity: {trained: [sft, sft]}", "10-toxicity: trained names 'sft' twice"),
    "a name twice": (everywhere(trained='["a=hub:x@1", "a=hub:y@1"]'), "trained names 'a' twice"),
    "a stage twice": ("16-headline: {stages: [dpo, dpo]}", "stages names 'dpo' twice"),
    "a number twice": (everywhere(temperatures="[0.7, 0.7]"), "temperatures names '0.7' twice"),
    **{
        f"no {name}": (f"{stage}: {{{name}: []}}", f"{name} must be a list of one value or more")
        for stage, name in (
            ("16-headline", "stages"),
            ("23-through-training", "stages"),
            ("30-reward-models", "learners"),
            ("20-attribution", "damping_factors"),
            ("50-lineage", "text_counts"),
            ("10-toxicity", "temperatures"),
        )
    },
    # --- what is looked for
    "a relative model": (
        "extends: tiny\nall:\n  model: path:my/model\n",
        r"01-sft: model: model path:/.*/my/model: .*config\.json is missing",
    ),
    "a home of nobody": (everywhere(model="path:~nobody-here/x"), "config.json is missing"),
    "an unknown package": (everywhere(model="wheel:llm-smollm3==1"), "unknown package; known are"),
    "no preferences": (
        everywhere(preferences="path:no.jsonl"),
        "01-sft: preferences: path:/.*no such",
    ),
    "no benchmarks": (
        everywhere(benchmarks="path:nowhere"),
        "10-toxicity: benchmarks: path:/.*no such",
    ),
    "an empty data folder": (
        everywhere(benchmarks="path:params"),
        "toxic.jsonl.* is missing there",
    ),
    "no questions": (
        everywhere(questions="path:nowhere"),
        "40-rag-trust: questions: path:/.*no such",
    ),
    "no judge": (everywhere(judge="path:nowhere"), "40-rag-trust: judge: .*config.json is missing"),
    "no classifier": (
        everywhere(classifiers='["path:no"]'),
        "classifiers: .*config.json is missing",
    ),
    "no preference model": (
        everywhere(preference_model="path:no"),
        "preference_model: .*is missing",
    ),
    "an unknown adapter": (
        everywhere(trained="[sft, dop]"),
        "10-toxicity: trained: there is no adapter 'dop'; there are dpo, inpo, ppo, sft",
    ),
    "no checkpoint": (everywhere(trained='["mine=path:no"]'), "trained: .*config.json is missing"),
    "no source": (everywhere(trained='["mine=out/model"]'), "must be mine=hub:.* or mine=path:"),
    "another folder": (everywhere(trained='["../x"]'), "'../x' is no name of a model"),
    "a model of no name": (everywhere(trained='["=hub:x@1"]'), "'' is no name of a model"),
    "a copy of nothing": (
        "50-lineage: {copied: kto}",
        "50-lineage: copied must be one of start, sft, ppo, dpo, inpo, trust-aligned, got 'kto'",
    ),
    "answers of nobody": (
        "40-rag-trust: {negatives: reward}",
        "negatives must be one of trust-sft, s",
    ),
    "a training of nothing": (
        "23-through-training: {stages: ['sft, kto']}",
        "23-through-training: stages must be one of sft, .*, got 'sft, kto'",
    ),
    "no weights": (everywhere(model="path:params/bare"), r"bare: has no weights"),
    "marks of a terminal": (everywhere(model=r'"path:\e[2J\0"'), r"␛\[2J␀: .*is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_profile_is_one_line(launch, tmp_path, case):
    text, expected = REFUSED[case]
    (tmp_path / "params" / "bare").mkdir()
    (tmp_path / "params" / "bare" / "config.json").write_text("{}", encoding="utf-8")
    code, said, _ = launch(text)
    assert code == 2 and re.search(expected, said), said


ACCEPTED = {
    "an empty file": ("", {}),
    "comments alone": ("# nothing yet\n", {}),
    "a heading alone": ("01-sft:\nall:\n", {}),
    "a BOM": ("\ufeffall: {seed: 7}", {"seed": 7}),
    "CRLF": ("all:\r\n  seed: 7\r\n", {"seed": 7}),
    "a leading zero": (everywhere(seed="010"), {"seed": 10}),
    "an exponent": (everywhere(beta="1e-5", eta="2E-1"), {"beta": 1e-5, "eta": 0.2}),
    "a whole number for a float": (everywhere(beta="1"), {"beta": 1.0}),
    "no as text": ("40-rag-trust: {negatives: sft}", {"negatives": "sft"}),
    "a name of its own": ("extends: tiny", {"seed": 3, "n_train": 4}),
    "over what it extends": ("extends: tiny\nall: {seed: 5}", {"seed": 5, "n_train": 4}),
    "all of them": (
        everywhere(n_ethics="0", evaluate_every="0", n_stereotype="0"),
        {"n_ethics": 0},
    ),
    "upper layers": (everywhere(lora_layers="upper 4"), {"lora_layers": "upper 4"}),
    "numbers of layers": (everywhere(lora_layers='"20-29,3"'), {"lora_layers": "20-29,3"}),
    "start alone": ("10-toxicity: {trained: []}", {"trained": []}),
    "a revision": (everywhere(model="hub:a/b@main"), {"model": "hub:a/b@main"}),
    "none": (everywhere(model="hub:a/b"), {"model": "hub:a/b"}),
    "pairs of the hub": (
        everywhere(preferences='"hub:a/b@main:train#max_bad_rows=0.3"'),
        {"preferences": "hub:a/b@main:train#max_bad_rows=0.3"},
    ),
    "HH": (everywhere(preferences='"hub:"', benchmarks='"hub:"'), {"preferences": "hub:"}),
    "a model of the hub": (
        "10-toxicity: {trained: [a-1.4b=hub:x/y]}",
        {"trained": ["a-1.4b=hub:x/y"]},
    ),
    "text in quotes": (everywhere(copied='""'), {"copied": ""}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_honest_profiles_are_read(launch, case):
    text, expected = ACCEPTED[case]
    code, said, resolved = launch(text)
    assert (code, said) == (0, "")
    for name, value in expected.items():
        found = [values[name] for values in resolved.values() if name in values]
        assert value in found and isinstance(found[found.index(value)], type(value))


def test_paths_are_found_from_wherever_make_runs(launch, tmp_path, tiny_directories, monkeypatch):
    (tmp_path / "my").symlink_to(tiny_directories["llama"].parent)
    name = tiny_directories["llama"].name
    monkeypatch.chdir("/")
    code, _, resolved = launch(f"""\
all: {{model: path:my/{name}}}
10-toxicity: {{trained: [m=path:my/{name}]}}
""")
    assert code == 0
    assert resolved["01-sft"]["model"] == f"path:{tmp_path}/my/{name}"
    assert resolved["10-toxicity"]["trained"] == [f"m=path:{tmp_path}/my/{name}"]


def test_a_profile_that_is_a_folder_is_one_line(launch, tmp_path):
    (tmp_path / "params" / "folder.yaml").mkdir()
    code, said, _ = launch("extends: folder")
    assert code == 2 and "params/folder.yaml: cannot be read (Is a directory)" in said


def test_only_what_will_run_is_looked_for(launch):
    text = "10-toxicity: {benchmarks: path:nowhere}"
    code, said, _ = launch(text, FETCH="01-sft 17-mine")
    assert code == 2 and "no notebook '17-mine'" in said
    assert launch(text, FETCH="01-sft 12-ethics")[0] == 0


COMMAND_LINE = [
    ({"SEED": "007"}, "SEED=007: must be a whole number from 0 on, without leading zeros"),
    ({"SEED": "-1"}, "SEED=-1: must be a whole number"),
    ({"SEED": "٣"}, "SEED=.*: must be a whole number"),
    ({"SEED": "5"}, "SEED=5: is the seed of profile 'p' itself"),
    ({"SEED": "99999999999"}, "the command line: seed must be 0 to 999999999, got 99999999999"),
    ({"SEED": "2", "SET": "all.seed=4"}, "SET: all.seed: .* set seed as well"),
    ({"SET": "01-sft.epochs=2 01-sft.epochs=3"}, "SET: 01-sft.epochs stands there twice"),
    ({"SET": "01-sft.epochs=0"}, "SET, or params/p.yaml: 01-sft: epochs must be > 0, got 0"),
    ({"SET": "01-sft.epochs=[["}, r"SET: '01-sft.epochs=\[\[': not valid YAML"),
    ({"SET": "01-sft.epochs=!!int"}, "SET: '01-sft.epochs=!!int': .*anchors, tags"),
    ({"SET": "all.profile=x"}, "profile: is the name of the run"),
    ({"SET": "17-x.epochs=1"}, "no notebook"),
    ({"DATA": "~nobody-here/x"}, "DATA=~nobody-here/x: no such directory"),
    ({"BEFORE": "smollm", "AFTER": "a=hub:x"}, "the command line: model must be one of"),
]


@pytest.mark.parametrize(("given", "expected"), COMMAND_LINE)
def test_a_bad_command_line_is_one_line(launch, given, expected):
    code, said, _ = launch("all: {seed: 5}", **given)
    assert code == 2 and re.search(expected, said), said


def test_a_seed_is_another_than_the_profiles_own(launch):
    assert launch("01-sft: {seed: 5}", SEED="5")[0] == 2
    code, said, _ = launch("", SEED="0")
    assert code == 2 and "SEED=0: is the seed of profile 'p' itself; name another" in said
    assert launch("all: {seed: 5}", SEED="0")[0] == 0


# --- what the notebooks declare -------------------------------------------------------------------


def declared():
    for stage in params.stages():
        for parameter in params.notebook_parameters(params.NOTEBOOKS / f"{stage}.ipynb").values():
            yield stage, parameter


FREE = {"profile", "trained", "negatives", "copied", "target_modules"}
"""Texts that are names, which no list of choices holds."""


def test_every_number_has_a_range_and_every_choice_its_choices():
    for stage, parameter in declared():
        numbers = re.search("int|float", parameter.type)
        choices = "str" in parameter.type and parameter.name not in FREE
        assert bool(parameter.rule) == bool(numbers or choices), f"{stage}: {parameter}"
        assert parameter.rule.startswith("one of ") == bool(choices), f"{stage}: {parameter}"


def test_declared_choices_are_the_ones_there_are():
    known = {
        "dtype": ["auto", "float32", "bfloat16"],
        "prompt_format": [*FORMATS, "template", "auto"],
        "solver": [*SOLVERS, "unrolled"],
        "vertical": list(FIVE),
        "scorer": list(scorers.SCORERS),
        "second_scorer": list(scorers.SCORERS),
        "learners": [*order_consistency.LOSSES, "lightgbm"],
        "pair_choices": list(order_consistency.CHOICES),
    }
    for name in known["dtype"]:
        parse_dtype(name)
    for _, parameter in declared():
        if parameter.name in known:
            named = parameter.rule.removeprefix("one of ").split(", ")
            named = [name for name in named if "<" not in name]  # scorers from elsewhere
            assert named == known[parameter.name], parameter


@pytest.mark.parametrize(
    ("rule", "fine", "wrong"),
    [
        ("> 0", [1, 0.5, 1e300], [0, -1, 0.0, -0.0]),
        (">= 0", [0, 0.0, 2], [-1, -1e-9]),
        ("> 0, < 1", [0.5], [0, 1, 0.0, 1.0, 2]),
        ("0 to 1", [0, 1, 0.5], [-0.1, 1.1]),
        ("one of a, b c", ["a", "b c"], ["", "ab", "A", "a, b c", "a\n"]),
        ('one of "", x:<any>', ["", "x:1"], ["x:", " "]),
        ("one of hub:[<id@revision>], <numbers>", ["hub:", "hub:x", "1/3", "2-4,7"], ["hub", "x1"]),
    ],
)
def test_the_grammar_of_rules(rule, fine, wrong):
    kind = "str" if rule.startswith("one of") else "float"
    parameter = params.Parameter("x", kind, None, f"what it is; or was; {rule}")
    assert parameter.rule == rule
    for value in fine:
        assert parameter.check(value, "here") == value
    for value in [*wrong, *([math.nan, math.inf] if kind == "float" else [])]:
        with pytest.raises(StudyError, match="^here: x must be "):
            parameter.check(value, "here")


@pytest.mark.parametrize(
    "cell",
    ["n: int = 0  # how many; > 0", "n: int = x", "n = 3", "n: int", "n: int = ", "n: int = [1"],
)
def test_a_wrong_parameters_cell_is_one_line(tmp_path, cell):
    notebook = tmp_path / "17-mine.ipynb"
    tagged = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": cell}
    notebook.write_text(json.dumps({"cells": [tagged]}), encoding="utf-8")
    with pytest.raises(StudyError, match="^17-mine.ipynb, parameters cell") as caught:
        params.notebook_parameters(notebook)
    assert "\n" not in str(caught.value)
    notebook.write_text("[]", encoding="utf-8")
    with pytest.raises(StudyError, match="is not a notebook"):
        params.notebook_parameters(notebook)


def test_a_chapter_opened_by_hand_checks_the_same(tmp_path, monkeypatch):
    from rlhf_trust.study import open_study

    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    path = params.NOTEBOOKS / "01-sft.ipynb"
    values = {name: p.default for name, p in params.notebook_parameters(path).items()}
    for name, value in (("n_sft", -1), ("dtype", "float8"), ("learning_rate", math.nan)):
        with pytest.raises(StudyError, match=f"^01-sft, parameters cell: {name} must be "):
            open_study("01-sft", values | {name: value})
    edited = values | {"model": "path:my/model", "learning_rate": 1}
    study = open_study("01-sft", edited)
    assert edited["model"] == study.parameters["model"] == f"path:{params.ROOT}/my/model"
    assert isinstance(edited["learning_rate"], float)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
DECLARED = {
    stage: params.notebook_parameters(params.NOTEBOOKS / f"{stage}.ipynb")
    for stage in params.stages()
}


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    place=st.sampled_from([(stage, name) for stage in DECLARED for name in DECLARED[stage]]),
    value=st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4),
    everything=st.one_of(st.none(), st.none(), st.text(max_size=30)),
)
def test_any_profile_is_taken_whole_or_refused_in_one_line(launch, place, value, everything):
    """Any value of any parameter, and any text: what is accepted is what its notebook declares."""
    (stage, name), profiles = place, params.PROFILES
    text = json.dumps({stage: {name: value}}) if everything is None else everything
    (profiles / "p.yaml").write_text(text, encoding="utf-8")
    try:
        found = params.resolve("p")[stage][name]
    except StudyError as error:
        assert "\n" not in str(error) and "p.yaml" in str(error)
    else:
        assert DECLARED[stage][name].check(found, "here") == found
        if everything is None:
            assert found == value
