"""What a tape's lines, tables and messages say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrenar.autograd import ops
from entrenar.autograd.gradcheck import Difference, GradientReport
from entrenar.autograd.tape import Tape
from entrenar.autograd.tape_gradients import EntryCheck, TapeCheck


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "f64"),
        (torch.float32, "f32"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "f16"),
        (torch.int64, "i64"),
        (torch.int32, "i32"),
        (torch.uint8, "uint8"),
    ],
)
def test_dtypes_are_short(dtype, name):
    with Tape() as tape:
        torch.ones(2, dtype=dtype).flip(0)
    assert str(tape.entries[-1]) == f"2. torch flip(v0: [2] {name}) -> v1"


@pytest.mark.parametrize("view", ["T", "mT", "H", "mH", "data"])
def test_views_are_recorded_and_other_attributes_are_not(view):
    x = torch.randn(2, 3)
    with Tape() as tape:
        getattr(x, view)
        assert (x.shape, x.grad) == ((2, 3), None)
        x.requires_grad = True
    assert [entry.op for entry in tape.entries] == [view]


def test_summary_lists_the_slowest_first():
    x = torch.randn(1000, 1000, requires_grad=True)
    with Tape() as tape:
        y = torch.cumsum(x, 0).exp()
        y.sum()
    for entry, seconds in zip(tape.entries, (0.25, 0.5, 0.125), strict=True):
        assert 0 < entry.seconds < 60
        entry.seconds = seconds
    assert tape.summary().splitlines() == [
        "operation      count  forward ms   saved MB",
        "exp                1      500.00       4.00",
        "torch cumsum       1      250.00       0.00",
        "sum                1      125.00       0.00",
        "all                3      875.00       4.00",
    ]


def test_all_that_an_operation_keeps_is_counted():
    x, w = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    with Tape() as tape:
        x * w
    assert tape.entries[0].saved_bytes == 800


def test_nan_of_the_backward_is_named():
    x = torch.zeros(3, requires_grad=True)
    with Tape() as tape:
        y = torch.sqrt(x * 1) * torch.zeros(3)
    tape.backward(y)
    assert tape.first_nonfinite().startswith("NaN in the gradient that comes out of 2. sqrt(")


def test_nan_that_came_in_is_not_reported():
    x = torch.tensor([torch.nan, 1.0])
    with Tape() as tape:
        x.exp().sum()
    assert tape.first_nonfinite() is None


def test_checks_say_what_was_compared_and_what_was_not():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with Tape() as tape:
        y = model(torch.randn(2, 4)).to(torch.float64)
        h = y * 2
        h.add_(1)
        h.sum()
    found = tape.check_gradients()
    reasons = {check.entry.op: check.skipped for check in found.skipped}
    assert reasons == {"to": "a change of dtype", "add_": "an input was changed in place since"}
    lines = str(found).splitlines()
    assert lines[0] == f"{len(found.checks) - 2} operations checked, 0 wrong, 2 not checked"
    assert lines[1] == str(found.worst)
    assert lines[2:] == ["not checked: 1 (a change of dtype)", "not checked: 1 (an input was changed in place since)"]
    assert str(found.skipped[0]).startswith("not checked (a change of dtype): 4. torch to(")
    assert str(found.worst).startswith(f"ok: {found.worst.entry}: ")
    assert found.worst.error == max(check.error for check in found.checks)


def test_checks_say_what_has_no_float64():
    x, packed = torch.randn(2, 8, requires_grad=True), ops.int4_quantize(torch.randn(8, 8))
    with Tape() as tape:
        ops.int4_linear(ops.int4_linear(x, *packed), *packed).cumsum(0).sum()
    lines = str(tape.check_gradients()).splitlines()
    assert lines[0] == "4 operations checked, 0 wrong, 0 not checked"
    assert lines[2:] == ["checked in float32 instead of float64: 2 (int4_linear)"]


@pytest.mark.parametrize("cast", ["double", "half", "bfloat16"])
def test_casts_are_not_checked(cast):
    x = torch.ones(2, requires_grad=True)
    with Tape() as tape:
        getattr(x, cast)().float().sum()
    assert [check.entry.op for check in tape.check_gradients().skipped] == [cast, "float"]


def test_the_worst_comes_first():
    with Tape() as tape:
        torch.ones(1, requires_grad=True).exp().exp().exp()
    entries = [entry for entry in tape.entries if entry.op == "exp"]
    errors = (0.5, 3.0, 7.0)
    reports = [GradientReport(0.01, 4, Difference("input 0[0]", 1.0, 1.0, 0.01 * error)) for error in errors]
    found = TapeCheck([EntryCheck(e, torch.float64, r) for e, r in zip(entries, reports, strict=True)])
    assert [check.error for check in found.checks] == pytest.approx(errors)
    assert [check.entry for check in found.wrong] == [entries[2], entries[1]]
    assert found.worst.entry is entries[2]
    lines = str(found).splitlines()
    assert lines[0] == "3 operations checked, 2 wrong, 0 not checked"
    assert (
        lines[1:]
        == [f"WRONG: {e}: the worst {r.worst}; 4 compared" for e, r in zip(entries, reports, strict=True)][:0:-1]
    )


def test_nothing_to_check():
    found = TapeCheck([])
    assert (found.wrong, found.skipped, found.worst) == ([], [], None)
    assert str(found) == "0 operations checked, 0 wrong, 0 not checked"


def test_kinks_are_counted():
    kinks = [Difference("input 0[0]", 0.0, 0.5, 1.0)] * 2
    with Tape() as tape:
        torch.zeros(1, requires_grad=True).relu()
    check = EntryCheck(tape.entries[-1], torch.float64, GradientReport(0.01, 0, None, kinks))
    assert check.error == 0.0
    assert str(check) == f"ok: {tape.entries[-1]}: 0 compared, 2 at kinks"
