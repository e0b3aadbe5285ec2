"""Real people's names and e-mail addresses masked in a text that is shown, however written.

A text is compared as it looks: in lower case, without accents and what cannot be seen, characters
of other alphabets as the Latin letters that they are taken for. All is done in one pass, in time
proportional to the text's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

ALIKE = str.maketrans(
    "АВЕЅІЈКМНОРСТУХЗаеѕіјкмнорстухвһӏԁԛԝѵгΑΒΕΖΗΙΚΜΝΟΡΤΥΧαβεηικνορτυχγω"
    "ᴀʙᴄᴅᴇɢʜɪᴊᴋʟᴍɴᴏᴘʀᴛᴜᴠᴡʏᴢօսոհցıɑɡłøđħŧŁØĐĦŦ‘’‛ʼ′´`＇‐‑‒–—―−。",
    "ABESIJKMHOPCTYX3aesijkmhopctyxbhldqwvrABEZHIKMNOPTYXabenikvoptuxyw"
    "abcdeghijklmnoprtuvwyzounhgiaglodhtLODHT''''''''-------.",
)
"""Cyrillic, Greek, small-capital, Armenian and other letters, quotation marks and dashes."""

UNSEEN = "\u115f\u1160\u2800\u3164\uffa0"
"""Fillers and blanks that count as letters or symbols."""


class _Shapes(dict):
    """Character → what it looks like: none, one or several characters in lower case."""

    def __missing__(self, character: str) -> str:
        shape = unicodedata.normalize("NFKD", character.translate(ALIKE)).translate(ALIKE)
        seen = [c for c in shape if unicodedata.category(c)[0] not in "MC" or c.isspace()]
        self[character] = "".join(c for c in seen if c not in UNSEEN).casefold()
        return self[character]


SHAPES = _Shapes()
WORD = re.compile(r"[^\W\d_]+")
GAP = re.compile(r"[\s_.,'+-]*")
"""What may stand between the parts of a name."""

# All repetitions are possessive and begin where a word does: no text is read twice.
DOT = r"(?:\s*+[\[({<]\s*+(?:dot|\.)\s*+[\])}>]\s*+|\s++dot\s++)"
AT = r"(?:@|%40|&#64;|[\[({<](?:at|@)[\])}>])"
SPACED_AT = r"(?:\s*+[\[({<]\s*+(?:at|@)\s*+[\])}>]\s*+|\s*+@\s*+)"
HOST = rf"[\w-]++(?:(?:\.|{DOT})[\w-]++){{1,9}}+"
EMAIL = re.compile(
    rf"(?<![\w.+-])[\w.+-]++(?:'[\w.+-]++){{0,2}}+(?:{DOT}[\w+-]++){{0,6}}+(?:"
    rf"{AT}(?P<host>{HOST})|{SPACED_AT}(?P<named>{HOST})(?<=[^\W\d_][^\W\d_])"  # no price
    # A name of a machine alone; not what hides a letter of a swear word.
    rf"|(?<=\w\w){AT}(?P<machine>(?=[^\W\d_])[\w-]{{3,}}+(?![@.]\w))"
    rf"|\s++at\s++(?!(?:the|an?|this|that)\s)"
    rf"(?P<spelled>[\w-]++(?:\.[\w-]++){{0,4}}+(?:{DOT}[\w-]++){{1,5}}+))"
)
SAFE_HOST = re.compile(r"example\.(?:com|org|net)")
LONGEST = 20_000
"""Characters of a text to mask where only its beginning is shown."""


def _word_shapes(text: str) -> list[str]:
    return WORD.findall("".join(map(SHAPES.__getitem__, text)))


class Masker:
    """Replaces real people's names and e-mail addresses by ``[name]`` and ``[e-mail]``.

    Parameters
    ----------
    names
        Full names, masked in this order and with the last part first, whatever white space or marks
        stand between the parts, if any; each part of at least three letters is masked too, since a
        model may use it alone.

    E-mail addresses are masked in any case, with "at" and "dot" in words too, except made-up ones
    at example.com.
    """

    def __init__(self, names: Iterable[str] = ()):
        self._names: dict[str, int] = {}  # letters of a name or part of one → its words
        for name in set(names):
            parts = name.split()
            long = [[part] for part in parts if len("".join(_word_shapes(part))) >= 3]
            for some in (parts, parts[::-1], *long):
                words = _word_shapes(" ".join(some))
                self._names["".join(words)] = len(words)
        self._names.pop("", None)
        self._begun = {name[:end] for name in self._names for end in range(1, len(name) + 1)}

    def __call__(self, text: str) -> str:
        shapes = list(map(SHAPES.__getitem__, text))
        # Position in the shape → in the text; what cannot be seen belongs to what it follows.
        places = [i for i, shape in enumerate(shapes) for _ in shape] + [len(text)]
        shape = "".join(shapes)
        found = [
            (m.start(), m.end(), "[e-mail]")
            for m in EMAIL.finditer(shape)
            if not SAFE_HOST.fullmatch(re.sub(DOT, ".", m[m.lastgroup]))
        ]
        masked, done = [], 0
        found += self._found_names(shape)
        for start, end, label in sorted(found, key=lambda span: (span[0], -span[1])):
            if places[start] >= done:
                masked += [text[done : places[start]], label]
            done = max(done, places[end])
        return "".join(masked) + text[done:]

    def _found_names(self, shape: str) -> list[tuple[int, int, str]]:
        # Digits that are taken for letters.
        shape = re.sub(r"(?<=[^\W\d_])[01](?=[^\W\d_])", lambda m: "ol"[int(m[0])], shape)
        words, found, first = list(WORD.finditer(shape)), [], 0
        while first < len(words):
            letters, last, before = "", 0, 0
            for number in range(1, len(words) - first + 1):
                word = words[first + number - 1]
                letters += word[0]
                if letters not in self._begun:
                    break
                if number > 1 and not GAP.fullmatch(shape, before, word.start()):
                    break
                before = word.end()
                parts = self._names.get(letters, 0)
                # Not beyond its own parts, but for one that is spelled; and Don, but not the
                # beginning of don't.
                whole = number <= parts or parts and number == len(letters)
                if whole and not re.match(r"'t(?!\w)", shape[word.end() : word.end() + 3]):
                    last = number
            if last:
                found.append((words[first].start(), words[first + last - 1].end(), "[name]"))
            first += max(last, 1)
        return found
