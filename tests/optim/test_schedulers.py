from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrenar.optim.schedulers import CosineScheduler


def test_equals_torch_without_warmup():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000, eta_min=0.001)
    ours = CosineScheduler(initial_lr=0.1, min_lr=0.001, total_steps=1000)
    for step in range(1001):
        # torch's recurrence gathers a rounding a step.
        assert ours.get_lr(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-10)
        optimizer.step()
        theirs.step()


@given(
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    steps=st.tuples(st.integers(0, 300), st.integers(1, 300)),
)
def test_shape(rates, steps):
    (low, high), (warmup, rest) = rates, steps
    scheduler = CosineScheduler(high, low, warmup + rest, warmup)
    lrs = [scheduler.get_lr(step) for step in range(warmup + rest + 3)]
    assert lrs[warmup] == pytest.approx(high)
    assert lrs[warmup + rest :] == [pytest.approx(low)] * 3
    for step in range(warmup):
        assert lrs[step] == pytest.approx((step + 1) / (warmup + 1) * high)
    assert all(a >= b for a, b in zip(lrs[warmup:], lrs[warmup + 1 :], strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.2, 10), "min_lr is 0.2, initial_lr is 0.1"),
        ((0.1, -0.1, 10), "min_lr is -0.1"),
        ((float("nan"), 0.0, 10), "initial_lr is nan"),
        ((float("inf"), 0.0, 10), "initial_lr is inf"),
        ((0.1, 0.0, 0), "total_steps is 0"),
        ((0.1, 0.0, 10, 10), "warmup_steps is 10"),
        ((0.1, 0.0, 10, -1), "warmup_steps is -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CosineScheduler(*arguments)


def test_negative_step():
    with pytest.raises(ValueError, match="this one is -1"):
        CosineScheduler(0.1, 0.0, 10).get_lr(-1)


def test_the_settings_stay():
    scheduler = CosineScheduler(0.1, 0.0, 10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheduler.total_steps = 20
    assert {scheduler: "by its settings"}[CosineScheduler(0.1, 0.0, 10)]
