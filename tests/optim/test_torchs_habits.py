"""What users of torch.optim do to an optimizer, and what happens then there, happens here too."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import bitsandbytes.optim as bnb
import numpy as np
import pytest
import torch
from runs import parameters, run, set_gradients

from entrenar import optim


def both(ours, theirs, **settings):
    """Equal parameters in an optimizer of ours and in one of torch's."""
    params = parameters(torch.float64)
    copies = copy.deepcopy(params)
    return (params, ours(params, **settings)), (copies, theirs(copies, foreach=False, **settings))


def assert_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("begun", ["never", "removed", "None"])
@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_a_momentum_that_comes_later(begun, dampening, backend):
    sides = both(optim.SGD, torch.optim.SGD, lr=0.1, momentum=0.0 if begun == "never" else 0.9, dampening=dampening)
    for params, optimizer in sides:
        run(optimizer, params, 2, missing=0)
        optimizer.param_groups[0]["momentum"] = 0.9
        if begun == "removed":
            del optimizer.state[params[2]]["momentum_buffer"]
        elif begun == "None":
            optimizer.state[params[2]]["momentum_buffer"] = None
        run(optimizer, params, 4, first=2, missing=0)
    assert_equal(sides[0][0], sides[1][0])


def test_a_momentum_that_comes_after_loading(backend):
    params = parameters(torch.float32)
    first = optim.SGD(params, lr=0.1)
    run(first, params, 1, missing=0)
    second = optim.SGD8bit(params, lr=0.1, momentum=0.0, min_8bit_size=8)
    second.load_state_dict(first.state_dict())
    second.param_groups[0]["momentum"] = 0.9
    run(second, params, 2, first=1, missing=0)
    assert second.state[params[0]]["momentum_buffer"].shape == params[0].shape


def test_hooks_of_loading_see_and_change_what_torchs_see_and_change(backend):
    for params, optimizer in both(optim.AdamW, torch.optim.AdamW, lr=0.1):
        run(optimizer, params, 1, missing=0)
        seen = []

        def before(_, state_dict, seen=seen):
            seen.append(len(state_dict["state"]))
            state_dict["state"] = {i: {**s, "exp_avg": s["exp_avg"] + 1} for i, s in state_dict["state"].items()}

        def after(loaded, seen=seen):
            seen.append(len(loaded.state))
            for state in loaded.state.values():
                state["exp_avg_sq"].fill_(4)

        optimizer.register_load_state_dict_pre_hook(before)
        optimizer.register_load_state_dict_post_hook(after)
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        assert seen == [len(params), len(params)]
        for i, param in enumerate(params):
            assert torch.equal(optimizer.state[param]["exp_avg"], saved["state"][i]["exp_avg"] + 1)
            assert (optimizer.state[param]["exp_avg_sq"] == 4).all()


def test_a_state_that_does_not_load_changes_nothing(backend):
    params = parameters(torch.float32)
    optimizer = optim.AdamW(params, lr=0.1)
    run(optimizer, params, 1, missing=0)
    before = copy.deepcopy(optimizer.state_dict())
    bad = copy.deepcopy(before)
    bad["param_groups"][0]["lr"] = 7.0
    bad["state"][3]["exp_avg_sq"] = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="exp_avg_sq has the shape"):
        optimizer.load_state_dict(bad)
    after = optimizer.state_dict()
    assert after["param_groups"][0]["lr"] == before["param_groups"][0]["lr"]
    for i, state in before["state"].items():
        assert all(torch.equal(after["state"][i][name], value) for name, value in state.items())


def test_states_of_ones_own_are_loaded(backend):
    params = parameters(torch.float32)
    optimizer = optim.AdamW(params, lr=0.1)
    run(optimizer, params, 1, missing=0)
    optimizer.state[params[0]]["note"] = "kept"
    optimizer.state["of nobody"] = 3
    other = optim.AdamW(params, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[params[0]]["note"] == "kept"
    assert other.state["of nobody"] == 3


@pytest.mark.parametrize("name", ["exp_avg", "step"])
def test_a_state_moved_by_its_data_is_the_one_that_counts(name, backend):
    sides = both(optim.AdamW, torch.optim.AdamW, lr=0.1)
    for params, optimizer in sides:
        run(optimizer, params, 1, missing=0)
        for state in optimizer.state.values():
            state[name].data = torch.zeros_like(state[name])
        run(optimizer, params, 3, first=1, missing=0)
    assert_equal(sides[0][0], sides[1][0])


def test_a_parameter_that_outgrew_its_state_is_refused(backend):
    params = [torch.nn.Parameter(torch.ones(size)) for size in (300, 600)]
    optimizer = optim.AdamW(params)
    set_gradients(params, 0, missing=0)
    optimizer.step()
    params[0].grad = None
    params[0].data = torch.ones(400)
    set_gradients(params, 1, missing=0)
    with pytest.raises(RuntimeError, match="states must have the sizes of params"):
        optimizer.step()


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, optim.Lion])
def test_a_compiled_step(cls):
    sides = []
    for compiled in (False, True):
        params = parameters(torch.float32)
        optimizer = cls(params, lr=0.1)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for i in range(2):
            set_gradients(params, i, missing=0)
            step()
        sides.append(params)
    assert_equal(*sides)


