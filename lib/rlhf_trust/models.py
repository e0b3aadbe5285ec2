"""Models: one frozen backbone in memory, and the stages as LoRA adapters on it.

:func:`load_base` makes the backbone of a source (:mod:`.sources`), :func:`load_adapters` puts saved
adapters on it, and :func:`using` says which of them acts. ``start`` is the backbone alone.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICE
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from . import ROOT, StudyError, distributed, require
from .artifacts import READ, atomic_write, checked, content_key, file_hash, sha256_of
from .chat import Chat, choose_pad
from .sources import NO_CODE, first_line, is_adapter, model_directory, refusing

# loading takes a second; its bar would stay in every rendered notebook
transformers_logging.disable_progress_bar()

DEFAULT_TARGETS = {
    **dict.fromkeys("gemma3_text olmo2 olmo3 qwen3 smollm3".split(), ("q_proj", "v_proj")),
    "phi3": ("qkv_proj",),
}
"""Where LoRA sits by default in architectures for which PEFT has no choice of its own: the query
and value projections, or the one matrix that holds them."""


@dataclass(frozen=True)
class Base:
    """A frozen backbone, its tokenizer and what identifies them.

    ``weights`` is a hash of the weights' file, which adapters keep to know their backbone by;
    ``fingerprint``, of the number format too, keys every cached result."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    weights: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        """The weights' number format, as :func:`load_base` takes it."""
        return str(self.model.dtype).removeprefix("torch.")

    def __reduce__(self):
        """Goes to another process as its source, which is read again there."""
        return _read_again, (self.source, self.dtype, self.fingerprint)


def _read_again(source: str, dtype: str, fingerprint: str) -> Base:
    base = load_base(source, dtype)
    same = base.fingerprint == fingerprint  # not of a model into which an adapter was merged
    require(same, f"{source}: other weights than in the process that asks for a part of its work")
    return base


Loader = Callable[[], Base]
"""Loads a model when it is needed."""


def device() -> torch.device:
    """Where everything runs, TRL's trainers too: one GPU that CUDA (or ROCm) sees, else the CPU.

    Of several GPUs it is the first; CUDA_VISIBLE_DEVICES=1 makes another one so. Of several
    processes that train together each has its own. Apple's GPU is left out: many sums are in
    float64, which it does not have."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(own if torch.cuda.is_available() else "cpu")


def auto_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (AVX512-BF16, AMX, recent GPUs), else
    float32."""
    if device().type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        processor = Path("/proc/cpuinfo")
        flags = processor.read_text(encoding="utf-8") if processor.exists() else ""
        native = "avx512_bf16" in flags or "amx_bf16" in flags
    return torch.bfloat16 if native else torch.float32


