"""What every chapter opens with: its parameters, model, data and files, in one object.

Nothing is loaded before it is asked for, so a chapter that needs no model opens at once.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Image
from transformers import AutoConfig

from . import StudyError, distributed, figures, models, render, require
from .artifacts import NOTES, Build, Manifest, note, sha256_of, versions, write_table
from .chat import Chat
from .data.preferences import Preferences, load_preferences
from .decode import Generations
from .models import Base, Loader, ModelSet, load_tokenizer
from .params import NOTEBOOKS, notebook_parameters, shown_source, whole_paths
from .sources import NO_CODE, is_adapter, model_directory, read_json


@dataclass
class Study:
    """One chapter's run. Attributes beside the fields are made on first use.

    ``parameters``: the notebook's, by name. ``stage``: its name, such as ``01-sft``.
    """

    stage: str
    parameters: dict[str, Any]
    build: Build
    manifest: Manifest
    _compared: ModelSet | None = None
    _read: dict[str, str] = field(default_factory=dict)

    def _need(self, *names: str) -> list[Any]:
        for name in names:
            require(name in self.parameters, f"{self.stage}: its parameters cell has no {name!r}")
        return [self.parameters[name] for name in names]

    def load_base(self) -> Base:
        """A backbone of its own, for training, which changes it in place."""
        return models.load_base(*self._need("model", "dtype"))

    @cached_property
    def base(self) -> Base:
        """The frozen backbone."""
        return self.load_base()

    @cached_property
    def chat(self) -> Chat:
        """The prompt format, over the model's tokenizer."""
        source, prompt_format = self._need("model", "prompt_format")
        # Without a hold on the weights, a line-up of large models can let go of them.
        compared = self.parameters.get("trained", [])
        brought = "base" not in vars(self) and any("=" in entry for entry in compared)
        tokenizer = load_tokenizer(model_directory(source)) if brought else self.base.tokenizer
        chat = Chat(tokenizer, prompt_format)
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
        """The preference pairs, split into ``train`` and ``held_out``; those that are longer than
        the model's context are left out."""
        return self.pairs_from(*self._need("preferences", "n_train"))

    def pairs_from(self, source: str, n_train: int = 10**9) -> Preferences:
        """The same of any source, with as many training pairs (by default all)."""
        n_held_out, max_length, seed = self._need("n_held_out", "max_length", "seed")
        sizes = n_train, n_held_out, self.chat, min(max_length, self._context()), seed
        found = load_preferences(source, *sizes)
        of = "" if source == self.parameters["preferences"] else f" {shown_source(source)}"
        self._read |= {f"preferences{of}: {name}": found.files[name] for name in found.files}
        return found

    def _context(self) -> float:
        """The model's, in tokens, if there is a model; a note where ``max_length`` is beyond it."""
        source, max_length = self.parameters.get("model"), self.parameters["max_length"]
        if source is None:
            return inf
        config = AutoConfig.from_pretrained(model_directory(source), **NO_CODE)
        context = getattr(config, "max_position_embeddings", None) or inf
        if context < max_length:
            note(f"max_length {max_length}: {context} is used, the model's context")
        return context

    @cached_property
    def generations(self) -> Generations:
        """Answers and scores of models, kept by content."""
        return Generations(self.build.path("generations", "cache"), self.chat)

    def models(self, *entries: str, base: Base | None = None) -> ModelSet:
        """``start`` and others.

        Each is the name of an adapter under ``models/``, or ``name=path:<directory>`` or
        ``name=hub:<id>@<revision>``: a checkpoint, or an adapter on ``start``'s backbone
        (``base``: another object of it than the chapter's own).
        """
        members: dict[str, Path | Loader] = {}
        for entry in entries:
            name, _, source = entry.partition("=")
            require(name not in members, f"trained: two models are called {name!r}")
            members[name] = self._member(name, source) if source else self.build.model(name)
        whole = any(not isinstance(member, Path) for member in members.values())
        # One that can be loaded again can be let go of.
        again = whole and base is None and "base" not in vars(self)
        start = self.load_base if again else base or self.base
        self._compared = ModelSet(start, members, *self._need("prompt_format"))
        return self._compared

    def _member(self, name: str, source: str) -> Path | Loader:
        """An adapter's folder, or how to load a checkpoint."""
        backbone, dtype = self._need("model", "dtype")
        try:
            directory = model_directory(source)
        except StudyError as error:
            raise StudyError(f"trained: {name}: {error}") from None
        if not is_adapter(directory):
            return partial(models.load_base, source, dtype)
        config = read_json(directory / "adapter_config.json")
        print(
            f"{name}: an adapter, made on {config.get('base_model_name_or_path')!r} by its own "
            f"account; here it acts on {backbone}"
        )
        if not models.more_than_lora(config):
            return directory
        return partial(models.load_merged, backbone, directory, dtype)

    def train(
        self, function: Callable, *arguments: Any, base: Base | None = None, **more: Any
    ) -> Any:
        """A training, ``function(base, chat, *arguments, **more)``: here, on ``base`` or else a
        backbone of its own, or in as many processes as ``processes`` says (:mod:`.distributed`)."""
        (processes,) = self._need("processes")
        if processes == 1:
            return function(base or self.load_base(), self.chat, *arguments, **more)
        how = {"processes": processes, "options": self.parameters.get("accelerate", [])}
        return distributed.launched(function, self.base, self.chat, *arguments, **how, **more)

    def write(self, table: str, rows: pd.DataFrame, part: str = "") -> pd.DataFrame:
        """Write this chapter's rows of a study table and return them as written."""
        return write_table(self.build, table, part or self.stage, rows)

    def show(self, figure, name: str, alt: str) -> Image:
        """Save a figure in ``figures/`` and show it, as :func:`render.show` does."""
        return render.show(figure, self.build.path("figures", f"{name}.png"), alt)

    def close(self, read: Sequence[str] = (), **facts: Any) -> None:
        """Write the manifest: which preference files and models (``read``, entries as in
        :meth:`models`) were read, by hash (sha256, of models 16 digits), and whatever else was, how
        checkpoints were asked, and ``facts`` about the run."""
        self.manifest.inputs = dict(self._read)
        for entry in read:
            name, brought, _ = entry.partition("=")
            hashed = brought and self._compared.fingerprints[name]
            self.manifest.inputs[name] = hashed or sha256_of(self.build.model(name), 16)
        if any("=" in entry for entry in read):
            self.manifest.inputs["start"] = self._compared.fingerprints["start"]
            facts["dtype"] = str(models.parse_dtype(*self._need("dtype")))
            facts["prompt_formats"] = {"start": self.chat.name} | self._compared.formats
        self.manifest.facts = facts
        self.manifest.write()


def open_study(stage: str, namespace: MutableMapping[str, Any]) -> Study:
    """Open a chapter: check its parameters, print what runs, seed torch, set the figures' style.

    Parameters
    ----------
    stage
        The notebook's name, such as ``01-sft``.
    namespace
        Its ``globals()``, from which its parameters are taken, and to which they are given back as
        the launcher would give them (``path:`` from the repository's root on).

    Raises :class:`StudyError` for a value that a parameter does not allow.
    """
    declared = notebook_parameters(NOTEBOOKS / f"{stage}.ipynb")
    parameters = {
        name: whole_paths(parameter.check(namespace[name], f"{stage}, parameters cell"))
        for name, parameter in declared.items()
    }
    namespace.update(parameters)
    figures.use_style()
    torch.manual_seed(parameters["seed"])
    build = Build(parameters["profile"])
    NOTES.clear()
    print(f"{stage}, profile {parameters['profile']}, seed {parameters['seed']}")
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    return Study(stage, parameters, build, Manifest(build, stage, parameters))
