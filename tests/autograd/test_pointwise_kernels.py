"""The kernels of activations, norms and rotary embedding, against the same computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from entrenar.autograd import ops
from entrenar.autograd.ops._kernel import has_kernel
from entrenar.autograd.ops.add_rms_norm import add_rms_norm_reference
from entrenar.autograd.ops.norm import rms_norm_reference
from entrenar.autograd.ops.rotary import rotary_embedding_reference
from entrenar.autograd.ops.swiglu import swiglu_reference

kernels = torch.ops.entrenar
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A rounding to nearest moves a value by up to this part of itself, or by half of the smallest number.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# Everything before it is float32: functions within a few units, sums over up to 1100 elements or 401 rows in several
# chains. Of the largest element.
BEFORE = 32 * 2**-24


@dataclass(frozen=True)
class Kernel:
    """A kernel and what it computes.

    Attributes:
        call: the kernel, on a list of tensors that `inputs` makes.
        reference: the same on float64 tensors.
        inputs: from leading sizes and a number of columns.
        even: the columns must be even.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    reference: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[tuple[int, ...], int], list[Tensor]]
    even: bool = False


def tensors(count: int) -> Callable[[tuple[int, ...], int], list[Tensor]]:
    return lambda lead, columns: [3 * torch.randn(*lead, columns) for _ in range(count)]


def with_weight(count: int) -> Callable[[tuple[int, ...], int], list[Tensor]]:
    return lambda lead, columns: [*tensors(count)(lead, columns), torch.randn(columns)]


def of_result(function: Callable[[Tensor], Tensor]) -> Callable[[tuple[int, ...], int], list[Tensor]]:
    """dy, and a result of the function."""
    return lambda lead, columns: [torch.randn(*lead, columns), function(torch.randn(*lead, columns))]


def rotary_inputs(lead: tuple[int, ...], columns: int) -> list[Tensor]:
    return [torch.randn(*lead, columns), *torch.randn(2, *lead[-1:], columns)]


def gradient_of(function: Callable[..., Tensor]) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """From dy and the arguments of `function` to the gradients of all of them, by torch's engine."""

    def gradient(dy: Tensor, *arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in arguments]
        gradients = torch.autograd.grad(function(*leaves), leaves, dy)
        return gradients if len(gradients) > 1 else gradients[0]

    return gradient


