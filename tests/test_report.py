"""The report's tables and sentences, from tables small enough to check by eye."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rlhf_trust import StudyError
from rlhf_trust.artifacts import Build, Manifest
from rlhf_trust.figures import colour
from rlhf_trust.report import (
    PAPER,
    against_paper,
    as_published,
    attribution_words,
    checkpoint_changes,
    conditions,
    contributions_of,
    foretelling_words,
    merge_study_tables,
    needed_tables,
    over_runs,
    p_words,
    paper_words,
    readable_answers,
    runs_of_seeds,
    trade_offs,
    unrolled_words,
    validation_words,
    validity_of,
)
from rlhf_trust.verticals import HEADLINE, PUBLISHED

NAN = float("nan")
START = {"toxicity": 0.5, "stereotype": 0.2, "ethics": 0.25, "truthfulness": 0.4, "privacy": 0.0}
START |= {"sycophancy": 0.5, "refusal": 0.1}


def trust(unparsable=0.25):
    rows = []
    for vertical, (metric, *_) in PUBLISHED.items():
        rows.append(("sft", vertical, metric, "main", 9.0))
        rows.append(("start", vertical, metric, "other", 9.0))
        rows.append(("start", vertical, metric, "main", START[vertical]))
        for model in ("start", "sft", "ppo", "dpo"):
            rate = unparsable if (model, vertical) == ("sft", "ethics") else 0.25
            rows.append((model, vertical, "unparsable_rate", "main", rate))
    columns = ["model", "vertical", "metric", "condition", "value"]
    return pd.DataFrame(rows, columns=columns).assign(n=60)


def changes(rows, measures=PUBLISHED):
    """``rows``: (model, vertical, change, low, high, p_holm), against start, between rows that must
    not be read."""
    found = []
    for model, vertical, change, low, high, p_holm in rows:
        row = {
            "model": model,
            "baseline": "start",
            "vertical": vertical,
            "metric": measures[vertical][0],
            "condition": measures[vertical][1],
            "change": change,
            "ci_low": low,
            "ci_high": high,
            "p": 0.01,
            "p_holm": p_holm,
            "min_detectable": 0.1,
            "n": 0 if np.isnan(change) else 60,
            "seed": 0,
        }
        other = row | {"change": 9.0, "ci_low": 8.0, "ci_high": 10.0, "p_holm": 0.0}
        found += [
            other | {"condition": "temperature=1"},
            other | {"baseline": "sft"},
            other | {"metric": "other"},
            row,
        ]
    return pd.DataFrame(found)


def test_what_was_published_stands_beside_what_could_be_read():
    rows = [("sft", v, 0.1, -0.05, 0.2, 1.0) for v in PUBLISHED]
    rows.append(("dpo", "ethics", -0.25, -0.25, -0.1, 0.01))
    found = as_published(trust(), changes(rows)).set_index(["vertical", "model"])
    assert len(found) == len(PUBLISHED) + 1
    assert found["start"].to_dict() == {key: START[key[0]] for key in found.index}
    assert found["readable"].eq(0.75).all() and not found["mostly_unreadable"].any()
    unread = as_published(trust(unparsable=0.9), changes(rows)).set_index(["vertical", "model"])
    assert unread.index[unread["mostly_unreadable"]].tolist() == [("ethics", "sft")]
    shares = trust()
    of_start = shares.eval("model == 'start' and vertical == 'ethics'")
    shares.loc[of_start & (shares["metric"] == "unparsable_rate"), "value"] = 0.9
    unread = as_published(shares, changes(rows)).set_index(["vertical", "model"])
    assert unread["mostly_unreadable"].sum() == 2  # both models' changes from there


def test_verdicts_know_which_way_is_worse():
    rows = [
        ("sft", "toxicity", 0.1, 0.05, 0.2, 0.2),
        ("sft", "ethics", -0.1, -0.2, -0.05, 0.03),
        ("sft", "truthfulness", -0.1, -0.2, -0.05, 0.01),
        ("sft", "privacy", 0.1, -0.1, 0.3, 1.0),
        ("dpo", "truthfulness", 0.1, 0.05, 0.2, 0.049),
        ("ppo", "privacy", NAN, NAN, NAN, NAN),
        ("ppo", "ethics", 0.0, 0.0, 0.0, 1.0),
    ]
    found = as_published(trust(), changes(rows)).set_index(["model", "vertical"])
    assert found["verdict"].to_dict() == {
        ("sft", "toxicity"): "worse",
        ("sft", "ethics"): "better",
        ("sft", "truthfulness"): "worse",
        ("sft", "privacy"): "no clear change",
        ("dpo", "truthfulness"): "better",
        ("ppo", "privacy"): "fewer than 8 items",
        ("ppo", "ethics"): "no clear change",
    }


SUMMARY = "stage vertical solver loss contribution standardised ci_low ci_high p_null n".split()


def test_sums_and_contrasts_of_datainf_by_proxy_or_metric():
    rows = [
        ("dpo", "ethics", s, loss, 0.1, x, -1, 1, 0.3, 8)
        for s, x in (("datainf", 2.0), ("exact_layerwise", -2.0), ("tfidf", 7.0))
        for loss in ("next-token", "next-token, token mean", "metric")
    ]
    for solver, sign in (("datainf", 1), ("exact_layerwise", -1)):
        for loss in ("metric", "next-token"):
            for group, p in (("source: harmless", 0.2), ("topic: tea, cup", 0.01)):
                part = ("dpo", "ethics", solver, f"{loss}: {group}", 0.4 * sign, NAN)
                rows.append((*part, 0.1, 0.7, p, 90))
    summary = pd.DataFrame(rows, columns=SUMMARY)
    for metric, loss in ((False, "next-token"), (True, "metric")):
        (row,) = contributions_of(summary, metric).itertuples()
        assert (row.solver, row.loss, row.standardised, row.exact) == ("datainf", loss, 2, -2)
        assert (row.group, row.effect, row.exact_effect) == ("topic: tea, cup", 0.4, -0.4)
        assert (row.n, row.p_null, row.effect_p, row.examples) == (8, 0.3, 0.01, 90)
    old = contributions_of(summary[~summary["loss"].str.contains(": ")])  # without contrasts
    assert old["exact"].tolist() == [-2] and old[["group", "effect_p"]].isna().all(axis=None)
    assert len(attribution_words(old)) == 2


def test_datainf_is_worth_what_it_foretold():
    rows = [
        ("lds", "answers", "datainf", 0.3, 0.1),
        ("lds", "ethics", "datainf", -0.12, -0.6),
        ("lds", "ethics", "gradient_cosine", 0.9, 0.8),
        ("through training, other orders", "dpo", "datainf", 0.7, 0.2),
        ("mislabelled_auc", "pairs", "datainf", 0.9, 0.8),
    ]
    validation = pd.DataFrame(rows, columns=["test", "target", "solver", "value", "ci_low"])
    said = foretelling_words(validation)
    assert "in 2 of 3 comparisons" in said and "correlations of -0.12 to 0.70" in said


def test_scores_through_training_are_said_in_the_orders_that_were_tried():
    rows = [
        ("same order", "sft", "unrolled", 0.9),
        ("same order", "sft", "random", 0.0),
        ("same order", "dpo", "unrolled", 0.8),
        ("same order", "dpo", "gradient_dot", 0.5),
        ("other orders", "dpo", "unrolled", 0.7),
        ("other orders", "dpo", "gradient_dot", 0.6),
        ("other orders", "dpo", "noise ceiling", 0.95),
    ]
    table = pd.DataFrame(rows, columns=["test", "target", "solver", "value"])
    table = table.assign(
        test="through training, " + table["test"],
        ci_low=table["value"] - 0.1,
        ci_high=table["value"] + 0.1,
        n=6,
    )
    sft, dpo = unrolled_words(table)
    assert "0.90 (0.80 to 1.00) in the same order (best of the others: random 0.00).\n\n" in sft
    assert "0.80 (0.70 to 0.90) in the same order (best of the others: gradient dot 0.50)" in dpo
    assert "0.70 (0.60 to 0.80) in other orders (best of the others: gradient dot 0.60)" in dpo
    assert "; in other orders perfect scores would reach 0.95 (0.85 to 1.05).\n\n" in dpo


def test_attribution_words():
    columns = "stage vertical standardised p_null n exact group effect effect_low effect_high"
    columns = [*columns.split(), "effect_p", "examples", "exact_effect"]

    def words(*rows, **verbs):
        return attribution_words(pd.DataFrame(rows, columns=columns), **verbs)

    nothing = ("sft", "ethics", NAN, NAN, 0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN)
    dull = ("dpo", "ethics", 5.0, 0.3, 20, 4.0, "topic: a", 0.1, -0.2, 0.4, 0.5, 90, 0.1)
    driving = (
        "sft",
        "privacy",
        -3.0,
        0.01,
        20,
        1.0,
        "source: harmless",
        -0.4,
        -0.6,
        -0.2,
        0.01,
        90,
    )
    assert words(nothing) == [
        "No answer changed between stages, so there was nothing to attribute."
    ]
    sums, signs, contrasts, first = words(nothing, (*driving, -0.3), dull)
    assert "1 of 2 combinations" in sums and "at least 0.1 would be expected by chance" in sums
    assert "disagree about that sign in 1 of 2" in signs
    assert contrasts.startswith(
        "A group of examples scores clearly above or below the others in 1 of"
    )
    assert first == (
        "sft on privacy, source: harmless: such pairs drive the change more than others, Cliff's "
        "delta -0.40 (95 % interval -0.60 to -0.20, n = 90 examples)."
    )
    apart = words((*driving, 0.3), verbs=("help", "harm"))[-1]
    assert "such pairs help more" in apart and "but the exact solver says the opposite" in apart
    assert words(dull)[-1].endswith("p < 0.05).")


def test_a_run_without_attribution_has_no_contributions():
    assert contributions_of(pd.DataFrame(columns=["stage", "loss", "solver"])).empty


def test_validation_words():
    rows = [
        ("lds", "answers", "datainf", 0.3, 0.1, 0.5, NAN),
        ("lds", "answers", "gradient_dot", 0.4, 0.2, 0.6, NAN),
        ("lds", "answers", "random", 0.0, -0.1, 0.1, NAN),
        ("lds", "answers", "noise ceiling", 0.7, 0.5, 0.8, NAN),
        ("above_random", "answers", "datainf", 0.3, 0.1, 0.5, 0.01),
        ("above_tfidf", "answers", "datainf", 0.1, -0.1, 0.3, 0.2),
        ("mislabelled_auc", "pairs", "datainf", 0.8, 0.7, 0.9, NAN),
        ("mislabelled_auc", "pairs", "ceiling", 0.9, 0.8, 0.95, NAN),
    ]
    columns = ["test", "target", "solver", "value", "ci_low", "ci_high", "p"]
    table = pd.DataFrame(rows, columns=columns).assign(n=10)
    tested, lds, areas = validation_words(table)
    assert "supervised fine-tuning; it does not test scores through other losses" in tested
    assert "retraining is 0.30 (0.10 to 0.50), above random scores" in lds
    assert "not clearly above text similarity; best is gradient dot with 0.40; perfect" in lds
    assert lds.endswith("reach 0.70 (0.50 to 0.80), given the noise of retraining.\n\n")
    assert "curve of 0.80 (0.70 to 0.90)" in areas and "ceiling of 0.90" in areas
    table.loc[(table["test"] == "above_tfidf"), ["value", "p"]] = -0.1, 0.01
    assert "below text similarity" in validation_words(table)[1]
    table = table[table["solver"] != "noise ceiling"]
    assert validation_words(table)[1].endswith("with 0.40.\n\n")


def test_trade_offs_turn_every_change_so_that_more_is_worse():
    rows = [
        ("sft", "truthfulness", -0.1, -0.2, -0.05, 1.0),
        ("sft", "toxicity", -0.3, -0.4, -0.1, 1.0),
    ]
    found = trade_offs({"p": changes(rows, HEADLINE)}).set_index("vertical")
    found = found[["value", "ci_low", "ci_high"]]
    assert found.loc["truthfulness"].tolist() == pytest.approx([0.1, 0.05, 0.2])
    assert found.loc["toxicity"].tolist() == [-0.3, -0.4, -0.1]


def test_several_seeds_give_an_interval_over_runs():
    def run(change):
        rows = [("sft", v, change * HEADLINE[v].worse, -9, 9, 1.0) for v in HEADLINE]
        return changes(rows, HEADLINE)

    found = over_runs(trade_offs({"p": run(0.1), "p-seed1": run(0.2), "p-seed2": run(0.6)}))
    half = 4.302653 * np.std([0.1, 0.2, 0.6], ddof=1) / np.sqrt(3)
    assert found["vertical"].tolist() == list(HEADLINE) and found["n"].eq(3).all()
    for row in found.itertuples():
        expected = (0.3, 0.3 - half, 0.3 + half)
        assert (row.value, row.ci_low, row.ci_high) == pytest.approx(expected)


def test_runs_of_other_seeds_are_found_by_their_tables(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_TRUST_BUILD", raising=False)
    monkeypatch.setattr("rlhf_trust.ROOT", tmp_path)
    for name, file in (
        ("p", "x"),
        ("p-seed2", "trust_change.csv"),
        ("p-seed1", "trust_change.csv"),
        ("p-seed3", "x"),
        ("q-seed1", "trust_change.csv"),
    ):
        Build(name).path("tables", file).write_text("")
    assert list(runs_of_seeds(Build("p"))) == ["p", "p-seed1", "p-seed2"]
    for name, seed in (("p", 0), ("p-seed1", 1), ("p-seed2", 1)):
        Manifest(Build(name), "01-sft", {"seed": seed}).write()
    with pytest.raises(StudyError, match="p-seed2: has the same seed as p-seed1"):
        runs_of_seeds(Build("p"))


def test_readable_answers():
    rates = pd.DataFrame({"model": ["start", "sft"], "value": [0.25, 1.0]})
    rates = rates.merge(pd.DataFrame({"vertical": list(HEADLINE)}), "cross")
    rates = rates.merge(pd.DataFrame({"condition": ["main", "other"]}), "cross")
    table = readable_answers(rates.assign(metric="unparsable_rate", n=60))
    assert table["vertical"].tolist() == list(HEADLINE)
    assert table["start"].eq(0.75).all() and table["sft"].eq(0.0).all() and table["n"].eq(60).all()


def test_what_a_report_needs_is_what_was_run(tmp_path, monkeypatch):
    of_evaluation, of_study = {"trust", "trust_change"}, {"training", "checks"}
    assert needed_tables(["12-ethics", "15-distance", "40-rag-trust"]) == of_evaluation
    assert needed_tables(["01-sft", "12-ethics"]) == of_evaluation | of_study
    assert needed_tables(["04-dpo", "16-headline"]) == of_study | {"headline", "validity"}
    with pytest.raises(StudyError, match="no vertical has been measured"):
        needed_tables(["01-sft", "20-attribution"])
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    with pytest.raises(StudyError, match="no parts of (headline|validity)"):
        merge_study_tables(Build("p"), {"headline", "validity"})


def instruments(model, lows, n=60):
    """Rows of ``trust.csv``: each vertical's instrument at an interval from ``lows`` on."""
    rows = [
        {"vertical": v, "model": model, "metric": of.validity[0], "condition": of.validity[1]}
        | {"value": lows[v] + 0.1, "ci_low": lows[v], "ci_high": lows[v] + 0.2, "n": n, "seed": 0}
        for v, of in HEADLINE.items()
    ]
    return pd.DataFrame(rows)


