"""Learning rates of DPO and PPO on held-out data: how a profile's own were chosen.

From the SFT and reward models of the profile's build (its 01 and 02), each stage at each rate with
the profile's other settings. DPO is judged by the mean held-out margin and the share of pairs
ranked right; PPO by the rise of the held-out reward, what is left of it for answers as long as
before, and its KL to SFT. Intervals are over items. ``tests/reference/rates.csv`` keeps what was
found:

``python tests/benchmarks/rates.py embedded ppo --rates 1e-3 3e-3 --seeds 0 1 2 --save``
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import fields
from math import log
from pathlib import Path

import numpy as np
import pandas as pd
from rlhf_trust import models, params
from rlhf_trust.align import ppo
from rlhf_trust.align.arms import CHAPTERS
from rlhf_trust.align.rollout import before_and_after
from rlhf_trust.artifacts import Build, progress
from rlhf_trust.attribution.metric import training_examples
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import LowerStates, Prompt
from rlhf_trust.fan_out import fan_out
from rlhf_trust.losses import DPOLoss, reference_logps
from rlhf_trust.report import rise_at_equal_length
from rlhf_trust.run import data_overrides
from rlhf_trust.stats import Interval, mean_interval, paired_change
from rlhf_trust.training import TrainConfig, example_losses, fit

REFERENCE = Path(__file__).parents[1] / "reference" / "rates.csv"


def config_of(kind: type, given: dict):
    """The stage's settings, as its chapter has them."""
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})


class Sweep:
    """One stage of a profile, trained again and again from the build's models."""

    def __init__(self, profile: str, stage: str, data: str):
        self.given = params.resolve(profile, data_overrides(data))[CHAPTERS[stage]]
        given, self.build = self.given, Build(profile)
        self.base = models.load_base(given["model"], given["dtype"])
        self.chat = Chat(self.base.tokenizer, given["prompt_format"])
        sizes = given["n_train"], given["n_held_out"], self.chat, given["max_length"], given["seed"]
        self.pairs = load_preferences(given["preferences"], *sizes)
        self.kept = None

    def dpo(self, rate: float, seed: int) -> dict[str, Interval]:
        """Held-out margin in nats, and the share of pairs ranked right."""
        given, pad = self.given, self.base.tokenizer.pad_token_id
        train = training_examples(self.pairs.train[: given["n_dpo"]], self.chat, "dpo")
        held_out = self.pairs.held_out[: given["n_held_out_dpo"]]
        held_out = training_examples(held_out, self.chat, "dpo")
        sft = self.build.model("sft")
        both = {"policy": sft, "reference": sft}
        network = models.load_adapters(self.base, both, trainable="policy")
        kept = self.kept = self.kept or LowerStates(network)
        reference = reference_logps(network, "reference", train + held_out, pad, kept=kept)
        loss = DPOLoss(given["beta"], reference)
        config = config_of(TrainConfig, given | {"learning_rate": rate, "seed": seed})
        fit(network, "policy", train, loss, pad, config, f"{rate:g}", kept)
        found = example_losses(network, "policy", held_out, loss, pad, kept=kept)
        network.unload()
        right = mean_interval(1.0 * (found < log(2)), "right", bounds=(0.0, 1.0))
        return {"margin": mean_interval(-np.log(np.expm1(found)), "margin"), "ranked_right": right}

    def ppo(self, rate: float, seed: int) -> dict[str, Interval]:
        """Rise of the held-out reward, the same for answers as long as before, KL in nats."""
        given = self.given
        own = {"epochs": given["ppo_epochs"], "evaluate_every": 0}
        own |= {"learning_rate": rate, "seed": seed}
        config = config_of(ppo.PPOConfig, given | own)
        train, held_out = (
            [Prompt(pair.id, pair.prompt) for pair in some]
            for some in (self.pairs.train, self.pairs.held_out[: given["n_prompts_held_out"]])
        )
        with tempfile.TemporaryDirectory() as folder:
            made = [self.build.model(name) for name in ("sft", "reward")]
            out = Path(folder) / "ppo"
            _, history = ppo.train(self.base, self.chat, *made, train, held_out, config, out)
        found = before_and_after(history)
        return {
            "reward_rise": paired_change(found["reward_after"], found["reward_before"]),
            "rise_at_equal_length": rise_at_equal_length(found),
            "kl": mean_interval(found["kl_after"], "kl"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile")
    parser.add_argument("stage", choices=("dpo", "ppo"))
    parser.add_argument("--data", default="")
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--save", action="store_true", help="add to tests/reference/rates.csv")
    given = parser.parse_args()
    sweep, rows = Sweep(given.profile, given.stage, given.data), []
    points = {f"{rate:g}-{seed}": (rate, seed) for rate in given.rates for seed in given.seeds}
    measure, folder = getattr(sweep, given.stage), sweep.build.path("jobs", "rates")
    found = fan_out(lambda point: measure(*point), points, folder)
    found = dict(progress(found, given.stage, len(points)))
    for point, (rate, seed) in points.items():
        what = {"profile": given.profile, "stage": given.stage, "learning_rate": rate}
        for metric, i in found[point].items():
            row = {"metric": metric, "value": i.value, "ci_low": i.low, "ci_high": i.high}
            note = str(sweep.base.model.dtype).removeprefix("torch.")
            rows.append(what | {"seed": seed} | row | {"n": i.n, "note": note})
    print(pd.DataFrame(rows).to_string(index=False))
    if given.save:
        table = pd.concat([pd.read_csv(REFERENCE), pd.DataFrame(rows)], ignore_index=True)
        table.to_csv(REFERENCE, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
