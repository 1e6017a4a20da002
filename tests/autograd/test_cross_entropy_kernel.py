"""The kernels of the cross entropy on rows of any length, and on what is not finite."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from float64 import TOLERANCE, assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pointwise_kernels import used

from entrenar.autograd import ops
from entrenar.autograd.ops._cross_entropy import (
    cross_entropy_gradient_reference,
    cross_entropy_losses_reference,
    losses_of,
    turn_into_gradient,
)

DTYPES = (torch.float32, torch.bfloat16)
# Vectors of 4, 8 and 16 floats, four at a time, and sums of 16 such steps: at, below and above a whole number of each.
CLASSES = sorted({n + d for n in (4, 8, 16, 32, 64, 256, 1024, 2048) for d in (-1, 0, 1)} | {1, 2})


def check(logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -100) -> None:
    wide = logits.double()
    one = torch.ones(len(logits), dtype=torch.float64)
    gradient = logits.clone(memory_format=torch.contiguous_format)
    losses = turn_into_gradient(gradient, target, ignore_index)
    assert losses.dtype == torch.float32
    assert_close(losses, cross_entropy_losses_reference(wide, target, ignore_index), TOLERANCE[torch.float32])
    expected = cross_entropy_gradient_reference(wide, target, one, ignore_index)
    assert_close(gradient, expected, TOLERANCE[logits.dtype])
    assert torch.equal(losses_of(logits, target, ignore_index), losses)
    apart = torch.ops.entrenar.cross_entropy_gradient(logits, target, one.float(), ignore_index)
    assert torch.equal(apart, gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_rows_of_any_length(classes, dtype, backend):
    logits = (4 * torch.randn(3, classes)).to(dtype)
    for target in (0, classes // 2, classes - 1):
        check(logits, torch.tensor([target, -100, target]))


@pytest.mark.parametrize(("classes", "dtype"), [(60000, torch.float32), (128256, torch.bfloat16)])
def test_rows_that_no_cache_holds(classes, dtype, backend):
    check((4 * torch.randn(2, classes)).to(dtype), torch.tensor([7, classes - 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_that_begin_anywhere(dtype, backend):
    target, one = torch.tensor([0, 40, -100]), torch.ones(3)
    for offset in range(9):
        logits = torch.randn(offset + 3 * 41).to(dtype)[offset:].view(3, 41)
        wide = logits.double()
        losses = cross_entropy_losses_reference(wide, target, -100)
        gradient = cross_entropy_gradient_reference(wide, target, one, -100)
        assert_close(losses_of(logits, target, -100), losses, TOLERANCE[torch.float32])
        apart = torch.ops.entrenar.cross_entropy_gradient(logits, target, one, -100)
        assert_close(apart, gradient, TOLERANCE[dtype])
        turn_into_gradient(logits, target, -100)
        assert_close(logits, gradient, TOLERANCE[dtype])


@given(
    st.integers(0, 40),
    st.integers(1, 400),
    st.sampled_from([0.0, 0.1, 5.0, 80.0, 1e4]),
    st.sampled_from([0.0, -1e6, 1e6]),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_logits(rows, classes, size, shift, dtype, strided, seed):
    torch.manual_seed(seed)
    logits = (size * torch.randn(rows, classes * (1 + strided)) + shift).to(dtype)[:, :: 1 + strided]
    target = torch.randint(-1, classes, (rows,))
    check(logits, target, ignore_index=-1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_treated_as_by_torch(dtype, backend):
    inf, nan = float("inf"), float("nan")
    values = (inf, -inf, nan, 3e38, -3e38, 1e-40, 0.0, -0.0)
    rows = [[a, b, 1.0, *[-2.0] * 30, c] for a, b, c in itertools.product(values, repeat=3)]
    rows += [[-inf] * 5 + [0.5] * 29, [-inf] * 34, [inf] * 34]
    logits, target = torch.tensor(rows).to(dtype), torch.tensor([0, 33]).repeat(len(rows))[: len(rows)]
    expected = F.cross_entropy(logits.float(), target, reduction="none")
    torch.testing.assert_close(losses_of(logits, target, -100), expected, equal_nan=True)
    gradient = cross_entropy_gradient_reference(logits, target, torch.ones(len(rows)), -100)
    turn_into_gradient(logits, target, -100)
    torch.testing.assert_close(logits, gradient, equal_nan=True)


def test_a_probability_near_one_keeps_its_small_gradient(backend):
    logits = torch.zeros(1, 50)
    logits[0, 7] = 30.0
    turn_into_gradient(logits, torch.tensor([7]), -100)
    # All others together have 49 e^-30; what softmax - 1 rounds at is 2^-24.
    assert logits[0, 0].item() == pytest.approx(9.357623e-14, rel=1e-6)
    assert abs(logits[0, 7].item()) <= 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_rows_are_not_looked_at(dtype, backend):
    logits = torch.full((2, 40), float("nan"), dtype=dtype)
    losses = turn_into_gradient(logits, torch.tensor([3, 3]), 3)
    assert not losses.any()
    assert not logits.any()


@pytest.mark.cpu("on CUDA an assertion of the kernel fails")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_a_target_that_is_no_class_is_named_before_anything_is_written(bad, dtype):
    logits = torch.randn(3, 5).to(dtype)
    before = logits.clone()
    for op in (losses_of, turn_into_gradient):
        with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds: row 1 has 5 classes"):
            op(logits, torch.tensor([0, bad, 9]), -100)
    assert torch.equal(logits, before)
    with pytest.raises(RuntimeError, match=rf"Target {bad} is out of bounds: row 0 has 5 classes"):
        torch.ops.entrenar.cross_entropy_gradient(logits, torch.tensor([bad, 0, 0]), torch.ones(3), -100)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.randn(3, 5), torch.zeros(3, dtype=torch.int32), "target must be int64"),
        (torch.randn(3, 5), torch.zeros(2, dtype=torch.int64), "with 3 elements"),
        (torch.randn(3), torch.zeros(3, dtype=torch.int64), "contiguous matrix"),
        (torch.randn(5, 3).T, torch.zeros(3, dtype=torch.int64), "contiguous matrix"),
        (torch.randn(3, 5).double(), torch.zeros(3, dtype=torch.int64), "float32 or bfloat16"),
    ],
)
def test_the_operator_refuses_bad_input(logits, target, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.cross_entropy_gradient_(logits, target, -100)


def test_the_operator_refuses_scales_that_do_not_match():
    logits, target = torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)
    for scale in (torch.ones(2), torch.ones(3, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match="scale must be float32 with 3 elements"):
            torch.ops.entrenar.cross_entropy_gradient(logits, target, scale, -100)


def test_opcheck_in_place():
    target = torch.tensor([0, 4, -100])
    results = torch.library.opcheck(
        torch.ops.entrenar.cross_entropy_gradient_.default, (torch.randn(3, 5), target, -100)
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_threads(dtype, backend):
    logits, target = torch.randn(50, 3000).to(dtype), torch.randint(0, 3000, (50,))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        gradient = logits.clone()
        results.append((turn_into_gradient(gradient, target, -100), gradient))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_and_its_gradient_are_those_of_float64(reduction, dtype, backend):
    target = torch.randint(0, 90, (33,))
    target[5] = 2
    x = torch.randn(33, 90).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    loss, expected = (
        f(v, target, reduction=reduction, ignore_index=2) for f, v in ((ops.cross_entropy, x), (F.cross_entropy, wide))
    )
    dy = torch.randn(expected.shape).to(dtype)
    assert_close(loss, expected, TOLERANCE[dtype])
    (gradient,), (wanted,) = torch.autograd.grad(loss, x, dy), torch.autograd.grad(expected, wide, dy.double())
    assert gradient.dtype == dtype
    assert_close(gradient, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "settings", "by_kernel"),
    [
        ((5,), {}, True),
        ((4, 5), {}, True),
        ((4, 5), {"ignore_index": 0, "reduction": "sum"}, True),
        ((4, 5, 3), {}, False),
        ((4, 5), {"weight": [1.0] * 5}, False),
        ((4, 5), {"label_smoothing": 0.1}, False),
    ],
)
def test_kernels_run_where_they_can(shape, settings, by_kernel):
    x, target = torch.randn(shape, requires_grad=True), torch.zeros(shape[:1] * (len(shape) > 1) + shape[2:]).long()
    settings = {name: torch.tensor(value) if name == "weight" else value for name, value in settings.items()}
    kernels = {"cross_entropy_losses", "cross_entropy_gradient"} if by_kernel else set()
    assert used(lambda: ops.cross_entropy(x, target, **settings).backward()) == kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivative_of_cross_entropy_is_torchs(dtype):
    results = []
    x = torch.randn(7, 9).to(dtype).requires_grad_()
    for f in (ops.cross_entropy, F.cross_entropy):
        (dx,) = torch.autograd.grad(f(x.float(), torch.arange(7)), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1)])
def test_vmap(in_dims):
    x, target = torch.randn(3, 4, 6), torch.randint(0, 6, (3, 4))
    x = x[0] if in_dims[0] is None else x.movedim(0, in_dims[0])
    target = target[0] if in_dims[1] is None else target.movedim(0, in_dims[1])
    for f in (lambda op: op, torch.func.grad):
        actual, expected = (torch.func.vmap(f(op), in_dims)(x, target) for op in (ops.cross_entropy, F.cross_entropy))
        torch.testing.assert_close(actual, expected)


def test_a_batch_of_gradients():
    x, target = torch.randn(4, 6, requires_grad=True), torch.randint(0, 6, (4,))
    results = []
    for op in (ops.cross_entropy, F.cross_entropy):
        losses = op(x, target, reduction="none")
        results.append(torch.autograd.grad(losses, x, torch.eye(4), is_grads_batched=True)[0])
    torch.testing.assert_close(*results)


# Torch's compiler makes an object of a class that torch itself warns against making.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks():
    x, target = torch.randn(4, 6, requires_grad=True), torch.randint(0, 6, (4,))
    compiled = torch.compile(lambda x: 2 * ops.cross_entropy(x, target), fullgraph=True, backend="aot_eager")
    (actual,), (expected,) = (torch.autograd.grad(y, x) for y in (compiled(x), 2 * F.cross_entropy(x, target)))
    torch.testing.assert_close(actual, expected)
