"""One prompt format for training and evaluation: conversations to token ids, the same everywhere.

``chatml`` is what SmolLM2-Instruct was trained on; we give no default system text, since its chat
template would slip in "You are a helpful AI assistant named SmolLM…". ``dialogue`` is HH-RLHF's
plain ``Human:`` / ``Assistant:`` text, for base models. Prompt and answer are tokenised apart and
joined, so a prompt's tokens never depend on the answer that follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from . import StudyError

Options = tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]
"""Token ids of a context and of the ways to go on from it."""


@dataclass(frozen=True)
class EncodedExample:
    """A prompt with one answer, as token ids. ``input_ids[answer_start:]`` is the answer with its
    end token."""

    input_ids: tuple[int, ...]
    answer_start: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.input_ids[: self.answer_start]

    @property
    def answer_ids(self) -> tuple[int, ...]:
        return self.input_ids[self.answer_start :]


@dataclass(frozen=True)
class Format:
    """How turns become text: each piece a template with ``{text}``."""

    system: str
    human: str
    assistant: str
    cue: str
    answer: str
    stop: tuple[str, ...]


FORMATS = {
    "chatml": Format(
        system="<|im_start|>system\n{text}<|im_end|>\n",
        human="<|im_start|>user\n{text}<|im_end|>\n",
        assistant="<|im_start|>assistant\n{text}<|im_end|>\n",
        cue="<|im_start|>assistant\n",
        answer="{text}",
        stop=("<|im_start|>",),
    ),
    "dialogue": Format(
        system="{text}",
        human="\n\nHuman: {text}",
        assistant="\n\nAssistant: {text}",
        cue="\n\nAssistant:",
        answer=" {text}",
        stop=("\n\nHuman:", "\n\nAssistant:"),
    ),
}


class Chat:
    """Turns conversations into token ids in one format.

    Parameters
    ----------
    tokenizer
        The model's own.
    name
        ``chatml`` or ``dialogue``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        if name not in FORMATS:
            raise StudyError(f"prompt_format: must be one of {', '.join(FORMATS)}, got {name!r}")
        if name == "chatml" and "<|im_start|>" not in tokenizer.get_vocab():
            needed = "a tokenizer with <|im_start|>; use dialogue for this model"
            raise StudyError(f"prompt_format: chatml needs {needed}")
        self.tokenizer = tokenizer
        self.name = name
        self.format = FORMATS[name]
        # What the tokenizer itself would put in front of a text (Llama's <s>; nothing for SmolLM2
        # and Pythia).
        self._opening = tuple(tokenizer("").input_ids)
        # GPT-2, Pythia, Qwen and SmolLM2 separate documents by one token, whatever their
        # conversations begin and end with.
        separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        self._separator = (separator,)

    def prompt_text(self, turns: Sequence[str], system: str | None = None) -> str:
        """``turns`` alternate human, assistant, …, human."""
        if len(turns) % 2 == 0:
            raise StudyError(f"a prompt must end in a human turn, got {len(turns)} turns")
        form = self.format
        text = form.system.format(text=system) if system else ""
        for index, turn in enumerate(turns):
            text += (form.assistant if index % 2 else form.human).format(text=turn)
        return text + form.cue

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt_ids(self, turns: Sequence[str], system: str | None = None) -> tuple[int, ...]:
        return self._opening + self._ids(self.prompt_text(turns, system))

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The answer's tokens with the end token that teaches the model to stop."""
        return self._ids(self.format.answer.format(text=answer)) + (self.tokenizer.eos_token_id,)

    def sequence(self, turns, answer: str, system: str | None = None) -> EncodedExample:
        """Prompt and answer as one sequence."""
        prompt = self.prompt_ids(turns, system)
        return EncodedExample(prompt + self.answer_ids(answer), len(prompt))

    def options(self, turns, answers: Iterable[str], system: str | None = None) -> Options:
        """A prompt's tokens, and those of each answer to weigh, without end tokens."""
        texts = [self.format.answer.format(text=answer) for answer in answers]
        return self.prompt_ids(turns, system), tuple(map(self._ids, texts))

    def plain_options(self, text: str, endings: Iterable[str], document: bool = False) -> Options:
        """The same for text outside any conversation: text and ending are tokenised together and
        cut where the text's own tokens end, as evaluation harnesses do. ``document``: behind the
        token that separates documents in pretraining, if the tokenizer itself puts none there."""
        context, wholes = self._ids(text), [self._ids(text + ending) for ending in endings]
        opening = self._opening or (self._separator if document else ())
        return opening + context, tuple(whole[len(context) :] for whole in wholes)

    def decode(self, ids) -> str:
        """A generated answer as text: cut at the end token or where the model starts another
        speaker's turn."""
        ids = list(ids)
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        text = self.tokenizer.decode(ids)
        for stop in self.format.stop:
            text = text.split(stop, 1)[0]
        return text.strip()
