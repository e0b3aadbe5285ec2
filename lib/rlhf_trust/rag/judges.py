"""Does a statement follow from a text? Judges for Trust-Score.

The metric's authors ask TRUE, an 11-billion-weight model (``hub:google/t5_xxl_true_nli_mixture``). On a laptop
:class:`LexicalJudge` stands in, which knows words and no meaning; how far it agrees with people is measured on labelled pairs
(:func:`agreement`), and figures by different judges belong in different tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from .. import StudyError
from ..artifacts import progress
from ..decode import batches_by_length
from ..models import auto_dtype, device
from ..sources import model_directory
from ..stats import mean_interval
from .questions import Entailment

NEGATIONS = frozenset("no not never none nor neither without cannot nobody nothing".split())


@dataclass(frozen=True)
class LexicalJudge:
    """Entailed if enough of the statement's content words stand in the text, all of its numbers do, and neither has a
    negation that the other lacks (in the text: in the sentences that share words with the statement).

    ``threshold``: share of content words needed, endings cut off. A proxy: it cannot see who did what to whom.
    """

    threshold: float = 0.7
    name: str = "lexical"

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [self._entailed(premise, hypothesis) for premise, hypothesis in pairs]

    def _entailed(self, premise: str, hypothesis: str) -> bool:
        wanted, numbers, negated = _read(hypothesis)
        if not wanted and not numbers:
            return False
        held, held_numbers, _ = _read(premise)
        if not numbers <= held_numbers or len(wanted & held) < self.threshold * len(wanted):
            return False
        near = [
            part
            for part in map(_read, re.split(r"(?<=[.!?])\s+", premise))
            if 2 * len(wanted & part[0]) >= len(wanted)
        ]
        return not near or any(part[2] == negated for part in near)


def _read(text: str) -> tuple[set[str], set[str], bool]:
    """Stems of content words, numbers, and whether something is denied."""
    text = text.lower().replace("n't", " not")
    words = re.findall(r"[^\W\d_]+", text)
    numbers = {number.replace(",", "") for number in re.findall(r"\d+(?:[.,]\d+)*", text)}
    content = {
        _stem(word) for word in words if word not in ENGLISH_STOP_WORDS and word not in NEGATIONS
    }
    return content, numbers, not NEGATIONS.isdisjoint(words)


def _stem(word: str) -> str:
    """Without the commonest endings, so that *opened* meets *opening*."""
    for ending in (
        "ations",
        "ation",
        "ings",
        "ing",
        "ers",
        "ies",
        "ed",
        "er",
        "es",
        "ly",
        "s",
        "e",
        "y",
    ):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class ModelJudge:
    """An entailment model: a sequence-to-sequence one that answers 1 (as TRUE does), or a classifier with a label for
    entailment.

    ``source``: ``hub:<id>@<revision>`` or ``path:<directory>``.
    """

    def __init__(self, source: str, rows: int = 8, most_tokens: int = 1024):
        folder = model_directory(source)
        config = AutoConfig.from_pretrained(folder)
        self.name, self.rows = source, rows
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.generates = not any(
            name.endswith("ForSequenceClassification") for name in config.architectures or ()
        )
        if self.generates and not config.is_encoder_decoder:
            raise StudyError(
                f"judge {source}: is neither a classifier nor a sequence-to-sequence model"
            )
        if self.generates:
            self.model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=auto_dtype())
            self.yes = self.tokenizer("1", add_special_tokens=False).input_ids[0]
        else:
            labels = {label.lower(): index for index, label in config.id2label.items()}
            named = [index for label, index in labels.items() if label.startswith("entail")]
            if len(named) != 1:
                raise StudyError(
                    f"judge {source}: its labels are {sorted(labels)}; needs one for entailment"
                )
            self.yes = named[0]
            self.model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=auto_dtype()
            )
        self.model = self.model.eval().to(device())
        room = (
            getattr(config, "max_position_embeddings", None) or most_tokens
        )  # T5's positions are relative
        self.most_tokens = min(
            most_tokens, room - 2, self.tokenizer.model_max_length
        )  # RoBERTa keeps two for itself

    def _joined(self, premises: list[str], hypotheses: list[str]):
        """One text each: premise, cut where it must be, and hypothesis."""
        of_premise, of_hypothesis = (
            self.tokenizer(texts, add_special_tokens=False).input_ids
            for texts in (premises, hypotheses)
        )
        end = [self.tokenizer.eos_token_id]
        rows = [
            p[: max(0, self.most_tokens - len(h) - 1)] + h + end
            for p, h in zip(of_premise, of_hypothesis)
        ]
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        found = [False] * len(pairs)
        for batch in progress(
            batches_by_length([len(p) + len(h) for p, h in pairs], self.rows),
            desc="entailment",
            unit="batch",
        ):
            some = [pairs[i] for i in batch]
            # Of what is too long for the model the premise loses its end; the hypothesis stays whole.
            texts = (
                ([f"premise: {p}" for p, _ in some], [f" hypothesis: {h}" for _, h in some])
                if self.generates
                else tuple(map(list, zip(*some)))
            )
            inputs = (
                self._joined(*texts)
                if self.generates
                else self.tokenizer(
                    *texts,
                    return_tensors="pt",
                    padding=True,
                    truncation="only_first",
                    max_length=self.most_tokens,
                )
            ).to(self.model.device)
            if self.generates:
                start = torch.full(
                    (len(batch), 1),
                    self.model.config.decoder_start_token_id,
                    device=self.model.device,
                )
                said = self.model(**inputs, decoder_input_ids=start).logits[:, 0].argmax(-1)
            else:
                said = self.model(**inputs).logits.argmax(-1)
            for index, answer in zip(batch, said.tolist()):
                found[index] = answer == self.yes
        return found


def judge_named(source: str):
    """The judge of a run: ``lexical``, ``hub:<id>@<revision>`` or ``path:<directory>``."""
    return LexicalJudge() if source == "lexical" else ModelJudge(source)


def agreement(judge, pairs: Sequence[Entailment], name: str = "") -> pd.DataFrame:
    """How often a judge says what people said, of all pairs and of those that follow and those that do not apart: columns pairs,
    value, ci_low, ci_high, n; intervals over groups."""
    labels, groups = np.array([p.entailed for p in pairs]), np.array([p.group for p in pairs])
    right = (np.asarray(judge([(p.premise, p.hypothesis) for p in pairs])) == labels).astype(float)
    rows = []
    for kind, chosen in (("all", labels | True), ("it follows", labels), ("it does not", ~labels)):
        found = mean_interval(right[chosen], f"judge/{name}/{kind}", groups[chosen], (0.0, 1.0))
        rows.append((kind, found.value, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["pairs", "value", "ci_low", "ci_high", "n"])
