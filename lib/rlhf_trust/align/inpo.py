"""Iterative Nash policy optimisation (Zhang et al. 2024, arXiv 2407.00617), in one file.

**The problem.** A preference oracle gives the probability that people prefer one answer to another,
P(y ≻ y' | x). There need not be a reward behind it: A may beat B, B beat C and C beat A. What can
be asked for is a policy that no other policy beats, the equilibrium of the two-player game (eq. 3)

    J(π, π') = E[ P(π ≻ π') ] − τ KL(π‖π_ref) + τ KL(π'‖π_ref),

in which π_ref, the SFT model, keeps both players near text that the oracle can judge. Its fixed
point is π* ∝ π_ref · exp(P(· ≻ π*) / τ).

**Self-play.** Online mirror descent: each round π_{t+1} is the best response to π_t, with a penalty
of strength η for moving away from π_t,

    π_{t+1}(y) ∝ exp(P(y ≻ π_t) / η) · π_ref(y)^{τ/η} · π_t(y)^{1−τ/η}           :func:`mirror_step`

whose fixed point is π* for any η ≥ τ. Whether rounds at a constant η converge to it is another
matter: the smaller η, the larger a round's step, and below some η, which depends on τ and on how
cyclic the preferences are, rounds circle for good. The authors' guarantee for the last round lets η
grow, η_t = τ(t + 2)/2; a few rounds at a small constant η, as they run it, are steps towards
answers that win more often, not the equilibrium.

**From pairs.** P(y ≻ π_t) is an expectation that nobody computes. Take the logarithm of the step
for two answers: the unknown normaliser cancels, and π_{t+1} is the policy whose

    h(y, y') = log π(y)/π(y') − (τ/η) log π_ref(y)/π_ref(y') − (1 − τ/η) log π_t(y)/π_t(y')

is (P(y ≻ π_t) − P(y' ≻ π_t)) / η for every pair. With y, y' drawn from π_t and the winner y_w
decided by a coin with the oracle's probability, that regression equals, up to a constant, one that
needs no expectation (eq. 8, Proposition 6):

    minimise  E[ (h(y_w, y_l) − 1/(2η))² ]                                       ``losses.INPOLoss``

Log-probabilities are sums over an answer's tokens. π_ref and π_t enter through one number an
answer, the mixed reference (τ/η) log π_ref + (1 − τ/η) log π_t, computed once a round
(:func:`mixed_reference`).

**Two modes.** ``theory`` is what the proposition is about: two answers a prompt, a coin with the
oracle's probability. ``paper`` is what the authors ran: K answers a prompt, a knock-out tournament
for the best and the worst, and the pair is dropped unless the best then beats the worst
(:func:`tournaments`). The best and the worst of K are not draws from π_t and a majority is not a
coin, so its fixed point is not the game's; it learns faster from few pairs.

τ = 0 drops π_ref: then only the number of rounds keeps the policies near the SFT model.
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

from .. import StudyError, models, require
from ..artifacts import content_key, progress, sha256_of
from ..chat import Chat, EncodedExample
from ..data.preferences import PAIRS, Pair
from ..decode import Decoding, Example, LowerStates, MultipleChoice, Prompt, option_logps
from ..distributed import gathered, size
from ..losses import INPOLoss, reference_logps
from ..training import TrainConfig, fit, keep_state, kept_state, training_code
from . import rollout
from .rollout import RewardFn, RewardFnMaker

Match = tuple[str, EncodedExample, EncodedExample]
"""A prompt's id and two answers to it."""

Oracle = Callable[[Sequence[Match]], np.ndarray]
"""P(first ≻ second) of every match, [matches]."""

Answers = Sequence[tuple[str, Sequence[EncodedExample]]]
"""(prompt's id, its K answers) of several prompts."""

PairLogps = Mapping[str, tuple[float, float]]
"""Example id → summed log-probabilities of (winner, loser)."""