def rms_norm_backward_beside(dy: Tensor, x: Tensor, dsum: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw = gradient_of(lambda x, w: rms_norm_reference(x, w, 1e-3))(dy, x, w)
    return dx + dsum, dw


KERNELS = {
    "silu_backward": Kernel(kernels.silu_backward, gradient_of(F.silu), tensors(2)),
    "gelu_backward": Kernel(kernels.gelu_backward, gradient_of(F.gelu), tensors(2)),
    "gelu_tanh_backward": Kernel(
        kernels.gelu_tanh_backward, gradient_of(lambda x: F.gelu(x, approximate="tanh")), tensors(2)
    ),
    "sigmoid_backward": Kernel(kernels.sigmoid_backward, lambda dy, y: dy * y * (1 - y), of_result(torch.sigmoid)),
    "tanh_backward": Kernel(kernels.tanh_backward, lambda dy, y: dy * (1 - y * y), of_result(torch.tanh)),
    "softmax_backward": Kernel(
        kernels.softmax_backward,
        lambda dy, y: y * (dy - (dy * y).sum(-1, keepdim=True)),
        of_result(lambda x: x.softmax(-1)),
    ),
    "log_softmax_backward": Kernel(
        kernels.log_softmax_backward,
        lambda dy, y: dy - y.exp() * dy.sum(-1, keepdim=True),
        of_result(lambda x: x.log_softmax(-1)),
    ),
    "swiglu": Kernel(kernels.swiglu, swiglu_reference, tensors(2)),
    "swiglu_backward": Kernel(kernels.swiglu_backward, gradient_of(swiglu_reference), tensors(3)),
    "rms_norm": Kernel(
        lambda x, w: kernels.rms_norm(x, w, 1e-3), lambda x, w: rms_norm_reference(x, w, 1e-3), with_weight(1)
    ),
    "rms_norm without weight": Kernel(
        lambda x: kernels.rms_norm(x, None, 1e-3), lambda x: rms_norm_reference(x, None, 1e-3), tensors(1)
    ),
    "rms_norm_backward": Kernel(
        lambda dy, x, w: kernels.rms_norm_backward(dy, x, w, None, 1e-3, True),
        gradient_of(lambda x, w: rms_norm_reference(x, w, 1e-3)),
        with_weight(2),
    ),
    "rms_norm_backward beside a gradient": Kernel(
        lambda dy, x, dsum, w: kernels.rms_norm_backward(dy, x, w, dsum, 1e-3, True),
        rms_norm_backward_beside,
        with_weight(3),
    ),
    "rms_norm_backward without weight": Kernel(
        lambda dy, x: kernels.rms_norm_backward(dy, x, None, None, 1e-3, False)[0],
        gradient_of(lambda x: rms_norm_reference(x, None, 1e-3)),
        tensors(2),
    ),
    "add_rms_norm": Kernel(
        lambda x, residual, w: kernels.add_rms_norm(x, residual, w, 1e-3),
        lambda x, residual, w: add_rms_norm_reference(x, residual, w, 1e-3),
        with_weight(2),
    ),
    "layer_norm_backward": Kernel(
        lambda dy, x, w, b: kernels.layer_norm_backward(dy, x, w, 1e-3, True, True),
        gradient_of(lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-3)),
        lambda lead, columns: [*with_weight(2)(lead, columns), torch.randn(columns)],
    ),
    "layer_norm_backward without weight": Kernel(
        lambda dy, x: kernels.layer_norm_backward(dy, x, None, 1e-3, False, False)[0],
        gradient_of(lambda x: F.layer_norm(x, x.shape[-1:], None, None, 1e-3)),
        tensors(2),
    ),
    "rotary_embedding": Kernel(
        lambda x, cos, sin: kernels.rotary_embedding(x, cos, sin, False),
        rotary_embedding_reference,
        rotary_inputs,
        even=True,
    ),
    "rotary_embedding, transposed": Kernel(
        lambda x, cos, sin: kernels.rotary_embedding(x, cos, sin, True),
        lambda x, cos, sin: gradient_of(lambda x: rotary_embedding_reference(x, cos, sin))(x, torch.zeros_like(x)),
        rotary_inputs,
        even=True,
    ),
}
SHAPES = {
    "one": ((1,), 2),
    "vector": ((), 70),
    "odd": ((7,), 31),
    "one vector": ((5,), 16),
    "some vectors": ((2, 13), 130),
    "wide": ((3,), 1100),
    "many rows": ((401,), 66),
    "no rows": ((0,), 8),
    "no columns": ((3,), 0),
}
PARAMS = [pytest.param(kernel, id=name) for name, kernel in KERNELS.items()]


def arguments(kernel: Kernel, lead: tuple[int, ...], columns: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in kernel.inputs(lead, columns + (columns % 2 if kernel.even else 0))]


def results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def check(kernel: Kernel, inputs: list[Tensor], terms: float = 1) -> None:
    """The kernel's results are those of float64, but for float32 arithmetic and one rounding.

    `terms` is how much larger than the largest result the terms may be that cancel in it.
    add_rms_norm rounds its sum before it normalizes it: the second result is compared for the sum as it is.
    """
    actual = results(kernel.call(*inputs))
    expected = results(kernel.reference(*(x.double() for x in inputs)))
    if kernel is KERNELS["add_rms_norm"]:
        expected = expected[0], rms_norm_reference(actual[0].double(), inputs[2].double(), 1e-3)
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (e.shape, inputs[0].dtype)
        if e.numel():
            error = (a.double() - e).abs() - ROUNDING[a.dtype] * e.abs()
            assert error.max() <= terms * BEFORE * e.abs().max().clamp(min=1), f"off by {error.max():.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", PARAMS)
@pytest.mark.usefixtures("poisoned")
def test_kernel_is_right_but_for_one_rounding(kernel, shape, dtype, backend):
    check(kernel, arguments(kernel, *SHAPES[shape], dtype))


