"""Features read off hand-made pairs, effects against scipy's, and their chance behaviour."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from rlhf_trust import StudyError
from rlhf_trust.attribution.features import REFUSAL, effects, features, topic_names
from rlhf_trust.data.preferences import PreferencePair
from scipy import stats as scipy_stats

BREAD = ["bread dough oven", "oven bread crust dough", "yeast dough bread", "flour oven bread"]
CARS = ["engine brakes motor", "motor engine tyres", "brakes tyres engine", "clutch motor engine"]


def test_features_of_pairs():
    baking, engine = ("How do I bake bread?",), ("Is my engine oil low?",)
    long = ("Bread?", "Yes?", "More bread dough")
    yeast, check = "With yeast, dough and an oven.", "Check the engine oil."
    sure, motor = "Sure: oven, dough, yeast, bread, now.", "Your motor engine needs oil and brakes."
    pairs = [
        PreferencePair("a", baking, yeast, "I can't help with bread dough.", "helpful"),
        PreferencePair("b", long, "I'm sorry, but I won't.", sure, "harmless"),
        PreferencePair("c", engine, check, motor, "helpful"),
    ]
    frame = features(pairs, topics=2)
    assert frame.index.tolist() == ["a", "b", "c"]
    # Of two sources one column says all.
    assert [name for name in frame if name.startswith("source")] == ["source: harmless"]
    assert frame["source: harmless"].tolist() == [False, True, False]
    assert frame["multi_turn"].tolist() == [False, True, False]
    assert frame["chosen_words"].tolist() == [6, 5, 4]
    assert frame["rejected_words"].tolist() == [6, 6, 7]
    assert frame["chosen_longer"].tolist() == [False, False, False]
    assert frame["chosen_refuses"].tolist() == [False, True, False]
    assert frame["rejected_refuses"].tolist() == [True, False, False]
    assert frame.loc["a", "topic"] == frame.loc["b", "topic"] != frame.loc["c", "topic"]
    with pytest.raises(StudyError, match="topics: must lie between"):
        features([])


def test_every_large_source_is_a_feature():
    def sources_of(*sources):
        """Columns for pairs of these sources."""
        texts = [BREAD[i % 2] + CARS[i % 2] for i in range(len(sources))]
        pairs = [PreferencePair(str(i), (texts[i],), "", "", s) for i, s in enumerate(sources)]
        return features(pairs, topics=2).filter(like="source: ")

    frame = sources_of("b", "a", "c", "a")
    assert frame.columns.tolist() == ["source: a", "source: b", "source: c"]
    assert frame["source: a"].tolist() == [False, True, False, True]
    assert sources_of("a", "a").empty
    many = sources_of(*"aabcdefghijjj")
    assert many.columns.tolist() == [f"source: {s}" for s in "abcdefgj"]


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I can't share that.", True),
        ("I’m not going to do this", True),
        ("Sorry. I'd rather not say", True),
        ("As an AI, opinions are not mine", True),
        ("I don't feel comfortable with it", True),
        ("I cannot", True),
        ("You can't do that here", False),
        ("I can do it", False),
        ("It will not work", False),
        ("I am sorry for your loss", False),
    ],
)
def test_refusals(text, refuses):
    assert bool(REFUSAL.search(text)) is refuses


def test_topics_are_named_by_their_words():
    names = topic_names(BREAD + CARS, topics=2, seed=0)
    assert len(set(names[:4])) == len(set(names[4:])) == 1 and names[0] != names[4]
    assert set(names[0].split(", ")) <= set(" ".join(BREAD).split()) and "engine" in names[4]
    assert names == topic_names(BREAD + CARS, topics=2, seed=0)
    with pytest.raises(StudyError, match="topics: must lie between"):
        topic_names(BREAD, topics=9, seed=0)
    with pytest.raises(StudyError, match="no words in common"):
        topic_names(["the of and"] * 3, topics=2, seed=0)


def some_frame(n: int, rng) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "flag": rng.random(n) < 0.3,
            "length": rng.integers(1, 30, size=n),
            "topic": rng.choice(["bread", "cars", "law"], size=n),
        }
    )


def test_effects_equal_scipys():
    rng = np.random.default_rng(0)
    frame = some_frame(80, rng)
    scores = rng.normal(size=80) + 1.5 * frame["flag"].to_numpy()
    scores = np.round(scores + (frame["topic"] == "law").to_numpy(), 1)  # ties
    table = effects(scores, frame, draws=500).set_index("feature")
    u = scipy_stats.mannwhitneyu(scores[frame["flag"]], scores[~frame["flag"]])
    members = frame["flag"].sum()
    delta = 2 * u.statistic / (members * (80 - members)) - 1
    assert table.loc["flag", "effect"] == pytest.approx(delta)
    rho, p = scipy_stats.spearmanr(scores, frame["length"])
    assert table.loc["length", "effect"] == pytest.approx(rho)
    z, law = (scores - scores.mean()) / scores.std(), frame["topic"] == "law"
    assert table.loc["topic: law", "effect"] == pytest.approx(z[law].mean() - z[~law].mean())
    assert list(table.index) == ["flag", "length", "topic: bread", "topic: cars", "topic: law"]
    assert table["kind"].tolist() == ["binary", "numeric", "topic", "topic", "topic"]
    assert table.loc["flag", "p_holm"] < 0.05 and table.loc["flag", "ci_low"] > 0
    assert ((table["ci_low"] < table["effect"]) & (table["effect"] < table["ci_high"])).all()
    assert abs(table.loc["length", "p"] - p) < 0.06
    assert (table["p_holm"] >= table["p"]).all() and table.loc["topic: law", "members"] == law.sum()


def test_without_an_effect_nothing_is_found():
    """p-values of unrelated scores are uniform, and intervals hold 0 about 95 % of the time."""
    small, held, studies = [], [], 60
    for study in range(studies):
        rng = np.random.default_rng(study)
        scores, frame = rng.normal(size=60), some_frame(60, rng).drop(columns="topic")
        table = effects(scores, frame, f"study {study}", draws=199)
        small += (table["p"] < 0.2).tolist()
        held += ((table["ci_low"] < 0) & (table["ci_high"] > 0)).tolist()
    assert 0.1 < np.mean(small) < 0.3 and np.mean(held) > 0.88


def test_features_that_tell_nothing_apart_and_bad_input():
    frame = pd.DataFrame({"always": [True] * 6, "constant": [3] * 6, "flag": [True, False] * 3})
    table = effects(np.array([5.0, 1, 4, 2, 6, 0]), frame, draws=100).set_index("feature")
    assert table.loc[["always", "constant"], ["effect", "p", "p_holm"]].isna().all(axis=None)
    assert table.loc["flag", "effect"] == 1
    assert table.loc["flag", "p_holm"] == table.loc["flag", "p"]
    level = effects(np.ones(6), frame, draws=100).set_index("feature")
    assert level.loc["flag", "effect"] == 0 and level.loc["flag", "p"] == 1
    with pytest.raises(StudyError, match="a finite score for each of 6"):
        effects(np.ones(5), frame)
    with pytest.raises(StudyError, match="a finite score for each of 6"):
        effects(np.array([1.0, 2, 3, 4, 5, np.nan]), frame)
