"""swiglu_int4_lora_linear against the two operations that it joins, and by finite differences."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd.ops import int4_lora_linear, int4_quantize, swiglu, swiglu_int4_lora_linear

COLUMNS, OUTPUTS, RANK = 80, 24, 4


def layer(biased: bool = False):
    codes, scales = int4_quantize(torch.randn(OUTPUTS, COLUMNS))
    lora_A = torch.randn(RANK, COLUMNS, requires_grad=True)
    lora_B = torch.randn(OUTPUTS, RANK, requires_grad=True)
    return codes, scales, torch.randn(OUTPUTS) if biased else None, lora_A, lora_B, 0.5


def gate_and_up(*rows: int, dtype: torch.dtype = torch.float32):
    return [torch.randn(*rows, COLUMNS).to(dtype).requires_grad_() for _ in range(2)]


def one_by_one(gate, up, *layer, **settings):
    return int4_lora_linear(swiglu(gate, up), *layer, **settings)


def assert_same_gradients(y, other, leaves, dy):
    for a, b in zip(*(torch.autograd.grad(each, leaves, dy) for each in (y, other)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 13), (300,), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_those_of_one_operation_after_the_other(rows, dtype, backend):
    gate, up = gate_and_up(*rows, dtype=dtype)
    down = layer(biased=len(rows) == 1)
    leaves = [gate, up, *down[3:5]]
    y, expected = swiglu_int4_lora_linear(gate, up, *down), one_by_one(gate, up, *down)
    assert torch.equal(y, expected)
    assert_same_gradients(y, expected, leaves, torch.randn_like(y))


@pytest.mark.cpu("int8 activations are the CPU's")
def test_bits_in_int8_are_those_of_one_operation_after_the_other():
    gate, up = gate_and_up(40)
    down = layer()
    found = swiglu_int4_lora_linear(gate, up, *down, int8=True)
    assert torch.equal(found, one_by_one(gate, up, *down, int8=True))
    assert not torch.equal(found, swiglu_int4_lora_linear(gate, up, *down))


def test_gradient_of_gate_equals_finite_differences(backend):
    gate, up = (x.detach() for x in gate_and_up(3))
    down = [x.detach() if isinstance(x, torch.Tensor) else x for x in layer()]
    dy = torch.randn(3, OUTPUTS)
    leaf = gate.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(swiglu_int4_lora_linear(leaf, up, *down), leaf, dy)
    step = 2.0**-6
    for row in range(3):
        direction = torch.zeros_like(gate)
        direction[row] = torch.randn(COLUMNS)
        ends = [
            (swiglu_int4_lora_linear(gate + side * step * direction, up, *down).double() * dy).sum() for side in (1, -1)
        ]
        analytic = (gradient.double() * direction).sum()
        # The difference errs by step² / 6 of a third derivative, which is below 1 for SiLU, and by rounding.
        assert abs((ends[0] - ends[1]) / (2 * step) - analytic) <= 1e-3 * (gradient * direction).norm()


def test_what_is_kept_are_the_arguments_and_the_low_rank_product(backend):
    gate, up = gate_and_up(50)
    down = layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu_int4_lora_linear(gate, up, *down)
    arguments = {x.data_ptr() for x in (gate, up, *down[:2], *down[3:5])}
    assert [tuple(x.shape) for x in kept if x.data_ptr() not in arguments] == [(50, RANK)]
    assert arguments <= {x.data_ptr() for x in kept}


def test_argument_that_is_not_contiguous(backend):
    down = layer()
    gate, up = torch.randn(2, 13, 2, COLUMNS).unbind(2)
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    y, expected = (f(*leaves, *down) for f in (swiglu_int4_lora_linear, one_by_one))
    assert torch.equal(y, expected)
    assert_same_gradients(y, expected, leaves, torch.randn(2, OUTPUTS, 13).mT)


def test_opcheck_of_the_backward_operator():
    down = [x.detach() if isinstance(x, torch.Tensor) else x for x in layer()]
    codes, scales, _, lora_A, lora_B, scaling = down
    gate, up = torch.randn(COLUMNS, 5).T, torch.randn(5, COLUMNS)
    arguments = (torch.randn(5, OUTPUTS), gate, up, codes, scales, lora_A, lora_B, torch.randn(5, RANK), scaling, 64)
    results = torch.library.opcheck(torch.ops.entrenar.swiglu_int4_lora_linear_backward.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_without_graph_breaks():
    down = layer()

    def call(gate, up):
        return swiglu_int4_lora_linear(gate, up, *down)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for rows in ((5,), (2, 3), (7,)):  # other dimensions than the first ones make sizes symbols
        gate, up = gate_and_up(*rows)
        y, expected = compiled(gate, up), call(gate, up)
        assert torch.equal(y, expected)
        assert_same_gradients(y, expected, [gate, up, *down[3:5]], torch.ones_like(y))


def test_vmap_calls_it_for_each(backend):
    down = layer()
    gate, up = gate_and_up(3, 5)
    batched = torch.func.vmap(lambda gate, up: swiglu_int4_lora_linear(gate, up, *down))(gate, up)
    alone = [swiglu_int4_lora_linear(gate[i], up[i], *down) for i in range(3)]
    assert torch.equal(batched, torch.stack(alone))


def test_autocast_computes_in_its_dtype(backend):
    gate, up = gate_and_up(5)
    down = layer()
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = swiglu_int4_lora_linear(gate, up, *down)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, swiglu_int4_lora_linear(gate.bfloat16(), up.bfloat16(), *down))


def test_result_that_leads_nowhere_has_no_gradient():
    gate, up = gate_and_up(5)
    y = torch._C._functions.UndefinedGrad()(swiglu_int4_lora_linear(gate, up, *layer()))
    assert torch.autograd.grad(y.sum(), [gate, up], allow_unused=True) == (None, None)


def test_second_derivative_is_refused():
    gate, up = gate_and_up(5)
    (dgate,) = torch.autograd.grad(swiglu_int4_lora_linear(gate, up, *layer()).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^swiglu_int4_lora_linear has no second derivative: ask for"):
        dgate.sum().backward()


def test_derivative_of_the_backward_operator_is_refused():
    codes, scales, _, lora_A, lora_B, scaling = layer()
    gate, up = gate_and_up(5)
    dy, u = torch.randn(5, OUTPUTS), torch.randn(5, RANK)
    backward = torch.ops.entrenar.swiglu_int4_lora_linear_backward
    dgate, *_ = backward(dy, gate, up, codes, scales, lora_A, lora_B, u, scaling, 64)
    with pytest.raises(RuntimeError, match="swiglu_int4_lora_linear has no second derivative"):
        dgate.sum().backward()


def test_arguments_that_do_not_fit_are_refused():
    gate, up = gate_and_up(5)
    down = layer()
    for other in (up[:1], up.bfloat16()):
        with pytest.raises(
            ValueError, match=r"gate \(5, 80\) torch.float32 and up \([15], 80\) torch\.\w+ must have one"
        ):
            swiglu_int4_lora_linear(gate, other, *down)
    with pytest.raises(ValueError, match=r"lora_A \(4, 79\)"):
        swiglu_int4_lora_linear(gate, up, *down[:3], down[3][:, 1:], *down[4:])
    with pytest.raises(ValueError, match=r"bias has shape \(23,\), the weight 24 rows"):
        swiglu_int4_lora_linear(gate, up, *down[:2], torch.randn(OUTPUTS - 1), *down[3:])
    with pytest.raises(RuntimeError, match="must have the shape and dtype"):
        torch.ops.entrenar.swiglu_int4_lora_linear(gate, up[:1], *down, 64)
