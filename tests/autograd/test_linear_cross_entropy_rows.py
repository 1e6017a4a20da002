"""The kernel of linear_cross_entropy against float64, at every CPU level."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from entrenar.autograd.ops import _linear_cross_entropy_rows as module
from entrenar.autograd.ops import linear_cross_entropy
from entrenar.autograd.ops._linear_cross_entropy_rows import (
    linear_cross_entropy_rows,
    linear_cross_entropy_rows_reference,
)

IGNORED = -100
KINDS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
EVERY_LEVEL = pytest.mark.usefixtures("backend", "poisoned")


def problem(rows: int, width: int, classes: int, dtype: torch.dtype, size: float = 1.0) -> tuple[Tensor, ...]:
    """Rows and classes with logits of about this size, and targets of which some are ignored."""
    torch.manual_seed(rows + width + classes)
    x, weight = (size * torch.randn(rows, width)).to(dtype), (torch.randn(classes, width) / width**0.5).to(dtype)
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < 0.2, IGNORED)
    return x, weight, target


def check(x: Tensor, weight: Tensor, target: Tensor) -> None:
    """Losses and gradients are as near to float64 as their roundings allow.

    A score is off by e = 2^-24 (8 + K) |x| |w|ᵀ, with bfloat16 a power of 2 by 2.7e-6 of itself, and sums by a few
    roundings more. So a loss is off by the largest e of its row, and by its own rounding; probabilities by as much of
    themselves, and with bfloat16 by 2^-9, once for the product and once for the result. The target's, p - 1, is minus
    the sum of the others: an error of theirs is one of its own, relative. Probabilities below 2^-125 are lost; so
    are digits of float64's own p - 1.
    """
    losses, dx = linear_cross_entropy_rows(x, weight, target, IGNORED, True)
    without, nothing = linear_cross_entropy_rows(x, weight, target, IGNORED, False)
    assert losses.dtype == torch.float32
    assert dx.dtype == x.dtype
    assert nothing.numel() == 0
    assert torch.equal(losses, without)

    wide, w = x.double(), weight.double()
    expected, gradient = linear_cross_entropy_rows_reference(wide, w, target, IGNORED)
    score_error = 2**-24 * (8 + x.shape[1]) * (wide.abs() @ w.abs().T).amax(-1)
    relative = score_error + 3e-6 + 2**-24 * len(weight) ** 0.5
    p = (wide @ w.T).softmax(-1)
    counts = target != IGNORED
    others = p.clone()
    others[counts, target[counts]] = 0
    others[~counts] = 0
    spread = others @ w.abs()
    spread[counts] += others[counts].sum(-1, keepdim=True) * w[target[counts]].abs()
    lost = (2**-124 * len(w) + 2**-50) * w.abs().amax(0)
    u = 2 * relative + (2**-8 if x.dtype == torch.bfloat16 else 0)
    excess = (losses - expected).abs() - relative - 2**-23 * expected.abs()
    assert (excess <= 0).all(), f"a loss is off by {excess.max():.3g} more than its roundings"
    excess = (dx - gradient).abs() - u[:, None] * (spread + gradient.abs()) - lost
    assert (excess <= 0).all(), f"a gradient is off by {excess.max():.3g} more than its roundings"
    assert not losses[~counts].any()
    assert not dx[~counts].any()


@EVERY_LEVEL
@KINDS
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (5, 7, 3), (40, 33, 300), (70, 64, 256), (100, 576, 1000), (33, 65, 257), (300, 512, 513)]
)
def test_sizes(sizes, dtype):
    check(*problem(*sizes, dtype))


@KINDS
def test_any_index_can_be_ignored(dtype):
    x, weight, _ = problem(40, 33, 50, dtype)
    target = torch.randint(0, 3, (40,))
    losses, dx = linear_cross_entropy_rows(x, weight, target, 2, True)
    expected, gradient = linear_cross_entropy_rows_reference(x, weight, target, 2)
    assert not losses[target == 2].any()
    assert losses[target != 2].all()
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, gradient, rtol=0, atol=1e-5 if dtype is torch.float32 else 2**-7)


@pytest.mark.parametrize(
    ("rows", "columns", "classes", "dtype", "device", "worthwhile"),
    [
        (128, 1024, 1, torch.bfloat16, "cpu", True),
        (128, 512, 1, torch.float32, "cpu", True),
        (127, 1024, 1, torch.bfloat16, "cpu", False),
        (128, 1025, 1, torch.bfloat16, "cpu", False),
        (128, 513, 1, torch.float32, "cpu", False),
        (128, 1024, 0, torch.bfloat16, "cpu", False),
        (128, 256, 1, torch.float16, "cpu", False),
        (128, 256, 1, torch.float64, "cpu", False),
        (128, 256, 1, torch.float32, "meta", False),
    ],
)
def test_the_kernel_is_for_many_short_rows_on_the_cpu(rows, columns, classes, dtype, device, worthwhile):
    x, weight = (torch.empty(n, columns, dtype=dtype, device=device) for n in (rows, classes))
    assert module.has_kernel(x, weight) == worthwhile


@given(st.tuples(st.integers(1, 140), st.integers(1, 150), st.integers(1, 800)), st.sampled_from([0.1, 3.0, 40.0]))
@settings(max_examples=60, deadline=None)
def test_any_size(sizes, size):
    for dtype in (torch.float32, torch.bfloat16):
        check(*problem(*sizes, dtype, size))


@EVERY_LEVEL
@KINDS
@pytest.mark.parametrize("step", [30.0, -30.0], ids=["rising", "falling"])
def test_scores_that_change_from_tile_to_tile(step, dtype):
    """By up to 30 a tile of 256 classes, and with each row by more, so that only some are summed anew at a time."""
    x, weight, target = problem(70, 8, 1500, dtype)
    x[:, 0], weight[:, 0] = torch.linspace(0, 1, 70), step * torch.arange(1500) / 256
    check(x, weight, target)


@EVERY_LEVEL
@KINDS
def test_a_target_that_is_nearly_certain_keeps_its_digits(dtype):
    x, weight, target = problem(64, 16, 400, dtype)
    target = target.clamp(min=0)
    weight[:, -1], x[:, -1] = 0, 1
    weight[target, -1] = 25
    check(x[:1], weight.index_fill(0, target[1:], 0), target[:1])
    _, dx = linear_cross_entropy_rows(x[:1], weight.index_fill(0, target[1:], 0), target[:1], IGNORED, True)
    assert 0 < dx.abs().max() < 1e-6


@EVERY_LEVEL
@KINDS
def test_threads_make_no_difference(dtype):
    args = problem(700, 80, 600, dtype)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear_cross_entropy_rows(*args, IGNORED, True))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERY_LEVEL
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_row(bad):
    x, weight, target = problem(130, 16, 300, torch.bfloat16)
    target = target.clamp(min=0)
    x[7, 3] = bad
    losses, dx = linear_cross_entropy_rows(x, weight, target, IGNORED, True)
    assert losses.isfinite().tolist() == [row != 7 for row in range(130)]
    assert dx.isfinite().all(-1).tolist() == [row != 7 for row in range(130)]


def test_no_rows_and_strided_rows():
    x, weight, target = problem(6, 8, 5, torch.float32)
    losses, dx = linear_cross_entropy_rows(x[:0], weight, target[:0], IGNORED, True)
    assert losses.shape == (0,)
    assert dx.shape == (0, 8)
    strided = x.T.contiguous().T, weight.T.contiguous().T, target.repeat_interleave(2)[::2]
    for a, b in zip(
        linear_cross_entropy_rows(*strided, IGNORED, True),
        linear_cross_entropy_rows(x, weight, target, IGNORED, True),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wants_gradient", [True, False])
def test_opcheck(wants_gradient):
    args = (*problem(9, 8, 5, torch.float32), IGNORED, wants_gradient)
    results = torch.library.opcheck(torch.ops.entrenar.linear_cross_entropy_rows.default, args)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, t: (x, w, t + 5), "Target 5 is out of bounds: row 0 has 5 classes"),
        (lambda x, w, t: (x, w, t - 1), "Target -1 is out of bounds: row 0 has 5 classes"),
        (lambda x, w, t: (x, w[:, 1:], t), "as many columns"),
        (lambda x, w, t: (x, w.bfloat16(), t), "weight must have the dtype of x"),
        (lambda x, w, t: (x.half(), w.half(), t), "x must be float32 or bfloat16"),
        (lambda x, w, t: (x, w, t[1:]), "target must be int64, contiguous, with 6 elements"),
        (lambda x, w, t: (x, w, t.int()), "target must be int64"),
    ],
)
def test_refuses(change, message):
    x, weight, _ = problem(6, 8, 5, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        linear_cross_entropy_rows(*change(x, weight, torch.zeros(6, dtype=torch.int64)), IGNORED, True)


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_takes_it_for_frozen_classes(dtype, reduction, monkeypatch):
    x, weight, target = problem(module.LEAST_ROWS, 24, 70, dtype)
    taken = []
    op = linear_cross_entropy_rows

    def record(*args):
        taken.append(args[-1])
        return op(*args)

    caller = importlib.import_module("entrenar.autograd.ops.linear_cross_entropy")
    monkeypatch.setattr(caller, "linear_cross_entropy_rows", record)
    x.requires_grad_()
    y = linear_cross_entropy(x, weight, target, reduction=reduction)
    (gradient,) = torch.autograd.grad(3 * y, x)
    assert taken == [True]
    losses, dx = op(x.detach(), weight, target, IGNORED, True)
    count = (target != IGNORED).sum() if reduction == "mean" else 1
    torch.testing.assert_close(y, losses.sum() / count)
    torch.testing.assert_close(gradient, 3 * dx / count)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x, weight, target, reduction=reduction), y)
    assert taken == [True, False]
    linear_cross_entropy(x[1:], weight, target[1:])
    linear_cross_entropy(x, weight, target, linear_bias=torch.zeros(70, dtype=dtype))
    linear_cross_entropy(x, weight.clone().requires_grad_(), target)
    linear_cross_entropy(x.detach().repeat(1, 2048 // 24), weight.repeat(1, 2048 // 24), target)
    assert taken == [True, False]
