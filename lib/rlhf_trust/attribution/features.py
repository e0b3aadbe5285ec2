"""What do influential examples have in common? Features of preference pairs, and how scores hang on them."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer

from .. import StudyError
from ..data.preferences import PreferencePair
from ..stats import DRAWS, TAILS, generator, holm

REFUSAL = re.compile(
    r"\bI\s*(?:can\s?not|can['’]t|won['’]t|will not|am not able to|['’]m not able to|am unable to|['’]m unable to|"
    r"am not going to|['’]m not going to|would rather not|['’]d rather not|do not feel comfortable|"
    r"don['’]t feel comfortable)\b"
    r"|\bI\s*(?:['’]m|am) (?:not comfortable|sorry,? but)\b|\bas an AI\b|\bI must (?:decline|refuse)\b",
    re.IGNORECASE,
)
"""What counts as a refusal: the speaker says that they cannot, will not or would rather not. A list of phrases misses
refusals in other words and takes some "I can't wait" for one."""

TOPIC_WORDS = 3
"""Words that name a topic."""
CONTRACTION = re.compile(r"\b\w+['’]\w+\b")


def features(pairs: Sequence[PreferencePair], topics: int = 8, seed: int = 0) -> pd.DataFrame:
    """One row a pair, indexed by its id.

    Columns (bool, number or text, which :func:`effects` tells apart): ``harmless_half`` (else the helpful one),
    ``multi_turn`` (more than one human turn), ``chosen_words`` and ``rejected_words`` (words in the answers),
    ``chosen_longer``, ``chosen_refuses`` and ``rejected_refuses`` (``REFUSAL``), and ``topic`` (:func:`topic_names`).
    """
    if not pairs:
        raise StudyError("features: there is no pair")
    words = [[len(answer.split()) for answer in (p.chosen, p.rejected)] for p in pairs]
    return pd.DataFrame(
        {
            "harmless_half": [p.source == "harmless" for p in pairs],
            "multi_turn": [len(p.prompt) > 1 for p in pairs],
            "chosen_words": [chosen for chosen, _ in words],
            "rejected_words": [rejected for _, rejected in words],
            "chosen_longer": [chosen > rejected for chosen, rejected in words],
            "chosen_refuses": [bool(REFUSAL.search(p.chosen)) for p in pairs],
            "rejected_refuses": [bool(REFUSAL.search(p.rejected)) for p in pairs],
            "topic": topic_names(
                ["\n".join((*p.prompt, p.chosen, p.rejected)) for p in pairs], topics, seed
            ),
        },
        index=pd.Index([p.id for p in pairs], name="example_id"),
    )


def topic_names(texts: Sequence[str], topics: int, seed: int) -> list[str]:
    """The topic of each text: k-means clusters of TF-IDF vectors (words of three letters on, without English stop words;
    sublinear term counts), named by the words that weigh most in a cluster's centre."""
    if not 1 < topics <= len(texts):
        raise StudyError(
            f"topics: must lie between 2 and the number of texts ({len(texts)}), got {topics}"
        )
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
        raise StudyError(
            "topics: the texts have no words in common besides the most frequent ones of English"
        ) from None
    found = KMeans(topics, n_init=10, random_state=seed).fit(vectors)
    vocabulary = vectorizer.get_feature_names_out()
    names: list[str] = []
    for centre in found.cluster_centers_:
        name = ", ".join(vocabulary[i] for i in np.argsort(-centre, kind="stable")[:TOPIC_WORDS])
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return [names[label] for label in found.labels_]


