"""Whether two modules compute the same: output and gradients on a random input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Norm of the difference over the norm. A rounding of bfloat16 is 2⁻⁹, of float32 2⁻²⁴: a chain of them stays well
# below these, and a different formula well above.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-6}

Call = Callable[[nn.Module, Tensor], Tensor]


def difference(original: nn.Module, candidate: nn.Module, call: Call, x: Tensor) -> str | None:
    """How far `call` of the two modules differs at x, in words, or None where it is the same.

    Compared are the output, its dtype, and the gradients of x and of all trainable parameters, which the two share.
    Both run in evaluation mode, and nothing is accumulated into `.grad`.
    """
    parameters = {name: p for name, p in original.named_parameters() if p.requires_grad}
    expected = _run(original, call, x, parameters)
    found = _run(candidate, call, x, parameters)
    for name, want in expected.items():
        have = found[name]
        if have.dtype != want.dtype or have.shape != want.shape:
            return f"its {name} is {_describe(have)}, not {_describe(want)}"
        error = (have.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
        if not error <= TOLERANCE[x.dtype]:
            return f"its {name} differs by {error:.1g}"
    return None


def _run(module: nn.Module, call: Call, x: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            y = call(module, x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            gradients = torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True)
    finally:
        for part, training in modes.items():
            part.training = training
    named = zip(["input", *parameters], gradients, strict=True)
    return {"output": y.detach()} | {f"gradient of {name}": g for name, g in named if g is not None}


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}"
