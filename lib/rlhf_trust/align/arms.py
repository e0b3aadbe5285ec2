"""Placebo arms and further seeds of PPO, DPO and INPO, and the same distance to SFT for both arms.

A stage's change has three causes: the preferences, any training of that kind, and the luck of one
training. Each true arm therefore has a **placebo**: the same prompts, sizes and schedule without
information about preferences. DPO's swaps chosen and rejected at random in half of the pairs
(:func:`swap_half`); PPO's and INPO's permute the scores among the answers to each prompt
(:func:`shuffled`). Both arms are trained under several alignment seeds, which draw the order of the
data, the sampled answers and the placebo's permutation. SFT and the reward model are the same in
all of them: what another SFT or reward model would have made is not part of the seeds' spread.

An arm that moves further changes more. Both are therefore compared at one distance, KL(π_sft ‖ π)
in nats an answer (:func:`kl_to_sft`): the arm that moved further is brought back along the straight
line of LoRA weights from SFT (:func:`match`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import linear

from .. import StudyError, artifacts, decode, models, require
from ..artifacts import Build
from ..chat import Chat, EncodedExample
from ..data.preferences import PreferencePair, Preferences
from ..decode import Decoding, Example, LowerStates, Prompt
from ..fan_out import fan_out
from ..losses import DPOLoss, reference_logps
from ..stats import generator
from ..training import TrainConfig, fit, pair_examples, trained_once, training_code
from . import inpo, ppo
from .rollout import RewardFn, RewardFnMaker, RewardModel, before_and_after, sample_answers

TRUE, PLACEBO = "true", "placebo"
CHAPTERS = {"ppo": "03-ppo", "dpo": "04-dpo", "inpo": "05-inpo", "grpo": "03-ppo", "rloo": "03-ppo"}
"""The chapter whose settings a stage's arms have, and which trains the stage that it is named
after. GRPO and RLOO are PPO's loop with another advantage, and sample as many answers."""

SHARED = "model dtype prompt_format preferences n_train n_held_out max_length seed".split()
"""Parameters that the arms' chapter and the stage's must agree in."""

SEED_STEP = 1000
"""Between the seeds of two arms, so that no round of one has the seed of a round of another."""

FEWER_HELD_OUT = 8
"""Held-out prompts of an INPO arm, which only watch it. (PPO's define its score unit: all stay.)"""

CLOSE, EXACT, MOST_STEPS = 0.05, 0.02, 12
"""Relative differences of KL that are left alone, and that a search ends at; its most steps."""


@dataclass(frozen=True)
class Arm:
    """One training of a stage. ``kind``: ``true`` or ``placebo``; ``seed``: 0, 1, …"""

    stage: str
    kind: str
    seed: int

    @property
    def is_stage(self) -> bool:
        """Is it the stage's own model, which its chapter has trained?"""
        own = CHAPTERS[self.stage].endswith(f"-{self.stage}")
        return own and self.kind == TRUE and self.seed == 0

    @property
    def name(self) -> str:
        """``dpo`` for the stage's own model, then ``dpo-seed1``, ``dpo-placebo-seed0``, …"""
        placebo = "" if self.kind == TRUE else "-placebo"
        return self.stage if self.is_stage else f"{self.stage}{placebo}-seed{self.seed}"

    def folder(self, build: Build) -> Path:
        return build.model(self.name if self.is_stage else f"arms/{self.name}")


def all_arms(stages: Sequence[str], seeds: int) -> list[Arm]:
    """Every stage's true and placebo arms, seed by seed."""
    return [Arm(s, kind, i) for s in stages for kind in (TRUE, PLACEBO) for i in range(seeds)]


def stage_parameters(build: Build, stages: Sequence[str], own: Mapping) -> dict[str, dict]:
    """Stage → the parameters that its chapter ran with.

    ``own``: the parameters of the arms' chapter, which read the same model and pairs. A StudyError
    names a stage that has not run, or a parameter that both have and in which they differ.
    """
    manifests, found = artifacts.read_manifests(build), {}
    for stage in stages:
        chapter = CHAPTERS[stage]
        require(chapter in manifests, f"{build.root}: no manifest of {chapter}; run it first")
        found[stage] = manifests[chapter]["parameters"]
        for name in SHARED:
            if name in own and found[stage][name] != own[name]:
                values = f"{found[stage][name]!r} there and {own[name]!r} here"
                raise StudyError(f"{name}: {chapter} was run with another value, {values}")
    return found


# --- placebos -------------------------------------------------------------------------------------


