"""Iterative Nash policy optimisation (Zhang et al. 2024, arXiv 2407.00617), in one file.

**The problem.** A preference oracle says with what probability people prefer one answer to another, P(y ≻ y' | x). Nothing
promises that a reward stands behind it: A may beat B, B beat C and C beat A. What can be asked for is a policy that no
other policy beats, the equilibrium of the two-player game (eq. 3)

    J(π, π') = E[ P(π ≻ π') ] − τ KL(π‖π_ref) + τ KL(π'‖π_ref),

in which π_ref, the SFT model, keeps both players near text that the oracle can judge. Its fixed point is
π* ∝ π_ref · exp(P(· ≻ π*) / τ).

**Self-play.** Online mirror descent: each round π_{t+1} answers what π_t does, at a price of η for leaving π_t,

    π_{t+1}(y) ∝ exp(P(y ≻ π_t) / η) · π_ref(y)^{τ/η} · π_t(y)^{1−τ/η}                              :func:`mirror_step`

whose fixed point is π*, whatever η is (η ≥ τ). Whether constant-η rounds come to it is another matter: the smaller η, the
larger a round's step, and below some η, which depends on τ and on how far the preferences turn in a circle, rounds circle
for good. The authors' guarantee for the last round has η grow, η_t = τ(t + 2)/2; a few rounds at a small constant η, as they
run it, are steps towards answers that win more often, not the equilibrium.

**From pairs.** P(y ≻ π_t) is an expectation nobody computes. Take the logarithm of the step for two answers: the unknown
normaliser cancels, and π_{t+1} is the policy whose

    h(y, y') = log π(y)/π(y') − (τ/η) log π_ref(y)/π_ref(y') − (1 − τ/η) log π_t(y)/π_t(y')

is (P(y ≻ π_t) − P(y' ≻ π_t)) / η for every pair. With y, y' drawn from π_t and the oracle's own coin deciding which of them
is the winner y_w, that regression equals, up to a constant, one that needs no expectation (eq. 8, Proposition 6):

    minimise  E[ (h(y_w, y_l) − 1/(2η))² ]                                        ``losses.INPOLoss``

Log-probabilities are sums over an answer's tokens. π_ref and π_t enter through one number an answer, the mixed reference
(τ/η) log π_ref + (1 − τ/η) log π_t, computed once a round.                                       :func:`mixed_reference`

**Two modes.** ``theory`` is what the proposition is about: two answers a prompt, a coin with the oracle's probability.
``paper`` is what the authors ran: K answers a prompt, a knock-out tournament down to the best and the worst, and the pair
thrown away unless the one then beats the other (:func:`tournaments`). Best against worst of K is no draw from π_t and a
majority no coin, so its fixed point is not the game's; it learns faster from few pairs.

τ = 0 drops π_ref: then nothing holds the policies near the SFT model but the number of rounds.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import root
from scipy.special import log_softmax, softmax

from .. import StudyError, decode, models
from ..artifacts import progress
from ..chat import Chat, EncodedExample
from ..data.preferences import PAIRS, Pair
from ..decode import Example
from ..losses import INPOLoss, reference_logps
from ..training import Recipe, fit
from .rollout import (
    RewardFn,
    RewardFnMaker,
    check_spread,
    evaluate,
    policy_and_judge,
    sample_answers,
)

MODES = ("paper", "theory")


Match = tuple[str, EncodedExample, EncodedExample]
"""A prompt's id and two answers to it."""

Oracle = Callable[[Sequence[Match]], np.ndarray]
"""P(first ≻ second) of every match, [matches]."""