def test_an_instrument_is_valid_above_its_own_chance_over_enough_items():
    lows = {vertical: 0.3 for vertical in HEADLINE}
    found = validity_of(pd.concat([instruments("start", lows), instruments("mine", lows, 7)]))
    assert found.query("model == 'start' and valid")["vertical"].tolist() == [
        "truthfulness",  # chance 0
        "privacy",  # 0.25; the others' is 0.5
    ]
    assert len(found) == 2 * len(HEADLINE) and not found.query("model == 'mine'")["valid"].any()


def test_single_checkpoints_make_a_headline_table():
    rows = [("second", "toxicity", 0.1, 0.0, 0.2, 0.9), ("first", "ethics", 0.1, 0.0, 0.2, 0.9)]
    rows += [("first", "toxicity", 0.3, 0.2, 0.4, 0.01)]
    lows = {vertical: 0.6 for vertical in HEADLINE}
    seen = [instruments(model, lows) for model in ("start", "first", "second")]
    for model, share in (("start", 0.9), ("first", 0.2), ("second", 1.0)):
        kept = {"vertical": "toxicity", "model": model, "metric": "kept_rate", "value": share}
        kept |= {"condition": HEADLINE["toxicity"].condition}
        seen += [pd.DataFrame([kept, kept | {"condition": "other", "value": 0.0}])]
    found = checkpoint_changes(pd.concat(seen), changes(rows, HEADLINE))
    assert list(zip(found["stage"], found["vertical"], found["change"])) == [
        ("first", "toxicity", 0.3),
        ("first", "ethics", 0.1),
        ("second", "toxicity", 0.1),
    ]
    assert found["compared"].tolist() == [0.2, 1.0, 0.9] and found["seeds"].eq(1).all()
    assert found["worse"].tolist() == [1, -1, 1] and found["baseline"].eq("start").all()


