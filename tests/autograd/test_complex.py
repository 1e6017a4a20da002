"""Complex values are refused wherever an operation takes a tensor, a number or a dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from entrenar.autograd import ops

X, ROW = torch.ones(2, 2), torch.ones(2)
CLASSES = torch.zeros(2, dtype=torch.int64)
IMAGES = torch.ones(1, 2, 2, 2)
CALLS = {
    "add": ((X, X), {"alpha": 1.0}),
    "sub": ((X, X), {"alpha": 1.0}),
    "mul": ((X, 2.0), {}),
    "div": ((2.0, X), {}),
    "neg": ((X,), {}),
    "pow": ((X, X), {}),
    "exp": ((X,), {}),
    "log": ((X,), {}),
    "sqrt": ((X,), {}),
    "sum": ((X, 0), {"dtype": torch.float32}),
    "mean": ((X, 0), {"dtype": torch.float32}),
    "reshape": ((X, (4,)), {}),
    "transpose": ((X, 0, 1), {}),
    "permute": ((X, (1, 0)), {}),
    "expand": ((X, (2, 2, 2)), {}),
    "cat": (([X, X],), {}),
    "getitem": ((X, 0), {}),
    "matmul": ((X, X), {}),
    "linear": ((X, X, ROW), {}),
    "embedding": ((CLASSES, X), {}),
    "dropout": ((X,), {}),
    "relu": ((X,), {}),
    "gelu": ((X,), {}),
    "silu": ((X,), {}),
    "sigmoid": ((X,), {}),
    "tanh": ((X,), {}),
    "softmax": ((X, 0), {"dtype": torch.float32}),
    "log_softmax": ((X, 0), {"dtype": torch.float32}),
    "cross_entropy": ((X, X, ROW), {}),
    "mse_loss": ((X, X), {"weight": X}),
    "layer_norm": ((X, (2,), ROW, ROW), {}),
    "rms_norm": ((X, (2,), ROW), {}),
    "scaled_dot_product_attention": ((IMAGES, IMAGES, IMAGES), {}),
    "rotary_embedding": ((X, X, X), {}),
    "swiglu": ((X, X), {}),
    "add_rms_norm": ((X, X, ROW), {}),
    "packed_attention": ((IMAGES[0], IMAGES[0], IMAGES[0], torch.tensor([0, 2])), {}),
}


def spoiled(value: object) -> Iterator[object]:
    """`value` with one real thing in it made complex, in every way."""
    if isinstance(value, dict):
        yield from ({**value, key: bad} for key, item in value.items() for bad in spoiled(item))
    elif isinstance(value, (tuple, list)):
        yield from ([*value[:i], bad, *value[i + 1 :]] for i, item in enumerate(value) for bad in spoiled(item))
    elif isinstance(value, float):
        yield complex(value)
    elif isinstance(value, torch.dtype):
        yield torch.complex64
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield value.to(torch.complex64)


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_looked_at(name):
    args, kwargs = CALLS[name]
    op = getattr(ops, name)
    op(*args, **kwargs)
    calls = list(spoiled((args, kwargs)))
    assert calls
    for bad_args, bad_kwargs in calls:
        message = (
            rf"^{name} does not take complex values, and was given (torch\.complex64|a complex number): use torch\."
        )
        with pytest.raises(TypeError, match=message):
            op(*bad_args, **bad_kwargs)


def test_every_operation_is_tried():
    others = {
        "attention",
        "mse",
        "cpu_level",
        "set_cpu_level",
        "linear_cross_entropy",
        "head_cross_entropy",
        *(name for name in ops.__all__ if "int4" in name),
    }
    assert CALLS.keys() == {*ops.__all__} - others
