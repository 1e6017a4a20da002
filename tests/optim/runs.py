"""Runs of optimizers, on parameters of many shapes with random gradients."""

from __future__ import annotations

import torch

from entrenar import optim

SHAPES = [(), (1,), (7,), (3, 5), (16, 33), (0, 4), (2, 3, 4), (70, 65)]

# By name: ours, and the settings of two groups.
KINDS = {
    "sgd": (optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-2}),
    "momentum": (
        optim.SGD,
        {"lr": 1e-3, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"lr": 1e-2, "momentum": 0.5},
    ),
    "nesterov": (optim.SGD, {"lr": 1e-3, "momentum": 0.9, "nesterov": True}, {"lr": 1e-2, "momentum": 0.5}),
    "adam": (
        optim.Adam,
        {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
        {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
    ),
    "adamw": (
        optim.AdamW,
        {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
        {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
    ),
    "lion": (
        optim.Lion,
        {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1},
        {"lr": 3e-3, "betas": (0.8, 0.95), "weight_decay": 0.0},
    ),
}
EIGHT_BITS = {
    "momentum": optim.SGD8bit,
    "nesterov": optim.SGD8bit,
    "adam": optim.Adam8bit,
    "adamw": optim.AdamW8bit,
    "lion": optim.Lion8bit,
}
BOTH = [(kind, 32) for kind in KINDS] + [(kind, 8) for kind in EIGHT_BITS]


def parameters(dtype: torch.dtype, seed: int = 0, shapes=SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
    return [torch.nn.Parameter(draw.to(torch.get_default_device(), dtype)) for draw in draws]


def grouped(params: list[torch.nn.Parameter], kind: str, half: int = 4) -> list[dict]:
    _, first, second = KINDS[kind]
    return [{"params": params[:half], **first}, {"params": params[half:], **second}]


def set_gradients(params, step: int, missing: float = 0.2) -> None:
    """Random gradients of wide range, some of them missing."""
    for i, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64, device="cpu")
        scale = 10 ** (4 * torch.rand((), generator=generator, device="cpu").item() - 3)
        absent = torch.rand((), generator=generator, device="cpu").item() < missing
        param.grad = None if absent else (scale * grad).to(param.device, param.dtype)


def on_the_cpu(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Copies for a rule in plain torch, which rounds each operation there, as the kernels do on every device.

    On CUDA torch fuses multiplications with additions, and multiplies by the inverse of a number instead of dividing.
    """
    return [torch.nn.Parameter(param.detach().to("cpu", copy=True)) for param in params]


def run(optimizer, params, steps: int, *, first: int = 0, missing: float = 0.2) -> None:
    """Steps under a changing learning rate."""
    rates = [group.setdefault("base_lr", float(group["lr"])) for group in optimizer.param_groups]
    for step in range(first, steps):
        set_gradients(params, step, missing)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / 200)
        optimizer.step()