def parse_dtype(name: str) -> torch.dtype:
    """``auto`` (:func:`auto_dtype`), ``float32`` or ``bfloat16``, as torch has it."""
    return auto_dtype() if name == "auto" else getattr(torch, name)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with an end token and another one to pad with."""
    tokenizer = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    if tokenizer.eos_token is None:
        raise StudyError(f"{directory}: the tokenizer has no end token; set eos_token in it")
    try:
        choose_pad(tokenizer)
    except StudyError as error:
        raise StudyError(f"{directory}: {error}") from None
    return tokenizer


def load_base(source: str, dtype: str = "auto") -> Base:
    """Load a frozen backbone in evaluation mode.

    Parameters
    ----------
    source
        See :func:`model_directory`.
    dtype
        ``auto`` (:func:`auto_dtype`), ``float32`` or ``bfloat16``; LoRA weights are float32 in any
        case.

    Raises
    ------
    StudyError
        If files are missing or damaged, with the file's name.
    """
    directory, kind = model_directory(source), parse_dtype(dtype)
    where, again = f"model {source}: {directory}", "fetch or save it again"
    # Of which transformers would load the backbone from wherever the adapter says.
    if is_adapter(directory):
        raise StudyError(f"{where} holds an adapter; name the model that it was trained on")
    remedy = "delete the folder and run again" if source.startswith("wheel:") else again
    with refusing(f"{where} cannot be read", remedy, Exception):
        tokenizer = load_tokenizer(directory)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        for name in config.get("architectures") or []:
            if name.endswith("ForSequenceClassification"):
                raise StudyError(f"{where} holds a classifier ({name}), not a language model")
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=kind, output_loading_info=True, **NO_CODE
        )
    # Missing weights would stay random numbers.
    if loading["missing_keys"]:
        raise StudyError(f"{where} lacks the weights {min(loading['missing_keys'])}; {again}")
    # Out of the mapped file, whose small pages can cost more than the arithmetic.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    # Gemma 2 bounds its attention scores, which no fused attention does.
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    model = model.to(device()).requires_grad_(False).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    weights = _short_hash("".join(map(file_hash, weight_files(directory))))
    READ[f"model: {Path(source).name}"] = weights
    return Base(model, tokenizer, source, weights, _short_hash(f"{weights}:{kind}"))


def weight_files(directory: Path) -> list[Path]:
    """``config.json`` and every file that transformers may take the model's weights from."""
    whole = "model.safetensors", "model.safetensors.index.json"
    endings = [".safetensors"]
    if not any((directory / name).is_file() for name in whole):
        endings.append(".bin")
    found = set()
    for ending in endings:
        found |= {*directory.glob(f"*{ending}")}
        for index in directory.glob(f"*{ending}.index.json"):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            found |= {directory / name for name in shards}
    require(found, f"{directory}: no file of weights (*.safetensors, *.bin) to know them by")
    return [directory / "config.json", *sorted(found)]


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which token has which id."""
    return content_key(sorted(tokenizer.get_vocab().items()))


@dataclass(frozen=True)
class LoRA:
    """The shape of an adapter.

    ``alpha``: its scale is alpha / rank. ``target_modules``: last names of the linear layers that
    it adds to; None: query and value projections. ``layers``: ``all``, ``upper 1/3`` (a fraction of
    the model's layers, from the top), ``upper 4``, or numbers: ``20-29``, ``3, 7`` or a list. What
    lies below the first adapted layer is the same for every model and every training step, and need
    run only once (``decode.LowerStates``)."""

    rank: int = 8
    alpha: int = 16
    target_modules: Sequence[str] | None = None
    layers: str | Sequence[int] | None = "all"

    def numbers(self, layers: int) -> list[int] | None:
        """The adapted layers of a model that has ``layers``; None: all of them."""
        if self.layers in ("all", None):
            return None
        try:
            if isinstance(self.layers, int):  # as other tools' adapters may say it
                found = [self.layers]
            elif not isinstance(self.layers, str):
                found = [int(number) for number in self.layers]
            elif self.layers.startswith("upper "):
                part = Fraction(self.layers.removeprefix("upper "))
                count = int(part) if part.denominator == 1 else 0
                if 0 < part < 1:
                    count = max(1, round(part * layers))
                found = list(range(layers - count, layers))
            else:
                ends = [part.split("-") for part in self.layers.split(",")]
                found = [n for e in ends for n in range(int(e[0]), int(e[-1]) + 1)]
        except (ValueError, ZeroDivisionError):
            found = []
        if not found or not set(found) <= set(range(layers)):
            raise StudyError(
                f"lora_layers: must be all, upper 1/3 or numbers from 0 to {layers - 1} such as "
                f"20-29, got {self.layers!r}"
            )
        return sorted(set(found))


def lora_config(model: PreTrainedModel, lora: LoRA, **more):
    """PEFT's configuration of an adapter without dropout."""
    kind = model.config.model_type
    targets = lora.target_modules or DEFAULT_TARGETS.get(kind) or CHOICE.get(kind)
    require(targets, f"target_modules: name them, there is no default for {kind!r}")
    if not isinstance(targets, str):  # a pattern, which PEFT holds against the names
        last_names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        missing = sorted(set(targets) - last_names)
        require(not missing, f"target_modules: {kind} has no module {missing}")
        targets = list(targets)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        layers_to_transform=lora.numbers(model.config.num_hidden_layers),
        # GPT-2 keeps its matrices the other way round.
        **{"fan_in_fan_out": kind == "gpt2"} | more,
    )


