"""INPO: the game on a table against the paper's equations, tournaments, the loss by hand, and a
preference that must win.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from rlhf_trust import StudyError, models
from rlhf_trust.align import inpo
from rlhf_trust.align.rollout import RewardModel, before_and_after
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_pairs
from rlhf_trust.decode import Example, Prompt
from rlhf_trust.losses import INPOLoss, reference_logps
from scipy.optimize import minimize
from scipy.special import expit
from test_ppo import HELD_OUT, PROMPTS, QUICK_LEARNERS, planted, values, write_adapters

# 0 beats 1 beats 2 beats 0.
PREFERENCE = np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
REFERENCE = np.array([0.6, 0.3, 0.1])
QUICK = inpo.INPOConfig(
    rounds=2,
    prompts_per_round=6,
    answers_per_prompt=4,
    max_new_tokens=4,
    learning_rate=5e-3,
    batch_size=4,
    epochs=2,
    seed=1,
)


def run(base, directory, config, reward_fn=None, prompts=PROMPTS, held_out=HELD_OUT, oracle=None):
    sft, reward = write_adapters(base, directory)
    chat, out, reward = Chat(base.tokenizer, "chatml"), directory / "inpo", reward_fn or reward
    return inpo.train(base, chat, sft, reward, prompts, held_out, config, out, oracle)


# --- the game on a table --------------------------------------------------------------------------


FIRST_ROUNDS = [(0.7404, 0.1362, 0.1234), (0.7195, 0.0735, 0.2070), (0.6244, 0.0569, 0.3187)]


@pytest.mark.parametrize(
    ("tau", "eta", "rounds", "limit"),
    [
        (0.1, 0.3, FIRST_ROUNDS, (0.4927, 0.1541, 0.3531)),
        (0.1, 1.0, [(0.6506, 0.2410, 0.1084)], (0.4927, 0.1541, 0.3531)),
        (0.05, 1.0, [], (0.3880, 0.2084, 0.4036)),
    ],
)
def test_rounds_and_limit_of_a_game_of_three_answers(tau, eta, rounds, limit):
    policy = REFERENCE
    for wanted in rounds:
        policy = inpo.mirror_step(policy, REFERENCE, PREFERENCE, tau, eta)
        assert policy == pytest.approx(wanted, abs=1e-4)
    found = inpo.equilibrium(REFERENCE, PREFERENCE, tau)
    assert found == pytest.approx(limit, abs=1e-4)
    for _ in range(3000):
        policy = inpo.mirror_step(policy, REFERENCE, PREFERENCE, tau, eta)
    assert policy == pytest.approx(found, abs=1e-9)
    fixed = REFERENCE * np.exp(PREFERENCE @ found / tau)
    assert np.abs(fixed / fixed.sum() - found).max() < 1e-13


@pytest.mark.parametrize(("tau", "eta"), [(0.033, 0.1), (0.001667, 0.005)])
def test_rounds_at_a_small_constant_price_circle_round_the_equilibrium(tau, eta):
    """The default's prices, and the published ones."""
    found, policy, far = inpo.equilibrium(REFERENCE, PREFERENCE, tau), REFERENCE, []
    again = inpo.mirror_step(found, REFERENCE, PREFERENCE, tau, eta)
    assert again == pytest.approx(found, abs=1e-8)
    for _ in range(3000):
        policy = inpo.mirror_step(policy, REFERENCE, PREFERENCE, tau, eta)
        far.append(np.abs(policy - found).sum() / 2)
    assert min(far[-100:]) > 0.1


def test_the_loss_is_least_at_the_closed_form():
    """Over all pairs from π_2 and both outcomes of the coin, by its probability: what INPOLoss is
    the sample of.
    """
    tau, eta = 0.1, 0.3
    second = inpo.mirror_step(REFERENCE, REFERENCE, PREFERENCE, tau, eta)

    def loss(logits):
        log_policy = logits - np.logaddexp.reduce(logits)
        total = 0.0
        for winner, loser in np.ndindex(3, 3):
            both = [winner, loser]
            reference, current = ({"pair": np.log(p[both])} for p in (REFERENCE, second))
            mixed = inpo.mixed_reference(reference, current, tau, eta)["pair"]
            h = np.subtract(log_policy[both], mixed) @ (1, -1)
            chance = second[winner] * second[loser] * 2 * PREFERENCE[winner, loser]
            total += chance * (h - 1 / (2 * eta)) ** 2
        return total

    assert loss(np.log(second)) == pytest.approx(2.647064, abs=1e-6)
    found = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-10}).x
    third = inpo.mirror_step(second, REFERENCE, PREFERENCE, tau, eta)
    assert np.exp(found - np.logaddexp.reduce(found)) == pytest.approx(third, abs=1e-6)


