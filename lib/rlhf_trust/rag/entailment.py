"""Does a statement follow from a text? Entailment models for Trust-Score, and labelled pairs to
test them on.

The metric's authors use TRUE, a model of 11 billion weights
(``hub:google/t5_xxl_true_nli_mixture``). The default here, :class:`LexicalEntailment`, compares
words and knows no meaning. :func:`agreement` measures how often a model agrees with people. Scores
by different entailment models are not comparable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple

import pandas as pd
import torch
import transformers
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from .. import StudyError, require
from ..artifacts import progress
from ..decode import batches_by_length
from ..models import auto_dtype, device
from ..sources import NO_CODE, locate, model_directory, read_jsonl
from ..stats import mean_interval
from .trust_score import EntailmentModel, Question, entailed

NEGATIONS = frozenset("no not never none nor neither without cannot nobody nothing".split())
ENDINGS = "ations ation ings ing ers ies ed er es ly s e y".split()


class LexicalEntailment:
    """Compares words: a statement follows if the text has enough of its content words and all of
    its numbers, and if both are negated or neither (only sentences that share words with it count).

    ``threshold``: share of content words needed, without their endings. A proxy: it cannot tell who
    did what to whom.
    """

    name, threshold = "lexical", 0.7

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        return [self._entails(premise, hypothesis) for premise, hypothesis in pairs]

    def _entails(self, premise: str, hypothesis: str) -> bool:
        words, numbers, negated = _content(hypothesis)
        found_words, found_numbers, _ = _content(premise)
        enough = len(words & found_words) >= self.threshold * len(words)
        if not (words or numbers) or not numbers <= found_numbers or not enough:
            return False
        parts = map(_content, re.split(r"(?<=[.!?])\s+", premise))
        near = [denied for found, _, denied in parts if 2 * len(words & found) >= len(words)]
        return not near or negated in near


def _content(text: str) -> tuple[set[str], set[str], bool]:
    """Stems of content words, numbers, and whether the text has a negation."""
    text = text.lower().replace("n't", " not")
    words = set(re.findall(r"[^\W\d_]+", text))
    numbers = {number.replace(",", "") for number in re.findall(r"\d+(?:[.,]\d+)*", text)}
    stems = {_stem(word) for word in words - ENGLISH_STOP_WORDS - NEGATIONS}
    return stems, numbers, not NEGATIONS.isdisjoint(words)


def _stem(word: str) -> str:
    """Without the commonest endings, so that *opened* matches *opening*."""
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


class NeuralEntailment:
    """A sequence-to-sequence model that answers 1 (such as TRUE), or a classifier with one label
    for entailment.

    ``source``: ``hub:<id>@<revision>`` or ``path:<directory>``. ``max_length``: tokens of premise
    and hypothesis together; a longer premise loses its end, the hypothesis stays whole.
    """

    def __init__(self, source: str, batch_size: int = 8, max_length: int = 1024):
        folder = model_directory(source)
        config = transformers.AutoConfig.from_pretrained(folder, **NO_CODE)
        self.name, self.batch_size = source, batch_size
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **NO_CODE)
        self.classifies = "ForSequenceClassification" in " ".join(config.architectures or ())
        if self.classifies:
            kind, labels = transformers.AutoModelForSequenceClassification, config.id2label
            yes = [i for i, label in labels.items() if label.lower().startswith("entail")]
            names = sorted(labels.values())
            require(len(yes) == 1, f"judge {source}: labels {names}, needs one for entailment")
        elif config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
            yes = self.tokenizer("1", add_special_tokens=False).input_ids
        else:
            raise StudyError(f"judge {source}: neither a classifier nor sequence-to-sequence")
        self.yes = yes[0]
        model = kind.from_pretrained(folder, dtype=auto_dtype(), **NO_CODE)
        self.model = model.eval().to(device())
        # T5's positions are relative; RoBERTa keeps two for itself.
        positions = getattr(config, "max_position_embeddings", None) or max_length
        self.max_length = min(max_length, positions - 2, self.tokenizer.model_max_length)

    def encode(self, premises: Sequence[str], hypotheses: Sequence[str]):
        """The model's inputs for a batch of pairs."""
        if self.classifies:
            cut = {"truncation": "only_first", "max_length": self.max_length}
            inputs = self.tokenizer(premises, hypotheses, **cut)
            return self.tokenizer.pad(inputs, return_tensors="pt")
        texts = [f"premise: {p}" for p in premises] + [f" hypothesis: {h}" for h in hypotheses]
        ids = self.tokenizer(texts, add_special_tokens=False).input_ids
        rows = []
        for premise, hypothesis in zip(ids, ids[len(premises) :]):
            room = max(0, self.max_length - len(hypothesis) - 1)
            rows.append(premise[:room] + hypothesis + [self.tokenizer.eos_token_id])
        return self.tokenizer.pad({"input_ids": rows}, return_tensors="pt")

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        entailed = [False] * len(pairs)
        batches = batches_by_length([len(p) + len(h) for p, h in pairs], self.batch_size)
        for batch in progress(batches, desc="entailment", unit="batch"):
            inputs = self.encode(*map(list, zip(*(pairs[i] for i in batch)))).to(self.model.device)
            if not self.classifies:
                start = self.model.config.decoder_start_token_id
                inputs["decoder_input_ids"] = torch.full_like(inputs["input_ids"][:, :1], start)
            logits = self.model(**inputs).logits.view(len(batch), -1)
            for index, answer in zip(batch, logits.argmax(-1).tolist()):
                entailed[index] = answer == self.yes
        return entailed


