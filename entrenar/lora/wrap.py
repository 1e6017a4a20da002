"""Put adapters beside the linear layers of any torch model, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from entrenar.autograd.ops.int4 import Fit, check_fit
from entrenar.fusion.fuse import fuse as fuse_modules
from entrenar.lora.layers import Int4Linear, LoRALayer, QLoRALayer, check_adapter, has_hooks
from entrenar.lora.replace import replace_modules
from entrenar.lora.report import Kept, WrapReport, count_parameters, storage_bytes

ALL_LINEAR = "all-linear"


def wrap(
    model: nn.Module,
    rank: int = 16,
    alpha: float = 32,
    targets: str | Iterable[str] = ALL_LINEAR,
    bits: int | None = 4,
    dropout: float = 0.0,
    *,
    fuse: bool = True,
    activations: str | None = None,
    block: int = 64,
    scale_dtype: torch.dtype = torch.float16,
    fit: Fit = "absmax",
) -> WrapReport:
    """Replace the target layers of `model` by LoRA layers over frozen bases, and freeze everything else.

    Args:
        model: any module; changed in place, and only if every layer could be wrapped.
        rank, alpha, dropout: as in LoRALayer.
        targets: "all-linear" for every nn.Linear and Int4Linear but the output head; or names as in PEFT: a list, where
            a layer matches an entry that is its name or the end of it ("q_proj", "self_attn.q_proj"), or one regular
            expression that must match the whole name. The head is wrapped only if it is named.
        bits: 4 keeps the wrapped weights in int4, None keeps them as they are. Weights that are int4 already stay so.
            Never quantized, but adapted, are a weight that is shared with another module (a tied head), so that it
            stays shared, a layer with hooks or a forward of its own, so that they still run, and the layers of a
            TransformerEncoderLayer, which reads their weights.
        fuse: replace norms, feed-forward and attention layers by faster ones where `entrenar.fuse` finds that they
            compute the same; False leaves every module but the targets alone.
        activations: "int8" rounds the input of every int4 layer to int8 in the forward, as `int4_linear` describes:
            faster with AVX-512 VNNI, slower with AMX, and less exact. None leaves it.
        block, scale_dtype, fit: of the int4 format, as in int4_quantize.

    Returns:
        What was wrapped, what was not and why, and what it costs; print it.

    Raises ValueError for settings out of range, where a target matches nothing (listing what there is) or is no regular
    expression, where the model has adapters already, where a weight cannot be quantized, and for int8 activations
    without an int4 layer.
    """
    if bits not in (4, None):
        raise ValueError(f"bits must be 4 or None, not {bits}")
    if activations not in ("int8", None):
        raise ValueError(f"activations must be 'int8' or None, not {activations!r}")
    check_fit(fit)
    check_adapter(rank, alpha, dropout)
    if wrapped := [name for name, module in model.named_modules() if isinstance(module, LoRALayer)]:
        raise ValueError(f"the model has adapters already, the first of {len(wrapped)} at {wrapped[0]!r}")
    if isinstance(model, (nn.Linear, Int4Linear)):
        raise ValueError("the model is itself a linear layer: make a LoRALayer or QLoRALayer of it")

    bytes_before = storage_bytes(model)
    chosen = match(model, targets)
    dense = _never_quantized(model)
    bases: dict[str, nn.Module] = dict(chosen)
    for name, layer in chosen.items():
        if bits == 4 and isinstance(layer, nn.Linear) and name not in dense:
            bases[name] = Int4Linear.from_weight(
                layer.weight, layer.bias, block=block, scale_dtype=scale_dtype, fit=fit, name=name
            )
    if activations and not any(isinstance(base, Int4Linear) for base in bases.values()):
        raise ValueError(
            f"activations={activations!r} rounds the inputs of int4 layers, and no target is one (bits={bits})"
        )
    # From here on nothing can fail, for a layer that gets an adapter is frozen.
    adapted: dict[str, nn.Module] = {}
    for name, layer in bases.items():
        kind = QLoRALayer if isinstance(layer, Int4Linear) else LoRALayer
        adapted[name] = kind(layer, rank=rank, alpha=alpha, dropout=dropout).train(model.training)
    quantized = [name for name, layer in adapted.items() if isinstance(layer, QLoRALayer)]
    kept = {name: why for name, why in _kept(model, chosen, dense, bits) if name not in quantized}

    for base in (adapter.base for adapter in adapted.values()):
        if isinstance(base, Int4Linear):
            base.int8 = activations == "int8"
    base_parameters = count_parameters(model)
    model.requires_grad_(False)
    replace_modules(model, {chosen[name]: layer for name, layer in adapted.items()})
    fused = fuse_modules(model) if fuse else None
    return WrapReport(adapted, kept, base_parameters, bytes_before, storage_bytes(model), fused)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that an adapter can stand beside, by name."""
    # Of nn.Linear's subclasses some are read by their parents without being called (MultiheadAttention's out_proj).
    return {name: m for name, m in model.named_modules() if type(m) is nn.Linear or isinstance(m, Int4Linear)}


