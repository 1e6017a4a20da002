"""The compiled attention: which tensors it takes, and how they reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from entrenar.autograd.ops._attention_arguments import new_heads
from entrenar.autograd.ops._library import define, library

MAX_COLUMNS = 256


DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def has_kernel(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, is_causal: bool) -> bool:
    """Whether kernels compute the attention of these tensors, if nothing is masked but the future, and nothing dropped.

    They do for the DTYPES of a device, up to MAX_COLUMNS columns, if leading dimensions are not broadcast; in 16 bits
    on CUDA only if there are no more queries than keys, or all see all.
    """
    own = 3 if enable_gqa else 2
    device, dtype = query.device.type, query.dtype
    return (
        dtype in DTYPES.get(device, ())
        and max(query.shape[-1], value.shape[-1]) <= MAX_COLUMNS
        and query.shape[:-own] == key.shape[:-own] == value.shape[:-own]
        and not (device == "cuda" and dtype != torch.float32 and is_causal and query.shape[-2] > key.shape[-2])
    )


def takes_mask(query: Tensor, mask: Tensor) -> bool:
    """Whether kernels that compute an attention without its mask do so with it: it has no gradient."""
    return (
        query.device == mask.device
        and mask.dtype in (torch.bool, query.dtype)
        and not mask.requires_grad
        and not torch._C._are_functorch_transforms_active()
    )


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The output, and of each query the logarithm of its sum of exponentials, in float32 [B, H, T]."""
    q, k, v = (_heads(x) for x in (query, key, value))
    if mask is None:
        o, lse = torch.ops.entrenar.attention(q, k, v, offsets, scale, causal)
    else:
        o, lse = torch.ops.entrenar.masked_attention(q, k, v, _of_heads(mask, query, key), scale)
    return o.view(*query.shape[:-1], value.shape[-1]), lse


def attention_backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of query, key and value."""
    d_o, q, k, v, o = (_heads(x) for x in (d_output, query, key, value, output))
    if mask is None:
        gradients = torch.ops.entrenar.attention_backward(d_o, q, k, v, o, lse, offsets, scale, causal)
    else:
        heads = _of_heads(mask, query, key)
        gradients = torch.ops.entrenar.masked_attention_backward(d_o, q, k, v, o, lse, heads, scale)
    return tuple(d.view(x.shape) for d, x in zip(gradients, (query, key, value), strict=True))


def _heads(x: Tensor) -> Tensor:
    """[..., H, T, C] as [B, H, T, C] with contiguous columns."""
    while x.dim() < 4:
        x = x.unsqueeze(0)
    x = x.flatten(0, -4)
    return x if x.stride(-1) == 1 else x.contiguous()


def _of_heads(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask that broadcasts to [..., H, T, S] as [B, H, T, S] with 1 in place of any of the first three."""
    fitted = mask.expand(*query.shape[:-1], key.shape[-2])  # or an error
    if query.dim() > 4:
        mask = fitted.flatten(0, -4)
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask.expand(-1, -1, -1, key.shape[-2])


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return new_heads(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _attention_backward_fake(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_heads(q, q.shape[-1]), new_heads(k, k.shape[-1]), new_heads(v, v.shape[-1])


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? offsets, float scale, bool causal) -> (Tensor o, Tensor lse)",
    _attention_fake,
)
define(
    "attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor? offsets, float scale, "
    "bool causal) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward_fake,
)

# By a mask [B, H, T, S], or 1 in place of any of the first three, boolean or of q's dtype and added to the scores.
define(
    "masked_attention(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> (Tensor o, Tensor lse)",
    lambda q, k, v, mask, scale: _attention_fake(q, k, v, None, scale, False),
)
define(
    "masked_attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor mask, "
    "float scale) -> (Tensor dq, Tensor dk, Tensor dv)",
    lambda d_o, q, k, v, o, lse, mask, scale: _attention_backward_fake(d_o, q, k, v, o, lse, None, scale, False),
)


def _more_heads(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """The rule of torch.func.vmap: what is mapped over is more heads."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        def merge(x: Any, dim: int | None) -> Any:
            if not isinstance(x, Tensor) or (x.dtype == torch.int64 and dim is None):
                return x
            if not x.is_floating_point():
                raise NotImplementedError("the offsets of packed sequences must be the same throughout torch.func.vmap")
            x = x.movedim(dim, 1) if dim is not None else x.unsqueeze(1).expand(-1, info.batch_size, *x.shape[1:])
            return x.flatten(1, 2).contiguous()

        results = op(*map(merge, args, in_dims))
        return tuple(y.unflatten(1, (info.batch_size, -1)) for y in results), (1,) * len(results)

    return rule


for _op in (torch.ops.entrenar.attention.default, torch.ops.entrenar.attention_backward.default):
    torch.library.register_vmap(_op, _more_heads(_op), lib=library)
