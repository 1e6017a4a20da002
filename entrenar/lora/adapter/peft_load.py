"""PEFT's two files, adapter_config.json and adapter_model.safetensors: reading, ours and PEFT's own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from entrenar.autograd.ops.int4 import Fit
from entrenar.lora.adapter.files import finish_writing
from entrenar.lora.adapter.peft_save import CONFIG, FILES, FIT, WEIGHTS, lora_layers
from entrenar.lora.layers import LoRALayer, common_fit
from entrenar.lora.replace import replace_modules
from entrenar.lora.wrap import linear_layers

KEY_PATTERN = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

# Settings that the tensors already carry, or that only training and bookkeeping look at. Any other setting that is on
# changes what the adapter computes.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias"}
INERT = {
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
# The other initializations (PiSSA, OLoRA, CorDA, LoftQ, ...) also change the base weights.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LayerAdapter:
    """One layer's adapter as read: A [rank, in], B [out, rank], and alpha = scaling * rank."""

    A: Tensor
    B: Tensor
    rank: int
    alpha: float


def load_peft(model: nn.Module, directory: Path) -> None:
    """Fill or wrap `model` with the adapter in `directory`; see `entrenar.lora.adapter.load_adapter`."""
    finish_writing(directory, FILES)
    config = _read_config(directory)
    tensors, metadata = _read_weights(directory)
    adapters = _read_adapters(directory, tensors, config)
    layers = lora_layers(model)
    _check_fit(model, metadata, directory)
    if layers:
        _check_fill(layers, adapters, directory)
    else:
        _check_wrap(model, adapters, config, directory)
        model.requires_grad_(False)
        layers = _wrap(model, adapters, config["lora_dropout"])
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(adapters[name].A)
            layer.lora_B.copy_(adapters[name].B)


def read_fit(directory: Path) -> Fit | None:
    """What the adapter in `directory` says of its base; see `entrenar.lora.adapter.adapter_fit`."""
    finish_writing(directory, FILES)
    fit: Any = _read_weights(directory)[1].get(FIT)  # what is no fit is refused where it is used
    return fit


def _check_fit(model: nn.Module, metadata: dict[str, str], directory: Path) -> None:
    trained, found = metadata.get(FIT), common_fit(model)
    if trained and found and trained != found:
        raise ValueError(
            f"{directory} was trained on 4-bit weights of fit {trained!r}, and the model's are of fit {found!r}: load "
            f"it with fit={trained!r}"
        )


def _check_fill(layers: dict[str, LoRALayer], adapters: dict[str, LayerAdapter], directory: Path) -> None:
    if layers.keys() != adapters.keys():
        missing, superfluous = layers.keys() - adapters.keys(), adapters.keys() - layers.keys()
        raise ValueError(
            f"{directory} does not hold the adapter of this model: "
            f"missing are {_some(missing)}; superfluous are {_some(superfluous)}"
        )
    for name, layer in layers.items():
        adapter = adapters[name]
        _check_shapes(name, adapter, layer.in_features, layer.out_features, directory)
        if adapter.rank != layer.rank or not math.isclose(adapter.alpha, layer.alpha):
            raise ValueError(
                f"{directory}: {name} has rank {adapter.rank} and alpha {adapter.alpha:g}, and in the model rank "
                f"{layer.rank} and alpha {layer.alpha:g}: wrap with the adapter's, or load it into the unwrapped model"
            )


def _check_wrap(model: nn.Module, adapters: dict[str, LayerAdapter], config: dict[str, Any], directory: Path) -> None:
    modules, linears = dict(model.named_modules()), linear_layers(model)
    if unknown := adapters.keys() - modules.keys():
        raise ValueError(
            f"{directory} does not hold an adapter of this {type(model).__name__}, which has no {_some(unknown)}; "
            f"it was made for {config.get('base_model_name_or_path') or 'a model that it does not name'}"
        )
    for name, adapter in adapters.items():
        if name not in linears:
            kind = type(modules[name]).__name__
            raise ValueError(f"{directory}: {name} is of class {kind}; adapters go beside linear layers only")
        module: Any = linears[name]
        _check_shapes(name, adapter, module.in_features, module.out_features, directory)


