"""A run for a paper in LaTeX: tables that LaTeX reads, and macros that never overstate."""

from __future__ import annotations

import shutil

import pandas as pd
import pypandoc
import pytest
from rlhf_trust import StudyError, latex
from rlhf_trust.headline import gated
from rlhf_trust.reference import REFERENCE, reference_table
from rlhf_trust.report import p_words


def test_a_name_has_letters_alone_and_a_text_no_signs_of_latex():
    assert latex.macro_name("trust", "llama-3_2 dpo", "toxicity") == "TrustLlamaThreeTwoDpoToxicity"
    assert latex.escaped(r"a_b & 5 % \x, -0.5 to +1, co-op-2") == (
        r"a\_b \& 5 \% \textbackslash{}x, $-$0.5 to +1, co-op-2"
    )


def test_two_models_cannot_share_a_macro():
    row = {"vertical": "toxicity", "baseline": "start", "measurable": False, "seeds": 1}
    rows = pd.DataFrame([{"stage": "dpo-1"} | row, {"stage": "dpo one"} | row])
    with pytest.raises(StudyError, match=r"two numbers would be \\TrustDpoOneToxicity; rename"):
        latex.macros(rows)


@pytest.mark.parametrize("profile", ["embedded", "hh-cpu"])
def test_a_run_becomes_tables_and_macros_that_latex_reads(profile, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    shutil.copytree(REFERENCE / profile, tmp_path / "tables")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "dots.pdf").write_bytes(b"%PDF")
    assert latex.main([profile]) == 0
    out = tmp_path / "latex"
    assert (out / "figures" / "dots.pdf").read_bytes() == b"%PDF"
    of_run = {path.name: path.read_bytes() for path in out.glob("*.tex")}
    assert latex.main([profile, "--reference"]) == 0 and not any((out / "figures").iterdir())
    assert of_run == {path.name: path.read_bytes() for path in out.glob("*.tex")}
    tables = {path.stem: path.read_text() for path in out.glob("*.tex")}
    defined = tables.pop("macros")
    assert {"published", "checks", "validation"} <= {*tables}
    for name, text in tables.items():
        assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        read = pypandoc.convert_text(text, "html", format="latex")
        assert read.count("<tr") == text.count(r"\\"), name
    names = [line.split("{\\")[1].split("}")[0] for line in defined.splitlines()]
    assert len({*names}) == len(names) and all(name.isalpha() for name in names)
    uses = "\n\n".join(f"{name}: \\{name}" for name in names)
    said = pypandoc.convert_text(
        f"{defined}\n{uses}", "plain", format="latex", extra_args=["--wrap=none"]
    )
    told = dict(line.split(": ", 1) for line in said.splitlines() if line)
    assert [*told] == names
    if profile == "embedded":
        rows = gated(*(reference_table(profile, name) for name in ("headline", "validity")))
        assert not rows["measurable"].all() and len(names) == 6 * 20
        ends = {"placebo": "", "start": "Start"}
        for row in rows.itertuples():
            name = latex.macro_name("trust", row.stage, row.vertical, ends[row.baseline])
            number, p = told[name], told[f"{name}P"]
            if row.measurable:
                assert number.startswith(f"{row.change:+.3f} (95".replace("-", "−"))
                assert p == p_words(row.p_holm)
            else:
                assert number == p == told[f"{name}N"] == "not measurable"
        assert told["TrustSftToxicity"] == "not compared with a placebo"
        assert "not measurable" in tables["headline"]
