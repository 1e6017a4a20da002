"""Gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

STEPS = {torch.float64: 1e-6, torch.float32: 1e-3}
THRESHOLDS = {torch.float64: 1e-6, torch.float32: 0.2}
DIRECTION_ELEMENTS = 64


class GradientError(AssertionError):
    """A gradient that finite differences contradict; the message names the worst element."""


@dataclass(frozen=True)
class Difference:
    """A partial derivative by the gradient and by the central difference, and how far they are apart."""

    where: str
    analytic: float
    numeric: float
    error: float

    def __str__(self) -> str:
        return f"{self.where}: gradient {self.analytic:.6g}, difference {self.numeric:.6g}, error {self.error:.3g}"


@dataclass
class GradientReport:
    """What a check found: how many derivatives were compared, the worst of them, and those at kinks, left out."""

    threshold: float
    checked: int = 0
    worst: Difference | None = None
    kinks: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every derivative that was compared agrees."""
        return self.worst is None or self.worst.error <= self.threshold

    def __str__(self) -> str:
        lines = [f"{self.checked} derivatives compared" + (f"; the worst, {self.worst}" if self.worst else "")]
        lines += [f"not compared, at a kink: {kink}" for kink in self.kinks]
        return "\n".join(lines)


def check_gradient(
    fn: Callable[..., Any],
    inputs: Tensor | Sequence[Tensor],
    eps: float | None = None,
    threshold: float | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    max_elements: int = 1000,
    directions: int = 8,
) -> GradientReport:
    """Compare the gradient of `fn` with central differences at `inputs`; raise GradientError where they disagree.

    Args:
        fn: takes the inputs and returns a tensor, or several; of those that are floating point, a fixed weighted sum
            is differentiated, whose weights differ from element to element, so that errors do not cancel.
        inputs: one tensor or several, floating point; they are converted to `dtype`, and stay as they are.
        eps: half the distance between the two points; by default 1e-6 in float64 and 1e-3 in float32.
        threshold: the largest error, relative to the derivative, once what rounding explains has been taken away; by
            default 1e-6 in float64 and 0.2 in float32.
        dtype: in which to compute, float64 or float32.
        max_elements: inputs with more elements are checked along random directions instead of element by element.
        directions: how many of those; each moves up to 64 elements.

    Returns:
        A report with the worst derivative, and the kinks: points where the differences from either side disagree
        however small the step (ReLU at 0, ties of a maximum). There the derivative does not exist, so they neither
        pass nor fail.

    Raises GradientError, and ValueError for inputs that have no gradient and functions whose result has none.
    """
    if dtype not in STEPS:
        raise ValueError(f"gradients are checked in float64 or float32, not {dtype}")
    eps = STEPS[dtype] if eps is None else eps
    threshold = THRESHOLDS[dtype] if threshold is None else threshold
    points = [_point(i, x, dtype) for i, x in enumerate([inputs] if isinstance(inputs, Tensor) else inputs)]
    report = compare(fn, points, eps, threshold, max_elements, directions)
    if not report.ok:
        raise GradientError(f"the gradient is wrong at {report.worst}, above the threshold {threshold:g}")
    return report


def _point(index: int, x: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f"input {index} is a {type(x).__name__}, not a tensor: bind it in the function")
    if not x.is_floating_point():
        raise ValueError(f"input {index} is {x.dtype}, which has no real gradient: bind it in the function")
    return x.detach().to(dtype).clone()


