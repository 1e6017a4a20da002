"""Parameters of one optimizer, whatever becomes of them and of their states meanwhile."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable

import pytest
import torch
from runs import EIGHT_BITS, KINDS, parameters, set_gradients

from entrenar.optim.base import KernelOptimizer

SIZES = [(5000,), (70, 65), (3,), (256,), (0,), (17, 300)]
LEAST = 200  # elements of a parameter whose states are codes


def make(kind: str, bits: int, params: list[torch.nn.Parameter]) -> KernelOptimizer:
    cls, more = (KINDS[kind][0], {}) if bits == 32 else (EIGHT_BITS[kind], {"min_8bit_size": LEAST})
    return cls(params, **KINDS[kind][1], **more)


class Twins:
    """Parameters of one optimizer, and copies that have one each."""

    def __init__(self, kind: str, bits: int, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
        given = parameters(torch.float32, shapes=SIZES)
        self.params = [torch.nn.Parameter(param.detach().to(dtypes[i % len(dtypes)])) for i, param in enumerate(given)]
        self.copies = copy.deepcopy(self.params)
        self.together = make(kind, bits, self.params)
        self.separate = [make(kind, bits, [param]) for param in self.copies]
        self.steps = 0

    def states(self, i: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Those of parameter i and of its copy."""
        return self.together.state[self.params[i]], self.separate[i].state[self.copies[i]]

    def step_and_compare(self, missing: Iterable[int] = ()) -> None:
        set_gradients(self.params, self.steps, missing=0)
        self.steps += 1
        for i, (param, same) in enumerate(zip(self.params, self.copies, strict=True)):
            if i in missing:
                param.grad = None
            same.grad = None if param.grad is None else param.grad.clone()
        self.together.step()
        for optimizer in self.separate:
            optimizer.step()
        for i, (param, same) in enumerate(zip(self.params, self.copies, strict=True)):
            assert torch.equal(param, same)
            state, expected = self.states(i)
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], value) for name, value in expected.items()), i


@pytest.mark.parametrize("bits", [8, 32])
def test_gradients_that_come_and_go(bits, backend):
    twins = Twins("adamw", bits)
    for missing in [{1, 3}, {1}, (), {0, 5}, range(6), (), {2}, ()]:
        twins.step_and_compare(missing)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_of_one_group(dtype, bits, backend):
    twins = Twins("adamw", bits, (torch.float32, dtype))
    for _ in range(3):
        twins.step_and_compare()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(exp_avg_sq=torch.zeros_like(state["exp_avg_sq"])),
        lambda state: state.update(step=torch.zeros(())),
        lambda state: state.update({name: value.clone() for name, value in state.items()}),
        lambda state: state.clear(),
    ],
)
def test_a_replaced_state_is_the_one_that_counts(change, backend):
    for bits in (8, 32):
        twins = Twins("adamw", bits)
        twins.step_and_compare()
        for state in twins.states(1):
            change(state)
        twins.step_and_compare()


def test_a_parameter_whose_state_is_forgotten_begins_again(backend):
    twins = Twins("adamw", 32)
    twins.step_and_compare()
    del twins.together.state[twins.params[0]], twins.separate[0].state[twins.copies[0]]
    twins.step_and_compare()
    assert twins.states(0)[0]["step"] == 1


def test_a_state_of_ones_own_stays(backend):
    twins = Twins("adamw", 32)
    twins.step_and_compare()
    for state in twins.states(0):
        state["note"] = torch.ones(2)
    twins.step_and_compare()
    assert torch.equal(twins.states(0)[0]["note"], torch.ones(2))


@pytest.mark.parametrize("forget", [True, False])
def test_a_parameter_in_anothers_place(forget, backend):
    """As where a parameter loses some of its rows, and the new one takes what is left of the states."""
    twins = Twins("adamw", 32)
    twins.step_and_compare()
    old = twins.params[0]
    before = old.detach().clone()
    for optimizer, params in ((twins.together, twins.params), (twins.separate[0], twins.copies)):
        new = torch.nn.Parameter(params[0].detach()[:3000].clone())
        state = optimizer.state.pop(params[0]) if forget else optimizer.state[params[0]]
        optimizer.state[new] = {n: value if n == "step" else value[:3000].clone() for n, value in state.items()}
        optimizer.param_groups[0]["params"][0] = params[0] = new
    twins.step_and_compare()
    assert torch.equal(old, before)


def test_a_parameter_that_changes_its_dtype(backend):
    twins = Twins("adamw", 32)
    twins.step_and_compare()
    for params in (twins.params, twins.copies):
        params[1].grad = None
        params[1].data = params[1].data.bfloat16()
    twins.step_and_compare()
    assert twins.states(1)[0]["exp_avg"].dtype is torch.float32


@pytest.mark.parametrize("bits", [8, 32])
def test_copies_and_what_is_loaded_go_on(bits, backend):
    twins = Twins("adamw", bits)
    twins.step_and_compare()
    saved = io.BytesIO()
    torch.save(twins.together.state_dict(), saved)
    states = [value for state in twins.together.state.values() for value in state.values()]
    assert saved.tell() < sum(value.nbytes for value in states) + 16_000  # once, with what describes them

    copied = copy.deepcopy(twins.together)
    loaded = make("adamw", bits, copy.deepcopy(twins.params))
    saved.seek(0)
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    twins.step_and_compare()
    for optimizer in (copied, loaded):
        params = optimizer.param_groups[0]["params"]
        for param, same in zip(params, twins.params, strict=True):
            param.grad = same.grad.clone()
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, twins.params, strict=True))


def test_a_step_in_inference_mode(backend):
    twins = Twins("adamw", 32)
    with torch.inference_mode():
        twins.step_and_compare()
    twins.step_and_compare()
