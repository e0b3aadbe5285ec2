"""All notebooks under a paper-scale profile, on a tiny random model of its architecture.

It covers what the default run never meets: the dialogue format, GPT-NeoX's fused projections,
answers that cannot be read.
"""

from __future__ import annotations

import pytest
from conftest import save_tiny
from rlhf_trust import params, run

ELSEWHERE = {
    "dtype": "float32",
    "preferences": "shipped",
    "benchmarks": "shipped",
    "questions": "shipped",
    "judge": "lexical",
}


@pytest.mark.slow
def test_all_notebooks_run_under_a_paper_scale_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    model = save_tiny("gpt_neox", tmp_path / "model", positions=4096)
    parameters, smoke = params.resolve("pythia-1.4b"), params.read_profile("smoke")
    del parameters["60-dose"]  # which ends where nothing can be measured, as on random weights
    for stage, values in parameters.items():
        small = {**smoke["all"], **smoke.get(stage, {}), **ELSEWHERE, "model": f"path:{model}"}
        del small["max_length"]  # bytes are tokens here, so texts are long
        values |= {name: value for name, value in small.items() if name in values}
        assert run.run_stage(stage, "pythia-1.4b", values) == 0, capsys.readouterr().err
