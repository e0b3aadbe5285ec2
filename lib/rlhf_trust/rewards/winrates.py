"""Win rates between trained models by a judge that need not be the trained reward, raw and at equal
length; and what each gains for its distance from SFT.

A judge says how likely the first of two answers to a prompt is the better one: 1, 0 or ½ of a score
(the higher one wins), anything between of a judge that is asked for a preference. Two equal texts
are a tie whatever it says.

**At equal length** (length-controlled AlpacaEval; Dubois et al. 2024, arXiv 2404.04475). Of a model
against a baseline a logistic regression explains the preference for prompt x by

    logit P(x) = θ + φ tanh((l_baseline − l_model) / sd) + ψ γ_x

with the answers' lengths in characters, sd the standard deviation of their difference, and γ_x the
difficulty of the prompt, which comes from other models. The win rate at equal length is the mean
over prompts of the prediction with φ = 0. As in the authors' package the weights are kept small
(L1) as far as five-fold cross-validation asks for it, which over few prompts draws a win rate that
is not clear to ½; their further rows, of a baseline that was told to be short or long, exist for
their own baseline alone (this is their ``length_controlled_noreg``).
``tests/parity/alpaca_eval_lc.py`` compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import GroupKFold

from .. import models
from ..align.arms import Arm, place_between
from ..align.inpo import preference_model_oracle
from ..align.rollout import RewardModel, answer_kl, described, sample_answers
from ..artifacts import TABLES, Build, progress
from ..chat import Chat
from ..decode import Decoding, Generations, Prompt
from ..stats import (
    LEVEL,
    UNCLEAR,
    Interval,
    by_conclusion,
    crossed_change,
    holm,
    interval_words,
    verdict,
)
from ..training import Pairs, TrainConfig, train_reward, trained_once, training_code
from ..verticals.common import COLUMNS
from .rm_bench import ASKED, Dialogue, is_classifier, read_verdict, scores_of

Judge = Callable[[pd.DataFrame, pd.DataFrame], np.ndarray]
"""P(first ≻ second) of two models' answers, rows of :func:`sampled_answers` in the same order of
prompts: [prompts]."""

MEASURES = ("raw", "length")
LORA = "lora_rank lora_alpha target_modules lora_layers".split()

FOLDS = 5
"""Of the cross-validation; AlpacaEval's ``n_splits``."""


# --- answers --------------------------------------------------------------------------------------


def sampled_answers(
    base: models.Base,
    chat: Chat,
    build: Build,
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    shares: Sequence[float],
    decoding: Decoding,
    rewards: Sequence[str],
) -> pd.DataFrame:
    """One answer to each prompt by start, by SFT and by every arm: as it was trained (share 1) and
    at ``shares`` of its way from SFT along the straight line of weights (``arms.place_between``).
    All draw the same random numbers.

    ``rewards``: names of reward models under ``models/``. Columns method, seed, share, id, kl (log
    π/π_sft of the answer, nats; NaN of start), tokens, ended, answer and a score by each reward.
    """
    folders = {name: build.model(name) for name in rewards}
    heads = {name: models.load_reward_head(folder) for name, folder in folders.items()}
    folders |= dict.fromkeys(("sft", "reference", "policy"), build.model("sft"))
    folders |= {arm.name: arm.folder(build) for arm in arms}
    ids, pad, tables = [p.id for p in prompts], chat.tokenizer.pad_token_id, []
    shares = sorted({*shares, 1.0})
    total = len(ids) * (2 + len(arms) * len(shares))
    with (
        models.adapted(base, folders) as network,
        progress(total=total, desc="answers", unit="answer") as bar,
    ):
        scores = {name: RewardModel(network, heads[name], chat, adapter=name) for name in rewards}

        def add(adapter: str | None, method: str, seed: int, share: float) -> None:
            drawn = sample_answers(network, adapter, chat, prompts, ids, decoding, bar)
            answers = [answer for (answer,) in drawn]
            rows = {"method": method, "seed": seed, "share": share, "id": ids, "kl": np.nan}
            if adapter:
                rows["kl"] = answer_kl(network, answers, pad, 8).cpu().numpy()
            rows |= described(answers, chat)
            rows |= {name: score(answers).cpu().numpy() for name, score in scores.items()}
            tables.append(pd.DataFrame(rows))

        add(None, "start", 0, 1.0)
        add("policy", "sft", 0, 1.0)
        for arm in arms:
            for share in shares:
                place_between(network, "sft", arm.name, share, "policy")
                add("policy", arm.stage, arm.seed, share)
    return pd.concat(tables, ignore_index=True)


