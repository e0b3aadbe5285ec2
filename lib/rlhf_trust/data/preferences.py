"""Preference pairs: one strict reader for HH-RLHF and for the set shipped with this study.

A row is two whole dialogues, ``\\n\\nHuman: …\\n\\nAssistant: …``, alike up to the last assistant turn. Rows that are
not (22 of the 4,664 of HH-RLHF's two base test files: 14 with differing prompts, 8 with an empty answer) are counted
and named, never kept. In 10 more the assistant speaks twice running inside the prompt that both share: these are kept,
the two messages as one turn.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from .. import StudyError
from ..chat import Chat, EncodedExample
from ..sources import locate, read_jsonl

SUBSETS = {"harmless": "hh-rlhf/harmless-base", "helpful": "hh-rlhf/helpful-base"}
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one conversation, the first preferred by a person.

    ``prompt`` alternates human, assistant, …, human; ``source`` is ``harmless`` or ``helpful``; ``id`` is
    ``<subset>.<split>:<line>``.
    """

    id: str
    prompt: tuple[str, ...]
    chosen: str
    rejected: str
    source: str

    @property
    def opening(self) -> str:
        """The first human turn, by which pairs are split."""
        return self.prompt[0]


@dataclass
class Preferences:
    """A split preference set, with what was left out and why (``file:line: reason``)."""

    train: list[PreferencePair]
    held_out: list[PreferencePair]
    bad_rows: list[str] = field(default_factory=list)
    shared_openings: int = 0
    too_long: int = 0

    def facts(self) -> dict[str, int]:
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "bad_rows": len(self.bad_rows),
            "dropped_shared_openings": self.shared_openings,
            "dropped_too_long": self.too_long,
        }


def parse_dialogue(text: str) -> list[tuple[str, str]]:
    """Split a dialogue into (speaker, stripped text), as written: one speaker may have several turns running.

    Raises ``ValueError`` with the reason when it is no dialogue.
    """
    if not isinstance(text, str):
        raise ValueError("not a text")
    pieces = SPEAKER.split(text)
    if pieces[0].strip():
        raise ValueError("does not start with a speaker")
    turns = [(speaker, content.strip()) for speaker, content in zip(pieces[1::2], pieces[2::2])]
    if not turns or turns[0][0] != "Human":
        raise ValueError("does not start with a Human turn")
    if turns[-1][0] != "Assistant":
        raise ValueError("does not end in an Assistant turn")
    if not turns[-1][1]:
        raise ValueError("empty answer")
    if not all(content for _, content in turns):
        raise ValueError("empty turn")
    return turns


def join_turns(turns: list[tuple[str, str]]) -> tuple[str, ...]:
    """The texts of human, assistant, …, human: what one speaker says in several turns running becomes one."""
    joined = tuple(
        "\n\n".join(text for _, text in run) for _, run in groupby(turns, key=lambda turn: turn[0])
    )
    if len(joined) % 2 == 0:
        raise ValueError("the prompt does not end in a Human turn")
    return joined


def parse_pair(row: dict, id: str, source: str) -> PreferencePair:
    """One HH-RLHF row as a typed pair; ``ValueError`` says what is wrong with it."""
    missing = [key for key in ("chosen", "rejected") if key not in row]
    if missing:
        raise ValueError(f"no field {missing[0]!r}")
    chosen, rejected = parse_dialogue(row["chosen"]), parse_dialogue(row["rejected"])
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the two dialogues have different prompts")
    if chosen[-1] == rejected[-1]:
        raise ValueError("both answers are the same")
    return PreferencePair(id, join_turns(chosen[:-1]), chosen[-1][1], rejected[-1][1], source)


def read_pairs(path: Path, subset: str) -> tuple[list[PreferencePair], list[str]]:
    """All good pairs of a file, and ``file:line: reason`` for every bad row."""
    pairs, bad = [], []
    split = "train" if "train" in path.name else "test"
    for number, row in read_jsonl(path):
        try:
            pairs.append(parse_pair(row, f"{subset}.{split}:{number}", subset))
        except ValueError as error:
            bad.append(f"{path.name}:{number}: {error}")
    return pairs, bad


