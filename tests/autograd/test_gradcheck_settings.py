"""What check_gradient compares by default, and what its report says."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from entrenar.autograd.gradcheck import Difference, GradientError, GradientReport, check_gradient


def test_up_to_1000_elements_one_by_one_and_more_along_8_directions():
    assert check_gradient(lambda x: x * x, torch.ones(1000)).checked == 1000
    assert check_gradient(lambda x: x * x, torch.ones(1001)).checked == 8


def test_directions_are_the_same_every_time_and_take_no_random_numbers():
    x, state = torch.randn(30, 40), torch.get_rng_state()
    first, second = check_gradient(torch.sin, x), check_gradient(torch.sin, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second


def test_step_and_threshold_are_those_given():
    # The central difference of x³ is off by eps², here by a quarter of 3.
    with pytest.raises(GradientError, match="above the threshold 1e-06"):
        check_gradient(lambda x: x**3, torch.tensor(1.0), eps=0.5)
    report = check_gradient(lambda x: x**3, torch.tensor(1.0), eps=0.5, threshold=0.1)
    assert report.worst.where == "input 0"
    assert report.worst.numeric == pytest.approx(report.worst.analytic * 3.25 / 3)
    assert report.worst.error == pytest.approx(0.25 / 3.25)


def test_in_float32_the_step_is_larger_and_the_threshold_wider():
    x = torch.tensor(1.0)
    report = check_gradient(lambda x: x**3, x, dtype=torch.float32)
    # The step adds 1e-6 to the derivative of x³; the two values round by 6e-8, over twice the step of 1e-3.
    assert report.worst.numeric == pytest.approx(report.worst.analytic, rel=1e-4)
    check_gradient(lambda x: 1.1 * x + x.detach() * -0.1, x, dtype=torch.float32)
    with pytest.raises(GradientError, match=r"above the threshold 0\.2"):
        check_gradient(lambda x: 1.5 * x - 0.5 * x.detach(), x, dtype=torch.float32)


def test_an_error_as_large_as_the_threshold_passes():
    assert GradientReport(0.5, 1, Difference("input 0", 1.0, 1.5, 0.5)).ok
    assert not GradientReport(0.5, 1, Difference("input 0", 1.0, 1.6, 0.6)).ok


def test_of_equal_errors_the_first_is_named():
    assert check_gradient(lambda x: 2 * x, torch.ones(3)).worst.where == "input 0[0]"


def test_an_input_that_nothing_depends_on_has_gradient_zero():
    assert check_gradient(lambda x, y: x * x, [torch.ones(2), torch.ones(3)]).checked == 5


def test_the_report_says_what_was_compared_and_what_was_not():
    lines = str(check_gradient(torch.relu, torch.tensor([-1.0, 0.0, 1.0]))).splitlines()
    assert lines[0].startswith("2 derivatives compared; the worst, input 0[")
    assert [line.partition(":")[0] for line in lines[1:]] == ["not compared, at a kink"]
    assert str(check_gradient(torch.relu, torch.zeros(1))).splitlines()[0] == "0 derivatives compared"


def test_derivatives_are_along_unit_vectors():
    # Left of 0 the slope is 0.5 and right of it 1; torch takes the left one. The weights lie between 0.5 and 1.5.
    kinks = check_gradient(lambda x: F.leaky_relu(x, 0.5), torch.zeros(20)).kinks
    assert len(kinks) == 20
    for kink in kinks:
        assert 0.25 <= kink.analytic <= 0.75
        assert kink.numeric == pytest.approx(1.5 * kink.analytic, rel=1e-6)


def test_a_bend_that_shrinks_with_the_step_is_no_kink():
    # Within the step of 1e-6 the slope changes by 0.5 %, as suspicious as a kink of that size.
    report = check_gradient(lambda x: F.softplus(x, beta=1e4), torch.tensor([0.0]))
    assert (report.checked, report.kinks) == (1, [])
