"""Placebo arms: what they keep and lose, the same KL for both arms, and what is said of them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import some_examples
from rlhf_trust import StudyError, fan_out, models, training
from rlhf_trust.align import arms, inpo, ppo
from rlhf_trust.align.arms import PLACEBO, TRUE, Arm
from rlhf_trust.artifacts import Build, Manifest, sha256_of
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import PreferencePair, Preferences
from rlhf_trust.decode import Example, Prompt
from rlhf_trust.figures import headline as headline_figure
from rlhf_trust.headline import (
    arm_names,
    changes_of,
    compared_at,
    distance_words,
    gated,
    headline_table,
    headline_words,
    validity_table,
)
from rlhf_trust.models import LoRA
from rlhf_trust.stats import holm
from rlhf_trust.verticals import HEADLINE, contrast
from rlhf_trust.verticals.common import Measure
from scipy.stats import spearmanr

PAIRS = [
    PreferencePair(f"p{i}", (f"what is the question {i}?",), f"the answer {i}", "not", "helpful")
    for i in range(12)
]
PROMPTS = [Prompt(pair.id, pair.prompt) for pair in PAIRS]


def answers_to(prompt: int, count: int) -> list[EncodedExample]:
    """Different answers to one prompt, none of them alike any other prompt's."""
    return [EncodedExample((3, 4 + prompt, 5, 6 + 7 * i), 3) for i in range(count)]


def fake_rewards(seed: int = 0):
    """A reward function that gives each answer a random number of its own, and remembers it."""
    known, random = {}, np.random.default_rng(seed)

    def reward_fn(answers):
        return torch.tensor([known.setdefault(a, random.normal()) for a in answers])

    return reward_fn, known


# --- placebos -------------------------------------------------------------------------------------


def test_a_placebos_scores_are_a_prompts_own_in_another_order():
    truth, known = fake_rewards()
    answers = [answer for prompt in range(400) for answer in answers_to(prompt, 8)]
    scores = arms.shuffled(truth, seed=1)(answers).reshape(400, 8)
    true = torch.tensor([known[answer] for answer in answers]).reshape(400, 8)
    assert torch.equal(scores.sort(1).values, true.sort(1).values)
    agreement = [spearmanr(*rows).statistic for rows in zip(scores, true)]
    assert abs(np.mean(agreement)) < 3 / np.sqrt(400 * 7)
    assert torch.equal(arms.shuffled(truth, 1)(answers[::-1]).flip(0), scores.flatten())
    assert not torch.equal(arms.shuffled(truth, 2)(answers), scores.flatten())


def test_a_placebo_keeps_a_lone_answers_score_and_gives_equal_answers_one():
    truth, known = fake_rewards()
    lone, two = answers_to(0, 1), answers_to(1, 2)
    scores = arms.shuffled(truth, 0)([*lone, *two, *two]).tolist()
    assert scores[0] == pytest.approx(known[lone[0]]) and scores[1:3] == scores[3:5]


def test_a_tournament_of_a_placebo_has_no_favourite():
    """All matches of a round see one shuffled score an answer, and the truly best wins by luck."""
    truth, known = fake_rewards()
    fields = [(str(prompt), answers_to(prompt, 8)) for prompt in range(400)]
    matches = inpo.tournaments(fields, inpo.reward_oracle(arms.shuffled(truth, 3)))
    assert len(matches) == 400
    for (_, field), (_, best, worst) in zip(fields, matches):
        scores = dict(zip(field, arms.shuffled(truth, 3)(field).tolist()))
        assert (scores[best], scores[worst]) == (max(scores.values()), min(scores.values()))
    right = np.mean([known[best] > known[worst] for _, best, worst in matches])
    assert abs(right - 0.5) < 3 * 0.5 / np.sqrt(400)
    truly = inpo.tournaments(fields, inpo.reward_oracle(truth))
    assert all(known[best] > known[worst] for _, best, worst in truly)


