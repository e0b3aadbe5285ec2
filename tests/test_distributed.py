"""Two processes: the trajectory of one, failures in one line, and trainings that were killed."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from rlhf_trust import StudyError, artifacts, distributed, study, training
from rlhf_trust.align import inpo, ppo
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_pairs
from rlhf_trust.distributed import launched
from rlhf_trust.models import LoRA, load_base
from rlhf_trust.training import TrainConfig, train_dpo, train_reward, train_sft, trl_arguments
from safetensors.torch import load_file
from test_inpo import QUICK as INPO
from test_ppo import HELD_OUT, PROMPTS, QUICK as PPO, write_adapters
from test_trajectories import some_pairs
from trl import SFTConfig

PAIRS = some_pairs()[:10]  # at batches of four the last is short
CONFIG = TrainConfig(learning_rate=1e-2, batch_size=4, micro_batch_size=4, epochs=2)
SHAPE = LoRA(4, 8, ("q_proj", "v_proj", "down_proj"))
STAGES = ("sft", "reward", "dpo", "ppo", "inpo")
TRL = STAGES[:3]


def train(stage: str, source: str, folder: Path, config: TrainConfig = CONFIG, **more):
    """One stage of the adapters in ``folder`` beside it: (curve, answers or None)."""
    base, out, sft, reward = load_base(source, "float32"), folder / stage, "sft", "reward"
    chat, (sft, reward) = Chat(base.tokenizer, "chatml"), (folder.parent / n for n in (sft, reward))
    sampled = base, chat, sft, reward, PROMPTS, HELD_OUT[:7]
    if stage == "ppo":
        return ppo.train(*sampled, PPO, out)
    if stage == "inpo":  # five prompts: shares of unlike size
        return inpo.train(*sampled, dataclasses.replace(INPO, prompts_per_round=5), out)
    if stage == "dpo":
        return train_dpo(base, chat, PAIRS, config, 0.2, sft, out, **more), None
    run = train_sft if stage == "sft" else train_reward
    return run(base, chat, PAIRS, config, SHAPE, out, **more), None


class Killed(Exception):
    pass


def interrupted(stage: str, source: str, folder: Path, at: int, **more):
    """The stage until just before its step ``at`` is counted."""
    step_end = training.Curve.on_step_end

    def until(self, args, state, control, **rest):
        if state.global_step == at:
            raise Killed
        step_end(self, args, state, control, **rest)

    training.Curve.on_step_end = until
    try:
        train(stage, source, folder, **more)
    except Killed:
        pass
    finally:
        training.Curve.on_step_end = step_end


def everything(source: str, folder: Path) -> dict:
    """All stages, and DPO once more in two parts."""
    found = {stage: train(stage, source, folder) for stage in STAGES}
    if distributed.size() > 1:
        again = folder.with_name("again")
        interrupted("dpo", source, again, at=4, save_steps=3)
        found["again"] = train("dpo", source, again, save_steps=3)
    return found


@pytest.fixture
def source(tiny_directories):
    return f"path:{tiny_directories['llama']}"


@pytest.fixture
def importable(monkeypatch):
    """This module, to the processes."""
    places = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.stem}.{name}": tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(source, tmp_path, importable):
    """Loss, gradient norm and all else that is measured to 2e-4 of its size (or 2e-4), the weights
    to a thousandth of the way that they went, and the same answers, in five trainings."""
    write_adapters(load_base(source, "float32"), tmp_path)
    one = everything(source, tmp_path / "one")
    two = launched(everything, source, tmp_path / "two", processes=2)
    start = weights(tmp_path / "sft")
    for stage in STAGES:
        (curve, answers), (other, other_answers) = one[stage], two[stage]
        keys = [name for name in curve.columns if name != "value"]
        pd.testing.assert_frame_equal(curve[keys], other[keys])
        np.testing.assert_allclose(
            other["value"], curve["value"], rtol=2e-4, atol=2e-4, err_msg=stage
        )
        steps = curve.loc[curve["metric"].isin(["loss", "policy_loss"]), "value"]
        assert np.ptp(steps) > 0.01
        if answers is not None:
            assert answers["answer"].tolist() == other_answers["answer"].tolist()
        ours, theirs = (weights(tmp_path / made / stage) for made in ("one", "two"))
        assert ours.keys() == theirs.keys()
        moved = [name for name in ours if "lora_B" in name or "head" in name]  # from 0, or SFT
        origin = dict.fromkeys(moved, 0.0) if stage in ("sft", "reward") else start
        way, apart = (
            math.sqrt(sum(float((ours[k] - of[k]).square().sum()) for k in moved))
            for of in (origin, theirs)
        )
        assert 0 < way and apart < 1e-3 * way, (stage, apart, way)
        assert not [*(tmp_path / "two").glob("*unfinished*")]
        assert any(path.parent == tmp_path / "two" / stage for path in artifacts.WRITTEN)
    pairs, others = (load_pairs(tmp_path / made / "inpo") for made in ("one", "two"))
    assert [(p.prompt_id, p.winner, p.loser) for p in pairs] == [
        (p.prompt_id, p.winner, p.loser) for p in others
    ]
    # Interrupted and resumed in two processes: to the bytes of two that were not.
    pd.testing.assert_frame_equal(two["again"][0], two["dpo"][0], check_exact=True)
    again, whole = (weights(tmp_path / made) for made in ("again/dpo", "two/dpo"))
    assert all(torch.equal(again[name], whole[name]) for name in whole)


# --- trouble --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ((load_base, "path:/none"), "^load_base in 2 processes: .*/none"),  # the study's own line
        ((signal.raise_signal, signal.SIGKILL), "^raise_signal in 2 .*SIGKILL"),
    ],
)
def test_a_process_that_fails_ends_in_one_line(call, said):
    with pytest.raises(StudyError, match=said) as error:
        launched(*call, processes=2)
    assert "\n" not in str(error.value)


def test_an_option_that_accelerate_has_not_ends_in_one_line():
    with pytest.raises(StudyError, match="processes: .*unrecognized arguments: --nothing"):
        launched(math.sqrt, 4, processes=2, options=["--multi_gpu", "--nothing"])


def test_processes_end_with_the_one_that_asked_for_them(tmp_path):
    code = (
        "from rlhf_trust.distributed import launched, time; launched(time.sleep, 600, processes=2)"
    )
    asking = subprocess.Popen([sys.executable, "-c", code])
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while len(started) < 3 and time.monotonic() < deadline:  # a launcher and two
            time.sleep(0.5)
            started = psutil.Process(asking.pid).children(recursive=True)
        assert len(started) == 3
    finally:
        asking.kill()
        asking.wait()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left


def test_what_cannot_be_sent_or_has_no_gpu_is_refused(monkeypatch):
    with pytest.raises(StudyError, match="^<lambda> in 2 processes: .*; set processes to 1"):
        launched(lambda: None, processes=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(StudyError, match="^sqrt in 4 processes: there are 2 GPUs; lower processes"):
        launched(math.sqrt, 4, processes=4)


def as_one_of(monkeypatch, processes: int, rank: int = 0) -> None:
    monkeypatch.setattr(distributed, "size", lambda: processes)
    monkeypatch.setattr(ppo, "size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


@pytest.mark.parametrize(
    ("batch", "micro", "examples", "together"),
    [(8, 4, 16, 4), (8, 8, 16, 4), (8, 4, 10, 1), (8, 4, 12, 2), (12, 4, 24, 2)],
)
def test_a_step_has_the_same_examples(monkeypatch, batch, micro, examples, together):
    as_one_of(monkeypatch, 2)
    config = TrainConfig(learning_rate=1e-3, batch_size=batch, micro_batch_size=micro)
    arguments = trl_arguments(SFTConfig, config, examples)
    assert arguments.per_device_train_batch_size == together
    assert together * arguments.gradient_accumulation_steps * 2 == batch


@pytest.mark.parametrize(
    ("batch", "examples", "said"),
    [
        (9, 18, "^batch_size: must be a multiple of the 2 processes, got 9"),
        (8, 19, "^19 training .*: 2 processes cannot share the 3 of the last .*; train on 18$"),
    ],
)
def test_examples_that_cannot_be_shared_are_refused(monkeypatch, batch, examples, said):
    as_one_of(monkeypatch, 2)
    with pytest.raises(StudyError, match=said):
        trl_arguments(SFTConfig, TrainConfig(learning_rate=1e-3, batch_size=batch), examples)


def test_answers_that_cannot_be_shared_are_refused(monkeypatch, tmp_path, source):
    as_one_of(monkeypatch, 3)
    said = "minibatch: must be a multiple of the 3 processes, got 4"
    with pytest.raises(StudyError, match=said):
        train("ppo", source, tmp_path / "one")


@pytest.mark.parametrize(("processes", "count"), [(1, 5), (2, 5), (3, 2), (4, 8)])
def test_shares_are_all_there_is(monkeypatch, processes, count):
    shares = []
    for rank in range(processes):
        as_one_of(monkeypatch, processes, rank)
        shares.append(distributed.share(range(count)))
    assert [item for some in shares for item in some] == [*range(count)]
    assert max(map(len, shares)) - min(map(len, shares)) <= (count % processes > 0)


# --- killed and resumed ---------------------------------------------------------------------------


@pytest.mark.parametrize("stage", TRL)
def test_a_training_that_was_killed_goes_on_to_the_same_bytes(stage, source, tmp_path, monkeypatch):
    write_adapters(load_base(source, "float32"), tmp_path)
    whole, _ = train(stage, source, tmp_path / "whole")
    interrupted(stage, source, tmp_path / "again", at=5, save_steps=2)
    unfinished = tmp_path / "again" / f"{stage}.unfinished"
    assert {path.name for path in unfinished.glob("checkpoint-*[0-9]")} == {
        "checkpoint-2",
        "checkpoint-4",
    }
    if stage == "sft":  # the last one is damaged: it goes on from the one before
        state = unfinished / "checkpoint-4" / "optimizer.pt"
        state.write_bytes(state.read_bytes()[:-1])
    begun, begin = [], training.Curve.on_train_begin

    def first_step(self, args, state, control, **more):
        begun.append(state.global_step)
        begin(self, args, state, control, **more)

    monkeypatch.setattr(training.Curve, "on_train_begin", first_step)
    curve, _ = train(stage, source, tmp_path / "again", save_steps=2)
    assert begun == [2 if stage == "sft" else 4] and not unfinished.exists()
    pd.testing.assert_frame_equal(curve, whole, check_exact=True)
    files = [sorted((tmp_path / made / stage).iterdir()) for made in ("whole", "again")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_another_trainings_checkpoints_are_not_gone_on_from(source, tmp_path):
    write_adapters(load_base(source, "float32"), tmp_path)
    other = dataclasses.replace(CONFIG, learning_rate=3e-3)
    whole, _ = train("sft", source, tmp_path / "whole", other)
    interrupted("sft", source, tmp_path / "again", at=5, save_steps=2)
    curve, _ = train("sft", source, tmp_path / "again", other, save_steps=2)
    pd.testing.assert_frame_equal(curve, whole, check_exact=True)


def test_inpo_goes_on_after_its_last_round(source, tmp_path, monkeypatch):
    write_adapters(load_base(source, "float32"), tmp_path)
    whole, fit, made = train("inpo", source, tmp_path / "whole"), inpo.fit, []

    def second_fails(*args, **more):
        made.append(1)
        if len(made) == 2:
            raise KeyboardInterrupt
        return fit(*args, **more)

    monkeypatch.setattr(inpo, "fit", second_fails)
    with pytest.raises(KeyboardInterrupt):
        train("inpo", source, tmp_path / "again")
    again = train("inpo", source, tmp_path / "again")
    assert len(made) == 3  # the second round alone was made again
    for one, other in zip(whole, again):
        pd.testing.assert_frame_equal(one, other, check_exact=True)
    assert artifacts.sha256_of(tmp_path / "whole" / "inpo") == artifacts.sha256_of(
        tmp_path / "again" / "inpo"
    )
    assert not [*(tmp_path / "again").glob("*unfinished*")]


# --- as a chapter asks for it ---------------------------------------------------------------------


def test_a_chapter_trains_in_as_many_processes_as_it_says(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "launched", lambda *args, **more: calls.append((args, more)))
    monkeypatch.setattr(study.Study, "load_base", lambda self: "fresh")
    opened = study.Study("01-sft", {"processes": 1, "accelerate": ["--x"]}, None, None)
    opened.base, opened.chat = "base", "chat"
    assert opened.train(lambda *args, **more: (args, more), 1, save_steps=2) == (
        ("fresh", "chat", 1),
        {"save_steps": 2},
    )
    opened.parameters["processes"] = 3
    opened.train(max, 1, save_steps=2)
    options = {"processes": 3, "options": ["--x"], "save_steps": 2}
    assert calls == [((max, "base", "chat", 1), options)]