def test_no_equilibrium_without_a_reference():
    with pytest.raises(StudyError, match="tau: only above 0"):
        inpo.equilibrium(REFERENCE, PREFERENCE, 0.0)


# --- from answers to pairs ------------------------------------------------------------------------


def answer(number: int) -> EncodedExample:
    return EncodedExample((1, 5, number, 2), 2)


def by_strength(strength, asked=None):
    """An oracle of answers made by :func:`answer`."""

    def oracle(matches):
        if asked is not None:
            asked.append(len(matches))
        gaps = [strength[a.input_ids[2]] - strength[b.input_ids[2]] for _, a, b in matches]
        return 0.5 + 0.5 * np.sign(gaps)

    return oracle


@pytest.mark.parametrize("k", [2, 4, 8])
def test_a_tournament_finds_best_and_worst_of_a_ranking(k):
    rng, asked = np.random.default_rng(k), []
    fields = [(f"p{i}", [answer(10 * i + j) for j in range(k)]) for i in range(5)]
    strength = rng.permutation(50)
    results = inpo.tournaments(fields, by_strength(strength, asked))
    for i, (key, best, worst) in enumerate(results):
        own = strength[10 * i : 10 * i + k]
        assert key == f"p{i}"
        assert (best, worst) == (answer(10 * i + own.argmax()), answer(10 * i + own.argmin()))
    # In step, not one by one.
    assert sum(asked) == 5 * {2: 2, 4: 5, 8: 11}[k] and len(asked) == {2: 2, 4: 4, 8: 6}[k]


def test_a_pair_is_dropped_where_the_best_does_not_beat_the_worst():
    field = [("p", [answer(i) for i in range(4)])]
    assert inpo.tournaments(field, by_strength([1, 1, 1, 1])) == []
    # 3, the worst, beats 0, the best.
    rock = {(0, 1): 1.0, (2, 3): 1.0, (0, 2): 1.0, (1, 3): 1.0, (0, 3): 0.4}

    def oracle(matches):
        return np.array([rock[a.input_ids[2], b.input_ids[2]] for _, a, b in matches])

    assert inpo.tournaments(field, oracle) == []
    rock[0, 3] = 0.6
    assert inpo.tournaments(field, oracle) == [("p", answer(0), answer(3))]


def test_coins_fall_as_the_oracle_says():
    fields = [(f"p{i}", [answer(0), answer(1)]) for i in range(4000)]
    results = inpo.coin_tosses(fields, lambda matches: np.full(len(matches), 0.7), seed=0)
    firsts = [winner == answer(0) for _, winner, loser in results if winner != loser]
    assert len(firsts) == 4000 and np.mean(firsts) == pytest.approx(0.7, abs=0.02)
    same = [("p", [answer(3), answer(3)])]
    assert inpo.coin_tosses(same, lambda matches: np.full(len(matches), 0.7), seed=0) == []


