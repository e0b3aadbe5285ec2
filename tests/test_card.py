"""The trust card, from tables small enough to check by eye."""

from __future__ import annotations

import re

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from rlhf_trust import card, lineage
from rlhf_trust.artifacts import TABLES, Build, Manifest
from rlhf_trust.headline import headline_words
from rlhf_trust.report import Conditions, checkpoint_changes, validity_of
from rlhf_trust.verticals import FIVE, HEADLINE

EVIL = '<script>alert(1)</script> | [x](http://evil.example) `a` "b": {c}'
HOW = Conditions("hub:a/base@1", {"mine": "hub:a/model@2"}, {}, "chatml", "float32", "shipped", 0)
HOW = HOW._replace(dtype="float32", prompt_format="chatml")
CHANGES = {
    # change, interval, p_holm, n; all instruments lie above chance but privacy's
    "toxicity": (0.2, 0.1, 0.3, 0.01, 60),
    "stereotype": (0.2, 0.1, 0.3, 0.06, 60),
    "ethics": (0.2, 0.1, 0.3, 0.01, 60),
    "truthfulness": (0.2, float("nan"), float("nan"), float("nan"), 4),
    "privacy": (0.2, 0.1, 0.3, 0.01, 60),
}


def tables(models=("mine",), validity=None, told=0.0, **more) -> dict[str, pd.DataFrame]:
    """``validity``: (vertical, model) → the low end of the instrument's interval. ``told``: the
    change of the stereotype's instrument, ± 0.05."""
    validity = {("privacy", model): 0.1 for model in ("start", *models)} | (validity or {})
    trust, changes = [], []
    for vertical in FIVE:
        of = HEADLINE[vertical]
        change, low, high, p_holm, n = CHANGES[vertical]
        key = {"vertical": vertical, "seed": 0}
        for model in ("start", *models):
            at_validity = validity.get((vertical, model), 0.55)
            for (metric, condition), end in {
                of[:2]: 0.55,
                of.validity: at_validity,
                ("unparsable_rate", "main"): 0.2,
            }.items():
                row = key | {"model": model, "metric": metric, "condition": condition}
                trust.append(
                    row | {"value": end + 0.1, "ci_low": end, "ci_high": end + 0.2, "n": 60}
                )
        for model in models:
            row = key | {"model": model, "baseline": "start", "n": n, "p": p_holm / 2}
            row |= {"metric": of.metric, "condition": of.condition, "p_holm": p_holm}
            changes.append(row | {"change": change, "ci_low": low, "ci_high": high})
            if vertical == "stereotype":
                tried = dict(zip(("metric", "condition"), of.validity))
                ends = {"change": told, "ci_low": told - 0.05, "ci_high": told + 0.05}
                changes.append(row | tried | ends | {"p_holm": float("nan")})
            changes.append(row | {"baseline": "sft", "change": 9.0, "ci_low": 8.0, "ci_high": 10.0})
    found = {"trust": pd.DataFrame(trust), "trust_change": pd.DataFrame(changes)}
    for name in ("grounding", "grounding_change", "lineage"):
        found[name] = pd.DataFrame(more.get(name, []), columns=TABLES[name])
    return found


def verdicts(found) -> dict[str, str]:
    return card.compared(found).set_index("vertical")["verdict"].to_dict()


def entries(found, how=HOW):
    """Of the one model: its name, and (metric, whole result) by type."""
    (entry,) = yaml.safe_load(card.model_index(found, how))["model-index"]
    name, results = model_index_to_eval_results([entry])
    return name, {result.metric_type: result for result in results}


def test_a_verdict_needs_the_interval_holms_p_and_an_instrument():
    assert verdicts(tables()) == {
        "toxicity": "worse",
        "stereotype": "no clear change",  # its interval excludes zero, p after Holm is 0.06
        "ethics": "better",
        "truthfulness": "fewer than 8 items",
        "privacy": "cannot be measured",
    }


def test_an_instrument_that_fails_on_the_other_model_alone_measures_nothing_either():
    assert verdicts(tables(validity={("toxicity", "mine"): 0.5}))["toxicity"] == card.NOT_MEASURED
    # Ethics is its own instrument: who falls to chance there has got worse.
    assert verdicts(tables(validity={("ethics", "mine"): 0.4}))["ethics"] == "better"
    assert verdicts(tables(validity={("ethics", "start"): 0.4}))["ethics"] == card.NOT_MEASURED
    untried = tables()
    untried["trust"] = untried["trust"].query("metric != 'detector_roc_auc'")
    assert verdicts(untried)["toxicity"] == card.NOT_MEASURED


def test_a_blunter_instrument_is_no_clear_change(monkeypatch):
    clear = (-0.2, -0.3, -0.1, 0.01, 60)
    monkeypatch.setitem(CHANGES, "stereotype", clear)
    assert verdicts(tables())["stereotype"] == "better"
    assert verdicts(tables(told=-0.2))["stereotype"] == "no clear change"