@dataclass(frozen=True)
class INPOConfig:
    """Settings of an INPO run, each in the range that 05-inpo declares for it.

    ``mode``: ``paper`` or ``theory`` (module docstring). ``eta``: penalty for moving away from π_t;
    the loss pulls a pair's log-ratio to 1/(2η) nats. ``tau``: penalty for moving away from π_ref.
    ``answers_per_prompt``: K, a power of two in ``paper`` mode, 2 in ``theory`` mode.
    ``prompts_per_round``: other prompts each round, as long as there are enough. ``batch_size``:
    pairs a step. ``epochs``: passes over a round's pairs. ``max_kl``: nats per answer beyond which
    the run stops."""

    rounds: int = 3
    prompts_per_round: int = 48
    answers_per_prompt: int = 8
    mode: str = "paper"
    eta: float = 0.1
    tau: float = 0.1 / 3
    max_new_tokens: int = 32
    learning_rate: float = 1e-3
    batch_size: int = 8
    epochs: int = 1
    max_kl: float = 50.0
    seed: int = 0

    def __post_init__(self):
        # Leaving the last policy cannot cost less than it pays for leaving the reference.
        tau = f"tau: must be between 0 and eta = {self.eta:g}, got {self.tau}"
        require(0 <= self.tau <= self.eta, tau)
        k, wanted = self.answers_per_prompt, "2, 4, 8, … for a tournament"
        fine = k > 1 and k & (k - 1) == 0
        if self.mode == "theory":
            fine, wanted = k == 2, "2 in theory mode"
        require(fine, f"answers_per_prompt: must be {wanted}, got {k}")


# --- the game on a table --------------------------------------------------------------------------


def mirror_step(
    policy: np.ndarray, reference: np.ndarray, preference: np.ndarray, tau: float, eta: float
) -> np.ndarray:
    """π_{t+1} [answers] from π_t, π_ref [answers] and P[i, j] = P(i ≻ j) [answers, answers].

    0 ≤ τ ≤ η and η > 0, as in :class:`INPOConfig`; else a StudyError.
    """
    require(eta > 0 and 0 <= tau <= eta, f"mirror_step: needs 0 <= tau <= eta, got {tau}, {eta}")
    _check_game(reference, preference)
    prior = tau / eta * np.log(reference) + (1 - tau / eta) * np.log(policy)
    return softmax(preference @ policy / eta + prior)


def _check_game(reference: np.ndarray, preference: np.ndarray) -> None:
    """Raise for what is no policy, or no table of probabilities between its answers."""
    fine = np.all(np.asarray(reference) > 0) and np.isclose(np.sum(reference), 1)
    require(fine, "game: a policy's probabilities must be above 0 and sum to 1")
    square = np.shape(preference) == (len(reference), len(reference))
    require(square, f"game: {len(reference)} answers need a table of as many rows and columns")
    inside = np.all((0 <= np.asarray(preference)) & (np.asarray(preference) <= 1))
    require(inside, "game: preferences must be probabilities from 0 to 1, not per cent")


def equilibrium(reference: np.ndarray, preference: np.ndarray, tau: float) -> np.ndarray:
    """π* [answers], where π ∝ π_ref · exp(P(· ≻ π)/τ) holds to 1e-10.

    Solved for a large τ first, where π* is near π_ref, then for smaller ones down to ``tau``.
    """
    require(tau > 0, f"tau: only above 0 is there one equilibrium to find, got {tau}")
    _check_game(reference, preference)

    def residual(logits: np.ndarray, tau: float) -> np.ndarray:
        return log_softmax(np.log(reference) + preference @ softmax(logits) / tau) - logits

    log_policy = np.log(reference)
    halvings = max(0, math.ceil(math.log2(1 / tau)))
    for larger_tau in tau * 2.0 ** np.arange(halvings, -1, -1):
        log_policy = log_softmax(root(residual, log_policy, larger_tau, tol=1e-14).x)
    gap = np.abs(np.exp(log_policy + residual(log_policy, tau)) - np.exp(log_policy)).max()
    require(gap < 1e-10, f"equilibrium: found to {gap:.2g} only, not to 1e-10; use a larger tau")
    return np.exp(log_policy)


