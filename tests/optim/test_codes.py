"""8-bit states: the map, the codes, the optimizers that keep them."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import EIGHT_BITS, KINDS, on_the_cpu, parameters, run, set_gradients

from entrenar import optim
from entrenar.optim.codes import (
    BLOCK,
    ZERO_CODE,
    code_bounds,
    codebook,
    dequantize_blockwise,
    dynamic_map,
    encode,
    quantize_blockwise,
)

ops = torch.ops.entrenar


def codes_of(values: torch.Tensor, signed: bool) -> torch.Tensor:
    """The kernels' codes of values in [-1, 1]: a step of which only the state remains.

    SGD's buffer begins as the gradient; Adam's second moment is, with beta2 = 0, the gradient's square. A block's last
    element is 1, so that the values are not scaled.
    """
    blocks = values.float().view(-1, BLOCK - 1)
    grad = torch.cat([blocks, torch.ones(len(blocks), 1)], 1).flatten().contiguous()
    size, device = grad.numel(), grad.device
    states = [torch.zeros(size, dtype=torch.uint8) for _ in range(1 if signed else 2)]
    absmaxes = [torch.zeros(size // BLOCK) for _ in states]
    books = [codebook(True, device), codebook(False, device)][: len(states)]
    lists = [torch.zeros(size)], [grad], states, absmaxes, [torch.zeros(())], books, None, None
    if signed:
        ops.sgd_(*lists, 0.0, 0.9, 0.0, 0.0, False, False)
    else:
        ops.adam_(*lists, 0.0, 0.0, 0.0, 1.0, 0.0, False, False)
    assert torch.equal(absmaxes[-1], torch.ones(size // BLOCK))
    return states[-1].view(-1, BLOCK)[:, :-1].flatten()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed):
    assert torch.equal(dynamic_map(signed), bnb.create_dynamic_map(signed=signed).cpu())


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_values(signed):
    values = torch.cat([torch.rand(2000), 10 ** (-8 * torch.rand(6000))]) * torch.randn(8000).sign()
    values = (values if signed else values.abs()).cpu()
    distance = (values[:, None].double() - dynamic_map(signed).double()).abs()
    chosen = encode(values, signed).long()
    assert torch.equal(distance.gather(1, chosen[:, None])[:, 0], distance.amin(1))


def near(values: torch.Tensor, steps: int) -> torch.Tensor:
    """Float32 numbers up to so many steps away from each of these."""
    bits = values.float().view(torch.int32)[:, None] + torch.arange(-steps, steps + 1, dtype=torch.int32, device="cpu")
    return bits.flatten().clamp(0, 0x3F800000).to(torch.int32).view(torch.float32)


def test_kernels_find_the_codes_of_a_search(backend):
    bounds = code_bounds(True).cpu()
    powers = 2.0 ** torch.arange(-40, 1, device="cpu")
    magnitudes = torch.cat(
        [
            near(bounds, 60),
            near(dynamic_map(True)[ZERO_CODE:], 5),
            near(powers, 5),
            torch.arange(0, 0x3F800001, 99991, dtype=torch.int32, device="cpu").view(torch.float32),
        ]
    )
    magnitudes = magnitudes[magnitudes.ge(torch.finfo(torch.float32).tiny) | magnitudes.eq(0)]
    values = torch.cat([magnitudes, -magnitudes])
    values = values[: len(values) // (BLOCK - 1) * (BLOCK - 1)].to(torch.get_default_device())
    assert torch.equal(codes_of(values, True), encode(values, True))


def test_kernels_find_the_unsigned_codes_of_a_search(backend):
    # Second moments are squares: the roots of all numbers near a bound, and of those in between.
    bounds = code_bounds(False)
    roots = torch.cat([near(bounds.double().sqrt().float(), 60), torch.linspace(0, 1, 20000, device="cpu")])
    roots = roots[: len(roots) // (BLOCK - 1) * (BLOCK - 1)].to(torch.get_default_device())
    assert torch.equal(codes_of(roots, False), encode(roots * roots, False))


@pytest.mark.parametrize("signed", [True, False])
def test_blocks_and_back(signed):
    x = torch.randn(3, 300).square() if not signed else torch.randn(3, 300)
    x[1] = 0
    codes, absmax = quantize_blockwise(x, signed)
    assert (codes.shape, codes.dtype, absmax.shape) == (x.shape, torch.uint8, (4,))
    back = dequantize_blockwise(codes, absmax, signed)
    # A cell is at most 0.9 / 64 of a decade, or 0.9 / 128, and of the block's maximum.
    assert (back - x).abs().max() <= x.abs().max() * (0.0071 if signed else 0.0036)
    assert torch.equal(quantize_blockwise(torch.zeros(0), signed)[1], torch.zeros(0))


@pytest.mark.parametrize("signed", [True, False])
def test_the_smallest_blocks(signed):
    least = torch.finfo(torch.float32).tiny
    x = torch.tensor([0.0, least / 2, least]).repeat_interleave(BLOCK)
    codes, absmax = quantize_blockwise(x, signed)
    assert absmax.tolist() == [0, 0, least]
    assert codes.view(3, BLOCK).unique(dim=1).flatten().tolist() == [*[ZERO_CODE if signed else 0] * 2, 255]


def test_the_maps_do_not_depend_on_the_default_device():
    cached = dynamic_map, code_bounds, codebook
    expected = [codebook(signed, torch.device("cpu")) for signed in (True, False)]
    for function in cached:
        function.cache_clear()
    with torch.device("meta"):
        found = [codebook(signed, torch.device("cpu")) for signed in (True, False)]
    # As bytes: among the words are integers, which as floats are NaN.
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def compare_steps(make: Callable[[list], Any], params, gradients_of: Callable[[int], None], steps: int) -> None:
    """Steps are those of the reference, to the bit: decode, the rule in float32, encode."""
    copies = on_the_cpu(params)
    optimizer, plain = make(params), make(copies)
    for step in range(steps):
        gradients_of(step)
        optimizer.step()
        for group in plain.param_groups:
            for same in group["params"]:
                param = params[next(i for i, c in enumerate(copies) if c is same)]
                state = plain.state[same]
                if not state:
                    plain._start(group, same, state)
                with torch.no_grad():
                    plain._step_in_torch(group, same, param.grad.to("cpu", copy=True), state)
        for param, same in zip(params, copies, strict=True):
            assert same_bits(param.cpu(), same)
            for name, value in plain.state[same].items():
                assert same_bits(optimizer.state[param][name].cpu(), value), name


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize(("dtype", "steps"), [(torch.float32, 50), (torch.bfloat16, 3), (torch.float16, 3)])
def test_steps_are_the_references(kind, dtype, steps, backend):
    def make(params):
        return EIGHT_BITS[kind]([{"params": params[:1]}, {"params": params[1:]}], **KINDS[kind][1], min_8bit_size=100)

    params = parameters(dtype, shapes=[(5000,), (4096,), (17, 31), (3,)])
    compare_steps(make, params, lambda step: set_gradients(params, step, missing=0), steps)


@pytest.mark.parametrize(
    "changed", [{}, {"lr": 0.0}, {"eps": 1e-17}, {"eps": 1e-30}, {"eps": 1e6}, {"weight_decay": 0.0}], ids=str
)
@pytest.mark.parametrize("kind", ["adam", "adamw"])  # whose roots and quotients depend on it
def test_steps_at_the_ends_of_the_range_are_the_references(kind, changed, backend):
    """Zeros of either sign, blocks of them, and gradients from the least numbers to some with large squares."""
    settings = {**KINDS[kind][1], **changed}
    params = parameters(torch.float32, shapes=[(5000,), (4096,), (2049,)])
    with torch.no_grad():
        params[0][:700] = -0.0
        params[0][700:1400] = 0.0

    def set_extremes(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for param, (low, high) in zip(params, [(-45, -12), (-18, -10), (-30, 16)], strict=True):
            draws = torch.rand(2, param.numel(), generator=generator, device="cpu", dtype=torch.float64)
            grad = (10 ** (low + (high - low) * draws[0]) * (draws[1] - 0.5).sign()).float()
            grad[:512] *= 0
            grad[1000::7] *= 0
            param.grad = grad.to(param.device)

    make = functools.partial(EIGHT_BITS[kind], **settings, min_8bit_size=100)
    compare_steps(make, params, set_extremes, 4)


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_steps_of_tensors_that_begin_anywhere_are_the_references(kind, offset, backend):
    params = [torch.nn.Parameter(torch.randn(n + offset)[offset:]) for n in (2000, 256, 2304)]

    def set_some(step: int) -> None:
        for param in params:
            param.grad = torch.randn(param.numel() + offset)[offset:]

    make = functools.partial(EIGHT_BITS[kind], **KINDS[kind][1], min_8bit_size=100)
    compare_steps(make, params, set_some, 2)


def test_what_small_tensors_and_others_keep():
    params = parameters(torch.bfloat16, shapes=[(4095,), (64, 64), (0,)])
    for min_8bit_size, wanted in ((4096, [4, 1, 4]), (0, [1, 1, 1])):
        optimizer = optim.AdamW8bit(params, min_8bit_size=min_8bit_size)
        set_gradients(params, 0, missing=0)
        optimizer.step()
        assert [optimizer.state[p]["exp_avg"].element_size() for p in params] == wanted


def test_states_take_2_bytes_a_parameter():
    param = torch.nn.Parameter(torch.zeros(1000, 1000))
    for cls, most in ((optim.AdamW8bit, 2.1), (optim.Lion8bit, 1.05), (optim.SGD8bit, 1.05)):
        optimizer = cls([param])
        param.grad = torch.zeros_like(param)
        optimizer.step()
        assert sum(value.nbytes for value in optimizer.state[param].values()) / param.numel() <= most


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(kind, bad, backend):
    params = parameters(torch.float32, shapes=[(5000,), (6000,), (3,)])
    optimizer = EIGHT_BITS[kind](params, **KINDS[kind][1])
    set_gradients(params, 0, missing=0)
    optimizer.step()
    before = copy.deepcopy([*params, *optimizer.state.values()])
    set_gradients(params, 1, missing=0)
    params[1].grad[4321] = bad
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    if params[0].is_cpu:
        wanted = "parameter 1 of group 0, of shape \\(6000,\\)" if abs(bad) != 3e38 else "every gradient is finite"
        with pytest.raises(RuntimeWarning, match=wanted):
            raise caught[0].message
    assert optimizer.skipped_steps == 1
    for was, now in zip(before, [*params, *optimizer.state.values()], strict=True):
        if isinstance(was, dict):
            assert all(torch.equal(was[name], now[name]) for name in was)
        else:
            assert torch.equal(was, now)
    params[1].grad[4321] = 0.5
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(param.isfinite().all() for param in params)
    assert optimizer.state[params[0]]["step"] == 2


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_stays_near_the_32_bit_optimizer(kind):
    cls, first, _ = KINDS[kind]
    shapes = [(60, 50), (4000,)]
    wide, narrow = parameters(torch.float32, shapes=shapes), parameters(torch.float32, shapes=shapes)
    optimizers = cls(wide, **first), EIGHT_BITS[kind](narrow, **first, min_8bit_size=0)
    for optimizer, params in zip(optimizers, (wide, narrow), strict=True):
        for step in range(50):
            set_gradients(params, step, missing=0)
            optimizer.step()
    for a, b, start in zip(wide, narrow, parameters(torch.float32, shapes=shapes), strict=True):
        moved = (a - start).norm()
        assert (a - b).norm() <= 0.1 * moved


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_state_dicts_go_between_32_and_8_bits(kind):
    cls, first, _ = KINDS[kind]
    shapes = [(60, 50), (40,)]
    params = parameters(torch.float32, shapes=shapes)
    wide, narrow = cls(params, **first), EIGHT_BITS[kind](params, **first, min_8bit_size=100)
    run(wide, params, 5, missing=0)
    narrow.load_state_dict(wide.state_dict())
    back = cls(params, **first)
    back.load_state_dict(narrow.state_dict())
    for name, signed in zip(cls.STATES, cls.SIGNED, strict=True):
        large, small = (narrow.state[param][name] for param in params)
        assert (large.dtype, small.dtype) == (torch.uint8, torch.float32)
        expected, absmax = quantize_blockwise(wide.state[params[0]][name], signed)
        assert torch.equal(large, expected)
        assert torch.equal(narrow.state[params[0]][name + "_absmax"], absmax)
        error = (back.state[params[0]][name] - wide.state[params[0]][name]).abs().flatten()
        # Half of the widest cell, of the block's maximum.
        assert (error <= 0.0071 * absmax.repeat_interleave(BLOCK)[: len(error)]).all()
        assert torch.equal(small, wide.state[params[1]][name])
    assert narrow.state[params[0]]["step"] == 5


def test_loading_keeps_the_dtypes_of_codes_and_scales():
    params = parameters(torch.bfloat16, shapes=[(5000,)])
    optimizer = optim.AdamW8bit(params)
    run(optimizer, params, 2, missing=0)
    for other in (optim.AdamW8bit(params), copy.deepcopy(optimizer)):
        if other.state:
            state = next(iter(other.state.values()))
        else:
            other.load_state_dict(optimizer.state_dict())
            state = other.state[params[0]]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8
        assert state["exp_avg_absmax"].dtype == torch.float32
        assert all(torch.equal(value, optimizer.state[params[0]][name]) for name, value in state.items())


@pytest.mark.parametrize("cls", [optim.AdamW, optim.AdamW8bit])
def test_states_lie_where_their_parameters_do(cls):
    params = parameters(torch.float32, shapes=[(5000,), (3,)])
    set_gradients(params, 0, missing=0)
    with torch.device("meta"):
        optimizer = cls(params)
        optimizer.step()
        other = cls(params)
        other.load_state_dict(optimizer.state_dict())
    for state in (*optimizer.state.values(), *other.state.values()):
        assert {value.device for value in state.values()} == {params[0].device}


def test_a_loaded_state_gets_the_dtype_that_it_has_here():
    wide, narrow = (parameters(dtype, shapes=[(50,)]) for dtype in (torch.float64, torch.bfloat16))
    before, after = optim.Adam(wide), optim.Adam(narrow)
    run(before, wide, 2, missing=0)
    after.load_state_dict(before.state_dict())
    for name in optim.Adam.STATES:
        assert torch.equal(after.state[narrow[0]][name], before.state[wide[0]][name].bfloat16())


def test_a_momentum_that_has_not_begun_begins():
    params = parameters(torch.float32, shapes=[(50,)])
    optimizer = optim.SGD(params, momentum=0.9)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"momentum_buffer": None}}})
    set_gradients(params, 0, missing=0)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)


def test_a_state_that_does_not_fit_is_refused():
    params = parameters(torch.float32, shapes=[(50,)])
    optimizer = optim.Adam(params)
    run(optimizer, params, 1, missing=0)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"exp_avg has the shape \(50,\), and its parameter \(5, 10\)"):
        optim.Adam(parameters(torch.float32, shapes=[(5, 10)])).load_state_dict(saved)
    with pytest.raises(ValueError, match="has no momentum_buffer"):
        optim.SGD(params, momentum=0.9).load_state_dict(
            {**saved, "state": {0: {"momentum_buffer_absmax": torch.ones(1)}}}
        )
    amsgrad = torch.optim.Adam(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        optimizer.load_state_dict(amsgrad.state_dict())


@settings(max_examples=20, deadline=None)
@given(size=st.integers(0, 1100), seed=st.integers(0, 100))
def test_any_number_of_elements(size, seed):
    params = parameters(torch.float32, seed=seed, shapes=[(size,)])
    optimizer = optim.AdamW8bit(params, min_8bit_size=0)
    set_gradients(params, seed, missing=0)
    before = params[0].detach().clone()
    optimizer.step()
    state = optimizer.state[params[0]]
    _, absmax = quantize_blockwise(params[0].grad * torch.tensor(0.1), True)
    assert torch.equal(state["exp_avg_absmax"], absmax)
    assert not size or (params[0] != before).any()