@dataclass(frozen=True)
class INPOConfig:
    """Settings of an INPO run.

    ``eta``: price of leaving π_t; the loss pulls a pair's log-ratio to 1/(2η) nats. ``tau``: price of leaving π_ref.
    ``answers_per_prompt``: K, a power of two in ``paper`` mode, 2 in ``theory`` mode. ``prompts_per_round``: each round has
    prompts of its own as long as there are enough.
    """

    rounds: int = 3
    prompts_per_round: int = 48
    answers_per_prompt: int = 8
    mode: str = "paper"
    eta: float = 0.1
    tau: float = 0.1 / 3
    max_new_tokens: int = 32
    learning_rate: float = 1e-3
    batch: int = 8
    epochs: int = 1
    max_kl: float = 50.0
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise StudyError(f"mode: must be paper or theory, got {self.mode!r}")
        for name in ("eta", "learning_rate", "max_kl"):
            if not getattr(self, name) > 0:
                raise StudyError(f"{name}: must be above 0, got {getattr(self, name)}")
        if not 0 <= self.tau <= self.eta:
            raise StudyError(
                f"tau: must lie between 0 and eta = {self.eta:g}, got {self.tau:g}; a policy cannot leave the "
                "last one at less than it pays for leaving the reference"
            )
        k = self.answers_per_prompt
        if self.mode == "theory" and k != 2:
            raise StudyError(
                f"answers_per_prompt: theory mode draws 2, got {k}; set it to 2, or mode to paper"
            )
        if k < 2 or k & (k - 1):
            raise StudyError(f"answers_per_prompt: a tournament needs 2, 4, 8, … answers, got {k}")
        for name in ("rounds", "prompts_per_round", "max_new_tokens", "batch", "epochs"):
            if getattr(self, name) < 1:
                raise StudyError(f"{name}: must be at least 1, got {getattr(self, name)}")


# --- the game on a table -------------------------------------------------------------------------------------------


def mirror_step(
    policy: np.ndarray, reference: np.ndarray, preference: np.ndarray, tau: float, eta: float
) -> np.ndarray:
    """π_{t+1} [answers] from π_t, π_ref [answers] and P [answers, answers], P[i, j] = P(i ≻ j): the closed form above."""
    log_next = (
        preference @ policy / eta + tau / eta * np.log(reference) + (1 - tau / eta) * np.log(policy)
    )
    following = np.exp(log_next - log_next.max())
    return following / following.sum()


def equilibrium(
    reference: np.ndarray, preference: np.ndarray, tau: float, tolerance: float = 1e-10
) -> np.ndarray:
    """π* [answers], where π ∝ π_ref · exp(P(· ≻ π)/τ) holds to ``tolerance``: solved for a large τ, where π* is near π_ref, and
    followed down to the one that is asked for."""
    if not tau > 0:
        raise StudyError(f"tau: only above 0 is there one equilibrium to find, got {tau}")
    halvings = max(0, math.ceil(math.log2(1 / tau)))
    log_policy = np.log(reference)
    for price in tau * 2.0 ** np.arange(halvings, -1, -1):

        def answer(logits: np.ndarray) -> np.ndarray:
            return log_softmax(np.log(reference) + preference @ softmax(logits) / price)

        log_policy = log_softmax(
            root(lambda logits: answer(logits) - logits, log_policy, tol=1e-14).x
        )
    gap = np.abs(np.exp(answer(log_policy)) - np.exp(log_policy)).max()
    if not gap < tolerance:
        raise StudyError(
            f"equilibrium: found to {gap:.2g} only, not to {tolerance:g}; ask for a larger tau"
        )
    return np.exp(log_policy)


# --- from answers to pairs -----------------------------------------------------------------------------------------


