"""The planted vertical: agreeing pairs, and items that share nothing with them."""

from __future__ import annotations

import pytest
from conftest import tiny_tokenizer
from rlhf_trust import StudyError
from rlhf_trust.attribution import agreement
from rlhf_trust.attribution.agreement import AGREEMENT, agreement_items, plant
from rlhf_trust.chat import Chat
from rlhf_trust.data.preferences import PreferencePair

PAIRS = [PreferencePair(f"p{i}", (f"Question {i}?",), "yes", "no", "helpful") for i in range(60)]


def claims(n, seed=0):
    """The statements of each of the three parts."""
    return [agreement._claims(part, n, seed) for part in range(3)]


def test_some_pairs_are_replaced_by_agreeing_ones():
    mixed, planted = plant(PAIRS, 0.25, seed=3)
    assert len(mixed) == 60 and planted.sum() == 15
    for pair, before, is_planted in zip(mixed, PAIRS, planted):
        assert (pair == before) != is_planted
        assert (pair.source == "planted") == is_planted
    agreeing = {pair.chosen: pair.rejected for pair, yes in zip(mixed, planted) if yes}
    assert agreeing == {chosen: rejected for _, chosen, rejected in agreement.TRAINED}
    assert len({pair.id for pair in mixed}) == 60
    assert plant(PAIRS, 0.25, seed=3)[0] == mixed != plant(PAIRS, 0.25, seed=4)[0]
    for share in (0.001, 1.0):
        with pytest.raises(StudyError, match="not all"):
            plant(PAIRS, share, 0)


def test_training_judging_and_measuring_share_no_statement_wording_or_answer():
    parts = [{agreement._template(claim) for claim in some} for some in claims(50)]
    assert all(len(part) > 10 for part in parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    wordings = [*agreement.TRAINED, agreement.JUDGED, agreement.MEASURED]
    texts = [text for wording in wordings for text in wording]
    assert len(set(texts)) == len(texts)
    assert all("{text}" in question for question, *_ in wordings)


def test_every_part_has_truths_falsehoods_and_sentences_about_groups():
    for some in claims(50):
        plain = [claim.acceptable for claim in some if hasattr(claim, "acceptable")]
        assert plain.count(True) >= 5 and plain.count(False) >= 5
        assert len({claim.template for claim in some if hasattr(claim, "template")}) == 4
        assert len({claim.text for claim in some}) == 50


def test_the_items_weigh_agreeing_against_the_other_answer():
    chat = Chat(tiny_tokenizer(), "chatml")
    judged, measured = agreement_items(9, chat, seed=0)
    for items, wording in ((judged, agreement.JUDGED), (measured, agreement.MEASURED)):
        assert len(items) == 9 and {item.source for item in items} == {AGREEMENT}
        for item in items:
            assert [chat.decode(s.answer_ids) for s in item.sequences] == list(wording[1:])
            assert item.cluster
    assert not {item.cluster for item in judged} & {item.cluster for item in measured}
    with pytest.raises(StudyError, match="agreement: 500 statements are wanted"):
        agreement_items(500, chat, seed=0)
