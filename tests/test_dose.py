"""Effects by the amount of pairs: nested amounts, kept trainings, what a trend is worth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from rlhf_trust import StudyError, dose, figures, models, training
from rlhf_trust.align import arms
from rlhf_trust.align.arms import PLACEBO, TRUE
from rlhf_trust.artifacts import NOTES, TABLES, Build, write_table
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.decode import Generations
from rlhf_trust.headline import arm_names, measure_all, validity_table
from rlhf_trust.models import LoRA, ModelSet
from rlhf_trust.params import NOTEBOOKS, notebook_parameters
from rlhf_trust.verticals import HEADLINE
from rlhf_trust.verticals.common import Measure

PAIRS = [
    PreferencePair(f"{half}{i}", (f"what is the {half} {i}?",), f"the answer {i}", "not", half)
    for half in ("helpful", "harmless")
    for i in range(10)
]
SETTINGS = {"beta": 0.1, "batch_size": 4, "epochs": 1, "learning_rate": 0.02, "seed": 4}
AMOUNTS = (30, 60, 120, 240)
ETHICS = HEADLINE["ethics"]


# --- sets and amounts -----------------------------------------------------------------------------


def test_a_larger_amount_contains_the_smaller_ones():
    sets = dose.preference_sets(PAIRS, {"mine": PAIRS[:4]})
    assert {name: len(pairs) for name, pairs in sets.items()} == {
        "harmless": 10,
        "helpful": 10,
        "all": 20,
        "mine": 4,
    }
    everyone = dose.dose_arms(sets, [0, 2, 4, 8, 16], seeds=2)
    assert len({arm.name for arm in everyone}) == len(everyone) == 2 * 2 * (3 + 3 + 4 + 2)
    chosen = {arm: dose.pairs_of(arm, sets, seed=0) for arm in everyone}
    for arm, pairs in chosen.items():
        assert len({pair.id for pair in pairs}) == arm.amount
        assert chosen[replace(arm, kind=PLACEBO)] == pairs
        if replace(arm, amount=arm.amount * 2) in chosen:
            assert pairs == chosen[replace(arm, amount=arm.amount * 2)][: arm.amount]
        halves = [pair.source for pair in pairs]
        if arm.subset == "all":
            assert halves.count("helpful") == halves.count("harmless")
    first, second = (chosen[dose.DoseArm("dpo", TRUE, s, "all", 8)] for s in (0, 1))
    assert first != second


def test_no_arm_has_more_pairs_than_there_are():
    NOTES.clear()
    everyone = dose.dose_arms(dose.preference_sets(PAIRS, {}), [0, 4, 12, 20], seeds=1)
    assert {arm.amount for arm in everyone if arm.subset == "helpful"} == {4}
    assert {arm.amount for arm in everyone if arm.subset == "all"} == {4, 12, 20}
    assert NOTES[0] == "harmless has 10 pairs: without 12 and 20 of them"
    assert "all: most of 12 and 20 of 20 pairs are the same under all seeds" in " ".join(NOTES)
    NOTES.clear()


def test_one_group_many_or_odd_ones_are_no_sets():
    assert list(dose.preference_sets(PAIRS[:10], {})) == ["all"]
    many = [replace(pair, source=f"group{i % 5}") for i, pair in enumerate(PAIRS)]
    assert list(dose.preference_sets(many, {"a": PAIRS})) == ["all", "a"]
    odd = [replace(pair, source=f"{pair.source}/../x") for pair in PAIRS]
    assert list(dose.preference_sets(odd, {})) == ["all"]


@pytest.mark.parametrize(
    ("amounts", "said"),
    [
        ([0, 60, 30], r"amounts: must rise, from 2 pairs on \(and may begin with 0\), got \[0, 60"),
        ([0, 30, 30], "amounts: must rise"),
        ([0], "amounts: must rise"),
        ([1, 4], "amounts: must rise, from 2 pairs on"),
        ([0, 8, 21], r"21 pairs are more than any set has \(harmless 10, helpful 10, all 20\)"),
    ],
)
def test_amounts_that_cannot_be_trained_are_refused(amounts, said):
    with pytest.raises(StudyError, match=said) as error:
        dose.dose_arms(dose.preference_sets(PAIRS, {}), amounts, seeds=1)
    assert "\n" not in str(error.value)


def test_parameters_that_cannot_be_are_refused():
    with pytest.raises(StudyError, match="also: 'helpful' is a set already; give it another name"):
        dose.preference_sets(PAIRS, {"helpful": PAIRS})
    declared = notebook_parameters(NOTEBOOKS / "60-dose.ipynb")
    for name, value, said in (
        ("seeds", 0, "seeds must be > 0, got 0"),
        ("amounts", [0, 30, 30], "amounts names '30' twice"),
        ("amounts", [-1], "amounts must be >= 0, got -1"),
        ("also", ["hub:a/b@main"], "also must be one of <name>=<source>, got"),
    ):
        with pytest.raises(StudyError, match=said):
            declared[name].check(value, "params/x.yaml: 60-dose")


# --- training and measuring -----------------------------------------------------------------------


@pytest.fixture
def study(tiny_llama, tmp_path, monkeypatch):
    """A tiny study with a random SFT adapter."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    build = Build("tiny")
    wrapped = models.new_adapter(tiny_llama, LoRA(4, 8, ["q_proj", "v_proj"]), 0)
    models.save_adapter(tiny_llama, wrapped, build.model("sft"))
    wrapped.unload()
    return tiny_llama, Chat(tiny_llama.tokenizer, "chatml"), build