@pytest.mark.parametrize("count", [40, 41])
def test_exactly_half_of_the_pairs_are_swapped(count):
    pairs = some_examples(count, 2)
    swapped = arms.swap_half(pairs, seed=0)
    turned = [one.sequences == two.sequences[::-1] for one, two in zip(pairs, swapped)]
    assert sum(turned) == count // 2
    assert [e.id for e in swapped] == [e.id for e in pairs]
    assert all(t or one == two for t, one, two in zip(turned, pairs, swapped))
    assert arms.swap_half(pairs, 0) == swapped != arms.swap_half(pairs, 1)


def test_a_placebo_teaches_no_length():
    random = np.random.default_rng(0)
    sizes = random.integers(5, 40, (160, 2))
    longer = sizes[:, 0] - sizes[:, 1]
    texts = [[EncodedExample((3,) * (2 + n), 2) for n in both] for both in sizes.tolist()]
    pairs = [Example(str(i), "helpful", tuple(both)) for i, both in enumerate(texts)]
    for seed in range(5):
        turned = [a.sequences != b.sequences for a, b in zip(pairs, arms.swap_half(pairs, seed))]
        assert abs(np.where(turned, -longer, longer).mean()) < 0.2 < longer.std() / np.sqrt(160)


# --- training -------------------------------------------------------------------------------------

SIZES = {"max_new_tokens": 5, "n_prompts_held_out": 12, "learning_rate": 5e-3, "seed": 4}
PARAMETERS = {
    "dpo": {
        "n_dpo": 8,
        "beta": 0.1,
        "batch_size": 4,
        "epochs": 2,
        "learning_rate": 0.02,
        "seed": 4,
    },
    "ppo": SIZES | {"steps": 2, "answers_per_step": 8, "answers_per_prompt": 4, "ppo_epochs": 1},
    "inpo": SIZES | {"rounds": 2, "prompts_per_round": 6, "answers_per_prompt": 4, "epochs": 1},
}


