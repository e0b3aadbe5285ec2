"""Preference pairs from a source: read, counted, split and sized.

:mod:`.parts` finds the files or splits, :mod:`.forms` makes pairs of their rows. Rows that make
none are counted, named and left out (22 of the 4,664 in HH-RLHF's two base test files: 14 with
differing prompts, 8 with an empty answer). In 10 more the assistant speaks twice in a row inside
the shared prompt; these are kept, with the two messages joined into one turn.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from .. import StudyError, require
from ..artifacts import checked, note
from ..chat import Chat, EncodedExample
from ..sources import read_jsonl
from . import choose, shuffle_key
from .forms import LABELS, PKU, RATINGS, TIE, PreferencePair, joined_ratings, parse_pair, recognise
from .parts import Part, find_parts, sha256, side_of

MAX_BAD_ROWS = 0.1
"""Share of bad rows in a file above which nothing is read; ``#max_bad_rows=<share>`` behind a
source sets another."""


@dataclass
class Preferences:
    """A split preference set, with what was left out and why (``file:line: reason``).

    ``name``, ``form`` and ``files`` (name → sha256) say what was read, ``reasons`` counts the bad
    rows by reason, and ``ties`` the rows in which neither answer was preferred.
    """

    train: list[PreferencePair]
    held_out: list[PreferencePair]
    bad_rows: list[str] = field(default_factory=list)
    shared_openings: int = 0
    too_long: int = 0
    name: str = ""
    form: str = ""
    files: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    reasons: Counter = field(default_factory=Counter)
    ties: int = 0

    def facts(self) -> dict[str, int | str]:
        """What the data are, and counts, for the manifest and for a table."""
        # Of one file its own hash, of several one over their hashes and names.
        listed = [f"{digest}  {name}\n" for name, digest in sorted(self.files.items())]
        whole = listed[0] if len(listed) == 1 else sha256("".join(listed).encode())
        return {
            "data": self.name,
            "form": self.form,
            "sha256": whole[:16],
            "train": len(self.train),
            "held_out": len(self.held_out),
            "bad_rows": len(self.bad_rows),
            "ties": self.ties,
            "dropped_shared_openings": self.shared_openings,
            "dropped_too_long": self.too_long,
        }

    def counted(self) -> str:
        """How many rows are bad, by reason, and the first of them."""
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.reasons.most_common())
        bad, first = f"{len(self.bad_rows):,} of {self.rows:,} rows are bad", self.bad_rows[0]
        return f"{bad} ({reasons}); the first is `{first}`"

    def left_out(self) -> str:
        """A sentence on the bad rows by reason, and on ties."""
        said = "No row was broken."
        if self.bad_rows:
            said = f"{self.counted()}. They were left out."
        if self.ties:
            said += f" Rows that prefer neither answer, left out as well: {self.ties:,}."
        return said


def read_pairs(
    part: Part, label: str = ""
) -> tuple[list[tuple[str, PreferencePair]], list[tuple[str, str]]]:
    """All good pairs of a part with their sides, and (``file:line``, reason) of every other row."""
    pairs, left_out = [], []
    for number, row in joined_ratings(part.rows) if part.form == RATINGS else part.rows:
        try:
            id = f"{part.prefix or part.name}:{number}"
            pair = parse_pair(row, id, part.source, part.form, label)
        except ValueError as error:
            left_out.append((f"{part.name}:{number}", str(error)))
        else:
            pairs.append((side_of(str(row.get("split", ""))) or part.side, pair))
    return pairs, left_out


def options_of(source: str) -> tuple[str, str, float]:
    """A source without its options, the label that these name, and the share of bad rows that they
    allow."""
    place, _, options = source.partition("#")
    label, share = "", MAX_BAD_ROWS
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if option in LABELS:
            label = option
        elif name == "max_bad_rows" and re.fullmatch(r"0?\.\d+|[01](\.0*)?", value):
            share = float(value)
        else:
            raise StudyError(
                f"preferences {source}: #{option}: must be {', '.join(LABELS)} or "
                "max_bad_rows=<share from 0 to 1>"
            )
    return place, label, share


def read_preferences(source: str) -> tuple[Preferences, dict[str, list[PreferencePair]]]:
    """All pairs of a source by side, and in an empty set what was read and left out."""
    place, label, share = options_of(source)
    name, parts = find_parts(place)
    found, sides = Preferences([], [], name=name), {"train": [], "held_out": [], "": []}
    for part in parts:
        try:
            part.form = part.form or recognise([row for _, row in part.rows])
        except ValueError as error:
            raise StudyError(f"preferences {place}: {part.name}: {error}") from None
        if (part.form == PKU) != bool(label):
            told = "has two labels; say which" if part.form == PKU else "has no labels; leave out"
            raise StudyError(
                f"preferences {source}: {part.name}: {part.form} {told}: {place}#"
                + f" or {place}#".join(LABELS)
            )
        pairs, left_out = read_pairs(part, label)
        for side, pair in pairs:
            sides[side].append(pair)
        read = Preferences([], [], rows=len(pairs) + len(left_out))
        read.bad_rows = [f"{where}: {reason}" for where, reason in left_out if reason != TIE]
        read.reasons = Counter(reason for _, reason in left_out)
        read.ties = read.reasons.pop(TIE, 0)
        # File by file: the rows of another one must not hide that one is damaged.
        if read.bad_rows and (not pairs or len(read.bad_rows) > share * read.rows):
            mend = f"{',' if '#' in source else '#'}max_bad_rows=<share> to the source"
            mend = f"more than {share:.0%} stops the run: mend them, or append {mend}"
            mend = mend if pairs else "none is good: mend the file or leave it out"
            raise StudyError(f"preferences {source}: {part.name}: {read.counted()}; {mend}")
        found.files[part.prefix or part.name] = part.sha256
        found.rows += read.rows
        found.bad_rows += read.bad_rows
        found.reasons += read.reasons
        found.ties += read.ties
    found.form = ", ".join(dict.fromkeys(part.form for part in parts))
    found.form += f" ({label})" if label else ""
    return found, sides


# --- the split ------------------------------------------------------------------------------------


def load_preferences(
    source: str, n_train: int, n_held_out: int, chat: Chat, max_length: int, seed: int = 0
) -> Preferences:
    """Read, split and size a preference set, its groups (``source``) in turn.

    Files or splits whose names say so (``test``, ``validation``, …; or a column ``split``) are held
    out, and training pairs that share a first human turn with them are dropped. Where the names
    tell no two sides apart (such as HH-RLHF without its training half), all pairs are split by
    first human turn, so that no conversation is on both sides.

    Parameters
    ----------
    source
        ``shipped``, ``hub:`` (HH-RLHF), ``path:<file or directory>`` or
        ``hub:<dataset>[/<folder>]@<revision>[:<splits>]``; behind it may stand ``#safety`` or
        ``#helpfulness`` (PKU-SafeRLHF's labels) and ``max_bad_rows=<share>``, parted by commas.
    n_train, n_held_out
        Pairs wanted on each side, in an order drawn from ``seed``; fewer if there are not enough.
    max_length
        Pairs with a longer side (prompt + answer) are left out and counted.

    Raises
    ------
    StudyError
        A missing file, a line that is not JSON, columns of no known form, too many bad rows, a side
        without a pair.
    """
    result, sides = read_preferences(source)
    train, held_out = sides["train"] + sides[""], sides["held_out"]
    if train and held_out:
        openings = {pair.opening for pair in held_out}
        result.shared_openings = sum(pair.opening in openings for pair in train)
    else:
        if held_out:
            note("the preference data have no training files: their test pairs are split by prompt")
        train = held_out = train + held_out
        openings = _held_out_openings(held_out, n_held_out, seed)
    train = [pair for pair in train if pair.opening not in openings]
    held_out = [pair for pair in held_out if pair.opening in openings]
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
        groups = Counter(dict.fromkeys((pair.source for pair in pairs), 0))
        groups.update(pair.source for pair in chosen)
        if 2 * min(groups.values()) < max(groups.values()):
            shares = ", ".join(f"{group} {count}" for group, count in sorted(groups.items()))
            note(f"{side.replace('_', '-')} pairs are unlike in number by source: {shares}")
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
    path = checked(directory / PAIRS)
    require(path.is_file(), f"{path}: missing; run 05-inpo first")
    pairs = []
    for number, row in read_jsonl(path):
        try:
            winner, loser = (
                EncodedExample(tuple(row[side]["input_ids"]), row[side]["answer_start"])
                for side in ("winner", "loser")
            )
            both = tuple(row["reference"])
            pairs.append(Pair(row["round"], row["prompt_id"], winner, loser, both))
        except (KeyError, TypeError):
            raise StudyError(
                f"{path}:{number}: no pair that INPO wrote; run 05-inpo again"
            ) from None
    return pairs
