"""One decision of device, which TRL's trainers follow."""

from __future__ import annotations

import pytest
import torch
from rlhf_trust import models
from rlhf_trust.training import TrainConfig, trl_arguments
from trl import DPOConfig, RewardConfig, SFTConfig


@pytest.mark.parametrize(
    ("cuda", "apple", "wanted"),
    [
        (0, False, "cpu"),
        (0, True, "cpu"),  # it has no float64
        (1, False, "cuda:0"),
        (2, False, "cuda:0"),
    ],
)
@pytest.mark.parametrize("kind", [SFTConfig, RewardConfig, DPOConfig])
def test_device(monkeypatch, cuda, apple, wanted, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: apple)
    monkeypatch.setattr("transformers.training_args.is_torch_mps_available", lambda: apple)
    # accelerate asks the driver, which is not here.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert str(models.device()) == wanted
    if cuda:
        assert models.auto_dtype() == torch.float32
    arguments = trl_arguments(kind, TrainConfig(learning_rate=1e-3), 8)
    assert arguments.n_gpu == min(cuda, 1)
    assert arguments.use_cpu == (wanted == "cpu") and not arguments.bf16
    if not cuda:
        assert arguments.device == torch.device("cpu")