@pytest.fixture
def trainer(tiny_llama, tmp_path, monkeypatch):
    """A tiny study with a random SFT adapter and a random reward model."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    build, chat = Build("tiny"), Chat(tiny_llama.tokenizer, "chatml")
    save_random(tiny_llama, build.model("sft"), 0)
    save_random(tiny_llama, build.model("reward"), 1, torch.randn(1, 32))
    return arms.Trainer(tiny_llama, chat, build, Preferences(PAIRS, PAIRS), PARAMETERS)


def save_random(base, folder, seed, head=None):
    wrapped = models.new_adapter(base, LoRA(4, 8, ["q_proj", "v_proj", "down_proj"]), seed)
    for weight in models.lora_weights(wrapped, "default").values():
        torch.nn.init.normal_(weight, std=0.1)
    models.save_adapter(base, wrapped, folder, head=head)
    wrapped.unload()


def test_dpo_needs_no_reward_model(trainer):
    shutil.rmtree(trainer.reward)
    trainer.train(Arm("dpo", PLACEBO, 0))
    assert (trainer.build.model("arms/dpo-placebo-seed0") / training.NOTE).is_file()


def test_an_arm_is_trained_once_for_what_it_is_made_from(trainer, monkeypatch):
    calls = []
    real = arms.Trainer._train_dpo
    count = lambda self, arm, *more: calls.append(arm.name) or real(self, arm, *more)  # noqa: E731
    monkeypatch.setattr(arms.Trainer, "_train_dpo", count)
    true, placebo = Arm("dpo", TRUE, 1), Arm("dpo", PLACEBO, 1)
    for arm in (true, placebo, true, placebo, Arm("dpo", TRUE, 0)):
        trainer.train(arm)
    assert calls == ["dpo-seed1", "dpo-placebo-seed1"]
    assert not hasattr(trainer.base.model, "peft_config")
    folder = placebo.folder(trainer.build)
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / training.NOTE).unlink()  # as if interrupted before it was written
    trainer.train(placebo)
    assert calls[2:] == ["dpo-placebo-seed1"]
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    other = replace(trainer, parameters={"dpo": PARAMETERS["dpo"] | {"beta": 0.2}})
    other.train(true)
    save_random(trainer.base, trainer.sft, 5)
    trainer.train(placebo)
    assert calls[3:] == ["dpo-seed1", "dpo-placebo-seed1"]


@pytest.mark.slow
def test_another_process_trains_the_same_arms(trainer, monkeypatch):
    some = [Arm("dpo", TRUE, 0), Arm("dpo", PLACEBO, 0), Arm("ppo", TRUE, 1)]
    folders = [arm.folder(trainer.build) for arm in some[1:]]
    here = trainer.train_all(some)
    hashes = [sha256_of(folder) for folder in folders]
    shutil.rmtree(folders[0].parent)
    monkeypatch.setenv("EXECUTOR", "local")
    monkeypatch.setenv("JOBS", "2")
    monkeypatch.delenv(fan_out.PLACES, raising=False)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(fan_out, "compute", lambda *_: False)  # not here
        elsewhere.setattr(arms.Trainer, "_train_dpo", None)
        there = trainer.train_all(some)
    assert [sha256_of(folder) for folder in folders] == hashes
    assert there == pytest.approx(here, abs=0, nan_ok=True) and np.isfinite(there["ppo-seed1"])
    assert not trainer.build.path("jobs", "arms").exists()


@pytest.mark.parametrize("stage", ["ppo", "inpo"])
def test_the_trainers_shuffle_within_a_prompts_group(trainer, monkeypatch, stage):
    """What ppo.train and inpo.train hand to the reward in one call are all answers to a prompt."""
    calls, real = [], arms.shuffled

    def recording(reward_fn, seed):
        placebo = real(reward_fn, seed)

        def scores(answers):
            found = placebo(answers)
            calls.append((answers, reward_fn(answers), found))
            return found

        return scores

    monkeypatch.setattr(arms, "shuffled", recording)
    change = trainer.train(Arm(stage, PLACEBO, 0))
    assert np.isfinite(change)
    groups, held_out = [], 0
    for answers, true, found in calls:
        rows = pd.DataFrame({"prompt": [a.prompt_ids for a in answers], "true": true, "got": found})
        if not rows["prompt"].duplicated().any():
            assert torch.allclose(true, found)
            held_out += 1
            continue
        groups += [(len(part), part) for _, part in rows.groupby("prompt")]
    assert held_out == (2 if stage == "ppo" else 3)
    assert max(size for size, _ in groups) == 4 and len(groups) == (4 if stage == "ppo" else 12)
    moved = [not np.allclose(part["true"], part["got"]) for _, part in groups]
    assert np.mean(moved) > 0.5
    for _, part in groups:
        if part["true"].is_unique:
            np.testing.assert_allclose(sorted(part["true"]), sorted(part["got"]), rtol=1e-5)


def test_settings_are_the_stages_own_with_other_seeds(trainer):
    true, placebo = (trainer.config(Arm("ppo", kind, 2)) for kind in (TRUE, PLACEBO))
    assert true == placebo and isinstance(true, ppo.PPOConfig)
    assert (true.seed, true.epochs, true.evaluate_every) == (4 + 2000, 1, 0)
    assert trainer.config(Arm("dpo", TRUE, 0)).learning_rate == 0.02
    trainer.parameters = {"ppo": PARAMETERS["ppo"] | {"answers_per_prompt": 1}}
    with pytest.raises(StudyError, match="with one answer a prompt PPO has no placebo"):
        trainer.config(Arm("ppo", PLACEBO, 0))


@pytest.mark.parametrize("kind", [TRUE, PLACEBO])
def test_grpo_is_ppo_with_another_advantage(trainer, kind):
    trainer.parameters = {"ppo": PARAMETERS["ppo"], "grpo": PARAMETERS["ppo"]}
    arm = Arm("grpo", kind, 0)  # no chapter trains it
    assert not arm.is_stage and arm.name == f"grpo{'-placebo' * (kind == PLACEBO)}-seed0"
    ppos = trainer.config(Arm("ppo", kind, 0))
    assert trainer.config(arm) == replace(ppos, advantage="grpo") and ppos.advantage == "gae"
    assert np.isfinite(trainer.train(arm))
    assert (trainer.build.model(f"arms/{arm.name}") / training.NOTE).is_file()


def test_settings_come_from_the_stages_manifests(trainer):
    own = dict.fromkeys(arms.SHARED, 1)
    with pytest.raises(StudyError, match="no manifest of 04-dpo; run it first"):
        arms.stage_parameters(trainer.build, ["dpo"], own)
    Manifest(trainer.build, "04-dpo", own | {"beta": 0.3}).write()
    assert arms.stage_parameters(trainer.build, ["dpo"], own)["dpo"]["beta"] == 0.3
    with pytest.raises(StudyError, match="n_train: 04-dpo was run with another value, 1 there and"):
        arms.stage_parameters(trainer.build, ["dpo"], own | {"n_train": 2})


# --- distance -------------------------------------------------------------------------------------


@pytest.fixture
def network(trainer):
    """SFT, a far arm and a place for what lies between, on one tiny backbone."""
    trainer.train(Arm("dpo", TRUE, 1))
    sft = trainer.build.model("sft")
    folders = {"sft": sft, "between": sft, "far": Arm("dpo", TRUE, 1).folder(trainer.build)}
    return models.load_adapters(trainer.base, folders)


def kl_by_hand(network, arm: str, texts: list[EncodedExample]) -> float:
    """KL(SFT, arm) on what is scored of each text, one forward pass a text."""
    total = 0.0
    for text in texts:
        logps = []
        for adapter in ("sft", arm):
            with models.using(network, adapter), torch.no_grad():
                logits = network(torch.tensor([text.input_ids])).logits[0]
            logps.append(logits[text.answer_start - 1 : -1].double().log_softmax(-1))
        total += float((logps[0].exp() * (logps[0] - logps[1])).sum())
    return total / len(texts)


def test_kl_is_the_sum_over_tokens_and_vocabulary(network, trainer):
    answers = arms.sft_answers(network, trainer.chat, PROMPTS, seed=0)
    kl = arms.kl_to_sft(network, answers, 0)
    assert kl("sft") == kl("between") == 0
    wanted = kl_by_hand(network, "far", answers)
    assert kl("far") == pytest.approx(wanted, rel=1e-4) and kl("far") > 0.01


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_arm_is_brought_back_to_a_given_kl(network, trainer, share):
    answers = arms.sft_answers(network, trainer.chat, PROMPTS, seed=0)
    kl = arms.kl_to_sft(network, answers, 0)
    target = share * kl("far")
    alpha, found = arms.match(network, "far", "between", kl("far"), target, kl)
    assert 0 < alpha < 1 and found == kl("between") == pytest.approx(target, rel=arms.EXACT)
    ends = [models.snapshot(network, name) for name in ("sft", "far", "between")]
    for start, end, between in zip(*(weights.values() for weights in ends)):
        assert torch.allclose(between, (1 - alpha) * start + alpha * end, atol=1e-6)


def test_only_the_arm_that_moved_further_is_brought_back(trainer):
    everyone = arms.all_arms(["dpo"], 2)
    own = trainer.build.model("dpo")
    save_random(trainer.base, own, 7)
    for arm in everyone:
        trainer.train(arm)
    texts = contrast.documents(["what is it?", "the answer"], [("yes", "no")], trainer.chat)
    data = everyone, PAIRS, 0, {"plain": texts}
    found = arms.match_arms(trainer.base, trainer.chat, trainer.build, *data)
    trained, matched = found[found["alpha"] == 1], found[found["alpha"] < 1]
    assert trained["name"].tolist() == [arm.name for arm in everyone] and len(matched)
    for row in matched.itertuples():
        kls = trained[trained["seed"] == row.seed].set_index("arm")["kl"]
        assert kls.idxmax() == row.arm and row.kl == pytest.approx(kls.min(), rel=arms.EXACT)
        assert (trainer.build.model(f"arms/{row.name}") / "adapter_config.json").is_file()
    assert not hasattr(trainer.base.model, "peft_config")
    assert list(arm_names(found)) == ["sft", "dpo"]
    names = arm_names(found)["dpo"]
    at = compared_at(found).set_index(["stage", "baseline"])
    assert at.loc["sft", "start"].tolist() == [0, 1] and ("sft", "placebo") not in at.index
    assert at.loc["dpo", "start"].tolist() == [trained.query("arm == 'true'")["kl"].mean(), 1]
    assert names["true"] == ["dpo", "dpo-seed1"]
    both = names["matched_true"] + names["matched_placebo"]
    assert len(both) == 4 and set(matched["name"]) <= set(both)
    (said,) = distance_words(found)
    true = found[found["name"].isin(names["matched_true"])]
    assert f"compared at {true['kl'].mean():.2f} and " in said
    assert f"they lie {true['kl_plain'].mean():.3f} and " in said
    assert said.endswith(" (plain) nats a text from SFT.")
    network = models.load_adapters(trainer.base, {"sft": trainer.sft, "own": own})
    assert kl_by_hand(network, "own", texts) == pytest.approx(found["kl_plain"][0], rel=1e-4)


# --- words ----------------------------------------------------------------------------------------

NAMES = {
    "true": ["dpo", "dpo-seed1", "dpo-seed2"],
    "matched_true": ["dpo", "dpo-seed1", "dpo-seed2"],
    "matched_placebo": ["dpo-placebo-seed0", "dpo-placebo-seed1", "dpo-placebo-seed2"],
}
STEREOTYPE = HEADLINE["stereotype"]


def measures_of(true: float, placebo: float, validity: float = 0.9, items: int = 60, seed: int = 0):
    """Start, and three arms of each kind whose mean lies that far from start's, with noise."""
    random, found = np.random.default_rng(seed), {}
    level = random.normal(0, 0.3, items)
    shifts = {"start": 0.0} | dict.fromkeys(NAMES["true"], true)
    for name, shift in (shifts | dict.fromkeys(NAMES["matched_placebo"], placebo)).items():
        noise = 0 if name == "start" else random.normal(0, 0.05, items) + random.normal(0, 0.005)
        values = np.clip(level + shift + noise, -1, 1)
        known = (random.random(200) < validity).astype(float)
        ids = tuple(map(str, range(items)))
        found[name] = [
            Measure(STEREOTYPE.metric, STEREOTYPE.condition, ids, values, signed=True),
            Measure(*STEREOTYPE.validity, tuple(map(str, range(200))), known),
        ]
    return {"stereotype": found}