def load_preferences(
    source: str, n_train: int, n_held_out: int, chat: Chat, max_tokens: int, seed: int = 0
) -> Preferences:
    """Read, split and size a preference set, half harmless and half helpful.

    The test files are held out and a training pair whose first human turn is among theirs is dropped. Where there are
    only test files (HH-RLHF without its training half), they are split by first human turn, so that no conversation
    stands on both sides.

    Parameters
    ----------
    source
        ``shipped``, ``path:<directory>`` or ``hub:``.
    n_train, n_held_out
        Pairs wanted on either side, in an order drawn from ``seed``; fewer on a side where there are not so many.
    max_tokens
        Pairs with a longer side (prompt + answer) are left out and counted.

    Raises
    ------
    StudyError
        A missing file, a line that is no JSON, a side without a pair.
    """
    result = Preferences([], [])
    for subset, stem in SUBSETS.items():
        test, bad = read_pairs(locate(source, f"{stem}.test.jsonl"), subset)
        train_path = locate(source, f"{stem}.train.jsonl", required=False)
        train = []
        if train_path:
            train, bad_train = read_pairs(train_path, subset)
            bad += bad_train
        result.bad_rows += bad
        result.train += train
        result.held_out += test
    if not result.train:
        everything = result.held_out
        openings = sorted(
            {pair.opening for pair in everything}, key=lambda text: _shuffle_key(text, seed)
        )
        # Three times what is asked for, since long pairs are dropped below; at most half of all.
        wanted, held, count = min(3 * n_held_out, len(everything) // 2), set(), 0
        sizes: dict[str, int] = {}
        for pair in everything:
            sizes[pair.opening] = sizes.get(pair.opening, 0) + 1
        for opening in openings:
            if count >= wanted:
                break
            held.add(opening)
            count += sizes[opening]
        result.train = [pair for pair in everything if pair.opening not in held]
        result.held_out = [pair for pair in everything if pair.opening in held]
    else:
        held = {pair.opening for pair in result.held_out}
        kept = [pair for pair in result.train if pair.opening not in held]
        result.shared_openings = len(result.train) - len(kept)
        result.train = kept
    for side, wanted in (("train", n_train), ("held_out", n_held_out)):
        pairs = getattr(result, side)
        short = [pair for pair in pairs if pair_tokens(pair, chat) <= max_tokens]
        result.too_long += len(pairs) - len(short)
        chosen = balanced(short, wanted, seed)
        if not chosen:
            raise StudyError(
                f"preferences {source}: no {side.replace('_', '-')} pair of at most {max_tokens} tokens "
                "is left; raise max_tokens or check the files"
            )
        setattr(result, side, chosen)
    return result


def pair_tokens(pair: PreferencePair, chat: Chat) -> int:
    """Tokens of the longer side, prompt included."""
    return len(chat.prompt_ids(pair.prompt)) + max(
        len(chat.answer_ids(a)) for a in (pair.chosen, pair.rejected)
    )


def balanced(pairs: list[PreferencePair], wanted: int, seed: int) -> list[PreferencePair]:
    """Up to ``wanted`` pairs in an order drawn from ``seed``, the halves taking turns while both last."""
    queues = {
        subset: sorted(
            (p for p in pairs if p.source == subset), key=lambda p: _shuffle_key(p.id, seed)
        )
        for subset in sorted({pair.source for pair in pairs})
    }
    chosen: list[PreferencePair] = []
    while len(chosen) < wanted and any(queues.values()):
        for queue in queues.values():
            if queue and len(chosen) < wanted:
                chosen.append(queue.pop(0))
    return chosen


def _shuffle_key(text: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()


PAIRS = "pairs.jsonl"
"""Beside the adapter: the pairs that it was trained on."""


@dataclass(frozen=True)
class Pair:
    """A training pair and where it came from: round, prompt, and the mixed reference of (winner, loser), once computed."""

    round: int
    prompt_id: str
    winner: EncodedExample
    loser: EncodedExample
    reference: tuple[float, float] | None = None

    @property
    def id(self) -> str:
        return f"round {self.round}, {self.prompt_id}"


def load_pairs(directory: Path) -> list[Pair]:
    """The pairs that an INPO adapter was trained on."""
    path = directory / PAIRS
    if not path.is_file():
        raise StudyError(f"{path}: missing; run 05-inpo first")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        Pair(
            r["round"],
            r["prompt_id"],
            *(
                EncodedExample(tuple(r[side]["input_ids"]), r[side]["answer_start"])
                for side in ("winner", "loser")
            ),
            tuple(r["reference"]),
        )
        for r in rows
    ]