STRIDES = ["transposed", "turned", "sliced", "stepped", "expanded", "shifted"]


def restrided(x: Tensor, strides: str) -> Tensor:
    """x with other strides; where it is expanded, with its first row or element everywhere.

    Where it is shifted, it begins one element past a multiple of 16 bytes.
    """
    if strides == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if strides == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if strides == "stepped":
        return torch.stack([x, x], -1)[..., 0]
    if strides == "turned" and x.dim() > 1:
        return x.mT.contiguous().mT
    if strides == "transposed" and x.dim() > 1:
        return x.movedim(-2, 0).contiguous().movedim(0, -2)
    if strides == "expanded" and x.numel():
        return x[..., :1].expand(x.shape) if x.dim() == 1 else x[:1].expand(x.shape)
    return x


@given(
    st.sampled_from(list(KERNELS)),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 80),
    st.sampled_from(STRIDES),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_any_shape_and_strides(name, lead, columns, strides, dtype, seed):
    torch.manual_seed(seed)
    kernel = KERNELS[name]
    inputs = arguments(kernel, tuple(lead), columns, dtype)
    for i, x in enumerate(inputs):
        if x.shape == inputs[0].shape or kernel.even:
            inputs[i] = restrided(x, strides)
    # Rows of few columns may be nearly constant: dx is 0 then, of terms as large as 1 / sqrt(eps).
    check(kernel, inputs, 32 if "norm_backward" in name else 1)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("kernel", PARAMS)
def test_strides(kernel, strides, backend):
    inputs = arguments(kernel, (2, 3, 5), 48, torch.bfloat16)
    check(kernel, [restrided(x, strides) if x.shape == inputs[0].shape or kernel.even else x for x in inputs], 32)


ROW_KERNELS = [param for param in PARAMS if "norm" in param.id or "softmax" in param.id]


# What a GPU's threads hold of a row ends at 1024 or 2048 columns that are not aligned, and at 8192 or 16384 that are.
@pytest.mark.parametrize("columns", [1025, 2049, 4096, 8200, 16392])
@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_long_rows(kernel, columns, backend):
    check(kernel, arguments(kernel, (2,), columns, torch.bfloat16), 8)


@pytest.mark.parametrize("rows", [2048, 2500])
@pytest.mark.parametrize("kernel", [param for param in PARAMS if "norm_backward" in param.id])
def test_sums_over_many_rows(kernel, rows, backend):
    check(kernel, arguments(kernel, (rows,), 8, torch.float32), 32)


@pytest.mark.parametrize("kernel", PARAMS)
def test_result_does_not_depend_on_threads(kernel, backend):
    inputs = arguments(kernel, (1 if backend == "emulated" else 5, 67), 602, torch.bfloat16)
    before = torch.get_num_threads()
    every = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        every.append(results(kernel.call(*inputs)))
    torch.set_num_threads(before)
    for other in every[1:]:
        assert all(torch.equal(a, b) for a, b in zip(every[0], other, strict=True))


EXTREMES = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 100.0, -100.0, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]
ATEN = {
    "silu_backward": torch.ops.aten.silu_backward,
    "gelu_backward": torch.ops.aten.gelu_backward,
    "gelu_tanh_backward": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "sigmoid_backward": torch.ops.aten.sigmoid_backward,
    "tanh_backward": torch.ops.aten.tanh_backward,
    "swiglu": lambda gate, up: (F.silu(gate.float()) * up.float()).to(up.dtype),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATEN)
def test_extreme_values_go_where_torchs_go(name, dtype, backend):
    a, b = (x.to(dtype) for x in torch.cartesian_prod(*2 * [torch.tensor(EXTREMES)]).T)
    actual, expected = KERNELS[name].call(a, b), ATEN[name](a, b)
    torch.testing.assert_close(actual, expected, equal_nan=True, atol=2 * torch.finfo(dtype).smallest_normal, rtol=0.02)