def words(measures, names=NAMES) -> str:
    validity = validity_table(measures, {"dpo": names})
    headline = headline_table(measures, {"dpo": names}, validity).assign(kl=1.25, alpha=0.6)
    (said,) = headline_words(headline, validity)
    return said


def test_a_planted_effect_of_the_preferences_is_found_against_the_placebo():
    worse, better = (words(measures_of(shift, 0.0)) for shift in (0.15, -0.15))
    assert worse.startswith("dpo, stereotype (net stereotype bias): **effect of the preferences, ")
    assert " preferences, worse**: +0.1" in worse and "n = 60 items, 3 seeds) against the" in worse
    assert "Against start +0.1" in worse and worse.endswith("3 seeds): worse.")
    assert " preferences, better**: -0.1" in better and better.endswith("3 seeds): better.")


def test_what_the_placebo_does_as_well_is_no_effect_of_the_preferences():
    said = words(measures_of(0.2, 0.2))
    assert "no clear effect of the preferences: " in said
    assert (
        "worse, an effect of the training (SFT included), not shown to be one of the pref" in said
    )
    neither = words(measures_of(0.0, 0.0))
    assert "no clear effect of the preferences: " in neither
    assert neither.endswith(": no clear change.")


def test_an_instrument_at_chance_allows_no_claim():
    said = words(measures_of(0.2, 0.0, validity=0.5))
    assert "cannot be measured on this model: on start consensus ROC area is 0." in said
    assert "n = 200 items)" in said and said.endswith("not above chance (0.5).")
    assert "effect" not in said and "Against" not in said
    broken = measures_of(0.2, 0.0)
    for name in NAMES["true"]:
        level, known = broken["stereotype"][name]
        broken["stereotype"][name] = [level, replace(known, values=known.values * 0.5)]
    said = words(broken)
    assert "cannot be measured after this training: on dpo consensus ROC area is 0.4" in said


