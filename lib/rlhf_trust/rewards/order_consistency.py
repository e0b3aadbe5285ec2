"""Reward models on embeddings: Bradley-Terry against order-consistent classifiers (Sun et al. 2024,
arXiv 2411.04991).

Downstream a reward only has to put answers in the right order: sign(r̂₁ − r̂₂) = sign(r₁ − r₂). A
Bradley-Terry model fits differences of rewards, P(i ≻ j) = σ(r_i − r_j), to pairs. A classifier
sees one answer at a time, chosen 1, rejected 0; its logit grows with the probability of beating the
opponents in the data, which is an order too, though of probabilities, not of reward units. The
classifier can compare answers to different prompts, so pairs across prompts can be annotated; it
can also learn which prompts are easy, so that its reward is comparable only within a prompt.

Data are embeddings [prompts, answers, d] of answers and a golden reward [prompts, answers] that
stands for the people: it annotates pairs, correctly with probability σ(β|Δr|), and it scores what
the learnt rewards pick.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise, product
from math import comb

import numpy as np
import pandas as pd
import torch
from scipy.special import expit
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from .. import StudyError, require
from ..artifacts import ResultCache, code_hash, content_key, progress
from ..stats import LEVEL, mean_interval, row_rank_correlations

Reward = Callable[[np.ndarray], np.ndarray]
"""Embeddings [n, d] → rewards [n]."""

CHOICES = ("same", "cross", "similar", "diversified")
"""Which two answers are annotated: two to one prompt; answers to two prompts; the two in the middle
of a prompt's golden order; its best and its worst."""


# --- annotation -----------------------------------------------------------------------------------


