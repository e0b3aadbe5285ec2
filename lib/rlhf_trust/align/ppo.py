"""Proximal policy optimisation of a language model against a reward model, in one file.

**The problem.** A prompt x is answered token by token, a_1 … a_T. A reward model scores the whole answer, R(x, a).
We want the policy π that makes E[R] large without leaving the SFT model π_ref, on whose kind of text the reward model
was trained and can be believed:

    maximise  E_π[ R(x, a) − β · log π(a|x)/π_ref(a|x) ]

The expectation of the second term is β · KL(π‖π_ref). Since the log-ratio of an answer is the sum of those of its
tokens, it can be paid where it arises (Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, arXiv 2203.02155):

    r_t = −β · (log π(a_t|…) − log π_ref(a_t|…)),   and R is added to r_T                     :func:`kl_shaped_rewards`

**Which token deserves it?** The policy gradient is E[Σ_t A_t ∇log π(a_t|…)]: push each token by its advantage A_t, how
much better things went after it than the value function V_t had expected before it. With δ_t = r_t + γV_{t+1} − V_t
(V_{T+1} = 0: the answer is over), generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16)
weighs short looks ahead, which lean on V, against long ones, which are noisy:

    A_t = Σ_k (γλ)^k δ_{t+k} = δ_t + γλ A_{t+1},      return_t = A_t + V_t              :func:`generalized_advantages`

Advantages are then shifted and scaled to mean 0, variance 1 over the tokens of a step, so that the step size does not
hang on the reward model's units                                                                       :func:`whiten`

**Several updates from one set of answers.** Answers are dear, so they are used for a few epochs. After the first update
they come from an old policy; the ratio ρ_t = π(a_t)/π_old(a_t) corrects for it, but only nearby. Schulman et al. 2017
(arXiv 1707.06347, eq. 7) take away the incentive to move ρ further than ε in the direction that pays:

    L_policy = −mean_t min( ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t )                                      :func:`policy_loss`

Where the clipped branch is the smaller one, the gradient is zero. The value function learns the returns by squared
error, with the same caution about steps that are too large                                          :func:`value_loss`

    loss = L_policy + c · L_value      (eq. 9, without an entropy bonus: the KL term keeps the policy broad)

**One backbone, four roles.** Adapters on it are switched: ``policy`` (starts as the SFT adapter, alone trained),
``reference`` (the SFT adapter; switching adapters off would give the start model instead) and ``reward``. The value
function is one linear layer, zero at first, on the policy's hidden states, so values and log-probabilities come out of
one pass. Everything runs in evaluation mode; the adapters have no dropout.

**Temperature is 1 in rollouts.** Other temperatures sample from a distribution that is not the π whose
log-probabilities enter the ratio and the KL; both would then be biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import StudyError, decode, models
from ..artifacts import atomic_write, content_key, progress, sha256_of
from ..chat import Chat, EncodedExample
from .rollout import (
    RewardFn,
    RewardFnMaker,
    check_spread,
    evaluate,
    has_end,
    policy_and_judge,
    sample_answers,
)

KL_ESTIMATORS = {
    "k1": lambda log_ratio: log_ratio,
    "k2": lambda log_ratio: log_ratio**2 / 2,
    "k3": lambda log_ratio: torch.expm1(-log_ratio) + log_ratio,
}
"""log π − log π_ref of a token → what it pays (``PPOConfig.kl_estimator``)."""


@dataclass(frozen=True)
class PPOConfig:
    """What a run of PPO depends on. "Score unit" is the standard deviation of the SFT model's scores (see
    ``normalise_scores``).

    Attributes
    ----------
    steps, answers_per_step
        How often new answers are drawn, and how many; each step makes ``epochs`` passes over its answers.
    answers_per_prompt
        How many of a step's answers are to the same prompt. From 2 on, each prompt's mean score is taken off its
        answers' scores: a Bradley-Terry reward says nothing across prompts, and its offset from prompt to prompt would
        drown what tells two answers apart.
    max_new_tokens, temperature
        Rollouts and held-out answers; the temperature must be 1 (module docstring).
    learning_rate, value_learning_rate, schedule
        AdamW without weight decay for the policy adapter and the value head; ``constant``, or ``linear``: falling to 0 over
        the steps, so that the noise of single steps dies away.
    epochs, minibatch
        Passes over a step's answers, and answers per update.
    clip_range, value_clip
        ε of the policy ratio, and how far (score units) a value may move from its old one in a step.
    vf_coef
        c, the weight of the value loss where it reaches the policy adapter through the shared hidden states.
    kl_coef, target_kl
        β in score units per nat; with ``target_kl`` (nats per answer) β is steered towards it
        (:func:`adapt_kl_coef`).
    kl_estimator
        What a token pays, with l = log π − log π_ref: ``k1`` l, whose mean is the KL and whose gradient is the objective's;
        ``k2`` l²/2 and ``k3`` exp(−l) − 1 + l, never negative and less noisy, k3 without bias as a number, but neither with
        the objective's gradient (J. Schulman, "Approximating KL divergence", 2020).
    max_kl
        Nats per answer beyond which the run stops: the policy has left the reference.
    gamma, lam
        γ and λ of the advantages. γ = 1 as an answer is short and only its end is scored.
    max_grad_norm
        Gradients are cut to this length, policy and value head apart.
    missing_end_penalty
        Score units taken from an answer that the length limit cut off.
    normalise_scores
        Subtract the mean and divide by the standard deviation of the reward model's scores of the SFT model's
        held-out answers, measured once before training, so that β and the values have a known unit. A
        Bradley-Terry reward has no zero of its own, so nothing is lost. Curves show the raw score. Scores that are all
        alike are refused.
    evaluate_every
        Steps between looks at held-out prompts; 0: only before and after.
    """

    steps: int = 8
    answers_per_step: int = 24
    answers_per_prompt: int = 1
    max_new_tokens: int = 32
    temperature: float = 1.0
    learning_rate: float = 2e-4
    value_learning_rate: float = 3e-4
    epochs: int = 2
    minibatch: int = 8
    clip_range: float = 0.2
    value_clip: float = 0.2
    vf_coef: float = 0.1
    kl_coef: float = 0.05
    target_kl: float | None = None
    max_kl: float = 50.0
    kl_estimator: str = "k1"
    gamma: float = 1.0
    lam: float = 0.95
    schedule: str = "constant"
    max_grad_norm: float = 1.0
    missing_end_penalty: float = 0.0
    normalise_scores: bool = True
    evaluate_every: int = 0
    seed: int = 0

    def __post_init__(self):
        if self.temperature != 1.0:
            raise StudyError(
                f"temperature: PPO samples at 1.0, got {self.temperature}; at any other, answers do not "
                "come from the policy whose log-probabilities are trained"
            )
        for name in (
            "steps",
            "answers_per_step",
            "answers_per_prompt",
            "max_new_tokens",
            "epochs",
            "minibatch",
        ):
            if getattr(self, name) < 1:
                raise StudyError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in (
            "learning_rate",
            "value_learning_rate",
            "clip_range",
            "value_clip",
            "max_grad_norm",
            "max_kl",
        ):
            if not getattr(self, name) > 0:
                raise StudyError(f"{name}: must be above 0, got {getattr(self, name)}")
        for name in ("kl_coef", "vf_coef", "missing_end_penalty", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise StudyError(f"{name}: must not be below 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise StudyError(f"{name}: must lie between 0 and 1, got {getattr(self, name)}")
        if self.answers_per_step % self.answers_per_prompt:
            raise StudyError(
                f"answers_per_step: {self.answers_per_step} is no multiple of answers_per_prompt "
                f"({self.answers_per_prompt})"
            )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise StudyError(
                f"kl_estimator: must be one of {', '.join(KL_ESTIMATORS)}, got {self.kl_estimator!r}"
            )
        if self.schedule not in ("constant", "linear"):
            raise StudyError(f"schedule: must be constant or linear, got {self.schedule!r}")
        if self.target_kl is not None and (self.target_kl <= 0 or self.kl_coef <= 0):
            raise StudyError(
                "target_kl: it and kl_coef must be above 0, as the coefficient is steered by a factor"
            )

    @property
    def decoding(self) -> decode.Decoding:
        return decode.Decoding(self.max_new_tokens, self.temperature, seed=self.seed)


# --- the equations -------------------------------------------------------------------------------------------------
# All per-token tensors are [answers, longest answer]; mask is 1 on an answer's tokens and 0 on the padding after them.


def kl_shaped_rewards(
    policy_logps, reference_logps, scores, mask, kl_coef: float, estimator: str = "k1"
) -> torch.Tensor:
    """Per-token rewards, [n, T]: −β(log π − log π_ref) (or what another of ``KL_ESTIMATORS`` makes of it), plus ``scores`` [n]
    at each answer's last token."""
    rewards = -kl_coef * KL_ESTIMATORS[estimator](policy_logps - reference_logps) * mask
    rows = torch.arange(len(rewards), device=rewards.device)
    rewards[rows, mask.sum(1).long() - 1] += scores.to(rewards)
    return rewards