def test_an_arm_brought_back_has_to_pass_too():
    names = NAMES | {"matched_true": ["matched0", "matched1", "matched2"]}
    measures = measures_of(0.2, 0.0)
    of = measures["stereotype"]
    for name, full in zip(names["matched_true"], names["true"]):
        level, known = of[full]
        of[name] = [level, replace(known, values=known.values * 0.5)]
    assert "cannot be measured after this training: on dpo-matched" in words(measures, names)


def test_a_harm_down_to_chance_is_a_harm():
    """The headline of truthfulness is its own validity: who loses it has got worse."""
    which, random, of = HEADLINE["truthfulness"], np.random.default_rng(0), {}
    level, ids = random.normal(0, 0.15, 60), tuple(map(str, range(60)))
    for name in ("start", *NAMES["true"], *NAMES["matched_placebo"]):
        above = level + random.normal(0, 0.05, 60) + 0.1 * (name not in NAMES["true"])
        of[name] = [Measure(which.metric, which.condition, ids, above, signed=True)]
    said = words({"truthfulness": of})
    assert "**effect of the preferences, worse**: -0." in said and said.endswith(": worse.")


def test_a_blunter_instrument_is_not_less_bias():
    """Bias falls against start and placebo alike, and so does what the instrument can tell."""
    blunt = measures_of(-0.2, 0.0)
    for name in NAMES["true"]:
        level, known = blunt["stereotype"][name]
        blunt["stereotype"][name] = [level, replace(known, values=known.values * 0.8)]
    said = words(blunt)
    assert "no clear effect of the preferences: -0.2" in said and "better" not in said
    assert said.count("the instrument itself tells less, -0.1") == 2


