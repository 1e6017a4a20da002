"""Adapters on disk: PEFT's two files for a model, one JSON file for a single layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias, overload

from torch import Tensor, nn

from entrenar.autograd.ops.int4 import Fit
from entrenar.lora.adapter.layer_file import load_layer, save_layer
from entrenar.lora.adapter.peft_load import load_peft, read_fit
from entrenar.lora.adapter.peft_save import save_peft
from entrenar.lora.layers import LoRALayer

__all__ = ["adapter_fit", "load_adapter", "save_adapter"]

StrPath: TypeAlias = "str | os.PathLike[str]"


def save_adapter(model: nn.Module, path: StrPath) -> None:
    """Save what was trained: lora_A and lora_B of every LoRALayer, in float32.

    Args:
        model: a model with LoRALayers; or a single LoRALayer.
        path: for a model, a directory, which gets PEFT's adapter_config.json and adapter_model.safetensors (other files
            in it stay); for a single layer, a file that ends in .json.

    The files are written under other names and renamed, so an adapter that was there survives a full disk or a kill.

    The weights' file also says how the scales of the model's 4-bit weights were found (`fit`), where they have one way.

    Raises ValueError for a model without LoRALayers, for a matrix with NaN or infinity (nothing is written), and for a
    path that does not fit; OSError where it cannot be written.
    """
    path = Path(os.path.abspath(path))
    if isinstance(model, LoRALayer):
        if not _is_layer_file(path):
            raise ValueError(f"{path}: the adapter of a single layer is saved to a file that ends in .json")
        save_layer(model, path)
    else:
        if _is_layer_file(path):
            raise ValueError(f"{path}: the adapter of a model is saved to a directory, and .json is for a single layer")
        save_peft(model, path)


@overload
def load_adapter(model: nn.Module, path: StrPath) -> nn.Module: ...


@overload
def load_adapter(model: Tensor, path: StrPath) -> LoRALayer: ...


@overload
def load_adapter(model: StrPath, path: nn.Module) -> nn.Module: ...


@overload
def load_adapter(model: StrPath, path: Tensor) -> LoRALayer: ...


def load_adapter(model: nn.Module | Tensor | StrPath, path: nn.Module | Tensor | StrPath) -> nn.Module:
    """Load an adapter that this package or PEFT saved; the two arguments go in either order.

    From a directory, into a model, in place. A model that has LoRALayers gets its matrices filled, and they must be
    those of the adapter, by name, shape and scaling. In any other model, exactly the adapter's layers become LoRALayers
    over the nn.Linear or Int4Linear that is there, and all else is frozen. Returns the model.

    From a .json file, onto a single layer: a weight [d_out, d_in], an nn.Linear or an Int4Linear. Returns a LoRALayer
    over it. A LoRALayer is filled and returned.

    Raises FileNotFoundError for a missing file; ValueError, before the model is touched, for a damaged file, an adapter
    of another model, or of 4-bit weights with another `fit`, NaN or infinity, and for what this package does not
    compute (DoRA, trained biases, modules_to_save and the like), named as adapter_config.json names it.
    """
    if isinstance(model, (nn.Module, Tensor)):
        model, path = path, model
    if isinstance(model, (nn.Module, Tensor)) or not isinstance(path, (nn.Module, Tensor)):
        raise TypeError("load_adapter takes a path and a model (or, for a single layer, its base), in either order")
    source, target = Path(os.path.abspath(model)), path
    if _is_layer_file(source):
        return load_layer(source, target)
    if isinstance(target, (Tensor, LoRALayer)):
        raise ValueError(f"{source}: a directory holds the adapter of a model; that of a single layer is a .json file")
    load_peft(target, source)
    return target


def adapter_fit(path: StrPath) -> Fit | None:
    """The `fit` of the 4-bit weights that the adapter in the directory `path` was trained on.

    None where it does not say: it was trained on other weights, by PEFT, or saved before this was recorded. Raises
    FileNotFoundError or ValueError where it cannot be read.
    """
    return read_fit(Path(os.path.abspath(path)))


def _is_layer_file(path: Path) -> bool:
    return path.suffix == ".json"
