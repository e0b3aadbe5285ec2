"""Scores through training against bergson's MAGIC, on one tiny LoRA run: ``make parity``.

Both train the same adapter by SFT: AdamW with clipping and schedule, two passes over eight
examples in the order of ``training_batches``. bergson takes its rows in that order, with the
example's number as ``doc_ids``, and the learning rates as they were; its loss divides a batch's sum
by its answer tokens as ours does, and its score is dφ/dw as well. φ is the mean loss a token of one
held-out answer. With ``--save`` its numbers are kept under ``tests/reference``, where
``tests/test_unrolled.py`` reads them.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rlhf_trust import ROOT
from rlhf_trust.attribution.unrolled import Stage, train_stages, unrolled_scores
from rlhf_trust.attribution.validate import Queries
from rlhf_trust.chat import EncodedExample
from rlhf_trust.decode import Example
from rlhf_trust.losses import NextTokenLoss
from rlhf_trust.models import lora_layers
from rlhf_trust.training import CLIP, TrainConfig, training_batches
from transformers import LlamaConfig, LlamaForCausalLM

REFERENCE = ROOT / "tests" / "reference" / "bergson-magic.csv"
CONFIG = TrainConfig(learning_rate=1e-2, batch_size=4, epochs=2, epsilon=1e-2)
N, M, PAD = 8, 3, 0


def tiny_network():
    """A random model of two layers; its adapter has weights, so that no gradient is zero."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    network = get_peft_model(model, lora).eval()
    for layer in lora_layers(network, "default").values():
        torch.nn.init.normal_(layer.weight, std=0.1)
    return network


def some_examples(count: int, seed: int) -> list[Example]:
    draw = random.Random(seed)

    def sequence() -> EncodedExample:
        prompt, answer = draw.randint(2, 8), draw.randint(2, 12)
        return EncodedExample(tuple(draw.choices(range(3, 64), k=prompt + answer)), prompt)

    return [Example(f"{seed}/{i}", "random", (sequence(),)) for i in range(count)]


def rows_of(examples: list[Example], order: list[int]) -> Dataset:
    """bergson's rows: labels of -100 where there is no answer."""
    texts = [examples[i].sequences[0] for i in order]
    labels = [[-100] * text.answer_start + list(text.answer_ids) for text in texts]
    ids = [list(text.input_ids) for text in texts]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "doc_ids": order})


def own_scores(network, examples, asked, folder: Path) -> tuple[np.ndarray, list[float]]:
    """Our scores [examples, queries], and the learning rates of the run."""
    queries = {query.id: Queries([query], NextTokenLoss("mean")) for query in asked}
    stages = [Stage(examples, NextTokenLoss(), CONFIG)]
    stages = train_stages(network, "default", stages, PAD, folder=folder)
    (scores,) = unrolled_scores(network, "default", stages, queries, PAD)
    return scores, stages[0].trajectory.read()[1]


def bergson_scores(network, examples, queries, rates: list[float], folder: str) -> np.ndarray:
    """bergson's own scores, [examples, queries]."""
    import torchopt
    from bergson.magic.cli import compute_query_gradients
    from bergson.magic.data_stream import DataStream
    from bergson.magic.trainer import BackwardState, Trainer
    from bergson.utils.math import weighted_causal_lm_ce

    network.requires_grad_(False)
    for layer in lora_layers(network, "default").values():
        layer.weight.requires_grad_(True)
    network.get_base_model().loss_function = weighted_causal_lm_ce
    network.get_base_model().config._attn_implementation = "eager"
    rates = torch.tensor(rates + [0.0])
    update = torchopt.adamw(lambda count: rates[count], eps=CONFIG.epsilon, weight_decay=0.0)
    trainer, state = Trainer.initialize(network, update)
    order = sum(training_batches(examples, CONFIG), [])
    rows = rows_of(examples, order)
    data = DataStream(rows, CONFIG.batch_size, weight_shape=(len(examples),))
    how = {"save_mode": "all", "max_grad_norm": CLIP}
    end = trainer.train(state, data, save_dir=folder, **how)
    zeros = [torch.zeros_like(tensor) for tensor in end.differentiable_tensors()[len(end.params) :]]
    found = []
    for number in range(len(queries)):
        one = DataStream(rows_of(queries, [number]).remove_columns("doc_ids"), 1, weight_shape=(1,))
        final = end.to("cpu")
        gradients, _ = compute_query_gradients(final, network, one)
        start = BackwardState(gradients, [z.clone() for z in zeros], torch.zeros(len(examples)))
        found.append(trainer.backward(folder, data, start, final, cleanup=False, **how))
    return torch.stack([state.weight_grads.detach() for state in found], 1).double().numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write bergson's numbers to {REFERENCE.relative_to(ROOT)}",
    )
    arguments = parser.parse_args()
    examples, asked, network = some_examples(N, 1), some_examples(M, 2), tiny_network()
    theirs_network = copy.deepcopy(network)
    with TemporaryDirectory() as place:
        folder = Path(place)
        own, rates = own_scores(network, examples, asked, folder / "own")
        theirs = bergson_scores(theirs_network, examples, asked, rates, str(folder / "theirs"))
    error = np.abs(own - theirs).max() / np.abs(theirs).max()
    correlations = [np.corrcoef(*both)[0, 1] for both in zip(own.T, theirs.T)]
    print(
        f"MAGIC, {N} examples, {M} queries, {len(rates)} steps: largest score "
        f"{np.abs(theirs).max():.4g}, largest difference from bergson's {error:.1e} of it, lowest "
        f"correlation {min(correlations):.6f}"
    )
    if arguments.save:
        ids = pd.Index([example.id for example in examples], name="example")
        pd.DataFrame(theirs, ids, [query.id for query in asked]).to_csv(
            REFERENCE, float_format="%.9g"
        )
    return int(not min(correlations) >= 0.999)


if __name__ == "__main__":
    sys.exit(main())
