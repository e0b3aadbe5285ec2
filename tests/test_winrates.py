"""Win rates: hand counts, AlpacaEval's own numbers at equal length, judges of every kind, and
answers along the way from SFT."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cells, same
from rlhf_trust import ROOT, models, training
from rlhf_trust.align import arms
from rlhf_trust.align.rollout import RewardModel, sample_answers
from rlhf_trust.artifacts import Build, Manifest, read_manifests
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.decode import Decoding, Generations, Prompt
from rlhf_trust.models import LoRA
from rlhf_trust.rewards import rm_bench, winrates
from rlhf_trust.stats import crossed_change
from scipy.special import expit, logit

PROMPTS = [Prompt(f"p{i}", (f"what is question {i}?",)) for i in range(10)]
NUMBERS = {"tokens": 5, "ended": True, "kl": 1.0}


def answers(**of_methods) -> pd.DataFrame:
    """Rows as of ``sampled_answers``: method → [seeds][prompts] of (text, score)."""
    rows = []
    for method, seeds in of_methods.items():
        for seed, texts in enumerate(seeds):
            for i, (text, score) in enumerate(texts):
                about = {"method": method, "seed": seed, "share": 1.0, "id": f"p{i}"}
                rows.append(about | NUMBERS | {"answer": text, "reward": score})
    return pd.DataFrame(rows)


def scored(random, level: float, seeds: int, prompts: int = 40) -> list:
    """Answers of random lengths and scores around ``level``."""
    return [
        [("x" * random.integers(5, 90), level + random.normal()) for _ in range(prompts)]
        for _ in range(seeds)
    ]


# --- at equal length ------------------------------------------------------------------------------


def parity():
    path = ROOT / "tests" / "parity" / "alpaca_eval_lc.py"
    spec = importlib.util.spec_from_file_location("alpaca_eval_lc", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_win_rates_at_equal_length_are_alpaca_evals():
    """Kept from ``make parity``."""
    kept = parity()
    wanted = pd.read_csv(kept.REFERENCE).set_index("case")["win_rate"]
    found = {name: kept.ours(kept.annotations(name)) for name in kept.CASES}
    assert list(wanted.index) == list(found)
    assert list(found.values()) == pytest.approx(wanted.tolist(), abs=1e-3)
    raw = {name: kept.annotations(name)["won"].mean() for name in kept.CASES}
    assert raw["decided, longer"] - found["decided, longer"] > 0.05


def test_a_win_by_length_alone_is_none_at_equal_length():
    random = np.random.default_rng(0)
    longer = random.normal(-40, 40, 400)
    won = (random.random(400) < expit(-3 * np.tanh(longer / 40))).astype(float)
    predicted = winrates.length_controlled(won, longer, np.zeros(400))
    assert won.mean() > 0.7 and abs(predicted.mean() - 0.5) < 0.06
    flat = winrates.length_controlled(won, np.zeros(400), np.zeros(400))
    assert flat.mean() == pytest.approx(won.mean(), abs=0.01)


@pytest.mark.slow
def test_the_interval_at_equal_length_covers_also_where_the_penalty_hides_all():
    """Over draws of the prompts, in many of which all weights are drawn to 0."""
    random, covered, hidden = np.random.default_rng(1), [], 0
    for _ in range(40):
        longer = random.normal(-20, 40, 60)
        chance = expit(0.3 - 1.5 * np.tanh(longer / longer.std(ddof=1)))
        won = (random.random(60) < chance).astype(float)
        values = winrates._pseudo_values(won[None], longer[None], np.zeros(60))
        assert values.shape == (1, 60)
        predicted = winrates.length_controlled(won, longer, np.zeros(60))
        assert values.mean() == pytest.approx(predicted.mean())
        found = crossed_change(values, np.full(60, 0.5), None, (0.0, 1.0))
        covered.append(found.low < expit(0.3) - 0.5 < found.high)
        hidden += np.ptp(predicted) == 0 and predicted[0] == 0.5
        assert found.high - found.low > 0.2
    assert np.mean(covered) >= 0.9 and hidden >= 5


# --- win rates ------------------------------------------------------------------------------------


def test_win_rates_equal_a_count():
    texts = {"sft": [[("a", 0.0), ("b", 2.0), ("same", 1.0), ("d", 1.0)] * 3]}
    texts["dpo"] = [
        [("e", 1.0), ("f", 1.0), ("same", 9.0), ("g", 1.0)] * 3,
        [("e", 1.0), ("f", 3.0), ("h", 2.0), ("g", 0.0)] * 3,
    ]
    table = winrates.win_rates(answers(**texts), {"reward": winrates.by_score("reward")})
    raw = table[table["measure"] == "raw"].iloc[0]
    won = [[1, 0, 0.5, 0.5], [1, 1, 1, 0]]  # equal texts tie, whatever their scores
    assert (raw["model"], raw["baseline"], raw["n"], raw["seeds"]) == ("dpo", "sft", 12, 2)
    assert raw["value"] == pytest.approx(np.mean(won)) and raw["ties"] == 0.25
    lengths = [[len(t) for t, _ in some] for some in (*texts["dpo"], texts["sft"][0])]
    assert raw["longer"] == pytest.approx(np.mean(lengths[:2]) - np.mean(lengths[2]))


def test_a_better_model_wins_and_an_equal_one_does_not():
    random = np.random.default_rng(0)
    made = answers(start=scored(random, 0, 1), sft=scored(random, 0, 1), ppo=scored(random, 1.5, 3))
    table = winrates.win_rates(made, {"reward": winrates.by_score("reward")})
    assert len(table) == 6 and (table["n"] == 40).all()
    assert set(table["seeds"]) == {1, 3}
    by_pair = table.set_index(["measure", "model", "baseline"])
    assert (table["ci_low"] <= table["value"]).all() and (table["value"] <= table["ci_high"]).all()
    for measure in winrates.MEASURES:
        assert by_pair.loc[(measure, "ppo", "sft"), "ci_low"] > 0.6
        assert by_pair.loc[(measure, "ppo", "sft"), "p_holm"] < 0.05
        assert by_pair.loc[(measure, "sft", "start"), "ci_low"] < 0.5
    (said,) = winrates.words(table)
    assert said.startswith("By the reward, against sft over 40 prompts and 3 seeds: ppo ")
    assert said.endswith("better, not by length alone.")


def test_a_win_by_length_is_told():
    random = np.random.default_rng(0)

    def lengthy(least: int, seeds: int) -> list:
        sizes = random.integers(least, least + 60, (seeds, 60))
        return [[("x" * size, 0.0) for size in of] for of in sizes]

    def likes_length(first, second):
        longer = first["answer"].str.len().to_numpy() - second["answer"].str.len().to_numpy()
        return (random.random(len(longer)) < expit(3 * np.tanh(longer / 25))).astype(float)

    made = answers(sft=lengthy(20, 1), ppo=lengthy(45, 4), dpo=lengthy(45, 4))
    table = winrates.win_rates(made, {"judge": likes_length})
    raw, length = (table[table["measure"] == m].iloc[:2] for m in winrates.MEASURES)
    assert (raw["value"] > 0.65).all() and (raw["longer"] > 15).all()
    assert (abs(length["value"] - 0.5) < 0.08).all()
    against, among = winrates.words(table)
    assert against.endswith("better, which length may explain.") and "ppo" in against
    assert among == "By the judge, 0 of 1 pairs of methods differ."


def test_difficulty_comes_from_other_methods():
    won = {("sft", "start"): np.array([[1.0, 0.0]]), ("ppo", "start"): np.array([[1.0, 1.0]] * 2)}
    won["ppo", "sft"] = np.array([[0.0, 0.5]] * 2)
    found = winrates._difficulty(won, "ppo", "start")
    same(found, logit([1.5 / 2, 0.5 / 2]))
    same(winrates._difficulty(won, "start", "sft"), logit([0.5 / 3, 1.5 / 3]))
    same(winrates._difficulty({("a", "b"): np.zeros((1, 3))}, "a", "b"), np.zeros(3))


# --- judges ---------------------------------------------------------------------------------------


def two_sides() -> list[pd.DataFrame]:
    made = answers(one=[[("yes", 0.0)] * 10], two=[[("not wrong", 0.0)] * 10])
    return [rows for _, rows in made.groupby("method")]


def test_language_models_judge_by_implicit_reward(tiny_directories, tmp_path):
    one, two = (f"path:{tiny_directories[kind]}" for kind in ("llama", "gemma3_text"))
    chat = Chat(models.load_tokenizer(tiny_directories["llama"]), "chatml")
    judge = winrates.judge_of(one, two, "words", PROMPTS, chat, tmp_path)
    first, second = two_sides()
    found, back = judge(first, second), judge(second, first)
    scores = [
        rm_bench.policy_scores(one, [(p.turns, text) for p in PROMPTS], tmp_path / "more", two)
        for text in ("yes", "not wrong")
    ]
    same(found, (scores[0] > scores[1]).astype(float))
    same(found, 1 - back)


def test_a_judge_that_always_says_the_first_is_none(tiny_directories, tmp_path, monkeypatch):
    source = f"path:{tiny_directories['llama']}"
    chat = Chat(models.load_tokenizer(tiny_directories["llama"]), "chatml")
    judge = winrates.judge_of(source, "", "words", PROMPTS, chat, tmp_path)
    asked, words = [], [lambda text: r"It is \boxed{A>B}."]

    def answer(self, model, fingerprint, name, prompts, decoding):
        asked.extend(prompt.turns[0] for prompt in prompts)
        return [[words[-1](prompt.turns[0])] for prompt in prompts]

    monkeypatch.setattr(Generations, "answer", answer)
    first, second = two_sides()
    same(judge(first, second), np.full(10, 0.5))
    assert asked[0].index("yes") < asked[0].index("not wrong")
    assert asked[1].index("not wrong") < asked[1].index("yes")

    def likes_yes(text):  # wherever it stands, and says nothing about the first prompt
        better, other = "AB" if text.index("yes") < text.index("not wrong") else "BA"
        return "" if "question 0" in text else rf"\boxed{{{better}>>{other}}}"

    words.append(likes_yes)
    same(judge(first, second), [0.5] + [1.0] * 9)
    same(judge(second, first), [0.5] + [0.0] * 9)


def test_letters_are_read_in_both_orders(tiny_directories, tmp_path):
    source = f"path:{tiny_directories['llama']}"
    chat = Chat(models.load_tokenizer(tiny_directories["llama"]), "chatml")
    judge = winrates.judge_of(source, "", "letters", PROMPTS, chat, tmp_path)
    first, second = two_sides()
    found = judge(first, second)
    same(found, 1 - judge(second, first))
    assert ((0 < found) & (found < 1)).all()


# --- answers --------------------------------------------------------------------------------------


@pytest.fixture
def study(tiny_llama, tmp_path, monkeypatch):
    """A build with random adapters of SFT, two reward models, DPO, and GRPO's first seed."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    build = Build("tiny")
    names = ["sft", "reward", "judge", "dpo", "arms/grpo-seed0"]
    for seed, name in enumerate(names):
        wrapped = models.new_adapter(
            tiny_llama, LoRA(4, 8, ["q_proj", "v_proj", "down_proj"]), seed
        )
        for weight in models.lora_weights(wrapped, "default").values():
            torch.nn.init.normal_(weight, std=0.1)
        head = torch.randn(1, 32) if name in ("reward", "judge") else None
        models.save_adapter(tiny_llama, wrapped, build.model(name), head=head)
        wrapped.unload()
    return tiny_llama, Chat(tiny_llama.tokenizer, "chatml"), build


