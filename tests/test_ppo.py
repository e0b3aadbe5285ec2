"""PPO: each equation against a plain loop, the four roles of one backbone, and a planted reward
that must rise.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_tokenizer
from datasets import Dataset
from rlhf_trust import StudyError, decode, models
from rlhf_trust.align import ppo
from rlhf_trust.align.rollout import RewardModel, before_and_after, sample_answers
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.decode import Prompt
from rlhf_trust.models import LoRA
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

PROMPTS = [Prompt(f"p{i}", (f"what is {'the ' * (i % 4)}question {i}?",)) for i in range(12)]
HELD_OUT = [Prompt(f"h{i}", (f"is the answer {i} {'not ' * (i % 3)}wrong?",)) for i in range(48)]
QUICK = ppo.PPOConfig(
    steps=3, answers_per_step=8, max_new_tokens=6, minibatch=4, learning_rate=2e-3, seed=1
)


@pytest.fixture
def batch():
    """Four answers of up to five tokens with random numbers everywhere, padding included, where it
    must not matter.
    """
    torch.manual_seed(3)
    mask = (torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]).double()
    return mask, *(torch.randn(4, 5, dtype=torch.float64) for _ in range(4))


def write_adapters(base, directory):
    """A random SFT adapter and a random reward adapter with its head; leaves the backbone bare.

    The MLP is adapted too: in so small a model, attention alone can hardly make a token more
    likely.
    """
    targets = ["query_key_value", "dense_4h_to_h"]
    if "q_proj" in str(base.model):
        targets = ["q_proj", "v_proj", "down_proj"]
    for seed, name in enumerate(("sft", "reward")):
        wrapped = models.new_adapter(base, LoRA(4, 8, targets), seed=seed)
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if ".lora_B." in key:
                    parameter.normal_(std=0.1)
        head = torch.randn(1, base.model.config.hidden_size) if name == "reward" else None
        models.save_adapter(base, wrapped, directory / name, head=head)
        wrapped.unload()
    return directory / "sft", directory / "reward"


def run(base, directory, config, held_out=HELD_OUT, prompts=PROMPTS, reward_fn=None):
    sft, reward = write_adapters(base, directory)
    chat, reward = Chat(base.tokenizer, "chatml"), reward_fn or reward
    return ppo.train(base, chat, sft, reward, prompts, held_out, config, directory / "ppo")


def drawn(model, chat, prompts):
    keys = [prompt.id for prompt in prompts]
    answers = sample_answers(model, "policy", chat, prompts, keys, QUICK.decoding)
    return [answer for (answer,) in answers]


def load_roles(base, sft, reward, policy=None):
    """The backbone with the adapters that training has: the policy is ``sft`` if not given."""
    adapters = {"policy": policy or sft, "reference": sft, "reward": reward}
    return models.load_adapters(base, adapters, trainable=None if policy else "policy")


def values(curves, metric):
    return curves.loc[curves["metric"] == metric, "value"].tolist()


# --- equations ------------------------------------------------------------------------------------


def test_shaped_rewards_sum_to_score_minus_kl(batch):
    mask, policy, reference, _, _ = batch
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    rewards = ppo.kl_shaped_rewards(policy, reference, scores, mask, kl_coef=0.3)
    for row, length in enumerate([5, 3, 1, 4]):
        for t in range(5):
            expected = -0.3 * float(policy[row, t] - reference[row, t]) if t < length else 0.0
            expected += float(scores[row]) if t == length - 1 else 0.0
            assert float(rewards[row, t]) == pytest.approx(expected)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_sum_of_discounted_errors(batch, gamma, lam):
    mask, rewards, estimates, _, _ = batch
    advantages, returns = ppo.generalized_advantages(rewards, estimates, mask, gamma, lam)
    for row, length in enumerate([5, 3, 1, 4]):
        r, v = rewards[row, :length].tolist(), [*estimates[row, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
            assert float(advantages[row, t]) == pytest.approx(expected)
            assert float(returns[row, t]) == pytest.approx(expected + v[t])
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_without_bootstrap_returns_are_rewards_to_go(batch):
    """λ = γ = 1: whatever the values are, the return is the plain sum of what follows."""
    mask, rewards, estimates, _, _ = batch
    _, returns = ppo.generalized_advantages(rewards, estimates, mask, 1.0, 1.0)
    assert float(returns[3, 1]) == pytest.approx(float(rewards[3, 1:4].sum()))


def test_whitening_reads_only_tokens(batch):
    mask, x, _, _, _ = batch
    white = ppo.whiten(x, mask)
    tokens = white[mask.bool()]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-9)
    assert float(tokens.var(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert (white[~mask.bool()] == 0).all()
    assert torch.equal(ppo.whiten(torch.where(mask.bool(), x, 99.0), mask), white)
    assert (ppo.whiten(torch.full_like(x, 2.0), mask) == 0).all()


def test_policy_loss_equals_a_loop(batch):
    mask, new, old, advantages, _ = batch
    loss, clipped = ppo.policy_loss(new, old, advantages, mask, 0.2)
    terms, cut = [], []
    for row, t in mask.nonzero().tolist():
        ratio, a = float((new[row, t] - old[row, t]).exp()), float(advantages[row, t])
        terms.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
        cut.append((a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8))
    assert float(loss) == pytest.approx(-np.mean(terms))
    assert float(clipped) == pytest.approx(np.mean(cut))


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"),
    [
        (1.5, 1.0, False),
        (1.5, -1.0, True),
        (0.5, 1.0, True),
        (0.5, -1.0, False),
        (1.0, 1.0, True),
        (1.1, -1.0, True),
    ],
)
def test_clipping_takes_the_gradient_away_only_where_it_pays(ratio, advantage, moves):
    new = torch.tensor([[np.log(ratio)]], requires_grad=True)
    one = torch.ones(1, 1)
    loss, clipped = ppo.policy_loss(new, torch.zeros(1, 1), advantage * one, one, 0.2)
    loss.backward()
    assert float(new.grad) == pytest.approx(-ratio * advantage if moves else 0.0)
    assert float(clipped) == float(not moves)


def test_value_loss_equals_a_loop_and_holds_far_steps(batch):
    mask, new, old, returns, _ = batch
    terms = []
    for row, t in mask.nonzero().tolist():
        v, o, r = (float(x[row, t]) for x in (new, old, returns))
        terms.append(max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2))
    assert float(ppo.value_loss(new, old, returns, mask)) == pytest.approx(np.mean(terms) / 2)
    # On its way to 1, but already further than 0.2 from 0.
    value = torch.tensor([[0.9]], requires_grad=True)
    one = torch.ones(1, 1)
    ppo.value_loss(value, 0 * one, one, one).backward()
    assert float(value.grad) == 0.0


# --- groups of answers in place of a value function -----------------------------------------------


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_group_advantages_equal_a_loop(kind):
    returns = torch.tensor([1.0, 4.0, -2.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    found = ppo.group_advantages(returns, 3, kind)
    assert found.shape == (6, 1)
    for first in (0, 3):
        group = returns[first : first + 3].tolist()
        for i, own in enumerate(group):
            others = np.mean(group[:i] + group[i + 1 :])
            standard = (own - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
            wanted = own - others if kind == "rloo" else standard
            assert float(found[first + i]) == pytest.approx(wanted)


TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_group_losses_and_their_gradients_are_trls(tiny_llama, tmp_path, kind):
    """TRL samples and scores; on its answers, with a policy that has moved away from SFT before and
    from itself since, both have the same advantages, loss and gradient."""
    sft, _ = write_adapters(tiny_llama, tmp_path)
    model = models.load_adapters(tiny_llama, {"default": sft}, trainable="default")
    chat = Chat(tiny_llama.tokenizer, "chatml")
    config = dataclasses.replace(
        QUICK, advantage=kind, answers_per_prompt=4, kl_coef=0.3, clip_range=0.02
    )
    trainer, arguments = TRAINERS[kind]
    own = {"loss_type": "grpo"} if kind == "grpo" else {}
    own |= {"per_device_train_batch_size": 8, "num_generations": 4, "num_iterations": 2}
    arguments = arguments(
        str(tmp_path / "trl"),
        beta=config.kl_coef,
        epsilon=config.clip_range,
        max_completion_length=config.max_new_tokens,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        **own,
    )

    def shares(completion_ids, **_):
        return [float(np.mean([token < 100 for token in ids])) for ids in completion_ids]

    asked = [{"prompt": chat.prompt_text(prompt.turns)} for prompt in PROMPTS[:2]]
    rows = Dataset.from_list(asked)
    chat.tokenizer.padding_side = "left"
    trl = trainer(
        model, shares, args=arguments, train_dataset=rows, processing_class=chat.tokenizer
    )
    trl.model.train()
    trl.current_gradient_accumulation_steps = 1

    def move():
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_B.default" in name:
                    weight.add_(0.05 * torch.randn_like(weight))

    move()
    made = trl._generate_and_score_completions([row for row in asked for _ in range(4)])
    ids, masks = [], [made["prompt_mask"].bool(), made["completion_mask"].bool()]
    for prompt, completion, *kept in zip(made["prompt_ids"], made["completion_ids"], *masks):
        prompt, completion = prompt[kept[0]].tolist(), completion[kept[1]].tolist()
        ids.append(EncodedExample((*prompt, *completion), len(prompt)))
    batches = [range(len(ids))]
    reference, _, _ = ppo.token_pass(model, "ref", ids, batches, 2)
    old, mask, zeros = ppo.token_pass(model, "default", ids, batches, 2)
    returns = torch.tensor(shares([answer.answer_ids for answer in ids]))
    assert len(set(returns.tolist())) > 2
    returns = returns - (config.kl_coef * (old - reference).sum(1) if kind == "rloo" else 0)
    advantages = ppo.group_advantages(returns, 4, kind)
    torch.testing.assert_close(advantages.flatten(), made["advantages"], rtol=1e-3, atol=1e-3)
    move()
    model.set_adapter("default")
    theirs = trl.compute_loss(trl.model, made)
    batch = ppo.Minibatch(ids, old, reference, zeros, made["advantages"][:, None], zeros, 1.0)
    logps, mask = decode.token_logps(model, ids, 2)
    ours, clipped = ppo.group_loss(logps, mask, batch, config)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    assert abs(float(theirs)) > 1e-3 and 0 < float(clipped) < 1
    weights = list(models.lora_weights(model, "default").values())
    for own, other in zip(*(torch.autograd.grad(loss, weights) for loss in (ours, theirs))):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_without_a_value_function_the_policy_alone_is_trained(tiny_llama, tmp_path, kind):
    config = dataclasses.replace(QUICK, advantage=kind, answers_per_prompt=4)
    curves, answers = run(tiny_llama, tmp_path, config)
    assert values(curves, "value_loss") == [0, 0, 0] and config.name == kind.upper()
    assert values(curves, "kl")[0] == 0.0 and values(curves, "kl")[-1] != 0.0
    assert (before_and_after(answers)["kl_after"] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_groups_raise_a_planted_reward(tiny_llama, tmp_path, kind):
    config = dataclasses.replace(LEARN, advantage=kind, answers_per_prompt=8, kl_coef=0.0)
    _, answers = run(tiny_llama, tmp_path, config, reward_fn=planted)
    held_out = before_and_after(answers)
    gain = held_out["reward_after"] - held_out["reward_before"]
    assert gain.mean() > 0.1 and gain.mean() > 3 * gain.std() / np.sqrt(len(gain))


def test_groups_of_one_are_refused():
    with pytest.raises(StudyError, match="answers_per_prompt: must be 2 or more for GRPO"):
        ppo.PPOConfig(advantage="grpo")
    with pytest.raises(StudyError, match="advantage: must be one of gae, rloo, grpo, got 'a2c'"):
        ppo.PPOConfig(advantage="a2c")


def test_half_a_prompts_answers_are_refused():
    with pytest.raises(StudyError, match=r"answers_per_prompt \(4\), got 9"):
        ppo.PPOConfig(answers_per_step=9, answers_per_prompt=4)


# --- one backbone, four roles ---------------------------------------------------------------------


def test_ratio_starts_at_one_and_kl_at_zero(tiny, chat, tmp_path):
    """Bit for bit: the pass that trains gives the log-probabilities of the pass that was kept."""
    model = load_roles(tiny, *write_adapters(tiny, tmp_path))
    answers = drawn(model, chat, PROMPTS)
    batches = decode.batches_by_length([len(a) for a in answers], 5)
    old, mask, _ = ppo.token_pass(model, "policy", answers, batches, 2)
    reference, _, _ = ppo.token_pass(model, "reference", answers, batches, 2)
    assert torch.equal(old, reference)
    assert mask.sum(1).tolist() == [len(a.answer_ids) for a in answers]
    model.set_adapter("policy")
    for batch in batches:
        new, batch_mask = decode.token_logps(model, [answers[i] for i in batch], 2)
        assert new.requires_grad
        assert torch.equal(new.detach(), old[batch, : batch_mask.shape[1]])
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B.policy" in n).add_(0.1)
    assert not torch.equal(ppo.token_pass(model, "policy", answers, batches, 2)[0], old)
    assert torch.equal(ppo.token_pass(model, "reference", answers, batches, 2)[0], old)


def test_score_reads_the_end_token(tiny, chat, tmp_path):
    """A cut-off answer gets one; an answer that has it is read as it is."""
    sft, reward = write_adapters(tiny, tmp_path)
    head, model = models.load_reward_head(reward), load_roles(tiny, sft, reward)
    whole, cut = EncodedExample((5, 6, 7, 8, 2), 2), EncodedExample((5, 6, 7, 8), 2)
    scores = RewardModel(model, head, chat, batch_size=1)([cut, whole])
    assert float(scores[0]) == float(scores[1])
    alone = models.load_adapters(models.load_base(tiny.source, "float32"), {"reward": reward})
    by_whole, by_cut = (decode.rewards(alone, head, [some], 2).item() for some in (whole, cut))
    assert scores[1].item() == pytest.approx(by_whole, rel=1e-6)
    assert scores[1].item() != pytest.approx(by_cut, rel=1e-3)


def test_training_moves_the_policy_and_nothing_else(tiny, tmp_path, monkeypatch):
    untouched = {name: p.clone() for name, p in tiny.model.state_dict().items()}
    kept, save = {}, models.save_adapter

    def spy(base, model, *args, **more):
        if more.get("adapter") == "policy":
            kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        save(base, model, *args, **more)

    monkeypatch.setattr(models, "save_adapter", spy)
    run(tiny, tmp_path, QUICK)
    sft, reward, trained = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("sft", "reward", "ppo")
    )
    for key, weight in sft.items():
        name = key.replace(".weight", ".{}.weight")
        assert torch.equal(kept[name.format("reference")], weight)
        assert torch.equal(kept[name.format("reward")], reward[key])
        assert torch.equal(kept[name.format("policy")], trained[key])
        assert not torch.equal(trained[key], weight)
    assert all(torch.equal(p, untouched[name]) for name, p in tiny.model.state_dict().items())
    assert set(tiny.model.state_dict()) == set(untouched)  # no adapter left behind in the backbone
    # What was saved is what a later stage loads.
    policy = models.load_adapters(tiny, {"ppo": tmp_path / "ppo"})
    assert sum(".ppo." in name for name, _ in policy.named_parameters()) == len(trained)


def test_tables(tiny, tmp_path):
    config = dataclasses.replace(QUICK, evaluate_every=2)
    curves, answers = run(tiny, tmp_path, config)
    held_out = before_and_after(answers)
    assert list(curves.columns) == ["step", "metric", "value"]
    assert np.isfinite(curves["value"]).all()
    eval_history = curves[curves["metric"] == "held_out_reward"]
    assert eval_history["step"].tolist() == [0, 2, 3]
    assert values(curves, "held_out_kl")[0] == 0.0
    assert values(curves, "kl")[0] == 0.0 and values(curves, "kl")[-1] != 0.0
    per_step = "reward kl kl_coef entropy answer_length ended policy_loss value_loss clip_fraction"
    assert set(curves.loc[curves["step"] == 1, "metric"]) == set(per_step.split())
    assert held_out["id"].tolist() == [p.id for p in HELD_OUT]
    assert held_out["reward_before"].mean() == pytest.approx(eval_history["value"].iloc[0])
    assert held_out["reward_after"].mean() == pytest.approx(eval_history["value"].iloc[-1])
    assert (held_out["answer_before"] != held_out["answer_after"]).any()
    means = answers.groupby("step")["reward"].mean()
    assert means.tolist() == pytest.approx(eval_history["value"].tolist())
    assert answers.loc[answers["step"] == 2, "id"].tolist() == [p.id for p in HELD_OUT]


def test_held_out_numbers_can_be_had_from_the_files(tiny, chat, tmp_path):
    """Drawn and judged anew from the saved adapters: summed log-ratios and rewards, answer by
    answer.
    """
    _, eval_history = run(tiny, tmp_path, QUICK)
    held_out = before_and_after(eval_history)
    sft, reward = tmp_path / "sft", tmp_path / "reward"
    model = load_roles(tiny, sft, reward, policy=tmp_path / "ppo")
    answers = drawn(model, chat, HELD_OUT)
    assert held_out["answer_after"].tolist() == [chat.decode(a.answer_ids) for a in answers]
    sums = {}
    for adapter in ("policy", "reference"):
        model.set_adapter(adapter)
        sums[adapter], _ = decode.answer_logps(model, answers, pad=2)
    np.testing.assert_allclose(held_out["kl_after"], sums["policy"] - sums["reference"], atol=1e-5)
    scores = RewardModel(model, models.load_reward_head(reward), chat, batch_size=7)(answers)
    # In other batches.
    np.testing.assert_allclose(held_out["reward_after"], scores.numpy(), rtol=1e-5, atol=1e-4)


def test_first_whitened_surrogate_is_zero(tiny_llama, tmp_path):
    """One epoch, one minibatch: every ratio is 1 and whitened advantages average to 0, so the loss
    is 0.
    """
    curves, _ = run(tiny_llama, tmp_path, dataclasses.replace(QUICK, epochs=1, minibatch=8))
    assert values(curves, "policy_loss") == pytest.approx([0, 0, 0], abs=1e-6)
    assert values(curves, "clip_fraction") == [0, 0, 0]


def test_the_same_seed_gives_the_same_run(tiny_directories, tmp_path):
    def once(name, seed):
        base = models.load_base(f"path:{tiny_directories['llama']}", "float32")
        tables = run(base, tmp_path / name, dataclasses.replace(QUICK, seed=seed))
        return *tables, (tmp_path / name / "ppo" / "adapter_model.safetensors").read_bytes()

    first, second, other = once("a", 1), once("b", 1), once("c", 2)
    for one, two in zip(first[:2], second[:2]):
        pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert first[2] == second[2]
    assert first[2] != other[2]


# --- does it learn? -------------------------------------------------------------------------------


def planted(model):
    """Likes answers made of tokens below 100."""

    def reward_fn(answers):
        shares = [np.mean([token < 100 for token in answer.answer_ids]) for answer in answers]
        return torch.tensor(shares, dtype=torch.float32)

    return reward_fn


LEARN = dataclasses.replace(
    QUICK,
    steps=16,
    answers_per_step=64,
    max_new_tokens=3,
    minibatch=32,
    learning_rate=1e-2,
    max_kl=1e3,
)


# Gemma scales what a layer adds, whatever an adapter makes of it: tiny steps come to little there.
QUICK_LEARNERS = ("llama", "gpt_neox")


@pytest.mark.slow
@pytest.mark.parametrize("tiny", QUICK_LEARNERS, indirect=True)
def test_a_planted_reward_rises_and_the_kl_term_holds_it_back(tiny, tmp_path):
    loose, strict = (dataclasses.replace(LEARN, kl_coef=kl_coef) for kl_coef in (0.0, 3.0))
    free, eval_history = run(tiny, tmp_path, loose, reward_fn=planted)
    held_out = before_and_after(eval_history)
    tied, _ = run(tiny, tmp_path, strict, reward_fn=planted)
    gain = held_out["reward_after"] - held_out["reward_before"]
    assert gain.mean() > 0.1 and gain.mean() > 3 * gain.std() / np.sqrt(len(gain))
    assert values(tied, "held_out_kl")[-1] < 0.5 * values(free, "held_out_kl")[-1]


def test_the_value_head_learns_what_to_expect(tiny_llama, tmp_path):
    """Where all rollouts have the same score, values approach it and the value loss falls."""
    calls = []

    def constant_but_held_out(model):
        def reward_fn(answers):
            calls.append(len(answers))
            held_out = len(calls) == 1  # these set the unit, so they must differ
            return planted(model)(answers) if held_out else torch.full((len(answers),), 2.0)

        return reward_fn

    config = dataclasses.replace(LEARN, steps=8, value_learning_rate=1e-2, kl_coef=0.0)
    curves, _ = run(tiny_llama, tmp_path, config, reward_fn=constant_but_held_out)
    losses = values(curves, "value_loss")
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("of_prompt", [1, 4])
def test_scores_are_in_units_of_the_sft_model_and_truncated_answers_pay(
    tiny_llama, tmp_path, monkeypatch, of_prompt
):
    """And where a prompt is answered several times, each prompt's mean is taken off."""
    raw, shaped, answered, kls = [], [], [], []
    shape = ppo.kl_shaped_rewards

    def spy_reward(model):
        def reward_fn(answers):
            raw.append(planted(model)(answers) + torch.arange(len(answers)) / 100)
            answered.append(answers)
            return raw[-1]

        return reward_fn

    def spy_shape(policy_logps, reference_logps, scores, mask, kl_coef):
        shaped.append(scores)
        kls.append(float((policy_logps - reference_logps).sum(1).mean()))
        return shape(policy_logps, reference_logps, scores, mask, kl_coef)

    monkeypatch.setattr(ppo, "kl_shaped_rewards", spy_shape)
    config = dataclasses.replace(
        QUICK, steps=2, answers_per_step=48, missing_end_penalty=3.0, answers_per_prompt=of_prompt
    )
    curves, _ = run(tiny_llama, tmp_path, config, reward_fn=spy_reward)
    assert values(curves, "kl") == pytest.approx(kls) and kls[1] != 0.0
    before, *training, _ = raw  # held-out answers, one batch a step, held-out answers again
    cut = [torch.tensor([a.answer_ids[-1] != 2 for a in answers]) for answers in answered[1:-1]]
    assert len(training) == 2 and any((~c).any() for c in cut) and all(c.any() for c in cut)
    shift, scale = before.mean(), before.std(unbiased=False)
    for drawn_answers, scores, was_cut, got in zip(answered[1:-1], training, cut, shaped):
        wanted = (scores - shift) / scale - 3.0 * was_cut
        for first in range(0, len(wanted), of_prompt) if of_prompt > 1 else ():
            group = slice(first, first + of_prompt)
            assert len({a.input_ids[: a.answer_start] for a in drawn_answers[group]}) == 1
            wanted[group] = wanted[group] - wanted[group].mean()
        torch.testing.assert_close(got, wanted)


