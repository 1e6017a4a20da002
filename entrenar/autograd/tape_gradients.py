"""Checking every operation on a tape by finite differences, at the inputs that it had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from entrenar.autograd.gradcheck import STEPS, THRESHOLDS, GradientReport, compare

if TYPE_CHECKING:
    from entrenar.autograd.tape import Entry

# A change of dtype has no derivative that a difference in one dtype could show.
CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as"}
# float32 rounds by up to 6e-8 of the largest number in a sum: a step of this size loses three digits of seven.
FLOAT32_STEP, FLOAT32_THRESHOLD = 1e-2, 1e-2
DIRECTIONS = 2


@dataclass(frozen=True)
class EntryCheck:
    """One operation's check: the dtype that it was done in and what it found, or why it was not done."""

    entry: Entry
    dtype: torch.dtype | None = None
    report: GradientReport | None = None
    skipped: str = ""

    @property
    def error(self) -> float:
        """The largest error in units of the threshold: above 1 the gradient is wrong."""
        if self.report is None or self.report.worst is None:
            return 0.0
        return self.report.worst.error / self.report.threshold

    def __str__(self) -> str:
        if self.report is None:
            return f"not checked ({self.skipped}): {self.entry}"
        worst = f"the worst {self.report.worst}; " if self.report.worst else ""
        kinks = f", {len(self.report.kinks)} at kinks" if self.report.kinks else ""
        return f"{'ok' if self.report.ok else 'WRONG'}: {self.entry}: {worst}{self.report.checked} compared{kinks}"


@dataclass(frozen=True)
class TapeCheck:
    """The checks of all operations on a tape through which a gradient can flow."""

    checks: list[EntryCheck]

    @property
    def wrong(self) -> list[EntryCheck]:
        """The operations whose gradient finite differences contradict, the worst first."""
        return sorted((c for c in self.checks if c.report and not c.report.ok), key=lambda c: -c.error)

    @property
    def skipped(self) -> list[EntryCheck]:
        """The operations that were not checked."""
        return [check for check in self.checks if check.report is None]

    @property
    def worst(self) -> EntryCheck | None:
        """The operation with the largest error relative to its threshold."""
        return max((c for c in self.checks if c.report), key=lambda c: c.error, default=None)

    def __str__(self) -> str:
        checked = len(self.checks) - len(self.skipped)
        lines = [f"{checked} operations checked, {len(self.wrong)} wrong, {len(self.skipped)} not checked"]
        lines += [str(check) for check in self.wrong or ([self.worst] if self.worst else [])]
        without_float64 = Counter(check.entry.op for check in self.checks if check.dtype is torch.float32)
        lines += [f"checked in float32 instead of float64: {n} ({op})" for op, n in sorted(without_float64.items())]
        reasons = Counter(check.skipped for check in self.skipped)
        lines += [f"not checked: {n} ({reason})" for reason, n in sorted(reasons.items())]
        return "\n".join(lines)


def check_entry(entry: Entry) -> EntryCheck:
    """Compare the gradient of one recorded operation with differences, in float64 where it has float64."""
    if entry.op in CASTS:
        return EntryCheck(entry, skipped="a change of dtype")
    if any(value.changed for value in entry.inputs):
        return EntryCheck(entry, skipped="an input was changed in place since")
    if not any(value.tensor.is_floating_point() for value in entry.outputs):
        return EntryCheck(entry, skipped="no floating-point result")
    try:
        return _check(entry, torch.float64, STEPS[torch.float64], THRESHOLDS[torch.float64])
    except (ValueError, RuntimeError, NotImplementedError):  # however the operation says that it has no float64
        pass
    try:
        return _check(entry, torch.float32, FLOAT32_STEP, FLOAT32_THRESHOLD)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return EntryCheck(entry, skipped=str(error).splitlines()[0])


def _check(entry: Entry, dtype: torch.dtype, eps: float, threshold: float) -> EntryCheck:
    # Once each, however often the operation takes the same tensor.
    points = {id(value.tensor): value.tensor.detach().to(dtype) for value in entry.inputs if value.edge is not None}
    replay = _replay(entry, {tensor: place for place, tensor in enumerate(points)}, dtype)
    report = compare(replay, list(points.values()), eps, threshold, 0, DIRECTIONS)
    return EntryCheck(entry, dtype, report)


def _replay(entry: Entry, places: dict[int, int], dtype: torch.dtype) -> Callable[..., Any]:
    """The operation as a function of the tensors in `places`, with everything that is floating point in `dtype`."""

    def replay(*points: Tensor) -> Any:
        def substitute(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if id(leaf) in places:
                    return points[places[id(leaf)]]
                return leaf.detach().to(dtype) if leaf.is_floating_point() else leaf
            if isinstance(leaf, torch.dtype) and leaf.is_floating_point:
                return dtype
            return leaf

        args, kwargs = tree_map(substitute, (entry.args, entry.kwargs))
        return entry.function(*args, **kwargs)

    return replay
