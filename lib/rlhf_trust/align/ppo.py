"""Proximal policy optimisation of a language model against a reward model, in one file.

**The problem.** A prompt x is answered token by token, a_1 … a_T. A reward model scores the whole
answer, R(x, a). We want a policy π with a large E[R] that stays near the SFT model π_ref, on whose
kind of text the reward model was trained and can be trusted:

    maximise  E_π[ R(x, a) − β · log π(a|x)/π_ref(a|x) ]

The expectation of the second term is β · KL(π‖π_ref). The log-ratio of an answer is the sum of its
tokens' log-ratios, so the penalty can be charged token by token (Stiennon et al. 2020, arXiv
2009.01325; Ouyang et al. 2022, arXiv 2203.02155):

    r_t = −β · (log π(a_t|…) − log π_ref(a_t|…)),   and R is added to r_T  :func:`kl_shaped_rewards`

**Which token deserves the credit?** The policy gradient is E[Σ_t A_t ∇log π(a_t|…)]: push each
token by its advantage A_t, how much better things went from there than the value function V_t
expected. With δ_t = r_t + γV_{t+1} − V_t (V_{T+1} = 0: the answer is over), generalised advantage
estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16) trades the bias of short look-aheads,
which rely on V, against the variance of long ones:

    A_t = Σ_k (γλ)^k δ_{t+k} = δ_t + γλ A_{t+1}               :func:`generalized_advantages`
    return_t = A_t + V_t

Advantages are then scaled to mean 0 and variance 1 over the tokens of a step, so that the step size
does not depend on the reward model's units (:func:`whiten`).

**Several updates from one batch of answers.** Sampling is expensive, so each batch of rollouts is
reused for several epochs. After the first update it comes from an old policy; the ratio ρ_t =
π(a_t)/π_old(a_t) corrects for that, but only nearby. Schulman et al. 2017 (arXiv 1707.06347, eq. 7)
remove the incentive to move ρ further than ε in the direction that increases the objective:

    L_policy = −mean_t min( ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t )                   :func:`policy_loss`

Where the clipped branch is the smaller one, the gradient is zero. The value function learns the
returns by squared error, with a similar limit on the size of its steps (:func:`value_loss`):

    loss = L_policy + c · L_value

(eq. 9, without an entropy bonus: the KL term keeps the policy broad).

**Without a value function.** What was to be expected can also be read off the k answers that a step
has to each prompt (:func:`group_advantages`, :func:`group_loss`; both as TRL has them):

- RLOO (Ahmadian et al. 2024, arXiv 2402.14740) takes the answer as one action with the return R_i =
  R(x, a_i) − β log π(a_i|x)/π_ref(a_i|x), less the mean return of the other k − 1 answers. ρ is the
  ratio of whole answers;
- GRPO (Shao et al. 2024, arXiv 2402.03300) gives every token of an answer the group's standard
  score, (R(x, a_i) − mean) / standard deviation, averages over an answer's tokens before it does
  over answers, and charges the KL in the loss: β times the mean of ρ (π_ref/π − log π_ref/π − 1).
  The factor ρ makes its gradient that of KL(π‖π_ref) (DeepSeek-AI 2025, arXiv 2512.02556; TRL's
  default). A score unit of β is thus the standard deviation within the group.

**One backbone, four roles.** Its adapters are switched: ``policy`` (starts as the SFT adapter and
is the only one trained), ``reference`` (the SFT adapter; with no adapter at all the model would be
the start model) and ``reward``. The value function is one linear layer, initially zero, on the
policy's hidden states, so values and log-probabilities come from one pass. Everything runs in
evaluation mode; the adapters have no dropout.

**The sampling temperature is 1.** At any other temperature the answers are not samples of the π
whose log-probabilities enter the ratio and the KL, and both are biased.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from .. import StudyError, models, require
from ..artifacts import content_key, progress, sha256_of
from ..chat import Chat, EncodedExample
from ..decode import Decoding, LowerStates, Prompt, batches_by_length, token_logps
from ..distributed import add_up, add_up_gradients, gathered, share, size
from ..training import CLIP, keep_state, kept_state, training_code
from . import rollout
from .rollout import RewardFnMaker

VALUE_CLIP = 0.2
"""How far, in score units, a value may move from its old one in a step (TRL's PPO:
``cliprange_value``).
"""

VALUE_WEIGHT = 0.1
"""c, the weight of the value loss, which reaches the policy's adapter through the shared states
(TRL: ``vf_coef``).
"""


ADVANTAGES = ("gae", "rloo", "grpo")
"""What an answer is compared with: PPO's value function, or other answers to its prompt."""


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a PPO run, each in the range that 03-ppo declares for it.

    A score unit is the standard deviation of the reward model's scores of the SFT model's held-out
    answers, measured before training; their mean becomes 0 (a Bradley-Terry reward has no zero of
    its own, so nothing is lost). Curves show raw scores.

    Attributes
    ----------
    steps, answers_per_step
        How often answers are sampled, and how many; each step makes ``epochs`` passes over its
        answers.
    answers_per_prompt
        How many of a step's answers share a prompt. From 2 on, the prompt's mean score is
        subtracted: Bradley-Terry rewards cannot be compared across prompts, and their offsets would
        drown the differences between answers.
    max_new_tokens
        Length limit of rollouts and held-out answers.
    learning_rate, value_learning_rate
        Constant, of AdamW without weight decay: for the policy's adapter and the value head.
    epochs, minibatch
        Passes over a step's answers, and answers per update.
    clip_range
        ε of the policy ratio.
    kl_coef
        β, score units per nat.
    max_kl
        Nats per answer beyond which the run stops.
    gamma, lam
        γ and λ of the advantages. γ = 1 because answers are short and only their end is scored.
    missing_end_penalty
        Score units subtracted from truncated answers.
    evaluate_every
        Steps between evaluations on held-out prompts; 0: only before and after.
    advantage
        One of ``ADVANTAGES``. Without ``gae`` there is no value function: ``gamma``, ``lam`` and
        ``value_learning_rate`` mean nothing, and ``answers_per_prompt`` is 2 or more.
    """

    steps: int = 8
    answers_per_step: int = 24
    answers_per_prompt: int = 1
    max_new_tokens: int = 32
    learning_rate: float = 2e-4
    value_learning_rate: float = 3e-4
    epochs: int = 2
    minibatch: int = 8
    clip_range: float = 0.2
    kl_coef: float = 0.05
    max_kl: float = 50.0
    gamma: float = 1.0
    lam: float = 0.95
    missing_end_penalty: float = 0.0
    evaluate_every: int = 0
    seed: int = 0
    advantage: str = "gae"

    def __post_init__(self):
        n, k = self.answers_per_step, self.answers_per_prompt
        known = f"advantage: must be one of {', '.join(ADVANTAGES)}, got {self.advantage!r}"
        require(self.advantage in ADVANTAGES, known)
        alone = f"answers_per_prompt: must be 2 or more for {self.name}, which compares them, got 1"
        require(k > 1 or self.advantage == "gae", alone)
        multiple = f"a multiple of answers_per_prompt ({k})"
        require(n % k == 0, f"answers_per_step: must be {multiple}, got {n}")

    @property
    def name(self) -> str:
        return "PPO" if self.advantage == "gae" else self.advantage.upper()

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.max_new_tokens, 1.0, seed=self.seed)


# --- the equations --------------------------------------------------------------------------------
# Per-token tensors are [answers, longest answer]; mask is 1 on an answer's tokens, 0 on padding.


def kl_shaped_rewards(policy_logps, reference_logps, scores, mask, kl_coef: float) -> Tensor:
    """Per-token rewards, [n, T]: −β(log π − log π_ref), plus ``scores`` [n] at the last token."""
    rewards = -kl_coef * (policy_logps - reference_logps) * mask
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, mask.sum(1).long() - 1] += scores.to(rewards)
    return rewards


def generalized_advantages(rewards, values, mask, gamma, lam) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [n, T], 0 on padding (arXiv 1506.02438, eq. 16).

    Nothing follows an answer's last token: its next value and next advantage are 0, also for
    truncated answers, as the score is given there.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and (population) variance 1 over tokens, 0 on padding: [n, T] → [n, T]."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


def policy_loss(new_logps, old_logps, advantages, mask, clip_range: float) -> tuple[Tensor, Tensor]:
    """The negative clipped surrogate and the share of tokens whose gradient clipping removed: two
    scalars.

    (arXiv 1707.06347, eq. 7; a mean over tokens, so long answers weigh more.)
    """
    ratio = torch.exp(new_logps - old_logps)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -masked_mean(torch.minimum(free, clipped), mask)
    return loss, masked_mean((clipped < free).float(), mask)


def value_loss(values, old_values, returns, mask) -> Tensor:
    """Half the squared error of values against returns, scalar.

    The larger of the errors of the value and of the value kept within ``VALUE_CLIP`` of the old one
    counts (as in the code of PPO's authors, not in the paper).
    """
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def group_advantages(returns: Tensor, answers_per_prompt: int, kind: str) -> Tensor:
    """Advantages of whole answers, [n, 1], from their returns [n], where answers to one prompt are
    neighbours. ``kind``: ``rloo`` or ``grpo``."""
    by_prompt = returns.view(-1, answers_per_prompt)
    centred = by_prompt - by_prompt.mean(1, keepdim=True)
    scale = by_prompt.std(1, keepdim=True) + 1e-4  # TRL's; all answers may be alike
    if kind == "rloo":  # less the others' mean: k / (k − 1) times less the mean of all
        scale = (answers_per_prompt - 1) / answers_per_prompt
    return (centred / scale).view(-1, 1)


def group_loss(logps, mask, batch: Minibatch, config: PPOConfig) -> tuple[Tensor, Tensor]:
    """The loss of RLOO or GRPO and the share of answers (of GRPO: tokens) whose gradient clipping
    removed: two scalars. ``logps``: of the policy, [answers, T]."""
    old, advantages = batch.old_logps, batch.advantages
    if config.advantage == "rloo":
        whole = logps.sum(1, keepdim=True), old.sum(1, keepdim=True)
        return policy_loss(*whole, advantages, torch.ones_like(advantages), config.clip_range)
    weights = mask / mask.sum(1, keepdim=True)  # every answer counts once
    loss, clipped = policy_loss(logps, old, advantages, weights, config.clip_range)
    gap, ratio = batch.reference_logps - logps, torch.exp(logps - old)
    return loss + config.kl_coef * masked_mean(ratio * (gap.exp() - gap - 1), weights), clipped


# --- rollouts -------------------------------------------------------------------------------------


def predicted_values(value_head, states: Tensor) -> Tensor:
    """V_t from the hidden states at the positions that predict a_t: [n, T, hidden] → [n, T].

    States are brought to unit scale first, so that one learning rate fits every backbone.
    """
    return value_head(torch.nn.functional.layer_norm(states.float(), states.shape[-1:])).squeeze(-1)


@torch.no_grad()
def token_pass(
    model, adapter: str, answers: list[EncodedExample], batches, pad: int, head=None, kept=None
) -> Tensor:
    """Log-probabilities, mask and values of all answers, [3, n, longest answer].

    Values are 0 without a value ``head``. ``batches`` are the update's minibatches, as indices:
    equal shapes round equally, so that the ratio starts at exactly 1 and the KL at exactly 0.
    ``kept``: ``decode.LowerStates`` that several passes share. Of several processes each brings the
    answers in its batches.
    """
    longest = max(len(a.answer_ids) for a in answers)
    whole = torch.zeros(3, len(answers), longest, device=model.device)
    with models.using(model, adapter):
        for batch in batches:
            some = [answers[i] for i in batch]
            logps, mask, states = token_logps(model, some, pad, hidden=True, kept=kept)
            values = torch.zeros_like(mask)
            if head is not None:
                values = predicted_values(head, states) * mask
            whole[:, batch, : mask.shape[1]] = torch.stack([logps, mask, values])
    return add_up(whole)


class Minibatch(NamedTuple):
    """What an update needs of this process's answers; tensors are [answers, longest answer], a
    group's advantages [answers, 1]. ``weight``: the answers' share of what the loss is a mean
    over, tokens or (of groups) answers."""

    answers: list[EncodedExample]
    old_logps: Tensor
    reference_logps: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    weight: float


class PPORun(rollout.Run):
    """A run with what PPO adds to it: value head, optimiser and random numbers."""

    def __init__(self, config: PPOConfig, model, reward_fn, chat: Chat, held_out, bar, chosen):
        limits = config.decoding, config.minibatch, config.max_kl
        super().__init__(model, reward_fn, chat, held_out, *limits, bar)
        self.config, self.rng = config, np.random.default_rng(config.seed)
        self.chosen = chosen
        self.value_head = torch.nn.Linear(self.model.config.hidden_size, 1).to(self.model.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.policy = list(models.lora_weights(self.model, "policy").values())
        head = list(self.value_head.parameters())
        self.critic = self.value_head if config.advantage == "gae" else None
        self.weights = self.policy + head
        groups = [{"params": self.policy}, {"params": head, "lr": config.value_learning_rate}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=0.0)

    def collect(self, step: int, prompts: list[Prompt]) -> tuple[list[Minibatch], dict]:
        """Sample one answer to each prompt, compute the advantages, and measure the answers."""
        model, config, tokenizer = self.model, self.config, self.chat.tokenizer
        keys = [f"ppo {step} {index} {prompt.id}" for index, prompt in enumerate(prompts)]
        answers = [answer for (answer,) in self.sample(prompts, keys, self.decoding)]
        scores = self.reward_fn(answers)
        if self.chosen:
            scores = scores - self.reward_fn([self.chosen[prompt.id] for prompt in prompts])
        batches = batches_by_length([len(a) for a in answers], config.minibatch)
        self.kept = LowerStates(model)  # for all passes over this step's answers
        own_batches = [share(batch) for batch in batches]
        given, head = (answers, own_batches, tokenizer.pad_token_id), self.critic
        reference_logps, _, _ = token_pass(model, "reference", *given, kept=self.kept)
        old_logps, mask, old_values = token_pass(model, "policy", *given, head, self.kept)
        kl = float((old_logps - reference_logps).sum(1).mean())
        self.check_kl(step, kl)

        ended = [answer.input_ids[-1] == tokenizer.eos_token_id for answer in answers]
        ended = torch.tensor(ended, device=mask.device)
        before = self.eval_history[0]["reward"]
        centre = 0.0 if self.chosen else float(before.mean())
        shaped = (scores - centre) / float(before.std(ddof=0))
        shaped = shaped - config.missing_end_penalty * (~ended).float()
        if config.answers_per_prompt > 1:
            by_prompt = shaped.view(-1, config.answers_per_prompt)
            shaped = (by_prompt - by_prompt.mean(1, keepdim=True)).flatten()
        if self.critic is None:
            if config.advantage == "rloo":
                shaped = shaped - config.kl_coef * (old_logps - reference_logps).sum(1)
            k, returns = config.answers_per_prompt, old_values  # which are all 0
            advantages = group_advantages(shaped, k, config.advantage)
        else:
            rewards = kl_shaped_rewards(old_logps, reference_logps, shaped, mask, config.kl_coef)
            discounts = config.gamma, config.lam
            advantages, returns = generalized_advantages(rewards, old_values, mask, *discounts)
            advantages = whiten(advantages, mask)
        tensors = (old_logps, reference_logps, old_values, advantages, returns)
        minibatches = []
        for batch, own in zip(batches, own_batches):
            rows = [answers[i] for i in own]
            width = max(len(answer.answer_ids) for answer in rows)
            weight = len(own) / len(batch)
            if self.critic is not None:
                weight = float(mask[own].sum() / mask[batch].sum())
            minibatches.append(Minibatch(rows, *(x[own, :width] for x in tensors), weight))
        return minibatches, {
            "reward": float(scores.mean()),
            "kl": kl,
            "kl_coef": config.kl_coef,
            "entropy": -float(masked_mean(old_logps, mask)),
            "answer_length": float(mask.sum(1).mean()),
            "ended": float(ended.float().mean()),
        }

    # --- update -----------------------------------------------------------------------------------

    def update(self, step: int, minibatches: list[Minibatch]) -> dict[str, float]:
        """``epochs`` passes of clipped updates over a step's answers; means over minibatches."""
        losses = []
        with models.using(self.model, "policy", self.policy):
            for _ in range(self.config.epochs):
                for index in self.rng.permutation(len(minibatches)).tolist():
                    losses.append(self.update_once(step, minibatches[index]))
        means = np.mean(np.sum(gathered(losses), axis=0), axis=0)
        return dict(zip(("policy_loss", "value_loss", "clip_fraction"), means))

    def update_once(self, step: int, batch: Minibatch) -> list[float]:
        """One clipped update: policy loss, value loss, share of tokens clipped, each this process's
        part of it."""
        pad, clip_range = self.chat.tokenizer.pad_token_id, self.config.clip_range
        logps, mask, states = token_logps(self.model, batch.answers, pad, True, self.kept)
        if self.critic is None:
            surrogate, clipped = group_loss(logps, mask, batch, self.config)
            value_error = torch.zeros_like(surrogate)
        else:
            given = logps, batch.old_logps, batch.advantages, mask
            surrogate, clipped = policy_loss(*given, clip_range)
            values = predicted_values(self.critic, states)
            value_error = value_loss(values, batch.old_values, batch.returns, mask)
        loss = surrogate + VALUE_WEIGHT * value_error
        self.optimizer.zero_grad()
        (batch.weight * loss).backward()
        add_up_gradients(self.weights)
        groups = self.optimizer.param_groups
        norms = [clip_grad_norm_(group["params"], CLIP) for group in groups]  # policy, value head
        numbers = torch.stack([loss.detach(), *norms])
        if not numbers.isfinite().all():
            raise StudyError(
                f"{self.config.name} step {step}: loss and gradient norms are {numbers.tolist()}; "
                "lower learning_rate or raise kl_coef"
            )
        self.optimizer.step()
        return [batch.weight * float(x.detach()) for x in (surrogate, value_error, clipped)]

    # --- interrupted runs -------------------------------------------------------------------------

    def save(self, path: Path, key: str, step: int) -> None:
        """Keep where the run ``key`` stands: the steps made and everything that changes."""
        state = {
            "step": step,
            "value_head": self.value_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
        }
        keep_state(path, key, self.state() | state)

    def resume(self, path: Path, key: str) -> int:
        """Return to where the run ``key`` was interrupted; gives the steps made, 0 without one."""
        state = kept_state(path, key)
        if not state:
            return 0
        self.restore(state)
        self.value_head.load_state_dict(state["value_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        answers = state["step"] * self.config.answers_per_step
        self.bar.update(answers + sum(map(len, self.eval_history)))
        return state["step"]


# --- the loop -------------------------------------------------------------------------------------


def train(
    base: models.Base,
    chat: Chat,
    sft: Path,
    reward: Path | RewardFnMaker,
    prompts: list[Prompt],
    held_out: list[Prompt],
    config: PPOConfig,
    out: Path,
    chosen: Mapping[str, EncodedExample] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the SFT adapter with PPO and save it to ``out`` (at the end only, whole or not at all).

    The state of the run is kept beside ``out`` after every step, and an interrupted run with the
    same weights, prompts and settings resumes from there, to the same bytes. With a reward function
    of the caller's it starts over.

    Parameters
    ----------
    sft
        Folder of the SFT adapter (policy and reference).
    reward
        Folder of the reward adapter with its head, or a function that makes another reward function
        from the model.
    prompts
        Answered in a seeded random order, over and over.
    held_out
        Never trained on.
    chosen
        Prompt id → the preferred answer. Its score is then subtracted from that of each training
        answer (a baseline of its own for each prompt, as in the paper's code).

    Returns
    -------
    curves : DataFrame
        Columns step, metric, value. ``step`` counts the steps made before the answers were sampled,
        so step 0 is the SFT model. On training answers: reward (raw score), kl (nats per answer:
        Σ_t log π − log π_ref, mean over answers), kl_coef, entropy (nats per token, estimated by
        the mean of −log π over the sampled tokens), answer_length (tokens), ended (share that
        stopped before the limit), and of the update that follows policy_loss, value_loss (0
        without a value function), clip_fraction (means over minibatches). On held-out prompts:
        held_out_reward, held_out_kl.
    eval_history : DataFrame
        The answers of every evaluation on held-out prompts, as in :class:`rollout.Run`.

    Raises
    ------
    StudyError
        If the loss or a score is not finite, all held-out scores are alike, or the KL exceeds
        ``config.max_kl``; nothing is written then.
    """
    for name in ("minibatch", "answers_per_step"):
        problem = f"{name}: must be a multiple of the {size()} processes, got"
        require(getattr(config, name) % size() == 0, f"{problem} {getattr(config, name)}")
    evaluate_at = {*range(0, config.steps, config.evaluate_every or config.steps), config.steps}
    answers_in_all = len(held_out) * len(evaluate_at) + config.answers_per_step * config.steps
    unfinished, name = out.with_name(f"{out.name}.unfinished.pt"), config.name
    with (
        rollout.policy_and_reward(base, chat, sft, reward, config.minibatch) as (model, reward_fn),
        progress(total=answers_in_all, desc=f"{name}: held-out before", unit="answer") as bar,
    ):
        run = PPORun(config, model, reward_fn, chat, held_out, bar, chosen)
        order, done = run.rng.permutation(len(prompts)).tolist(), 0
        if isinstance(reward, Path):
            weights = models.adapter_fingerprint(base, sft), sha256_of(reward)
            code = training_code("align.rollout", "align.ppo")
            key = content_key(config, weights, prompts, held_out, chat.key, chosen, code, size())
            done = run.resume(unfinished, key)
            gathered(None)  # before one of them replaces the file
        if not done:
            run.evaluate(0)
            run.check_spread()
        for step in range(done, config.steps):
            bar.set_description(f"{name}: step {step + 1} of {config.steps}")
            places = range(step * config.answers_per_step, (step + 1) * config.answers_per_step)
            turns = [i // config.answers_per_prompt % len(order) for i in places]
            minibatches, metrics = run.collect(step, [prompts[order[turn]] for turn in turns])
            run.record(step, metrics | run.update(step, minibatches))
            if step + 1 in evaluate_at:
                bar.set_description(f"{name}: held-out prompts after step {step + 1}")
                run.evaluate(step + 1)
            if isinstance(reward, Path):
                run.save(unfinished, key=key, step=step + 1)
        models.save_adapter(base, model, out, adapter="policy")
        unfinished.unlink(missing_ok=True)
    return run.tables()
