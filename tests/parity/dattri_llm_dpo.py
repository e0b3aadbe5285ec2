"""Gradients of the DPO loss through LoRA factors against dattri-llm's: ``make parity``.

dattri-llm catches every row's gradient by hooks while the loss is differentiated once for the whole
batch. A pair is two rows of one batch, so the product of two pairs' gradients is the sum of its
four products of rows. Ours come from :func:`query_gradients`, through packed texts. With ``--save``
its numbers are kept under ``tests/reference``, where ``tests/test_solvers.py`` reads them.
"""

from __future__ import annotations

import argparse
import random
import sys
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from rlhf_trust import ROOT
from rlhf_trust.attribution.solvers import gradient_dot
from rlhf_trust.attribution.validate import Queries, query_gradients
from rlhf_trust.chat import EncodedExample
from rlhf_trust.decode import Example
from rlhf_trust.losses import DPOLoss, reference_logps

from .bergson_magic import PAD, tiny_network

REFERENCE = ROOT / "tests" / "reference" / "dattri-llm-dpo.csv"
BETA, N, M = 0.3, 8, 3


def some_pairs(count: int, seed: int) -> list[Example]:
    """Pairs of a prompt and two answers, of different lengths."""
    draw = random.Random(seed)

    def pair(number: int) -> Example:
        prompt = draw.choices(range(3, 64), k=draw.randint(2, 8))
        answers = [draw.choices(range(3, 64), k=draw.randint(2, 12)) for _ in range(2)]
        texts = (EncodedExample((*prompt, *answer), len(prompt)) for answer in answers)
        return Example(f"{seed}/{number}", "random", tuple(texts))

    return [pair(number) for number in range(count)]


def own_scores(network, train: list[Example], asked: list[Example]) -> np.ndarray:
    """Our scores, − vᵀ g_i: [training pairs, pairs asked for]."""
    loss = DPOLoss(BETA, reference_logps(network, None, train + asked, PAD))
    given = (query_gradients(network, "default", Queries(s, loss), PAD) for s in (train, asked))
    return gradient_dot(*given).by_item


def rows_of(network, pairs: list[Example]) -> list[dict[str, torch.Tensor]]:
    """A row for every answer, chosen before rejected, with its probability without the adapter."""
    texts = [text for pair in pairs for text in pair.sequences]
    longest = max(len(text.input_ids) for text in texts)
    before = reference_logps(network, None, pairs, PAD)
    rows = []
    for text, reference in zip(texts, (x for pair in pairs for x in before[pair.id]), strict=True):
        length, asked = len(text.input_ids), torch.zeros(longest, dtype=torch.bool)
        asked[text.answer_start : length] = True
        ids = torch.tensor([*text.input_ids, *[PAD] * (longest - length)])
        there = (torch.arange(longest) < length).long()
        rows.append({"input_ids": ids, "attention_mask": there, "asked": asked})
        rows[-1]["reference"] = torch.tensor(reference)
    return rows


def dpo_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The DPO loss of a batch's pairs of rows, summed, from one forward pass."""
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logps = model(**given).logits[:, :-1].log_softmax(-1)
    of_tokens = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    gained = (of_tokens * batch["asked"][:, 1:]).sum(1) - batch["reference"]
    return -torch.nn.functional.logsigmoid(BETA * (gained[::2] - gained[1::2])).sum()


def dattri_scores(network, train: list[Example], asked: list[Example]) -> np.ndarray:
    """dattri-llm's products of gradients, [training pairs, pairs asked for]."""
    from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig
    from dattri_llm.attribution import TracInAttributor

    hooks = {
        name: "linear_io"
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" in name
    }
    with TemporaryDirectory() as folder:
        sizes = {"per_device_train_batch_size": 2 * N, "per_device_eval_batch_size": 2 * M}
        arguments = AttributionArguments(output_dir=folder, **sizes)
        task = AttributionTask(loss_func=dpo_loss, model=network)
        rows = (rows_of(network, some) for some in (train, asked))
        found = TracInAttributor(arguments, task=task).attribute(
            *rows, hook_config=HookManagerConfig(hook_types=hooks)
        )
    _, products = found.agnostic_matrix()
    return products.double().numpy().reshape(N, 2, M, 2).sum((1, 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--save",
        action="store_true",
        help=f"write dattri-llm's numbers to {REFERENCE.relative_to(ROOT)}",
    )
    arguments = parser.parse_args()
    train, asked, network = some_pairs(N, 1), some_pairs(M, 2), tiny_network()
    own, theirs = (f(network, train, asked) for f in (own_scores, dattri_scores))
    error = np.abs(own + theirs).max() / np.abs(theirs).max()
    print(
        f"DPO, {N} pairs, {M} asked for: largest product of gradients {np.abs(theirs).max():.4g}, "
        f"largest difference from dattri-llm's {error:.1e} of it"
    )
    if arguments.save:
        ids = pd.Index([pair.id for pair in train], name="pair")
        pd.DataFrame(theirs, ids, [pair.id for pair in asked]).to_csv(
            REFERENCE, float_format="%.9g"
        )
    return int(not error < 1e-4)


if __name__ == "__main__":
    sys.exit(main())
