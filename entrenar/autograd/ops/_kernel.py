"""Where the kernels of csrc/ compute an op, instead of its formula in torch calls."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
DEVICES = {"cpu", "cuda"}
PLAIN = {Tensor, torch.nn.Parameter}


def has_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these tensors: of one dtype that they know, on one device, plain and strided.

    The formula stays where a graph of it is wanted (double backward, torch.func), and for torch.compile, which fuses
    it.
    """
    dtype, device = x.dtype, x.device
    if dtype not in DTYPES or device.type not in DEVICES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for tensor in (x, *others):
        if tensor is not None and not (
            tensor.dtype is dtype
            and type(tensor) in PLAIN
            and tensor.device == device
            and tensor.layout is torch.strided
        ):
            return False
    return True