@pytest.mark.parametrize("where", ["constructor", "added"])
def test_amsgrad_of_a_group_is_refused(where):
    param, other = parameters(torch.float32)[:2]
    group = {"params": [param], "amsgrad": True}
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        optim.Adam([group]) if where == "constructor" else optim.Adam([other]).add_param_group(group)


def test_adam_refuses_a_state_with_decoupled_decay():
    params = parameters(torch.float32)
    theirs = torch.optim.AdamW(params, weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled_weight_decay is AdamW's"):
        optim.Adam(params).load_state_dict(theirs.state_dict())
    optim.AdamW(params).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("theirs", "ours"), [(bnb.AdamW, optim.Lion), (bnb.AdamW, optim.SGD), (bnb.Lion, optim.AdamW)])
def test_bitsandbytes_state_of_another_rule_is_refused(theirs, ours):
    params = [torch.nn.Parameter(torch.ones(5000))]
    other = theirs(params)
    set_gradients(params, 0, missing=0)
    other.step()
    with pytest.raises(ValueError, match="bitsandbytes' state has"):
        ours(params, lr=0.1).load_state_dict(other.state_dict())


def test_a_state_of_another_rule_is_refused():
    params = parameters(torch.float32)
    other = torch.optim.AdamW(params)
    set_gradients(params, 0, missing=0)
    other.step()
    for cls in (optim.Lion, optim.SGD):
        with pytest.raises(ValueError, match="it is another rule's"):
            cls(params, lr=0.1).load_state_dict(other.state_dict())


def test_float64_stays_beside_states_of_8_bits(backend):
    param = torch.nn.Parameter(torch.rand(5000, dtype=torch.float64))
    before = param.detach().clone()
    param.grad = torch.rand_like(param) + 0.5
    optim.AdamW8bit([param], lr=0.0).step()
    assert torch.equal(param, before)
    optim.AdamW8bit([param], lr=0.1, weight_decay=0).step()
    torch.testing.assert_close(param.detach(), before - 0.1, atol=1e-8, rtol=0)


def test_numbers_of_numpy(backend):
    params = parameters(torch.float32)
    set_gradients(params, 0, missing=0)
    for cls, settings in (
        (optim.AdamW, {"eps": 1e-8, "betas": (0.9, 0.99)}),
        (optim.SGD, {"momentum": 0.5}),
        (optim.Lion, {}),
    ):
        sides = []
        for number in (float, np.float32):
            copies = copy.deepcopy(params)
            for a, b in zip(copies, params, strict=True):
                a.grad = b.grad.clone()
            given = {
                name: tuple(map(number, value)) if isinstance(value, tuple) else number(np.float32(value))
                for name, value in settings.items()
            }
            cls(copies, lr=number(np.float32(0.1)), weight_decay=np.int64(0), **given).step()
            sides.append(copies)
        for a, b in zip(*sides, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_a_schedule_is_loaded_without_trusting_its_file():
    optimizer = optim.AdamW(parameters(torch.float32), lr=0.1)
    scheduler = optim.CosineScheduler(0.1, 0.01, 100).attach(optimizer)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    file = io.BytesIO()
    torch.save(scheduler.state_dict(), file)
    file.seek(0)
    other = optim.CosineScheduler(0.1, 0.01, 100).attach(optim.AdamW(parameters(torch.float32), lr=0.1))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.last_epoch == 5
    assert other.get_lr() == scheduler.get_lr()


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_another_default_dtype(dtype):
    """In a process of its own, since the maps are computed once."""
    program = f"""
import torch
from entrenar.optim import AdamW8bit
torch.set_default_dtype(torch.{dtype})
param = torch.nn.Parameter(torch.ones(5000, dtype=torch.float32))
param.grad = torch.ones_like(param)
optimizer = AdamW8bit([param], lr=0.5, weight_decay=0)
optimizer.grad_scale, optimizer.found_inf = torch.ones((), dtype=torch.float32), torch.zeros((), dtype=torch.float32)
optimizer.step()
assert (param - 0.5).abs().max() < 1e-6, param
"""
    result = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
