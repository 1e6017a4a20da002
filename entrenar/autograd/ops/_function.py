"""The base of the operations' Functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy


def run_as_it_is(function: Callable[..., Any], *, all_within: bool) -> None:
    """Keep torch's compiler from frames of `function`, and of what it calls if `all_within`; inlined it is compiled.

    `torch.compiler.disable` would import the compiler, and wrap all functions in the same code, by which the compiler
    tells them apart.
    """
    within = _FrameAction.SKIP if all_within else _FrameAction.DEFAULT
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, within))


class Function(torch.autograd.Function):
    """torch.autograd.Function with a short way to the engine, which takes all arguments of `forward` by position.

    Torch's own `apply` first binds the arguments to the signature of `forward`, at several times the cost of the call.
    Only torch.func needs it; there the signature is at least looked up once.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The results of `forward`, as nodes of the graph."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


# Beside a break of the graph its frame comes by itself, and the compiler fails at `super`.
run_as_it_is(Function.apply.__func__, all_within=False)  # type: ignore[attr-defined]


def below_autograd(op: Any, *args: Any) -> Any:
    """The results of the op's kernel. A Function keeps the graph itself, and torch's part for that takes its time."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def no_second_derivative(op: str) -> RuntimeError:
    """What is raised where a gradient is to be differentiated again, and cannot be."""
    return RuntimeError(f"{op} has no second derivative: ask for its gradient without create_graph=True")


def refuse_derivative_of_backward(op: str) -> None:
    """Let a derivative of the operator that computes the gradients of `op` be refused."""

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise no_second_derivative(op)

    torch.library.register_autograd(f"entrenar::{op}_backward", refuse)


class OnceDifferentiable(Function):
    """Gradients that call(*tensors) computes, which have none themselves."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, call: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor) -> Any:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise no_second_derivative(ctx.name)


def once_differentiable(name: str, call: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor) -> Any:
    """call(*tensors), whose gradient is refused in the name of an operation."""
    return OnceDifferentiable.apply(name, call, *tensors) if torch.is_grad_enabled() else call(*tensors)
