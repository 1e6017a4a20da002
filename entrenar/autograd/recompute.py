"""Tensors that a backward computes anew instead of keeping them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def recomputed(value: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Iterator[None]:
    """Inside, an operation that would keep `value` for its backward keeps nothing: `function(*inputs)` is called there.

    The inputs are kept, which costs nothing where the operation that made `value` of them keeps them too. `function`
    must give the same bits again. Where other hooks on saved tensors are active this does nothing (activation
    checkpointing, for one, keeps neither the value nor the inputs), and neither does it under torch.compile, which
    decides for itself what is kept.
    """
    if not value.requires_grad or torch.compiler.is_compiling() or _other_hooks():
        yield
        return
    inputs = tuple(x.detach() for x in inputs)
    pointer, size = value.data_ptr(), value.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        same = tensor.data_ptr() == pointer and tensor.numel() == size and tensor.is_contiguous()
        return tensor.shape if same else tensor

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return function(*inputs).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _other_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