KINDS_OF_LORA = (
    "use_rslora use_dora alpha_pattern rank_pattern layers_pattern exclude_modules fan_in_fan_out "
    "lora_bias"
).split()
"""What else of an adapter's configuration says how its weights act, and can be read."""

OF_TRAINING = (
    "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "lora_dropout megatron_core runtime_config"
).split()
"""What of it plays no part once the adapter is trained."""


def saved_config(model: PreTrainedModel, saved: Mapping):
    """PEFT's configuration of a saved adapter, by its ``adapter_config.json``.

    LoRA of any kind that leaves the backbone as it is: rank-stabilised, weight-decomposed (DoRA),
    with ranks and scales of single layers. Others are a StudyError.
    """
    if more := more_than_lora(saved):
        raise StudyError(
            f"its {more} is {saved[more]!r}, which is more than LoRA does; merge it into its "
            "backbone and use that as model:"
        )
    layers = saved.get("layers_to_transform")
    lora = LoRA(saved["r"], saved["lora_alpha"], saved["target_modules"], layers)
    kind = {key: saved[key] for key in KINDS_OF_LORA if saved.get(key)}
    return lora_config(model, lora, task_type="CAUSAL_LM", **kind)


def more_than_lora(saved: Mapping) -> str:
    """What of an adapter's configuration changes more than LoRA does, which acts beside the
    backbone's weights and can be switched; empty if nothing."""
    of_lora = "r", "lora_alpha", "target_modules", "layers_to_transform"
    understood = {*KINDS_OF_LORA, *OF_TRAINING, *of_lora}
    if saved.get("task_type") == "SEQ_CLS":  # a reward model's head is read apart from it
        understood.add("modules_to_save")
    for key, value in asdict(LoraConfig()).items():
        given = saved.get(key, value)
        if key not in understood and given != value and given not in (None, [], {}, False):
            return key
    return ""


def load_merged(source: str, directory: Path, dtype: str = "auto") -> Base:
    """The backbone of a source with an adapter of any of PEFT's kinds put into its weights: a
    checkpoint of its own.

    Raises :class:`StudyError` for what PEFT cannot put there, such as a learnt prompt.
    """
    base = load_base(source, dtype)
    problem = f"{directory}: PEFT cannot put it into {source}"
    with refusing(problem, "merge it by other means and name the merged model", Exception):
        merged = PeftModel.from_pretrained(base.model, directory).merge_and_unload()
    weights = _short_hash(base.weights + sha256_of(directory))
    fingerprint = _short_hash(base.fingerprint + weights)
    model = merged.requires_grad_(False).eval()
    return replace(base, model=model, weights=weights, fingerprint=fingerprint)


def new_adapter(base: Base, lora: LoRA, seed: int = 0):
    """Wrap the backbone in a fresh trainable adapter named ``default`` (a no-op until trained)."""
    torch.manual_seed(seed)
    return get_peft_model(base.model, lora_config(base.model, lora, task_type="CAUSAL_LM"))