def test_one_arm_at_chance_is_enough_to_say_nothing():
    mixed = measures_of(0.2, 0.0)
    level, known = mixed["stereotype"]["dpo-seed1"]
    mixed["stereotype"]["dpo-seed1"] = [level, replace(known, values=known.values * 0.5)]
    assert "cannot be measured after this training" in words(mixed)


def test_the_sentence_says_at_which_distance_and_on_how_much():
    assert "KL to SFT (1.25 nats an answer, 60% or more of each arm's way)" in words(
        measures_of(0.2, 0.0)
    )
    sparse = measures_of(0.2, 0.0)
    for seed, name in enumerate(NAMES["true"]):
        level, known = sparse["stereotype"][name]
        values = np.where(np.arange(60) % 3 == seed, level.values, np.nan)
        sparse["stereotype"][name] = [replace(level, values=values), known]
    assert "only 33% of the answers comparable" in words(sparse)
    selected = measures_of(0.2, 0.0)
    for name, (level, known) in selected["stereotype"].items():
        kept = np.full(60, 0.25 if name in NAMES["matched_placebo"] else 0.75)
        rate = replace(level, metric="kept_rate", values=kept)
        selected["stereotype"][name] = [level, known, rate]
    against_placebo, against_start = words(selected).split("Against start")
    assert "only 25% of the answers comparable" in against_placebo
    assert "comparable" not in against_start


def test_one_seed_is_one_checkpoint_and_few_items_have_no_verdict():
    one = {key: names[:1] for key, names in NAMES.items()}
    said = words(measures_of(0.2, 0.0), one)
    assert "the two checkpoints differ (worse), by the preferences or by one training" in said
    assert "effect of the preferences" not in said
    assert "60 items, one checkpoint)" in said
    few = words(measures_of(0.2, 0.0, items=5))
    assert "no verdict: +0." in few and few.endswith("3 seeds): no verdict.")