def test_the_reward_oracle_scores_every_answer_once():
    scored = []

    def reward_fn(answers):
        scored.extend(answers)
        return torch.tensor([float(a.input_ids[2]) for a in answers])

    oracle = inpo.reward_oracle(reward_fn)
    found = oracle([("p", answer(3), answer(1)), ("p", answer(1), answer(3))])
    assert found == pytest.approx(expit([2, -2]))
    assert oracle([("p", answer(3), answer(4))]) == pytest.approx(expit([-1]))
    assert scored == [answer(3), answer(1), answer(4)]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    ],
)
def test_a_preference_model_is_asked_in_both_orders(tiny, chat, template):
    tiny.tokenizer.chat_template = template
    prompts = [Prompt("one", ("why?",)), Prompt("two", ("who?", "you", "why so?"))]
    matches = []
    for p in prompts:
        texts = "because", "no", "the question is not wrong"
        a, b, c = (chat.sequence(p.turns, text) for text in texts)
        matches += [(p.id, a, b), (p.id, b, a), (p.id, b, c)]
    oracle = inpo.preference_model_oracle(tiny, chat, prompts)
    found = oracle(matches)
    letter = [tiny.tokenizer(x, add_special_tokens=False).input_ids[0] for x in "AB"]

    def first_wins(turns, a, b):
        context = "".join(
            f"\n<turn> {role}\n {turn}" for role, turn in zip(("user", "assistant", "user"), turns)
        )
        text = f"[CONTEXT] {context}\n [RESPONSE A] {a} [RESPONSE B] {b} \n"
        text = text if template is None else f"<|im_start|>{text}<|im_end|><|im_start|>"
        with torch.no_grad():
            ids = tiny.tokenizer(text, return_tensors="pt").input_ids
            logits = tiny.model(ids).logits[0, -1].double()
        return torch.softmax(logits[letter], 0)[0].item()

    turns = {p.id: p.turns for p in prompts}
    for (key, *two), chance in zip(matches, found):
        a, b = (chat.decode(s.answer_ids) for s in two)
        wanted = (first_wins(turns[key], a, b) + 1 - first_wins(turns[key], b, a)) / 2
        assert chance == pytest.approx(wanted, abs=1e-4)
    assert found[0] + found[1] == pytest.approx(1) and len(set(found.round(5))) > 3
    assert (oracle(matches[:1]) == found[:1]).all()


# --- training -------------------------------------------------------------------------------------


def test_the_loss_by_hand(tiny, chat, tmp_path):
    sft, _ = write_adapters(tiny, tmp_path)
    model = models.load_adapters(tiny, {"policy": sft})
    pairs = [
        Example(f"e{i}", "test", tuple(chat.sequence(("why?",), text) for text in two))
        for i, two in enumerate((("because", "no"), ("the answer is not", "question")))
    ]
    reference = {"e0": (-3.0, -5.0), "e1": (-9.0, -1.0)}
    current = {"e0": (-4.0, -4.5), "e1": (-7.0, -2.0)}
    eta, tau = 0.2, 0.05
    found = INPOLoss(eta, inpo.mixed_reference(reference, current, tau, eta)).loss(model, pairs, 2)
    policy = reference_logps(model, "policy", pairs, 2)
    for pair, value in zip(pairs, found.tolist()):
        both = [logps[pair.id] for logps in (policy, reference, current)]
        now, sft, last = (winner - loser for winner, loser in both)
        h = now - tau / eta * sft - (eta - tau) / eta * last
        assert value == pytest.approx((h - 1 / (2 * eta)) ** 2, rel=1e-4)
    assert inpo.mixed_reference(reference, current, 0.0, eta) == current


@pytest.mark.slow
@pytest.mark.parametrize("tiny", QUICK_LEARNERS, indirect=True)
@pytest.mark.parametrize("mode", ["paper", "theory"])
def test_what_the_oracle_likes_wins(tiny, tmp_path, mode):
    prompts = [Prompt(f"m{i}", (f"what is {'the ' * (i % 4)}question {i}?",)) for i in range(192)]
    sizes = dict(prompts_per_round=192, answers_per_prompt=2, batch_size=32)
    if mode == "paper":
        sizes = dict(prompts_per_round=64, answers_per_prompt=8, batch_size=16)
    sizes |= dict(rounds=4, max_new_tokens=3, learning_rate=2e-2, max_kl=1e3, eta=0.2, tau=0.05)
    config = dataclasses.replace(QUICK, mode=mode, **sizes)

    def reward_fn(model):
        return lambda answers: 20 * planted(model)(answers)

    curves, eval_history = run(tiny, tmp_path, config, reward_fn, prompts)
    held_out = before_and_after(eval_history)
    gain = (held_out["reward_after"] - held_out["reward_before"]) / 20
    assert gain.mean() > 0.05 and gain.mean() > 3 * gain.std() / np.sqrt(len(gain))
    assert np.mean(values(curves, "gap")) > 0.5 / (2 * config.eta)
    assert values(curves, "held_out_kl")[0] == 0.0