def load_adapters(base: Base, adapters: dict[str, Path], trainable: str | None = None):
    """Wrap the backbone in saved adapters, by name; the first is active.

    The LoRA part of a reward model loads like any other (its head is read by
    :func:`load_reward_head`)."""
    # All are looked for before the first changes the backbone.
    for directory in map(checked, adapters.values()):
        there = (directory / "adapter_model.safetensors").is_file()
        remedy = f"run the stage that trains {directory.name!r} first"
        require(there, f"{directory}: no adapter there; {remedy}")
    wrapped, tokenizer = None, _tokenizer_hash(base.tokenizer)
    for name, directory in adapters.items():
        path = directory / "adapter_model.safetensors"
        again = f"run the stage that trains {directory.name!r} again"
        broken = OSError, ValueError, SafetensorError
        with refusing(f"{directory}: cannot be read", again, *broken):
            saved = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
            weights = {key: value for key, value in load_file(path).items() if ".lora_" in key}
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
        if saved.get("tokenizer", tokenizer) != tokenizer:
            raise StudyError(
                f"{directory}: was trained on another tokenizer than {base.source}'s; {again}"
            )
        # Other tools' adapters do not say what they were trained on.
        trained_on = facts.get("base_weights", base.weights)
        if trained_on != base.weights:
            raise StudyError(
                f"{path}: was trained on another model (weights {trained_on}) than {base.source} "
                f"({base.weights}); {again}, or set model: to the one it was trained on"
            )
        try:
            config = saved_config(base.model, saved)
            if wrapped is None:
                wrapped = PeftModel(base.model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            loading = set_peft_model_state_dict(wrapped, weights, adapter_name=name)
            for key in loading.missing_keys:
                if ".lora_" in key and f".{name}." in key:
                    raise StudyError(f"it has no weights for {key}")
            for key in loading.unexpected_keys:
                raise StudyError(f"there is no place for its {key}")
        # PEFT's own: no such module, or another size.
        except (StudyError, ValueError, KeyError, RuntimeError) as error:
            reason = first_line(error)
            raise StudyError(f"{directory}: does not fit this backbone: {reason}") from None
    wrapped.set_adapter(next(iter(adapters)))
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(trainable is not None and f".{trainable}." in name)
    return wrapped.eval()


@contextmanager
def adapted(
    base: Base, adapters: dict[str, Path], trainable: str | None = None
) -> Iterator[PeftModel]:
    """:func:`load_adapters` for as long as the block runs; the backbone is bare again
    afterwards."""
    network = load_adapters(base, adapters, trainable)
    try:
        yield network
    finally:
        network.unload()  # adapters sit inside the backbone


def save_adapter(
    base: Base,
    wrapped,
    directory: Path,
    head: torch.Tensor | None = None,
    adapter: str = "default",
    files: Mapping[str, str] | None = None,
) -> None:
    """Save one adapter as ``adapter_model.safetensors`` + ``adapter_config.json``, whole or not at
    all.

    ``base``, on which it was trained, and its tokenizer are named in the files;
    :func:`load_adapters` holds them to that. ``head``: a reward model's weight, shape [1, hidden],
    kept beside it as ``head.safetensors``. ``files``: name → text of what else belongs to it."""
    weights = {name: weight.float() for name, weight in snapshot(wrapped, adapter).items()}
    head = None if head is None else whole(head).float()
    if not distributed.writes():
        return
    config = wrapped.peft_config[adapter]
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(config.target_modules),
        "layers_to_transform": config.layers_to_transform,
        "bias": "none",
        "tokenizer": _tokenizer_hash(base.tokenizer),
        **_named(base.source),
    }
    with atomic_write(directory) as aside:
        aside.mkdir()
        # One entry: safetensors writes several in an order that changes from process to process,
        # and with it the file's hash.
        save_file(weights, aside / "adapter_model.safetensors", {"base_weights": base.weights})
        (aside / "adapter_config.json").write_text(json.dumps(facts, indent=1))
        if head is not None:
            save_file({"weight": head}, aside / "head.safetensors")
        for name, text in (files or {}).items():
            (aside / name).write_text(text, encoding="utf-8")


def _named(source: str) -> dict[str, str | None]:
    """A backbone as PEFT's ``AutoPeftModel`` finds it; one of a package from the repository's root
    on."""
    kind, _, place = source.partition(":")
    if kind == "hub":
        name, _, revision = place.partition("@")
        return {"base_model_name_or_path": name, "revision": revision or None}
    directory = model_directory(source)
    inside = directory.is_relative_to(ROOT)
    return {"base_model_name_or_path": str(directory.relative_to(ROOT) if inside else directory)}


