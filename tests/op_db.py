"""Torch's own test inputs for its operators, and what an op of ours with the same name must do on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import ErrorInput, OpInfo, SampleInput
from torch.utils._pytree import tree_flatten, tree_map_only

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALVES)


@dataclass(frozen=True)
class Twin:
    """An op of ours, and the entry of torch's table that it must agree with.

    Attributes:
        ours: takes the arguments of torch's operator.
        name: of torch's operator, in its table.
        variant: of the entry, where torch tests an operator in several ways.
        exact: the forward is torch's own kernel, so that its results are equal to the bit, with the same strides.
        wide: 16-bit values are computed with in float32, and so must torch to be compared with.
    """

    ours: Callable[..., Tensor]
    name: str
    variant: str = ""
    exact: bool = True
    wide: bool = False

    def __str__(self) -> str:
        return self.name.removeprefix("nn.functional.") + (f"-{self.variant}" if self.variant else "")

    @property
    def info(self) -> OpInfo:
        (info,) = (op for op in op_db if (op.name, op.variant_test_name) == (self.name, self.variant))
        return info

    @property
    def theirs(self) -> Callable[..., Tensor]:
        return computing_wide(self.info.op) if self.wide else self.info.op


def computing_wide(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`op` on 16-bit tensors, computed in float32 and rounded once."""

    def wide(*args: Any, **kwargs: Any) -> Tensor:
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.dtype in HALVES else x, (args, kwargs))
        result = op(*args, **kwargs)
        return result.to(given[0].dtype) if given[0].dtype in HALVES else result

    return wide


def twin_params(twins: list[Twin], *dtypes: torch.dtype) -> list:
    """Parameters (twin, dtype) for pytest: each twin with those of `dtypes` that torch's operator takes on the CPU."""
    return [
        pytest.param(twin, dtype, id=f"{twin}-{str(dtype).removeprefix('torch.')}")
        for twin in twins
        for dtype in dtypes
        if dtype in twin.info.supported_dtypes("cpu")
    ]


def samples(twin: Twin, dtype: torch.dtype, limit: int = 40) -> list[SampleInput]:
    """Torch's sample inputs, with their gradients wanted; where there are more than `limit`, some from all parts."""
    _skip_on_a_gpu()
    wanted = dtype.is_floating_point
    every = list(twin.info.sample_inputs("cpu", dtype, requires_grad=wanted))
    return every[:: math.ceil(len(every) / limit)]


def _skip_on_a_gpu() -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("torch's own inputs are those for the CPU")


def arguments(sample: SampleInput) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, with tensors as leaves of a new graph."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.requires_grad)

    return tree_map_only(Tensor, leaf, ((sample.input, *sample.args), sample.kwargs))


def leaves(call: tuple[tuple, dict[str, Any]]) -> list[Tensor]:
    """The arguments whose gradients are wanted."""
    return [x for x in tree_flatten(call)[0] if isinstance(x, Tensor) and x.requires_grad]


