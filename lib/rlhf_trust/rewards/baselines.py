"""What a reward model has to beat: the words of the answers, and their length.

A reward model that orders held-out pairs no better than a bag of words has learnt, as far as these
pairs show, no more than which words people prefer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from .. import StudyError
from ..chat import Chat
from ..data.preferences import PreferencePair
from ..stats import Interval, mean_interval, paired_change, stratified_interval

Pairs = Sequence[PreferencePair]


def bag_of_words(train: Pairs, held_out: Pairs) -> np.ndarray:
    """Whether the words alone order each held-out pair as people did: 1, 0, or ½ for a tie, [held].

    scikit-learn's logistic regression (L2, C = 1) on the counts of words in the chosen answer less
    those in the rejected one, fitted on the training pairs. Every second pair enters turned round
    and there is no intercept, so the order of the two answers says nothing.
    """
    counter = CountVectorizer()
    try:
        counter.fit([answer for pair in train for answer in (pair.chosen, pair.rejected)])
    except ValueError:
        raise StudyError("bag of words: the training answers hold no words") from None

    def differences(pairs: Pairs):
        chosen, rejected = ([getattr(p, side) for p in pairs] for side in ("chosen", "rejected"))
        return counter.transform(chosen) - counter.transform(rejected)

    x = differences(train)
    signs = np.where(np.arange(len(train)) % 2, -1, 1)  # the fit needs two classes
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(x.multiply(signs[:, None]).tocsr(), signs)
    return _right(differences(held_out) @ model.coef_[0])


def longer(pairs: Pairs, chat: Chat) -> np.ndarray:
    """Sign of the chosen answer's length less the rejected one's, in tokens, [pairs]."""
    more = [len(chat.answer_ids(p.chosen)) - len(chat.answer_ids(p.rejected)) for p in pairs]
    return np.sign(more)


def length_rule(train: Pairs, held_out: Pairs, chat: Chat) -> np.ndarray:
    """Whether length alone orders each held-out pair as people did: 1, 0, or ½ for a tie, [held].

    The rule prefers the longer or the shorter answer, whichever people chose more often in the
    training pairs of the same ``source`` (in all, for a source without any); the longer one if
    that is a tie.
    """
    signs, sources = longer(train, chat), np.array([p.source for p in train])
    rule = {}
    for source in {p.source for p in held_out}:
        own = signs[sources == source]
        rule[source] = 1 if (own if len(own) else signs).sum() >= 0 else -1
    return _right(longer(held_out, chat) * [rule[p.source] for p in held_out])


def length_controlled(right: np.ndarray, held_out: Pairs, chat: Chat) -> Interval:
    """Accuracy with length held fixed, and its 95 % interval; ``right`` (0 or 1) [held].

    The mean over strata of equal weight: source (of HH-RLHF: harmless, helpful) × whether the
    chosen answer is the longer or the shorter one. A rule that knows nothing but these two has
    50 %. Stratifying by length is how Singhal et al. 2023 (arXiv 2310.03716) take it out of
    rewards; the strata here are signs, as a pair has only two answers. Pairs of equal length are
    left out, and a source in which only one sign occurs; NaN if nothing is left.
    """
    signs, sources = longer(held_out, chat), np.array([p.source for p in held_out])
    strata = []
    for source in sorted(set(sources)):
        both = [right[(sources == source) & (signs == sign)] for sign in (1, -1)]
        strata += both if all(len(part) for part in both) else []
    return stratified_interval(strata, (0.0, 1.0)) if strata else Interval(*3 * (np.nan,), 0)


def accuracies(rewards: np.ndarray, train: Pairs, held_out: Pairs, chat: Chat) -> pd.DataFrame:
    """A reward model's accuracy on held-out pairs beside what it has to beat.

    ``rewards`` of (chosen, rejected), [held, 2]; a tie is wrong, whereas a baseline's tie is worth
    ½. Columns measure, value, ci_low, ci_high (95 %, over pairs), n; ``reward model less words`` is
    the paired difference.
    """
    right = (rewards[:, 0] > rewards[:, 1]).astype(float)
    words, length = bag_of_words(train, held_out), length_rule(train, held_out, chat)
    found = {
        "reward model": mean_interval(right),
        "bag of words": mean_interval(words, "reward/words", bounds=(0.0, 1.0)),
        "length rule": mean_interval(length, "reward/length", bounds=(0.0, 1.0)),
        "reward model less words": paired_change(right, words, bounds=(0.0, 1.0)),
        "reward model, length-controlled": length_controlled(right, held_out, chat),
    }
    rows = [(name, i.value, i.low, i.high, i.n) for name, i in found.items()]
    return pd.DataFrame(rows, columns=["measure", "value", "ci_low", "ci_high", "n"])


def _right(margins: np.ndarray) -> np.ndarray:
    """Margins of chosen over rejected [pairs] as 1, 0 and, without an opinion, ½."""
    return (1 + np.sign(margins)) / 2
