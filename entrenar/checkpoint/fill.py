"""Putting stored tensors into a model that was laid out on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.stored import StoredTensor
from entrenar.lora.layers import Int4Linear


def check_names_and_shapes(model: nn.Module, stored: dict[str, StoredTensor], path: Path) -> None:
    """Raise one CheckpointError for all tensors that are missing, superfluous or of another shape than the model's.

    Of tied tensors one is enough.
    """
    slots = model.state_dict()
    missing = [names[0] for names in _aliases(model).values() if not any(name in stored for name in names)]
    superfluous = [name for name in stored if name not in slots]
    misshapen = [
        f"{name} {list(stored[name].shape)} instead of {list(slot.shape)}"
        for name, slot in slots.items()
        if name in stored and stored[name].shape != tuple(slot.shape)
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}"
        for what, names in (("missing", missing), ("superfluous", superfluous), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(f"the tensors of {path} are not those of a {type(model).__name__}: {'; '.join(problems)}")


def fill(model: nn.Module, stored: dict[str, StoredTensor], int4: dict[str, Any] | None, device: torch.device) -> None:
    """Read each tensor onto the device, and into its place in `model`, in the order of the files.

    `int4` holds the arguments of `Int4Linear.from_weight` for the linear layers, which are replaced as their weights
    are read; None leaves them dense. Raises ValueError for a tensor that is not finite, that is of another kind than
    the model's, or that differs from the one it is tied to, and for a model whose linear layers to quantize hold less
    than its stacked parameters.
    """
    slots = model.state_dict(keep_vars=True)
    aliases = _aliases(model)
    linears = {} if int4 is None else _linears(model, aliases)
    if int4 is not None:
        _check_quantizable(model, linears)
    done: dict[int, Tensor] = {}
    for name, tensor in stored.items():
        if int4 is not None and name in linears:
            # The weight is bound to no name, so that it is gone before the next is read.
            packed = Int4Linear.from_weight(tensor.read().to(device), linears[name].bias, name=name, **int4)
            model.set_submodule(name.removesuffix(".weight"), packed)
            continue
        slot, value = slots[name], tensor.read()
        if value.is_floating_point() != slot.is_floating_point():
            raise ValueError(f"{name} is stored as {value.dtype}, where the model has {slot.dtype}")
        value = value.to(device, slot.dtype)
        _check_finite(value, name)
        if id(slot) in done:
            if not torch.equal(value, done[id(slot)]):
                raise ValueError(
                    f"{' and '.join(aliases[id(slot)])} are tied but differ: set tie_word_embeddings to false"
                )
            continue
        done[id(slot)] = value
        if isinstance(slot, nn.Parameter):
            value = nn.Parameter(value, requires_grad=slot.requires_grad)
        for alias in aliases[id(slot)]:
            owner, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(owner), leaf, value)


def compute_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint stores (rotary frequencies, masks), as the model's classes do.

    That is done on the CPU, whose results do not depend on the device, and the buffers then go there.
    """
    lacking = []
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                # NaN shows below what a class does not compute.
                unset = float("nan") if buffer.is_floating_point() else 0
                setattr(module, name, torch.full_like(buffer, unset, device="cpu"))
                lacking.append((module_name, module, name))
    # transformers' initialization computes buffers and passes over what carries this mark.
    fresh = {module for _, module, _ in lacking}
    for module in model.modules():
        module._is_hf_initialized = module not in fresh
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True
    model.initialize_weights()
    for module_name, module, name in lacking:
        buffer = getattr(module, name)
        if buffer.is_floating_point() and buffer.isnan().any():
            raise CheckpointError(f"{type(model).__name__} has a buffer that cannot be computed: {module_name}.{name}")
        setattr(module, name, buffer.to(device))


def _aliases(model: nn.Module) -> dict[int, list[str]]:
    """The names of every tensor that the model keeps, by the tensor's identity: a tied one has several."""
    aliases: dict[int, list[str]] = {}
    for name, slot in model.state_dict(keep_vars=True).items():
        aliases.setdefault(id(slot), []).append(name)
    return aliases


def _linears(model: Any, aliases: dict[int, list[str]]) -> dict[str, nn.Linear]:
    """The linear layers by the names of their weights, less the output head and those whose weight is tied."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and len(aliases[id(module.weight)]) == 1
    }


def _check_quantizable(model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Raise ValueError if there are no `linears`, or if they hold less than the stacked matrices of experts do."""
    kind = type(model).__name__
    if not linears:
        raise ValueError(f"a {kind} has no nn.Linear beside its head to quantize: load it with bits=None")
    stacks = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim > 2}
    if sum(stacks.values()) > sum(layer.weight.numel() for layer in linears.values()):
        raise ValueError(
            f"most weights of a {kind} are in parameters like {max(stacks, key=lambda name: stacks[name])} (experts), "
            "which stay dense: load it with bits=None"
        )


def _check_finite(value: Tensor, name: str) -> None:
    if not value.is_floating_point() or not value.numel():
        return
    # NaN and infinity show in the extremes, which take no memory as a mask of the whole tensor would.
    if all(extreme.isfinite() for extreme in value.aminmax()):
        return
    index = (~value.isfinite()).nonzero()[0].tolist()
    raise ValueError(f"{name}{index} is {value[tuple(index)].item()} in {value.dtype}: the weights are damaged")
