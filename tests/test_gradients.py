"""Gradients against one-by-one autograd; what is stored against what is in memory, whatever kills
the run."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import shutil
import signal

import pytest
import torch
from rlhf_trust import StudyError, decode
from rlhf_trust.attribution import gradients as module
from rlhf_trust.attribution.gradients import per_example_gradients, stored_gradients
from rlhf_trust.attribution.store import InMemory, Stored, decoded, encoded, whole
from rlhf_trust.chat import EncodedExample
from rlhf_trust.decode import Example
from rlhf_trust.losses import (
    DPOLoss,
    INPOLoss,
    LogOddsLoss,
    NextTokenLoss,
    RewardLoss,
    reference_logps,
)
from rlhf_trust.models import LoRA, load_base, new_adapter
from torch.nn.functional import logsigmoid

BETA, PAD = 0.1, 0
LOSSES = ("next_token_sum", "next_token_mean", "reward", "dpo", "log_odds", "inpo")


def with_adapters(base):
    """Two adapters whose A and B are both non-zero: ``default`` (explained), ``sft`` (reference,
    active)."""
    model = new_adapter(base, LoRA(4, 8))
    model.add_adapter("sft", model.peft_config["default"])
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    model.set_adapter("sft")
    return model.eval()


def some_sequence(rng: random.Random, answer: int, prompt: int | None = None) -> EncodedExample:
    prompt = prompt or rng.randint(2, 9)
    return EncodedExample(tuple(rng.randrange(3, 290) for _ in range(prompt + answer)), prompt)


def some_examples(count: int, sequences: int, seed: int = 0, prefix: str = "e") -> list[Example]:
    """Random tokens; answers of 1 to 12 tokens, so that every batch is padded. Of pairs, every
    third has one prompt for both answers, every third prompts that begin alike."""
    rng = random.Random(seed)
    examples = []
    for i in range(count):
        found = [some_sequence(rng, rng.randint(1, 12)) for _ in range(sequences)]
        if sequences == 2 and i % 3:
            first, second = found
            shared = first.input_ids[: first.answer_start] + ((5, 7) if i % 3 == 1 else ())
            found[1] = EncodedExample(shared + second.answer_ids, len(shared))
        examples.append(Example(f"{prefix}{i}", "random", tuple(found)))
    return examples


def setting(model, name: str, count: int = 7, seed: int = 0, prefix: str = "e"):
    """A loss by its name, with examples for it."""
    examples = some_examples(count, 1 if name.startswith("next_token") else 2, seed, prefix)
    if name == "reward":
        torch.manual_seed(2)
        return RewardLoss(torch.randn(32) / 4), examples
    if name == "log_odds":
        return LogOddsLoss(), examples
    if name == "inpo":
        return INPOLoss(0.02, reference_logps(model, "sft", examples, PAD)), examples
    if name == "dpo":
        return DPOLoss(BETA, reference_logps(model, "sft", examples, PAD)), examples
    return NextTokenLoss(name.removeprefix("next_token_")), examples


def plain_logps(model, sequence: EncodedExample) -> torch.Tensor:
    """Log-probabilities of the answer's tokens, by transformers' own forward pass."""
    ids = torch.tensor([sequence.input_ids])
    logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
    return logps.gather(-1, ids[0, 1:, None])[sequence.answer_start - 1 :, 0]


def plain_loss(model, loss, example: Example) -> torch.Tensor:
    """One example's loss by transformers' own forward pass, without padding or anything of ours."""

    def logp(sequence):
        answer = plain_logps(model, sequence)
        return answer.mean() if getattr(loss, "reduction", "sum") == "mean" else answer.sum()

    def reward(sequence):
        out = model(input_ids=torch.tensor([sequence.input_ids]), output_hidden_states=True)
        return out.hidden_states[-1][0, -1].float() @ loss.head

    if isinstance(loss, NextTokenLoss):
        return -logp(example.sequences[0])
    chosen, rejected = example.sequences
    if isinstance(loss, LogOddsLoss):
        return logp(chosen) - logp(rejected)
    if isinstance(loss, RewardLoss):
        return -logsigmoid(reward(chosen) - reward(rejected))
    first, second = loss.reference[example.id]
    gap = (logp(chosen) - first) - (logp(rejected) - second)
    if isinstance(loss, INPOLoss):
        return (gap - 1 / (2 * loss.eta)) ** 2
    return -logsigmoid(loss.beta * gap)


def one_by_one(model, adapter: str, examples, loss) -> dict[str, torch.Tensor]:
    """Ordinary backward passes, one example each."""
    before = model.active_adapter
    model.set_adapter(adapter)
    own = [(name, p) for name, p in model.named_parameters() if f".{adapter}." in name]
    weights = {name.replace(f".{adapter}.", "."): p for name, p in own}
    values = [plain_loss(model, loss, example) for example in examples]
    rows = [torch.autograd.grad(value, list(weights.values())) for value in values]
    model.set_adapter(before)
    by_name = zip(weights, zip(*rows))
    return {name: torch.stack([g.flatten() for g in own]).float() for name, own in by_name}


def relative(got, expected) -> float:
    got, expected = (torch.as_tensor(x).double() for x in (got, expected))
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_batched_gradients_equal_one_by_one(tiny, name):
    model = with_adapters(tiny)
    loss, examples = setting(model, name)
    assert loss.name == name
    expected = one_by_one(model, "default", examples, loss)
    for rows in (16, 4):
        got = per_example_gradients(model, "default", examples, loss, PAD, rows=rows)
        assert set(got) == set(expected)
        assert len(got) == (4 if tiny.model.config.model_type == "gpt_neox" else 8)
        for layer in got:
            assert got[layer].dtype == torch.float32
            for row in range(len(examples)):
                assert relative(got[layer][row], expected[layer][row]) < 2e-5, (layer, row)


def test_loss_values_equal_plain_ones(tiny):
    model = with_adapters(tiny)
    model.set_adapter("default")
    for name in LOSSES:
        loss, examples = setting(model, name)
        with torch.no_grad():
            expected = torch.stack([plain_loss(model, loss, e) for e in examples])
            assert relative(loss.loss(model, examples, PAD), expected) < 1e-5


def test_adapter_and_trainability_are_restored(tiny_llama):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "next_token_sum")
    # As load_adapters leaves it; PEFT's own switching would not bring this back.
    model.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    first = per_example_gradients(model, "default", examples, loss, PAD)
    with torch.no_grad():
        second = per_example_gradients(model, "sft", examples, loss, PAD)
    assert model.active_adapter == "sft"
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())
    assert any(relative(first[layer], second[layer]) > 0.1 for layer in first)
    with pytest.raises(StudyError):  # also after an error
        per_example_gradients(model, "default", examples, setting(model, "reward")[0], PAD)
    assert model.active_adapter == "sft"
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_bfloat16_backbone(tiny_directories):
    exact = with_adapters(load_base(f"path:{tiny_directories['llama']}", dtype="float32"))
    model = with_adapters(load_base(f"path:{tiny_directories['llama']}", dtype="bfloat16"))
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    for name in LOSSES:
        loss, examples = setting(exact, name)
        expected = per_example_gradients(exact, "default", examples, loss, PAD)
        got = per_example_gradients(model, "default", examples, loss, PAD)
        a, b = (torch.cat(list(x.values()), 1) for x in (got, expected))
        assert a.dtype == torch.float32 and torch.cosine_similarity(a, b).min() > 0.95


def test_reference_logps_are_the_reference_adapters(tiny_llama):
    model = with_adapters(tiny_llama)
    examples = some_examples(3, 2)
    model.set_adapter("default")
    reference = reference_logps(model, "sft", examples, PAD)
    assert model.active_adapter == "default"
    # Where policy and reference are one, every DPO loss is log 2.
    with torch.no_grad():
        loss = DPOLoss(BETA, reference)
        away = loss.loss(model, examples, PAD).tolist()
        model.set_adapter("sft")
        same = loss.loss(model, examples, PAD).tolist()
    assert same == pytest.approx([math.log(2)] * 3, abs=1e-5)
    assert away != pytest.approx([math.log(2)] * 3, abs=1e-3)


def test_zero_gradient_names_the_example(tiny_llama):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "reward")
    same = Example("same-answers", "random", (examples[0].sequences[0],) * 2)
    with pytest.raises(StudyError, match="'same-answers' is exactly zero"):
        per_example_gradients(model, "default", [*examples, same], loss, PAD)
    got = per_example_gradients(model, "default", [*examples, same], loss, PAD, allow_zero=True)
    assert all(not block[-1].any() and block[:-1].any() for block in got.values())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_not_finite_names_the_example(tiny_llama, bad):
    model = with_adapters(tiny_llama)
    _, examples = setting(model, "dpo")
    reference = dict.fromkeys((e.id for e in examples), (0.0, 0.0)) | {"e3": (bad, 0.0)}
    with pytest.raises(StudyError, match="dpo loss of example 'e3'"):
        per_example_gradients(model, "default", examples, DPOLoss(BETA, reference), PAD)

    class BadGradient(NextTokenLoss):
        def loss(self, model, examples, pad, kept=None):
            values = super().loss(model, examples, pad)
            scale = torch.tensor([bad if e.id == "e3" else 1.0 for e in examples])
            values.register_hook(lambda gradient: gradient * scale)
            return values

    single = some_examples(5, 1)
    with pytest.raises(StudyError, match="gradient of example 'e3' is not finite"):
        per_example_gradients(model, "default", single, BadGradient(), PAD)


def test_other_errors(tiny_llama):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "next_token_sum")
    with pytest.raises(StudyError, match="no LoRA layer of an adapter 'ppo'; it has default, sft"):
        per_example_gradients(model, "ppo", examples, loss, PAD)
    with pytest.raises(StudyError, match="two examples have the id 'e0'"):
        per_example_gradients(model, "default", [*examples, examples[0]], loss, PAD)
    with pytest.raises(StudyError, match="'e0' has 1 sequence"):
        per_example_gradients(model, "default", examples, RewardLoss(torch.ones(32)), PAD)
    two, incomplete = some_examples(2, 2), DPOLoss(BETA, {"e0": (0.0, 0.0)})
    with pytest.raises(StudyError, match="no reference log-probabilities for example 'e1'"):
        per_example_gradients(model, "default", two, incomplete, PAD)
    with pytest.raises(StudyError, match="reduction"):
        NextTokenLoss("max")
    with model.disable_adapter(), pytest.raises(StudyError, match="takes no part"):
        per_example_gradients(model, "default", examples, loss, PAD)
    foreign = [Example("e0", "random", (EncodedExample((1, 2, 3, 300), 2),))]
    with pytest.raises(StudyError, match="another model's tokenizer"):
        per_example_gradients(model, "default", foreign, loss, PAD)
    model.train()
    with pytest.raises(StudyError, match="training mode"):
        per_example_gradients(model, "default", examples, loss, PAD)


def test_an_adapter_without_effect_or_on_the_head(tiny_llama):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "next_token_sum")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.zero_()
    with pytest.raises(StudyError, match="exactly zero .*all .* an adapter that was never trained"):
        per_example_gradients(model, "default", examples, loss, PAD)
    headed = new_adapter(tiny_llama, LoRA(4, 8, ["lm_head"])).eval()
    with pytest.raises(StudyError, match="output head carries LoRA"):
        per_example_gradients(headed, "default", examples, loss, PAD)


@pytest.mark.parametrize("bias", [False, True])
def test_chosen_logps_equal_log_softmax(bias, monkeypatch):
    monkeypatch.setattr(decode._ChosenLogps, "ROWS", 3)  # slices, the last one short
    torch.manual_seed(0)
    states = torch.randn(8, 5, requires_grad=True)
    head = torch.nn.Linear(5, 11, bias=bias).requires_grad_(False)
    targets, weights = torch.randint(11, (8,)), torch.randn(8)
    got = decode._ChosenLogps.apply(states, head.weight, head.bias, targets)
    expected = head(states).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(got, expected)
    slopes = [torch.autograd.grad(values @ weights, states)[0] for values in (got, expected)]
    torch.testing.assert_close(*slopes)


# ------------------------------------------------------------------------------------------------


def stored(where, model, examples, loss, name="pool", fingerprint="base-adapter", **more) -> Stored:
    options, where = {"rows": 4, "block": 3} | more, (where, name, fingerprint)
    return stored_gradients(*where, model, "default", examples, loss, PAD, **options)


def files(where) -> dict[str, bytes]:
    """What lies in a folder, locks aside."""
    found = [p for p in sorted(where.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(where)): p.read_bytes() for p in found}


class Calls:
    """A loss as it is, but something happens before the call of a given number."""

    def __init__(self, loss, number: int, what):
        self._loss, self._number, self._what, self.count = loss, number, what, 0

    def __getattr__(self, name):
        return getattr(self._loss, name)

    def loss(self, *arguments):
        self.count += 1
        if self.count == self._number:
            self._what()
        return self._loss.loss(*arguments)


@pytest.mark.parametrize("name", ["next_token_sum", "dpo"])
def test_stored_gradients_are_those_in_memory(tiny, name, tmp_path):
    model = with_adapters(tiny)
    loss, examples = setting(model, name)
    expected = InMemory(
        per_example_gradients(model, "default", examples, loss, PAD, rows=4),
        [e.id for e in examples],
    )
    found = stored(tmp_path, model, examples, loss)
    assert (found.layers, found.ids, len(found)) == (expected.layers, expected.ids, len(examples))
    torch.testing.assert_close(found.squares, expected.squares, rtol=1e-4, atol=0)
    for layer in expected.layers:
        blocks = list(found.blocks(layer))
        assert [rows for rows, _ in blocks] == [slice(0, 3), slice(3, 6), slice(6, 7)]
        ((_, wanted),) = expected.blocks(layer)
        assert found.width(layer) == wanted.shape[1] and {block.dtype for _, block in blocks} == {
            torch.float32
        }
        assert relative(torch.cat([block for _, block in blocks]), wanted) < 1e-5
        assert torch.equal(torch.cat([block for _, block in blocks]).double(), whole(found, layer))
    half = stored(tmp_path, model, examples, loss, number_format="float16")
    for layer in found.layers:
        for (_, exact), (_, rounded) in zip(found.blocks(layer), half.blocks(layer)):
            errors = (rounded - exact).abs()
            assert 0 < errors.max() and (errors <= 2**-11 * exact.abs() + 1e-11).all()
    small, large = (sum(map(len, files(kept.directory).values())) for kept in (half, found))
    assert small < 0.7 * large
    same = stored(tmp_path, model, examples, loss, block=7, rows=16)
    assert all(relative(whole(same, layer), whole(found, layer)) < 1e-5 for layer in found.layers)


def test_float16_holds_any_magnitude():
    torch.manual_seed(0)
    # Examples far apart in size, and entries of one example.
    spread = torch.randn(40, 300) * torch.logspace(-38, 37, 40)[:, None]
    within = torch.randn(40, 300) * torch.logspace(0, -12, 300)
    edges = torch.zeros(40, 300)
    edges[1, 0], edges[2, 0], edges[3, :2] = 1e-45, 3.4e38, torch.tensor([65504.0, 1e-30])
    block = {"spread": spread, "within": within, "edges": edges}
    tensors = encoded(block, "float16")
    for column, layer in enumerate(sorted(block)):
        assert tensors[layer].dtype == torch.float16 and tensors[layer].isfinite().all()
        back = decoded(tensors.__getitem__, layer)
        exact = block[layer].double()
        bound = torch.maximum(2**-11 * exact.abs(), 2**-39 * exact.abs().amax(1, keepdim=True))
        assert ((back.double() - exact).abs() <= bound).all(), layer
        squares = back.double().square().sum(1)
        torch.testing.assert_close(tensors["squares"][:, column], squares, rtol=1e-12, atol=0)


def test_what_is_kept_is_read_and_only_that(tiny_llama, tmp_path, monkeypatch):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "dpo", count=4)
    computed = []

    def counted(*arguments, **options):
        computed.append(len(options["examples"]))
        return per_example_gradients(*arguments, **options)

    monkeypatch.setattr(module, "per_example_gradients", counted)

    def get(**change):
        """The gradients, and the examples of each block that was computed rather than read."""
        computed.clear()
        found = stored(tmp_path, model, **{"examples": examples, "loss": loss} | change)
        return found, list(computed)

    first, blocks = get()
    assert blocks == [3, 1] and get()[1] == []
    renamed = [Example("other", "random", examples[0].sequences), *examples[1:]]
    shifted = tuple(EncodedExample(s.input_ids, s.answer_start - 1) for s in examples[0].sequences)
    e0 = loss.reference["e0"]
    one_shifted = [Example("e0", "random", shifted), *examples[1:]]
    for_renamed = DPOLoss(BETA, loss.reference | {"other": e0})
    different = {
        "model": dict(fingerprint="base-other"),
        "set of examples": dict(examples=renamed, loss=for_renamed),
        "set of examples, one answer start": dict(examples=one_shifted),
        "set of examples, in another order": dict(examples=examples[::-1]),
        "set of examples, fewer": dict(examples=examples[:3]),
        "loss": dict(loss=DPOLoss(0.2, loss.reference)),
        "loss, reference": dict(loss=DPOLoss(BETA, {**loss.reference, "e0": (-1.0, -2.0)})),
        "loss, another one": dict(loss=RewardLoss(torch.ones(32))),
        "loss, another head": dict(loss=RewardLoss(torch.arange(32.0) / 100)),
        "batch plan": dict(rows=2),
        "batch plan, block": dict(block=2),
        "number format": dict(number_format="float16"),
    }
    for what, change in different.items():
        assert get(**change)[1], f"{what}: read what was computed for other content"
        assert get(**change)[1] == [], f"{what}: not kept"
    # Put under the name that belongs to the first, they are not taken for it.
    wanted = files(first.directory)
    shutil.rmtree(first.directory)
    shutil.copytree(get(fingerprint="base-other")[0].directory, first.directory)
    assert get()[1] == [3, 1] and files(first.directory) == wanted

    before = files(tmp_path)
    monkeypatch.setenv("RLHF_TRUST_CACHE", "off")
    fresh, blocks = get()
    assert blocks == [3, 1] and torch.equal(fresh.squares, first.squares)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    "damage", ["truncated", "one bit", "missing", "no manifest", "half a manifest"]
)
def test_what_is_damaged_is_computed_again(tiny_llama, tmp_path, damage):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "next_token_sum")
    directory = stored(tmp_path, model, examples, loss).directory
    whole = files(directory)
    block, manifest = directory / "block-00001.safetensors", directory / "manifest.json"
    data = bytearray(block.read_bytes())
    if damage == "truncated":
        block.write_bytes(data[:-100])
    elif damage == "one bit":
        data[-50] ^= 1
        block.write_bytes(data)
    elif damage == "missing":
        block.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text()[:200])
    counting = Calls(loss, 0, None)
    stored(tmp_path, model, examples, counting)
    assert counting.count == (3 if "manifest" in damage else 1) and files(directory) == whole


class Interruption(Exception):
    pass


@pytest.mark.parametrize(
    ("dtype", "number_format"), [("float32", "float16"), ("bfloat16", "float32")]
)
def test_interrupted_runs_go_on_at_the_block(tiny_directories, tmp_path, dtype, number_format):
    model = with_adapters(load_base(f"path:{tiny_directories['llama']}", dtype=dtype))
    loss, examples = setting(model, "dpo", count=20)
    counting = Calls(loss, 0, None)
    stored(tmp_path / "whole", model, examples, counting, number_format=number_format)
    assert counting.count == 13  # 7 blocks of 2 batches, the last of 1: 2 pairs a batch
    moments, reached = random.Random(0), 0

    def interrupt():
        raise Interruption

    for _ in range(3):
        interrupted = Calls(loss, moments.randint(2, 5), interrupt)
        with pytest.raises(Interruption):
            stored(tmp_path / "resumed", model, examples, interrupted, number_format=number_format)
        reached += interrupted.count - 1
    resumed = Calls(loss, 0, None)
    stored(tmp_path / "resumed", model, examples, resumed, number_format=number_format)
    assert reached + resumed.count < 13 + 2 * 3, "blocks were computed again"
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["computing", "writing"])
def test_killed_runs_go_on_at_the_block(tiny_llama, tmp_path, moment):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "next_token_sum")
    stored(tmp_path / "whole", model, examples, loss)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def run():
        if moment == "writing":
            real, saved = module.save_file, []

            def save_half(tensors, path):
                real(tensors, path)
                saved.append(path)
                if len(saved) == 2:
                    path.write_bytes(path.read_bytes()[:500])
                    die()

            module.save_file = save_half
        dying = Calls(loss, 2 if moment == "computing" else 0, die)
        stored(tmp_path / "killed", model, examples, dying)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = files(tmp_path / "killed")
    # When writing, one of them is half written.
    assert sum("block" in name for name in left) == (1 if moment == "computing" else 2)
    counting = Calls(loss, 0, None)
    stored(tmp_path / "killed", model, examples, counting)
    assert counting.count == 2 and files(tmp_path / "killed") == files(tmp_path / "whole")


def test_kept_zero_gradients_are_still_an_error(tiny_llama, tmp_path):
    model = with_adapters(tiny_llama)
    loss, examples = setting(model, "reward", count=2)
    examples.append(Example("same", "random", (examples[0].sequences[0],) * 2))
    stored(tmp_path, model, examples, loss, allow_zero=True)
    with pytest.raises(StudyError, match="'same' is exactly zero"):
        stored(tmp_path, model, examples, loss)
