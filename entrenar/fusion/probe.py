"""Whether one module may stand for another: output and gradients on random inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Norm of the difference over the norm, in float32, whose rounding is 2⁻²⁴: another formula is further away.
SAME = 1e-4
# In 16 bits, beside the error that the original itself makes: one rounding more of the result.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# What the first input is multiplied by, where an epsilon counts or numbers meet a limit.
SIZES = (1e-2, 30.0)

Build = Callable[[nn.Module], nn.Module]
Call = Callable[[nn.Module, Tensor], Tensor]
Results = dict[str, Tensor]


def difference(original: nn.Module, build: Build, call: Call, inputs: Sequence[Tensor]) -> str | None:
    """Why `build(original)` cannot stand for the original, in words, or None where it can.

    Compared are, at an input x, the output of `call` and the gradients of x and of all trainable parameters. In float32
    they must be the same. In x's dtype they must have the dtypes of the original's, and be as near to the float32
    results as those are, but for a factor of four. Where they are not at the first input, the majority of all inputs
    decides: what is left when large numbers cancel is a matter of luck, for the original too.

    In float32 the outputs must be the same for a smaller and a larger input too, and both modules or none may act in
    training. All else runs in evaluation mode; nothing is accumulated into `.grad`.
    """
    wide = copy.deepcopy(original).float()
    ordinary = _differs_at(original, wide, build, call, inputs)
    return ordinary or _differs_elsewhere(wide, build(wide), call, inputs[0].float())


def _differs_at(original: nn.Module, wide: nn.Module, build: Build, call: Call, inputs: Sequence[Tensor]) -> str | None:
    doubts: list[str] = []
    for x in inputs:
        exact, rebuilt = _run(wide, call, x.float()), _run(build(wide), call, x.float())
        for name, want in exact.items():
            if not (error := _error(rebuilt[name], want)) <= SAME:
                return f"computes something else: its {name} differs by {error:.1g}"
        expected, found = _run(original, call, x), _run(build(original), call, x)
        for name, want in expected.items():
            have = found[name]
            if have.dtype != want.dtype or have.shape != want.shape:
                return f"computes something else: its {name} is {_describe(have)}, not {_describe(want)}"
        if doubt := _less_exact(exact, expected, found):
            doubts.append(doubt)
        elif not doubts:
            return None
    return doubts[0] if 2 * len(doubts) > len(inputs) else None


@torch.no_grad()
def _differs_elsewhere(exact: nn.Module, rebuilt: nn.Module, call: Call, x: Tensor) -> str | None:
    exact.eval()
    rebuilt.eval()
    for size in SIZES:
        if not (error := _error(call(rebuilt, size * x), call(exact, size * x))) <= SAME:
            return f"computes something else: its output at {size:g} times an input differs by {error:.1g}"
    if _acts_in_training(exact, call, x) != _acts_in_training(rebuilt, call, x):
        return "computes something else in training"
    return None


def _acts_in_training(module: nn.Module, call: Call, x: Tensor) -> bool:
    """Whether the module, apart from the layers that it consists of, has another output in training."""
    evaluated = call(module, x)
    module.training = True
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        trained = call(module, x)
    module.training = False
    return not _error(trained, evaluated) <= SAME


def _less_exact(exact: Results, expected: Results, found: Results) -> str | None:
    for name, want in expected.items():
        limit = 4 * _error(want, exact[name]) + ROUNDING.get(want.dtype, SAME)
        if not (error := _error(found[name], exact[name])) <= limit:
            return f"is less exact when fused: its {name} is off by {error:.1g}, where {limit:.1g} would do"
    return None


def _run(module: nn.Module, call: Call, x: Tensor) -> Results:
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = call(module, x)
            dy = torch.randn(y.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(y)
            gradients = torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True)
    finally:
        for part, training in modes.items():
            part.training = training
    named = zip(["input", *parameters], gradients, strict=True)
    return {"output": y.detach()} | {f"gradient of {name}": g for name, g in named if g is not None}


def _error(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}"
