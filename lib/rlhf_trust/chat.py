"""One prompt format for training and evaluation: conversations to token ids, the same everywhere.

``chatml`` is what SmolLM2-Instruct was trained on; we give no default system text, since its chat
template would slip in "You are a helpful AI assistant named SmolLM…". ``dialogue`` is HH-RLHF's
plain ``Human:`` / ``Assistant:`` text, for base models. ``template`` is the tokenizer's own chat
template, with whatever it says of itself; ``auto`` is that where there is one, else ``dialogue``.

Prompt and answer are tokenised apart and joined, so a prompt's tokens never depend on the answer
that follows. A special token's name inside a text is text: it never becomes the token.

:func:`preference_row` is for other people's data, in the format of their own model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from . import StudyError, require
from .artifacts import content_key

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


def preference_row(
    row: Mapping,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str] = ("chosen", "rejected"),
) -> tuple[EncodedExample, ...]:
    """A row of a preference data set in TRL's format, each of its ``answers`` with the prompt:
    token for token what TRL's ``DPOTrainer`` makes of it.

    ``prompt`` and answers are texts (the end token follows the answer) or lists of messages with
    role and content, of which the tokenizer's chat template makes a text. The prompt ends where the
    tokens of prompt and answer leave those of the prompt alone.

    Raises ``ValueError`` with the reason if it is no such row.
    """
    fields = ("prompt", *answers)
    if not isinstance(row, Mapping):
        raise ValueError("is not a mapping with " + ", ".join(fields))
    missing = [name for name in fields if name not in row]
    if missing:
        raise ValueError(f"has no {missing[0]!r}")
    parts = [row[name] for name in fields]
    listed = all(map(_are_messages, parts))
    if not listed and not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{', '.join(fields)} are not all texts, or all lists of messages")
    if listed and not tokenizer.chat_template:
        raise ValueError("holds messages, and the tokenizer has no chat template")

    def ids(part, **options) -> list[int]:
        if not listed:
            return tokenizer(part).input_ids
        how = {"tokenize": True, "return_dict": True} | options
        return tokenizer.apply_chat_template(part, **how)["input_ids"]

    prompt, *ends = parts
    if not listed:
        stop = tokenizer.eos_token
        ends = [end if end.endswith(stop) else end + stop for end in ends]
    texts, alone = [ids(prompt + end) for end in ends], ids(prompt, add_generation_prompt=True)
    start = min(len(commonprefix([alone, text])) for text in texts)
    if not start:
        raise ValueError("has an empty prompt")
    if min(map(len, texts)) == start:
        raise ValueError("has an empty answer")
    return tuple(EncodedExample(tuple(text), start) for text in texts)


def _are_messages(part) -> bool:
    return (
        isinstance(part, list)
        and bool(part)
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in part)
    )


@dataclass(frozen=True)
class Format:
    """How turns become text: each piece a template with ``{text}``."""

    system: str
    human: str
    assistant: str
    cue: str
    answer: str
    stop: tuple[str, ...]

    def prompt(self, turns: Sequence[str], system: str | None = None) -> str:
        text = self.system.format(text=system) if system else ""
        for index, turn in enumerate(turns):
            text += (self.assistant if index % 2 else self.human).format(text=turn)
        return text + self.cue


def messages(turns: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """``turns``, which alternate user, assistant, …, as chat templates take them."""
    said = [{"role": "system", "content": system}] if system else []
    for index, turn in enumerate(turns):
        said.append({"role": "assistant" if index % 2 else "user", "content": turn})
    return said


class Template:
    """A tokenizer's own chat template, asked how it begins and ends an answer.

    ``answer``, ``stop`` as in :class:`Format`; ``end``: the id of the token that ends an answer;
    ``opening``: what it puts in front of every conversation without a system text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise StudyError("prompt_format: the tokenizer has no chat template; use dialogue")
        question, answer = "What is that?", "That is it."
        prompt = self.prompt([question])
        whole = self._rendered([question, answer], cue=False)
        if not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
            raise StudyError(
                "prompt_format: the chat template writes a prompt in one way and its beginning in "
                "a finished conversation in another; use chatml or dialogue"
            )
        before, _, after = whole[len(prompt) :].partition(answer)
        ids = tokenizer(after, add_special_tokens=False).input_ids
        if not ids or ids[0] not in special_ids(tokenizer):
            raise StudyError(
                "prompt_format: the chat template ends answers by no special token, so nothing "
                "says where they end; use chatml or dialogue"
            )
        self.answer, self.end = before.replace("{", "{{").replace("}", "}}") + "{text}", ids[0]
        self.stop = tuple(map(tokenizer.convert_ids_to_tokens, special_ids(tokenizer)))
        self.opening = prompt.partition(question)[0]

    def _rendered(self, turns: Sequence[str], system: str | None = None, cue: bool = True) -> str:
        said = messages(turns, system)
        return self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=cue)

    def prompt(self, turns: Sequence[str], system: str | None = None) -> str:
        """A template without a place for a system text has it before the first turn."""
        try:
            text = self._rendered(turns, system)
        except TemplateError as error:
            if not system:
                raise StudyError(f"prompt_format: the chat template fails: {error}") from None
            text = ""
        if system and system.strip() not in text:
            text = self._rendered([f"{system}\n\n{turns[0]}", *turns[1:]])
        return text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that are marked as special, in use or reserved."""
    added = tokenizer.added_tokens_decoder.items()
    return sorted({*tokenizer.all_special_ids, *(id for id, token in added if token.special)})


def choose_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is not its end token, if it has none.

    With one token for both, code that finds the end of a text by its padding (reward heads do)
    reads one token too early. Any other token serves, since attention masks hide it: a reserved one
    by preference, else a word that no text spells as the vocabulary does (GPT-2 has no other)."""
    end, vocabulary = tokenizer.eos_token, tokenizer.get_vocab()
    if tokenizer.pad_token not in (None, end):
        return
    reserved = ["<|padding|>", "<pad>", "<|pad|>", tokenizer.unk_token, "<unk>", "<|endoftext|>"]
    others = tokenizer.convert_ids_to_tokens(special_ids(tokenizer))
    reserved += [token for token in others if token != tokenizer.bos_token]
    # Byte-level and sentencepiece vocabularies write a blank as one of these.
    reserved += [token for token in sorted(vocabulary) if len(token) > 1 and token[0] in "Ġ▁"]
    free = [token for token in reserved if token in vocabulary and token != end]
    require(free, "the tokenizer can pad only with its end token; add a pad token to it")
    tokenizer.pad_token = free[0]


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


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts in front of a text by itself (not what some put behind it)."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    places = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return tuple(whole[: next(places, 0)])


