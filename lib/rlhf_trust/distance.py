"""How far is what we measure from what we train on? The perplexity of texts under each model.

Training on preferences teaches little about prompts that are far from the preference data; answers
to them then change as a side effect. Each text is scored where it belongs in the prompt format:
prompts in the human turn, answers of the preference data in the model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix

import numpy as np
import pandas as pd

from . import StudyError
from .artifacts import TABLES
from .chat import Chat, EncodedExample
from .data.preferences import PreferencePair
from .decode import Prompt, answer_logps
from .models import ModelSet
from .stats import mean_interval

Texts = dict[str, list[EncodedExample]]
"""Kind of text → the texts."""


def human_turn(chat: Chat, text: str) -> EncodedExample:
    """``text`` as the first human turn: the tokens before it are given, its own are scored."""
    opening, whole = chat.prompt_ids(("",)), chat.prompt_ids((text,))
    shared = len(commonprefix([opening, whole]))
    closing = len(commonprefix([opening[::-1], whole[::-1]]))
    closing = min(closing, len(opening) - shared)  # the text may end as the words before it do
    return EncodedExample(whole[: len(whole) - closing], shared)


def preference_texts(pairs: Sequence[PreferencePair], chat: Chat) -> Texts:
    """Held-out pairs: the first human turns, and the chosen and the rejected answers after their
    prompts."""
    return {
        "preference prompts": [human_turn(chat, pair.opening) for pair in pairs],
        "chosen answers": [chat.sequence(pair.prompt, pair.chosen) for pair in pairs],
        "rejected answers": [chat.sequence(pair.prompt, pair.rejected) for pair in pairs],
    }


def prompt_texts(prompts: Sequence[Prompt], chat: Chat) -> list[EncodedExample]:
    """A benchmark's prompts as human turns, without their system texts."""
    return [human_turn(chat, prompt.turns[0]) for prompt in prompts]


def distance_table(model_set: ModelSet, texts: Texts, pad: int) -> pd.DataFrame:
    """Rows of ``distance.csv``: loss (nats a token, with its interval over texts) and perplexity.

    A text's loss is the mean over its tokens, and every text has equal weight: perplexity is the
    exponential of the mean over texts (a geometric mean).
    """
    rows = []
    for model in model_set.names:
        if model_set.is_checkpoint(model):
            raise StudyError(f"{model}: losses per token compare models of one tokenizer, start's")
        for kind, sequences in texts.items():
            with model_set.active(model) as network:
                sums, counts = answer_logps(network, sequences, pad, desc=f"{kind}, {model}")
            loss = mean_interval(-sums / counts, f"distance/{model}/{kind}")
            rows.append((model, kind, loss.value, loss.low, loss.high, np.exp(loss.value), loss.n))
    return pd.DataFrame(rows, columns=TABLES["distance"])
