"""Clipping inside the step, and bfloat16 parameters that are rounded stochastically."""

from __future__ import annotations

import copy
import linecache
import pickle

import pytest
import torch
from runs import KINDS, grouped, parameters, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar import optim

ops = torch.ops.entrenar


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_step_equals_clipping_and_stepping(kind, backend):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    cls = KINDS[kind][0]
    clipped, plain = cls(grouped(ours, kind), max_norm=0.5), cls(grouped(theirs, kind))
    for step in range(3):
        for params in (ours, theirs):
            set_gradients(params, step)
        before = [None if param.grad is None else param.grad.clone() for param in ours]
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        clipped.step()
        plain.step()
        torch.testing.assert_close(clipped.grad_norm, norm)
        for param, grad in zip(ours, before, strict=True):
            assert grad is None or torch.equal(param.grad, grad)
    for a, b in zip(ours, theirs, strict=True):
        # Factors differ in their last bits; Lion's sign may turn with them where both averages cancel.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if kind != "lion" else 6e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_that_of_all_gradients(dtype, backend):
    grads = [param.detach() for param in parameters(dtype, shapes=[(), (0,), (5000,), (3, 7), (64, 64), (12289,)])]
    grads += [torch.randn(5001, device=grads[0].device).to(dtype)[1:]]
    norm, factor = ops.grad_norm(grads, 2.0)
    exact = torch.cat([grad.double().flatten() for grad in grads]).norm()
    # Each of 64 sums of a piece adds 64 squares at most, then come 6 sums of two: 35 roundings of the squares' sum.
    torch.testing.assert_close(norm.double(), exact, rtol=35 * 2**-24, atol=0)
    torch.testing.assert_close(factor.double(), 2.0 / (exact + 1e-6), rtol=35 * 2**-24, atol=0)
    assert torch.equal(ops.grad_norm(grads, 2.0)[0], norm)
    assert ops.grad_norm(grads, 1e9)[1] == 1
    assert ops.grad_norm(grads, torch.inf)[1] == 1


def test_the_norm_does_not_depend_on_threads(backend):
    grads = [param.detach() for param in parameters(torch.float32, shapes=[(100_000,), (3,), (77_777,)])]
    before = torch.get_num_threads()
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(ops.grad_norm(grads, 1.0))
    torch.set_num_threads(before)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_a_norm_that_is_not_finite_has_no_factor(bad, backend):
    grads = [torch.ones(5000), torch.tensor([bad])]
    norm, factor = ops.grad_norm(grads, 1.0)
    assert not norm.isfinite()
    assert factor.isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_32_bit_step_with_a_limit_is_left_out_too(dtype):
    params = parameters(dtype, shapes=[(10,), (3,)])
    optimizer = optim.AdamW(params, max_norm=1.0)
    set_gradients(params, 0, missing=0)
    params[0].grad[3] = torch.nan
    before = copy.deepcopy(params)
    if params[0].is_cpu:
        with pytest.warns(RuntimeWarning, match="a step was left out: the gradient of parameter 0 of group 0"):
            optimizer.step()
    else:
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert optimizer.skipped_steps == 1
    assert optimizer.grad_norm.isnan()
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert (other.max_norm, other.skipped_steps) == (1.0, 1)


