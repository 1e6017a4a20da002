from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from entrenar.optim import SGD
from entrenar.optim.schedulers import ConstantScheduler, CosineScheduler, StepScheduler, WSDScheduler


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


ALL = [
    ConstantScheduler(0.1),
    ConstantScheduler(0.1, warmup_steps=4),
    StepScheduler(0.1, gamma=0.5, step_size=3, warmup_steps=2),
    CosineScheduler(0.1, 0.01, 10, 3),
    WSDScheduler(0.1, 0.01, total_steps=12, decay_steps=4, warmup_steps=3),
]


def test_constant_after_a_linear_warmup():
    assert [ConstantScheduler(0.5, 4).get_lr(step) for step in range(7)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5]
    )


def test_step_decay_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for step in range(10):
        assert StepScheduler(0.1, 0.5, 3).get_lr(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_warmup_stable_decay():
    schedule = WSDScheduler(0.8, 0.4, total_steps=8, decay_steps=4, warmup_steps=1)
    assert [schedule.get_lr(step) for step in range(10)] == pytest.approx(
        [0.4, 0.8, 0.8, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4]
    )
    sudden = WSDScheduler(0.8, 0.4, total_steps=3, decay_steps=0)
    assert [sudden.get_lr(step) for step in range(5)] == [0.8, 0.8, 0.8, 0.4, 0.4]


@pytest.mark.parametrize("schedule", ALL)
def test_attached_to_an_optimizer_it_is_torchs_scheduler(schedule):
    def groups() -> list[dict]:
        return [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.4)]

    optimizer = SGD(groups())
    scheduler = schedule.attach(optimizer)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    for step in range(15):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [schedule.get_lr(step), 4 * schedule.get_lr(step)]
        )
        if step == 7:  # a resumed run
            resumed = SGD(groups())
            other = schedule.attach(resumed)
            resumed.load_state_dict(optimizer.state_dict())
            other.load_state_dict(scheduler.state_dict())
            optimizer, scheduler = resumed, other
        optimizer.step()
        scheduler.step()


def test_attached_it_may_begin_later():
    schedule = CosineScheduler(0.1, 0.01, 10, 3)
    optimizer = SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "initial_lr": 0.1}])
    schedule.attach(optimizer, last_epoch=4)
    assert optimizer.param_groups[0]["lr"] == schedule.get_lr(5)


def test_settings_at_the_edge_of_their_range():
    assert [StepScheduler(0.1, gamma=1.0, step_size=1).get_lr(step) for step in (0, 7)] == [0.1, 0.1]
    assert [StepScheduler(0.1, gamma=0.0, step_size=1).get_lr(step) for step in (0, 1)] == [0.1, 0.0]
    falling = WSDScheduler(0.1, 0.1, total_steps=3, decay_steps=2, warmup_steps=1)
    assert [falling.get_lr(step) for step in range(4)] == pytest.approx([0.05, 0.1, 0.1, 0.1])
    assert ConstantScheduler(0.0).get_lr(5) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantScheduler(-0.1), "initial_lr is -0.1"),
        (lambda: ConstantScheduler(0.1, -1), "warmup_steps must be 0 or more, and is -1"),
        (lambda: StepScheduler(0.1, 1.5, 3), "gamma must be between 0 and 1, and is 1.5"),
        (lambda: StepScheduler(0.1, 0.5, 0), "step_size must be at least 1"),
        (lambda: WSDScheduler(0.1, 0.2, 10, 2), "min_lr is 0.2"),
        (lambda: WSDScheduler(0.1, 0.0, 10, 11), "decay_steps must be between 0 and total_steps"),
        (lambda: WSDScheduler(0.1, 0.0, 10, 2, 10), "warmup_steps is 10"),
    ],
)
def test_bad_arguments_of_the_others(make, message):
    with pytest.raises(ValueError, match=message):
        make()
