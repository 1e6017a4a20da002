"""Products with int4 weights of any sizes and layouts in memory, at every CPU level, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from conftest import backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import laid_out
from torch import Tensor

import entrenar
from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_lora_linear, int4_quantize

rows = st.one_of(st.integers(0, 40), st.integers(41, 1100))
layouts = st.sampled_from(["contiguous", "reversed", "with gaps", "offset", "repeated"])
SCALING = 0.75


@pytest.mark.cpu("its levels")
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(rows, st.integers(1, 700), st.integers(1, 700)),
    rank=st.one_of(st.none(), st.integers(1, 70), st.integers(71, 700)),
    biased=st.booleans(),
    block=st.sampled_from([32, 64]),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    x_layout=layouts,
    dy_layout=layouts,
    seed=st.integers(0, 2**31),
)
def test_errors_are_those_of_float32_sums_and_single_roundings(
    request, restored_level, sizes, rank, biased, block, scale_dtype, dtype, x_layout, dy_layout, seed
):
    torch.manual_seed(seed)
    m, n, k = sizes
    codes, scales = int4_quantize(torch.randn(n, k), block=block, scale_dtype=scale_dtype)
    codes = torch.randint_like(codes, 256)  # the code -8 too, and what lies past the last column
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    x[1:2] = 0
    x, dy = laid_out(x, x_layout).requires_grad_(), laid_out(dy, dy_layout)
    bias = torch.randn(n) if biased else None
    adapter = [] if rank is None else [torch.randn(rank, k), torch.randn(n, rank)]

    weight = int4_dequantize(codes, scales, k, block=block)
    wide = [t.detach().double() for t in (x, dy, weight, torch.zeros(n) if bias is None else bias, *adapter)]
    expected, terms, squares = (products(*wide, power=power) for power in (0, 1, 2))
    # Sums of k or n products of float32 in any order, of r more, and a few roundings. In bfloat16 each weight is
    # rounded, or the adapter's two matrices and what lies between them, by 2^-8 of each term at most (the products of
    # two such errors are the 2 %), and then the result. Errors of independent terms add up as squares do, which shows
    # a term that is left out.
    bfloat16 = 1.02 * 2**-8 if dtype == torch.bfloat16 else 0.0
    limit = (max(n, k) + (rank or 0) + 10) * 2**-24 + 3 * bfloat16
    for level in backends(request.config):
        entrenar.set_cpu_level(level)
        y = (
            int4_lora_linear(x, codes, scales, bias, *adapter, SCALING, block=block)
            if adapter
            else int4_linear(x, codes, scales, bias, block=block)
        )
        (dx,) = torch.autograd.grad(y, x, dy)
        for i, (name, found) in enumerate({"y": y.detach(), "dx": dx}.items()):
            assert found.shape == expected[i].shape
            error = (found.double() - expected[i]).abs()
            assert (error <= limit * terms[i] + bfloat16 * expected[i].abs()).all(), f"{name} at {level}"
            whole = limit * squares[i].sum().sqrt() + bfloat16 * expected[i].norm()
            assert error.norm() <= whole, f"{name} at {level}"


@pytest.fixture
def restored_level():
    level = entrenar.cpu_level()
    yield
    entrenar.set_cpu_level(level)


def products(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, A: Tensor | None = None, B: Tensor | None = None, *, power: int
) -> tuple[Tensor, Tensor]:
    """y and dx; with a power that is not 0, the sums of that power of the magnitudes of their terms."""

    def term(factor: Tensor) -> Tensor:
        return factor.abs() ** power if power else factor

    y = term(x) @ term(weight).T + term(bias)
    dx = term(dy) @ term(weight)
    if A is not None and B is not None:
        adapter = term(SCALING * B), term(A)
        y += term(x) @ adapter[1].T @ adapter[0].T
        dx += term(dy) @ adapter[0] @ adapter[1]
    return y, dx