def test_parameters_of_several_dtypes_share_one_norm():
    params = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    optimizer = optim.SGD(params, lr=1.0, max_norm=1e-3)
    params[0].grad = torch.tensor([3e-3, 0.0, 0.0], dtype=torch.float64)
    params[1].grad = torch.tensor([0.0, 4e-3, 0.0])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(5e-3, rel=1e-6)
    factor = 1e-3 / (5e-3 + 1e-6)  # as torch's
    expected = torch.tensor([-3e-3 * factor, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(params[0].data, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(params[1].data, torch.tensor([0, -4e-3 * factor, 0]), rtol=1e-6, atol=0)


def test_opcheck_of_the_norm():
    grads = [torch.randn(5), torch.randn(2, 3)]
    assert set(torch.library.opcheck(ops.grad_norm.default, (grads, 1.0)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_step_is_one_call_and_one_more_where_the_norm_is_needed(cls, max_norm):
    params = parameters(torch.float32)
    optimizer = cls(params, max_norm=max_norm)
    set_gradients(params, 0, missing=0)
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "entrenar":
                called.append(func._opname)
            return func(*args, **(kwargs or {}))

    with Record():
        optimizer.step()
    needed = max_norm is not None or cls is optim.AdamW8bit
    assert set(called) == ({"grad_norm", "adam_"} if needed else {"adam_"})
    assert called.count("grad_norm") == needed
    assert (optimizer.grad_norm is not None) == needed


@pytest.mark.cpu("on a GPU the count alone tells")
@pytest.mark.parametrize("way", ["plain", "scheduled", "closure"])
def test_the_warning_points_at_the_line_that_stepped(way):
    params = parameters(torch.float32, shapes=[(3,)])
    optimizer = optim.SGD(params, max_norm=1.0)
    if way == "scheduled":
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    params[0].grad = torch.full((3,), torch.nan)
    with pytest.warns(RuntimeWarning, match="a step was left out") as caught:
        optimizer.step(*([lambda: 0.0] if way == "closure" else []))
    (warning,) = caught
    assert warning.filename == __file__
    assert "optimizer.step(" in linecache.getline(warning.filename, warning.lineno)


@pytest.mark.filterwarnings("ignore:a step was left out")
def test_every_step_that_is_left_out_counts():
    params = parameters(torch.float32, shapes=[(3,)])
    optimizer = optim.SGD(params, max_norm=1.0)
    params[0].grad = torch.full((3,), torch.nan)
    for _ in range(3):
        optimizer.step()
    assert optimizer.skipped_steps == 3


def test_without_gradients_nothing_happens():
    for cls in (optim.AdamW, optim.AdamW8bit):
        optimizer = cls(parameters(torch.float32), max_norm=1.0)
        assert optimizer.step() is None
        assert optimizer.grad_norm is None


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit])
def test_converges_where_rounding_to_nearest_stalls(cls, backend):
    """Weights near 1 have a precision of 2^-8 in bfloat16: steps of 1e-4 are lost unless chance adds them up."""
    left = []
    for stochastic in (False, True):
        x = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = cls([x], lr=1e-3, weight_decay=0.0, stochastic_rounding=stochastic)
        for _ in range(400):
            x.grad = x.detach() - 0.8
            optimizer.step()
        left.append((x.float() - 0.8).abs().mean().item())
    assert left[0] > 0.19  # where it began, but for the rounding of 0.8
    assert left[1] < 0.01


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_states_of_what_is_rounded_stochastically_are_float32(dtype, expected):
    x = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    x.grad = torch.ones_like(x)
    optimizer = optim.AdamW([x], stochastic_rounding=True)
    optimizer.step()
    assert {optimizer.state[x][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {expected}


def test_stochastic_rounding_is_right_on_average(backend):
    size = 1 << 16
    x = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    x.grad = torch.linspace(0.1, 1, size).bfloat16()
    optimizer = optim.SGD([x], lr=1e-3, stochastic_rounding=True, seed=1)
    optimizer.step()
    exact = 1 - 1e-3 * x.grad.double()
    values = x.detach().double()
    # Up or down to a neighbour, 2^-8 apart below 1.
    assert (values - exact).abs().max() < 2**-8
    # The mean of independent draws, each with a standard deviation of at most half of that: five deviations of it.
    assert abs((values - exact).mean()) < 5 * 2**-9 / size**0.5
    again = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    again.grad = x.grad
    optim.SGD([again], lr=1e-3, stochastic_rounding=True, seed=1).step()
    assert torch.equal(again, x)
    other = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
    other.grad = x.grad
    optim.SGD([other], lr=1e-3, stochastic_rounding=True, seed=2).step()
    assert not torch.equal(other, x)


def draws(index: torch.Tensor, key: int, grad_bits: torch.Tensor) -> torch.Tensor:
    """`optim_draw` of csrc/optim.h, in 64-bit integers."""

    def scramble(word):
        word = word ^ (word >> 16)
        word = word * 0x7FEB352D & 0xFFFFFFFF
        word = word ^ (word >> 15)
        word = word * 0x846CA68B & 0xFFFFFFFF
        return word ^ (word >> 16)

    return scramble(scramble((index + key) & 0xFFFFFFFF) ^ grad_bits) >> 16, scramble


def test_stochastic_rounding_is_what_its_definition_says(backend):
    size, seed = 1000, 0x1_2345_6789
    x = torch.nn.Parameter(torch.randn(size).bfloat16())
    x.grad = torch.randn(size).bfloat16()
    start, grad = x.detach().float(), x.grad.float()
    optim.SGD([x], lr=1e-3, stochastic_rounding=True, seed=seed).step()
    scramble = draws(torch.zeros(1, dtype=torch.int64), 0, torch.zeros(1, dtype=torch.int64))[1]
    key = scramble((scramble((seed & 0xFFFFFFFF) ^ scramble(seed >> 32)) + 1) & 0xFFFFFFFF)
    bits = (start - grad * 1e-3).view(torch.int32).long() & 0xFFFFFFFF
    draw, _ = draws(torch.arange(size), key, grad.view(torch.int32).long() & 0xFFFFFFFF)
    wanted = ((bits + draw) & 0xFFFF0000).to(torch.int64)
    assert torch.equal(x.detach().float().view(torch.int32).long() & 0xFFFFFFFF, wanted)


def test_infinity_and_nan_stay_under_stochastic_rounding(backend):
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40]).bfloat16()
    x = torch.nn.Parameter(values.clone())
    x.grad = torch.zeros_like(values)
    optim.SGD([x], lr=0.0, stochastic_rounding=True).step()
    assert torch.equal(x[:2], values[:2])
    assert x[2].isnan()
    assert x[3:5].eq(0).all()