def swap_half(pairs: Sequence[Example], seed: int) -> list[Example]:
    """Pairs with their two answers swapped in a random half (of an odd number, the smaller one).

    Of every two pairs of one source that are neighbours by how much longer the chosen answer is,
    one is swapped. A half drawn freely would leave a lesson about length by chance, of 160 shipped
    pairs one up to four times as large as the true one.
    """

    def longer(i: int) -> tuple[str, int, int]:
        chosen, rejected = pairs[i].sequences
        return pairs[i].source, len(chosen) - len(rejected), i

    order = sorted(range(len(pairs)), key=longer)
    coins = generator(f"placebo {seed}").integers(2, size=len(pairs) // 2).tolist()
    swapped = {order[2 * k + coin] for k, coin in enumerate(coins)}
    return [
        replace(pair, sequences=pair.sequences[::-1]) if i in swapped else pair
        for i, pair in enumerate(pairs)
    ]


def shuffled(reward_fn: RewardFn, seed: int) -> RewardFn:
    """Rewards permuted among the different answers to a prompt, within each call.

    Answers have one prompt if its tokens are the same. A prompt with one answer keeps its score, so
    held-out evaluations show the true reward. The permutation depends on the seed, the prompt and
    the set of answers alone. PPO scores a step's answers in one call, and INPO's oracle a round's
    before the first match (``inpo.once_each`` then remembers them).
    """

    def scores(answers: Sequence[EncodedExample]) -> torch.Tensor:
        rewards = reward_fn(answers)
        score_of, permuted = dict(zip(answers, rewards.tolist())), {}
        in_order = sorted(score_of, key=lambda answer: (answer.prompt_ids, answer.input_ids))
        for _, same_prompt in groupby(in_order, key=lambda answer: answer.prompt_ids):
            some = list(same_prompt)
            name = f"placebo {seed} {[answer.input_ids for answer in some]}"
            order = generator(name).permutation(len(some))
            permuted |= {answer: score_of[some[i]] for answer, i in zip(some, order)}
        return rewards.new_tensor([permuted[answer] for answer in answers])

    return scores


def shuffled_reward(folder: Path, chat: Chat, seed: int) -> RewardFnMaker:
    """The reward model in ``folder`` with its scores :func:`shuffled`, for ``ppo.train`` and
    ``inpo.train``."""

    def maker(model) -> RewardFn:
        with warnings.catch_warnings(action="ignore"):  # the config also names the tokenizer
            model.load_adapter(str(folder), "reward")
        return shuffled(RewardModel(model, models.load_reward_head(folder), chat), seed)

    return maker


# --- training -------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """Trains arms on one backbone, from the models in ``build``.

    ``pairs``: as in the stages' chapters. ``parameters``: of :func:`stage_parameters`. ``kept``: of
    DPO's pairs, for all of its arms.
    """

    base: models.Base
    chat: Chat
    build: Build
    pairs: Preferences
    parameters: Mapping[str, dict]
    kept: LowerStates | None = None

    def __post_init__(self):
        self.sft, self.reward = self.build.model("sft"), self.build.model("reward")

    def config(self, arm: Arm) -> ppo.PPOConfig | inpo.INPOConfig | TrainConfig:
        """The stage's settings with the arm's own seed."""
        kinds = {"dpo": TrainConfig, "inpo": inpo.INPOConfig}
        given, kind = dict(self.parameters[arm.stage]), kinds.get(arm.stage, ppo.PPOConfig)
        given["seed"] += SEED_STEP * arm.seed
        if kind is ppo.PPOConfig:
            given |= {"epochs": given["ppo_epochs"], "evaluate_every": 0}
            given["advantage"] = "gae" if arm.stage == "ppo" else arm.stage
            if given["answers_per_prompt"] < 2:
                raise StudyError(
                    "answers_per_prompt: with one answer a prompt PPO has no placebo, as there is "
                    "nothing to shuffle; set it to 2 or more in 03-ppo"
                )
        if given.get("preference_model"):
            raise StudyError(
                "preference_model: INPO's placebo shuffles the reward model's scores; set it to "
                '"" in 05-inpo, or leave inpo out of stages'
            )
        return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})

    def train(self, arm: Arm) -> float:
        """Train an arm unless it is there, made from the same weights, data and settings.

        Returns its change of the mean reward of held-out answers, NaN for DPO and for a stage's own
        model.
        """
        if arm.is_stage:
            return np.nan
        train = self._train_dpo if arm.stage == "dpo" else self._sampled
        out = arm.folder(self.build)
        return trained_once(out, self.about(arm), lambda: train(arm, self.config(arm), out))

    def train_all(self, arms: Sequence[Arm]) -> dict[str, float]:
        """:meth:`train` all arms, spread where there is an executor: name → what it returns."""
        pieces = {artifacts.content_key(*self.about(arm)): arm for arm in arms}
        found = dict(fan_out(self.train, pieces, self.build.path("jobs", "arms")))
        return {arm.name: found[key] for key, arm in pieces.items()}

    def about(self, arm: Arm) -> tuple:
        """All that an arm is made from, as JSON."""
        weights = [models.adapter_fingerprint(self.base, self.sft)]
        if arm.stage != "dpo":
            weights.append(artifacts.sha256_of(self.reward))
        data = [asdict(p) for p in self.pairs.train], [asdict(p) for p in self.pairs.held_out]
        settings = self.parameters[arm.stage], asdict(self.config(arm)), self.chat.key
        code = training_code("align.rollout", "align.ppo", "align.inpo", "align.arms")
        return asdict(arm), weights, data, settings, code

    def _train_dpo(self, arm: Arm, config: TrainConfig, out: Path) -> float:
        given, pad = self.parameters["dpo"], self.chat.tokenizer.pad_token_id
        examples = pair_examples(self.pairs.train[: given["n_dpo"]], self.chat)
        if arm.kind == PLACEBO:
            examples = swap_half(examples, config.seed)
        both = {"policy": self.sft, "reference": self.sft}
        with models.adapted(self.base, both, trainable="policy") as network:
            kept = self.kept = self.kept or LowerStates(network)
            reference = reference_logps(network, "reference", examples, pad, kept=kept)
            loss = DPOLoss(given["beta"], reference)
            fit(network, "policy", examples, loss, pad, config, arm.name, kept)
            models.save_adapter(self.base, network, out, adapter="policy")
        return np.nan

    def _sampled(self, arm: Arm, config: ppo.PPOConfig | inpo.INPOConfig, out: Path) -> float:
        """Train an arm that samples answers."""
        given, reward = self.parameters[arm.stage], self.reward
        train = inpo.train if arm.stage == "inpo" else ppo.train
        prompts = [Prompt(pair.id, pair.prompt) for pair in self.pairs.train]
        held_out = [Prompt(pair.id, pair.prompt) for pair in self.pairs.held_out]
        held_out = held_out[: given["n_prompts_held_out"]]
        if arm.stage == "inpo":
            held_out = held_out[:FEWER_HELD_OUT]
        if arm.kind == PLACEBO:
            reward = shuffled_reward(self.reward, self.chat, config.seed)
        basics = self.base, self.chat, self.sft, reward
        _, history = train(*basics, prompts, held_out, config, out)
        both = before_and_after(history)
        return float((both["reward_after"] - both["reward_before"]).mean())


# --- distance to SFT ------------------------------------------------------------------------------


def sft_answers(network, chat: Chat, prompts: Sequence[Prompt], seed: int) -> list[EncodedExample]:
    """One answer of the adapter ``sft`` to each prompt, at temperature 1."""
    keys, decoding = [f"kl {prompt.id}" for prompt in prompts], Decoding(32, 1.0, seed=seed)
    sampled = sample_answers(network, "sft", chat, prompts, keys, decoding)
    return [answer for (answer,) in sampled]


def kl_to_sft(network, answers: Sequence[EncodedExample], pad: int) -> Callable[[str], float]:
    """A function adapter → KL(π_sft ‖ π), nats an answer, on answers of SFT's own.

    It is the mean over ``answers`` of Σ_t Σ_v π_sft(v | y_<t) log(π_sft / π)(v | y_<t), summed over
    the whole vocabulary: the exact KL of each token after what SFT wrote, so that only the choice
    of answers is random, and is the same for all adapters. On documents, which SFT did not write,
    it is the same sum over their tokens. SFT's distributions are kept (vocabulary
    × tokens of all answers, float32).
    """
    kept = LowerStates(network)
    batches = decode.batches_by_length([len(answer) for answer in answers], 4)

    @torch.no_grad()
    def logps(adapter: str, batch: Sequence[int]) -> torch.Tensor:
        packed = decode.pack([(answers[i],) for i in batch])
        with models.using(network, adapter):
            states = decode.packed_states(network, packed, pad, kept)
        row, column = torch.tensor(packed.predicting, device=states.device).T
        head = decode.output_head(network)
        bias = None if head.bias is None else head.bias.float()
        return linear(states[row, column].float(), head.weight.float(), bias).log_softmax(-1)

    sft = [logps("sft", batch) for batch in batches]

    def kl(adapter: str) -> float:
        total = 0.0
        for batch, before in zip(batches, sft):
            gap = before - logps(adapter, batch)
            total += float((before.exp() * gap).sum(dtype=torch.float64))
        return max(total, 0.0) / len(answers)  # rounding may leave a zero just below

    return kl


def place_between(network, start: str, end: str, alpha: float, place: str) -> None:
    """Put W(α) = (1 − α) · start + α · end, of two adapters' LoRA weights (A and B each), into a
    third."""
    first, last = (models.snapshot(network, name) for name in (start, end))
    line = {name: torch.lerp(weight, last[name], alpha) for name, weight in first.items()}
    models.restore(network, place, line)


def match(network, adapter: str, between: str, distance: float, target: float, kl) -> tuple:
    """Bring ``adapter`` back to the KL ``target``, below its own ``distance``, as ``between``.

    Along the line from SFT (:func:`place_between`), α in [0, 1], which ends in the arm and has KL 0
    at its start. √KL grows almost in proportion to α, so the next α is
    interpolated in it within the bracket, until the KL is the target to 2 %. Returns (α, KL).
    """
    (low, low_kl), (high, high_kl) = (0.0, 0.0), (1.0, distance)
    for _ in range(MOST_STEPS):
        share = (target**0.5 - low_kl**0.5) / (high_kl**0.5 - low_kl**0.5)
        alpha = low + share * (high - low)
        place_between(network, "sft", adapter, alpha, between)
        found = kl(between)
        if abs(found - target) <= EXACT * target:
            break
        if found < target:
            low, low_kl = alpha, found
        else:
            high, high_kl = alpha, found
    return alpha, found


def match_arms(
    base: models.Base,
    chat: Chat,
    build: Build,
    arms: Sequence[Arm],
    pairs: Sequence[PreferencePair],
    seed: int,
    documents: Mapping[str, Sequence[EncodedExample]],
) -> pd.DataFrame:
    """How far every arm moved; and of each true arm and its placebo the one that moved further,
    brought back to the KL of the other and saved as ``models/arms/<name>-matched``. Within 5 % both
    stay.

    Parameters
    ----------
    pairs
        Held-out preference pairs, to whose prompts SFT answers.
    documents
        Texts outside any conversation, by kind. No arm is brought back by them.

    Returns
    -------
    DataFrame
        A row for each arm as it was trained (alpha 1), then one for each that was brought back:
        stage, arm, seed (and what else tells arms apart), kl, alpha, log_ratio_gap (nats: how much
        more it prefers the chosen to the rejected answers than SFT does, mean over the pairs), name
        and ``kl_<kind>`` of each kind of documents (nats a text).
    """
    sft, pad, rows = build.model("sft"), chat.tokenizer.pad_token_id, []
    adapters = {"sft": sft, "between": sft} | {arm.name: arm.folder(build) for arm in arms}
    examples, prompts = pair_examples(pairs, chat), [Prompt(p.id, p.prompt) for p in pairs]
    with models.adapted(base, adapters) as network:
        kept = LowerStates(network)
        kl = kl_to_sft(network, sft_answers(network, chat, prompts, seed), pad)
        plain = {f"kl_{kind}": kl_to_sft(network, some, pad) for kind, some in documents.items()}

        def gap(adapter: str) -> float:
            logps = reference_logps(network, adapter, examples, pad, kept=kept)
            return float(np.mean([chosen - rejected for chosen, rejected in logps.values()]))

        def add(arm: Arm, adapter: str, distance: float, alpha: float, name: str) -> None:
            row = asdict(arm) | {"kl": distance, "alpha": alpha}
            row |= {"log_ratio_gap": gap(adapter) - before, "name": name}
            rows.append(row | {column: far(adapter) for column, far in plain.items()})

        before, distance = gap("sft"), {arm: kl(arm.name) for arm in arms}
        for arm in arms:
            add(arm, arm.name, distance[arm], 1.0, arm.name)
        for true in (arm for arm in arms if arm.kind == TRUE):
            nearer, further = sorted((true, replace(true, kind=PLACEBO)), key=distance.get)
            near, far = distance[nearer], distance[further]
            if far - near > CLOSE * far:
                name = f"{further.name}-matched"
                alpha, found = match(network, further.name, "between", far, near, kl)
                models.save_adapter(base, network, build.model(f"arms/{name}"), adapter="between")
                add(further, "between", found, alpha, name)
    return pd.DataFrame(rows).rename(columns={"kind": "arm"})