def test_the_reports_sentences_agree_with_the_card():
    found = tables()
    rows = checkpoint_changes(found["trust"], found["trust_change"])
    said = headline_words(rows, validity_of(found["trust"]))
    assert len(said) == 5 and not any("placebo" in sentence for sentence in said)
    toxicity, stereotype, ethics, truthfulness, privacy = said
    assert toxicity == (
        "mine, toxicity (expected maximum toxicity): against start +0.200 (95 % interval +0.100 to "
        "+0.300; p = 0.010 after Holm, n = 60 items, one checkpoint): worse."
    )
    assert stereotype.endswith(
        "p = 0.060 after Holm, n = 60 items, one checkpoint): no clear change."
    )
    assert ethics.endswith(": better.") and truthfulness.endswith(": no verdict.")
    assert privacy.startswith("privacy: cannot be measured on this model: on start value found is")


def test_metadata_holds_what_can_be_measured_and_nothing_else():
    name, results = entries(tables())
    assert name == "a/model"
    measured = [HEADLINE[v].metric for v in ("toxicity", "stereotype", "ethics")]
    assert set(results) == {*measured, *(f"{metric}_change" for metric in measured)}
    value, change = results["roc_auc"], results["roc_auc_change"]
    assert value.task_type == "text-generation" and value.dataset_config == "ethics"
    assert value.metric_value == pytest.approx(0.65) and change.metric_value == pytest.approx(0.2)
    assert value.metric_args["n"] == 60 and value.metric_args["condition"] == "answers=contrast"
    assert "95 % interval" in value.metric_name and "n = 60 items" in value.metric_name
    assert change.metric_args["p_holm"] == 0.01 and change.metric_args["verdict"] == "better"
    assert change.metric_args["baseline"] == "hub:a/base@1"
    public = entries(tables(), HOW._replace(benchmarks="hub:"))[1]["roc_auc"]
    assert (value.dataset_type, public.dataset_type) == (card.SHIPPED, "hendrycks/ethics")


def test_without_anything_measurable_the_metadata_is_empty():
    failed = {(vertical, "start"): -0.1 for vertical in HEADLINE}
    assert card.model_index(tables(validity=failed), HOW) == ""


def test_two_models_have_an_entry_each():
    how = HOW._replace(others={"mine": "path:/home/me/first", "theirs": "hub:b/other"})
    index = yaml.safe_load(card.model_index(tables(("mine", "theirs")), how))["model-index"]
    assert [entry["name"] for entry in index] == ["mine", "b/other"]
    text = card.card(tables(("mine", "theirs")), how)
    assert "| choice above chance (lower is worse) |" in text and "| +0.200 | – | 4 |" in text
    assert "path:…/first" in text and "/home/me" not in text
    assert "| 70%; 70%; n = 60 |" in text
    assert re.findall("^## .*", text, re.M) == [
        "## mine, compared with start",
        "## theirs, compared with start",
    ]


def test_grounding_and_lineage_stand_where_they_were_measured():
    level = {"judge": "lexical", "metric": "trust_score", "value": 0.4, "ci_low": 0.3}
    level |= {"ci_high": 0.5, "n": 40, "seed": 0}
    change = {"model": "mine", "baseline": "start", "judge": "lexical", "metric": "trust_score"}
    change |= {"change": 0.1, "ci_low": 0.05, "ci_high": 0.2, "p": 0.01, "n": 40}
    same = {"suspect": "mine", "derived": True, "measure": lineage.STUDY, "value": 0.98}
    same |= {"ci_low": 0.97, "ci_high": 0.99, "p": 0.01, "verdict": "derived", "n": 200}

    def text(p_holm):
        rows = [change | {"p_holm": p_holm}]
        levels = [level | {"model": model} for model in ("start", "mine")]
        return card.card(tables(grounding=levels, grounding_change=rows, lineage=[same]), HOW)

    assert "| Trust-Score | 0.400 (0.300 to 0.500) |" in text(0.02)
    assert "| 0.020 | 40 | better |" in text(0.02) and "| 40 | no clear change |" in text(0.06)
    assert "0.980 (95 % interval 0.970 to 0.990, n = 200 texts): derived." in text(0.02)
    assert "Trust-Score" not in card.card(tables(), HOW)


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    return Build("evaluated")


def test_what_comes_from_data_is_text_on_the_page(build):
    for name, table in tables().items():
        table.to_csv(build.table(name), index=False)
    parameters = {"model": f"path:{EVIL}", "trained": [f"mine=hub:{EVIL}"], "dtype": "float32"}
    parameters |= {"prompt_format": EVIL, "benchmarks": "shipped", "seed": 0}
    Manifest(build, "12-ethics", parameters, {"mine": EVIL}).write()
    markdown, page = card.write_card(build)
    text, shown = markdown.read_text(), page.read_text()
    _, metadata, body = text.split("---\n", 2)
    assert "<script" not in body and "<script" not in shown and "evil.example)" in body
    assert not re.search('href="(?!#)', shown)
    assert "&lt;/script&gt;" in shown and "<table" in shown
    index = yaml.safe_load(metadata)["model-index"]
    assert index[0]["results"][0]["metrics"][0]["args"]["prompt_format"] == EVIL
    columns = {line.replace(r"\|", "").count("|") for line in body.splitlines() if line[:1] == "|"}
    assert columns == {11}
    # Hugging Face's own reader finds the same in it.
    found = ModelCard(text).data.eval_results
    assert len(found) == 6 and found[0].metric_args["prompt_format"] == EVIL


def test_a_missing_table_is_one_line(build, capsys):
    assert card.main(["evaluated"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "trust.csv" in said and said.count("\n") == 1
