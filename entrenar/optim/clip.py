from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients in place so that their global 2-norm is at most `max_norm`; returns the norm before that.

    The norm (a scalar tensor) is that of all gradients of `parameters` as one vector; parameters without a gradient do
    not count. Equal to `torch.nn.utils.clip_grad_norm_`; `max_norm=inf` only measures.

    Raises ValueError unless max_norm > 0, and RuntimeError, leaving the gradients as they are, if the norm is not
    finite: scaling by it would turn every gradient into NaN or zero, and one step later every weight.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be greater than 0, and is {max_norm!r}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not norm.isfinite():
        why = why_not_finite((f"parameter {i}", p) for i, p in enumerate(parameters))
        raise RuntimeError(
            f"the gradients' norm is {norm.item()}: {why}; look for what overflowed, or scale the loss down"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def why_not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Why the norm of these parameters' gradients is not finite, in words: the first gradient that is not, by name."""
    for name, p in named:
        if p.grad is not None and not p.grad.isfinite().all():
            return f"the gradient of {name}, of shape {tuple(p.shape)}, has NaN or infinite values"
    return "every gradient is finite, but their squares overflow"
