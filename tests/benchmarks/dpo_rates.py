"""DPO's learning rate on held-out pairs: how a profile's ``04-dpo: learning_rate`` was chosen.

SFT once, then DPO from it at each rate, by the fast loop with the profile's own settings. The
measures are the mean held-out margin and the share of pairs ranked right, with their intervals.
``tests/reference/dpo-rates.csv`` keeps what was found, also without SFT (rate 0), after a weaker
one and with three epochs, on 1,101 pairs of at most 160 tokens (1,000 in the first four rows):

``python tests/benchmarks/dpo_rates.py hh-cpu --data <directory> --rates 1e-4 3e-4 1e-3``
"""

from __future__ import annotations

import argparse
from math import log

import numpy as np
import pandas as pd
from rlhf_trust import models, params
from rlhf_trust.attribution.metric import training_examples
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import LowerStates
from rlhf_trust.losses import DPOLoss, NextTokenLoss, reference_logps
from rlhf_trust.models import LoRA, restore, snapshot
from rlhf_trust.run import data_overrides
from rlhf_trust.stats import mean_interval
from rlhf_trust.training import TrainConfig, example_losses, fit


def settings(values: dict, learning_rate: float) -> TrainConfig:
    taken = {name: values[name] for name in ("batch_size", "epochs", "seed")}
    return TrainConfig(learning_rate=learning_rate, **taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("profile")
    parser.add_argument("--data", default="")
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--out", default="")
    arguments = parser.parse_args()
    resolved = params.resolve(arguments.profile, data_overrides(arguments.data))
    sft, dpo = resolved["01-sft"], resolved["04-dpo"]
    base = models.load_base(dpo["model"], dpo["dtype"])
    chat, pad = Chat(base.tokenizer, dpo["prompt_format"]), base.tokenizer.pad_token_id
    sizes = dpo["n_train"], dpo["n_held_out"]
    pairs = load_preferences(dpo["preferences"], *sizes, chat, dpo["max_length"], dpo["seed"])
    chosen = training_examples(pairs.train[: sft["n_sft"]], chat, "sft")
    train = training_examples(pairs.train[: dpo["n_dpo"]], chat, "dpo")
    held_out = training_examples(pairs.held_out[: dpo["n_held_out_dpo"]], chat, "dpo")
    lora = LoRA(sft["lora_rank"], sft["lora_alpha"], layers=sft["lora_layers"])
    network = models.fresh_adapters(base, ["sft", "dpo"], lora, sft["seed"])
    kept = LowerStates(network)
    fit(network, "sft", chosen, NextTokenLoss(), pad, settings(sft, sft["learning_rate"]), "sft")
    beta, start = dpo["beta"], snapshot(network, "sft")
    losses = [
        DPOLoss(beta, reference_logps(network, "sft", some, pad)) for some in (train, held_out)
    ]
    rows = []
    for rate in arguments.rates:
        restore(network, "dpo", start)
        curve = fit(network, "dpo", train, losses[0], pad, settings(dpo, rate), f"{rate:g}", kept)
        found = example_losses(network, "dpo", held_out, losses[1], pad)
        measures = {"margin": -np.log(np.expm1(found)), "ranked_right": 1.0 * (found < log(2))}
        for metric, values in measures.items():
            bounds = (0.0, 1.0) if metric == "ranked_right" else None
            interval = mean_interval(values, f"{rate}/{metric}", bounds=bounds)
            rows.append({"learning_rate": rate, "metric": metric} | vars(interval))
        print(pd.DataFrame(rows[-2:]).to_string(index=False), f"{curve['loss'][-5:].mean():.4f}")
    table = pd.DataFrame(rows).rename(columns={"low": "ci_low", "high": "ci_high"})
    if arguments.out:
        table.to_csv(arguments.out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