def test_a_stopped_study_carries_on_to_the_same_bytes(study, monkeypatch):
    sets, calls = dose.preference_sets(PAIRS, {}), []
    everyone = dose.dose_arms(sets, [0, 4, 8], seeds=1)
    real = arms.Trainer._train_dpo
    note = lambda self, arm, *more: calls.append(arm) or real(self, arm, *more)  # noqa: E731
    monkeypatch.setattr(arms.Trainer, "_train_dpo", note)

    def run(some):
        dose.train_all(*study, sets, SETTINGS, some)
        weights = (arm.folder(study[2]) / "adapter_model.safetensors" for arm in everyone)
        return [path.read_bytes() if path.exists() else b"" for path in weights]

    whole = run(everyone)
    assert calls == everyone and len(set(whole)) == len(everyone)
    assert run(everyone) == whole and calls == everyone
    for arm in everyone[5:]:  # as if stopped within the sixth
        (arm.folder(study[2]) / training.NOTE).unlink()
    assert run(everyone[::-1]) == whole and calls[len(everyone) :] == everyone[:4:-1]
    dose.train_all(*study, sets | {"all": PAIRS[::2]}, SETTINGS, everyone[-1:])
    assert calls[-1] == everyone[-1] and run(everyone) == whole


def test_a_tiny_study_from_training_to_words(study, tmp_path):
    base, chat, build = study
    sets = dose.preference_sets(PAIRS, {"mine": PAIRS[:8]})
    everyone = dose.dose_arms(sets, [0, 4, 8], seeds=2)
    dose.train_all(*study, sets, SETTINGS, everyone)
    distances = dose.distances_of(*study, everyone, PAIRS[:3], 0)
    assert set(distances["name"]) >= {arm.name for arm in everyone}
    assert not hasattr(base.model, "peft_config")
    folders = {"sft": build.model("sft")}
    folders |= {name: build.model(f"arms/{name}") for name in distances["name"]}
    asked = Generations(tmp_path / "kept", chat), "shipped", {"ethics": 16}, 0
    measures = measure_all(ModelSet(base, folders), *asked)
    validity = validity_table(measures, arm_names(distances)).assign(valid=True)
    not_here = validity.head(1).assign(vertical="truthfulness", valid=False)
    validity = pd.concat([validity, not_here])
    changes = dose.change_table(measures, distances, validity)
    trend = dose.trend_table(measures, distances, changes, validity)
    found = {"dose": dose.value_table(measures, distances)}
    found |= {"dose_change": changes, "dose_trend": trend}
    read = {name: write_table(build, name, "60-dose", rows) for name, rows in found.items()}
    for name, table in read.items():
        assert list(table) == TABLES[name]
    values = read["dose"]
    assert values["amount"].value_counts()[0] == 2  # start and SFT, once
    assert values["alpha"].eq(1).sum() == len(everyone)
    rows = read["dose_change"].set_index(["subset", "amount", "arm", "baseline"]).sort_index()
    effect, true, placebo = (
        rows.loc[("mine", 8, *key), "change"].item()
        for key in ((TRUE, "placebo"), (TRUE, "sft"), (PLACEBO, "sft"))
    )
    assert effect == pytest.approx(true - placebo, abs=1e-5)
    slope = read["dose_trend"].query("subset == 'mine' and vertical == 'ethics'")
    small = rows.loc[("mine", 4, TRUE, "placebo"), "change"].item()
    assert slope["change"].iloc[0] == pytest.approx(effect - small, abs=1e-5)
    rivals = {"harmless less helpful", "harmless less mine", "helpful less mine"}
    assert set(read["dose_trend"]["subset"]) == {*sets, *rivals}
    lead, *said = dose.dose_words(read["dose_trend"], read["dose_change"])
    assert (
        "clearly grow with their amount in none of 4 combinations" in lead and "2 seeds" in said[0]
    )
    assert said[-1] == "truthfulness: cannot be measured on this model."
    assert figures.dose_curves(read["dose_change"]).axes