def test_conditions_are_those_of_the_verticals_chapters():
    parameters = {"model": "hub:a/b@1", "dtype": "auto", "prompt_format": "auto", "seed": 3}
    parameters |= {"benchmarks": "shipped", "trained": ["mine=path:x=1", "sft"]}
    made = {"parameters": parameters, "facts": {"dtype": "torch.bfloat16"}, "inputs": {"sft": "ab"}}
    later = {"parameters": parameters | {"trained": ["trust-aligned"]}, "facts": {}, "inputs": {}}
    how = conditions({"12-ethics": made, "50-lineage": later})
    assert how.others == {"mine": "path:x=1", "sft": "models/sft"}
    assert (how.start, how.dtype, how.seed) == ("hub:a/b@1", "bfloat16", 3)
    assert how.fingerprints == {"sft": "ab"}
    with pytest.raises(StudyError, match="nothing was compared"):
        conditions({"01-sft": made})


def test_no_p_is_not_a_small_one():
    assert [p_words(p) for p in (0.0123, 0.0001, NAN)] == ["0.012", "below 0.001", "–"]


def test_models_of_any_name_have_colours_of_their_own():
    names = ["start", "sft", "mine", "theirs", "mine"]
    first, second, third, fourth, again = map(colour, names)
    assert len({first, second, third, fourth}) == 4 and again == third


