"""Which examples stand for which stage: the pairs it was trained on, and the answers it changed."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from .. import StudyError
from ..align.inpo import Pair
from ..chat import Chat
from ..data.preferences import PreferencePair
from ..decode import Prompt
from .gradients import Example
from .solvers import Scores, of_items, tfidf

LOSSES = {"sft": "next-token", "ppo": "reward", "dpo": "dpo", "inpo": "inpo"}
"""The loss through which a stage's training data acted; PPO's is the reward model's."""

BEFORE = {"sft": "start", "ppo": "sft", "dpo": "sft", "inpo": "sft"}
"""The model that a stage started from."""

Changed = tuple[Prompt, str, str]
"""A benchmark prompt with the answer before and after a stage."""


def training_examples(pairs: Seq[PreferencePair], chat: Chat, stage: str) -> list[Example]:
    """SFT saw the chosen answers alone; the reward model and DPO saw both."""
    return [
        Example(p.id, p.source, tuple(chat.sequence(p.prompt, answer)
                                      for answer in ((p.chosen,) if stage == "sft" else (p.chosen, p.rejected))))
        for p in pairs
    ]


def inpo_examples(kept: Seq[Pair], asked: Seq[PreferencePair], chat: Chat) -> tuple[list[PreferencePair], list[Example]]:
    """INPO's own pairs, to read and as token for token it saw them. ``asked``: the pairs whose prompts it answered."""
    by_id = {p.id: p for p in asked}
    missing = [pair.prompt_id for pair in kept if pair.prompt_id not in by_id]
    if missing:
        raise StudyError(f"inpo: {missing[0]!r}, a prompt that it answered, is not among the {len(asked)} training pairs; set "
                         "preferences, n_train, max_tokens and seed as in 05-inpo")
    pairs = [PreferencePair(pair.id, by_id[pair.prompt_id].prompt, chat.decode(pair.winner.answer_ids),
                            chat.decode(pair.loser.answer_ids), by_id[pair.prompt_id].source) for pair in kept]
    return pairs, [Example(p.id, p.source, (pair.winner, pair.loser)) for p, pair in zip(pairs, kept)]


def changed_items(answered: Seq[tuple[Prompt, dict[str, list[str]]]], stage: str, n: int) -> tuple[list[Changed], int]:
    """The first ``n`` items whose first sampled answer the stage changed, and how many of all it left as they were."""
    both = [(prompt, answers[BEFORE[stage]][0], answers[stage][0]) for prompt, answers in answered]
    changed = [item for item in both if item[1] != item[2]]
    return changed[:n], len(both) - len(changed)


def evaluation_examples(items: Seq[Changed], chat: Chat, stage: str, vertical: str) -> list[Example]:
    """Evaluation losses of a stage: SFT's on the answer after it; the pairwise ones with the answer after as winner and
    the answer before as loser."""
    return [
        Example(f"{vertical}/{prompt.id}", vertical,
                tuple(chat.sequence(prompt.turns, answer, prompt.system)
                      for answer in ((after,) if stage == "sft" else (after, before))))
        for prompt, before, after in items
    ]


def text_scores(train: Seq[Example], queries: Seq[Example], tokenizer, raises: bool = False,
                groups: Seq[str] | None = None) -> Scores:
    """What likeness of texts alone says, with the sign of influence scores (``solvers.tfidf``): [examples, items].

    An example stands for the text that it makes likelier, its first sequence with the prompt. It lowers an item's loss by
    being like the item's first sequence, and raises it by being like the second, where there is one; ``raises``: the
    other way round, where the loss is the log-odds of the first.
    """
    def decoded(examples: Seq[Example], side: int) -> list[str]:
        return [tokenizer.decode(e.sequences[side].input_ids, skip_special_tokens=True) for e in examples]

    by_item = sum(sign * tfidf(decoded(train, 0), decoded(queries, side)).by_item
                  for side, sign in zip(range(len(queries[0].sequences)), (1.0, -1.0)))
    return of_items(-by_item if raises else by_item, groups)
