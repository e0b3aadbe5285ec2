"""More RLHF, More Trust? - the helper library behind the study's notebooks.

The notebooks carry the argument; this package carries the machinery. Import what a notebook needs
from the modules themselves (``from rlhf_trust.decode import sample``).
"""

import os
import re
import warnings
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


class StudyError(ValueError):
    """Something the user can mend: the message is one line that names the file, key or row and what
    to do."""


def require(fine: object, problem: str) -> None:
    """Raise a :class:`StudyError` with this ``problem`` unless ``fine``."""
    if not fine:
        raise StudyError(problem)


def check_name(profile: str) -> None:
    """Refuse what is no name of a profile or run."""
    if not re.fullmatch(r"\w[\w.-]*", profile):
        raise StudyError(
            f"{profile!r} is no name of a profile or run; use letters, digits, '_', '.' and '-'"
        )


def build_root(profile: str) -> Path:
    """Where a profile's products lie; ``RLHF_TRUST_BUILD`` puts them elsewhere (a second run beside
    the first). Raises :class:`StudyError` for what is no name but leads to another folder."""
    check_name(profile)
    elsewhere = os.environ.get("RLHF_TRUST_BUILD")
    return Path(elsewhere).resolve() if elsewhere else ROOT / "build" / profile