def test_a_relative_reward_takes_off_the_preferred_answers(tiny_llama, tmp_path, monkeypatch):
    raw, shaped = [], []
    shape = ppo.kl_shaped_rewards

    def by_length(model):
        def reward_fn(answers):
            raw.append(torch.tensor([float(len(a)) for a in answers]))
            return raw[-1]

        return reward_fn

    def spy_shape(policy_logps, reference_logps, scores, mask, kl_coef):
        shaped.append(scores)
        return shape(policy_logps, reference_logps, scores, mask, kl_coef)

    monkeypatch.setattr(ppo, "kl_shaped_rewards", spy_shape)
    chat = Chat(tiny_llama.tokenizer, "chatml")
    chosen = {p.id: chat.sequence(p.turns, "yes " * i) for i, p in enumerate(PROMPTS, start=1)}
    config = dataclasses.replace(QUICK, steps=1)
    sft, reward = write_adapters(tiny_llama, tmp_path)
    out = tmp_path / "ppo"
    ppo.train(tiny_llama, chat, sft, by_length, PROMPTS, HELD_OUT, config, out, chosen)
    before, answers, preferred = raw[:3]
    assert len(set(preferred.tolist())) > 1
    wanted = (answers - preferred) / before.std(unbiased=False)
    torch.testing.assert_close(shaped[0], wanted)