def test_answers_along_the_way(study):
    base, chat, build = study
    everyone = [arms.Arm("dpo", arms.TRUE, 0), arms.Arm("grpo", arms.TRUE, 0)]
    assert [arm.name for arm in everyone] == ["dpo", "grpo-seed0"]
    decoding, rewards = Decoding(6, 1.0), ["reward", "judge"]
    made = winrates.sampled_answers(base, chat, build, everyone, PROMPTS, [0.5], decoding, rewards)
    assert not hasattr(base.model, "peft_config")
    sizes = made.groupby(["method", "share"], sort=False).size()
    points = [("dpo", 0.5), ("dpo", 1.0), ("grpo", 0.5), ("grpo", 1.0)]
    assert list(sizes.index) == [("start", 1.0), ("sft", 1.0), *points] and (sizes == 10).all()
    at = {key: rows for key, rows in made.groupby(["method", "share"])}
    assert (at["sft", 1.0]["kl"] == 0).all() and at["start", 1.0]["kl"].isna().all()
    with models.adapted(
        base, {"grpo": everyone[1].folder(build)} | {name: build.model(name) for name in rewards}
    ) as network:
        ids = [prompt.id for prompt in PROMPTS]
        drawn = sample_answers(network, "grpo", chat, PROMPTS, ids, decoding)
        texts = [answer for (answer,) in drawn]
        assert at["grpo", 1.0]["answer"].tolist() == [chat.decode(t.answer_ids) for t in texts]
        for name in rewards:
            head = models.load_reward_head(build.model(name))
            score = RewardModel(network, head, chat, adapter=name)(texts)
            np.testing.assert_allclose(at["grpo", 1.0][name], score, rtol=1e-4, atol=1e-4)
    frontier = winrates.frontier_table(made, rewards)
    assert len(frontier) == 2 * 6 and (frontier["n"] == 10).all()
    own = frontier.set_index(["judge", "method", "share"])["score"]
    sft, dpo = at["sft", 1.0]["judge"], at["dpo", 0.5]["judge"]
    assert own["judge", "sft", 1.0] == pytest.approx(0, abs=1e-6)
    assert own["judge", "dpo", 0.5] == pytest.approx((dpo.mean() - sft.mean()) / sft.std(ddof=0))


