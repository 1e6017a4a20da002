"""The layers: a frozen 4-bit linear, and LoRA beside any frozen linear."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops.int4 import Fit, check_packed, int4_dequantize, int4_quantize
from entrenar.autograd.ops.int4_linear import int4_linear
from entrenar.autograd.ops.int4_lora_linear import int4_lora_linear
from entrenar.autograd.ops.int4_lora_linears import int4_lora_linears
from entrenar.autograd.ops.swiglu import swiglu
from entrenar.autograd.ops.swiglu_int4_lora_linear import swiglu_int4_lora_linear
from entrenar.autograd.recompute import recomputed


class Int4Linear(nn.Module):
    """A frozen linear layer y = x Wᵀ + b whose weight is kept in int4.

    Codes and scales are bytes in frozen uint8 parameters, so no `.to(dtype)`, autocast or optimizer can change them.

    Args:
        codes: uint8 [out_features, 16 * ceil(in_features / 32)].
        scales: uint8 [out_features, ceil(in_features / block) * 2 or 4].
        bias: [out_features] or None.
        in_features: columns of the weight.
        block: elements that share a scale, 64 or 32.

    Attributes:
        int8: round the layer's input to int8 in the forward, as `int4_linear` does; off unless it is set.
        fit: how the scales were found, if the layer was quantized here; None for codes that were made elsewhere.
    """

    int8 = False
    fit: Fit | None = None

    def __init__(
        self, codes: Tensor, scales: Tensor, bias: Tensor | None = None, *, in_features: int, block: int = 64
    ) -> None:
        super().__init__()
        check_packed(codes, scales, in_features, block)
        self.in_features = in_features
        self.out_features = codes.shape[0]
        self.block = block
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        block: int = 64,
        scale_dtype: torch.dtype = torch.float16,
        fit: Fit = "absmax",
        name: str = "weight",
    ) -> Int4Linear:
        """Quantize a weight [out_features, in_features]; `name` is what an error message calls it."""
        codes, scales = int4_quantize(weight, block=block, scale_dtype=scale_dtype, fit=fit, name=name)
        layer = cls(codes, scales, bias, in_features=weight.shape[1], block=block)
        layer.fit = fit
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features], float32 or bfloat16, to [..., out_features] of the same dtype."""
        _check_features(x, self.in_features)
        return int4_linear(x, self.codes, self.scales, self.bias, block=self.block, int8=self.int8)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [out_features, in_features] that the codes stand for."""
        return int4_dequantize(self.codes, self.scales, self.in_features, block=self.block, dtype=dtype)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        bits = 8 * (self.codes.numel() + self.scales.numel()) / (self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block={self.block}, bits_per_weight={bits:.3g}{', int8 input' if self.int8 else ''}"
        )


class LoRALayer(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter: y = base(x) + (alpha / rank) (x Aᵀ) Bᵀ.

    A starts Kaiming-uniform as in PEFT, drawn from torch's generator, and B at zero, so the first output is the base's.
    Both are float32 parameters; they are used in x's dtype. Models that read `weight` and `bias` instead of
    calling the layer (Mamba, TransformerEncoderLayer's fast path) get the adapter too, but no dropout.

    Args:
        base: the frozen layer, an nn.Linear, an Int4Linear or any module with in_features and out_features; or a weight
            of d_out * d_in elements.
        d_out, d_in: the weight's sizes; needed only if it is not given as a matrix, and checked if given.
        rank: columns of B and rows of A.
        alpha: numerator of the scaling.
        dropout: probability with which an element of x is dropped on its way to A, in training only.

    Raises ValueError, with the base as it was, for settings out of range and a base of other sizes or none.
    """

    def __init__(
        self,
        base: nn.Module | Tensor,
        d_out: int | None = None,
        d_in: int | None = None,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_adapter(rank, alpha, dropout)
        if isinstance(base, Tensor):
            base = _linear_of(_as_matrix(base, d_out, d_in))
        sizes: tuple[Any, Any] = getattr(base, "out_features", None), getattr(base, "in_features", None)
        if None in sizes:
            raise ValueError(f"{type(base).__name__} has no in_features and out_features: LoRA needs a linear layer")
        if (d_out or sizes[0], d_in or sizes[1]) != sizes:
            raise ValueError(f"the base maps {sizes[1]} to {sizes[0]} features, not d_in={d_in} to d_out={d_out}")
        self.base = base
        self.out_features, self.in_features = sizes
        self.rank = rank
        self.alpha = alpha
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        device = next(base.parameters()).device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in_features] to [..., out_features] of the same dtype."""
        _check_features(x, self.in_features)
        base = self.base
        if isinstance(base, Int4Linear) and not has_hooks(base):
            lora_x = self.dropout(x) if self.drops() else None
            return int4_lora_linear(x, *_operands(self, base), block=base.block, lora_x=lora_x, int8=base.int8)
        y = base(x)
        x = self.dropout(autocast(x))
        u = F.linear(x, self.lora_A.to(x.dtype))
        return y + self.scaling * F.linear(u, self.lora_B.to(x.dtype))

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer multiplies by, W + (alpha / rank) B A, formed anew at each reading.

        AttributeError where the base has no weight, as over int4.
        """
        weight: Any = self.base.weight
        update: Tensor = self.scaling * self.lora_B @ self.lora_A
        return weight + update.to(weight.dtype)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias; AttributeError where it has no such attribute."""
        bias: Any = self.base.bias
        return bias

    def drops(self) -> bool:
        """Whether elements of x are dropped now."""
        return self.training and self.dropout.p > 0

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapter's parameters, [lora_A, lora_B]."""
        return [self.lora_A, self.lora_B]

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"rank={self.rank}, alpha={self.alpha:g}"