def _check_shapes(name: str, adapter: LayerAdapter, d_in: int, d_out: int, directory: Path) -> None:
    found = (adapter.A.shape[1], adapter.B.shape[0])
    if found != (d_in, d_out):
        raise ValueError(
            f"{directory}: {name} maps {d_in} to {d_out} features, and its adapter {found[0]} to {found[1]}"
        )


def _wrap(model: nn.Module, adapters: dict[str, LayerAdapter], dropout: float) -> dict[str, LoRALayer]:
    layers: dict[str, LoRALayer] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, adapter in adapters.items():
        base = model.get_submodule(name)
        layer = LoRALayer(base, rank=adapter.rank, alpha=adapter.alpha, dropout=dropout).train(base.training)
        layers[name] = replacements[base] = layer
    replace_modules(model, replacements)
    return layers


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is not the configuration of a LoRA adapter (its peft_type is not LORA)")
    refused = [name for name, value in config.items() if name not in READ | INERT and value]
    if config.get("bias", "none") != "none":
        refused.append("bias")
    if config.get("init_lora_weights") not in INITIALIZATIONS:
        refused.append("init_lora_weights")
    if refused:
        settings = ", ".join(f"{name}={config[name]!r}" for name in sorted(refused))
        raise ValueError(f"{path} asks for what this package does not compute: {settings}")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.setdefault(name, {}), dict):
            raise ValueError(f"{path}: {name} must map patterns to values, and is {config[name]!r}")
    dropout = config.setdefault("lora_dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise ValueError(f"{path}: lora_dropout must be a number in [0, 1), and is {dropout!r}")
    return config


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter, by name, and their metadata."""
    path = directory / WEIGHTS
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is no folder; an adapter is one, with {WEIGHTS} in it")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; an adapter in another format must be saved as safetensors first")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or save it again") from error


def _read_adapters(directory: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, LayerAdapter]:
    path = directory / WEIGHTS
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY_PATTERN.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{path}: {key} is not the lora_A or lora_B of a linear layer, all that this package loads"
            )
        if not tensor.is_floating_point() or tensor.dim() != 2:
            raise ValueError(f"{path}: {key} is {tensor.dtype} of shape {tuple(tensor.shape)}, not a real matrix")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} has NaN or infinite values; take an earlier copy of the adapter")
        matrices.setdefault(match[1], {})[match[2]] = tensor
    if not matrices:
        raise ValueError(f"{path} holds no tensors")
    return {name: _adapter(name, pair, config, path) for name, pair in matrices.items()}


def _adapter(name: str, pair: dict[str, Tensor], config: dict[str, Any], path: Path) -> LayerAdapter:
    if pair.keys() != {"A", "B"}:
        raise ValueError(f"{path}: {name} has only lora_{next(iter(pair))}; a LoRA layer has lora_A and lora_B")
    try:
        rank, alpha = _setting(config, "rank_pattern", "r", name), _setting(config, "alpha_pattern", "lora_alpha", name)
    except re.error as error:
        raise ValueError(f"{path.with_name(CONFIG)}: {error.pattern!r} is no regular expression: {error}") from error
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{path.with_name(CONFIG)}: {name} has rank {rank!r} and lora_alpha {alpha!r}")
    if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
        raise ValueError(
            f"{path}: {name} has lora_A of shape {tuple(pair['A'].shape)} and lora_B of shape "
            f"{tuple(pair['B'].shape)}, and in {CONFIG} rank {rank}"
        )
    # rsLoRA scales by alpha / sqrt(rank), and a LoRALayer by alpha / rank.
    return LayerAdapter(pair["A"], pair["B"], rank, alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)


def _setting(config: dict[str, Any], pattern: str, default: str, name: str) -> Any:
    """The setting of one layer: that of the first pattern that matches an ending of its name, or else the default."""
    matching = (value for key, value in config[pattern].items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matching, config.get(default))


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(names[:3]) or "nothing"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
