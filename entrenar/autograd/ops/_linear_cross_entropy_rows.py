"""The losses of rows with logits x Wᵀ, and their gradients in x, by a kernel that holds but a tile of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from entrenar.autograd.ops._library import define

# Beyond these torch's products, with logits in memory, are faster: the kernel packs the classes anew for some rows at a
# time, and keeps these rows' sums in the second-level cache.
LEAST_ROWS = 128
MOST_BYTES = 2048


def has_kernel(input: Tensor, weight: Tensor) -> bool:
    """Whether there is a kernel for these [N, K] and [C, K], and it is worth its while."""
    if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16):
        return False
    return len(input) >= LEAST_ROWS and input.shape[1] * input.element_size() <= MOST_BYTES and len(weight) > 0


def linear_cross_entropy_rows(
    input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The losses, float32 [N], and the gradients of their sum in input, [N, K]: or [0] where they are not wanted.

    Scores, sums and the softmax are float32; with bfloat16, probabilities are rounded to it between the products. Both
    are 0 for ignored targets. Raises RuntimeError for a target that is no class.
    """
    losses, gradient = torch.ops.entrenar.linear_cross_entropy_rows(input, weight, target, ignore_index, wants_gradient)
    return losses, gradient


def linear_cross_entropy_rows_reference(
    input: Tensor, weight: Tensor, target: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy_rows` in plain torch, computed in float32 or input's dtype if that is wider."""
    wide = torch.promote_types(input.dtype, torch.float32)
    x = input.detach().to(wide).requires_grad_()
    with torch.enable_grad():
        losses = torch.nn.functional.cross_entropy(
            x @ weight.to(wide).T, target, ignore_index=ignore_index, reduction="none"
        )
        (gradient,) = torch.autograd.grad(losses.sum(), x)
    return losses.detach(), gradient.to(input.dtype)


def _fake(
    input: Tensor, weight: Tensor, target: Tensor, ignore_index: int, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    return input.new_empty(len(input), dtype=torch.float32), input.new_empty(input.shape if wants_gradient else 0)


define(
    "linear_cross_entropy_rows(Tensor input, Tensor weight, Tensor target, int ignore_index, bool wants_gradient) "
    "-> (Tensor losses, Tensor gradient)",
    _fake,
)