# --- what a trend is worth ------------------------------------------------------------------------


def distances_of(subsets=("all",), amounts=AMOUNTS, seeds=3) -> pd.DataFrame:
    rows = [
        (f"{subset}, {amount} pairs", kind, seed, 1.0, 1.0, arm.name, subset, amount)
        for subset in subsets
        for amount in amounts
        for kind in (TRUE, PLACEBO)
        for seed in range(seeds)
        for arm in [dose.DoseArm("dpo", kind, seed, subset, amount)]
    ]
    return pd.DataFrame(rows, columns="stage arm seed kl alpha name subset amount".split())


def measures_of(distances, effects, random, of_seeds=0.02, items=36):
    """Ethics' items of all arms; ``effects``: (set, amount) → what true arms have more. Seeds move
    all of a training's items at once, and items have levels of their own."""
    level = random.normal(0.7, 0.1, items)
    of = {"start": level, "sft": level}
    for row in distances.itertuples():
        more = effects.get((row.subset, row.amount), 0.0) if row.arm == TRUE else 0.0
        noise = random.normal(0, 0.06, items) + random.normal(0, of_seeds)
        of[row.name] = level + more + noise
    ids, condition = tuple(map(str, range(items))), ETHICS.condition
    return {"ethics": {name: [Measure(ETHICS.metric, condition, ids, v)] for name, v in of.items()}}


VALID = pd.DataFrame([("start", "ethics", True)], columns=["model", "vertical", "valid"])


def tables_of(distances, effects, seed=0, valid=VALID, **more):
    measures = measures_of(distances, effects, np.random.default_rng(seed), **more)
    changes = dose.change_table(measures, distances, valid)
    return dose.trend_table(measures, distances, changes, valid), changes


def growing(subset="all", step=-0.1, amounts=AMOUNTS):
    return {(subset, amount): step * i for i, amount in enumerate(amounts)}