def load_reward_head(directory: Path) -> torch.Tensor:
    """The reward model's head, shape [hidden]: reward = head · last hidden state of the answer's
    end token."""
    path = checked(directory / "head.safetensors")
    require(path.is_file(), f"{path}: missing; run 02-reward first")
    broken = OSError, SafetensorError, KeyError
    with refusing(f"{path}: cannot be read", "run 02-reward again", *broken):
        weight = load_file(path)["weight"]
    require(len(weight) == 1, f"{path}: has {len(weight)} labels; a reward model has one")
    return weight.squeeze(0)


def adapter_fingerprint(base: Base, directory: Path) -> str:
    """Identifies backbone + adapter weights: the key of everything computed from them."""
    return f"{base.fingerprint}-{sha256_of(directory, 16)}"


BASELINES = ("start", "sft")
"""What a change is measured against: the model before any of this, and the model both PPO and DPO
start from."""


class ModelSet:
    """All models of a run: ``start``, adapters on its backbone, and whole checkpoints.

    In memory are the backbone and the last checkpoint that was asked for; the latter alone where
    there is no room for both.

    Parameters
    ----------
    base
        The backbone, or how to load it.
    members
        The others by name, in the order in which figures and tables show them: the folder of a
        saved adapter, or how to load a checkpoint.
    prompt_format
        In which checkpoints are asked, each by its own tokenizer (:class:`Chat`).
    """

    def __init__(
        self, base: Base | Loader, members: Mapping[str, Path | Loader], prompt_format: str = "auto"
    ):
        for name in members:
            require(name != "start", "models: 'start' is the backbone itself, give another name")
            if not re.fullmatch(r"[\w.-]+", name):
                raise StudyError(f"models: {name!r} is no name; use letters, digits, '_', '.', '-'")
        self.names = ["start", *members]
        self.prompt_format = prompt_format
        self.fingerprints: dict[str, str] = {}
        self.formats: dict[str, str] = {}  # of the checkpoints that were asked
        self._adapters = {name: of for name, of in members.items() if isinstance(of, Path)}
        self._load = {"start": base}
        self._load |= {name: of for name, of in members.items() if not isinstance(of, Path)}
        self._loaded: dict[str, tuple[Base, PreTrainedModel]] = {}
        self._open("start")

    def _open(self, name: str) -> tuple[Base, PreTrainedModel]:
        """A backbone, and the network that is asked: the same, or wrapped in its adapters."""
        if name not in self._loaded:
            self._make_room()
            load = self._load[name]
            base = load if isinstance(load, Base) else load()
            network, adapters = base.model, self._adapters if name == "start" else {}
            self.fingerprints[name] = base.fingerprint
            if adapters:
                network = load_adapters(base, adapters)
            for adapter, directory in adapters.items():
                self.fingerprints[adapter] = adapter_fingerprint(base, directory)
            self._loaded[name] = base, network
        return self._loaded[name]

    def _make_room(self) -> None:
        """Let go of other checkpoints, and of ``start`` where another model of its size would not
        fit beside it."""
        for other in [*self._loaded]:
            size = 1.5 * self._loaded[other][0].model.get_memory_footprint()
            own = isinstance(self._load[other], Base)  # held by the caller as well
            if other != "start" or (not own and free_memory() < size):
                del self._loaded[other]
        gc.collect()

    @property
    def model(self) -> PreTrainedModel:
        """``start``, wrapped in the adapters."""
        return self._open("start")[1]

    def is_checkpoint(self, name: str) -> bool:
        """Has it a backbone and a tokenizer of its own?"""
        return name != "start" and name in self._load

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        return self._open(name if self.is_checkpoint(name) else "start")[0].tokenizer

    def chat(self, name: str, default: Chat) -> Chat:
        """How ``name`` is asked: ``default`` on the backbone, else by the model's own tokenizer."""
        if not self.is_checkpoint(name):
            return default
        try:
            chat = Chat(self.tokenizer(name), self.prompt_format)
        except StudyError as error:
            raise StudyError(f"{name}: {error}") from None
        self.formats[name] = chat.name
        return chat

    def active(self, name: str) -> AbstractContextManager:
        """The model ``name``, for as long as the block runs."""
        require(name in self.names, f"no model {name!r}; there are {', '.join(self.names)}")
        if self.is_checkpoint(name):
            return nullcontext(self._open(name)[1])
        return using(self.model, None if name == "start" else name)