def tournaments(
    answers: Sequence[tuple[str, Sequence[EncodedExample]]], oracle: Oracle
) -> list[tuple[int, int] | None]:
    """Of every prompt's K answers the best and the worst by a knock-out, as indices; None where that pair was dropped.

    First-round winners play winners down to one, losers play losers down to one; a tie goes to the first listed. At the
    end the best plays the worst, and the pair is dropped unless it wins (K = 8: 11 matches). All prompts play at once.

    Parameters
    ----------
    answers
        (prompt's id, its K answers), K a power of two.
    """

    def play(fields: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
        """One round of every field, neighbours against each other: (winners, losers) of each."""
        matches = [
            (key, of_prompt[a], of_prompt[b])
            for (key, of_prompt), field in zip(answers, fields)
            for a, b in zip(field[::2], field[1::2])
        ]
        first_wins = iter(np.asarray(oracle(matches)) >= 0.5)
        winners, losers = [], []
        for field in fields:
            results = [
                (a, b) if next(first_wins) else (b, a) for a, b in zip(field[::2], field[1::2])
            ]
            winners.append([winner for winner, _ in results])
            losers.append([loser for _, loser in results])
        return winners, losers

    if not answers:
        return []
    best, worst = play([list(range(len(of_prompt))) for _, of_prompt in answers])
    while len(best[0]) > 1:
        best, _ = play(best)
        _, worst = play(worst)
    finals = [
        (key, of_prompt[w], of_prompt[l])
        for (key, of_prompt), (w,), (l,) in zip(answers, best, worst)
    ]
    return [
        (w, l) if p > 0.5 else None
        for (w,), (l,), p in zip(best, worst, np.asarray(oracle(finals)))
    ]


def coin_tosses(
    answers: Sequence[tuple[str, Sequence[EncodedExample]]], oracle: Oracle, seed: int
) -> list[tuple[int, int] | None]:
    """Of every prompt's two answers the winner and the loser by a coin with the oracle's probability, as indices; None
    where both are the same text, which teaches nothing."""
    chances = np.asarray(oracle([(key, *two) for key, two in answers])) if answers else []
    draws = np.random.default_rng(seed).random(len(answers))
    return [
        None if first == second else (0, 1) if draw < chance else (1, 0)
        for (_, (first, second)), chance, draw in zip(answers, chances, draws)
    ]


def mixed_reference(
    reference: Mapping[str, tuple[float, float]],
    current: Mapping[str, tuple[float, float]],
    tau: float,
    eta: float,
) -> dict[str, tuple[float, float]]:
    """Example id → (τ/η) log π_ref + (1 − τ/η) log π_t of (winner, loser), for ``INPOLoss``."""
    share = tau / eta
    return {
        key: tuple(
            share * r + (1 - share) * c for r, c in zip(reference[key], current[key], strict=True)
        )
        for key in current
    }


# --- oracles -------------------------------------------------------------------------------------------------------


def reward_oracle(judge: RewardFn) -> Oracle:
    """P(first ≻ second) = σ(r(first) − r(second)): what the Bradley-Terry loss takes the reward for. An answer is scored
    once, however many matches it plays."""
    known: dict[EncodedExample, float] = {}

    def probabilities(matches: Sequence[Match]) -> np.ndarray:
        fresh = list(dict.fromkeys(a for _, *two in matches for a in two if a not in known))
        if fresh:
            known.update(zip(fresh, judge(fresh).double().tolist()))
        gaps = np.array([known[first] - known[second] for _, first, second in matches])
        return 1 / (1 + np.exp(-gaps))

    return probabilities


def preference_model_oracle(
    judge: models.Base, chat: Chat, prompts: Sequence[decode.Prompt]
) -> Oracle:
    """P(first ≻ second) as a pairwise preference model sees it, which no reward need agree with.

    A causal model that was trained to name the better of two answers: it reads the conversation and both answers, and the
    chance that it goes on with "A" rather than "B" is the preference. Asked in both orders and averaged, so that it does not
    matter which answer stands first. (The wording is that of the model that INPO's authors used,
    RLHFlow/pair-preference-model-LLaMA3-8B; a model that was taught another one has to be asked in it.)

    Parameters
    ----------
    judge
        The preference model with its own tokenizer and, if it has one, its chat template.
    chat
        The policy's, which the answers are read with.
    prompts
        Those that matches name by their ids.
    """
    tokenizer, of_prompt = judge.tokenizer, {prompt.id: prompt for prompt in prompts}
    letters = tuple(tuple(tokenizer(letter, add_special_tokens=False).input_ids) for letter in "AB")
    if letters[0] == letters[1]:
        raise StudyError(
            f"preference_model {judge.source}: its tokenizer does not tell the letters A and B apart"
        )
    known: dict[Match, float] = {}

    def question(prompt_id: str, first: EncodedExample, second: EncodedExample) -> tuple[int, ...]:
        turns = of_prompt[prompt_id].turns
        context = "".join(
            f"\n<turn> {'assistant' if i % 2 else 'user'}\n {turn}" for i, turn in enumerate(turns)
        )
        text = f"[CONTEXT] {context}\n [RESPONSE A] {chat.decode(first.answer_ids)} [RESPONSE B] {chat.decode(second.answer_ids)} \n"
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)

    def probabilities(matches: Sequence[Match]) -> np.ndarray:
        fresh = [match for match in dict.fromkeys(matches) if match not in known]
        asked = [
            decode.MultipleChoice("", question(*either), letters)
            for key, *two in fresh
            for either in ((key, *two), (key, *two[::-1]))
        ]
        logps = (
            np.array(decode.option_logps(judge.model, asked, tokenizer.pad_token_id)).reshape(
                -1, 2, 2
            )
            if fresh
            else ()
        )
        for match, (in_order, reversed_order) in zip(fresh, logps):
            chances = [1 / (1 + math.exp(b - a)) for a, b in (in_order, reversed_order[::-1])]
            if not math.isfinite(sum(chances)):
                raise StudyError(
                    f"inpo: the preference model {judge.source} gives no finite probability for answers to {match[0]}"
                )
            known[match] = sum(chances) / 2
        return np.array([known[match] for match in matches])

    return probabilities