def frontier_table(answers: pd.DataFrame, rewards: Sequence[str]) -> pd.DataFrame:
    """Rows of ``frontier.csv``: means over prompts of :func:`sampled_answers`, a row for each
    reward at each point. ``score`` is less SFT's, in standard deviations of its answers'."""
    means = answers.groupby(["method", "seed", "share"], sort=False)
    rows, at_sft = [], answers[answers["method"] == "sft"]
    for name in rewards:
        unit = at_sft[name].std(ddof=0)
        found = means[["kl", "tokens", "ended", name]].mean().rename(columns={name: "score"})
        found["score"] = (found["score"] - at_sft[name].mean()) / (unit or 1.0)
        rows.append(found.assign(judge=name, n=means.size()).reset_index())
    return pd.concat(rows, ignore_index=True)


# --- judges ---------------------------------------------------------------------------------------


def train_judge(
    base: models.Base, chat: Chat, pairs: Pairs, given: Mapping, epochs: int, seed: int, out: Path
) -> None:
    """Train a reward model on ``pairs`` and save it to ``out``, unless it is there, made from the
    same. ``given``: the parameters of 02-reward, whose settings but these it has."""
    lora = models.LoRA(*(given[name] for name in LORA))
    sizes = {name: given[name] for name in ("learning_rate", "batch_size")}
    config = TrainConfig(epochs=epochs, seed=seed, **sizes)

    def train() -> float:
        curve = train_reward(base, chat, pairs, config, lora, out)
        return float(curve.loc[curve["metric"] == "loss", "value"].iloc[-1])

    about = asdict(lora), asdict(config), [asdict(pair) for pair in pairs]
    trained_once(out, (base.fingerprint, chat.key, *about, training_code()), train)


def by_score(name: str) -> Judge:
    """The higher score in this column is the better answer."""
    return lambda first, second: _compared(first[name], second[name])


def _compared(first, second) -> np.ndarray:
    return np.sign(np.asarray(first) - np.asarray(second)) / 2 + 0.5


def judge_of(
    source: str, reference: str, reads: str, prompts: Sequence[Prompt], chat: Chat, kept: Path
) -> Judge:
    """A judge from elsewhere (sources as of ``models.load_base``).

    A sequence classifier scores; so does a language model with a ``reference``, by its implicit
    reward log π/π_ref, which a DPO-trained one has. Another language model ``reads`` both answers,
    in both orders, whose mean counts: ``letters``, the probability of "A" rather than "B"
    (``inpo.preference_model_oracle``), or ``words``, a verdict at the end of what it writes, as
    RM-Bench's generative judges give it, kept in the directory ``kept``.
    """
    turns_of = {prompt.id: prompt.turns for prompt in prompts}

    def dialogues(rows: pd.DataFrame) -> list[Dialogue]:
        return [(turns_of[row.id], row.answer) for row in rows.itertuples()]

    if reference or is_classifier(source):
        return lambda *both: _compared(
            *(scores_of(source, dialogues(rows), kept, reference) for rows in both)
        )
    base = models.load_base(source)
    oracle = preference_model_oracle(base, chat, prompts)
    generations = Generations(kept, Chat(base.tokenizer, "auto"))

    def by_letters(first: pd.DataFrame, second: pd.DataFrame) -> np.ndarray:
        texts = ([chat.sequence(*each) for each in dialogues(rows)] for rows in (first, second))
        return oracle(list(zip(first["id"], *texts)))

    def by_words(first: pd.DataFrame, second: pd.DataFrame) -> np.ndarray:
        asked = []
        for (turns, one), (_, two) in zip(dialogues(first), dialogues(second)):
            for a, b in ((one, two), (two, one)):
                text = ASKED.format(prompt="\n\n".join(turns), a=a, b=b)
                asked.append(Prompt(f"{len(asked)}", (text,)))
        given = base.model, base.fingerprint, "win rates", asked, Decoding(512, 0.0)
        read = np.array([read_verdict(text) for (text,) in generations.answer(*given)])
        if unread := np.isnan(read).sum():
            print(f"{source}: {unread} of {len(read)} answers have no verdict, and count as ties")
        forth, back = np.nan_to_num(read, nan=0.5).reshape(-1, 2).T
        return (forth + 1 - back) / 2

    return by_letters if reads == "letters" else by_words


