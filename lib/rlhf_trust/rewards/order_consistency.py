"""Reward models on embeddings: Bradley-Terry against order-consistent classifiers (Sun et al. 2024, arXiv 2411.04991).

Downstream a reward only has to put answers in the right order: sign(r̂₁ − r̂₂) = sign(r₁ − r₂). A Bradley-Terry model fits
differences of rewards, P(i ≻ j) = σ(r_i − r_j), from pairs. A classifier looks at one answer at a time, preferred 1, other 0;
its logit grows with the chance of beating the opponents that there were, which is an order too, though of chances, not of
reward units. The classifier may compare answers to different prompts, so that pairs across prompts can be annotated; it may
also learn which prompts are easy, so that its reward is only to be compared within a prompt.

Everything stands on embeddings [prompts, answers, d] of answers and a golden reward [prompts, answers] that plays the
people: it annotates pairs, rightly with probability σ(β|Δr|), and it judges what the learnt rewards would pick.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import pandas as pd
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from .. import StudyError
from ..artifacts import ResultCache, content_key, progress
from ..stats import LEVEL, mean_interval, row_rank_correlations

Reward = Callable[[np.ndarray], np.ndarray]
"""Embeddings [n, d] → rewards [n]."""

CHOICES = ("same", "cross", "similar", "diversified")
"""Which two answers are annotated: two of one prompt; answers to two prompts; of one prompt the two in the middle of its
golden order; of one prompt the best and the worst."""


# --- annotation ----------------------------------------------------------------------------------------------------


def annotation_quality(variance: float) -> float:
    """Expected share of right labels, E σ(|Z|) with Z ~ N(0, v), v = β² · Var(Δr).

    (The paper's closed form takes β²σ² with σ² the variance of one answer's reward; for two independent answers Var(Δr) is
    twice that. In terms of v nothing is ambiguous.)
    """
    if not variance > 0:
        raise StudyError(f"annotation quality: the variance must be above 0, got {variance}")
    if np.isinf(variance):
        return 1.0
    spread = variance**0.5
    return 2 * quad(lambda z: expit(z) * norm.pdf(z, scale=spread), 0, np.inf)[0]


def choose_pairs(golden: np.ndarray, how: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` pairs of answers as (prompt, answer) indices, int [n, 2, 2]; ``golden`` [prompts, answers], ``how`` of ``CHOICES``.

    Drawn without replacement while distinct pairs last; after that every pair comes once more before one comes a third time, to
    be annotated anew. (Similar and diversified have one pair a prompt.)
    """
    prompts, answers = golden.shape
    if how not in CHOICES:
        raise StudyError(f"pair choice: must be one of {', '.join(CHOICES)}, got {how!r}")
    if answers < 2 or (how == "cross" and prompts < 2):
        raise StudyError(
            f"pair choice {how}: {prompts} prompts with {answers} answers each have no such pair"
        )
    there_are = {"same": prompts * comb(answers, 2), "cross": comb(prompts, 2) * answers**2}.get(
        how, prompts
    )
    passes, rest = divmod(n, there_are)
    drawn = np.concatenate(
        [rng.permutation(there_are) for _ in range(passes)]
        + [rng.choice(there_are, rest, replace=False)]
    )
    if how == "cross":
        prompt_pair, answer_pair = np.divmod(drawn, answers**2)
        return np.stack(
            [np.stack(_two_of(prompt_pair), 1), np.stack(np.divmod(answer_pair, answers), 1)], 2
        )
    if how == "same":
        of, answer_pair = np.divmod(drawn, comb(answers, 2))
        first, second = _two_of(answer_pair)
    else:
        of, order = drawn, np.argsort(golden, axis=1)
        low, high = (answers // 2 - 1, answers // 2) if how == "similar" else (0, answers - 1)
        first, second = order[of, low], order[of, high]
    return np.stack([np.stack([of, first], 1), np.stack([of, second], 1)], 1)


def _two_of(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair of that number in the row (0, 1), (0, 2), (1, 2), (0, 3), …"""
    high = ((1 + np.sqrt(1 + 8 * number)) / 2).astype(int)
    return number - high * (high - 1) // 2, high


def distinct(pairs: np.ndarray) -> int:
    """How many different pairs of answers there are among ``pairs`` [n, 2, 2], whichever comes first."""
    answer = pairs[..., 0] * (pairs[..., 1].max() + 1) + pairs[..., 1]
    return len(np.unique(answer.min(1) * (answer.max() + 1) + answer.max(1)))


def annotate(
    golden: np.ndarray, pairs: np.ndarray, beta: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Pairs with the answer first that the annotator prefers, int [n, 2, 2], and the share of labels that are right.

    The label is right with probability σ(β|Δr|); ``beta`` inf is an annotator who never errs.
    """
    rewards = golden[pairs[..., 0], pairs[..., 1]]
    gap = rewards[:, 0] - rewards[:, 1]
    with np.errstate(invalid="ignore"):
        chance = np.where(gap == 0, 0.5, expit(beta * np.abs(gap)))
    right = rng.random(len(pairs)) < chance
    first_wins = (gap > 0) == right
    return np.where(first_wins[:, None, None], pairs, pairs[:, ::-1]), float(right.mean())


# --- learners ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A multilayer perceptron with ReLU and how it is trained (Adam; the best of the epochs on a fifth of the pairs, kept apart
    by prompt; stopped after ``patience`` epochs without a better one)."""

    hidden: tuple[int, ...] = (256, 128)
    learning_rate: float = 1e-3
    epochs: int = 30
    batch: int = 256
    patience: int = 3


def bradley_terry(won: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """−log σ(r_won − r_lost), mean over pairs; rewards [n] each."""
    return -logsigmoid(won - lost).mean()


def classification(won: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "this answer was preferred", mean over answers; logits [n] each."""
    both = torch.cat([won, lost])
    return binary_cross_entropy_with_logits(
        both, torch.cat([torch.ones_like(won), torch.zeros_like(lost)])
    )


def held_out_by_prompt(prompts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Which pairs judge the epochs, bool [n]; ``prompts`` [n, 2] of each pair, ``order`` the place of every prompt.

    Prompts are held out one by one, in order, until a fifth of the pairs has one of them; the other pairs have none and are
    learnt from. A held-out pair is then of answers that were not learnt from; across prompts, at least one of the two is.
    """
    first = order[prompts].min(1)
    return first <= np.sort(first)[max(1, len(first) // 5) - 1]


def fit_network(
    won: np.ndarray,
    lost: np.ndarray,
    prompts: np.ndarray,
    loss: Callable,
    network: Network,
    seed: int,
) -> Reward:
    """A perceptron fitted to preferred and other embeddings, both [n, d], of answers to ``prompts`` [n, 2]."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = won.mean(0), won.std(0) + 1e-6
    data = torch.tensor(
        np.stack([(won - mean) / spread, (lost - mean) / spread]), dtype=torch.float32
    )
    apart = torch.tensor(
        held_out_by_prompt(
            prompts, torch.randperm(int(prompts.max()) + 1, generator=generator).numpy()
        )
    )
    held_out, train = apart.nonzero()[:, 0], (~apart).nonzero()[:, 0]
    if not len(train):
        raise StudyError(
            f"reward network: {len(won)} pairs are too few to keep a prompt's apart; give it more prompts"
        )
    sizes = [data.shape[2], *network.hidden, 1]
    layers = []
    for wide, narrow in itertools.pairwise(sizes):
        layer = torch.nn.Linear(wide, narrow)
        with torch.no_grad():  # He et al. 2015, from the generator, so that the seed alone decides
            layer.weight.copy_(torch.randn(narrow, wide, generator=generator) * (2 / wide) ** 0.5)
            layer.bias.zero_()
        layers += [layer, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), lr=network.learning_rate)
    best, kept, since = float("inf"), None, 0
    for _ in range(network.epochs):
        for part in train[torch.randperm(len(train), generator=generator)].split(network.batch):
            optimizer.zero_grad()
            loss(*model(data[:, part]).squeeze(-1)).backward()
            optimizer.step()
        with torch.no_grad():
            now = float(loss(*model(data[:, held_out]).squeeze(-1)))
        if not np.isfinite(now):
            raise StudyError(
                "reward network: the loss is not finite; lower learning_rate, or look at the embeddings"
            )
        if now < best:
            best, kept, since = now, {k: v.clone() for k, v in model.state_dict().items()}, 0
        else:
            since += 1
            if since >= network.patience:
                break
    model.load_state_dict(kept)

    @torch.no_grad()
    def reward(embeddings: np.ndarray) -> np.ndarray:
        return (
            model(torch.tensor((embeddings - mean) / spread, dtype=torch.float32))
            .squeeze(-1)
            .double()
            .numpy()
        )

    return reward


def fit_trees(won: np.ndarray, lost: np.ndarray, seed: int) -> Reward:
    """LightGBM's classifier with its defaults but for 63 bins a feature in place of 255, a third of the time on embeddings; the
    reward is its raw score, the log-odds of "preferred"."""
    try:  # its library finds libgomp through torch's, which is loaded by now
        from lightgbm import LGBMClassifier
    except OSError as error:
        raise StudyError(
            f"lightgbm: cannot be loaded ({error}); install OpenMP (Debian: libgomp1, macOS: libomp), or leave lightgbm out "
            "of learners"
        ) from None
    model = LGBMClassifier(
        max_bin=63,
        random_state=seed,
        n_jobs=torch.get_num_threads(),
        verbose=-1,
        deterministic=True,
        force_row_wise=True,
    )
    model.fit(np.concatenate([won, lost]), np.repeat([1, 0], [len(won), len(lost)]))
    return lambda embeddings: model.predict(embeddings, raw_score=True)


LEARNERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Network, int], Reward]] = {
    "bradley_terry": lambda won, lost, prompts, network, seed: fit_network(
        won, lost, prompts, bradley_terry, network, seed
    ),
    "classifier": lambda won, lost, prompts, network, seed: fit_network(
        won, lost, prompts, classification, network, seed
    ),
    "lightgbm": lambda won, lost, prompts, network, seed: fit_trees(won, lost, seed),
}


