"""The tests that every op passes, over the table of cases."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, Case
from torch import Tensor

SAMPLES = [pytest.param(case, sample, id=f"{name}-{sample}") for name, case in CASES.items() for sample in case.samples]
DIFFERENTIABLE = [
    pytest.param(case, sample, id=f"{name}-{sample}")
    for name, case in CASES.items()
    for sample in case.samples
    if case.linear_in and sample != "no rows"
]
# Of the largest element of the result. float32: sums of up to 1100 products, rounded in some order. bfloat16: the
# result, the LoRA path's middle, and (where weights are not rounded first) the weights each round by up to 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def tolerance_of(case: Case, dtype: torch.dtype, backend: str) -> float:
    """A GPU adds a product to what the one before it left, so that a sum in bfloat16 is rounded once more."""
    again = 2**-9 if dtype == torch.bfloat16 and backend in ("cuda", "emulated") else 0
    return case.growth * (TOLERANCE[dtype] + again)


def outputs(result: Tensor | tuple) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs()
    scale = expected.double().abs().max() if expected.numel() else 0.0
    assert (error <= tolerance * scale).all(), f"off by {error.max():.3g} where the largest value is {scale:.3g}"


def leaves(case: Case, arguments: tuple, dtype: torch.dtype | None = None) -> tuple[list, list[Tensor]]:
    """The arguments, and of them the differentiable ones as leaves of a graph."""
    arguments = list(arguments)
    for i in case.linear_in:
        arguments[i] = arguments[i].detach().to(dtype or arguments[i].dtype).requires_grad_()
    return arguments, [arguments[i] for i in case.linear_in]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "sample"), SAMPLES)
@pytest.mark.usefixtures("poisoned")
def test_kernel_equals_reference(case, sample, dtype, backend):
    arguments = case.arguments(sample, dtype)
    actual = outputs(case.op(*arguments))
    if case.exact:  # to the CPU's bits: torch's division by a number is a product with its reciprocal on CUDA
        arguments = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
    expected = outputs(case.reference(*arguments))
    for a, e in zip(actual, expected, strict=False):
        assert a.dtype == e.dtype
        if case.exact:
            assert torch.equal(a.cpu(), e)
        else:
            assert_close(a, e, tolerance_of(case, dtype, backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "sample"), DIFFERENTIABLE)
@pytest.mark.usefixtures("poisoned")
def test_gradient_equals_references_gradient(case, sample, dtype, backend):
    arguments, inputs = leaves(case, case.arguments(sample, dtype))
    result = outputs(case.op(*arguments))[0]
    dy = torch.randn_like(result)
    actual = torch.autograd.grad(result, inputs, dy)

    wide, wide_inputs = leaves(case, arguments, torch.float64)
    expected = torch.autograd.grad(outputs(case.reference(*wide))[0], wide_inputs, dy.double())
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, tolerance_of(case, dtype, backend))


@pytest.mark.parametrize(("case", "sample"), DIFFERENTIABLE)
def test_gradient_equals_finite_differences(case, sample, backend):
    arguments, inputs = leaves(case, case.arguments(sample, torch.float32))
    result = outputs(case.op(*arguments))[0]
    dy = torch.randn_like(result)
    gradients = torch.autograd.grad(result, inputs, dy)
    for index, gradient in zip(case.linear_in, gradients, strict=True):
        for direction in directions(gradient):
            ends = []
            for step in (1.0, -1.0):
                moved = list(arguments)
                moved[index] = arguments[index].detach() + step * direction
                with torch.no_grad():
                    ends.append((outputs(case.op(*moved))[0].double() * dy.double()).sum())
            numeric = (ends[0] - ends[1]) / 2
            analytic = (gradient.double() * direction.double()).sum()
            scale = (gradient * direction).norm() + result.detach().norm() * dy.norm()
            assert abs(numeric - analytic) <= 1e-6 * scale


def directions(like: Tensor) -> list[Tensor]:
    """Every unit vector where there are few, random ones where there are many."""
    if like.numel() <= 64:
        return list(torch.eye(like.numel()).view(-1, *like.shape))
    return [torch.randn_like(like) for _ in range(8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "sample"), [p for p in SAMPLES if p.values[1] in ("few rows", "odd", "transposed")])
def test_opcheck(case, sample, dtype):
    arguments, _ = leaves(case, case.arguments(sample, dtype))
    results = torch.library.opcheck(case.op, tuple(arguments))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("case", "sample"), [p for p in DIFFERENTIABLE if p.values[1] in ("batch", "many rows")])
def test_result_does_not_depend_on_threads(case, sample, backend):
    if backend == "emulated":
        pytest.skip("a GPU has none of the CPU's threads, and the emulator's large products are torch's")
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        arguments, inputs = leaves(case, case.arguments(sample, torch.bfloat16))
        if results:
            arguments = results[0][0]
            inputs = [arguments[i] for i in case.linear_in]
        result = outputs(case.op(*arguments))[0]
        gradients = torch.autograd.grad(result, inputs, torch.ones_like(result))
        results.append((arguments, result, *gradients))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][1:], other[1:], strict=True))
