"""Replace a model's modules by fused ones, where they compute the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from entrenar.fusion.attention import FusedAttention
from entrenar.fusion.mlp import FusedMLP
from entrenar.fusion.norm import FusedRMSNorm
from entrenar.fusion.probe import Call, difference
from entrenar.fusion.structure import NotFusableError
from entrenar.lora.layers import LoRALayer, has_hooks
from entrenar.lora.replace import replace_modules

TOKENS, INPUTS = 5, 5
"""Positions of a random input on which two modules are compared, and how many there are for a doubtful one."""

Kind: TypeAlias = type[FusedAttention] | type[FusedMLP] | type[FusedRMSNorm]


@dataclass
class FusionReport:
    """What `fuse` did. `print(report)` says it by class.

    Attributes:
        fused: what each replaced module is now, by name.
        kept: why a module that looked like one of these stays, by name.
    """

    fused: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        fused = ", ".join(f"{count} {kind}" for kind, count in Counter(self.fused.values()).items())
        kept = [f"not fused: {count} that {reason}" for reason, count in Counter(self.kept.values()).items()]
        return "\n".join([f"fused: {fused or 'nothing'}", *kept])


def fuse(model: nn.Module) -> FusionReport:
    """Replace norms, feed-forward and attention layers of `model`, in place, by modules that compute the same faster.

    Candidates are what consists of the same parts as in Llama: modules named RMSNorm, parents of gate_proj, up_proj and
    down_proj, parents of q_proj, k_proj, v_proj and o_proj. One is replaced only after the new module gave its output
    and its gradients on random input, within the rounding of the dtype. The new modules hold the old parameters and
    layers under the same names, so a state_dict stays the same. No class is changed, and no other model.
    """
    report = FusionReport()
    probes = _Probes(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        try:
            if has_hooks(module):
                raise NotFusableError("has hooks, or another forward")
            new = kind.of(module).train(module.training)
            probes.require_same(module, kind)
        except NotFusableError as reason:
            report.kept[name] = str(reason)
        else:
            replacements[module] = new
            report.fused[name] = kind.__name__
    replace_modules(model, replacements)
    return report


def _kind(module: nn.Module) -> Kind | None:
    """The fused class that `module` could be replaced by, from its outside."""
    if isinstance(module, (FusedAttention, FusedMLP, FusedRMSNorm)):
        return None
    children = set(module._modules)
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        return FusedMLP
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children:
        return FusedAttention
    return FusedRMSNorm if type(module).__name__.endswith("RMSNorm") else None


class _Probes:
    """Random inputs for the modules of a model, of the dtype in which its hidden states are."""

    def __init__(self, model: nn.Module) -> None:
        adapters = {id(p) for m in model.modules() if isinstance(m, LoRALayer) for p in m.trainable_parameters()}
        floating = (p for p in model.parameters() if p.is_floating_point() and id(p) not in adapters)
        first = next(floating, torch.empty(0, device="cpu"))
        self.dtype, self.device = first.dtype, first.device
        rotary = [m for m in model.modules() if "inv_freq" in m._buffers]
        self.rotary = rotary[0] if len(rotary) == 1 else None

    def require_same(self, original: nn.Module, kind: Kind) -> None:
        """Raise NotFusableError where the fused module differs."""
        call: Call = self._attend if kind is FusedAttention else _apply
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(INPUTS, 2, TOKENS, self._width(kind.of(original)), generator=generator, device="cpu")
        try:
            found = difference(original, kind.of, call, [*x.to(self.device, self.dtype)])
        except (RuntimeError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise NotFusableError(f"cannot be compared: {error}") from error
        if found:
            raise NotFusableError(found)

    @staticmethod
    def _width(new: nn.Module) -> int:
        first: Any = new.weight.shape[0] if isinstance(new, FusedRMSNorm) else next(new.children()).in_features
        return first

    def _attend(self, module: nn.Module, x: Tensor) -> Tensor:
        if self.rotary is None:
            raise NotFusableError("belongs to a model without a rotary embedding, or with several")
        positions = torch.arange(TOKENS, device=x.device).unsqueeze(0)
        results = module(x, position_embeddings=self.rotary(x, position_ids=positions), attention_mask=None)
        if len(results) != 2:
            raise NotFusableError(f"returns {len(results)} results, not two")
        output: Tensor = results[0]
        return output


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)