def generalized_advantages(
    rewards, values, mask, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both [n, T], 0 on padding (arXiv 1506.02438, eq. 16).

    Nothing follows an answer's last token: its next value and next advantage are 0, also where the length limit made
    it the last, since the score is given there.
    """
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = following_advantage = (delta + gamma * lam * following_advantage) * mask[
            :, t
        ]
        following_value = values[:, t] * mask[:, t]
    return advantages, (advantages + values) * mask


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and (population) variance 1 over the tokens where ``mask`` is 1; 0 elsewhere. [n, T] → [n, T]."""
    centred = (x - masked_mean(x, mask)) * mask
    return centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)


def policy_loss(
    new_logps, old_logps, advantages, mask, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clipped surrogate, negated, and the share of tokens where clipping took the gradient away: two scalars.

    (arXiv 1707.06347, eq. 7; a mean over tokens, so long answers weigh more.)
    """
    ratio = torch.exp(new_logps - old_logps)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return -masked_mean(torch.minimum(free, clipped), mask), masked_mean(
        (clipped < free).float(), mask
    )


def value_loss(values, old_values, returns, mask, value_clip: float) -> torch.Tensor:
    """Half the squared error of values against returns, scalar; of the value and the value held within
    ``value_clip`` of the old one, the worse counts (as in the authors' code of PPO, after the paper)."""
    held = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (held - returns) ** 2), mask)