class QLoRALayer(LoRALayer):
    """LoRALayer over a base in int4: an nn.Linear or a weight is quantized first, an Int4Linear is used as it is.

    Takes LoRALayer's arguments, and `block`, `scale_dtype` and `fit` of `int4_quantize`.
    """

    def __init__(
        self,
        base: nn.Module | Tensor,
        d_out: int | None = None,
        d_in: int | None = None,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        block: int = 64,
        scale_dtype: torch.dtype = torch.float16,
        fit: Fit = "absmax",
    ) -> None:
        if isinstance(base, Tensor):
            base = Int4Linear.from_weight(_as_matrix(base, d_out, d_in), block=block, scale_dtype=scale_dtype, fit=fit)
        elif isinstance(base, nn.Linear):
            base = Int4Linear.from_weight(base.weight, base.bias, block=block, scale_dtype=scale_dtype, fit=fit)
        elif not isinstance(base, Int4Linear):
            raise ValueError(f"{type(base).__name__} cannot be quantized: give an nn.Linear, an Int4Linear or a weight")
        super().__init__(base, d_out, d_in, rank=rank, alpha=alpha, dropout=dropout)


def check_adapter(rank: int, alpha: float, dropout: float) -> None:
    """Raise ValueError where an adapter cannot have these settings."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank must be at least 1 and a whole number, not {rank!r}")
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, not {alpha!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")


def apply_together(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """`[layer(x) for layer in layers]`, in one call where all are LoRA layers over int4 that differ in weights only."""
    adapters = [layer for layer in layers if isinstance(layer, LoRALayer) and _is_plain(layer)]
    bases = [adapter.base for adapter in adapters if isinstance(adapter.base, Int4Linear)]
    scaling = {adapter.scaling for adapter in adapters}
    forms = {(base.block, base.int8) for base in bases}
    if len(bases) < len(layers) or len(scaling) > 1 or len(forms) > 1:
        return [layer(x) for layer in layers]
    ((block, int8),) = forms
    for base in bases:
        _check_features(x, base.in_features)
    return int4_lora_linears(
        x,
        [base.codes for base in bases],
        [base.scales for base in bases],
        [base.bias for base in bases],
        [adapter.lora_A for adapter in adapters],
        [adapter.lora_B for adapter in adapters],
        scaling.pop(),
        block=block,
        int8=int8,
    )


def apply_to_swiglu(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """`layer(swiglu(gate, up))`, whose backward computes that input anew; a LoRA layer over int4 takes one call."""
    if isinstance(layer, LoRALayer) and isinstance(layer.base, Int4Linear) and _is_plain(layer):
        base = layer.base
        _check_features(gate, base.in_features)
        return swiglu_int4_lora_linear(gate, up, *_operands(layer, base), block=base.block, int8=base.int8)
    x = swiglu(gate, up)
    with recomputed(x, swiglu, gate, up):
        return layer(x)


def common_fit(model: nn.Module) -> Fit | None:
    """How the scales of all the model's int4 weights were found; None without such, or where they have no one way."""
    fits = {layer.fit for layer in model.modules() if isinstance(layer, Int4Linear)}
    return fits.pop() if len(fits) == 1 else None


def has_hooks(layer: nn.Module) -> bool:
    """Whether a hook waits for a call of the layer, or a forward that another library put in place of its own."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)


def _operands(layer: LoRALayer, base: Int4Linear) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, float]:
    """What the operations on int4 take of a layer, in their order."""
    return base.codes, base.scales, base.bias, layer.lora_A, layer.lora_B, layer.scaling


def _is_plain(layer: LoRALayer) -> bool:
    """Whether a call of the layer is its formula now, and nothing else."""
    return not layer.drops() and not has_hooks(layer) and not has_hooks(layer.base)


def _check_features(x: Tensor, in_features: int) -> None:
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}, the layer takes [..., {in_features}]")


def _as_matrix(weight: Tensor, d_out: int | None, d_in: int | None) -> Tensor:
    if d_out is None or d_in is None:
        if weight.dim() != 2:
            raise ValueError(f"a weight of shape {tuple(weight.shape)} needs d_out and d_in")
        return weight.detach()
    if weight.numel() != d_out * d_in or (weight.dim() == 2 and weight.shape != (d_out, d_in)):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is not d_out x d_in = {d_out} x {d_in}")
    return weight.detach().reshape(d_out, d_in)


def _linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return linear