def test_a_judge_is_trained_once(study, monkeypatch):
    base, chat, build = study
    pairs = [
        PreferencePair(f"j{i}", (f"what is {i}?",), "the answer is not wrong", "no", "helpful")
        for i in range(8)
    ]
    given = {"lora_rank": 4, "lora_alpha": 8, "target_modules": None, "lora_layers": "all"}
    given |= {"learning_rate": 1e-2, "batch_size": 4}
    trained, out = [], build.model("judge")
    real = training.train_reward
    monkeypatch.setattr(winrates, "train_reward", lambda *a: trained.append(a[3].seed) or real(*a))
    for seed in (1, 1, 2):
        winrates.train_judge(base, chat, pairs, given, 6, seed, out)
    assert trained == [1, 2] and not hasattr(base.model, "peft_config")
    with models.adapted(base, {"judge": out}) as network:
        head = models.load_reward_head(out)
        chosen, rejected = training.pair_rewards(network, head, chat, pairs).T
    assert (chosen > rejected).all()


@pytest.mark.slow
def test_the_chapter_compares_methods(study, tmp_path):
    """On a tiny model: both judges, every pair of methods, and what the report reads."""
    base, _, build = study
    shutil.rmtree(build.model("judge"))
    row = {"chosen": "the answer is not wrong", "rejected": "no"}
    lines = [json.dumps({"prompt": f"what is question {i}?"} | row) + "\n" for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    own = {"model": base.source, "dtype": "float32", "prompt_format": "chatml", "n_train": 12}
    own |= {"preferences": f"path:{tmp_path / 'pairs.jsonl'}", "n_held_out": 12, "max_length": 200}
    rollouts = {"n_prompts_held_out": 8, "max_new_tokens": 6, "learning_rate": 5e-3, "seed": 0}
    rollouts |= {"steps": 1, "answers_per_step": 8, "answers_per_prompt": 4, "ppo_epochs": 1}
    dpo = {"n_dpo": 8, "beta": 0.1, "batch_size": 4, "epochs": 1, "learning_rate": 0.01, "seed": 0}
    lora = {"lora_rank": 4, "lora_alpha": 8, "target_modules": None, "lora_layers": "all"}
    lora |= {"learning_rate": 1e-2, "batch_size": 4}
    for stage, more in (("02-reward", lora), ("03-ppo", rollouts), ("04-dpo", dpo)):
        Manifest(build, stage, own | {"seed": 0} | more).write()
    given = {"methods": ["dpo", "grpo"], "seeds": 2, "n_prompts": 12, "n_judge": 12}
    given |= {"shares": [0.5], "max_new_tokens": 6, "judge_epochs": 1, "n_samples": 1}
    chapter = run_cells("61-methods", profile="tiny", **own, **given)
    assert chapter["sampled"] == {"dpo": 0, "grpo": 8}
    assert "12 pairs, prefers the chosen answer in" in chapter["asked"]
    won, frontier = chapter["found"], chapter["frontier"]
    assert len(won) == 2 * 2 * 6 and set(won["judge"]) == {"reward", "judge"}
    assert (won.query("model == 'grpo' and baseline == 'dpo'")["seeds"] == 2).all()
    assert len(frontier) == 2 * (2 + 2 * 2 * 2)
    manifest = read_manifests(build)["61-methods"]
    assert manifest["facts"]["sampled"]["grpo"] == 8
    assert {"models/judge/head.safetensors", "tables/parts/winrate.61-methods.csv"} <= set(
        manifest["outputs"]
    )