def adapt_kl_coef(kl_coef: float, kl: float, target_kl: float | None) -> float:
    """β for the next step: up to 20 % more where ``kl`` (nats per answer) is above its target, up to 20 % less below.

    The controller of Ziegler et al. 2019 (arXiv 1909.08593, section 2.2) with gain 1 in place of 0.1, as runs here have
    tens of steps, not thousands.
    """
    if target_kl is None:
        return kl_coef
    return kl_coef * (1 + max(-0.2, min(0.2, kl / target_kl - 1)))


# --- log-probabilities and values ------------------------------------------------------------------------------------


def predicted_values(value_head, states: torch.Tensor) -> torch.Tensor:
    """V_t from the hidden states at the positions that predict a_t: [n, T, hidden] → [n, T].

    States are brought to unit scale first, so that one learning rate fits every backbone.
    """
    return value_head(torch.nn.functional.layer_norm(states.float(), states.shape[-1:])).squeeze(-1)


@torch.no_grad()
def token_pass(
    model,
    adapter: str,
    answers: Sequence[EncodedExample],
    batches: list[list[int]],
    pad: int,
    value_head=None,
):
    """Log-probabilities, mask and (with ``value_head``, else zeros) values of all answers, each [n, longest answer].

    ``batches`` are the minibatches of the update: the same shapes give the same rounding, so that the ratio starts at
    exactly 1 and the KL at exactly 0.
    """
    model.set_adapter(adapter, inference_mode=True)
    longest = max(len(a.answer_ids) for a in answers)
    logps, mask, values = torch.zeros(3, len(answers), longest, device=model.device)
    for batch in batches:
        batch_logps, batch_mask, states = decode.token_logps(
            model, [answers[i] for i in batch], pad, hidden=True
        )
        width = batch_mask.shape[1]
        logps[batch, :width], mask[batch, :width] = batch_logps, batch_mask
        if value_head is not None:
            values[batch, :width] = predicted_values(value_head, states) * batch_mask
    return logps, mask, values


