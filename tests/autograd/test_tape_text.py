"""What a tape's lines, tables and messages say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from entrenar.autograd import ops
from entrenar.autograd.gradcheck import Difference, GradientReport
from entrenar.autograd.ops._override import overridable
from entrenar.autograd.tape import Tape
from entrenar.autograd.tape_gradients import EntryCheck, TapeCheck

DOUBLE = torch.ones(1, dtype=torch.float64)


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
    x, ones = torch.randn(2, 3), torch.ones(2, 3)
    with Tape() as tape:
        getattr(x, view)
        assert (x.shape, x.grad) == ((2, 3), None)
        x.requires_grad = True
        x.grad = ones
        assert x.grad.shape == (2, 3)
    assert [entry.op for entry in tape.entries] == [view]


def test_several_results_are_listed():
    with Tape() as tape:
        torch.ones(3, 2).unbind()
    assert str(tape.entries[-1]) == "2. torch unbind(v0: [3, 2] f32) -> v1, v2, v3"


class Doubling:
    """A callable without a name, of which torch's override protocol knows."""

    def __call__(self, x):
        if has_torch_function_unary(x):
            return handle_torch_function(self, (x,), x)
        return x.add(x)

    def __str__(self):
        return "doubling"


@overridable
def cube_of_float32(x, factor=1.0):
    """x³, for float32 only; `factor` spoils the gradient."""
    if x.dtype != torch.float32:
        raise ValueError(f"there is no cube of {x.dtype}\nat all")
    return Spoiled.apply(x, factor) ** 3


class Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return ctx.factor * dy, None


def test_functions_of_others_are_recorded_by_name():
    x = torch.ones(1)
    with Tape() as tape:
        cube_of_float32(x)
        Doubling()(x)
    assert [entry.op for entry in tape.entries] == ["cube_of_float32", "doubling"]


def test_what_has_no_float64_is_checked_in_float32():
    x = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    with Tape() as tape:
        cube_of_float32(x)
        cube_of_float32(x, 1.1)
    right, wrong = tape.check_gradients().checks
    assert (right.dtype, right.skipped, wrong.dtype) == (torch.float32, "", torch.float32)
    assert right.report.ok
    assert not wrong.report.ok


@overridable
def copy_of_bfloat16(x):
    """x, for bfloat16 only."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"there is no copy of {x.dtype}\nat all")
    return x.clone()


def test_what_has_neither_is_not_checked_and_says_why():
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    with Tape() as tape:
        copy_of_bfloat16(x)
    (check,) = tape.check_gradients().skipped
    assert check == EntryCheck(tape.entries[0], None, None, "there is no copy of torch.float32")


def test_complex_results_are_not_checked():
    x = torch.ones(2, requires_grad=True)
    with Tape() as tape:
        torch.complex(x, x)
    (check,) = tape.check_gradients().skipped
    assert check == EntryCheck(tape.entries[0], None, None, "no floating-point result")


def test_a_dtype_among_the_arguments_is_that_of_the_check():
    x = torch.randn(4, dtype=torch.bfloat16, requires_grad=True)
    with Tape() as tape:
        torch.sum(x * x, 0, dtype=torch.float32)
    found = tape.check_gradients()
    assert not found.wrong
    assert [check.dtype for check in found.checks] == 2 * [torch.float64]


def test_every_input_is_checked_along_two_directions():
    x = torch.tensor(2.0, requires_grad=True)
    with Tape() as tape:
        x * torch.ones(3, requires_grad=True)
    (check,) = [check for check in tape.check_gradients().checks if check.entry.op == "mul"]
    assert check.report.checked == 4
    assert "along random direction" in check.report.worst.where


def test_summary_lists_the_slowest_first():
    x = torch.randn(1000, 1000, requires_grad=True)
    with Tape() as tape:
        y = torch.cumsum(x, 0).exp()
        y.sum()
    assert [entry.saved_bytes for entry in tape.entries] == [0, 4_000_000, 0]
    for entry, seconds, saved in zip(tape.entries, (0.5, 0.25, 0.125), (0, 123_456_780_000, 10_000), strict=True):
        assert 0 < entry.seconds < 60
        entry.seconds, entry.saved_bytes = seconds, saved
    assert tape.summary().splitlines() == [
        "operation      count  forward ms   saved MB",
        "torch cumsum       1      500.00       0.00",
        "exp                1      250.00  123456.78",
        "sum                1      125.00       0.01",
        "all                3      875.00  123456.79",
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


@pytest.mark.parametrize(
    ("cast", "args"),
    [("double", ()), ("half", ()), ("bfloat16", ()), ("type", (torch.float64,)), ("type_as", (DOUBLE,))],
)
def test_casts_are_not_checked(cast, args):
    x = torch.ones(2, requires_grad=True)
    with Tape() as tape:
        getattr(x, cast)(*args).float().sum()
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
