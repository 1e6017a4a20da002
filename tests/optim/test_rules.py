"""Every optimizer, in 32 bits: its rule is torch's, its kernel is the rule's, and nothing else matters."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import bitsandbytes.optim
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import BOTH, EIGHT_BITS, KINDS, grouped, on_the_cpu, parameters, run, set_gradients
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._python_dispatch import TorchDispatchMode

import entrenar
from entrenar import optim
from entrenar.autograd.ops._library import LEVELS
from entrenar.optim.sgd import sgd_update_

TORCH = {optim.SGD: torch.optim.SGD, optim.Adam: torch.optim.Adam, optim.AdamW: torch.optim.AdamW}
ALIKE = [kind for kind, (ours, *_) in KINDS.items() if ours in TORCH]


@pytest.mark.parametrize("kind", ALIKE)
def test_100_steps_in_float64_are_torchs_bits(kind):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    cls = KINDS[kind][0]
    run(cls(grouped(ours, kind)), ours, 100)
    run(TORCH[cls](grouped(theirs, kind), foreach=False), theirs, 100)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}])
@pytest.mark.parametrize("kind", ALIKE)
def test_100_steps_in_float32_equal_torch(kind, way):
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    cls = KINDS[kind][0]
    # torch's fused SGD fails where some momenta have begun and others have not.
    missing = 0.0 if "fused" in way else 0.2
    run(cls(grouped(ours, kind)), ours, 100, missing=missing)
    run(TORCH[cls](grouped(theirs, kind), **way), theirs, 100, missing=missing)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ALIKE)
@settings(max_examples=5, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=2, max_size=6),
    group=st.integers(1, 5),
    lr=st.floats(1e-5, 1e-2),
    weight_decay=st.floats(1e-3, 0.3),
    seed=st.integers(0, 2**31),
)
def test_100_steps_of_any_shapes_and_groups_equal_torch(kind, shapes, group, lr, weight_decay, seed):
    cls, first, second = KINDS[kind]
    for dtype in (torch.float64, torch.float32):
        sides = []
        for make in (cls, partial(TORCH[cls], foreach=False)):
            params = parameters(dtype, seed, shapes)
            firsts = {"params": params[:group], **first, "lr": lr, "weight_decay": weight_decay}
            rest = {"params": params[group:], **second, "weight_decay": weight_decay / 2}
            run(make([firsts, rest]), params, 100)
            sides.append(params)
        rtol, atol = (0, 0) if dtype is torch.float64 else (1e-5, 1e-6)
        for a, b in zip(*sides, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_float32_is_the_rules_bits(kind, backend):
    params = parameters(torch.float32)
    optimizer = KINDS[kind][0](grouped(params, kind))
    copies = on_the_cpu(params)
    plain = KINDS[kind][0](grouped(copies, kind))
    for step in range(4):
        set_gradients(params, step)
        for param, same in zip(params, copies, strict=True):
            same.grad = None if param.grad is None else param.grad.to("cpu", copy=True)
        optimizer.step()
        for group in plain.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = plain.state[param]
                    if not state:
                        plain._start(group, param, state)
                    with torch.no_grad():
                        plain._step_in_torch(group, param, param.grad, state)
        for param, same in zip(params, copies, strict=True):
            assert torch.equal(param.cpu(), same)
            for name, value in plain.state[same].items():
                assert torch.equal(optimizer.state[param][name].cpu(), value), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_in_16_bits_rounds_once(kind, dtype, backend):
    params = parameters(dtype)
    optimizer = KINDS[kind][0](grouped(params, kind))
    wide = KINDS[kind][0](grouped([torch.nn.Parameter(param.detach().float()) for param in params], kind))
    for step in range(2):
        set_gradients(params, step, missing=0)
        expected = [param for group in wide.param_groups for param in group["params"]]
        for param, same in zip(params, expected, strict=True):
            same.data.copy_(param)
            same.grad = param.grad.float()
            for name, value in optimizer.state[param].items():
                wide.state[same][name].copy_(value)
        optimizer.step()
        wide.step()
        for param, same in zip(params, expected, strict=True):
            assert torch.equal(param, same.to(dtype))
            for name, value in wide.state[same].items():
                actual = optimizer.state[param][name]
                assert actual.dtype == (torch.float32 if name == "step" else dtype)
                assert torch.equal(actual, value.to(actual.dtype)), name


def test_an_update_of_sgd_by_hand():
    param, buffer = torch.tensor([1.0]), torch.tensor([1.0])
    sgd_update_(param, torch.tensor([0.25]), buffer, 2, lr=0.1, momentum=0.5)
    torch.testing.assert_close((param, buffer), (torch.tensor([0.925]), torch.tensor([0.75])))
    sgd_update_(param, torch.tensor([0.25]), None, 3, lr=0.1)
    torch.testing.assert_close(param, torch.tensor([0.9]))


@pytest.mark.parametrize("kind", KINDS)
def test_maximize_is_minimizing_the_opposite(kind, backend):
    params, opposite = parameters(torch.float32), parameters(torch.float32)
    cls = KINDS[kind][0]
    settings = {name: value for name, value in KINDS[kind][1].items() if name != "weight_decay"}
    up, down = cls(params, **settings, maximize=True), cls(opposite, **settings)
    for step in range(3):
        set_gradients(params, step)
        for param, other in zip(params, opposite, strict=True):
            other.grad = None if param.grad is None else -param.grad
        up.step()
        down.step()
    assert all(torch.equal(a, b) for a, b in zip(params, opposite, strict=True))


@pytest.mark.parametrize(("kind", "bits"), BOTH)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.integers(1, 4),
    order=st.permutations(range(5)),
    groups=st.lists(st.integers(0, 2), min_size=5, max_size=5),
)
def test_neither_threads_nor_order_nor_grouping_matter(kind, bits, backend, dtype, threads, order, groups):
    results = []
    before = torch.get_num_threads()
    small = {} if bits == 32 else {"min_8bit_size": 8}
    cls = EIGHT_BITS[kind] if bits == 8 else KINDS[kind][0]
    for count, indices, owners in [(1, range(5), [0] * 5), (threads, order, groups)]:
        params = parameters(dtype, shapes=[(3,), (200, 333), (5, 7), (1,), (300,)])
        split = [{"params": [params[i] for i in indices if owners[i] == group]} for group in set(owners)]
        optimizer = cls(split, **KINDS[kind][1], **small, max_norm=1e3, stochastic_rounding=True, seed=5)
        torch.set_num_threads(count)
        for step in range(3):
            set_gradients(params, step, missing=0)
            optimizer.step()
        torch.set_num_threads(before)
        states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
        results.append([*params, *states])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("load", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bits"), BOTH)
def test_resume_at_any_step_is_bit_identical(kind, bits, dtype, load):
    cls = EIGHT_BITS[kind] if bits == 8 else KINDS[kind][0]
    extra = {"stochastic_rounding": dtype is torch.bfloat16, "seed": 3, **({"min_8bit_size": 30} if bits == 8 else {})}
    straight = parameters(dtype)
    optimizer = cls(grouped(straight, kind), **extra)
    ways = []
    for at in range(7):
        if load:
            resumed = copy.deepcopy(straight)
            after = cls(grouped(resumed, kind))
            after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            after = pickle.loads(pickle.dumps(optimizer))
            resumed = [param for group in after.param_groups for param in group["params"]]
        ways.append((at, after, resumed))
        run(optimizer, straight, at + 1, first=at)
    for at, after, resumed in ways:
        run(after, resumed, 7, first=at)
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True)), at


def torchs_inputs():
    for info in optim_db:
        ours = {theirs: cls for cls, theirs in TORCH.items()}.get(info.optim_cls)
        if ours:
            for given_settings in info.optim_inputs_func(device="cpu"):
                yield pytest.param(ours, given_settings.kwargs, id=f"{ours.__name__} {given_settings.desc}")


@pytest.mark.parametrize(("cls", "kwargs"), list(torchs_inputs()))
def test_torchs_own_inputs(cls, kwargs):
    if kwargs.get("amsgrad"):
        with pytest.raises(ValueError, match="amsgrad=True is not supported"):
            cls(parameters(torch.float64), **kwargs)
        return
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    for optimizer, params in ((cls(ours, **kwargs), ours), (TORCH[cls](theirs, **kwargs, foreach=False), theirs)):
        for step in range(5):
            set_gradients(params, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def torchs_error_inputs():
    for info in optim_db:
        if ours := {theirs: cls for cls, theirs in TORCH.items()}.get(info.optim_cls):
            for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
                # One implementation, which takes a tensor wherever it takes a number.
                if "foreach" not in error.optimizer_error_input.kwargs:
                    yield pytest.param(ours, error, id=f"{ours.__name__} {error.optimizer_error_input.desc}")


@pytest.mark.parametrize(("cls", "error"), list(torchs_error_inputs()))
def test_torchs_own_error_inputs(cls, error):
    given_inputs = error.optimizer_error_input
    params = [torch.nn.Parameter(torch.zeros(1))] if given_inputs.params is None else given_inputs.params
    refused = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with refused(error.error_type):
        cls(params, **given_inputs.kwargs)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", ALIKE)
def test_state_dict_goes_both_ways_with_torch(kind, ours_first):
    cls = KINDS[kind][0]
    straight, params = parameters(torch.float64), parameters(torch.float64)
    run(TORCH[cls](grouped(straight, kind), foreach=False), straight, 20, missing=0)
    kinds = (cls, TORCH[cls]) if ours_first else (TORCH[cls], cls)
    flags = {TORCH[cls]: {"foreach": False}}
    before = kinds[0](grouped(params, kind), **flags.get(kinds[0], {}))
    run(before, params, 10, missing=0)
    after = kinds[1](grouped(params, kind), **flags.get(kinds[1], {}))
    after.load_state_dict(before.state_dict())
    for group in after.param_groups:  # what was loaded leaves torch the choice of its rounding
        group.update(flags.get(kinds[1], {}))
    run(after, params, 20, first=10, missing=0)
    assert all(torch.equal(a, b) for a, b in zip(straight, params, strict=True))


def test_a_learning_rate_may_be_a_tensor(backend):
    params, same = parameters(torch.float32), parameters(torch.float32)
    lr = torch.tensor(0.5, dtype=torch.float64, device="cpu")
    optimizer, other = optim.AdamW(params, lr=lr), optim.AdamW(same, lr=0.25)
    optimizer.set_lr(0.25)
    assert optimizer.param_groups[0]["lr"] is lr
    for each, of in ((optimizer, params), (other, same)):
        set_gradients(of, 0)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        optim.SGD(params, lr=torch.ones(2))


def test_parameters_that_are_not_contiguous_are_trained(backend):
    for cls in (optim.AdamW, optim.AdamW8bit):
        dense = torch.nn.Parameter(torch.randn(90, 50))
        turned = torch.nn.Parameter(dense.detach().clone().T.contiguous().T)
        dense.grad = torch.randn(90, 50)
        turned.grad = dense.grad.T.contiguous().T
        for param in (dense, turned):
            optimizer = cls([param])
            optimizer.step()
            optimizer.step()
        assert not turned.is_contiguous()
        assert torch.equal(turned, dense)


def test_states_that_are_not_contiguous_are_loaded(backend):
    dense = torch.nn.Parameter(torch.randn(90, 50))
    turned = torch.nn.Parameter(dense.detach().clone().T.contiguous().T)
    dense.grad = torch.randn(90, 50)
    turned.grad = dense.grad.T.contiguous().T
    for param in (dense, turned):
        theirs = torch.optim.AdamW([param])
        theirs.step()
        ours = optim.AdamW([param])
        ours.load_state_dict(theirs.state_dict())
        ours.step()
    assert not theirs.state[turned]["exp_avg"].is_contiguous()
    assert torch.equal(turned, dense)


class Watched(torch.Tensor):
    """A subclass that computes with torch's functions alone."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert "entrenar" not in str(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_subclasses_of_tensor_are_trained_in_torch(max_norm):
    plain = torch.nn.Parameter(torch.randn(90, 50))
    watched = torch.nn.Parameter(plain.detach().clone().as_subclass(Watched))
    for param in (plain, watched):
        optimizer = optim.AdamW([param], max_norm=max_norm)
        for seed in range(3):
            torch.manual_seed(seed)
            param.grad = torch.randn(90, 50).as_subclass(type(param.data))
            optimizer.step()
    assert type(watched.data) is Watched
    # Each step is the same to the bit, but for the norm, whose sum has another order, and but for torch's operations on
    # CUDA, which round otherwise: by some units of the parameter and of the step.
    rtol, atol = (0, 0) if max_norm is None and plain.is_cpu else (1e-6, 1e-8)
    torch.testing.assert_close(torch.Tensor(watched), plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize("cls", [optim.SGD, optim.Adam, optim.AdamW, optim.Lion, *dict.fromkeys(EIGHT_BITS.values())])
def test_hooks_closures_groups_and_schedulers_work_as_torchs(cls):
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    optimizer = cls([("first", first)], lr=0.1)
    optimizer.add_param_group({"params": [("second", second)], "lr": 0.2})
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("pre"))
    optimizer.register_step_post_hook(lambda *_: called.append("post"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    loss = optimizer.step(lambda: called.append("closure") or 3.0)
    scheduler.step()
    assert (loss, called) == (3.0, ["pre", "closure", "post"])
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]
    assert optimizer.param_groups[1]["param_names"] == ["second"]


@pytest.mark.parametrize("cls", [optim.SGD, optim.AdamW, optim.AdamW8bit])
def test_grad_scaler_leaves_a_step_out(cls):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([param], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, torch.ones(3))
    assert scaler.get_scale() == 4.0
    optimizer.zero_grad()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert (param < 1).all()
    assert optimizer.skipped_steps == 1


class NothingIsRead(TorchDispatchMode):
    """Fails where the value of a tensor is asked for, for which a GPU would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


SCALED = [
    *[(kind, cls, {}) for kind, (cls, *_) in KINDS.items()],
    *[(kind, cls, {"max_norm": 0.5}) for kind, (cls, *_) in KINDS.items()],
    *[(kind, cls, {"min_8bit_size": 1}) for kind, cls in EIGHT_BITS.items()],
]


@pytest.mark.parametrize(("kind", "cls", "settings"), SCALED)
def test_scaled_steps_are_those_of_unscaled_gradients(kind, cls, settings, backend):
    plain, scaled = parameters(torch.float32), parameters(torch.float32)
    alone, optimizer = (cls(grouped(params, kind), **settings) for params in (plain, scaled))
    scaler = torch.amp.GradScaler(torch.get_default_device().type, init_scale=2.0**10, growth_interval=2)
    bad = 2
    for step in range(5):
        set_gradients(plain, step)
        for a, b in zip(plain, scaled, strict=True):
            b.grad = None if a.grad is None else scaler.scale(a.grad)
        if step == bad:
            scaled[-1].grad = torch.full_like(scaled[-1], torch.inf)
            before = copy.deepcopy(scaled)
        else:
            alone.step()
        if step == 3:
            scaler.unscale_(optimizer)
        with NothingIsRead():
            scaler.step(optimizer)
        scaler.update()
        if step == bad:
            assert all(torch.equal(a, b) for a, b in zip(scaled, before, strict=True))
        elif settings:
            torch.testing.assert_close(optimizer.grad_norm, alone.grad_norm)
    assert optimizer.skipped_steps == 1
    for a, b in zip(plain, scaled, strict=True):
        if "max_norm" in settings:
            # Factors differ in their last bits; Lion's sign may turn with them where both averages cancel.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 if kind != "lion" else 6e-3)
        else:
            assert torch.equal(a, b)  # the scales are powers of two


def test_a_scaled_step_without_a_kernel_is_that_of_the_unscaled_gradient():
    plain, scaled = parameters(torch.float64), parameters(torch.float64)
    alone, optimizer = (optim.AdamW(params, max_norm=0.5) for params in (plain, scaled))
    set_gradients(plain, 0, missing=0)
    for a, b in zip(plain, scaled, strict=True):
        b.grad = 8 * a.grad
    alone.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    optimizer.step()
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the factor is a float32
    torch.testing.assert_close(optimizer.grad_norm, alone.grad_norm)
    before = copy.deepcopy(scaled)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(scaled, before, strict=True))


def test_without_gradients_a_scaled_step_does_nothing():
    optimizer = optim.AdamW8bit([torch.nn.Parameter(torch.ones(3))])
    scaler = torch.amp.GradScaler(torch.get_default_device().type)
    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer) is None


def test_default_params_and_long_names():
    param = torch.nn.Parameter(torch.zeros(1))
    assert optim.Adam.default_params(learning_rate=0.5)([param]).defaults == optim.Adam([param], lr=0.5).defaults
    assert optim.SGD([param], learning_rate=0.25).defaults["lr"] == 0.25
    lion = optim.Lion([param], learning_rate=0.25, beta1=0.5)
    assert (lion.defaults["lr"], lion.defaults["betas"]) == (0.25, (0.5, 0.99))


def defaults(cls) -> dict:
    return cls([torch.nn.Parameter(torch.zeros(1))]).defaults


@pytest.mark.parametrize(
    ("ours", "theirs"), [*((cls, theirs) for cls, theirs in TORCH.items()), (optim.Lion, bitsandbytes.optim.Lion)]
)
def test_defaults_are_those_of_others(ours, theirs):
    shared = {"lr", "betas", "eps", "momentum", "dampening", "weight_decay", "nesterov", "maximize"} & defaults(
        ours
    ).keys()
    expected = defaults(theirs)
    assert {name: defaults(ours)[name] for name in shared} == {name: expected.get(name, False) for name in shared}
    assert (defaults(ours)["stochastic_rounding"], defaults(ours)["seed"]) == (False, 0)


# Without a momentum there is no state to keep in 8 bits.
@pytest.mark.parametrize(("name", "other"), [("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {}), ("Lion", {})])
def test_defaults_in_8_bits_are_those_in_32(name, other):
    expected = {**defaults(getattr(optim, name)), **other, "min_8bit_size": 4096}
    assert defaults(getattr(optim, name + "8bit")) == expected


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_settings_in_8_bits_are_those_in_32(kind):
    settings = {**KINDS[kind][1], "maximize": True, "max_norm": 2.0, "stochastic_rounding": True, "seed": 7}
    param = torch.nn.Parameter(torch.zeros(1))
    wide, narrow = KINDS[kind][0]([param], **settings), EIGHT_BITS[kind]([param], **settings, min_8bit_size=5)
    assert narrow.defaults == {**wide.defaults, "min_8bit_size": 5}
    assert narrow.max_norm == wide.max_norm == 2.0


@pytest.mark.parametrize(
    ("cls", "setting", "message"),
    [
        (optim.SGD, {"momentum": -0.5}, "momentum must be"),
        (optim.SGD, {"nesterov": True}, "nesterov needs a momentum"),
        (
            optim.SGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "nesterov needs a momentum, and no dampening",
        ),
        (optim.Lion, {"betas": (0.9, 1.0)}, "beta2 must be"),
        (optim.Lion, {"betas": (0.9, 0.99, 0.999)}, r"betas must be two numbers in \[0, 1\), and are"),
        (optim.Adam, {"betas": (0.9,)}, "betas must be two numbers"),
        (optim.Adam, {"betas": 0.9}, "betas must be two numbers"),
        (optim.Lion, {"lr": -1}, "lr must be"),
        (optim.Adam, {"amsgrad": True}, "amsgrad=True is not supported"),
        (optim.AdamW, {"differentiable": True}, "differentiable=True is not supported"),
        (optim.AdamW, {"max_norm": 0.0}, "max_norm must be greater than 0"),
        (optim.AdamW8bit, {"eps": -1.0}, "eps must be"),
    ],
)
def test_settings_out_of_range(cls, setting, message):
    with pytest.raises(ValueError, match=message):
        cls([torch.nn.Parameter(torch.zeros(1))], **setting)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["grads"].pop(), "lists of one length"),
        (lambda a: a["states"].pop(), "states must be a list of 2 for each"),
        (lambda a: a["grads"].__setitem__(0, torch.zeros(3)), "must have the shape and dtype"),
        (lambda a: a["states"].__setitem__(1, torch.zeros(2, dtype=torch.float16)), "states must have one dtype"),
        (lambda a: a["states"].__setitem__(1, torch.zeros(3)), "states must have the sizes of params"),
        (lambda a: a["grads"].__setitem__(0, torch.zeros(4)[::2]), "must be contiguous"),
        (lambda a: a["steps"].__setitem__(0, torch.zeros(1, dtype=torch.int64)), "steps must be float32 scalars"),
        (lambda a: a["absmaxes"].append(torch.zeros(1)), "absmaxes must be a list"),
        (lambda a: a["codebooks"].append(torch.zeros(1)), "codebooks must be a list"),
    ],
)
def test_kernel_refuses_what_does_not_fit(change, message, backend):
    arguments = {
        "params": [torch.zeros(2)],
        "grads": [torch.zeros(2)],
        "states": [torch.zeros(2), torch.zeros(2)],
        "absmaxes": [],
        "steps": [torch.zeros(())],
        "codebooks": [],
    }
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.adam_(*arguments.values(), None, None, 1e-3, 0.9, 0.999, 1e-8, 0.0, True, False)


@pytest.mark.cpu("levels are the CPU's")
def test_levels_take_the_same_steps():
    results = []
    before = entrenar.cpu_level()
    for level in LEVELS[: LEVELS.index(before) + 1]:
        entrenar.set_cpu_level(level)
        params = [param for kind in EIGHT_BITS for param in train_all(kind)]
        results.append(params)
    entrenar.set_cpu_level(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def train_all(kind: str) -> list[torch.Tensor]:
    made = []
    for cls, extra in ((KINDS[kind][0], {}), (EIGHT_BITS[kind], {"min_8bit_size": 8})):
        for dtype in (torch.float32, torch.bfloat16):
            params = parameters(dtype)
            optimizer = cls(grouped(params, kind), **extra, max_norm=1.0, stochastic_rounding=True)
            run(optimizer, params, 3)
            made += [*params, *(v for state in optimizer.state.values() for v in state.values())]
    return made