def test_a_planted_effect_that_grows_is_found():
    trend, changes = tables_of(distances_of(), growing())
    slope = trend.iloc[0]
    assert slope["ci_low"] < -0.1 < slope["ci_high"] and slope["p_holm"] < 0.01
    lead, said = dose.dose_words(trend, changes)
    assert "clearly grow with their amount in 1 of 1 combinations" in lead
    assert "all, ethics (ROC area): **worse with more pairs**, -0.0" in said
    assert slope["clear_from"] in AMOUNTS[1:]
    assert said.endswith(f"the effect is clear from {slope['clear_from']:.0f} pairs on.")
    better = dose.dose_words(*tables_of(distances_of(), growing(step=0.1)))
    assert "**better with more pairs**, +0.1" in better[1]


def test_an_effect_of_one_size_is_clear_from_the_first_amount_and_does_not_grow():
    trend, changes = tables_of(distances_of(), dict.fromkeys(growing(), -0.3))
    lead, said = dose.dose_words(trend, changes)
    assert "in none of 1 combinations" in lead
    assert "no clear trend" in said and said.endswith("clear from 30 pairs on.")


def test_an_effect_that_fades_away_does_not_grow_though_its_last_sign_is_chance():
    effects = dict(zip(growing(), (0.3, 0.2, 0.1, -0.03)))
    trend, changes = tables_of(distances_of(), effects)
    lead, said = dose.dose_words(trend, changes)
    assert "clearly grow with their amount in none of 1 combinations" in lead
    assert "with more pairs**, though no effect is clear, " in said and "is not clear at" in said


def test_an_effect_that_shrinks_does_not_grow():
    fading = {("all", amount): -0.4 + 0.1 * i for i, amount in enumerate(AMOUNTS)}
    lead, said = dose.dose_words(*tables_of(distances_of(), fading))
    assert "in none of 1 combinations" in lead
    assert "**better with more pairs**, as an effect shrinks, +0.1" in said


def test_clear_from_needs_all_larger_amounts_and_one_sign():
    rows = pd.DataFrame({"amount": AMOUNTS, "worse": 1, "validity_high": np.nan})
    rows = rows.assign(ci_low=0.1, ci_high=0.2, p_holm=0.01)
    assert dose.clear_from(rows) == 30
    assert dose.clear_from(rows.assign(p_holm=[0.01, 0.2, 0.01, 0.01])) == 120
    assert np.isnan(dose.clear_from(rows.assign(p_holm=[0.01, 0.01, 0.01, 0.2])))
    turned = rows.assign(ci_low=[-0.2, -0.2, 0.1, 0.1], ci_high=[-0.1, -0.1, 0.2, 0.2])
    assert dose.clear_from(turned) == 120


def test_what_placebos_do_as_well_is_no_effect():
    """All arms get worse with the amount: the training does it, and not the preferences."""
    distances, random = distances_of(), np.random.default_rng(0)
    measures = measures_of(distances, {}, random)
    drift = {row.name: -0.1 * AMOUNTS.index(row.amount) for row in distances.itertuples()}
    of = measures["ethics"]
    of |= {n: [replace(of[n][0], values=of[n][0].values + more)] for n, more in drift.items()}
    changes = dose.change_table(measures, distances, VALID)
    slope = dose.trend_table(measures, distances, changes, VALID).iloc[0]
    assert slope["ci_low"] < 0 < slope["ci_high"] and np.isnan(slope["clear_from"])
    at_most = changes[changes["amount"] == 240].set_index("baseline")["change"]
    assert at_most["start"] < -0.25 and abs(at_most["placebo"]) < 0.1


