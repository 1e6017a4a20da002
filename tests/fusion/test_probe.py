"""What counts as the same module: the same numbers in float32, and in 16 bits numbers as near to those."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from entrenar.fusion.probe import difference


class Scale(nn.Module):
    """y = factor · weight · x + offset, where the offset is added in 16 bits only."""

    def __init__(self, factor: float = 1.0, offset: Tensor | float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.factor, self.offset, self.dtype = factor, offset, dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.factor * self.weight * x
        return y if x.dtype is torch.float32 else (y + self.offset).to(self.dtype or x.dtype)


def compare(other: nn.Module, *inputs: Tensor) -> str | None:
    def build(original: nn.Module) -> nn.Module:
        return copy.deepcopy(other).to(original.weight.dtype)

    return difference(Scale().to(inputs[0].dtype), build, lambda module, x: module(x), inputs)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_error_is_relative(size):
    x = torch.full((4,), size)
    assert compare(Scale(1 + 1e-6), x) is None
    assert compare(Scale(1.001), x) == "computes something else: its output differs by 0.001"


# The original is exact, which leaves one rounding of the result: half of the distance of 1 and the next number, in the
# norm of four elements one of which is off by all of it.
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_sixteen_bits_allow_one_rounding_more(dtype, step):
    x = torch.ones(4, dtype=dtype)
    one, two = (torch.tensor(offset, dtype=dtype) for offset in ([step, 0, 0, 0], [step, step, 0, 0]))
    assert compare(Scale(offset=one), x) is None
    assert "is less exact when fused: its output is off by" in compare(Scale(offset=two), x)


def test_dtypes_and_shapes_must_be_the_originals():
    x = torch.ones(4, dtype=torch.bfloat16)
    expected = "computes something else: its output is float32 [4], not bfloat16 [4]"
    assert compare(Scale(dtype=torch.float32), x) == expected


class Unlucky(Scale):
    """y = weight · x, in 16 bits off by a 32nd of itself at x = 2ⁱ for some i."""

    def __init__(self, exponents: list[int]) -> None:
        super().__init__()
        self.exponents = exponents

    def forward(self, x: Tensor) -> Tensor:
        self.offset = x / 32 if x.detach()[0].log2() in self.exponents else 0.0
        return super().forward(x)


# The first input decides if it finds nothing; else more than half of them must find it.
@pytest.mark.parametrize(
    ("count", "exponents", "stands"),
    [
        (5, [0], True),
        (5, [0, 4], True),
        (5, [0, 2, 3], False),
        (5, [0, 1, 2, 3, 4], False),
        (5, [1, 2, 3, 4], True),
        (4, [0, 2], True),
        (4, [0, 1, 3], False),
    ],
)
def test_doubts_at_one_input_are_settled_by_others(count, exponents, stands):
    inputs = [torch.full((4,), 2.0**i, dtype=torch.bfloat16) for i in range(count)]
    found = compare(Unlucky(exponents), *inputs)
    assert found is None if stands else "its output is off by 0.03, where 0.004 would do" in found


def test_another_formula_is_refused_at_any_input_that_is_looked_at():
    class Bent(Unlucky):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.001 if x.detach()[0] == 8 else 1)

    inputs = [torch.full((4,), 2.0**i, dtype=torch.bfloat16) for i in range(5)]
    assert compare(Bent([1]), *inputs) is None
    assert compare(Bent([0]), *inputs) == "computes something else: its output differs by 0.001"