# --- training ------------------------------------------------------------------------------------------------------


def train(
    base: models.Base,
    chat: Chat,
    sft: Path,
    reward: Path | RewardFnMaker,
    prompts: list[decode.Prompt],
    held_out: list[decode.Prompt],
    config: PPOConfig,
    out: Path,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train the SFT adapter with PPO and save it to ``out`` (at the end only, whole or not at all).

    Where the run stands is kept beside ``out`` after every step; a run that was interrupted carries on from there, to the
    same bytes, if it is the same run (weights, prompts, settings). With a judge that is a function it starts over.

    Parameters
    ----------
    sft
        Folder of the SFT adapter (policy and reference).
    reward
        Folder of the reward adapter with its head, or a function that makes another judge of answers from the model.
    prompts
        Answered in a seeded random order, over and over.
    held_out
        Never trained on. The same random numbers draw their answers each time, so before and after are paired.

    Returns
    -------
    curves : DataFrame
        Columns step, metric, value. ``step`` counts the steps already made when the answers were drawn, so step 0 is
        the SFT model. On training answers: reward (raw score), kl (nats per answer: Σ_t log π − log π_ref, mean over
        answers), kl_coef, entropy (nats per token, estimated by the mean of −log π over the sampled tokens),
        answer_length (tokens), ended (share that stopped before the limit), and of the update that follows
        policy_loss, value_loss, clip_fraction (means over minibatches). On held-out prompts: held_out_reward,
        held_out_kl.
    looks : DataFrame
        The answers to the held-out prompts at every look (:func:`rollout.evaluate`): columns step, id, reward, kl, answer.

    Raises
    ------
    StudyError
        If the loss or a score is not finite, all held-out scores are alike, or the KL exceeds ``config.max_kl``; nothing is
        written then.
    """
    if not prompts or not held_out:
        raise StudyError("ppo: needs at least one prompt to train on and one held-out prompt")
    with policy_and_judge(base, chat, sft, reward, config.minibatch) as (model, judge):
        kept = None
        if isinstance(reward, Path):
            key = content_key(
                asdict(config),
                models.adapter_fingerprint(base, sft),
                sha256_of(reward),
                [asdict(p) for p in prompts],
                [asdict(p) for p in held_out],
                chat.format,
            )
            kept = _Progress(out.with_name(f"{out.name}.unfinished.pt"), key)
        tables = _run(model, judge, chat, prompts, held_out, config, kept)
        models.save_adapter(base, model, out, adapter="policy")
        if kept is not None:
            kept.path.unlink(missing_ok=True)
    return tables


@dataclass(frozen=True)
class _Progress:
    """A file that holds where the run named ``key`` stands."""

    path: Path
    key: str

    def load(self) -> dict | None:
        try:
            state = torch.load(
                self.path, weights_only=True
            )  # tensors and plain values: nothing in the file is run
        except (
            Exception
        ):  # no file, half a file, or of another version: what it held can be computed again
            return None
        return state if state.get("key") == self.key else None

    def save(self, **state) -> None:
        with atomic_write(self.path) as aside:
            torch.save(state | {"key": self.key}, aside)


def _run(
    model,
    judge: RewardFn,
    chat: Chat,
    prompts,
    held_out,
    config: PPOConfig,
    kept: _Progress | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(config.seed)
    order = rng.permutation(len(prompts)).tolist()
    per_step = config.answers_per_step // config.answers_per_prompt
    value_head = torch.nn.Linear(model.config.hidden_size, 1).to(model.device)
    torch.nn.init.zeros_(value_head.weight)
    torch.nn.init.zeros_(value_head.bias)
    policy = [parameter for name, parameter in model.named_parameters() if ".policy." in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": policy, "lr": config.learning_rate},
            {"params": list(value_head.parameters()), "lr": config.value_learning_rate},
        ],
        weight_decay=0.0,
    )
    rows: list[tuple[int, str, float]] = []

    def note(step: int, metrics: dict[str, float]) -> None:
        rows.extend((step, metric, value) for metric, value in metrics.items())

    def at_held_out(step: int) -> pd.DataFrame:
        found = evaluate(model, judge, chat, held_out, config.decoding, config.minibatch, step, bar)
        _check(step, config, kl=float(found["kl"].mean()))
        note(
            step,
            {
                "held_out_reward": float(found["reward"].mean()),
                "held_out_kl": float(found["kl"].mean()),
            },
        )
        return found

    evaluations_in_all = (
        sum(
            step == config.steps or _evaluation_due(step, config)
            for step in range(1, config.steps + 1)
        )
        + 1
    )
    answers_in_all = len(held_out) * evaluations_in_all + config.answers_per_step * config.steps
    with progress(total=answers_in_all, desc="PPO: held-out prompts before", unit="answer") as bar:
        state = kept.load() if kept is not None else None
        if state is None:
            first, kl_coef = 0, config.kl_coef
            eval_history = at_held_out(0)
            if config.normalise_scores:
                check_spread(eval_history)
        else:
            first, kl_coef = state["step"], state["kl_coef"]
            eval_history = pd.DataFrame(state["eval_history"])
            rows += map(tuple, state["rows"])
            with torch.no_grad():
                for parameter, value in zip(policy, state["policy"], strict=True):
                    parameter.copy_(value)
            value_head.load_state_dict(state["value_head"])
            optimizer.load_state_dict(state["optimizer"])
            rng.bit_generator.state = state["rng"]
            bar.update(len(eval_history) + first * config.answers_per_step)
        before = eval_history.loc[eval_history["step"] == 0, "reward"]
        shift, scale = (
            (float(before.mean()), float(before.std(ddof=0)))
            if config.normalise_scores
            else (0.0, 1.0)
        )
        for step in range(first, config.steps):
            bar.set_description(f"PPO: step {step + 1} of {config.steps}")
            if config.schedule == "linear":
                for group, rate in zip(
                    optimizer.param_groups, (config.learning_rate, config.value_learning_rate)
                ):
                    group["lr"] = rate * (1 - step / config.steps)
            fresh = [
                prompts[order[i % len(order)]]
                for i in range(step * per_step, (step + 1) * per_step)
            ]
            chosen = [prompt for prompt in fresh for _ in range(config.answers_per_prompt)]
            keys = [f"ppo {step} {index} {prompt.id}" for index, prompt in enumerate(chosen)]
            answers = [
                a
                for (a,) in sample_answers(
                    model, "policy", chat, chosen, keys, config.decoding, bar
                )
            ]
            metrics = _step(
                model,
                judge,
                value_head,
                optimizer,
                chat,
                answers,
                config,
                kl_coef,
                shift,
                scale,
                step,
                rng,
            )
            note(step, metrics)
            kl_coef = adapt_kl_coef(kl_coef, metrics["kl"], config.target_kl)
            if step + 1 == config.steps or _evaluation_due(step + 1, config):
                bar.set_description(f"PPO: held-out prompts after step {step + 1}")
                eval_history = pd.concat([eval_history, at_held_out(step + 1)], ignore_index=True)
            if kept is not None:
                kept.save(
                    step=step + 1,
                    kl_coef=kl_coef,
                    eval_history=eval_history.to_dict("list"),
                    rows=rows,
                    policy=[parameter.detach() for parameter in policy],
                    value_head=value_head.state_dict(),
                    optimizer=optimizer.state_dict(),
                    rng=rng.bit_generator.state,
                )
    return pd.DataFrame(rows, columns=["step", "metric", "value"]), eval_history


def _evaluation_due(step: int, config: PPOConfig) -> bool:
    return config.evaluate_every > 0 and step % config.evaluate_every == 0


def _step(
    model,
    judge: RewardFn,
    value_head,
    optimizer,
    chat: Chat,
    answers: list[EncodedExample],
    config: PPOConfig,
    kl_coef: float,
    shift: float,
    scale: float,
    step: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Rewards and advantages of one step's answers, then ``epochs`` passes of clipped updates; the step's metrics."""
    eos, pad = chat.tokenizer.eos_token_id, chat.tokenizer.pad_token_id
    batches = decode.batches_by_length([len(a) for a in answers], config.minibatch)
    scores = judge(answers)
    reference_logps, mask, _ = token_pass(model, "reference", answers, batches, pad)
    old_logps, _, old_values = token_pass(model, "policy", answers, batches, pad, value_head)
    kl = float((old_logps - reference_logps).sum(1).mean())
    _check(step, config, kl=kl)

    ended = torch.tensor([has_end(a, eos) for a in answers], device=mask.device)
    shaped = (scores - shift) / scale - config.missing_end_penalty * (~ended).float()
    if config.answers_per_prompt > 1:
        of_prompt = shaped.view(-1, config.answers_per_prompt)
        shaped = (of_prompt - of_prompt.mean(1, keepdim=True)).flatten()
    rewards = kl_shaped_rewards(
        old_logps, reference_logps, shaped, mask, kl_coef, config.kl_estimator
    )
    advantages, returns = generalized_advantages(
        rewards, old_values, mask, config.gamma, config.lam
    )
    advantages = whiten(advantages, mask)

    losses = []
    model.set_adapter("policy")
    for _ in range(config.epochs):
        for index in rng.permutation(len(batches)).tolist():
            batch = batches[index]
            new_logps, batch_mask, states = decode.token_logps(
                model, [answers[i] for i in batch], pad, hidden=True
            )
            old_logp, old_value, advantage, goal = (
                x[batch, : batch_mask.shape[1]]
                for x in (old_logps, old_values, advantages, returns)
            )
            surrogate, clipped = policy_loss(
                new_logps, old_logp, advantage, batch_mask, config.clip_range
            )
            new_value = predicted_values(value_head, states)
            value_error = value_loss(new_value, old_value, goal, batch_mask, config.value_clip)
            loss = surrogate + config.vf_coef * value_error
            _check(step, config, loss=float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                norm = torch.nn.utils.clip_grad_norm_(group["params"], config.max_grad_norm)
                _check(step, config, gradient=float(norm))
            optimizer.step()
            losses.append([float(x.detach()) for x in (surrogate, value_error, clipped)])
    surrogates, value_errors, clip_shares = np.mean(losses, axis=0)
    return {
        "reward": float(scores.mean()),
        "kl": kl,
        "kl_coef": kl_coef,
        "entropy": -float(masked_mean(old_logps, mask)),
        "answer_length": float(mask.sum(1).mean()),
        "ended": float(ended.float().mean()),
        "policy_loss": float(surrogates),
        "value_loss": float(value_errors),
        "clip_fraction": float(clip_shares),
    }


def _check(step: int, config: PPOConfig, **numbers: float) -> None:
    """Stop where a number is not finite or the KL has run away; a later number would only hide where it began."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise StudyError(
                f"ppo step {step}: {name} is {value}; lower learning_rate or raise kl_coef"
            )
    if numbers.get("kl", 0.0) > config.max_kl:
        raise StudyError(
            f"ppo step {step}: KL to the SFT model is {numbers['kl']:.1f} nats per answer, above max_kl "
            f"{config.max_kl:g}; lower learning_rate or raise kl_coef"
        )