class Chat:
    """Turns conversations into token ids in one format.

    Parameters
    ----------
    tokenizer
        The model's own.
    name
        ``chatml``, ``dialogue``, ``template`` or ``auto``. With a template the tokenizer's end
        token becomes the one that ends an answer in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str):
        if name == "auto":
            name = "template" if tokenizer.chat_template else "dialogue"
        known = (*FORMATS, "template", "auto")
        require(name in known, f"prompt_format: must be one of {', '.join(known)}, got {name!r}")
        if name == "chatml" and "<|im_start|>" not in tokenizer.get_vocab():
            needed = "a tokenizer with <|im_start|>; use dialogue for this model"
            raise StudyError(f"prompt_format: chatml needs {needed}")
        self.tokenizer = tokenizer
        self.name = name
        # What the tokenizer itself would put in front of a text (Llama's <s>; nothing for SmolLM2
        # and Pythia).
        self._text_opening = opening_ids(tokenizer)
        if name == "template":
            self.format = Template(tokenizer)
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(self.format.end)
            choose_pad(tokenizer)
            self._opening = ()  # the template writes it
        else:
            self.format, self._opening = FORMATS[name], self._text_opening
        names = map(tokenizer.convert_ids_to_tokens, special_ids(tokenizer))
        either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        self._special = re.compile(either or "(?!)")
        # GPT-2, Pythia, Qwen and SmolLM2 separate documents by one token, whatever their
        # conversations begin and end with.
        separator = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
        self._separator = (separator,)

    @cached_property
    def key(self) -> str:
        """Stands for the format and the tokenizer in the key of what a model said in it."""
        tokenizer, own = self.tokenizer, self.name == "template"
        kind = getattr(tokenizer, "backend_tokenizer", None)
        backend = json.loads(kind.to_str()) if kind else sorted(tokenizer.get_vocab().items())
        if kind:  # what the last call asked for
            del backend["truncation"], backend["padding"]
        special = tokenizer.eos_token_id, tokenizer.pad_token_id, self._text_opening
        template = tokenizer.chat_template if own else ""
        return content_key(self.name, template, special, backend)

    def prompt_text(self, turns: Sequence[str], system: str | None = None) -> str:
        """``turns`` alternate human, assistant, …, human."""
        require(len(turns) % 2, f"a prompt must end in a human turn, got {len(turns)} turns")
        return self.format.prompt([*map(self._plain, turns)], system and self._plain(system))

    def _plain(self, text: str) -> str:
        """A special token's name gets a break without width behind its first character."""
        return self._special.sub(lambda name: name[0][0] + "\u200b" + name[0][1:], text)

    def _answer(self, text: str) -> str:
        return self.format.answer.format(text=self._plain(text))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def prompt_ids(self, turns: Sequence[str], system: str | None = None) -> tuple[int, ...]:
        return self._opening + self._ids(self.prompt_text(turns, system))

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """The answer's tokens with the end token that teaches the model to stop."""
        return self._ids(self._answer(answer)) + (self.tokenizer.eos_token_id,)

    def sequence(self, turns, answer: str, system: str | None = None) -> EncodedExample:
        """Prompt and answer as one sequence."""
        prompt = self.prompt_ids(turns, system)
        return EncodedExample(prompt + self.answer_ids(answer), len(prompt))

    def options(self, turns, answers: Iterable[str], system: str | None = None) -> Options:
        """A prompt's tokens, and those of each answer to weigh, without end tokens."""
        texts = map(self._answer, answers)
        return self.prompt_ids(turns, system), tuple(map(self._ids, texts))

    def plain_options(self, text: str, endings: Iterable[str], document: bool = False) -> Options:
        """The same for text outside any conversation: text and ending are tokenised together and
        cut where the text's own tokens end, as evaluation harnesses do. ``document``: behind the
        token that separates documents in pretraining, if the tokenizer itself puts none there."""
        text = self._plain(text)
        context, wholes = self._ids(text), [self._ids(text + self._plain(e)) for e in endings]
        opening = self._text_opening or (self._separator if document else ())
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
