"""Models of other families: read, sampled, adapted and trained as the study's own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import OTHERS, save_tiny, some_examples
from rlhf_trust import StudyError, artifacts
from rlhf_trust.chat import Chat
from rlhf_trust.decode import (
    Decoding,
    Generations,
    LowerStates,
    MultipleChoice,
    Prompt,
    option_logps,
    sample_batch,
)
from rlhf_trust.headline import measure_all, one_measure
from rlhf_trust.models import LoRA, ModelSet, load_adapters, load_base, new_adapter, save_adapter
from rlhf_trust.verticals import HEADLINE

PAD, EOS = 0, 2
ROWS = [[5, 6, 7, 8] * 8, [9, 10, 11], [12] * 20]  # longer than the window of those that have one


@pytest.fixture(scope="module", params=OTHERS)
def family(request, tmp_path_factory):
    directory = save_tiny(request.param, tmp_path_factory.mktemp(request.param))
    return load_base(f"path:{directory}", dtype="float32")


@torch.no_grad()
def next_logps(model, ids) -> torch.Tensor:
    """By the model's own forward pass, one text at a time: [tokens, V]."""
    return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def test_answers_are_the_models_own(family):
    drawn = sample_batch(family.model, ROWS, "abc", Decoding(6), EOS, PAD)
    for row, (answer,) in zip(ROWS, drawn):
        for i, token in enumerate(answer):
            assert next_logps(family.model, row + answer[:i])[-1].argmax() == token


def test_every_familys_models_are_compared(family, tmp_path):
    """Two checkpoints, as `make evaluate` measures them, by all instruments that weigh options."""

    def other():
        base = load_base(family.source, "float32")
        with torch.no_grad():
            for weight in base.model.parameters():
                weight.mul_(1.5)
        return replace(base, fingerprint="other")

    found = ModelSet(family, {"same": lambda: family, "other": other})
    generations = Generations(tmp_path, Chat(family.tokenizer, "auto"))
    sizes = dict(ethics=8, truthfulness=4)
    for vertical, measures in measure_all(found, generations, "shipped", sizes, 0).items():
        metric, condition = HEADLINE[vertical][:2]
        start, same, changed = (
            one_measure(measures[name], metric, condition).item_values for name in found.names
        )
        np.testing.assert_allclose(same, start, atol=1e-6)
        assert not np.allclose(changed, start)


def test_options_are_weighed_as_alone(family):
    asked = [
        MultipleChoice(str(i), tuple(row), ((20, 21), (22,), (20, 23, 24)))
        for i, row in enumerate(ROWS)
    ]
    for choice, found in zip(asked, option_logps(family.model, asked, PAD)):
        for option, logp in zip(choice.options, found):
            logps = next_logps(family.model, choice.context + option)[len(choice.context) - 1 : -1]
            alone = logps.gather(1, torch.tensor(option)[:, None]).sum()
            np.testing.assert_allclose(logp, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["all", "upper 1"])
def test_an_adapter_learns_is_saved_and_read_again(family, tmp_path, layers):
    base = load_base(family.source, "float32")
    network = new_adapter(base, LoRA(layers=layers))
    (example,) = (e.sequences[0] for e in some_examples(1, 1))
    ids = torch.tensor([example.input_ids])
    loss = network(input_ids=ids, labels=ids).loss
    loss.backward()
    weights = [p for p in network.parameters() if p.requires_grad]
    assert weights and any(p.grad.abs().sum() > 0 for p in weights)
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    save_adapter(base, network, tmp_path / "sft")
    wanted = next_logps(network, ROWS[0])
    loaded = load_adapters(load_base(family.source, "float32"), {"sft": tmp_path / "sft"})
    torch.testing.assert_close(next_logps(loaded, ROWS[0]), wanted)
    asked = [MultipleChoice("x", tuple(ROWS[0]), ((20,), (21, 22)))]
    (kept,) = option_logps(loaded, asked, PAD, kept=LowerStates(loaded))
    (whole,) = option_logps(loaded, asked, PAD)
    np.testing.assert_allclose(kept, whole, rtol=1e-5)


def test_texts_beyond_the_context_are_counted(family, tmp_path, capsys, monkeypatch):
    """What a model was not made for is a note; what it cannot read at all, one line."""
    chat, prompts = (
        Chat(family.tokenizer, "auto"),
        [Prompt("a", ("Hi",)), Prompt("b", ("x" * 600,))],
    )
    ask = partial(Generations(tmp_path, chat).answer, family.model, "f", "ethics.start", prompts)
    said = "ethics.start, with their answers: 1 of 2 texts are longer than the model's context of"
    if family.model.config.model_type == "gpt2":
        with pytest.raises(StudyError, match=f"{said} 512 tokens; leave them out"):
            ask(Decoding(2))
        return
    for _ in range(2):  # also where the answers are there
        monkeypatch.setattr(artifacts, "NOTES", [])
        ask(Decoding(2))
        assert f"note: {said} 512 tokens" in capsys.readouterr().out