def as_function_of_leaves(op: Callable[..., Tensor], sample: SampleInput) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`op` on the sample, as a function of only the tensors whose gradients are wanted; and those tensors."""
    call = arguments(sample)
    inputs = leaves(call)

    def function(*values: Tensor) -> Tensor:
        replaced = {id(x): value for x, value in zip(inputs, values, strict=True)}
        args, kwargs = tree_map_only(Tensor, lambda x: replaced.get(id(x), x), call)
        return op(*args, **kwargs)

    return function, inputs


def check_forward(twin: Twin, sample: SampleInput) -> None:
    """Results equal torch's in value, dtype, strides (if the kernel is torch's), and in what they are a view of."""
    results = []
    for op in (twin.ours, twin.theirs):
        args, kwargs = arguments(sample)
        result = op(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)}
        results.append((result, result.untyped_storage().data_ptr() in given - {0}))
    (actual, shares), (expected, should_share) = results
    tolerance = dict(rtol=0, atol=0) if twin.exact else {}
    torch.testing.assert_close(actual, expected, equal_nan=True, check_stride=twin.exact, **tolerance)
    assert shares == should_share
    assert actual.requires_grad == expected.requires_grad


def check_gradients(twin: Twin, sample: SampleInput) -> None:
    """Gradients in every tensor equal those of torch's engine, within torch's own tolerances for the dtype."""
    results = []
    for op in (twin.ours, twin.theirs):
        function, inputs = as_function_of_leaves(op, sample)
        result = function(*inputs)
        if not result.requires_grad:
            pytest.fail(f"{sample} asks for no gradient")
        dy = torch.randn(
            result.shape, dtype=torch.float64, generator=torch.Generator(torch.get_default_device()).manual_seed(1)
        )
        results.append(torch.autograd.grad(result, inputs, dy.to(result.dtype), allow_unused=True))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def check_derivatives(twin: Twin, sample: SampleInput) -> None:
    """First and second derivatives equal finite differences; float64."""
    info = twin.info
    function, inputs = as_function_of_leaves(twin.ours, sample)
    if sample.output_process_fn_grad is not None:
        raw = function

        def function(*values: Tensor) -> Tensor:
            return sample.output_process_fn_grad(raw(*values))

    # Where a derivative is large, noise in the differences of single elements exceeds the tolerance.
    fast = sum(x.numel() for x in inputs) > 50
    assert torch.autograd.gradcheck(function, inputs, fast_mode=fast)
    if info.supports_gradgrad:
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=fast, gen_non_contig_grad_outputs=True)


def check_transforms(twin: Twin, sample: SampleInput) -> None:
    """torch.func.vmap of the op, and of its gradient, equal torch's on each element of the batch."""
    ours, inputs = as_function_of_leaves(twin.ours, sample)
    theirs, _ = as_function_of_leaves(twin.theirs, sample)
    batch = [torch.stack([x.detach(), x.detach() + 0.5]) for x in inputs]
    singles = [[x[i].requires_grad_() for x in batch] for i in range(2)]
    expected = [theirs(*single) for single in singles]
    torch.testing.assert_close(torch.func.vmap(ours)(*batch), torch.stack(expected), equal_nan=True)

    def gradient(*values: Tensor) -> tuple[Tensor, ...]:
        return torch.func.grad(lambda *v: ours(*v).sin().sum(), tuple(range(len(values))))(*values)

    actual = torch.func.vmap(gradient)(*batch)
    for i, (result, single) in enumerate(zip(expected, singles, strict=True)):
        for a, e in zip(actual, torch.autograd.grad(result.sin().sum(), single), strict=True):
            torch.testing.assert_close(a[i], e, equal_nan=True)


def check_no_forward_mode(twin: Twin, sample: SampleInput) -> None:
    """torch.func.jvp says that it cannot."""
    function, inputs = as_function_of_leaves(twin.ours, sample)
    values = tuple(x.detach() for x in inputs)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(function, values, values)


def check_refuses_complex(twin: Twin, sample: SampleInput) -> None:
    """A complex tensor raises TypeError."""
    args, kwargs = arguments(sample)
    args, kwargs = tree_map_only(Tensor, lambda x: x.cfloat() if x.is_floating_point() else x, (args, kwargs))
    with pytest.raises(TypeError, match=r"does not take complex values, and was given torch\.complex64"):
        twin.ours(*args, **kwargs)


def check_errors(twin: Twin) -> None:
    """Whatever torch's operator refuses is refused with the same exception."""
    for error in error_inputs(twin):
        args, kwargs = (error.sample_input.input, *error.sample_input.args), error.sample_input.kwargs
        with pytest.raises(error.error_type, match=error.error_regex or None):
            twin.ours(*args, **kwargs)


def error_inputs(twin: Twin) -> list[ErrorInput]:
    """Torch's inputs that must raise, but those for `out=`, which our ops lack."""
    _skip_on_a_gpu()
    info = twin.info
    errors = info.error_inputs("cpu") if info.error_inputs_func is not None else []
    return [error for error in errors if "out" not in error.sample_input.kwargs]