def effects(
    scores: np.ndarray, frame: pd.DataFrame, name: str = "", draws: int = DRAWS
) -> pd.DataFrame:
    """How influence scores [n] hang on each feature of ``frame`` (:func:`features`, rows in the same order).

    ===========  ==========================  ==============================================================  ==========
    kind         column of                   effect                                                          range
    ===========  ==========================  ==============================================================  ==========
    binary       bool                        Cliff's delta: P(score with > score without) − P(… < …)         −1 to 1
    numeric      numbers                     Spearman's rank correlation                                     −1 to 1
    topic        text: one row for each      mean standardised score of members less that of the others      in SD
    ===========  ==========================  ==============================================================  ==========

    Above 0: such examples raise the evaluation loss more than others (on a vertical's own metric: are more harmful).

    95 % interval: percentiles over resamples of the examples. p: two-sided, scores dealt out to the examples at random
    (add-one corrected). p_holm: corrected over all rows. A feature that all or none of the examples have gets NaN.
    Columns feature, kind, effect, ci_low, ci_high, p, p_holm, members (NaN for numbers), n.
    """
    scores = np.asarray(scores, dtype=float)
    if len(scores) != len(frame) or len(scores) < 3:
        raise StudyError(
            f"effects: {len(scores)} scores for {len(frame)} examples; one each is needed, and at least 3"
        )
    if not np.isfinite(scores).all():
        raise StudyError("effects: a score is not finite")
    rng = generator(f"effects/{name}")
    n, spread = len(scores), scores.std()
    drawn = rng.integers(n, size=(draws, n))
    dealt = rng.permuted(np.broadcast_to(scores, (draws, n)), axis=1)
    rows = []
    for feature, kind, values in _columns(frame):

        def effect(y: np.ndarray, x: np.ndarray, kind: str = kind) -> np.ndarray:
            return (
                _mean_gap(y / (spread or 1.0), x)
                if kind == "topic"
                else (
                    2 * _mean_gap(rankdata(y, axis=-1), x) / n
                    if kind == "binary"
                    else _correlation(y, x)
                )
            )

        value = effect(scores[None], values[None])[0]
        resampled = effect(scores[drawn], values[drawn])
        resampled = resampled[np.isfinite(resampled)]  # a resample may hold no member
        row = {
            "feature": feature,
            "kind": kind,
            "effect": value,
            "ci_low": np.nan,
            "ci_high": np.nan,
            "p": np.nan,
            "members": np.nan if kind == "numeric" else int(values.sum()),
            "n": n,
        }
        if np.isfinite(value):
            null = effect(dealt, np.broadcast_to(values, (draws, n)))
            row["ci_low"], row["ci_high"] = np.quantile(resampled, TAILS)
            row["p"] = (1 + int((np.abs(null) >= abs(value) - 1e-12).sum())) / (1 + draws)
        rows.append(row)
    table = pd.DataFrame(rows)
    tested = table["p"].notna()
    table.insert(6, "p_holm", np.nan)
    table.loc[tested, "p_holm"] = holm(table.loc[tested, "p"].to_numpy())
    return table


def _columns(frame: pd.DataFrame):
    """(feature, kind, values [n]) of every row of the table: a topic each for a column of text."""
    for feature in frame:
        column = frame[feature]
        if pd.api.types.is_bool_dtype(column):
            yield feature, "binary", column.to_numpy(dtype=float)
        elif pd.api.types.is_numeric_dtype(column):
            yield feature, "numeric", column.to_numpy(dtype=float)
        else:
            for value in sorted(column.unique()):
                yield f"{feature}: {value}", "topic", (column == value).to_numpy(dtype=float)


def _mean_gap(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean of ``y`` where x is 1 less that where it is 0, along rows: [draws, n] twice → [draws]; NaN without both.

    Of midranks, times 2/n, it is Cliff's delta: mean rank with − mean rank without = n/2 · delta.
    """
    members = x.sum(1)
    both = (members > 0) & (members < x.shape[1])
    inside = np.divide((y * x).sum(1), members, out=np.full(len(y), np.nan), where=both)
    outside = np.divide(
        (y * (1 - x)).sum(1), x.shape[1] - members, out=np.full(len(y), np.nan), where=both
    )
    return inside - outside


def _correlation(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Spearman's correlation along rows, [draws, n] twice → [draws]; NaN where one side has a single value."""
    y, x = (
        ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(y, axis=1), rankdata(x, axis=1))
    )
    scale = np.sqrt(np.square(y).sum(1) * np.square(x).sum(1))
    return np.divide((y * x).sum(1), scale, out=np.full(len(y), np.nan), where=scale > 0)


def effect_words(table: pd.DataFrame, what: str) -> list[str]:
    """Which features the scores ``what`` hang on after Holm's correction, made from :func:`effects`."""
    tested = table[table["p_holm"].notna()]
    clear = tested[tested["p_holm"] < 0.05].sort_values("p", kind="stable")
    if clear.empty:
        return [
            f"No feature of {len(tested)} goes clearly with {what} (Holm-corrected p below 0.05)."
        ]
    units = {"binary": "Cliff's delta", "numeric": "rank correlation", "topic": "SD"}
    return [
        f"Of {len(tested)} features {len(clear)} go with {what} (Holm-corrected p below 0.05): "
        + "; ".join(
            f"{r.feature.replace('_', ' ')} ({units[r.kind]} {r.effect:+.2f}, {r.ci_low:+.2f} to {r.ci_high:+.2f})"
            for r in clear.itertuples()
        )
        + "."
    ]