# --- training ------------------------------------------------------------------------------------------------------


def train(
    base: models.Base,
    chat: Chat,
    sft: Path,
    reward: Path | RewardFnMaker,
    prompts: Sequence[decode.Prompt],
    held_out: Sequence[decode.Prompt],
    config: INPOConfig,
    out: Path,
    oracle: Oracle | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the SFT adapter with INPO and save it to ``out``, its pairs beside it (:func:`load_pairs`), whole or not at all.

    Parameters
    ----------
    sft
        Folder of the SFT adapter, which is π_1 and π_ref.
    reward
        Folder of the reward adapter with its head, or a function that makes another judge: what held-out answers are judged by.
    oracle
        What decides the matches; by default the reward (:func:`reward_oracle`).

    Returns
    -------
    curves : DataFrame
        Columns step, metric, value. ``loss`` by optimiser step, counted over all rounds; at each round's last step
        ``dropped`` (share of its prompts without a pair), ``gap`` (mean h of its pairs after it; 1/(2η) is the goal),
        ``held_out_reward`` and ``held_out_kl`` (nats an answer), which also stand at step 0.
    looks : DataFrame
        As ``ppo.train`` gives it, a look a round.

    Raises
    ------
    StudyError
        If the reward decides and is the same for all held-out answers, no pair is left after a round's tournament, a reward or
        loss is not finite, or the KL exceeds ``config.max_kl``; nothing is written then.
    """
    if not prompts or not held_out:
        raise StudyError("inpo: needs at least one prompt to train on and one held-out prompt")
    with policy_and_judge(base, chat, sft, reward, config.batch) as (model, judge):
        *tables, pairs = _run(model, judge, oracle, chat, prompts, held_out, config)
        models.save_adapter(
            base,
            model,
            out,
            adapter="policy",
            files={PAIRS: "".join(json.dumps(asdict(p)) + "\n" for p in pairs)},
        )
    return tuple(tables)


def _run(
    model, judge: RewardFn, oracle: Oracle | None, chat: Chat, prompts, held_out, config: INPOConfig
) -> tuple[pd.DataFrame, pd.DataFrame, list[Pair]]:
    rng = np.random.default_rng(config.seed)
    order = itertools.cycle(rng.permutation(len(prompts)).tolist())
    pad, step = chat.tokenizer.pad_token_id, 0
    rows: list[tuple[int, str, float]] = []
    kept: list[Pair] = []
    decoding = decode.Decoding(config.max_new_tokens, 1.0, seed=config.seed)
    drawing = decode.Decoding(config.max_new_tokens, 1.0, config.answers_per_prompt, config.seed)
    answers_in_all = config.rounds * (
        config.prompts_per_round * config.answers_per_prompt + len(held_out)
    ) + len(held_out)
    with progress(total=answers_in_all, desc="INPO: held-out prompts before", unit="answer") as bar:

        def at_held_out() -> pd.DataFrame:
            found = evaluate(model, judge, chat, held_out, decoding, config.batch, step, bar)
            kl = float(found["kl"].mean())
            if not kl <= config.max_kl:
                raise StudyError(
                    f"inpo: after step {step} the KL to the SFT model is {kl:.1f} nats per answer (max_kl "
                    f"{config.max_kl:g}); lower learning_rate or raise eta"
                )
            rows.extend(
                [
                    (step, "held_out_reward", float(found["reward"].mean())),
                    (step, "held_out_kl", kl),
                ]
            )
            return found

        eval_history = at_held_out()
        if oracle is None:
            check_spread(eval_history)
            oracle = reward_oracle(judge)
        for number in range(1, config.rounds + 1):
            bar.set_description(f"INPO: round {number} of {config.rounds}")
            asked = [prompts[next(order)] for _ in range(config.prompts_per_round)]
            asked = list(
                {prompt.id: prompt for prompt in asked}.values()
            )  # few prompts come round again
            drawn = sample_answers(
                model, "policy", chat, asked, [f"inpo {number} {p.id}" for p in asked], drawing, bar
            )
            played = [(prompt.id, answers) for prompt, answers in zip(asked, drawn)]
            results = (
                tournaments(played, oracle)
                if config.mode == "paper"
                else coin_tosses(played, oracle, int(rng.integers(2**32)))
            )
            pairs = [
                Pair(number, key, answers[result[0]], answers[result[1]])
                for (key, answers), result in zip(played, results)
                if result is not None
            ]
            examples = [Example(pair.id, "inpo", (pair.winner, pair.loser)) for pair in pairs]
            if not examples:
                lost = (
                    "of no prompt does the tournament's best answer beat its worst"
                    if config.mode == "paper"
                    else "both answers to every prompt were the same text"
                )
                raise StudyError(
                    f"inpo: no pair is left in round {number} of {len(asked)} prompts: {lost}; look at what decides the "
                    "matches, or ask for longer answers"
                )
            current = reference_logps(model, "policy", examples, pad)
            mixed = mixed_reference(
                reference_logps(model, "reference", examples, pad), current, config.tau, config.eta
            )
            loss = INPOLoss(config.eta, mixed)
            losses = fit(
                model,
                "policy",
                examples,
                loss,
                pad,
                Recipe(config.learning_rate, config.batch, config.epochs),
                config.seed + number,
            )
            rows += [(step + i, "loss", float(value)) for i, value in enumerate(losses, start=1)]
            step += len(losses)
            learnt = reference_logps(model, "policy", examples, pad)
            gaps = [
                (learnt[e.id][0] - mixed[e.id][0]) - (learnt[e.id][1] - mixed[e.id][1])
                for e in examples
            ]
            rows += [
                (step, "dropped", 1 - len(examples) / len(asked)),
                (step, "gap", float(np.mean(gaps))),
            ]
            kept += [replace(pair, reference=mixed[pair.id]) for pair in pairs]
            eval_history = pd.concat([eval_history, at_held_out()], ignore_index=True)
    return pd.DataFrame(rows, columns=["step", "metric", "value"]), eval_history, kept
