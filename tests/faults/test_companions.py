"""Public functions of the companion chapters on input that is none: the right value, or one clear
line.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from rlhf_trust import StudyError
from rlhf_trust.align import inpo
from rlhf_trust.chat import EncodedExample
from rlhf_trust.data.preferences import PAIRS, load_pairs
from rlhf_trust.lineage import (
    cka,
    kernel_matrices,
    last_token_states,
    pruned,
    same_depth,
    separation,
)
from rlhf_trust.rag import entailment, trust_score as ts
from rlhf_trust.rewards import rm_bench
from transformers import T5Config, T5Model

NAN = float("nan")


def texts(k):
    return [EncodedExample((3, 4 + i), 1) for i in range(k)]


def always(value):
    return lambda matches: np.full(len(matches), value)


EVEN, CYCLE = np.full(3, 1 / 3), np.array([[0.5, 0.9, 0.2], [0.1, 0.5, 0.8], [0.8, 0.2, 0.5]])
QUESTION = ts.Question(
    "q",
    "long",
    "When?",
    (ts.Claim("It was in 1932."),),
    (ts.Document("", "It was in 1932.", (True,)),),
)
ANSWER = "It was in 1932 [1]."
ITEM = rm_bench.Item("chat:1", "chat", "Is it?", ("a", "b", "c"), ("d", "e", "f"))
STATES = np.random.default_rng(0).normal(size=(2, 12, 4))


def judged(judge):
    return ts.score_responses([QUESTION], [ANSWER], judge)


ODD = {
    "tau above eta": (
        lambda: inpo.mirror_step(EVEN, EVEN, CYCLE, 0.3, 0.1),
        "needs 0 <= tau <= eta, got 0.3, 0.1",
    ),
    "preferences in per cent": (
        lambda: inpo.mirror_step(EVEN, EVEN, 100 * CYCLE, 0.1, 0.3),
        "from 0 to 1, not per cent",
    ),
    "an equilibrium of per cent": (
        lambda: inpo.equilibrium(EVEN, 100 * CYCLE, 0.1),
        "from 0 to 1, not per cent",
    ),
    "a table of another game": (
        lambda: inpo.mirror_step(EVEN, EVEN, CYCLE[:2], 0.1, 0.3),
        "3 answers need a table",
    ),
    "a judge that says .3": (
        lambda: judged(always(0.3)),
        "must say True or False of each pair, got 0.3",
    ),
    "a judge that says nan": (lambda: judged(always(NAN)), "must say True or False of each pair"),
    "a judge with too few answers": (lambda: judged(lambda pairs: []), "0 answers to [0-9]+ pairs"),
    "a text for a list of responses": (
        lambda: ts.score_responses([QUESTION] * 2, "ab", always(True)),
        "responses must be a list of texts",
    ),
    "no response": (
        lambda: ts.score_responses([QUESTION], [None], always(True)),
        "q: the response is no text: None",
    ),
    "a list for a response": (
        lambda: ts.score_responses([QUESTION], [["a"]], always(True)),
        "the response is no text",
    ),
    "no draws": (lambda: ts.trust_score([ts.Scores(True, True)], draws=0), "draws: must be"),
    "nothing to score": (lambda: ts.trust_score([]), "no responses to score"),
    "a change without draws": (
        lambda: ts.trust_score_change(*[[ts.Scores(True, True)]] * 2, "q", draws=0),
        "draws: must be at least 1",
    ),
    "agreement with a judge that says .3": (
        lambda: entailment.agreement(lambda pairs: [0.3] * len(pairs), entailment.hard_pairs()),
        "must say True or False",
    ),
    "scores of two styles": (lambda: rm_bench.wins(np.ones((4, 3, 2))), r"got \(4, 3, 2\)"),
    "scores of four styles": (lambda: rm_bench.wins(np.ones((4, 2, 4))), r"got \(4, 2, 4\)"),
    "fewer scores than items": (
        lambda: rm_bench.summary([ITEM] * 2, np.ones((1, 3, 3)), released=False),
        "1 rows of scores for 2 items",
    ),
    "no items": (
        lambda: rm_bench.summary([], np.ones((0, 3, 3)), released=False),
        "rm-bench: no items",
    ),
    "a table without models": (
        lambda: rm_bench.words(rm_bench.summary([ITEM], np.ones((1, 3, 3)), released=False)),
        "no column model",
    ),
    "a layer for a share": (lambda: same_depth(32, 32, 18), "a share of the layers"),
    "states beyond a double": (lambda: kernel_matrices(STATES * 1e200), "too large to multiply"),
    "states of one layer": (lambda: kernel_matrices(STATES[0]), "states must be"),
    "more than all weights": (lambda: pruned(torch.nn.Linear(2, 2), 1.5), "between 0 and 1"),
    "an encoder with a decoder": (
        lambda: last_token_states(
            T5Model(T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=8, num_layers=1, num_heads=2)),
            None,
            ["a"],
        ),
        "T5Model is an encoder with a decoder",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_input_ends_in_one_line(case):
    call, said = ODD[case]
    with pytest.raises(StudyError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_features_that_say_nothing_do_not_count():
    constant = np.concatenate([STATES, np.full((2, 12, 1), 0.1)], axis=2)
    for how in (dict(standardised=True), dict(kernel="radial", standardised=True)):
        np.testing.assert_allclose(cka(constant, STATES, **how), cka(STATES, STATES, **how))


def test_states_in_bfloat16_are_compared():
    states = torch.tensor(STATES).bfloat16()
    np.testing.assert_array_equal(cka(states, states), cka(*[states.double().numpy()] * 2))


def test_without_strangers_nothing_is_separated():
    table = pd.DataFrame([("a", "b", "m", 0.9)], columns=["first", "second", "measure", "value"])
    assert separation(table, {"a": True, "b": True}).empty


@pytest.mark.parametrize("line", ["{", "[]", '{"round": 1}', '{"round": 1, "winner": []}'])
def test_a_broken_pair_is_named(tmp_path, line):
    pair = inpo.Pair(1, "p", *texts(2), (0.0, -1.0))
    (tmp_path / PAIRS).write_text(json.dumps(dataclasses.asdict(pair)) + "\n")
    assert load_pairs(tmp_path) == [pair]
    (tmp_path / PAIRS).write_text(json.dumps(dataclasses.asdict(pair)) + f"\n{line}\n")
    with pytest.raises(StudyError, match=f"{PAIRS}:2: "):
        load_pairs(tmp_path)
