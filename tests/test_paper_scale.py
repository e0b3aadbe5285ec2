"""Every notebook under a paper-scale profile, on a tiny random model of its architecture: what the default run never meets
(the dialogue format, GPT-NeoX's fused projections, answers that nobody can read)."""

from __future__ import annotations

from conftest import save_tiny
from rlhf_trust import params, run


def test_all_notebooks_run_under_a_paper_scale_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    model = save_tiny("gpt_neox", tmp_path / "model", positions=4096)
    parameters, small = params.resolve("pythia-1.4b"), params.read_profile("smoke")
    for stage, values in parameters.items():
        sizes = {**small["all"], **small.get(stage, {})}
        sizes = {
            name: value for name, value in sizes.items() if name in values and name != "max_tokens"
        }
        elsewhere = {
            "model": f"path:{model}",
            "dtype": "float32",
            "preferences": "shipped",
            "benchmarks": "shipped",
            "questions": "shipped",
            "judge": "lexical",
        }
        values |= sizes | {name: value for name, value in elsewhere.items() if name in values}
        assert run.run_stage(stage, "pythia-1.4b", parameters) == 0, capsys.readouterr().err