# --- win rates ------------------------------------------------------------------------------------


def length_controlled(
    won: np.ndarray, longer: np.ndarray, difficulty: np.ndarray, strength: float = 0.0
) -> np.ndarray:
    """What a model would win at equal length, [prompts] (module docstring); the mean is the win
    rate.

    Parameters
    ----------
    won
        Preference for the model's answer, 0 to 1, [prompts].
    longer
        Characters of the baseline's answer less those of the model's, [prompts].
    difficulty
        γ, [prompts].
    strength
        Weight of the data against the L1 penalty; by default from cross-validation.
    """
    n, spread = len(won), longer.std(ddof=1) or 1.0
    design = np.column_stack([np.tanh(longer / spread), difficulty, np.ones(n)])
    # A preference of 0.7 is a win of weight 0.7 and a loss of weight 0.3.
    rows, labels, weights = np.tile(design, (2, 1)), np.repeat([1, 0], n), [*won, *(1 - won)]
    how = {"solver": "liblinear", "fit_intercept": False, "random_state": 123, "max_iter": 1000}
    if strength:
        model = LogisticRegression(C=strength, l1_ratio=1.0, **how)
    else:
        folds = GroupKFold(min(FOLDS, n)).split(rows, groups=np.tile(np.arange(n), 2))
        how |= {"cv": list(folds), "scoring": "neg_log_loss", "use_legacy_attributes": False}
        model = LogisticRegressionCV(l1_ratios=(1.0,), **how)
    model.fit(rows, labels, sample_weight=np.array(weights))
    design[:, 0] = 0.0
    return model.predict_proba(design)[:, 1]


WEAK = 10.0
"""Weight of the data against the penalty at which that hardly matters."""


def _pseudo_values(won, longer, difficulty) -> np.ndarray:
    """Values [seeds, prompts] whose mean is the win rate at equal length, of all seeds together,
    and whose spread is its error's: the jackknife's, centred.

    The jackknife has next to no penalty (``WEAK``): one that draws all weights to 0 would leave no
    spread at all, which is no evidence of a coin.

    ``won``, ``longer``: [seeds, prompts]; ``difficulty``: [prompts].
    """
    games = won.ravel(), longer.ravel(), np.tile(difficulty, len(won))
    predicted = length_controlled(*games)
    without = np.zeros(won.size)
    for i in range(won.size):
        some = (np.delete(part, i) for part in games)
        without[i] = length_controlled(*some, WEAK).mean()
    values = predicted.mean() - (won.size - 1) * (without - without.mean())
    return values.reshape(won.shape)