# The gradient at dy = 1 of each, and the sizes of the two terms that it adds up, which may cancel.
SLOPES = {
    "silu_backward": lambda x: (x.sigmoid(), x * x.sigmoid() * (-x).sigmoid()),
    "gelu_backward": lambda x: ((-x / 2**0.5).erfc() / 2, x * (-x * x / 2).exp() / (2 * math.pi) ** 0.5),
    "swiglu": lambda x: (x * x.sigmoid(), torch.zeros_like(x)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SLOPES)
def test_every_value_of_sixteen_bits(name, dtype, backend):
    """In the tails too: but for the result's rounding, and for that to float32 of the argument of an exponential."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.abs() < 80]
    one = torch.ones_like(x)
    actual = KERNELS[name].call(*((x, one) if name == "swiglu" else (one, x))).double()
    wide = x.double()
    terms = SLOPES[name](wide)
    expected = sum(terms)
    error = (actual - expected).abs() - ROUNDING[dtype] * expected.abs()
    steps = 8 + wide.abs() * (1 + wide.abs())
    # An exponential below the least normal number may be zero.
    least = (1 + wide.abs()) * torch.finfo(dtype).smallest_normal
    allowed = steps * 2**-24 * sum(term.abs() for term in terms) + least
    assert (error <= allowed).all(), f"{x[(error - allowed).argmax()]} is off by {(error - allowed).max():.3g}"


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-20, 1e19, 1e25, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rows_go_where_the_formula_goes(dtype, value, backend):
    x = torch.randn(2, 40)
    x[0, 3] = value
    x = x.to(dtype).requires_grad_()
    weight = torch.randn(40).to(dtype).requires_grad_()
    for op in (
        lambda x, w: ops.rms_norm(x, (40,), w, 1e-6),
        lambda x, w: ops.add_rms_norm(x, torch.zeros_like(x), w)[1],
    ):
        y = op(x, weight)
        torch.testing.assert_close(y, rms_norm_reference(x, weight, 1e-6), equal_nan=True)
        dy = torch.randn_like(y)
        kernels_dx, kernels_dw = torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
        formulas_dx, formulas_dw = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        torch.testing.assert_close(kernels_dx, formulas_dx, equal_nan=True)
        torch.testing.assert_close(kernels_dw, formulas_dw, equal_nan=True)


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "turned"])
@pytest.mark.parametrize("kernel", PARAMS)
def test_opcheck(kernel, strides):
    inputs = arguments(kernel, (2, 3), 20, torch.float32)
    inputs = [restrided(x, strides) if x.shape == inputs[0].shape else x for x in inputs]
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        kernel.call(*inputs)
    ((op, args),) = [call for call in calls if call[0].namespace == "entrenar"]
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kernel", PARAMS)
def test_bad_arguments_are_refused(kernel):
    inputs = arguments(kernel, (3,), 8, torch.float32)
    with pytest.raises(RuntimeError, match="must"):
        kernel.call(*(x.double() for x in inputs))
    for i in range(min(len(inputs), 3)):
        if len(inputs) > 1 and not (i == 2 and kernel is KERNELS["layer_norm_backward"]):
            with pytest.raises(RuntimeError, match="must"):
                kernel.call(*inputs[:i], inputs[i].bfloat16(), *inputs[i + 1 :])
            with pytest.raises(RuntimeError, match="must"):
                kernel.call(*inputs[:i], inputs[i][..., :6], *inputs[i + 1 :])


PUBLIC = {
    "silu": ops.silu,
    "gelu": ops.gelu,
    "gelu_tanh": lambda x: ops.gelu(x, approximate="tanh"),
    "sigmoid": ops.sigmoid,
    "tanh": ops.tanh,
    "softmax": lambda x: ops.softmax(x, -1),
    "log_softmax": lambda x: ops.log_softmax(x, -1),
    "layer_norm": lambda x: ops.layer_norm(x, (6,)),
    "rms_norm": lambda x: ops.rms_norm(x, (6,)),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, 2 * x)[1],
    "swiglu": lambda x: ops.swiglu(x, 2 * x),
    "rotary_embedding": lambda x: ops.rotary_embedding(x, torch.ones_like(x[0]), torch.ones_like(x[0])),
}


def used(function: Callable[[], object]) -> set[str]:
    """The operators of this package that run."""
    names: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "entrenar":
                names.add(func._opname)
            return func(*args, **(kwargs or {}))

    with Record():
        function()
    return names


@pytest.mark.parametrize("name", PUBLIC)
def test_kernels_run_where_they_can(name):
    for dtype in DTYPES:
        x = torch.randn(3, 2, 6).to(dtype).requires_grad_()
        y = PUBLIC[name](x)
        backward = "rms_norm" if name == "add_rms_norm" else name
        expected = {name if name == "rotary_embedding" else f"{backward}_backward"}
        assert used(lambda x=x, y=y: torch.autograd.grad(y.sum(), x, retain_graph=True)) == expected
        assert not used(lambda x=x, y=y: torch.autograd.grad(y.sum(), x, create_graph=True))
    x = torch.randn(3, 2, 6, dtype=torch.float64).requires_grad_()
    assert not used(lambda: PUBLIC[name](x).sum().backward())


@pytest.mark.parametrize("name", PUBLIC)
def test_formula_and_kernel_agree(name):
    x = torch.randn(3, 5, 6, requires_grad=True)
    y = PUBLIC[name](x)
    dy = torch.randn_like(y)
    (kernels,), (formula,) = (torch.autograd.grad(y, x, dy, True, create_graph=graph) for graph in (False, True))
    torch.testing.assert_close(kernels, formula)
    torch.testing.assert_close(torch.func.vmap(PUBLIC[name])(x[None])[0], y)


class Wrapped(Tensor):
    """A tensor that knows torch's own operators only."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner):
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )
        wrapped.inner = inner
        return wrapped

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", func
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))