def arms_table(changes_by_row):
    """Rows of headline.csv: (stage, vertical, baseline) → change, low, high, p after Holm."""
    rows = []
    for (stage, vertical, baseline), (change, low, high, p_holm) in changes_by_row.items():
        row = {"stage": stage, "vertical": vertical, "baseline": baseline, "change": change}
        row |= {"ci_low": low, "ci_high": high, "p_holm": p_holm, "min_detectable": 0.1, "n": 60}
        rows.append(row | {"worse": HEADLINE[vertical].worse, "validity_high": NAN, "seeds": 3})
    return pd.DataFrame(rows)


def gates(failing=()):
    rows = [(v, "start", v not in failing) for v in HEADLINE]
    return pd.DataFrame(rows, columns=["vertical", "model", "valid"])


def test_only_a_clear_change_agrees_or_disagrees_with_the_paper():
    up, down, none = (0.2, 0.1, 0.3, 0.01), (-0.2, -0.3, -0.1, 0.01), (0.0, -0.1, 0.1, 1.0)
    unseen = "no clear change; 0.100 would be found in half to four fifths of such studies"
    unseen += ", before correction"
    found = {
        ("ppo", "ethics", "start"): up,  # less is worse: better, as in the paper
        ("ppo", "ethics", "placebo"): none,
        ("dpo", "ethics", "start"): down,
        ("ppo", "stereotype", "start"): up,
        ("ppo", "stereotype", "placebo"): up,
        ("ppo", "privacy", "start"): none,
        ("ppo", "truthfulness", "start"): down,
        ("ppo", "toxicity", "start"): (0.2, 0.1, 0.3, 0.2),  # not after Holm's correction
        ("dpo", "toxicity", "start"): up,
        ("sft", "ethics", "start"): up,
    }
    published = as_published(trust(), changes([("ppo", "stereotype", 0.1, -0.05, 0.2, 1.0)]))
    table = against_paper(arms_table(found), gates(["truthfulness"]), published)
    assert not table.isna().any(axis=None) and list(table["vertical"].unique()) == list(PAPER)
    here = table.set_index(["vertical", "stage"])["here"].to_dict()
    assert here == {
        ("ethics", "ppo"): "better, which agrees in sign, not shown to be by the preferences",
        ("ethics", "dpo"): "worse, which disagrees, not shown to be by the preferences",
        ("stereotype", "ppo"): "worse, which agrees in sign, by the preferences",
        ("truthfulness", "ppo"): "cannot be measured on this model",
        ("privacy", "ppo"): unseen,
        ("toxicity", "ppo"): unseen,
        ("toxicity", "dpo"): "worse, which disagrees, not shown to be by the preferences",
    }
    own = table.set_index(["vertical", "stage"])["as_published"]
    said = own["stereotype", "ppo"]
    assert said.startswith("agreement rate +0.100 (95 % interval -0.050 to +0.200, n = ")
    assert said.endswith("items); start's is 0.200")
    assert own["ethics", "dpo"] == "was not measured"
    unpublished = against_paper(arms_table(found), gates(), pd.DataFrame())
    assert unpublished["as_published"].eq("was not measured").all()
    said = paper_words(table)
    assert len(said) == 5 and "it cannot be measured on this model" in said[2]
