"""How far is what we measure from what we train on? The perplexity of each kind of text under each model.

A model that finds a benchmark's prompts far stranger than the preference data was taught little about them: its answers
there change by accident of generalisation. Every text stands where a person's words stand in the prompt format; answers
of the preference data stand where the model's stand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .chat import Chat, EncodedExample
from .data.preferences import PreferencePair
from .decode import Prompt, answer_logps
from .models import ModelSet
from .stats import mean_interval


def human_turn(chat: Chat, text: str) -> EncodedExample:
    """``text`` as a person's first turn: what stands before it is given, the text itself is weighed."""
    opening, whole = chat.prompt_ids(("",)), chat.prompt_ids((text,))
    shared = next(i for i, (one, other) in enumerate(zip(opening, whole)) if one != other)
    closing = next(
        i for i, (one, other) in enumerate(zip(opening[::-1], whole[::-1])) if one != other
    )
    closing = min(closing, len(opening) - shared)  # the text may end as the words before it do
    return EncodedExample(whole[: len(whole) - closing], shared)


def preference_texts(
    pairs: Sequence[PreferencePair], chat: Chat
) -> dict[str, list[EncodedExample]]:
    """Held-out pairs: the first human turns, and the chosen and the rejected answers after their prompts."""
    return {
        "preference prompts": [human_turn(chat, pair.opening) for pair in pairs],
        "chosen answers": [chat.sequence(pair.prompt, pair.chosen) for pair in pairs],
        "rejected answers": [chat.sequence(pair.prompt, pair.rejected) for pair in pairs],
    }


def prompt_texts(prompts: Sequence[Prompt], chat: Chat) -> list[EncodedExample]:
    """A benchmark's prompts as a person's turn, without their system texts."""
    return [human_turn(chat, prompt.turns[0]) for prompt in prompts]


def distance_table(
    model_set: ModelSet, texts: dict[str, list[EncodedExample]], pad: int
) -> pd.DataFrame:
    """Rows of ``distance.csv``: for each model and kind of text the loss in nats a token with its interval over texts,
    and the perplexity that goes with it.

    A text's loss is the mean over its tokens; every text weighs the same, so perplexity is the exponential of the mean
    over texts (a geometric mean).
    """
    rows = []
    for model in model_set.names:
        for kind, sequences in texts.items():
            with model_set.active(model) as network:
                sums, counts = answer_logps(network, sequences, pad, desc=f"{kind}, {model}")
            loss = mean_interval(-sums / counts, f"distance/{model}/{kind}")
            rows.append(
                {
                    "model": model,
                    "text": kind,
                    "loss": loss.value,
                    "ci_low": loss.low,
                    "ci_high": loss.high,
                    "perplexity": np.exp(loss.value),
                    "n": loss.n,
                }
            )
    return pd.DataFrame(rows)


def words(found: pd.DataFrame) -> list[str]:
    """Which kind of text is nearest to and farthest from each model, and what training on preferences moved."""
    loss = found.pivot(index="text", columns="model", values="loss")
    benchmarks = [
        text
        for text in found["text"].unique()
        if "answers" not in text and text != "preference prompts"
    ]
    start = loss.loc[benchmarks, "start"]
    sentences = [
        f"To the start model the prompts of {start.idxmin()} are the most familiar ({start.min():.2f} nats a token) and "
        f"those of {start.idxmax()} the strangest ({start.max():.2f}); the prompts of the preference data stand at "
        f"{loss.loc['preference prompts', 'start']:.2f}."
    ]
    for model in (m for m in found["model"].unique() if m != "start"):
        moved = loss[model] - loss["start"]
        sentences.append(
            f"{model} moves the loss of chosen answers by {moved['chosen answers']:+.2f}, of preference prompts by "
            f"{moved['preference prompts']:+.2f} and of the benchmarks' prompts by between "
            f"{moved[benchmarks].min():+.2f} and {moved[benchmarks].max():+.2f}."
        )
    return sentences
