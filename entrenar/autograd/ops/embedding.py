"""Looking rows up in a table, and dropping elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import refuse_complex, widen
from entrenar.autograd.ops._override import overridable


@overridable
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows, y = weight[input], as torch.nn.functional.embedding.

    Args:
        input: int32 or int64, of any shape.
        weight: [V, D].
        padding_idx: the row that gets no gradient; negative counts from the end.
        max_norm, norm_type, scale_grad_by_freq, sparse: torch's defaults only.

    Returns:
        [*input.shape, D] of weight's dtype.

    d weight[v] = Σ dy[i] over the i with input[i] = v, summed in float32 or wider.
    Raises NotImplementedError for max_norm, scale_grad_by_freq and sparse, TypeError for complex values; else what
    torch raises.
    """
    refuse_complex("embedding", weight)
    asked = {"max_norm": max_norm is not None, "scale_grad_by_freq": scale_grad_by_freq, "sparse": sparse}
    if unsupported := [name for name, given in asked.items() if given]:
        raise NotImplementedError(
            f"embedding does not support {', '.join(unsupported)}: use torch.nn.functional.embedding"
        )
    return EmbeddingFunction.apply(input, weight, padding_idx)


@overridable
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p and divide the others by 1 - p, as torch.nn.functional.dropout.

    Args:
        input: floating point, of any shape.
        p: from 0 to 1.
        training: if False, the result is the input itself.
        inplace: only False.

    Returns:
        input's shape and dtype. The elements are chosen by torch's generator.

    dx = dy m / (1 - p), with the mask m of elements that stayed, kept in a byte each.
    Raises ValueError for p outside [0, 1], NotImplementedError for inplace, TypeError for values that are not floating
    point.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if inplace:
        raise NotImplementedError("dropout does not work in place: use torch.nn.functional.dropout")
    refuse_complex("dropout", input)
    if not training or p == 0:
        return input
    if not input.is_floating_point():
        raise TypeError(f"dropout takes floating-point values, not {input.dtype}")
    output, _ = DropoutFunction.apply(input, p)
    return output


class EmbeddingFunction(Function):
    """y = W[i]; dW[v] = Σ dy over the i that equal v."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        return F.embedding(input, weight, padding_idx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, padding_idx = inputs
        ctx.rows = weight.shape[0]
        ctx.padding_idx = None if padding_idx is None else padding_idx % ctx.rows
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        wide = widen(dy)
        if ctx.padding_idx is not None:
            wide = wide.masked_fill((input == ctx.padding_idx).unsqueeze(-1), 0)
        columns = dy.shape[-1]
        dw = wide.new_zeros(ctx.rows, columns).index_add_(0, input.flatten(), wide.reshape(input.numel(), columns))
        return None, dw.to(dy.dtype), None


class DropoutFunction(Function):
    """y = x m / (1 - p); dx = dy m / (1 - p)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
        return torch.native_dropout(input, p, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        _, p = inputs
        _, kept = output
        ctx.scale = 1 / (1 - p) if p < 1 else 0.0
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return dy * kept * ctx.scale, None
