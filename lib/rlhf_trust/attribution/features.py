"""What do influential examples have in common? Features of preference pairs, and their effects."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from .. import StudyError
from ..data.preferences import PreferencePair
from ..stats import DRAWS, TAILS, generator, holm, row_rank_correlations
from ..verticals.refusal import REFUSAL

CONTRACTION = re.compile(r"\b\w+['’]\w+\b")


MOST_SOURCES = 8
"""Smaller sources are no features, since each would be one more test."""


def features(pairs: Sequence[PreferencePair], topics: int = 8, seed: int = 0) -> pd.DataFrame:
    """One row a pair, indexed by its id.

    Columns (bool, number or text, which :func:`effects` tells apart): ``source: <name>`` for each
    of the largest sources (``MOST_SOURCES``; of two the first alone, since the other is its
    opposite, and none if there is one), ``multi_turn`` (more than one human turn),
    ``chosen_words`` and ``rejected_words`` (words in the answers), ``chosen_longer``,
    ``chosen_refuses`` and ``rejected_refuses`` (``REFUSAL``), and ``topic`` (:func:`topic_names`).
    """
    frame = pd.DataFrame({"example_id": [p.id for p in pairs]}).set_index("example_id")
    sizes = Counter(p.source for p in pairs)
    sources = sorted(source for source, _ in sizes.most_common(MOST_SOURCES))
    for source in sources if len(sources) > 2 else sources[:-1]:
        frame[f"source: {source}"] = [p.source == source for p in pairs]
    frame["multi_turn"] = [len(p.prompt) > 1 for p in pairs]
    frame["chosen_words"] = [len(p.chosen.split()) for p in pairs]
    frame["rejected_words"] = [len(p.rejected.split()) for p in pairs]
    frame["chosen_longer"] = frame["chosen_words"] > frame["rejected_words"]
    frame["chosen_refuses"] = [bool(REFUSAL.search(p.chosen)) for p in pairs]
    frame["rejected_refuses"] = [bool(REFUSAL.search(p.rejected)) for p in pairs]
    texts = ["\n".join((*p.prompt, p.chosen, p.rejected)) for p in pairs]
    return frame.assign(topic=topic_names(texts, topics, seed))


def topic_names(texts: Sequence[str], topics: int, seed: int) -> list[str]:
    """The topic of each text: k-means clusters of TF-IDF vectors (words of three letters on,
    without English stop words; sublinear term counts), named by the three words that weigh most in
    a cluster's centre."""
    if not 1 < topics <= len(texts):
        raise StudyError(f"topics: must lie between 2 and {len(texts)} (texts), got {topics}")
    # Contractions are function words, of which a tokenizer would leave "don" and "ll".
    vectorizer = TfidfVectorizer(
        preprocessor=lambda text: CONTRACTION.sub(" ", text.casefold()),
        stop_words="english",
        token_pattern=r"[^\W\d_]{3,}",
        sublinear_tf=True,
        min_df=2 if len(texts) >= 20 else 1,
    )
    try:
        vectors = vectorizer.fit_transform(texts)
    except ValueError:
        raise StudyError("topics: no words in common but very frequent ones") from None
    found = KMeans(topics, n_init=10, random_state=seed).fit(vectors)
    vocabulary = vectorizer.get_feature_names_out()
    names: list[str] = []
    for centre in found.cluster_centers_:
        name = ", ".join(vocabulary[i] for i in np.argsort(-centre, kind="stable")[:3])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [names[label] for label in found.labels_]


def effects(
    scores: np.ndarray, frame: pd.DataFrame, name: str = "", draws: int = DRAWS
) -> pd.DataFrame:
    """How influence scores [n] depend on each feature of ``frame`` (:func:`features`, same rows).

    =======  ==================  =========================================================  =======
    kind     column of           effect                                                     range
    =======  ==================  =========================================================  =======
    binary   bool                Cliff's delta: P(score with > score without) − P(… < …)    −1 to 1
    numeric  numbers             Spearman's rank correlation                                −1 to 1
    topic    text, one row each  mean standardised score of members less that of others     in SD
    =======  ==================  =========================================================  =======

    Above 0: such examples raise the evaluation loss more than others (on a vertical's own metric:
    are more harmful).

    95 % interval: percentiles over resamples of the examples. p: two-sided, from scores dealt out
    to the examples at random (add-one corrected). p_holm: corrected over all rows. A feature that
    all or none of the examples have gets NaN. Columns feature, kind, effect, ci_low, ci_high, p,
    p_holm, members (NaN for numbers), n.
    """
    scores = np.asarray(scores, dtype=float)
    if len(scores) != len(frame) or len(frame) < 3 or not np.isfinite(scores).all():
        raise StudyError(f"effects: needs a finite score for each of {max(3, len(frame))} examples")
    rng, n = generator(f"effects/{name}"), len(scores)
    scores = scores / (scores.std() or 1.0)
    drawn = rng.integers(n, size=(draws, n))
    dealt = rng.permuted(np.broadcast_to(scores, (draws, n)), axis=1)
    rows = []
    for feature, kind, values in _columns(frame):
        effect = _EFFECTS[kind]
        row = {"feature": feature, "kind": kind, "effect": effect(scores[None], values[None])[0]}
        if np.isfinite(row["effect"]):
            resampled = effect(scores[drawn], values[drawn])  # NaN in resamples without a member
            row["ci_low"], row["ci_high"] = np.nanquantile(resampled, TAILS)
            null = np.abs(effect(dealt, np.broadcast_to(values, (draws, n))))
            row["p"] = (1 + int((null >= abs(row["effect"]) - 1e-12).sum())) / (1 + draws)
        members = np.nan if kind == "numeric" else int(values.sum())
        rows.append(row | {"members": members, "n": n})
    names = ["feature", "kind", "effect", "ci_low", "ci_high", "p", "p_holm", "members", "n"]
    table = pd.DataFrame(rows, columns=names)
    p = table["p"].dropna()
    table.loc[p.index, "p_holm"] = holm(p)
    return table


def _columns(frame: pd.DataFrame):
    """(feature, kind, values [n]) of every row of the table: one per topic for a column of text."""
    for feature, column in frame.items():
        if pd.api.types.is_bool_dtype(column):
            yield feature, "binary", column.to_numpy(dtype=float)
        elif pd.api.types.is_numeric_dtype(column):
            yield feature, "numeric", column.to_numpy(dtype=float)
        else:
            for value in sorted(column.unique()):
                yield f"{feature}: {value}", "topic", (column == value).to_numpy(dtype=float)


def _mean_gap(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean of ``y`` where x is 1 less that where it is 0, along rows: [draws, n] twice → [draws];
    NaN where one of them has no member."""
    with np.errstate(invalid="ignore"):
        return (y * x).sum(1) / x.sum(1) - (y * (1 - x)).sum(1) / (1 - x).sum(1)


def _cliffs_delta(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """From midranks: mean rank with − mean rank without = n/2 · delta."""
    return 2 * _mean_gap(rankdata(y, axis=1), x) / y.shape[1]


_EFFECTS = {"binary": _cliffs_delta, "numeric": row_rank_correlations, "topic": _mean_gap}