def test_sft_is_one_checkpoint_against_start():
    """What SFT changed by itself stands beside what each stage changed against start."""
    measures, arms_of = measures_of(0.2, 0.2), {"sft": {"true": ["sft"]}, "dpo": NAMES}
    level, known = measures["stereotype"]["start"]
    random = np.random.default_rng(1)
    shifted = np.clip(level.values + 0.02 + random.normal(0, 0.05, 60), -1, 1)
    measures["stereotype"]["sft"] = [replace(level, values=shifted), known]
    validity = validity_table(measures, arms_of)
    assert {"sft", "dpo", "dpo-matched", "dpo-placebo"} < set(validity["model"])
    assert not validity["model"].str.startswith("sft-").any()
    table = headline_table(measures, arms_of, validity).assign(kl=1.25, alpha=0.6)
    own = table[table["stage"] == "sft"]
    assert own["baseline"].tolist() == ["start"] and own["seeds"].tolist() == [1]
    assert 0 < own["change"].item() < 0.05 and own["seed_sd"].isna().all()
    against_start = table[table["baseline"] == "start"]
    assert against_start["p_holm"].tolist() == holm(against_start["p"].to_numpy()).tolist()
    assert len(against_start) == 2
    told = changes_of(measures["stereotype"], arms_of, *STEREOTYPE.validity)
    columns = ["change", "ci_low", "ci_high"]
    of_validity = table[["validity_change", "validity_low", "validity_high"]]
    np.testing.assert_array_equal(told[columns], of_validity)
    sft, dpo = headline_words(table, validity)
    assert sft.startswith("sft, stereotype (net stereotype bias): no placebo. Against start +0.0")
    assert "one checkpoint): " in sft and "3 seeds)" in dpo and "one checkpoint" not in dpo
    figure = headline_figure(gated(table, validity))
    (axis,), (legend,) = figure.axes, figure.legends
    assert "over items and seeds" in " ".join(axis.get_xlabel().split())
    legend = [text.get_text() for text in legend.get_texts()]
    assert legend[2:] == ["sft (one checkpoint)", "dpo"]
    assert "seeds = 3)" in axis.get_yticklabels()[0].get_text()
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    (dot,) = [d for d in dots if d.get_xdata()[0] == own["change"].item()]
    assert dot.get_markerfacecolor() == "white" and len(dots) == 3
    measures["stereotype"]["sft"][1] = replace(known, values=known.values * 0.5)
    validity = validity_table(measures, arms_of)
    sft, dpo = headline_words(table, validity)
    assert "sft, stereotype: cannot be measured after this training: on sft consens" in sft
    assert "cannot" not in dpo


def test_placebo_against_placebo_is_rarely_called_an_effect():
    """200 studies of 36 items and 3 seeds, three stages each, whose seeds' spread differs (in units
    of the items': 0.1, 0.3 and 0.5). Small spreads alone give fewer false alarms than 5 %."""
    random, alarms, after_holm = np.random.default_rng(0), [], []
    ids, kinds = tuple(map(str, range(36))), (NAMES["true"], NAMES["matched_placebo"])
    all_valid = pd.DataFrame([("dpo", "stereotype", True)], columns=["model", "vertical", "valid"])
    for _ in range(200):
        tables = []
        for of_seeds in (0.01, 0.03, 0.05):
            level, found = random.normal(0, 0.3, 36), {}
            for name in ("start", *kinds[0], *kinds[1]):
                noisy = level + random.normal(0, 0.1, 36) + random.normal(0, of_seeds)
                measure = Measure(STEREOTYPE.metric, STEREOTYPE.condition, ids, noisy, signed=True)
                found[name] = [measure, Measure(*STEREOTYPE.validity, ids, np.full(36, 0.9))]
            tables.append(headline_table({"stereotype": found}, {"dpo": NAMES}, all_valid))
        p = pd.concat(tables).query("baseline == 'placebo'")["p"].to_numpy()
        alarms.append(p < 0.05)
        after_holm.append(holm(p).min() < 0.05)
    assert 0.03 <= np.mean(alarms) <= 0.07 and np.mean(after_holm) <= 0.07
