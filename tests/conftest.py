"""Tiny random models that run every stage in seconds, and the real data where it is at hand."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from rlhf_trust import params
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.decode import Example
from rlhf_trust.models import LoRA, load_base, new_adapter, save_adapter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

for name in (
    "DATA SEED SET EXECUTOR SLURM_ARGS BEFORE AFTER FETCH".split()
):  # of a study, which make hands on
    os.environ.pop(name, None)
torch.set_num_threads(1)  # tiny tensors gain nothing from threads

REAL_DATA = Path(
    os.environ.get("RLHF_TRUST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
ARCHITECTURES = ("llama", "gpt_neox", "gemma3_text")
OTHERS = {
    "gpt2": dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "mistral": dict(num_key_value_heads=2, sliding_window=24),
    "qwen2": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "gemma2": dict(num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=24),
    "olmo2": dict(num_key_value_heads=2),
    "phi3": dict(num_key_value_heads=2),
}
"""Further architectures, and what is theirs alone."""
NAN = float("nan")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; `make unit` leaves it out")


def pytest_collection_modifyitems(items):
    # First, so that no process waits for a long test at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter):
    """How many cases of trouble were tried, kind by kind, and how many did not end as they should:
    in the right value, or in one line that names what is wrong."""
    counts = Counter(
        (Path(report.fspath).stem.removeprefix("test_").replace("_", " "), outcome)
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
        if report.when == "call" and Path(report.fspath).parent.name == "faults"
    )
    if kinds := sorted({kind for kind, _ in counts}):
        terminalreporter.section("trouble tried")
    for kind in kinds:
        failed = counts[kind, "failed"]
        tried = counts[kind, "passed"] + failed
        terminalreporter.line(f"{kind}: {tried} cases, {failed} ended otherwise than they should")


def values(measures, metric, condition="main"):
    """Values [items] of one of a vertical's measures."""
    (found,) = [m for m in measures if (m.metric, m.condition) == (metric, condition)]
    assert len(found.item_ids) == len(found.values)
    return found.item_values


def same(got, wanted):
    np.testing.assert_allclose(got, wanted, equal_nan=True)


WORDS = ("the answer to the question is not wrong", "human assistant user system")


def tiny_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most 300 tokens; special tokens as SmolLM2's, where pad = end
    token. ``words``: texts whose words have tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def save_tiny(kind: str, directory: Path, positions: int = 512) -> Path:
    """Save a random two-layer model of one architecture with its tokenizer."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    size = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=positions,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=2,
    )
    if kind in OTHERS:
        config = AutoConfig.for_model(kind, **size, **OTHERS[kind])
        model = AutoModelForCausalLM.from_config(config)
    elif kind == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**size, num_key_value_heads=2, tie_word_embeddings=True)
        )
    elif kind == "gemma3_text":  # every second layer looks back over a few tokens only
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(
                **size,
                num_key_value_heads=4,
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=24,
                layer_types=["sliding_attention", "full_attention"],
                tie_word_embeddings=True,
            )
        )
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**size, attention_dropout=0.0, hidden_dropout=0.0))
    # With the small initial weights all answers look alike; larger ones tell models apart.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind.startswith("gemma") and "norm" in name:
                parameter.fill_(1.0)  # to which Gemma adds 1
            else:
                parameter.mul_(3.0)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_directories(tmp_path_factory) -> dict[str, Path]:
    return {kind: save_tiny(kind, tmp_path_factory.mktemp(kind)) for kind in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def tiny(request, tiny_directories):
    """A fresh tiny backbone of each architecture in turn."""
    return load_base(f"path:{tiny_directories[request.param]}", dtype="float32")


@pytest.fixture
def tiny_llama(tiny_directories):
    return load_base(f"path:{tiny_directories['llama']}", dtype="float32")


@pytest.fixture
def chat(tiny):
    return Chat(tiny.tokenizer, "chatml")


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip("no data")
    return REAL_DATA


def run_cells(stage: str, **given) -> dict:
    """The variables of a chapter whose code ran here, cell by cell, with these parameters."""
    cells = json.loads((params.NOTEBOOKS / f"{stage}.ipynb").read_text(encoding="utf-8"))["cells"]
    variables = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), variables)
        if "parameters" in cell["metadata"].get("tags", []):
            variables |= given
    plt.close("all")
    return variables


class WordChat:
    """Stands in for ``Chat``: one token a word, which is quick and close enough."""

    def prompt_ids(self, turns):
        return " ".join(turns).split()

    def answer_ids(self, answer):
        return answer.split()


def untrained(base, lora: LoRA):
    """The backbone with an adapter of random weights, which changes what the model says."""
    wrapped = new_adapter(base, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    return wrapped.eval()


def save_untrained(base, directory: Path) -> None:
    wrapped = untrained(base, LoRA(4, 8))
    save_adapter(base, wrapped, directory)
    wrapped.unload()


def random_head(hidden: int, seed: int) -> torch.Tensor:
    """A reward head to hold fixed: a random direction of length 1, [hidden]."""
    head = torch.randn(hidden, generator=torch.Generator().manual_seed(seed))
    return head / head.norm()


def some_examples(count: int, sequences: int, seed: int = 0, prefix: str = "e") -> list[Example]:
    """Random texts of a few tokens, ``sequences`` an example."""
    rng = random.Random(seed)

    def sequence():
        prompt, answer = rng.randint(2, 9), rng.randint(1, 12)
        return EncodedExample(tuple(rng.randrange(3, 290) for _ in range(prompt + answer)), prompt)

    return [
        Example(f"{prefix}{i}", "random", tuple(sequence() for _ in range(sequences)))
        for i in range(count)
    ]