def choose_pairs(golden: np.ndarray, how: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` pairs of answers as (prompt, answer) indices, int [n, 2, 2]; ``golden`` [prompts,
    answers], ``how`` one of ``CHOICES``.

    Drawn without replacement while distinct pairs last; then every pair comes a second time, to be
    annotated anew, before one comes a third time. (Similar and diversified have one pair a prompt.)
    """
    prompts, answers = golden.shape
    sizes = {"same": prompts * comb(answers, 2), "cross": comb(prompts, 2) * answers**2}
    distinct_pairs = sizes.get(how, prompts * (answers > 1))
    given = f"{prompts} prompts with {answers} answers"
    require(distinct_pairs, f"pair choice {how}: {given} have none")
    passes, rest = divmod(n, distinct_pairs)
    drawn = [rng.permutation(distinct_pairs) for _ in range(passes)]
    drawn = np.concatenate([*drawn, rng.choice(distinct_pairs, rest, replace=False)])
    if how == "cross":
        prompt_pair, answer_pair = np.divmod(drawn, answers**2)
        of_prompt, of_answer = _numbered_pair(prompt_pair), np.divmod(answer_pair, answers)
    elif how == "same":
        prompt, answer_pair = np.divmod(drawn, comb(answers, 2))
        of_prompt, of_answer = (prompt, prompt), _numbered_pair(answer_pair)
    else:
        order = np.argsort(golden, axis=1)[drawn]
        low, high = (answers // 2 - 1, answers // 2) if how == "similar" else (0, answers - 1)
        of_prompt, of_answer = (drawn, drawn), (order[:, low], order[:, high])
    return np.stack([np.stack(of_prompt, 1), np.stack(of_answer, 1)], 2)


def _numbered_pair(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pair of that number in the sequence (0, 1), (0, 2), (1, 2), (0, 3), …"""
    high = ((1 + np.sqrt(1 + 8 * number)) / 2).astype(int)
    return number - high * (high - 1) // 2, high


def distinct(pairs: np.ndarray) -> int:
    """Number of distinct pairs of answers in ``pairs`` [n, 2, 2], in either order."""
    answer = pairs[..., 0] * (pairs[..., 1].max() + 1) + pairs[..., 1]
    return len(np.unique(np.sort(answer, axis=1), axis=0))


def annotate(
    golden: np.ndarray, pairs: np.ndarray, beta: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """The pairs with the answer that the annotator prefers first, int [n, 2, 2], and the share of
    correct labels.

    A label is correct with probability σ(β|Δr|); ``beta`` inf is an annotator who never errs.
    """
    rewards = golden[pairs[..., 0], pairs[..., 1]]
    gap = rewards[:, 0] - rewards[:, 1]
    with np.errstate(invalid="ignore"):
        chance = np.where(gap == 0, 0.5, expit(beta * np.abs(gap)))
    correct = rng.random(len(pairs)) < chance
    first_wins = (gap > 0) == correct
    return np.where(first_wins[:, None, None], pairs, pairs[:, ::-1]), float(correct.mean())


@dataclass(frozen=True)
class Annotated:
    """Annotated pairs: embeddings ``chosen`` and ``rejected`` [n, d], the ``pairs`` as indices [n,
    2, 2] with the preferred answer first, and the share of ``correct`` labels."""

    chosen: np.ndarray
    rejected: np.ndarray
    pairs: np.ndarray
    correct: float


# --- reward models --------------------------------------------------------------------------------


HIDDEN, LEARNING_RATE, EPOCHS, BATCH, PATIENCE = (256, 128), 1e-3, 30, 256, 3
"""A multilayer perceptron with ReLU and its training: Adam, keeping the best epoch on a fifth of
the pairs, held out by prompt, and stopping after ``PATIENCE`` epochs without a better one."""


def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """−log σ(r_chosen − r_rejected), mean over pairs; rewards [n] each."""
    return -logsigmoid(chosen - rejected).mean()


def classification(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of "this answer was chosen", mean over answers; logits [n] each."""
    labels = torch.cat([torch.ones_like(chosen), torch.zeros_like(rejected)])
    return binary_cross_entropy_with_logits(torch.cat([chosen, rejected]), labels)


SHRINK = 0.5 ** torch.arange(11)
"""Factors on rewards, 1 to 1/1024."""


def shrink_factor(loss: Callable, chosen: torch.Tensor, rejected: torch.Tensor) -> float:
    """The factor of ``SHRINK`` by which these rewards [n] have the least loss.

    Noisy labels make a network overconfident: its loss can be above log 2, a constant's, although
    it orders pairs better than chance. Shrinking leaves the order as it is, and with the least
    factor rewards are almost constant, so that shrunk rewards are not worse than a constant (up to
    the loss of 1/1024 of them).
    """
    losses = torch.stack([loss(factor * chosen, factor * rejected) for factor in SHRINK])
    return float(SHRINK[losses.argmin()])


def perceptron(widths: Sequence[int], generator: torch.Generator) -> torch.nn.Module:
    """[…, widths[0]] → […] by ReLU layers of these ``widths`` (the last one 1), which start as
    ``torch.nn.Linear`` does, uniform within ±1/√(inputs), but from this ``generator`` alone."""
    layers = []
    for width, narrower in pairwise(widths):
        layer = torch.nn.Linear(width, narrower)
        for weights in layer.parameters():
            torch.nn.init.uniform_(weights, -(width**-0.5), width**-0.5, generator=generator)
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1], torch.nn.Flatten(-2))


def held_out_by_prompt(prompts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Which pairs are held out, bool [n]; ``prompts`` [n, 2] of each pair, ``order`` [prompts]
    ranks the prompts.

    Prompts are held out one by one, in order, until a fifth of the pairs involves one of them; the
    model trains on the pairs that involve none. Both answers of a held-out pair are then unseen;
    across prompts, at least one is.
    """
    first = order[prompts].min(1)
    return first <= np.sort(first)[max(1, len(first) // 5) - 1]


def fit_network(data: Annotated, loss: Callable, seed: int) -> Reward:
    """A perceptron fitted to annotated pairs, its rewards shrunk by :func:`shrink_factor`."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = data.chosen.mean(0), data.chosen.std(0) + 1e-6

    def standardised(embeddings: np.ndarray) -> torch.Tensor:
        return torch.tensor((embeddings - mean) / spread, dtype=torch.float32)

    both, prompts = standardised(np.stack([data.chosen, data.rejected])), data.pairs[..., 0]
    order = torch.randperm(int(prompts.max()) + 1, generator=generator).numpy()
    apart = held_out_by_prompt(prompts, order)
    held_out, train = (torch.tensor(np.flatnonzero(part)) for part in (apart, ~apart))
    require(len(train), f"reward network: {len(prompts)} pairs are too few; raise n_prompts")
    model = perceptron([both.shape[2], *HIDDEN, 1], generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    best, weights, since = float("inf"), {}, 0
    for _ in range(EPOCHS):
        for part in train[torch.randperm(len(train), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            loss(*model(both[:, part])).backward()
            optimizer.step()
        with torch.no_grad():
            now = float(loss(*model(both[:, held_out])))
        require(np.isfinite(now), "reward network: the loss is not finite; lower its learning rate")
        since += 1
        if now < best:
            best, since = now, 0
            weights = {name: value.clone() for name, value in model.state_dict().items()}
        elif since >= PATIENCE:
            break
    model.load_state_dict(weights)
    model.requires_grad_(False)
    scale = shrink_factor(loss, *model(both[:, held_out]))
    return lambda embeddings: scale * model(standardised(embeddings)).double().numpy()


def fit_trees(data: Annotated, seed: int) -> Reward:
    """LightGBM's classifier with its defaults except for 63 bins a feature instead of 255, which
    takes a third of the time on embeddings; the reward is its raw score, the log-odds of
    "chosen"."""
    try:  # its library finds libgomp through torch's, which is loaded by now
        from lightgbm import LGBMClassifier
    except OSError as error:
        openmp = "OpenMP (Debian: libgomp1, macOS: libomp)"
        raise StudyError(f"lightgbm: {error}; install {openmp} or leave it out") from None
    options = dict(random_state=seed, deterministic=True, force_row_wise=True, verbose=-1)
    model = LGBMClassifier(max_bin=63, n_jobs=torch.get_num_threads(), **options)
    labels = np.repeat([1, 0], [len(data.chosen), len(data.rejected)])
    model.fit(np.concatenate([data.chosen, data.rejected]), labels)
    return lambda embeddings: model.predict(embeddings, raw_score=True)


LOSSES = {"bradley_terry": bradley_terry, "classifier": classification}


def fit(name: str, data: Annotated, seed: int) -> Reward:
    """``lightgbm``, or a network with one of ``LOSSES``, fitted to annotated pairs."""
    return fit_trees(data, seed) if name == "lightgbm" else fit_network(data, LOSSES[name], seed)


# --- metrics --------------------------------------------------------------------------------------


def pair_accuracy(learnt: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Share of each prompt's pairs of answers that the learnt reward orders as the golden one: both
    [prompts, answers] → [prompts]. Pairs that tie in gold are left out (NaN if all do), a learnt
    tie is wrong."""
    i, j = np.triu_indices(golden.shape[1], 1)
    gap, learnt_gap = golden[:, i] - golden[:, j], learnt[:, i] - learnt[:, j]
    right, counted = (gap * learnt_gap > 0).sum(1), (gap != 0).sum(1)
    return np.where(counted, right / np.maximum(counted, 1), np.nan)


def best_of_n(learnt: np.ndarray, golden: np.ndarray, n: int) -> np.ndarray:
    """Golden reward of the answer that the learnt reward picks among ``n`` random ones, less the
    mean over all the prompt's answers: both [prompts, M] → [prompts].

    Exact, without drawing: the k-th lowest answer in the learnt order is the best of n drawn
    without replacement with probability C(k−1, n−1) / C(M, n). Ties in the learnt order are broken
    by the answers' order.
    """
    m = golden.shape[1]
    chances = np.array([comb(k, n - 1) / comb(m, n) for k in range(m)])
    order = np.argsort(learnt, axis=1, kind="stable")
    return np.take_along_axis(golden, order, 1) @ chances - golden.mean(1)


def rank_correlation(learnt: np.ndarray, golden: np.ndarray) -> np.ndarray:
    """Spearman's correlation within each prompt, [prompts]; 0 where the learnt reward is constant,
    NaN where the golden one is."""
    correlations = row_rank_correlations(learnt, golden)
    return np.where(np.isnan(correlations) & (np.ptp(golden, axis=1) > 0), 0.0, correlations)


# --- the sweep ------------------------------------------------------------------------------------


def golden_network(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """A golden reward with known truth: a random network of one hidden layer, 64 wide, on the
    standardised embeddings, [n, d] → [n]."""
    rng, hidden = np.random.default_rng(seed), 64
    standard = (embeddings - embeddings.mean(0)) / (embeddings.std(0) + 1e-6)
    first = rng.normal(size=(standard.shape[1], hidden))
    return np.tanh(standard @ first / standard.shape[1] ** 0.5 * 2) @ rng.normal(size=hidden)


def unit_of(golden: np.ndarray) -> float:
    """The standard deviation within prompts of a golden reward [prompts, answers]. In this unit the
    difference between two answers to one prompt has variance 2, however few answers there are."""
    spread = float(np.sqrt(golden.var(1, ddof=1).mean()))
    if not (np.isfinite(golden).all() and spread > 0):
        raise StudyError("golden reward: is constant or not finite; check the reward model")
    return spread


def in_units(golden: np.ndarray) -> np.ndarray:
    """A golden reward in standard deviations within prompts, [prompts, answers]."""
    return (golden - golden.mean()) / unit_of(golden)


def prompts_share(golden: np.ndarray) -> float:
    """Share of a golden reward's variance that lies between prompts; ``golden`` [prompts, answers].
    Means over m answers also vary by a m-th of the variance within prompts, which is subtracted."""
    within = unit_of(golden) ** 2
    between = max(0.0, float(golden.mean(1).var(ddof=1)) - within / golden.shape[1])
    return between / (between + within)


@dataclass(frozen=True)
class Bench:
    """Embeddings [prompts, answers, d] and golden rewards [prompts, answers], to train and to test
    on."""

    train: np.ndarray
    train_golden: np.ndarray
    test: np.ndarray
    test_golden: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Hash of all its numbers."""
        content = b"".join(array.tobytes() for array in vars(self).values())
        return hashlib.sha256(content).hexdigest()[:16]

    def annotated(self, how: str, n: int, beta: float, rng: np.random.Generator) -> Annotated:
        """``n`` training pairs (:func:`choose_pairs`), annotated (:func:`annotate`)."""
        pairs = choose_pairs(self.train_golden, how, n, rng)
        pairs, correct = annotate(self.train_golden, pairs, beta, rng)
        chosen, rejected = (self.train[pairs[:, side, 0], pairs[:, side, 1]] for side in (0, 1))
        return Annotated(chosen, rejected, pairs, correct)

    def scores(self, reward: Reward, best_of: Sequence[int]) -> dict[str, float]:
        """A learnt reward on the test answers, means over prompts: pair_accuracy, spearman and
        gain_<n> (golden units) for every n of ``best_of``."""
        golden = self.test_golden
        learnt = reward(self.test.reshape(-1, self.test.shape[-1])).reshape(golden.shape)
        return {
            "pair_accuracy": float(np.nanmean(pair_accuracy(learnt, golden))),
            "spearman": float(np.nanmean(rank_correlation(learnt, golden))),
        } | {f"gain_{n}": float(best_of_n(learnt, golden, n).mean()) for n in best_of}


@dataclass(frozen=True)
class Settings:
    """What a sweep varies: every reward model is fitted on every combination of pair choice,
    annotator, number of pairs and seed; ``best_of`` are the N of best-of-N."""

    reward_models: Sequence[str]
    choices: Sequence[str]
    betas: Sequence[float]
    n_pairs: Sequence[int]
    seeds: Sequence[int]
    best_of: Sequence[int]

    def check(self, answers: int, ppo_beta: float) -> None:
        """Raise for settings, each allowed by itself, that cannot work together: with ``answers``
        to a test prompt, or as no annotator of the sweep has PPO's ``ppo_beta``. Errors name the
        notebook's parameter."""
        lists = {"betas": self.betas, "amounts": self.n_pairs, "best_of": self.best_of}
        for name, given in lists.items():
            listed = ", ".join(map(str, given))
            require(sorted(given) == list(given), f"{name}: must be in rising order, got {listed}")
        most = self.best_of[-1]
        require(most <= answers, f"best_of: must be at most answers_test, {answers}, got {most}")
        require(ppo_beta in self.betas, f"ppo_beta: must be one of betas, got {ppo_beta}")


def sweep(bench: Bench, settings: Settings, kept: ResultCache, desc: str = "") -> pd.DataFrame:
    """Every reward model on every combination of ``settings``, one row each. ``kept`` lets an
    interrupted sweep continue; ``desc`` names the progress bar.

    Columns learner, pairs, beta, amount, seed, label_accuracy, mean_gap (mean |Δr| of the annotated
    pairs), distinct (how many of them are distinct) and those of :meth:`Bench.scores`. All reward
    models see the same annotated pairs.
    """
    rows = []
    combinations = product(settings.choices, settings.betas, settings.n_pairs, settings.seeds)
    for how, beta, n, seed in progress(list(combinations), desc=desc, unit="set of pairs"):
        asked = how, beta, n, seed, settings.reward_models, settings.best_of
        key = content_key(*asked, code_hash("rewards.order_consistency"))
        if key not in kept:
            rng = np.random.default_rng([seed, CHOICES.index(how), n])
            annotated = bench.annotated(how, n, beta, rng)
            gaps = np.diff(bench.train_golden[annotated.pairs[..., 0], annotated.pairs[..., 1]])
            setting = {"pairs": how, "beta": beta, "amount": n, "seed": seed}
            setting |= {"label_accuracy": annotated.correct, "mean_gap": float(np.abs(gaps).mean())}
            setting["distinct"], found = distinct(annotated.pairs), []
            for name in settings.reward_models:
                scores = bench.scores(fit(name, annotated, seed), settings.best_of)
                found.append({"learner": name} | setting | scores)
            kept.add(key, rows=found)
        rows += kept[key]["rows"]
    return pd.DataFrame(rows)


def against_bradley_terry(found: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Every other reward model less Bradley-Terry on the same pairs: columns learner, pairs, beta,
    amount, distinct, label_accuracy, difference, ci_low, ci_high (95 %, over seeds), seeds.
    ``found``: of :func:`sweep`; without Bradley-Terry in it, no row."""
    keys, shown = ["pairs", "beta", "amount"], ["distinct", "label_accuracy"]
    wide = found.pivot(index=[*keys, "seed"], columns="learner", values=metric)
    annotated, rows = found.groupby(keys)[shown].mean(), []
    for learner in wide.columns.drop("bradley_terry") if "bradley_terry" in wide else ():
        difference = wide[learner] - wide["bradley_terry"]
        for place, part in difference.groupby(level=keys):
            name = "/".join(map(str, ("order", learner, *place, metric)))
            interval = mean_interval(part.to_numpy(), name, bounds=(-np.inf, np.inf))
            rows.append((learner, *place, *annotated.loc[place], *astuple(interval)))
    columns = ["learner", *keys, *shown, "difference", "ci_low", "ci_high", "seeds"]
    return pd.DataFrame(rows, columns=columns)


def words(differences: pd.DataFrame) -> list[str]:
    """Where a classifier beats Bradley-Terry and where it loses, from
    :func:`against_bradley_terry`; one seed shows neither."""

    def places(rows: pd.DataFrame) -> str:
        listed = "; ".join(
            f"{r.pairs} pairs, {r.amount} of them ({r.distinct:.0f} distinct), "
            f"{r.label_accuracy:.0%} of labels correct: {r.difference:+.3f}"
            for r in rows.itertuples()
        )
        return f"{len(rows)} ({listed})" if listed else "0"

    sentences = []
    for learner, part in differences.groupby("learner", sort=False):
        seeds, against = int(part["seeds"].min()), f"**{learner}** against Bradley-Terry"
        if seeds == 1:
            sentences.append(f"{against}: one seed has no interval; raise n_seeds.")
            continue
        better, worse = places(part[part["ci_low"] > 0]), places(part[part["ci_high"] < 0])
        sentences.append(
            f"{against}, {len(part)} combinations: clearly better in {better}, clearly worse in "
            f"{worse}; in the others the interval over {seeds} seeds includes zero. This holds for "
            "these prompts and answers, which all seeds share; by chance alone about "
            f"{(1 - LEVEL) * len(part):.1f} would be clear."
        )
    return sentences