def test_pairs_are_kept_with_what_the_loss_needs(tiny, chat, tmp_path):
    """From the files alone: winners beat losers, and a round's reference is the SFT model mixed
    with the last round's policy, which a run of one round less leaves."""
    run(tiny, tmp_path, dataclasses.replace(QUICK, rounds=1))
    (tmp_path / "inpo").rename(tmp_path / "second")
    curves, eval_history = run(tiny, tmp_path, QUICK)
    evaluated = curves.loc[curves["metric"] == "held_out_kl", "step"]
    assert set(eval_history["step"]) == set(evaluated)
    pairs = load_pairs(tmp_path / "inpo")
    assert {p.round for p in pairs} == {1, 2} and len({p.id for p in pairs}) == len(pairs)
    dropped = curves[curves["metric"] == "dropped"].set_index("step")["value"]
    assert len(pairs) == pytest.approx(QUICK.prompts_per_round * (len(dropped) - dropped.sum()))
    adapters = {name: tmp_path / name for name in ("sft", "reward", "inpo", "second")}
    model = models.load_adapters(tiny, adapters)
    reward_fn = RewardModel(model, models.load_reward_head(tmp_path / "reward"), chat)
    share = QUICK.tau / QUICK.eta
    for number, current in ((2, "second"), (1, "sft")):
        of_round = [p for p in pairs if p.round == number]
        examples = [Example(p.id, "inpo", (p.winner, p.loser)) for p in of_round]
        logps = reference_logps(model, "sft", examples, 2)
        before = reference_logps(model, current, examples, 2)
        for pair in of_round:
            wanted = share * np.array(logps[pair.id]) + (1 - share) * np.array(before[pair.id])
            assert pair.reference == pytest.approx(wanted, abs=1e-4)
            assert float(reward_fn([pair.winner])) > float(reward_fn([pair.loser]))
    for pair in of_round:
        assert pair.winner.prompt_ids == pair.loser.prompt_ids
    loss = INPOLoss(QUICK.eta, {p.id: p.reference for p in pairs})
    assert loss.content(examples)[:2] == ["inpo", QUICK.eta]
    model.set_adapter("sft")
    found = loss.loss(model, examples, 2).detach()
    np.testing.assert_allclose(found, (1 / (2 * QUICK.eta)) ** 2, rtol=1e-3)
    with pytest.raises(StudyError, match=r"sft/pairs.jsonl: missing; run 05-inpo"):
        load_pairs(tmp_path / "sft")


def test_the_same_seed_gives_the_same_run_and_leaves_the_backbone_bare(tiny_directories, tmp_path):
    def once(name, seed):
        base = models.load_base(f"path:{tiny_directories['llama']}", "float32")
        tables = run(base, tmp_path / name, dataclasses.replace(QUICK, seed=seed))
        assert not any("lora" in n for n, _ in base.model.named_parameters())
        files = ("adapter_model.safetensors", "pairs.jsonl")
        return *tables, *((tmp_path / name / "inpo" / file).read_bytes() for file in files)

    first, second, other = once("a", 1), once("b", 1), once("c", 2)
    for one, two in zip(first[:2], second[:2]):
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert first[2:] == second[2:] and first[2] != other[2]


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tau": 0.2, "eta": 0.1}, "tau: must be between 0 and eta = 0.1, got 0.2"),
        ({"tau": -0.1}, "tau: must be between"),
        ({"answers_per_prompt": 1}, "must be 2, 4, 8"),
        ({"answers_per_prompt": 6}, "must be 2, 4, 8"),
        ({"mode": "theory"}, "must be 2 in theory mode, got 8"),
    ],
)
def test_wrong_settings(wrong, said):
    with pytest.raises(StudyError, match=said):
        inpo.INPOConfig(**wrong)


def test_a_run_that_goes_astray_stops_in_one_line(tiny_llama, tmp_path):
    with pytest.raises(StudyError, match="^inpo: no pair is left in round 1 of 6 prompts: no best"):
        run(tiny_llama, tmp_path, QUICK, oracle=lambda matches: np.full(len(matches), 0.5))
    alike = f"^the rewards of all {len(HELD_OUT)} held-out answers are alike"
    with pytest.raises(StudyError, match=alike):
        run(tiny_llama, tmp_path, QUICK, lambda model: lambda answers: torch.ones(len(answers)))

    def broken(answers):
        return torch.tensor([*range(1, len(answers)), float("nan")])

    with pytest.raises(StudyError, match="^1 of .* rewards are not finite"):
        run(tiny_llama, tmp_path, QUICK, lambda model: broken)
    with pytest.raises(StudyError, match=r"^step \d+: the KL .* lower learning_rate, or raise"):
        run(tiny_llama, tmp_path, dataclasses.replace(QUICK, learning_rate=0.3, max_kl=0.01))
    assert not (tmp_path / "inpo").exists()
    assert not any("lora" in name for name, _ in tiny_llama.model.named_parameters())
