"""More RLHF, More Trust? - the helper library behind the study's notebooks.

The notebooks carry the argument; this package carries the machinery. Import what a notebook needs
from the modules themselves (``from rlhf_trust.decode import sample``).
"""

import functools
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

# Read by huggingface_hub when it is imported, hence set before any other module of this package
# runs.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
# transformers warns of its own deprecated names when TRL uses them; nothing a reader of a notebook
# can act on.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parents[2]
"""The checkout: the folder that holds ``notebooks``, ``params`` and ``lib``."""


UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
    # Joiners, where neither letters that they shape nor parts of an emoji are on both sides.
    "|(?<![\u0590-\u1fff\u2190-\U0001ffff])[\u200c\u200d]|[\u200c\u200d](?![\u0590-\u1fff\u2190-\U0001ffff])"
)
"""What acts on a terminal or a page without being seen there: control characters, changes of
direction, characters of no width, halves of surrogate pairs."""


def visible(text: str) -> str:
    """Text with a mark in place of each character of ``UNSEEN``: ␛, ␀, or ``[U+202E]``."""

    def mark(found: re.Match) -> str:
        code = ord(found[0])
        return chr(0x2400 + code) if code < 32 else "␡" if code == 127 else f"[U+{code:04X}]"

    return UNSEEN.sub(mark, text.replace("\r\n", "\n"))


class StudyError(ValueError):
    """Something the user can mend: the message is one line that names the file, key or row and what
    to do. Of data that it cites nothing acts on the terminal."""

    def __init__(self, message: object = ""):
        super().__init__(printable(message))


def require(fine: object, problem: str) -> None:
    """Raise a :class:`StudyError` with this ``problem`` unless ``fine``."""
    if not fine:
        raise StudyError(problem)


def printable(error: object) -> str:
    """A message as one line in which nothing acts on the terminal."""
    return visible(str(error)).replace("\n", "␊")


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """An entry point whose faults of input, disk and keyboard end in one line, ``error: …``.

    Exit codes: 2 for a :class:`StudyError` or a file that cannot be read or written, 130 after
    Ctrl-C.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # such as in a Latin-1 terminal
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            said, code = "interrupted", 130
        except (StudyError, OSError) as error:
            said, code = error, 2
            if isinstance(error, OSError) and error.strerror:
                place = f"{error.filename2 or error.filename or 'standard output'}"
                said = f"{place}: {error.strerror}"
        print(f"error: {printable(said)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, which Python would meet again, and say so, when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code

    return run


def _no_traceback(kind, value, trace) -> None:
    """Ctrl-C while libraries are imported, before :func:`command` is there to see it."""
    if kind is KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, value, trace)


if sys.argv[:1] == ["-m"]:  # python -m rlhf_trust.…, which has not found its module yet
    sys.excepthook = _no_traceback


def check_name(name: str, what: str = "a profile or run", where: str = "") -> None:
    """Refuse what is no name; ``where``: what the error begins with."""
    problem = f"{where}{name!r} is no name of {what}; use letters, digits, '_', '.' and '-'"
    require(re.fullmatch(r"\w[\w.-]*", name), problem)


def build_root(profile: str) -> Path:
    """Where a profile's products lie; ``RLHF_TRUST_BUILD`` puts them elsewhere (a second run beside
    the first). Raises :class:`StudyError` for what is no name but leads to another folder."""
    check_name(profile)
    elsewhere = os.environ.get("RLHF_TRUST_BUILD")
    return Path(elsewhere).resolve() if elsewhere else ROOT / "build" / profile
