"""cross_entropy and mse_loss in every combination of their arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from entrenar.autograd import ops

REDUCTION = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
SHAPES = [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2), (0, 5)]


def first_and_second_derivatives(function, inputs):
    y = function(*inputs)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=generator).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    along = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in first]
    second = torch.autograd.grad(first, [*inputs, dy], along, allow_unused=True, materialize_grads=True)
    return y, *first, *second


@REDUCTION
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("weighted", "smoothing"), [*itertools.product([False, True], [0.0, 0.2, 1.0])])
def test_cross_entropy_with_classes(shape, weighted, smoothing, reduction):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, shape[:1] * (len(shape) > 1) + shape[2:])
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    for ignore in (-100, 2):
        options = dict(weight=weight, label_smoothing=smoothing, reduction=reduction, ignore_index=ignore)
        actual, expected = (
            first_and_second_derivatives(lambda x, f=f: f(x, target, **options), [x])  # noqa: B023
            for f in (ops.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(actual, expected, equal_nan=True)


@REDUCTION
@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_with_probabilities(shape, smoothing, reduction):
    x, target = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for inputs in ([x, target], [x, target, weight]):
        actual, expected = (
            first_and_second_derivatives(
                lambda *inputs, f=f: f(*inputs, label_smoothing=smoothing, reduction=reduction), inputs
            )
            for f in (ops.cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_targets_get_no_gradient_even_where_nothing_else_is(smoothing):
    x = torch.randn(4, 5, requires_grad=True)
    ops.cross_entropy(x, torch.full((4,), -100), label_smoothing=smoothing).backward()
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_16_bit_losses_are_those_of_float32(dtype):
    # Where the kernel's float32 mean differs from torch's in its last bits, it may round to the neighbour.
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    x, target = torch.randn(4096, 30).to(dtype), torch.randint(0, 30, (4096,))
    for options in ({}, {"label_smoothing": 0.1}, {"weight": torch.rand(30).to(dtype)}):
        wide = {key: value.float() if key == "weight" else value for key, value in options.items()}
        expected = F.cross_entropy(x.float(), target, **wide).to(dtype)
        torch.testing.assert_close(ops.cross_entropy(x, target, **options), expected, rtol=step, atol=0)


def test_cross_entropy_keeps_the_logits_and_nothing_of_their_size():
    x, target = torch.randn(50, 20, requires_grad=True), torch.randint(0, 20, (50,))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.cross_entropy(x, target)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), target.data_ptr()]


def test_weight_of_classes_has_no_gradient():
    x, weight = torch.randn(4, 5), torch.rand(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradient in the weight"):
        ops.cross_entropy(x, torch.zeros(4, dtype=torch.long), weight)


@REDUCTION
def test_mse_loss_with_weight(reduction):
    inputs = [torch.rand(4, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    actual, expected = (
        first_and_second_derivatives(lambda x, t, w, f=f: f(x, t, weight=w, reduction=reduction), inputs)
        for f in (ops.mse, F.mse_loss)
    )
    torch.testing.assert_close(actual, expected)


def test_mse_loss_broadcasts_with_torchs_warning():
    inputs = [torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)]
    results = []
    for f in (ops.mse_loss, F.mse_loss):
        with pytest.warns(UserWarning, match="target size"):
            y = f(*inputs)
        results.append(torch.autograd.grad(y, inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("op", [ops.cross_entropy, ops.mse_loss])
def test_older_names_of_reduction_are_refused(op):
    x = torch.randn(4, 5)
    for older in ({"size_average": True}, {"reduce": False}):
        with pytest.raises(TypeError, match="use reduction"):
            op(x, x, **older)


def test_losses_are_float32_under_autocast():
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        losses = [ops.cross_entropy(x, torch.zeros(4, dtype=torch.long)), ops.mse_loss(x, x.detach())]
    for loss in losses:
        assert loss.dtype == torch.float32
        assert torch.autograd.grad(loss, x)[0].dtype == torch.bfloat16


@REDUCTION
@pytest.mark.parametrize(
    ("input", "target", "weight"),
    [(torch.int64, torch.int64, torch.float32), (torch.float16, torch.float16, torch.float32)],
    ids=str,
)
def test_a_weight_of_squared_errors_counts_for_the_dtype(input, target, weight, reduction):
    x, t, w = torch.tensor([1, 2]).to(input), torch.tensor([0, 0]).to(target), torch.tensor([0.3, 0.3], dtype=weight)
    y = ops.mse_loss(x, t, reduction=reduction, weight=w)
    expected = F.mse_loss(x, t, reduction=reduction, weight=w)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected)


def test_squared_errors_to_booleans():
    x, t = torch.randn(3, requires_grad=True), torch.tensor([True, False, True])
    (dx,) = torch.autograd.grad(ops.mse_loss(x, t), x)
    torch.testing.assert_close(dx, 2 * (x - t.float()) / 3)


def test_classes_as_bytes():
    x, t = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 4, 2], dtype=torch.uint8)
    found, expected = (torch.autograd.grad(ops.cross_entropy(x, each), x) for each in (t, t.long()))
    assert torch.equal(*found, *expected)


def test_losses_and_products_on_the_meta_device():
    x, w = torch.ones(3, 4, device="meta"), torch.ones(5, 4, device="meta")
    assert ops.linear(x, w).shape == (3, 5)
    assert ops.cross_entropy(ops.linear(x, w), torch.zeros(3, dtype=torch.int64, device="meta")).shape == ()
    assert ops.mse_loss(x, x).is_meta
