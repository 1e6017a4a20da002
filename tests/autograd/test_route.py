"""Which operation stands for which of torch's functions, and when none does."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from entrenar.autograd import ops
from entrenar.autograd.route import route

X = torch.rand(2, 2) + 0.5
ROUTED = {
    ops.add: [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__],
    ops.sub: [torch.sub, Tensor.sub, torch.subtract, Tensor.subtract, Tensor.__sub__],
    ops.mul: [torch.mul, Tensor.mul, torch.multiply, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__],
    ops.div: [torch.div, Tensor.div, torch.divide, Tensor.divide, torch.true_divide, Tensor.true_divide],
    ops.pow: [torch.pow, Tensor.pow, Tensor.__pow__],
    ops.matmul: [torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm],
    ops.neg: [torch.neg, Tensor.neg, torch.negative, Tensor.negative, Tensor.__neg__],
    ops.exp: [torch.exp, Tensor.exp],
    ops.log: [torch.log, Tensor.log],
    ops.sqrt: [torch.sqrt, Tensor.sqrt],
    ops.sigmoid: [torch.sigmoid, Tensor.sigmoid, F.sigmoid],
    ops.tanh: [torch.tanh, Tensor.tanh, F.tanh],
    ops.sum: [torch.sum, Tensor.sum],
    ops.mean: [torch.mean, Tensor.mean],
    ops.linear: [F.linear],
    ops.cat: [torch.cat],
    ops.gelu: [F.gelu],
    ops.layer_norm: [F.layer_norm, torch.layer_norm],
    ops.rms_norm: [F.rms_norm, torch.rms_norm],
    ops.scaled_dot_product_attention: [F.scaled_dot_product_attention],
    ops.dropout: [F.dropout],
}


@pytest.mark.parametrize(("ours", "func"), [(ours, func) for ours, theirs in ROUTED.items() for func in theirs])
def test_the_same_function(ours, func):
    required = [p for p in inspect.signature(ours).parameters.values() if p.default is p.empty]
    assert route(func, (X,) * len(required), {}) is ours


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (torch.rsub, (X, 3.0)),
        (Tensor.__rsub__, (X, 3.0)),
        (Tensor.__rtruediv__, (X, 3.0)),
        (Tensor.__rpow__, (X, 3.0)),
        (Tensor.__rmatmul__, (X, 2 * X)),
        (torch.softmax, (X, 0)),
        (Tensor.softmax, (X, 1)),
        (F.softmax, (X, 0)),
        (torch.log_softmax, (X, 0)),
        (Tensor.log_softmax, (X, 1)),
        (F.log_softmax, (X, 0)),
        (torch.softmax, (X, 0, torch.float64)),
        (Tensor.softmax, (X, 0, torch.float64)),
        (F.softmax, (X, 0, 3, torch.float64)),
        (torch.log_softmax, (X, 0, torch.float64)),
        (Tensor.log_softmax, (X, 0, torch.float64)),
        (F.log_softmax, (X, 0, 3, torch.float64)),
        (torch.relu, (X - 1,)),
        (Tensor.relu, (X - 1,)),
        (F.relu, (X - 1,)),
        (F.silu, (X,)),
        (F.embedding, (torch.tensor([1, 0]), X)),
        (F.cross_entropy, (X, torch.tensor([1, 0]))),
        (F.mse_loss, (X, 2 * X)),
    ],
)
def test_equal_results_where_the_arguments_stand_otherwise(func, args):
    target = route(func, args, {})
    assert target is not None
    torch.testing.assert_close(target(*args), func(*args))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.rsub, (X, X.flip(0)), {"alpha": 2}),
        (torch.add, (X, X.flip(0)), {"alpha": 2}),
        (torch.sum, (X,), {"dim": 0, "keepdim": True, "dtype": torch.float64}),
        (Tensor.mean, (X,), {"dim": 0, "keepdim": True, "dtype": torch.float64}),
        (torch.softmax, (X,), {"dim": 0, "dtype": torch.float64}),
        (F.softmax, (X,), {"dim": 0, "dtype": torch.float64}),
        (F.log_softmax, (X,), {"dim": 0, "dtype": torch.float64}),
        (F.relu, (X - 1,), {"inplace": False}),
        (F.silu, (X,), {"inplace": False}),
        (F.cross_entropy, (X, torch.tensor([1, 0])), {"ignore_index": 1, "label_smoothing": 0.5}),
    ],
)
def test_equal_results_with_keywords(func, args, kwargs):
    target = route(func, args, kwargs)
    assert target is not None
    torch.testing.assert_close(target(*args, **kwargs), func(*args, **kwargs))


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (torch.cumsum, (X, 0), {}),
        (torch.add, (X, X), {"out": X}),
        (torch.add, (X, X), {"out": None}),
        (torch.add, (X, 1j), {}),
        (torch.add, (X,), {"x2": X}),
        (torch.mm, (X,), {"mat2": X}),
        (torch.cat, ([X, X],), {"axis": 1}),
        (torch.softmax, (X,), {"axis": 1}),
        (torch.layer_norm, (X, (2,), None, None, 1e-5, False), {}),
        (F.relu, (X,), {"inplace": True}),
        (F.relu, (X, True), {}),
        (F.silu, (X, True), {}),
        (torch.add, (X, X.to(torch.complex64)), {}),
        (F.softmax, (X,), {}),
        (F.log_softmax, (X,), {"dim": None}),
        (torch.sum, (X,), {"axis": 0}),
        (Tensor.mean, (X, 0), {"keepdims": True}),
        (F.embedding, (X, X), {"max_norm": 1.0}),
        (F.embedding, (X, X), {"scale_grad_by_freq": True}),
        (F.embedding, (X, X), {"sparse": True}),
        (F.cross_entropy, (X, X), {"size_average": True}),
        (F.cross_entropy, (X, X), {"reduce": False}),
        (F.mse_loss, (X, X), {"size_average": False}),
        (F.mse_loss, (X, X), {"reduce": True}),
        (F.mse_loss, (X, X[0]), {}),
        (F.mse_loss, (X, X), {"weight": X}),
    ],
)
def test_what_only_torch_can_do_stays_torchs(func, args, kwargs):
    assert route(func, args, kwargs) is None