# --- judging -------------------------------------------------------------------------------------------------------


def pair_accuracy(learnt: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Of each prompt the share of its pairs of answers that the learnt reward orders as the golden one: both [prompts,
    answers] → [prompts]. Pairs that are equal in gold are left out (NaN if all are), a learnt tie is wrong."""
    i, j = np.triu_indices(golden.shape[1], 1)
    gap, learnt_gap = golden[:, i] - golden[:, j], learnt[:, i] - learnt[:, j]
    counted = gap != 0
    right = (gap * learnt_gap > 0) & counted
    return np.divide(
        right.sum(1), counted.sum(1), out=np.full(len(golden), np.nan), where=counted.any(1)
    )


def best_of_n(learnt: np.ndarray, golden: np.ndarray, n: int) -> np.ndarray:
    """Of each prompt the golden reward of what the learnt one picks among ``n`` random answers, less the mean of all its
    answers: both [prompts, M] → [prompts].

    Exact, without drawing: the answer that stands k-th from below in the learnt order is the best of n drawn without
    replacement with probability C(k−1, n−1) / C(M, n). Ties in the learnt order are broken by the answers' order.
    """
    m = golden.shape[1]
    if not 1 <= n <= m:
        raise StudyError(f"best of n: n = {n} of {m} answers")
    chances = np.array([comb(k, n - 1) / comb(m, n) for k in range(m)])
    order = np.argsort(learnt, axis=1, kind="stable")
    return np.take_along_axis(golden, order, 1) @ chances - golden.mean(1)


def rank_correlation(learnt: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Spearman's correlation within each prompt, [prompts]; 0 where the learnt reward is constant, NaN where the golden one is."""
    found = row_rank_correlations(learnt, golden)
    return np.where(np.isnan(found) & (np.ptp(golden, axis=1) > 0), 0.0, found)


# --- the sweep -----------------------------------------------------------------------------------------------------


def golden_network(embeddings: np.ndarray, seed: int, hidden: int = 64) -> np.ndarray:
    """A golden reward with known truth: a random network of one hidden layer on the standardised embeddings, [n, d] → [n]."""
    rng = np.random.default_rng(seed)
    standard = (embeddings - embeddings.mean(0)) / (embeddings.std(0) + 1e-6)
    wide = np.tanh(
        standard @ rng.normal(size=(standard.shape[1], hidden)) / standard.shape[1] ** 0.5 * 2
    )
    return wide @ rng.normal(size=hidden)


def unit_of(golden: np.ndarray) -> float:
    """The standard deviation within prompts of a golden reward [prompts, answers]: of two answers to one prompt the difference
    has a variance of 2 in this unit, however few answers there are."""
    spread = float(np.sqrt(golden.var(1, ddof=1).mean()))
    if not (np.isfinite(golden).all() and spread > 0):
        raise StudyError(
            "golden reward: is constant or not finite; look at the reward model, or ask for longer answers"
        )
    return spread


def in_units(golden: np.ndarray) -> np.ndarray:
    """A golden reward in standard deviations within prompts, [prompts, answers]."""
    return (golden - golden.mean()) / unit_of(golden)


def prompts_share(golden: np.ndarray) -> float:
    """Which share of a golden reward's variance lies between prompts, [prompts, answers]: means over m answers also vary by
    what lies within, a m-th of it, which is taken off."""
    within = unit_of(golden) ** 2
    between = max(0.0, float(golden.mean(1).var(ddof=1)) - within / golden.shape[1])
    return between / (between + within)


@dataclass(frozen=True)
class Bench:
    """Embeddings [prompts, answers, d] and golden rewards [prompts, answers], to learn from and to be judged by."""

    train: np.ndarray
    train_golden: np.ndarray
    test: np.ndarray
    test_golden: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Of all numbers in it."""
        arrays = (self.train, self.train_golden, self.test, self.test_golden)
        return hashlib.sha256(
            b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
        ).hexdigest()[:16]


def check(
    learners: Sequence[str],
    choices: Sequence[str],
    betas: Sequence[float],
    amounts: Sequence[int],
    seeds: Sequence[int],
    best_of: Sequence[int],
    answers: int,
    ppo_beta: float | None = None,
) -> None:
    """Whether a sweep can be made of these, judged by so many ``answers`` to a test prompt, and PPO follow a reward learnt from
    its annotator of ``ppo_beta``; an error names the parameter."""
    for name, given, known in (
        ("learners", learners, LEARNERS),
        ("pair_choices", choices, CHOICES),
    ):
        if not given or not set(given) <= set(known) or len(set(given)) < len(given):
            raise StudyError(
                f"{name}: must be of {', '.join(known)}, each once, got {', '.join(map(str, given)) or 'none'}"
            )
    for name, given, least in (
        ("betas", betas, 0),
        ("amounts", amounts, 1),
        ("best_of", best_of, 0),
    ):
        if not given or not all(x > least for x in given) or sorted(set(given)) != list(given):
            raise StudyError(
                f"{name}: must be above {least}, in rising order, got {', '.join(map(str, given)) or 'none'}"
            )
    if not seeds:
        raise StudyError("n_seeds: must be at least 1")
    if best_of[-1] > answers:
        raise StudyError(
            f"best_of: {best_of[-1]} of {answers} answers to a prompt; lower it, or raise answers_test"
        )
    if ppo_beta is not None and ppo_beta not in betas:
        raise StudyError(
            f"ppo_beta: must be one of betas, {', '.join(map(str, betas))}; got {ppo_beta}"
        )


def sweep(
    bench: Bench,
    learners: Sequence[str],
    choices: Sequence[str],
    betas: Sequence[float],
    amounts: Sequence[int],
    seeds: Sequence[int],
    best_of: Sequence[int],
    network: Network | None = None,
    desc: str = "reward models",
    kept: ResultCache | None = None,
) -> pd.DataFrame:
    """Every learner on every combination, each with each seed: one row each. ``kept`` holds what an interrupted sweep had.

    Columns learner, pairs, beta, amount, seed, label_accuracy, mean_gap (mean |Δr| of the annotated pairs), distinct (how many
    of them are different ones), pair_accuracy, spearman, gain_<n> for every n of ``best_of`` (golden units): means over test
    prompts. Of a combination all learners see the same annotated pairs.
    """
    check(learners, choices, betas, amounts, seeds, best_of, bench.test_golden.shape[1])
    combinations = list(itertools.product(choices, betas, amounts, seeds))
    rows, network = [], network or Network()
    for how, beta, amount, seed in progress(combinations, desc=desc, unit="set of pairs"):
        key = content_key(how, beta, amount, seed, learners, best_of, network)
        if kept is not None and key in kept:
            rows += kept[key]["rows"]
            continue
        of_pairs: list[dict] = []
        rng = np.random.default_rng([seed, CHOICES.index(how), amount])
        pairs, right = annotate(
            bench.train_golden, choose_pairs(bench.train_golden, how, amount, rng), beta, rng
        )
        won, lost = (bench.train[pairs[:, side, 0], pairs[:, side, 1]] for side in (0, 1))
        gaps = np.abs(np.diff(bench.train_golden[pairs[..., 0], pairs[..., 1]], axis=1))
        for learner in learners:
            reward = LEARNERS[learner](won, lost, pairs[..., 0], network, seed)
            learnt = reward(bench.test.reshape(-1, bench.test.shape[-1])).reshape(
                bench.test.shape[:2]
            )
            of_pairs.append(
                {
                    "learner": learner,
                    "pairs": how,
                    "beta": beta,
                    "amount": amount,
                    "seed": seed,
                    "label_accuracy": right,
                    "mean_gap": float(gaps.mean()),
                    "distinct": distinct(pairs),
                    "pair_accuracy": float(np.nanmean(pair_accuracy(learnt, bench.test_golden))),
                    "spearman": float(np.nanmean(rank_correlation(learnt, bench.test_golden))),
                }
                | {
                    f"gain_{n}": float(best_of_n(learnt, bench.test_golden, n).mean())
                    for n in best_of
                }
            )
        rows += of_pairs
        if kept is not None:
            kept.add(key, rows=of_pairs)
    return pd.DataFrame(rows)


def against_bradley_terry(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Every other learner less Bradley-Terry on the same pairs: columns learner, pairs, beta, amount, distinct, label_accuracy,
    difference, ci_low, ci_high (95 %, over seeds), seeds. ``found``: a sweep's; without Bradley-Terry in it, no row."""
    keys = ["pairs", "beta", "amount"]
    wide = found.pivot(index=[*keys, "seed"], columns="learner", values=metric)
    annotated = found.groupby(keys)[["distinct", "label_accuracy"]].mean()
    rows = []
    for learner in wide.columns.drop("bradley_terry") if "bradley_terry" in wide else ():
        for (how, beta, amount), part in (wide[learner] - wide["bradley_terry"]).groupby(
            level=keys
        ):
            interval = mean_interval(
                part.to_numpy(),
                f"order/{learner}/{how}/{beta}/{amount}/{metric}",
                bounds=(-np.inf, np.inf),
            )
            rows.append(
                {
                    "learner": learner,
                    "pairs": how,
                    "beta": beta,
                    "amount": amount,
                    **annotated.loc[(how, beta, amount)],
                    "difference": interval.value,
                    "ci_low": interval.low,
                    "ci_high": interval.high,
                    "seeds": interval.n,
                }
            )
    return pd.DataFrame(rows)


def words(differences: pd.DataFrame) -> list[str]:
    """Where a classifier beats Bradley-Terry and where it loses, from :func:`against_bradley_terry`; one seed shows neither."""
    if differences.empty:
        return []

    def places(rows: pd.DataFrame) -> str:
        return "; ".join(
            f"{r.pairs} pairs, {r.amount} of them"
            + (f" ({r.distinct:.0f} distinct)" if r.distinct < r.amount else "")
            + f", {r.label_accuracy:.0%} of labels right ({r.difference:+.3f})"
            for r in rows.itertuples()
        )

    sentences = []
    for learner, part in differences.groupby("learner", sort=False):
        seeds = int(part["seeds"].min())
        if seeds < 2:
            sentences.append(
                f"**{learner}** against Bradley-Terry: with one seed nothing can be said; raise n_seeds."
            )
            continue
        better, worse = part[part["ci_low"] > 0], part[part["ci_high"] < 0]
        sentences.append(
            f"**{learner}** against Bradley-Terry, {len(part)} combinations: clearly better in {len(better)}"
            + (f" ({places(better)})" if len(better) else "")
            + f", clearly worse in {len(worse)}"
            + (f" ({places(worse)})" if len(worse) else "")
            + f", in the others the interval over {seeds} seeds "
            "holds zero. That is for these prompts and answers, which all seeds share, and by chance alone about "
            f"{(1 - LEVEL) * len(part):.1f} would be clear."
        )
    return sentences