def compare(
    fn: Callable[..., Any], points: list[Tensor], eps: float, threshold: float, max_elements: int, directions: int
) -> GradientReport:
    """`check_gradient` without its checks of arguments, and without raising for a wrong gradient."""
    objective = _Objective(fn, points)
    leaves = [point.clone().requires_grad_() for point in points]
    value = objective(leaves)
    if not value.requires_grad:
        raise ValueError("the function's result does not depend on its inputs in a differentiable way")
    gradients = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    report = GradientReport(threshold)
    for i, (point, gradient) in enumerate(zip(points, gradients, strict=True)):
        for where, direction in _directions(point, max_elements, directions):
            analytic = float((gradient * direction).sum())
            step = _Step(objective, points, i, direction)
            numeric, noise, kink = step.difference(eps)
            excess = max(0.0, abs(analytic - numeric) - noise)
            error = excess / max(abs(analytic), abs(numeric)) if excess else 0.0
            difference = Difference(f"input {i}{where}", analytic, numeric, error)
            if kink:
                report.kinks.append(difference)
                continue
            report.checked += 1
            if report.worst is None or not difference.error <= report.worst.error:
                report.worst = difference
    return report


class _Objective:
    """A weighted sum of the elements of what a function returns, the same weights and random numbers every time."""

    def __init__(self, fn: Callable[..., Any], points: list[Tensor]) -> None:
        self.fn = fn
        self.random_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*points)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.random_state)
            set_device_states(self.devices, self.device_states)
            result = self.fn(*inputs)
        outputs = [y for y in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(y, Tensor)]
        outputs = [y for y in outputs if y.is_floating_point()]
        if not outputs:
            raise ValueError("the function returns no floating-point tensor")
        total = sum(
            ((y * _weights(y)).sum() for y in outputs), start=torch.zeros((), dtype=outputs[0].dtype, device="cpu")
        )
        if not torch.isfinite(total.detach()):
            raise ValueError("the function's result is not finite at these inputs")
        return total


def _weights(y: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return (0.5 + torch.rand(y.shape, generator=generator, dtype=torch.float64, device="cpu")).to(y.dtype).to(y.device)


class _Step:
    """Walks from a point along a direction, in one of the inputs."""

    def __init__(self, objective: _Objective, points: list[Tensor], index: int, direction: Tensor) -> None:
        self.objective, self.points, self.index, self.direction = objective, points, index, direction

    def at(self, distance: float) -> float:
        moved = list(self.points)
        moved[self.index] = self.points[self.index] + distance * self.direction
        with torch.no_grad():
            return float(self.objective(moved))

    def difference(self, eps: float) -> tuple[float, float, bool]:
        """The central difference, what rounding may add to it, and whether the point is a kink."""
        here, ahead, behind = self.at(0.0), self.at(eps), self.at(-eps)
        unit = torch.finfo(self.points[self.index].dtype).eps
        noise = 16 * unit * max(abs(here), abs(ahead), abs(behind), 1.0) / eps
        right, left = (ahead - here) / eps, (here - behind) / eps
        gap = abs(right - left)
        suspicious = gap > max(4 * noise, 1e-3 * max(abs(right), abs(left)))
        # Of a smooth function the gap shrinks with the step; at a kink it stays.
        kink = suspicious and self._gap(eps / 4, here) > 0.7 * gap
        return (ahead - behind) / (2 * eps), noise, kink

    def _gap(self, eps: float, here: float) -> float:
        return abs(self.at(eps) + self.at(-eps) - 2 * here) / eps


def _directions(point: Tensor, max_elements: int, count: int) -> list[tuple[str, Tensor]]:
    """Unit vectors with the index that they stand for; or random sparse directions where those are too many."""
    found = []
    if point.numel() <= max_elements:
        for flat in range(point.numel()):
            direction = torch.zeros_like(point, memory_format=torch.contiguous_format)
            direction.view(-1)[flat] = 1.0
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat, device="cpu"), point.shape)]
            found.append((str(index) if index else "", direction))
        return found
    generator = torch.Generator("cpu").manual_seed(0)
    for number in range(count):
        direction = torch.zeros_like(point, memory_format=torch.contiguous_format)
        moved = torch.randint(point.numel(), (DIRECTION_ELEMENTS,), generator=generator, device="cpu")
        # Few elements, so that hardly ever one of them steps over a kink.
        direction.view(-1)[moved] = torch.randn(DIRECTION_ELEMENTS, generator=generator, device="cpu").to(point)
        found.append((f" along random direction {number}", direction))
    return found