def free_memory() -> int:
    """Bytes that a model could still take on its device."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


@contextmanager
def using(
    model, adapter: str | None, trainable: Sequence[torch.nn.Parameter] = ()
) -> Iterator[PreTrainedModel]:
    """One adapter acts alone (None: no adapter does, the start model) and only the weights
    ``trainable`` are trainable; both as before afterwards. Yields the model."""
    adapters = getattr(model, "peft_config", {})
    if adapter is not None and adapter not in adapters:
        raise StudyError(f"no adapter {adapter!r}; there are {', '.join(adapters) or 'none'}")
    if not adapters:  # a backbone alone is the start model
        yield model
        return
    if adapter is not None and model.get_model_status().enabled is False:
        raise StudyError(f"adapter {adapter!r} takes no part: adapters are switched off here")
    active = model.active_adapter
    parameters = [*model.parameters(), *trainable]  # a reward head is not the model's
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        if adapter is not None:
            model.set_adapter(adapter)
        model.requires_grad_(False)
        for weight in trainable:
            weight.requires_grad_(True)
        with model.disable_adapter() if adapter is None else nullcontext():
            yield model
    finally:
        model.set_adapter(active)
        for parameter, required in before:
            parameter.requires_grad_(required)


def lora_layers(model, adapter: str) -> dict[str, torch.nn.Linear]:
    """The adapter's A and B matrices in the model's order, under the names they are saved by."""
    layers = {}
    for name, module in model.named_modules():
        for part in ("lora_A", "lora_B"):
            matrices = getattr(module, part, None)
            if isinstance(matrices, torch.nn.ModuleDict) and adapter in matrices:
                if not isinstance(matrices[adapter], torch.nn.Linear):
                    raise StudyError(f"{name} is no linear layer; target linear layers with LoRA")
                layers[f"{name}.{part}.weight"] = matrices[adapter]
    if not layers:
        raise StudyError(
            f"the model has no LoRA layer of an adapter {adapter!r}; it has "
            f"{', '.join(getattr(model, 'peft_config', {})) or 'none'}"
        )
    return layers


def lora_weights(network, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's LoRA weights by their names without the adapter's, as
    ``adapter_model.safetensors`` has them."""
    return {name: layer.weight for name, layer in lora_layers(network, adapter).items()}


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A copy of a weight, of which several processes may each hold a part (FSDP)."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.clone()


def snapshot(network, adapter: str) -> dict[str, torch.Tensor]:
    """A copy of an adapter's LoRA weights, for :func:`restore`."""
    return {name: whole(weight) for name, weight in lora_weights(network, adapter).items()}


def restore(network, adapter: str, saved: dict[str, torch.Tensor]) -> None:
    """Put weights back to the bit; of another adapter of the same shape, too: DPO starts as the SFT
    adapter by ``restore(network, "dpo", snapshot(network, "sft"))``."""
    weights = lora_weights(network, adapter)
    wanted = {(name, tuple(weight.shape)) for name, weight in weights.items()}
    given = {(name, tuple(weight.shape)) for name, weight in saved.items()}
    if wanted != given:
        raise StudyError(
            f"the weights do not fit adapter {adapter!r} ({min(wanted ^ given)[0]}); take them "
            "from one of the same model, rank and targets"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])
