"""What every chapter opens with: its parameters, model, data and files, in one object.

Nothing is loaded before it is asked for, so a chapter that needs no model opens at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from IPython.display import Image

from . import StudyError, figures, render
from .artifacts import Build, Manifest, sha256_of, versions, write_table
from .chat import Chat
from .data.preferences import Preferences, load_preferences
from .decode import Generations
from .models import Base, ModelSet, load_base
from .params import NOTEBOOKS, notebook_parameters


@dataclass
class Study:
    """One chapter's run. Attributes beside the fields are made on first use.

    ``parameters``: the notebook's, by name. ``stage``: its name, such as ``01-sft``.
    """

    stage: str
    parameters: dict[str, Any]
    build: Build
    manifest: Manifest

    def _need(self, *names: str) -> list[Any]:
        missing = [name for name in names if name not in self.parameters]
        if missing:
            raise StudyError(f"{self.stage}: its parameters cell has no {missing[0]!r}")
        return [self.parameters[name] for name in names]

    def load_base(self) -> Base:
        """A backbone of its own, for training, which changes it in place."""
        return load_base(*self._need("model", "dtype"))

    @cached_property
    def base(self) -> Base:
        """The frozen backbone."""
        return self.load_base()

    @cached_property
    def chat(self) -> Chat:
        """The prompt format, over the model's tokenizer."""
        chat = Chat(self.base.tokenizer, *self._need("prompt_format"))
        if chat.name == "template":
            begin = chat.format.opening
            print(f"prompt format: the tokenizer's own template; conversations begin {begin!r}")
        return chat

    @property
    def pad(self) -> int:
        """The tokenizer's pad id."""
        return self.base.tokenizer.pad_token_id

    @cached_property
    def pairs(self) -> Preferences:
        """The preference pairs, split into ``train`` and ``held_out``."""
        source, n_train, n_held_out, longest, seed = self._need(
            "preferences", "n_train", "n_held_out", "max_length", "seed"
        )
        return load_preferences(source, n_train, n_held_out, self.chat, longest, seed)

    @cached_property
    def generations(self) -> Generations:
        """Answers and scores of models, kept by content."""
        return Generations(self.build.path("generations", "cache"), self.chat)

    def models(self, *names: str, base: Base | None = None) -> ModelSet:
        """``start`` and these trained models on one backbone (the chapter's own by default)."""
        adapters = {name: self.build.model(name) for name in names}
        return ModelSet(base or self.base, adapters)

    def write(self, table: str, rows: pd.DataFrame, part: str = "") -> pd.DataFrame:
        """Write this chapter's rows of a study table and return them as written."""
        return write_table(self.build, table, part or self.stage, rows)

    def show(self, figure, name: str, alt: str) -> Image:
        """Save a figure as ``figures/<name>.png`` and show it; ``alt`` says what is on it."""
        return render.show(figure, self.build.path("figures", f"{name}.png"), alt)

    def close(self, models: tuple[str, ...] = (), **facts: Any) -> None:
        """Write the manifest: which preference files and models were read, by hash (sha256, of
        models 16 digits), and ``facts`` about the run."""
        # Pairs that nothing asked for were not read.
        files = self.pairs.files if "pairs" in vars(self) else {}
        self.manifest.inputs = {f"preferences: {name}": files[name] for name in files}
        self.manifest.inputs |= {name: sha256_of(self.build.model(name), 16) for name in models}
        self.manifest.facts = facts
        self.manifest.write()


def open_study(stage: str, namespace: Mapping[str, Any]) -> Study:
    """Open a chapter: print what runs, seed torch, set the figures' style.

    Parameters
    ----------
    stage
        The notebook's name, such as ``01-sft``.
    namespace
        Its ``globals()``, from which its parameters are taken.
    """
    names = notebook_parameters(NOTEBOOKS / f"{stage}.ipynb")
    parameters = {name: namespace[name] for name in names}
    figures.use_style()
    torch.manual_seed(parameters["seed"])
    build = Build(parameters["profile"])
    print(f"{stage}, profile {parameters['profile']}, seed {parameters['seed']}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    return Study(stage, parameters, build, Manifest(build, stage, parameters))
