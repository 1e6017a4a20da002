"""Products of matrices, with torch's ranks, broadcasting and errors.

Under torch.autocast the operands are cast as torch casts them. Complex tensors raise TypeError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex
from entrenar.autograd.ops._override import overridable


@overridable
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """The product y = input @ other.

    Args:
        input: [..., M, K], or [K].
        other: [..., K, N], or [K].

    Returns:
        [..., M, N], with the leading dimensions broadcast; M or N is missing where its operand is a vector.

    Gradients: dy otherᵀ and inputᵀ dy, each summed over the dimensions along which its operand was broadcast.
    """
    refuse_complex("matmul", input, other)
    return MatmulFunction.apply(autocast(input), autocast(other))


@overridable
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map y = input Wᵀ + b.

    Args:
        input: [..., K].
        weight: [N, K], or [K].
        bias: [N], or [] beside a vector of weights.

    Returns:
        [..., N], or [...] for a vector of weights.

    Gradients: dy W; and with all leading dimensions as rows, dyᵀ input and the sum of dy.
    """
    refuse_complex("linear", input, weight, bias)
    return LinearFunction.apply(autocast(input), autocast(weight), None if bias is None else autocast(bias))


def _left_gradient(dy: Tensor, b: Tensor, matrix: bool) -> Tensor:
    """Compute dA = dY Bᵀ, before it is summed over broadcast dimensions, unless A is one matrix for a batch of B."""
    if matrix and b.dim() > 2:
        return _right_gradient(b.mT, dy.mT, matrix).mT
    return dy @ b.mT


def _right_gradient(a: Tensor, dy: Tensor, matrix: bool) -> Tensor:
    """Compute dB = Aᵀ dY, before it is summed over broadcast dimensions, unless B is one matrix for a batch of A."""
    if matrix:
        # One product over all rows of the batch sums as it goes; a batch of products would be stored, then summed.
        a, dy = a.flatten(0, -2), dy.flatten(0, -2)
    return a.mT @ dy


class MatmulFunction(Function):
    """Y = A B; dA = dY Bᵀ, dB = Aᵀ dY."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, other: Tensor) -> Tensor:
        return torch.matmul(input, other)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, other = inputs
        needs = ctx.needs_input_grad
        ctx.input, ctx.other = layout(input), layout(other)
        ctx.save_for_backward(input if needs[1] else None, other if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        row, column = len(ctx.input[0]) == 1, len(ctx.other[0]) == 1
        # A vector on the left is a matrix of one row, on the right of one column.
        dy = dy.unsqueeze(-1) if column else dy
        dy = dy.unsqueeze(-2) if row else dy
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _left_gradient(dy, b.unsqueeze(-1) if column else b, len(ctx.input[0]) <= 2)
            da = fit(da, ctx.input)
        if ctx.needs_input_grad[1]:
            db = _right_gradient(a.unsqueeze(-2) if row else a, dy, len(ctx.other[0]) <= 2)
            db = fit(db.squeeze(-1) if column else db, ctx.other)
        return da, db


class LinearFunction(Function):
    """Y = X Wᵀ + b; dX = dY W, dW = dYᵀ X, db = Σ dY."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, bias = inputs
        needs = ctx.needs_input_grad
        ctx.weight, ctx.bias = layout(weight), layout(bias)
        ctx.save_for_backward(input if needs[1] else None, weight if needs[0] else None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        db = fit(dy, ctx.bias) if needs[2] else None
        if len(ctx.weight[0]) == 1:
            dy = dy.unsqueeze(-1)
        dx = dy @ (weight if weight.dim() == 2 else weight.unsqueeze(0)) if needs[0] else None
        dw = None
        if needs[1]:
            x, dy = (x, dy) if x.dim() > 1 else (x.unsqueeze(0), dy.unsqueeze(0))
            dw = fit(_right_gradient(dy, x, matrix=True), ctx.weight)
        return dx, dw, db