def entailment_model(source: str) -> LexicalEntailment | NeuralEntailment:
    """A run's entailment model: ``lexical``, ``hub:<id>@<revision>`` or ``path:<directory>``."""
    return LexicalEntailment() if source == "lexical" else NeuralEntailment(source)


# --- labelled pairs: columns premise, hypothesis, entailed, group ---------------------------------


def hard_pairs() -> pd.DataFrame:
    """The shipped pairs, written to mislead a comparison of words: paraphrases that follow, and
    near copies that do not."""
    path = locate("shipped", "entailment/pairs.jsonl")
    rows = pd.DataFrame([row for _, row in read_jsonl(path)]).rename(columns={"id": "group"})
    return rows[["premise", "hypothesis", "entailed", "group"]].astype({"entailed": bool})


def claim_pairs(questions: Sequence[Question]) -> pd.DataFrame:
    """Every document with every gold claim of its question, labelled by ``answers_found``. A claim
    that is a name stands behind the question, as the metric asks about it."""
    rows = []
    for question in questions:
        for place, claim in enumerate(question.claims):
            text = claim.text
            if not text or question.kind == "list":
                text = f"{question.question} {claim.aliases[0]}"
            for document in question.documents:
                rows.append((document.premise, text, document.answers_found[place], question.id))
    return pd.DataFrame(rows, columns=["premise", "hypothesis", "entailed", "group"])


def agreement(entails: EntailmentModel, pairs: pd.DataFrame) -> pd.DataFrame:
    """How often a model agrees with the labels, over all pairs and by label: columns pairs, value,
    ci_low, ci_high, n. Pairs of one group are not independent; intervals allow for it."""
    labels = pairs["entailed"]
    right = labels == entailed(entails, list(zip(pairs["premise"], pairs["hypothesis"])))
    rows = []
    for name, some in (("all", labels | True), ("entailed", labels), ("not entailed", ~labels)):
        found = mean_interval(right[some], clusters=pairs["group"][some], bounds=(0.0, 1.0))
        rows.append((name, *astuple(found)))
    return pd.DataFrame(rows, columns=["pairs", "value", "ci_low", "ci_high", "n"])
