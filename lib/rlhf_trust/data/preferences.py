"""Preference pairs: one strict reader for HH-RLHF and for the set shipped with this study.

A row is two whole dialogues, ``\\n\\nHuman: …\\n\\nAssistant: …``, equal up to the last assistant
turn. Other rows are counted, named and left out (22 of the 4,664 in HH-RLHF's two base test files:
14 with differing prompts, 8 with an empty answer). In 10 more the assistant speaks twice in a row
inside the shared prompt; these are kept, with the two messages joined into one turn.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

from .. import StudyError
from ..chat import Chat, EncodedExample
from ..sources import locate, read_jsonl
from . import choose, shuffle_key

SUBSETS = {"harmless": "hh-rlhf/harmless-base", "helpful": "hh-rlhf/helpful-base"}
SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to one conversation; a person preferred the first.

    ``prompt`` alternates human, assistant, …, human; ``source`` is ``harmless`` or ``helpful``;
    ``id`` is ``<subset>.<split>:<line>``.
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
        """Counts for the manifest and for a table."""
        return {
            "train": len(self.train),
            "held_out": len(self.held_out),
            "bad_rows": len(self.bad_rows),
            "dropped_shared_openings": self.shared_openings,
            "dropped_too_long": self.too_long,
        }


def parse_dialogue(text: str) -> list[tuple[str, str]]:
    """Split a dialogue into (speaker, stripped text); a speaker may have several turns in a row.

    Raises ``ValueError`` with the reason if it is not a dialogue.
    """
    if not isinstance(text, str):
        raise ValueError("not a text")
    before, *pieces = SPEAKER.split(text)
    speakers, texts = pieces[::2], [piece.strip() for piece in pieces[1::2]]
    problems = {
        "does not start with a speaker": before.strip(),
        "does not start with a Human turn": speakers[:1] != ["Human"],
        "does not end in an Assistant turn": speakers[-1:] != ["Assistant"],
        "empty answer": not any(texts[-1:]),
        "empty turn": not all(texts),
        "half a character (a lone surrogate)": re.search("[\ud800-\udfff]", text),
    }
    for problem, present in problems.items():
        if present:
            raise ValueError(problem)
    return list(zip(speakers, texts))


def join_turns(turns: list[tuple[str, str]]) -> tuple[str, ...]:
    """The texts of human, assistant, …, human; a speaker's turns in a row are joined into one."""
    runs = groupby(turns, key=lambda turn: turn[0])
    joined = tuple("\n\n".join(text for _, text in run) for _, run in runs)
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
    source: str, n_train: int, n_held_out: int, chat: Chat, max_length: int, seed: int = 0
) -> Preferences:
    """Read, split and size a preference set, half harmless and half helpful.

    The test files are held out, and training pairs that share a first human turn with them are
    dropped. Where there are only test files (HH-RLHF without its training half), they are split by
    first human turn, so that no conversation is on both sides.

    Parameters
    ----------
    source
        ``shipped``, ``path:<directory>`` or ``hub:``.
    n_train, n_held_out
        Pairs wanted on each side, in an order drawn from ``seed``; fewer if there are not enough.
    max_length
        Pairs with a longer side (prompt + answer) are left out and counted.

    Raises
    ------
    StudyError
        A missing file, a line that is not JSON, a side without a pair.
    """
    result = Preferences([], [])
    for subset, stem in SUBSETS.items():
        for split, side in (("test", result.held_out), ("train", result.train)):
            path = locate(source, f"{stem}.{split}.jsonl", required=split == "test")
            pairs, bad = read_pairs(path, subset) if path else ([], [])
            side += pairs
            result.bad_rows += bad
    if result.train:
        openings = {pair.opening for pair in result.held_out}
        train = [pair for pair in result.train if pair.opening not in openings]
        result.shared_openings = len(result.train) - len(train)
    else:
        openings = _held_out_openings(result.held_out, n_held_out, seed)
        train = [pair for pair in result.held_out if pair.opening not in openings]
    held_out = [pair for pair in result.held_out if pair.opening in openings]
    for side, pairs, wanted in (("train", train, n_train), ("held_out", held_out, n_held_out)):
        short = [pair for pair in pairs if pair_tokens(pair, chat) <= max_length]
        result.too_long += len(pairs) - len(short)
        chosen = choose(short, wanted, seed, by=lambda pair: pair.source)
        if not chosen:
            raise StudyError(
                f"preferences {source}: no {side.replace('_', '-')} pair of at most {max_length} "
                "tokens is left; raise max_length or check the files"
            )
        setattr(result, side, chosen)
    return result


def _held_out_openings(pairs: list[PreferencePair], n_held_out: int, seed: int) -> set[str]:
    """Openings for the held-out side, in a seeded order, until they have enough pairs.

    That is three times ``n_held_out``, since long pairs are dropped later, but at most half of all.
    """
    sizes = Counter(pair.opening for pair in pairs)
    order = sorted(sizes, key=lambda opening: shuffle_key(opening, seed))
    taken_before = accumulate((sizes[opening] for opening in order), initial=0)
    wanted = min(3 * n_held_out, len(pairs) // 2)
    return {opening for opening, taken in zip(order, taken_before) if taken < wanted}


def pair_tokens(pair: PreferencePair, chat: Chat) -> int:
    """Tokens of the longer side, prompt included."""
    answers = (pair.chosen, pair.rejected)
    return len(chat.prompt_ids(pair.prompt)) + max(len(chat.answer_ids(a)) for a in answers)


PAIRS = "pairs.jsonl"
"""Beside an INPO adapter: the pairs that it was trained on."""


@dataclass(frozen=True)
class Pair:
    """A pair that INPO made: round, prompt, and the mixed reference of (winner, loser)."""

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
    pairs = []
    for row in map(json.loads, path.read_text().splitlines()):
        winner, loser = (
            EncodedExample(tuple(row[side]["input_ids"]), row[side]["answer_start"])
            for side in ("winner", "loser")
        )
        pairs.append(Pair(row["round"], row["prompt_id"], winner, loser, tuple(row["reference"])))
    return pairs