def test_sets_are_compared_at_the_largest_amount_of_both():
    subsets = ("harmless", "helpful", "all", "mine")
    distances = distances_of(subsets)
    short = (distances["subset"] == "helpful") & (distances["amount"] > 60)
    effects = growing("harmless")
    trend, changes = tables_of(distances[~short], effects)
    others = trend[trend["contrast"] != dose.DOUBLING].set_index("subset")
    assert others["contrast"].to_dict() == {
        "harmless less helpful": "at 60 pairs",
        "harmless less mine": "at 240 pairs",
        "helpful less mine": "at 60 pairs",
    }
    assert others.loc["harmless less mine", "change"] == pytest.approx(-0.3, abs=0.1)
    lead = dose.dose_words(trend, changes)[0]
    assert "Another set of preferences: effects clearly differ" in lead
    assert "harmless less mine, ethics, at 240 pairs: -0." in lead
    lead = dose.dose_words(*tables_of(distances_of(("all", "mine")), {}))[0]
    assert "in none of 1 comparisons" in lead and "stand in" not in lead
    halves = distances_of(subsets[:3], amounts=(30, 60))
    lead = dose.dose_words(*tables_of(halves, {}))[0]
    assert "for which the groups of the pairs stand in: effects clearly differ between two" in lead
    assert "in none of 1 comparisons. Before Holm" in lead


def test_an_arm_that_cannot_be_measured_silences_its_set():
    gate = HEADLINE["privacy"]
    assert gate.validity != (gate.metric, gate.condition)
    distances, random = distances_of(("one", "all")), np.random.default_rng(0)
    measures = {"privacy": measures_of(distances, growing(), random)["ethics"]}
    for name, (level,) in measures["privacy"].items():
        level = Measure(gate.metric, gate.condition, level.item_ids, level.values, signed=True)
        found = np.full(36, 0.1) if name.startswith("dose-one-60-true-seed1") else np.ones(36)
        measures["privacy"][name] = [level, Measure(*gate.validity, level.item_ids, found)]
    validity = validity_table(measures, arm_names(distances))
    changes = dose.change_table(measures, distances, validity)
    trend = dose.trend_table(measures, distances, changes, validity)
    can = trend.groupby("subset")["measurable"].all()
    assert can.to_dict() == {"one": False, "all": True}
    lead, said, silent = dose.dose_words(trend, changes)
    assert "in 1 of 1 combinations" in lead and said.startswith("all, privacy")
    assert silent == "privacy: cannot be measured on arms of one."


def test_one_seed_is_about_single_checkpoints():
    lead, _ = dose.dose_words(*tables_of(distances_of(seeds=1), growing()))
    assert "With one seed, each is about single checkpoints." in lead


def test_one_amount_has_no_trend():
    trend, changes = tables_of(distances_of(amounts=(30,)), {})
    assert trend.empty
    assert dose.dose_words(trend, changes) == [
        "No trend over the amounts can be measured on this model."
    ]


def test_placebo_against_placebo_rarely_grows_and_a_planted_trend_is_often_found():
    """600 studies of 36 items, 3 seeds and four amounts, where what an amount does to an item is
    the same in both arms. Seeds' spreads are those of the headline's own test, in units of the
    items': 0.1, 0.3 and 0.5."""
    random, alarms, found = np.random.default_rng(0), [], []
    distances, ids = distances_of(), tuple(map(str, range(36)))
    _, _, true, placebo = dose.contrasts(distances)[0]
    x = np.log2(distances["amount"].to_numpy() / 30)
    which = ETHICS.metric, ETHICS.condition
    for study in range(600):
        of_seeds = (0.01, 0.03, 0.05)[study % 3]
        level = random.normal(0, 0.3, 36) + x[:, None] * random.normal(0.1, 0.1, 36)
        y = level + random.normal(0, 0.1, (len(x), 36)) + random.normal(0, of_seeds, (len(x), 1))
        more = 0.08 * x * distances["arm"].eq(TRUE)
        for p, values in ((alarms, y), (found, y + more.to_numpy()[:, None])):
            of = {n: [Measure(*which, ids, v)] for n, v in zip(distances["name"], values)}
            p.append(dose.contrast_of(of | {"start": [*of.values()][0]}, true, placebo, *which).p)
    assert 0.03 <= np.mean(np.array(alarms) < 0.05) <= 0.07
    assert np.mean(np.array(found) < 0.05) > 0.8