# --- from answers to pairs ------------------------------------------------------------------------


def tournaments(answers: Answers, oracle: Oracle) -> list[Match]:
    """A knock-out among every prompt's K answers: (prompt's id, best, worst) of the pairs that are
    kept.

    First-round winners play winners down to one, losers play losers down to one; a tie goes to the
    first listed. At the end the best plays the worst, and the pair is dropped unless the best wins
    (K = 8: 11 matches). K is a power of two and the same for all prompts, which play at the same
    time.
    """

    def chances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """P(first ≻ second) of answers given by index, [prompts, matches]."""
        matches = []
        for (key, of_prompt), *both in zip(answers, first, second):
            matches += [(key, of_prompt[i], of_prompt[j]) for i, j in zip(*both)]
        return oracle(matches).reshape(first.shape)

    def play(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours play each other: winners and losers, both [prompts, matches]."""
        first, second = field[:, ::2], field[:, 1::2]
        first_wins = chances(first, second) >= 0.5
        return np.where(first_wins, first, second), np.where(first_wins, second, first)

    best, worst = play(np.array([range(len(of_prompt)) for _, of_prompt in answers]))
    while best.shape[1] > 1:
        best, _ = play(best)
        _, worst = play(worst)
    best_wins = chances(best, worst) > 0.5
    return [
        (key, of_prompt[i], of_prompt[j])
        for (key, of_prompt), (i,), (j,), (wins,) in zip(answers, best, worst, best_wins)
        if wins
    ]


def coin_tosses(answers: Answers, oracle: Oracle, seed: int) -> list[Match]:
    """(prompt's id, winner, loser) of every prompt's two answers, by a coin with the oracle's
    probability.

    Prompts with the same text twice are dropped: they teach nothing.
    """
    matches = [(key, *two) for key, two in answers]
    draws = np.random.default_rng(seed).random(len(answers))
    return [
        (key, first, second) if draw < chance else (key, second, first)
        for (key, first, second), chance, draw in zip(matches, oracle(matches), draws)
        if first != second
    ]


def mixed_reference(reference: PairLogps, current: PairLogps, tau: float, eta: float) -> PairLogps:
    """Example id → (τ/η) log π_ref + (1 − τ/η) log π_t of (winner, loser), for ``INPOLoss``."""
    share = tau / eta
    return {
        key: tuple(share * r + (1 - share) * c for r, c in zip(reference[key], both, strict=True))
        for key, both in current.items()
    }


# --- oracles --------------------------------------------------------------------------------------


def once_each(measure: Callable[[list], Sequence[float]]) -> Callable[[Sequence], np.ndarray]:
    """``measure`` with a memory: each item is measured once, however often it is asked for."""
    known: dict = {}

    def measured(items: Sequence) -> np.ndarray:
        fresh = [item for item in dict.fromkeys(items) if item not in known]
        if fresh:
            known.update(zip(fresh, measure(fresh)))
        return np.array([known[item] for item in items])

    return measured


def reward_oracle(reward_fn: RewardFn) -> Oracle:
    """P(first ≻ second) = σ(r(first) − r(second)), the Bradley-Terry model."""
    rewards = once_each(lambda answers: reward_fn(answers).double().tolist())

    def probabilities(matches: Sequence[Match]) -> np.ndarray:
        first, second = rewards([a for _, *two in matches for a in two]).reshape(-1, 2).T
        return 1 / (1 + np.exp(second - first))

    return probabilities


def preference_model_oracle(model: models.Base, chat: Chat, prompts: Sequence[Prompt]) -> Oracle:
    """P(first ≻ second) of a pairwise preference model, which need not agree with any reward.

    A causal model trained to name the better of two answers: it reads the conversation and both
    answers, and the probability that it continues with "A" rather than "B" is the preference,
    averaged over both orders of the answers. (The wording is that of the model that INPO's authors
    used, RLHFlow/pair-preference-model-LLaMA3-8B; a model trained on another wording needs that.)

    Parameters
    ----------
    model
        The preference model with its own tokenizer and, if it has one, its chat template.
    chat
        The policy's, which decodes the answers.
    prompts
        Those that matches name by their ids.
    """
    tokenizer, turns_of = model.tokenizer, {prompt.id: prompt.turns for prompt in prompts}
    letters = tuple(tuple(tokenizer(letter, add_special_tokens=False).input_ids) for letter in "AB")
    same = f"preference_model {model.source}: A and B have the same tokens"
    require(letters[0] != letters[1], same)

    def question(prompt_id: str, first: EncodedExample, second: EncodedExample) -> tuple[int, ...]:
        speakers = zip(itertools.cycle(("user", "assistant")), turns_of[prompt_id])
        context = "".join(f"\n<turn> {role}\n {turn}" for role, turn in speakers)
        a, b = (chat.decode(answer.answer_ids) for answer in (first, second))
        text = f"[CONTEXT] {context}\n [RESPONSE A] {a} [RESPONSE B] {b} \n"
        if tokenizer.chat_template:
            said, how = [{"role": "user", "content": text}], {"add_generation_prompt": True}
            text = tokenizer.apply_chat_template(said, tokenize=False, **how)
        return tuple(tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids)

    def probabilities(matches: list[Match]) -> np.ndarray:
        asked = []
        for key, first, second in matches:
            for two in ((first, second), (second, first)):
                asked.append(MultipleChoice("", question(key, *two), letters))
        logps = np.array(option_logps(model.model, asked, tokenizer.pad_token_id))
        (a, b), (swapped_a, swapped_b) = logps.reshape(-1, 2, 2).transpose(1, 2, 0)
        chances = (1 / (1 + np.exp(b - a)) + 1 / (1 + np.exp(swapped_a - swapped_b))) / 2
        problem = f"preference_model {model.source}: a preference is not finite"
        require(np.isfinite(chances).all(), problem)
        return chances

    return once_each(probabilities)


# --- training -------------------------------------------------------------------------------------


def train(
    base: models.Base,
    chat: Chat,
    sft: Path,
    reward: Path | RewardFnMaker,
    prompts: Sequence[Prompt],
    held_out: Sequence[Prompt],
    config: INPOConfig,
    out: Path,
    oracle: Oracle | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the SFT adapter with INPO and save it to ``out``, its pairs beside it
    (``preferences.load_pairs``), whole or not at all.

    Where it stands is kept beside ``out`` after every round, and an interrupted run with the same
    weights, prompts and settings resumes from there, to the same bytes. With a reward or oracle of
    the caller's it starts over.

    Parameters
    ----------
    sft
        Folder of the SFT adapter, which is π_1 and π_ref.
    reward
        Folder of the reward adapter with its head, or a function that makes another reward
        function; it scores held-out answers.
    oracle
        What decides the matches; by default the reward (:func:`reward_oracle`).

    Returns
    -------
    curves : DataFrame
        Columns step, metric, value. ``loss`` by optimiser step, counted over all rounds; at each
        round's last step ``dropped`` (share of its prompts without a pair), ``gap`` (mean h of its
        pairs after it; the goal is 1/(2η)), ``held_out_reward`` and ``held_out_kl`` (nats an
        answer), which also stand at step 0.
    eval_history : DataFrame
        As from ``ppo.train``, an evaluation a round.

    Raises
    ------
    StudyError
        If the reward decides and is the same for all held-out answers, no pair is left after a
        round, a reward or loss is not finite, or the KL exceeds ``config.max_kl``; nothing is
        written then.
    """
    rng, pad, step = np.random.default_rng(config.seed), chat.tokenizer.pad_token_id, 0
    order = itertools.cycle(rng.permutation(len(prompts)).tolist())
    decoding = Decoding(config.max_new_tokens, 1.0, seed=config.seed)
    sampling = replace(decoding, samples=config.answers_per_prompt)
    sizes = {"batch_size": config.batch_size, "epochs": config.epochs}
    lines, done, key = "", 0, ""
    unfinished = out.with_name(f"{out.name}.unfinished.pt")
    sampled_a_round = config.prompts_per_round * config.answers_per_prompt
    answers_in_all = config.rounds * sampled_a_round + (config.rounds + 1) * len(held_out)
    with (
        rollout.policy_and_reward(base, chat, sft, reward, config.batch_size) as (model, reward_fn),
        progress(total=answers_in_all, desc="INPO: held-out prompts before", unit="answer") as bar,
    ):
        limits = config.batch_size, config.max_kl
        run = rollout.Run(model, reward_fn, chat, held_out, decoding, *limits, bar)
        if isinstance(reward, Path) and oracle is None:
            weights = models.adapter_fingerprint(base, sft), sha256_of(reward)
            code = training_code("align.rollout", "align.inpo", "data.preferences")
            key = content_key(config, weights, prompts, held_out, chat.key, code, size())
            if state := kept_state(unfinished, key):
                run.restore(state)
                lines, done, step = state["lines"], state["round"], state["step"]
                rng.bit_generator.state = state["rng"]
                bar.update(done * sampled_a_round + sum(map(len, run.eval_history)))
            gathered(None)  # before one of them replaces the file
        if not done:
            run.evaluate(0)
        if oracle is None:
            run.check_spread()
            oracle = reward_oracle(reward_fn)
        for number in range(1, config.rounds + 1):
            drawn = [prompts[next(order)] for _ in range(config.prompts_per_round)]
            if number <= done:
                continue
            bar.set_description(f"INPO: round {number} of {config.rounds}")
            asked = list({prompt.id: prompt for prompt in drawn}.values())  # few prompts recur
            keys = [f"inpo {number} {prompt.id}" for prompt in asked]
            sampled = run.sample(asked, keys, sampling)
            answers = [(prompt.id, some) for prompt, some in zip(asked, sampled)]
            if config.mode == "paper":
                matches = tournaments(answers, oracle)
            else:
                matches = coin_tosses(answers, oracle, int(rng.integers(2**32)))
            if not matches:
                raise StudyError(
                    f"inpo: no pair is left in round {number} of {len(asked)} prompts: no best "
                    "answer beats the worst, or both answers are the same text; look at what "
                    "decides the matches, or raise max_new_tokens"
                )
            of_round = [Pair(number, *match) for match in matches]
            examples = [Example(p.id, "inpo", (p.winner, p.loser)) for p in of_round]
            kept = LowerStates(model)  # for all passes over this round's pairs
            reference = reference_logps(model, "reference", examples, pad, kept=kept)
            current = reference_logps(model, "policy", examples, pad, kept=kept)
            mixed = mixed_reference(reference, current, config.tau, config.eta)
            loss = INPOLoss(config.eta, mixed)
            seed = config.seed + number
            own = TrainConfig(learning_rate=config.learning_rate, seed=seed, **sizes)
            losses = fit(model, "policy", examples, loss, pad, own, kept=kept)["loss"]
            run.curve += [(step + i, "loss", float(x)) for i, x in enumerate(losses, start=1)]
            step += len(losses)
            learned = reference_logps(model, "policy", examples, pad, kept=kept)
            gaps = [np.subtract(learned[e.id], mixed[e.id]) @ (1, -1) for e in examples]
            run.record(step, {"dropped": 1 - len(examples) / len(asked), "gap": np.mean(gaps)})
            for pair in of_round:
                lines += json.dumps(asdict(replace(pair, reference=mixed[pair.id]))) + "\n"
            run.evaluate(step)
            if key:
                state = {"round": number, "step": step, "rng": rng.bit_generator.state}
                keep_state(unfinished, key, run.state() | state | {"lines": lines})
        models.save_adapter(base, model, out, adapter="policy", files={PAIRS: lines})
        unfinished.unlink(missing_ok=True)
    return run.tables()
