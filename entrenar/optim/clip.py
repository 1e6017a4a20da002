from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

import torch
from torch import Tensor

from entrenar.autograd.ops._kernel import DEVICES, DTYPES, PLAIN
from entrenar.autograd.ops._library import define

define("grad_norm(Tensor[] grads, float max_norm) -> Tensor", lambda grads, max_norm: grads[0].new_empty(2))


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


def global_norm(grads: list[Tensor], max_norm: float, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The 2-norm of all gradients as one vector, and the factor that makes it `max_norm` at most; NaN if not finite.

    Where the gradients are multiplied by a `scale`, the norm is that of what they were, and the factor undoes it too.
    """
    devices, dtypes = ({*map(attrgetter(name), grads)} for name in ("device", "dtype"))
    plain = PLAIN.issuperset(map(type, grads)) and DTYPES.issuperset(dtypes)
    if plain and len(devices) == 1 and grads[0].device.type in DEVICES:
        norm, factor = torch.ops.entrenar.grad_norm([grad.contiguous() for grad in grads], max_norm)
        if scale is None:
            return norm, factor
    else:
        norm = torch.nn.utils.get_total_norm(grads).float()
    if scale is not None:
        norm = norm / scale.to(norm.device)
    factor = torch.where(norm.isfinite(), (max_norm / (norm + 1e-6)).clamp(max=1.0), torch.nan)
    return norm, factor if scale is None else factor / scale.to(norm.device)