def win_rates(answers: pd.DataFrame, judges: Mapping[str, Judge]) -> pd.DataFrame:
    """Rows of ``winrate.csv``: every method against every one before it, by each judge, ``raw`` and
    at equal ``length``, over prompts and seeds (``stats.crossed_change`` from ½).

    ``answers``: of :func:`sampled_answers`, of which those at share 1 count. Seed i plays seed i;
    start and SFT, one checkpoint each, play all. ``ties``: share of preferences of ½. ``longer``:
    characters by which the model's answers are longer, mean. ``p_holm`` is over all pairs of one
    judge and measure.
    """
    arms: dict[str, list[pd.DataFrame]] = {}
    for (method, _), rows in answers[answers["share"] == 1].groupby(["method", "seed"], sort=False):
        arms.setdefault(method, []).append(rows)
    found = []
    for judge, prefers in judges.items():
        won, longer = {}, {}
        for baseline, model in combinations(arms, 2):
            seeds = range(max(len(arms[model]), len(arms[baseline])))
            played = [[arms[m][s % len(arms[m])] for m in (model, baseline)] for s in seeds]
            won[model, baseline] = np.array([_preferred(prefers, *both) for both in played])
            sizes = [[rows["answer"].str.len() for rows in both] for both in played]
            longer[model, baseline] = -np.diff(sizes, axis=1)[:, 0]
        for pair, raw in won.items():
            difficulty = _difficulty(won, *pair)
            at_length = _pseudo_values(raw, -longer[pair], difficulty)
            about = dict(zip(("model", "baseline"), pair)) | {"judge": judge}
            about |= {"ties": np.mean(raw == 0.5), "longer": longer[pair].mean()}
            for measure, values in zip(MEASURES, (raw, at_length)):
                change = vars(crossed_change(values, np.full(raw.shape[1], 0.5), None, (0.0, 1.0)))
                ends = {e: np.clip(change[e] + 0.5, 0, 1) for e in ("value", "low", "high")}
                found.append(about | {"measure": measure} | change | ends)
    table = pd.DataFrame(found).rename(columns=COLUMNS)
    families = table.dropna(subset="p").groupby(["judge", "measure"])["p"]
    return table.assign(p_holm=families.transform(holm))[TABLES["winrate"]]


def _preferred(prefers: Judge, first: pd.DataFrame, second: pd.DataFrame) -> np.ndarray:
    """A judge's preferences [prompts], a tie between equal texts, which it is not asked about."""
    differ = first["answer"].to_numpy() != second["answer"].to_numpy()
    found = np.full(len(first), 0.5)
    if differ.any():
        found[differ] = prefers(first[differ], second[differ])
    return found


def _difficulty(won: Mapping, model: str, baseline: str) -> np.ndarray:
    """γ [prompts]: log-odds with which the other methods win against this baseline, half a win and
    half a loss added; 0 if there are none."""
    others = [np.empty((0, next(iter(won.values())).shape[1]))]
    for (first, second), preferred in won.items():
        if baseline in (first, second) and model not in (first, second):
            others.append(preferred if second == baseline else 1 - preferred)
    played = np.concatenate(others)
    return logit((played.sum(0) + 0.5) / (len(played) + 1))


def words(table: pd.DataFrame) -> list[str]:
    """A sentence for each judge and conclusion about the methods against SFT, and one for each
    judge about the methods among themselves. ``table``: of :func:`win_rates`."""
    said = []
    for judge, rows in table.groupby("judge", sort=False):
        both = zip(*(rows[rows["measure"] == measure].itertuples() for measure in MEASURES))
        found, clear, among = {}, [], 0
        for raw, length in both:
            won = interval_words(Interval.of_row(raw), ".0%")
            if raw.baseline == "sft":
                own = interval_words(Interval.of_row(length), ".0%", label="")
                found[raw.model] = f"{won}, at equal length {own}", _conclusion(raw, length)
            elif raw.baseline != "start":
                among += 1
                clear += [f"{raw.model} against {raw.baseline} {won}"] * (_verdict(raw) != UNCLEAR)
        over = f"{rows['n'].max()} prompts and {rows['seeds'].max()} seeds"
        said += [
            f"By the {judge}, against sft over {over}: {told}" for told in by_conclusion(found)
        ]
        if among:
            listed = f": {'; '.join(clear)}" if clear else ""
            said.append(f"By the {judge}, {len(clear)} of {among} pairs of methods differ{listed}.")
    return said


def _verdict(row) -> str:
    """``better``, ``worse`` or ``no clear change``, after Holm's correction."""
    found = verdict(row.ci_low, row.ci_high, worse=-1, neutral=0.5)
    return found if row.p_holm < 1 - LEVEL else UNCLEAR


def _conclusion(raw, length) -> str:
    found, at_length = _verdict(raw), _verdict(length)
    if found == UNCLEAR:
        return "no clear difference from a coin"
    return f"{found}, {'not by length alone' if found == at_length else 'which length may explain'}"
