"""Perplexities: the text is weighed, what stands round it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlhf_trust import distance
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.models import ModelSet


@pytest.mark.parametrize("name", ["chatml", "dialogue"])
@pytest.mark.parametrize("text", ["is the answer wrong?", "x", "the end\n", "user\n", "Human:"])
def test_a_persons_turn_is_cut_out_of_its_format(tiny_llama, name, text):
    chat = Chat(tiny_llama.tokenizer, name)
    sequence = distance.human_turn(chat, text)
    before, _, after = chat.prompt_text((text,)).partition(text)
    assert tiny_llama.tokenizer.decode(sequence.input_ids).startswith(before)
    weighed = tiny_llama.tokenizer.decode(sequence.answer_ids)
    assert weighed.strip() == text.strip()
    assert chat.prompt_ids((text,))[: len(sequence)] == sequence.input_ids


def test_loss_is_a_mean_over_tokens_then_over_texts(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "chatml")
    pairs = [
        PreferencePair(f"p{i}", (f"question {i}?",), "the answer " * (i + 1), "no", "helpful")
        for i in range(3)
    ]
    texts, pad = distance.preference_texts(pairs, chat), tiny_llama.tokenizer.pad_token_id
    table = distance.distance_table(ModelSet(tiny_llama, {}), texts, pad).set_index("text")
    assert list(table.index) == ["preference prompts", "chosen answers", "rejected answers"]
    losses = []
    for sequence in texts["chosen answers"]:
        ids = torch.tensor([sequence.input_ids])
        with torch.no_grad():
            logps = tiny_llama.model(input_ids=ids).logits[0].double().log_softmax(-1)
        places = range(sequence.answer_start, len(sequence))
        losses.append(-np.mean([logps[p - 1, ids[0, p]].item() for p in places]))
    row = table.loc["chosen answers"]
    assert row["loss"] == pytest.approx(np.mean(losses), abs=1e-5) and row["n"] == 3
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert row["ci_low"] <= row["loss"] <= row["ci_high"]
