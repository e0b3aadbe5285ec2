"""Likelihood contrasts against one forward pass a text, and the clauses that follow "that"."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlhf_trust.chat import Chat
from rlhf_trust.decode import option_logps
from rlhf_trust.verticals import contrast, stereotype
from rlhf_trust.verticals.stereotype import PlainStatement, Statement

TEXTS = ["is it wrong?", "the answer is the question"]


def logp(base, before: str, after: str) -> float:
    """log p(after | before) of a document that begins with ``before``."""
    opening = [base.tokenizer.get_vocab()["<|endoftext|>"]]
    ids, start = base.tokenizer(before + after, add_special_tokens=False).input_ids, len(opening)
    start += len(base.tokenizer(before, add_special_tokens=False).input_ids)
    with torch.no_grad():
        logits = base.model(torch.tensor([opening + ids])).logits[0].log_softmax(-1)
    whole = opening + ids
    return float(sum(logits[i - 1, whole[i]] for i in range(start, len(whole))))


def test_contrasts_are_differences_of_likelihoods(tiny_llama):
    chat = Chat(tiny_llama.tokenizer, "dialogue")
    pairs = [("wrong", "right"), ("it is", "is it")]
    ids = [str(i) for i in range(len(TEXTS))]

    def found(choices) -> np.ndarray:
        logps = option_logps(tiny_llama.model, choices, 2)
        return contrast.pair_contrasts(logps, len(TEXTS)).sum(1)

    after = [
        sum(
            logp(tiny_llama, text, f" {one}") - logp(tiny_llama, text, f" {other}")
            for one, other in pairs
        )
        for text in TEXTS
    ]
    before = [
        sum(
            logp(tiny_llama, one, f" {text}") - logp(tiny_llama, other, f" {text}")
            for one, other in pairs
        )
        for text in TEXTS
    ]
    assert found(contrast.continuations(ids, TEXTS, pairs, chat)) == pytest.approx(after, abs=1e-4)
    assert found(contrast.contexts(ids, TEXTS, pairs, chat)) == pytest.approx(before, abs=1e-4)


def test_what_follows_that_is_english():
    def clause(template, group="Women"):
        return Statement("1", "topic", group, template, None).clause

    assert clause("[target_group] are tall") == "women are tall"
    assert clause("[target_group] are tall", "Jews") == "Jews are tall"
    assert clause("The town likes [target_group]") == "the town likes women"
    assert clause("I like [target_group]") == "I like women"
    assert clause("Show [target_group] the way") is None
    assert PlainStatement("1", "Ice melts.", True).clause == "ice melts."
    assert all(
        item.clause[0].islower() or "Paris" in item.text or "Africa" in item.text
        for item in stereotype.load_consensus()
    )


def test_facts_above_falsehoods_have_the_whole_area():
    items = [PlainStatement(str(i), "x", i < 10) for i in range(20)]
    (right,) = stereotype.consensus_area(items, np.arange(20)[::-1] * 1.0, "context")
    (blind,) = stereotype.consensus_area(items, np.ones(20), "context")
    assert np.mean(right.values) == pytest.approx(1) and np.mean(blind.values) == pytest.approx(0.5)
