"""The three TRL stages: what they train on, what DPO is compared with, what is saved; and that they
learn, or stop in one line."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from rlhf_trust import StudyError, models, training
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.models import LoRA
from rlhf_trust.training import (
    Curve,
    TrainConfig,
    dpo_trainer,
    held_out_loss,
    pair_logps,
    pair_rewards,
    run_trl,
    sft_trainer,
    train_dpo,
    train_reward,
    train_sft,
    training_order,
)
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, logsigmoid

PAIRS = [
    PreferencePair(
        f"p{i}",
        (f"what is {'the ' * (i % 3)}question {i}?",),
        f"the answer {'is ' * (i % 4)}not wrong",
        f"human {'user ' * (1 + i % 2)}{i}",
        "helpful",
    )
    for i in range(8)
]
ALL = TrainConfig(learning_rate=1e-2, batch_size=len(PAIRS), epochs=4, warmup=0.0)
# The MLP too: in so small a model, attention alone can hardly make a token more likely.
SHAPE = LoRA(4, 8, ("q_proj", "v_proj", "down_proj"))
BETA = 0.2
PAIR = ("chosen", "rejected")


@pytest.fixture
def load(tiny_directories):
    """Loads a backbone of the same weights, without adapters, each time."""
    return lambda: models.load_base(f"path:{tiny_directories['llama']}", "float32")


@pytest.fixture
def llama_chat(tiny_llama):
    return Chat(tiny_llama.tokenizer, "chatml")


def perturbed_sft(base, directory):
    """An SFT adapter far from the start model."""
    wrapped = models.new_adapter(base, SHAPE)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    models.save_adapter(base, wrapped, directory)
    return directory


def values(curve, metric):
    return curve.loc[curve["metric"] == metric, "value"].tolist()


def whole_batch(trainer):
    """All training rows as the trainer would feed them, in one batch."""
    return trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))


def in_training_order(pairs, chat, answers=("chosen",)):
    """The pairs as a trainer under ``ALL`` orders them."""
    lengths = [
        max(len(chat.sequence(p.prompt, getattr(p, answer))) for answer in answers) for p in pairs
    ]
    return [pairs[i] for i in training_order(lengths, ALL.batch_size, ALL.seed)]


def test_training_order_puts_like_lengths_together():
    lengths = [(7 * i) % 101 for i in range(43)]
    order = training_order(lengths, 8, seed=1)
    assert sorted(order) == list(range(43))
    batches = [sorted(lengths[i] for i in order[k : k + 8]) for k in range(0, 43, 8)]
    for one, other in zip(sorted(batches), sorted(batches)[1:]):
        assert one[-1] <= other[0]  # batches of lengths do not overlap
    assert len(batches[-1]) == 3 and batches != sorted(batches)
    assert training_order(lengths, 8, 1) == order != training_order(lengths, 8, 2)


# --- SFT ------------------------------------------------------------------------------------------


def test_sft_learns_answer_tokens_only(tiny_llama, llama_chat):
    """Labels are the answer with its end token, as tokenised for evaluation, and nothing else; the
    held-out loss is the mean cross-entropy over them."""
    trainer = sft_trainer(tiny_llama, llama_chat, PAIRS, ALL, SHAPE)
    batch, pairs = whole_batch(trainer), in_training_order(PAIRS, llama_chat)
    for ids, labels, attention, pair in zip(
        batch["input_ids"].tolist(),
        batch["labels"].tolist(),
        batch["attention_mask"].tolist(),
        pairs,
        strict=True,
    ):
        text = llama_chat.sequence(pair.prompt, pair.chosen)
        padding = len(ids) - len(text)
        assert ids[: len(text)] == list(text.input_ids)
        assert labels == [-100] * text.answer_start + list(text.answer_ids) + [-100] * padding
        assert attention == [1] * len(text) + [0] * padding
        assert labels[len(text) - 1] == llama_chat.tokenizer.eos_token_id
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], batch["attention_mask"]).logits
    plain = [cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, batch["labels"])]
    found = held_out_loss(trainer.model, llama_chat, pairs)
    np.testing.assert_allclose(found, plain, rtol=1e-4)


# --- the reward model -----------------------------------------------------------------------------


def test_trl_pools_the_token_that_we_read(tiny, chat, tmp_path, monkeypatch):
    """Also under padding, which a tokenizer with pad = end token would have it read one token too
    early; and the files hold the adapter and head that were trained."""
    trainers, make = [], training.reward_trainer
    monkeypatch.setattr(
        training, "reward_trainer", lambda *args: trainers.append(make(*args)) or trainers[0]
    )
    curve = train_reward(tiny, chat, PAIRS, ALL, LoRA(4, 8), tmp_path / "reward")
    # With a head of zeros no answer is preferred.
    assert values(curve, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    (trainer,) = trainers
    batch = whole_batch(trainer)
    with torch.no_grad():
        loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    # The collator puts all chosen before all rejected.
    theirs = outputs.logits.view(2, -1).T.numpy()
    assert (batch["attention_mask"] == 0).any()
    assert (batch["input_ids"] == chat.tokenizer.eos_token_id).any()

    saved = models.load_adapters(
        models.load_base(tiny.source, "float32"), {"reward": tmp_path / "reward"}
    )
    head = models.load_reward_head(tmp_path / "reward")
    pairs = in_training_order(PAIRS, chat, PAIR)
    ours = pair_rewards(saved, head, chat, pairs)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    margins = ours[:, 0] - ours[:, 1]
    assert margins.mean() > values(curve, "margin")[-1] > 0
    assert float(loss) == pytest.approx(float(-logsigmoid(torch.tensor(margins)).mean()), abs=1e-4)


# --- DPO ------------------------------------------------------------------------------------------


def test_the_reference_is_sft_before_and_after_training(tiny_llama, llama_chat, load, tmp_path):
    """What TRL subtracts, log π - reward/β, is the log-probability of the SFT adapter at every
    step, not the start's; in the end its loss is that of the saved adapter beside SFT's."""
    chat, directory = llama_chat, perturbed_sft(load(), tmp_path / "sft")
    start = pair_logps(tiny_llama.model, chat, PAIRS).mean(0)
    reference = pair_logps(models.load_adapters(load(), {"sft": directory}), chat, PAIRS).mean(0)
    assert np.abs(start - reference).min() > 0.5
    trainer = dpo_trainer(tiny_llama, chat, PAIRS, ALL, BETA, directory)
    logged = [f"{what}/{answer}" for what in ("logps", "rewards") for answer in PAIR]
    curve = run_trl(trainer, Curve("dpo", ("loss", *logged)))
    for answer, expected in zip(PAIR, reference):
        policy, rewards = values(curve, f"logps/{answer}"), values(curve, f"rewards/{answer}")
        assert len(policy) == ALL.epochs
        np.testing.assert_allclose(np.array(policy) - np.array(rewards) / BETA, expected, atol=2e-3)
        assert policy[0] == pytest.approx(expected, abs=2e-3) and abs(policy[-1] - policy[0]) > 0.1
    assert values(curve, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    # And the weights themselves: the reference is SFT still, the policy has left it.
    held = dict(trainer.model.named_parameters())
    for key, weight in load_file(directory / "adapter_model.safetensors").items():
        reference, policy = (
            held[key.replace(".weight", f".{name}.weight")] for name in ("ref", "default")
        )
        assert torch.equal(reference, weight) and not torch.equal(policy, weight)

    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(whole_batch(trainer))))
    models.save_adapter(tiny_llama, trainer.model, tmp_path / "dpo")
    model = models.load_adapters(load(), {"sft": directory, "dpo": tmp_path / "dpo"})
    logps = {}
    for name in ("sft", "dpo"):
        with models.using(model, name):
            logps[name] = pair_logps(model, chat, PAIRS)
    rewards = BETA * (logps["dpo"] - logps["sft"])
    margins = rewards[:, 0] - rewards[:, 1]
    assert margins.mean() > 0.05
    assert np.log1p(np.exp(-margins)).mean() == pytest.approx(loss, abs=1e-4)


# --- does it learn? -------------------------------------------------------------------------------


def train(stage, load, config, directory, pairs=PAIRS):
    """A stage from the start model (DPO: from an SFT adapter far from it) into ``out``."""
    base, out = load(), directory / "out"
    chat = Chat(base.tokenizer, "chatml")
    if stage == "dpo":
        sft = perturbed_sft(load(), directory / "sft")
        return base, train_dpo(base, chat, pairs, config, BETA, sft, out)
    run = {"sft": train_sft, "reward": train_reward}[stage]
    return base, run(base, chat, pairs, config, SHAPE, out)


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_a_tiny_set_can_be_learned_and_the_backbone_stays(load, tmp_path, stage):
    config = TrainConfig(learning_rate=2e-2, batch_size=4, epochs=10)
    base, curve = train(stage, load, config, tmp_path)
    losses = values(curve, "loss")
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.6 * np.mean(losses[:2])
    assert list(curve.columns) == ["stage", "step", "metric", "value"]
    assert set(curve["stage"]) == {stage}
    before = load().model.state_dict()
    after = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in base.model.state_dict().items()
        if ".lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    saved = {"adapter_model.safetensors", "adapter_config.json"}
    saved |= {"head.safetensors"} if stage == "reward" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == saved


LOSSES = {"sft": [6.261506, 6.428392, 5.743215], "dpo": [0.693147, 0.362660, 0.142024]}


@pytest.mark.parametrize("stage", LOSSES)
def test_training_has_not_changed(load, tmp_path, stage):
    """Losses of three steps as they were when this was written (transformers 5.23, TRL 1.16, torch
    2.13)."""
    config = TrainConfig(learning_rate=5e-3, batch_size=4, epochs=2)
    _, curve = train(stage, load, config, tmp_path, PAIRS[:6])
    assert values(curve, "loss")[:3] == pytest.approx(LOSSES[stage], abs=1e-4)


def test_a_loss_that_is_no_number_stops_in_one_line(load, tmp_path):
    config = TrainConfig(learning_rate=math.inf, batch_size=4, epochs=3, warmup=0.0)
    with pytest.raises(StudyError, match="^sft: (loss|grad_norm) is nan at step 2; lower") as error:
        train("sft", load, config, tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