@pytest.mark.slow
def test_a_bandit_comes_to_the_known_optimum(tmp_path):
    """One prompt, answers of one token, a reward by token: the objective's maximum is π ∝ π_sft ·
    exp(reward / β).

    The model's hidden states have more dimensions than there are tokens, so that it can become any
    policy.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    size = dict(vocab_size=len(tokenizer), hidden_size=384, intermediate_size=32)
    size |= dict(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    size |= dict(eos_token_id=2, bos_token_id=1, pad_token_id=2, tie_word_embeddings=False)
    wide = LlamaForCausalLM(LlamaConfig(**size))
    with torch.no_grad():
        wide.lm_head.weight.normal_(std=0.1)
    wide.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    base = models.load_base(f"path:{tmp_path / 'wide'}", "float32")
    beta, prompt = 2.5, [Prompt("p", ("?",))]
    reward = torch.tensor([0.0, 0.5, 1.0]).repeat(100)  # three arms, dealt out over the tokens

    def reward_fn(model):
        return lambda answers: reward[[a.answer_ids[0] for a in answers]]

    config = ppo.PPOConfig(
        steps=80,
        answers_per_step=256,  # with 128 the noise of sampling, and so the processor, decides
        max_new_tokens=1,
        minibatch=256,
        epochs=2,
        learning_rate=1.5e-3,
        value_learning_rate=3e-2,
        kl_coef=beta,
        max_kl=1e3,
    )
    held_out = [dataclasses.replace(prompt[0], id=f"h{i}") for i in range(48)]
    _, eval_history = run(base, tmp_path, config, held_out, prompt, reward_fn)
    unit = eval_history.loc[eval_history["step"] == 0, "reward"].std(ddof=0)  # of kl_coef
    model = models.load_adapters(base, {"sft": tmp_path / "sft", "ppo": tmp_path / "ppo"})
    ids = torch.tensor([Chat(base.tokenizer, "chatml").prompt_ids(prompt[0].turns)])
    shares = {}
    for name in ("sft", "ppo"):
        model.set_adapter(name)
        with torch.no_grad():
            shares[name] = model(input_ids=ids).logits[0, -1].double().softmax(-1)

    def distance(price):
        """Of what PPO found to the optimum at another price of a nat, summed by arm."""
        optimum = shares["sft"] * torch.exp(reward / (price * unit))
        arms = (shares["ppo"] - optimum / optimum.sum()).view(100, 3).sum(0)
        return float(arms.abs().sum() / 2)

    own, *others = (distance(factor * beta) for factor in (1, 1 / 3, 3, 1e6))  # 1e6: stays at SFT
    assert own < 0.6 * min(others), (own, others)


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", ["score", "one held-out score", "constant scores", "learning_rate", "max_kl"]
)
def test_a_run_that_goes_astray_stops_in_one_line(tiny_llama, tmp_path, trouble):
    config, reward_fn, calls = QUICK, None, []
    if trouble == "score":

        def broken(answers):
            calls.append(1)
            return torch.arange(float(len(answers))) * (float("nan") if len(calls) > 2 else 1.0)

        def reward_fn(model):
            return broken

        pattern = "^8 of 8 rewards are not finite; look at the training curve in 02-reward"
    elif trouble == "one held-out score":

        def reward_fn(model):
            return lambda answers: torch.tensor([float("nan"), *range(1, len(answers))])

        pattern = f"^1 of {len(HELD_OUT)} rewards are not finite"
    elif trouble == "constant scores":

        def reward_fn(model):
            return lambda answers: torch.ones(len(answers))

        pattern = f"^the rewards of all {len(HELD_OUT)} held-out .* alike .* at the reward model$"
    elif trouble == "learning_rate":
        config = dataclasses.replace(QUICK, learning_rate=1e30)
        pattern = "^(PPO )?step [01]: .*nan.*; lower learning_rate"
    else:
        config = dataclasses.replace(QUICK, learning_rate=0.1, max_kl=0.01, steps=6)
        pattern = r"^step \d: the KL to the SFT model is .* \(max_kl 0.01\); lower learning_rate"
    with pytest.raises(StudyError, match=pattern) as caught:
        run(tiny_llama, tmp_path, config, reward_fn=reward_fn)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ppo").exists()
    assert not any("lora" in name for name, _ in tiny_llama.model.named_parameters())


@pytest.mark.parametrize("stops_after", [1, 2])
def test_an_interrupted_run_carries_on_to_the_same_bytes(
    tiny_directories, tmp_path, monkeypatch, stops_after
):
    def once(name, config=QUICK):
        base = models.load_base(f"path:{tiny_directories['llama']}", "float32")
        tables, saved = run(base, tmp_path / name, config), tmp_path / name / "ppo"
        return *tables, (saved / "adapter_model.safetensors").read_bytes()

    whole, update, made = once("whole"), ppo.PPORun.update, []

    def counted(*args):
        if len(made) == stops_after:
            raise KeyboardInterrupt
        made.append(update(*args))
        return made[-1]

    with monkeypatch.context() as patched:
        patched.setattr(ppo.PPORun, "update", counted)
        with pytest.raises(KeyboardInterrupt):
            once("again")
    unfinished = tmp_path / "again" / "ppo.unfinished.pt"
    assert unfinished.is_file() and not (tmp_path / "again" / "ppo").exists()
    made.clear()
    monkeypatch.setattr(ppo.PPORun, "update", lambda *args: made.append(1) or update(*args))
    curves, eval_history, weights = once("again")
    assert len(made) == QUICK.steps - stops_after and not unfinished.exists()
    pd.testing.assert_frame_equal(curves, whole[0], check_exact=True)
    pd.testing.assert_frame_equal(eval_history, whole[1], check_exact=True)
    assert weights == whole[2]


def test_what_another_run_or_a_crash_left_is_not_carried_on(tiny_llama, tmp_path, monkeypatch):
    update, made = ppo.PPORun.update, []
    monkeypatch.setattr(ppo.PPORun, "update", lambda *args: made.append(1) or update(*args))
    unfinished = tmp_path / "ppo.unfinished.pt"
    unfinished.write_bytes(b"half a file")
    run(tiny_llama, tmp_path, QUICK)
    torch.save({"key": "another run", "step": 2}, unfinished)
    run(tiny_llama, tmp_path, QUICK)
    assert len(made) == 2 * QUICK.steps


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.ones(2, 32), "head.safetensors: has 2 labels; a reward model has one"),
        (torch.ones(1, 16), "head of 16 numbers for states of 32; run 02-reward again"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_before_anything_is_sampled(
    tiny_llama, tmp_path, weight, said
):
    sft, reward = write_adapters(tiny_llama, tmp_path)
    save_file({"weight": weight}, reward / "head.safetensors")
    chat, prompts = Chat(tiny_llama.tokenizer, "chatml"), (PROMPTS, HELD_OUT)
    with pytest.raises(StudyError, match=said):
        ppo.train(tiny_llama, chat, sft, reward, *prompts, QUICK, tmp_path / "ppo")
