"""Attribution by hidden states instead of gradients (Xiao and Aranguri 2026, arXiv 2602.11079).

Let s(x, y) be the mean hidden state of one layer over the tokens of answer y to prompt x, in the
model *before* the training that is explained. A training pair moves the model along
d_i = s(x_i, chosen) − s(x_i, rejected), and an item asks about the direction
b_j = s(x_j, first answer) − s(x_j, second answer), such as bad − good:

    influence_i = ± d_i · b_j

with − where the item's loss falls as its first answer becomes likelier, and + where it rises, as
log-odds do. By linearity the mean score over a vertical's items is the projection of d_i on the
mean of bad − good. (The paper ranks by the cosine, which also divides by the length of d_i.)

An answer without a counterpart, as in supervised fine-tuning, is set against the mean of the first
training answers. For training examples that only shifts each item's scores by a constant.

There is one forward pass for each answer, and no gradient. The layer has to be chosen:
:func:`choose_layers` takes the one that does best on *other* items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..artifacts import progress
from ..decode import Example, backbone, batches_by_length, pad_right
from ..models import using
from .solvers import Scores, of_items
from .validate import lds


@torch.no_grad()
def answer_states(
    model, adapter: str | None, examples: Sequence[Example], pad: int, rows: int = 16
) -> np.ndarray:
    """Mean state over each answer's tokens: of the embeddings, then after each block (after the
    last one normalised). [layers + 1, examples, answers, hidden], float32.

    ``adapter``: None for the start model. Examples have one answer each, or two.
    """
    texts = [text for example in examples for text in example.sequences]
    batches = batches_by_length(list(map(len, texts)), rows)
    depth, width = model.config.num_hidden_layers + 1, model.config.hidden_size
    found = np.empty((depth, len(texts), width), dtype=np.float32)
    with using(model, adapter):
        for batch in progress(batches, desc="answer states", unit="batch"):
            ids, mask = pad_right([texts[i].input_ids for i in batch], pad, model.device)
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            states = backbone(model)(**inputs, output_hidden_states=True).hidden_states
            for row, i in enumerate(batch):
                answer = slice(texts[i].answer_start, len(texts[i]))
                means = [layer[row, answer].float().mean(0) for layer in states]
                found[:, i] = torch.stack(means).cpu().numpy()
    return found.reshape(depth, len(examples), -1, width)


def activation_difference(train: np.ndarray, queries: np.ndarray, raises: bool = False) -> Scores:
    """Scores [n, m] from one layer's states of n training examples and m items, each [examples,
    answers, hidden] (a layer of :func:`answer_states`).

    ``raises``: the items' loss rises as their first answer becomes likelier, as log-odds do.
    """
    train, queries = np.asarray(train, float), np.asarray(queries, float)
    centre = train[:, 0].mean(0)
    d, b = (s[:, 0] - (s[:, 1] if s.shape[1] == 2 else centre) for s in (train, queries))
    return of_items(d @ b.T if raises else -d @ b.T)


def choose_layers(
    by_layer: Sequence[np.ndarray], halves: np.ndarray, outcomes: np.ndarray, groups: Sequence[str]
) -> dict[str, int]:
    """For each group of items the layer whose scores best predict retraining for all *other* groups
    (the highest mean of ``validate.lds``): group → index into ``by_layer``.

    ``by_layer``: scores [n, items] of each layer; ``halves``, ``outcomes`` [halves, items] as for
    ``validate.lds``; ``groups``: a label for each item, two or more. The retrainings are the same
    for all items, so the choice is a little too good for a test on them.
    """
    groups = np.asarray(groups)
    values = np.array([lds(scores, halves, outcomes) for scores in by_layer])  # [layers, items]
    return {
        group: int(np.nanmean(values[:, groups != group], axis=1).argmax())
        for group in dict.fromkeys(groups.tolist())
    }