ROWS, ROW = (3, 6), (6,)
OPERANDS = {
    **{name: (function, [ROWS]) for name, function in PUBLIC.items()},
    "layer_norm": (lambda x, w, b: ops.layer_norm(x, ROW, w, b), [ROWS, ROW, ROW]),
    "rms_norm": (lambda x, w: ops.rms_norm(x, ROW, w), [ROWS, ROW]),
    "add_rms_norm": (lambda x, residual, w: ops.add_rms_norm(x, residual, w)[1], [ROWS, ROWS, ROW]),
    "swiglu": (ops.swiglu, [ROWS, ROWS]),
    "rotary_embedding": (ops.rotary_embedding, [ROWS, ROWS, ROWS]),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_other_kinds_of_tensors_go_through_the_formulas(name):
    function, shapes = OPERANDS[name]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    y, dy = function(*inputs), torch.randn(ROWS)
    expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    found = torch.autograd.grad(y, inputs, Wrapped(dy))
    torch.testing.assert_close([dx.inner for dx in found], list(expected))
    for i, x in enumerate(inputs):
        wrapped = Wrapped(x.detach()).requires_grad_()
        result = function(*inputs[:i], wrapped, *inputs[i + 1 :])
        torch.testing.assert_close(result.inner, y)
        (dx,) = torch.autograd.grad(result, wrapped, Wrapped(dy))
        torch.testing.assert_close(dx.inner, expected[i])


def test_what_has_no_kernel():
    x = torch.randn(4)
    with torch.no_grad():
        assert has_kernel(x, None, torch.nn.Parameter(x))
        assert not has_kernel(x.double())
        assert not has_kernel(x, x.bfloat16())
        assert not has_kernel(x.to("meta"))
        assert not has_kernel(x.to_sparse())
        assert not torch.func.vmap(lambda x: torch.full_like(x, has_kernel(x)))(x).any()
    assert not has_kernel(x)


# Torch's compiler makes an object of a class that torch itself warns against making.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_without_graph_breaks(name):
    x = torch.randn(3, 2, 6, requires_grad=True)
    compiled = torch.compile(PUBLIC[name], fullgraph=True, backend="aot_eager")
    dy = torch.randn(3, 2, 6)
    actual, expected = (torch.autograd.grad(f(x), x, dy) for f in (compiled, PUBLIC[name]))
    torch.testing.assert_close(actual, expected)
