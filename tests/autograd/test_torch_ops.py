"""Our ops against torch's of the same name, on torch's own test inputs."""

from __future__ import annotations

import pytest
import torch
from op_db import (
    DTYPES,
    Twin,
    check_derivatives,
    check_errors,
    check_forward,
    check_gradients,
    check_no_forward_mode,
    check_refuses_complex,
    check_transforms,
    error_inputs,
    samples,
    twin_params,
)

from entrenar.autograd import ops

TWINS = [
    Twin(ops.add, "add"),
    Twin(ops.sub, "sub"),
    Twin(ops.mul, "mul"),
    Twin(ops.div, "div", "no_rounding_mode"),
    Twin(ops.div, "div", "trunc_rounding"),
    Twin(ops.div, "div", "floor_rounding"),
    Twin(ops.neg, "neg"),
    Twin(ops.pow, "pow"),
    Twin(ops.exp, "exp"),
    Twin(ops.log, "log"),
    Twin(ops.sqrt, "sqrt"),
    Twin(ops.sum, "sum"),
    Twin(ops.mean, "mean"),
    Twin(ops.reshape, "reshape"),
    Twin(ops.transpose, "transpose"),
    Twin(ops.permute, "permute"),
    Twin(ops.expand, "broadcast_to"),
    Twin(ops.cat, "cat"),
    Twin(ops.getitem, "__getitem__"),
    Twin(ops.matmul, "matmul"),
    Twin(ops.linear, "nn.functional.linear"),
    Twin(ops.relu, "nn.functional.relu"),
    Twin(ops.gelu, "nn.functional.gelu"),
    Twin(ops.silu, "nn.functional.silu"),
    Twin(ops.sigmoid, "sigmoid"),
    Twin(ops.tanh, "tanh"),
    Twin(ops.softmax, "softmax"),
    Twin(ops.softmax, "softmax", "with_dtype"),
    Twin(ops.log_softmax, "log_softmax"),
    Twin(ops.log_softmax, "log_softmax", "with_dtype"),
    Twin(ops.cross_entropy, "nn.functional.cross_entropy", exact=False, wide=True),
    Twin(ops.mse_loss, "nn.functional.mse_loss", wide=True),
]


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES, torch.int64, torch.bool))
def test_forward_is_torchs(twin, dtype):
    for sample in samples(twin, dtype):
        check_forward(twin, sample)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES))
def test_gradients_are_torchs(twin, dtype):
    for sample in samples(twin, dtype):
        check_gradients(twin, sample)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_derivatives_are_those_of_finite_differences(twin, dtype):
    for sample in samples(twin, dtype, limit=12):
        check_derivatives(twin, sample)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_vmap_works(twin, dtype):
    for sample in samples(twin, dtype, limit=12):
        check_transforms(twin, sample)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_jvp_says_that_it_does_not_work(twin, dtype):
    check_no_forward_mode(twin, samples(twin, dtype)[0])


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float32))
def test_complex_values_are_refused(twin, dtype):
    check_refuses_complex(twin, samples(twin, dtype)[0])


@pytest.mark.parametrize("twin", [twin for twin in TWINS if error_inputs(twin)], ids=str)
def test_refuses_what_torch_refuses(twin):
    check_errors(twin)


def block(x, w, b, g, t):
    """Every op once."""
    h = ops.gelu(ops.linear(x, w, b), approximate="tanh")
    h = ops.sub(ops.mul(ops.add(h, ops.silu(x), alpha=0.5), g), ops.div(x, 3.0))
    q = ops.transpose(ops.reshape(h, (2, 5, 2, 4)), 1, 2)
    scores = ops.softmax(ops.matmul(q, ops.permute(q, (0, 1, 3, 2))), -1)
    y = ops.reshape(ops.transpose(ops.matmul(scores, q), 1, 2), (2, 5, 8))
    y = ops.getitem(ops.cat([y, ops.expand(g, (2, 5, 8))], -1), (..., slice(2, 10)))
    y = ops.add(y, ops.getitem(w, t))
    y = ops.div(y, ops.sqrt(ops.mean(ops.pow(y, 2), -1, keepdim=True)))
    y = ops.add(ops.tanh(y), ops.relu(ops.neg(ops.sigmoid(y))))
    y = ops.sub(y, ops.log(ops.sum(ops.exp(y), -1, keepdim=True)))
    loss = ops.cross_entropy(ops.reshape(ops.log_softmax(y, -1), (10, 8)), ops.reshape(t, (10,)), label_smoothing=0.1)
    return ops.add(loss, ops.mse_loss(y, h))


# Torch's compiler makes an object of a class that torch itself warns against making.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks():
    inputs = [torch.randn(*size, requires_grad=True) for size in ((2, 5, 8), (8, 8), (8,), (8,))]
    t = torch.randint(0, 8, (2, 5))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    actual, expected = (f(*inputs, t) for f in (compiled, block))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))
