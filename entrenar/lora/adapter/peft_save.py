"""PEFT's two files, adapter_config.json and adapter_model.safetensors: writing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from entrenar.lora.adapter.files import write_directory
from entrenar.lora.layers import LoRALayer, common_fit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = [WEIGHTS, CONFIG]
FIT = "entrenar.fit"
"""In the metadata of the weights, where PEFT passes over it: how the scales of the base's int4 weights were found."""
KEY = "base_model.model.{layer}.lora_{matrix}.weight"


def save_peft(model: nn.Module, directory: Path) -> None:
    """Write the adapter of every LoRALayer in `model`; see `entrenar.lora.adapter.save_adapter`."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRALayer, so there is no adapter to save: wrap it first")
    tensors = {}
    for name, layer in layers.items():
        for matrix, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
            if not parameter.isfinite().all():
                raise ValueError(f"{name}.lora_{matrix} has NaN or infinite values: nothing was written to {directory}")
            tensors[KEY.format(layer=name, matrix=matrix)] = parameter.detach().float().cpu().contiguous()
    fit = common_fit(model)
    metadata = {"format": "pt"} | ({FIT: fit} if fit else {})
    config = json.dumps(_config(model, layers), indent=2) + "\n"
    write_directory(
        directory,
        {
            WEIGHTS: lambda path: _write_tensors(path, tensors, metadata),
            CONFIG: lambda path: _write_text(path, config),
        },
    )


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # save_file would let nobody but the owner read it.
    data = save(tensors, metadata=metadata)
    # Nor are its bytes the same twice: it puts the metadata in any order.
    end = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:end]), "__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    data = len(text).to_bytes(8, "little") + text + data[end:]
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The model's LoRALayers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}


def _config(model: nn.Module, layers: dict[str, LoRALayer]) -> dict[str, Any]:
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    inside = tuple(f"{name}." for name in layers)
    others = [name for name, _ in model.named_modules() if name not in layers and not name.startswith(inside)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")) else None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout.p for layer in layers.values()),
        "target_modules": _target_modules(layers, others),
        "rank_pattern": {_exactly(name): layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {_exactly(name): layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _target_modules(layers: Iterable[str], others: Iterable[str]) -> list[str] | str:
    """What makes PEFT adapt these layers and no others: the shortest endings of their names, or else a regex.

    PEFT matches a list's entry with a whole name, and with any name that ends in a dot and the entry.
    """
    endings = {ending for name in others for ending in _endings(name)}
    targets = set()
    for name in layers:
        target = next((ending for ending in _endings(name) if ending not in endings), None)
        if target is None:
            return "|".join(re.escape(layer) for layer in layers)
        targets.add(target)
    return sorted(targets)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