def output_heads(model: nn.Module) -> set[nn.Module]:
    """The layers that make logits of hidden states, where the model, or one inside it, says which they are."""
    finders = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    return {head for find in finders if callable(find) and (head := find()) is not None}


def match(model: nn.Module, targets: str | Iterable[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` names, as `wrap` describes it.

    Raises ValueError where one matches nothing, and for what is no regular expression.
    """
    layers = linear_layers(model)
    if targets == ALL_LINEAR:
        heads = output_heads(model)
        matched = {name: layer for name, layer in layers.items() if layer not in heads}
        missing = [] if matched else [ALL_LINEAR]
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"targets: {targets!r} is no regular expression: {error}") from error
        matched = {name: layer for name, layer in layers.items() if pattern.fullmatch(name)}
        missing = [] if matched else [targets]
    else:
        targets = list(targets)
        matched = {name: layer for name, layer in layers.items() if any(_ends(name, target) for target in targets)}
        missing = [target for target in targets if not any(_ends(name, target) for name in matched)]
        missing = missing if targets else ["(an empty list)"]
    if missing:
        raise ValueError(
            f"no linear layer matches {', '.join(map(repr, missing))}; the model's linear layers end in: "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in layers})) or '(there are none)'}"
        )
    return matched


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """For each linear layer whose weight another module holds too, the name of that module."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    shared = {}
    for name, layer in linear_layers(model).items():
        others = [other for other in holders.get(id(getattr(layer, "weight", None)), []) if other != name]
        if others:
            shared[name] = others[0]
    return shared


def _never_quantized(model: nn.Module) -> dict[str, str]:
    """For each linear layer whose weight stays as it is at any `bits`, why."""
    shared = _shared_weights(model)
    read = {child for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for child in m.children()}
    reasons = {}
    for name, layer in linear_layers(model).items():
        found = [f"shared with {shared[name]}"] if name in shared else []
        if has_hooks(layer):
            found.append("has hooks, or another forward")
        if layer in read:
            found.append("read by TransformerEncoderLayer")
        if found:
            reasons[name] = ", ".join(found)
    return reasons


def _kept(
    model: nn.Module, chosen: dict[str, nn.Module], dense: dict[str, str], bits: int | None
) -> Iterator[tuple[str, Kept]]:
    """What is not quantized of two or more dimensions, by name (a `weight` by its module's), each with the reason."""
    heads = output_heads(model)
    for path, module in model.named_modules():
        if isinstance(module, Int4Linear):
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.dim() < 2:
                continue
            if path in chosen:
                reason = "bits=None" if bits is None else "target"
            elif module in heads:
                reason = "output head"
            elif type(module) is nn.Linear:
                reason = "not a target"
            else:
                reason = type(module).__name__
            found = [reason, dense[path]] if path in dense else [reason]
            yield name.removesuffix(".weight"), Kept(tuple(parameter.shape), parameter.dtype, ", ".join(found))
