"""A tensor whose operators are this package's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from entrenar.autograd.route import route


class Tensor(torch.Tensor):
    """A torch.Tensor whose operators and torch functions run the operations of `entrenar.autograd.ops`.

    What has no such operation runs as torch's. Results are Tensors again.
    """

    @classmethod
    def from_vec(cls, data: Sequence[Any], requires_grad: bool = False) -> Tensor:
        """The (nested) list `data` in float32."""
        return cls._leaf(torch.tensor(data, dtype=torch.float32), requires_grad)

    @classmethod
    def zeros(cls, *shape: int | Sequence[int], requires_grad: bool = False) -> Tensor:
        """Zeros in float32. The shape is one sequence or several numbers; a bool behind it is `requires_grad`."""
        return cls._filled(torch.zeros, shape, requires_grad)

    @classmethod
    def ones(cls, *shape: int | Sequence[int], requires_grad: bool = False) -> Tensor:
        """Ones in float32, of a shape given as to `zeros`."""
        return cls._filled(torch.ones, shape, requires_grad)

    @classmethod
    def randn(cls, *shape: int | Sequence[int], requires_grad: bool = False) -> Tensor:
        """Samples of the normal distribution with mean 0 and variance 1, in float32, from torch's generator.

        The shape is given as to `zeros`.
        """
        return cls._filled(torch.randn, shape, requires_grad)

    @classmethod
    def _filled(
        cls, fill: Callable[..., torch.Tensor], shape: tuple[int | Sequence[int], ...], requires_grad: bool
    ) -> Tensor:
        if shape and isinstance(last := shape[-1], bool):
            shape, requires_grad = shape[:-1], last
        return cls._leaf(fill(*shape), requires_grad)

    @classmethod
    def _leaf(cls, data: torch.Tensor, requires_grad: bool) -> Tensor:
        leaf = data.as_subclass(cls)
        leaf.requires_grad_(requires_grad)
        return leaf

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run our operation in place of `func` where there is one."""
        with torch._C.DisableTorchFunctionSubclass():
            target = route(func, args, kwargs or {})
        return super().__torch_function__(target or func, types, args, kwargs or {})


def backward(x: torch.Tensor, gradient: torch.Tensor | None = None) -> None:
    """Accumulate the gradient of `x` into the `.grad` of every leaf that it depends on.

    `gradient`, of x's shape, is that of what is differentiated with respect to `x`; ones by default, so that for a
    tensor of several elements their sum is differentiated. Raises RuntimeError where x depends on nothing that
    requires a gradient.
    """
    x.backward(torch.ones_like(x) if gradient is None else gradient)
