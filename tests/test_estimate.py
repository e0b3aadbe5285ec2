"""What a profile is said to cost: the measured minutes, scaled by sizes, weights and speed."""

from __future__ import annotations

import json

import pytest
import torch
from rlhf_trust import artifacts, estimate, params, run

RUNS = json.loads(estimate.MEASURED.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_a_reference_run_costs_what_was_measured(name):
    measured = RUNS[name]
    parameters = {stage: sizes | {} for stage, sizes in measured["sizes"].items()}
    found = estimate.hours(parameters, measured["weights"], measured["tflops"])
    assert (found["sizes"] == 1).all()
    minutes = dict(zip(found["stage"], 60 * found["hours"]))
    assert minutes == pytest.approx(measured["minutes"])


def test_one_reference_run_predicts_the_other_as_well_as_is_said():
    default, other = RUNS["embedded"], RUNS["hh-cpu"]
    for stage, minutes in other["minutes"].items():
        ratio = estimate.prod(other["sizes"][stage].values())
        ratio /= estimate.prod(default["sizes"][stage].values())
        slower = default["tflops"] / other["tflops"]
        predicted = 0.5 + (default["minutes"][stage] - 0.5) * ratio * slower
        factor = 7 if stage == "30-reward-models" else 3
        assert minutes / factor < predicted < minutes * factor, stage


def test_every_profile_has_its_sizes():
    for profile in ("smoke", "pythia-1.4b", "gemma3-270m"):
        parameters = params.resolve(profile)
        found = estimate.hours(parameters, 1e9, 1.0).set_index("stage")
        assert set(found.index) == {s for s in parameters if s < "60"}
        twice = estimate.hours(parameters, 1e9, 0.5).set_index("stage")
        assert (found["hours"] > 0).all() and (twice["hours"] > found["hours"]).all()


def test_what_trains_nothing_costs_by_its_models():
    """40-rag-trust with ``align: false``, whatever else it would have trained on."""

    def minutes(**changed):
        parameters = params.resolve("evaluate")
        parameters["40-rag-trust"] |= {"trained": ["mine=path:x"]} | changed
        found = estimate.hours(parameters, 134.5e6, 0.28).set_index("stage").loc["40-rag-trust"]
        return 60 * found["hours"] - estimate.START_UP, found["scaled_from"]

    two, source = minutes()
    assert source == "evaluate" and minutes(n_train=500) == (two, source)
    assert minutes(trained=["a=path:x", "b=path:y", "c=path:z"])[0] == pytest.approx(2 * two)
    trains, source = minutes(align=True)
    assert source == "embedded" and trains > 3 * two


def test_an_unknown_size_gives_no_estimate():
    parameters = params.resolve("embedded")
    parameters["12-ethics"]["n_items"] = 0  # all
    found = estimate.hours(parameters, 1e9, 1.0).set_index("stage")
    assert found.index[found["hours"].isna()].tolist() == ["12-ethics"]


def test_weights_are_known_or_counted(tiny):
    counted = sum(p.numel() for p in tiny.model.parameters())
    assert estimate.weights_of(tiny.source) == counted
    assert estimate.weights_of("hub:EleutherAI/pythia-1.4b@main") == 1.415e9
    assert estimate.weights_of("hub:somebody/model") is None
    assert estimate.weights_of("path:/nowhere") is None


def test_a_profile_is_shown_with_its_cost(capsys):
    assert run.main(["params", "--profile", "llama-7b"]) == 0
    said = capsys.readouterr().out.split("Estimate")[1]
    assert "by 6,738 million weights (hub:huggyllama/llama-7b@4782ad27" in said
    assert "20-attribution" in said and "lib/docs/running.md" in said
    assert estimate.machine_tflops(torch.float32, 2) > 1e-3


def test_the_status_of_a_run(tmp_path, monkeypatch, capsys):
    """Twice as slow as estimated so far: the rest is expected to be so as well."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    monkeypatch.setenv("JOBS", "1")
    monkeypatch.setattr(estimate, "machine_tflops", lambda dtype: 0.28)
    everything = params.resolve("embedded")  # chapters from 60 on are no part of a run
    parameters = {s: values for s, values in everything.items() if s < run.OPT_IN or s > "9"}
    minutes = 60 * estimate.hours(parameters, 134.5e6, 0.28).set_index("stage")["hours"]
    for folder in ("manifests", "notebooks"):
        (tmp_path / folder).mkdir()
    record = {"stage": "01-sft", "seconds": 120 * minutes["01-sft"], "code": {}}
    artifacts.write_record(tmp_path / "manifests" / "01-sft.json", record)
    for name in ("01-sft.ipynb", ".02-reward.part.ipynb", "03-ppo.failed.ipynb"):
        (tmp_path / "notebooks" / name).touch()
    (tmp_path / "notebooks" / ".02-reward.part.progress").write_text("a bar\nhalf way\x1b[A")
    assert run.main(["status"]) == 0
    said = capsys.readouterr().out
    states = dict(line.split(None, 1) for line in said.splitlines()[: len(parameters)])
    assert states["01-sft"] == f"done in {2 * minutes['01-sft']:.1f} minutes"
    assert (states["02-reward"], states["03-ppo"]) == ("begun half way", "failed")
    assert states["04-dpo"] == "waiting" and f"1 of {len(parameters)} notebooks are done." in said
    left = 2 * minutes.drop("01-sft").sum()
    assert f"About {left:.0f} minutes are left, 1 at a time" in said
    assert "60-dose" not in states
    (tmp_path / "notebooks" / "60-dose.failed.ipynb").touch()  # now it is
    assert run.main(["status"]) == 0
    assert "60-dose                     failed\n" in capsys.readouterr().out
