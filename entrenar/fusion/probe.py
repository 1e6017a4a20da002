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

Call = Callable[[nn.Module, Tensor], Tensor]
Results = dict[str, Tensor]


def difference(
    original: nn.Module, build: Callable[[nn.Module], nn.Module], call: Call, inputs: Sequence[Tensor]
) -> str | None:
    """Why `build(original)` cannot stand for the original, in words, or None where it can.

    Compared are, at an input x, the output of `call` and the gradients of x and of all trainable parameters. In float32
    they must be the same. In x's dtype they must have the dtypes of the original's, and be as near to the float32
    results as those are, but for a factor of four. Where they are not at the first input, the majority of all inputs
    decides: what is left when large numbers cancel is a matter of luck, for the original too. Modules run in evaluation
    mode; nothing is accumulated into `.grad`.
    """
    wide = copy.deepcopy(original).float()
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
