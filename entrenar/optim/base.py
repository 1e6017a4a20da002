"""What all optimizers share: settings and their checks, states, and the gathering of parameters into kernel calls."""

from __future__ import annotations

import math
import sys
import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import attrgetter, is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from entrenar.autograd.ops._kernel import DEVICES, DTYPES, PLAIN
from entrenar.autograd.ops._library import define
from entrenar.optim.bucket import Bucket, State, lay_together
from entrenar.optim.clip import global_norm, why_not_finite
from entrenar.optim.codes import BLOCK, ZERO_CODE, codebook, dequantize_blockwise, quantize_blockwise
from entrenar.optim.exchange import from_bitsandbytes

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] absmaxes, Tensor(d!)[] steps, "
    "Tensor[] codebooks, Tensor? factor, int? seed"
)


def define_step(name: str, settings: str) -> None:
    """Define the op of a rule: one step of many tensors, computed in float32 and rounded once.

    All tensors are contiguous. A tensor of `steps` (float32, which count up) has one for each of some parameters that
    follow each other. `states` holds as many tensors of the first state, then as many of the second: in the dtype of
    the parameters, in float32, or as uint8 codes, with `absmaxes` in the same order and a codebook for each state. In
    a tensor of states each parameter begins with a block of 256 elements of its own. `factor` scales the gradients; if
    it is not finite, nothing changes. With a `seed` bfloat16 parameters are rounded stochastically.
    """

    def fake(*arguments: Any) -> None:
        return None

    define(f"{name}({LISTS}, {settings}) -> ()", fake)


class KernelOptimizer(Optimizer):
    """The base of all optimizers here.

    A subclass says which states a parameter has, how one step is computed in plain torch, and which op computes many.
    """

    STATES: ClassVar[tuple[str, ...]]  # names of the states that have the parameter's shape
    SIGNED: ClassVar[tuple[bool, ...]]  # whether they have negative values
    BITS: ClassVar[int] = 32  # of a state's element; 8 stands for codes

    grad_norm: Tensor | None = None
    max_norm: float | None = None

    # torch.amp.GradScaler does not read the device then, but sets `grad_scale`, what the gradients are multiplied by,
    # and `found_inf`, which is not 0 where the step must be left out; scalar tensors, deleted after the step.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        max_norm: float | None,
        min_8bit_size: int | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be greater than 0, and is {max_norm!r}")
        _refuse({"amsgrad": amsgrad, "differentiable": differentiable})
        if min_8bit_size is not None:
            defaults["min_8bit_size"] = min_8bit_size
        self.max_norm = max_norm
        self._skipped: dict[torch.device, Tensor] = {}
        self._buckets: dict[int, tuple[list[Tensor], list[Bucket]]] = {}  # by group: its parameters, and all in buckets
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "_skipped": self._skipped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = {}

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out: a gradient, or the norm of all, was not finite, or `found_inf` was set."""
        return sum(int(count.item()) for count in self._skipped.values())

    @abstractmethod
    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Raise ValueError for a setting out of range."""

    @abstractmethod
    def _update(self, group: dict[str, Any], param: Tensor, grad: Tensor, states: list[Tensor], step: int) -> None:
        """Compute one step in plain torch, in place on `param` and `states`."""

    @abstractmethod
    def _step_op(self, group: dict[str, Any], lists: tuple[Any, ...]) -> None:
        """Call the op of many steps with the arguments that all ops share, and the settings."""

    def _states(self, group: dict[str, Any]) -> int:
        """How many of STATES the parameters of a group have."""
        return len(self.STATES)

    def _signs(self, group: dict[str, Any]) -> dict[str, bool]:
        """Of each of these states, by name, whether it has negative values."""
        return dict(list(zip(self.STATES, self.SIGNED, strict=True))[: self._states(group)])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group after checking its settings and parameters, as `torch.optim.Optimizer.add_param_group`."""
        self._check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if not param.is_floating_point():
                del self.param_groups[-1]
                raise TypeError(
                    f"{type(self).__name__} trains real floating-point tensors; parameter {i} of the group is "
                    f"{param.dtype}"
                )

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate of every group; a scheduler's `get_lr(step)` goes here, before `step()`."""
        for group in self.param_groups:
            self._check_settings({**group, "lr": lr})
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient; returns what `closure`, which recomputes the loss, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [[param.grad for param in group["params"]] for group in self.param_groups]
        present = [grad for grads in gradients for grad in grads if grad is not None]
        if not {torch.strided}.issuperset(map(attrgetter("layout"), present)):
            self._refuse_sparse(gradients)
        factor = self._factor(present)
        for g, (group, grads) in enumerate(zip(self.param_groups, gradients, strict=True)):
            for bucket in self._buckets_of(g, grads):
                self._step_bucket(group, bucket, [grads[i] for i in bucket.positions], factor)
        return loss

    def _buckets_of(self, g: int, grads: list[Tensor | None]) -> list[Bucket]:
        """The buckets of group `g`, in which all its parameters are that have or ever had a gradient."""
        group = self.param_groups[g]
        params = group["params"]
        members, buckets = self._buckets.get(g, ([], []))
        same = len(members) == len(params) and all(map(is_, members, params))
        buckets = [bucket for bucket in buckets if same and bucket.is_current(self.state)]
        if sum(len(bucket.params) for bucket in buckets) < len(params):
            taken = {i for bucket in buckets for i in bucket.positions}
            together: dict[Any, list[int]] = defaultdict(list)
            for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad is not None and i not in taken:
                    alone = None if has_step_kernel(param) else i
                    together[alone, param.device, param.dtype, self._state_dtype(group, param)].append(i)
            for (*_, dtype), positions in together.items():
                some = [params[i] for i in positions]
                states = (self._state_of(group, param) for param in some)
                buckets.append(lay_together(positions, some, states, ["step", *self._state_names(group, dtype)]))
            self._buckets[g] = [*params], buckets
        return buckets

    def _step_bucket(
        self, group: dict[str, Any], bucket: Bucket, grads: list[Tensor | None], factor: Tensor | None
    ) -> None:
        there = [grad is not None for grad in grads]
        if not any(there):
            return
        if not all(there):
            bucket = bucket.only(there)
        gradients = [grad for grad in grads if grad is not None]
        param = bucket.params[0]
        factor = None if factor is None else factor.to(param.device)
        if not has_step_kernel(param) or not PLAIN.issuperset(map(type, gradients)):
            if factor is None or bool(factor.isfinite()):
                for param, grad, state in zip(bucket.params, gradients, bucket.states, strict=True):
                    self._step_in_torch(group, param, grad if factor is None else grad * factor, state)
            return
        signs = self._signs(group)
        codes = self._state_dtype(group, param) is torch.uint8
        contiguous = [param.contiguous() for param in bucket.params]
        lists = (
            contiguous,
            [grad.contiguous() for grad in gradients],
            [tensor for name in signs for tensor in bucket.tensors(name)],
            [tensor for name in signs for tensor in bucket.tensors(name + "_absmax")] if codes else [],
            bucket.tensors("step"),
            [codebook(signed, param.device) for signed in signs.values()] if codes else [],
            factor,
            group["seed"] if group["stochastic_rounding"] else None,
        )
        self._step_op(group, lists)
        for param, copy in zip(bucket.params, contiguous, strict=True):
            if copy is not param:
                param.copy_(copy)

    def _step_in_torch(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: dict[str, Any]) -> None:
        if group["stochastic_rounding"] and param.dtype is torch.bfloat16:
            raise RuntimeError(f"stochastic rounding needs the compiled kernels, which {param.device} does not have")
        state["step"] += 1
        grad = -grad if group["maximize"] else grad
        signs = self._signs(group)
        states = [
            dequantize_blockwise(state[name], state[name + "_absmax"], signed)
            if state[name].dtype is torch.uint8
            else state[name]
            for name, signed in signs.items()
        ]
        if all(each.dtype is param.dtype for each in states):
            self._update(group, param, grad, states, int(state["step"]))
        else:
            wide = param.to(states[0].dtype)
            self._update(group, wide, grad.to(wide.dtype), states, int(state["step"]))
            param.copy_(wide)
        for (name, signed), values in zip(signs.items(), states, strict=True):
            if state[name].dtype is torch.uint8:
                codes, absmax = quantize_blockwise(values, signed)
                state[name].copy_(codes)
                state[name + "_absmax"].copy_(absmax)

    def _state_dtype(self, group: dict[str, Any], param: Tensor) -> torch.dtype:
        """That of the states which a parameter has, or will have."""
        for name in self._signs(group):
            if name in self.state.get(param, ()):
                return self.state[param][name].dtype
        if self.BITS == 8 and param.numel() >= group["min_8bit_size"]:
            return torch.uint8
        wide = self.BITS == 8 or (group["stochastic_rounding"] and param.dtype is torch.bfloat16)
        return torch.float32 if wide and param.dtype in DTYPES else param.dtype

    def _state_names(self, group: dict[str, Any], dtype: torch.dtype) -> list[str]:
        """The names of states of that dtype, but for the step's."""
        names = [*self._signs(group)]
        return names if dtype is not torch.uint8 else [each for name in names for each in (name, name + "_absmax")]

    def _state_of(self, group: dict[str, Any], param: Tensor) -> State:
        """The state of a parameter, which begins here if it has not yet."""
        state = self.state[param]
        if not state:
            dtype = self._state_dtype(group, param)
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            for name, signed in self._signs(group).items():
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)
                if dtype is torch.uint8:
                    state[name].fill_(ZERO_CODE if signed else 0)
                    blocks = -(-param.numel() // BLOCK)
                    state[name + "_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
        return state

    def _factor(self, grads: list[Tensor]) -> Tensor | None:
        """What the gradients are multiplied by, where they are; NaN where the step must be left out."""
        measured = self.max_norm is not None or self.BITS == 8
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if not grads or (not measured and scale is None and found_inf is None):
            return None
        if measured:
            limit = math.inf if self.max_norm is None else self.max_norm
            self.grad_norm, factor = global_norm(grads, limit, scale)
        else:
            factor = torch.ones((), device=grads[0].device)
            if scale is not None:
                factor = factor / scale.to(factor.device)
        if found_inf is not None:
            factor = torch.where(found_inf.to(factor.device) == 0, factor, torch.nan)
        skip = factor.isnan()
        if found_inf is None and factor.is_cpu and skip:
            named = (
                (f"parameter {i} of group {g}", param)
                for g, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
            )
            warnings.warn(
                f"a step was left out: {why_not_finite(named)}", RuntimeWarning, stacklevel=_stacklevel_of_caller()
            )
        counts = self._skipped
        if factor.device not in counts:
            counts[factor.device] = torch.zeros_like(skip, dtype=torch.int64)
        counts[factor.device].add_(skip)
        return factor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of an optimizer of the same rule: ours of 32 or 8 bits, torch's, or that of bitsandbytes.

        States get the dtypes that they have here: codes are decoded, or floats encoded, where they must be. Settings
        that the other optimizer does not have stay as they are. Raises ValueError for a state that does not fit.
        """
        state_dict = from_bitsandbytes(state_dict, self.STATES, self.SIGNED)
        ours = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        saved = {index: state_dict["state"].get(index) for index in indices}
        super().load_state_dict({**state_dict, "state": {}})
        for group, before in zip(self.param_groups, ours, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)
            _refuse(group)
            self._check_settings(group)
        params = [param for group in self.param_groups for param in group["params"]]
        groups = [group for group in self.param_groups for _ in group["params"]]
        for param, group, index in zip(params, groups, indices, strict=True):
            if saved[index]:
                self.state[param] = self._load_state(group, param, saved[index])

    def _load_state(self, group: dict[str, Any], param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
        state = self._state_of(group, param)
        state["step"].fill_(saved.get("step", 1))  # torch's SGD does not count, and needs only to know that it began
        for name, signed in self._signs(group).items():
            value = saved.get(name)
            if value is None:
                if name + "_absmax" in saved or len(self.STATES) > 1:
                    raise ValueError(f"the state of a parameter of shape {tuple(param.shape)} has no {name}")
                return {}
            if value.shape != param.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, and its parameter {tuple(param.shape)}")
            absmax = saved.get(name + "_absmax")
            if absmax is None and state[name].dtype is not torch.uint8:
                state[name] = (
                    value.detach().to(param.device, state[name].dtype).clone(memory_format=torch.contiguous_format)
                )
                continue
            if absmax is None:
                value, absmax = quantize_blockwise(value.detach(), signed)
            if state[name].dtype is torch.uint8:
                state[name].copy_(value)
                state[name + "_absmax"].copy_(absmax)
            else:
                state[name].copy_(dequantize_blockwise(value, absmax, signed))
        return state

    def _refuse_sparse(self, gradients: list[list[Tensor | None]]) -> None:
        for g, grads in enumerate(gradients):
            for i, grad in enumerate(grads):
                if grad is not None and grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients, and parameter {i} of group {g}, of "
                        f"shape {tuple(grad.shape)}, has one: build its Embedding with sparse=False"
                    )


def has_step_kernel(param: Tensor) -> bool:
    """Whether the ops of the rules take such a parameter."""
    return type(param) in PLAIN and param.dtype in DTYPES and param.device.type in DEVICES


def _stacklevel_of_caller() -> int:
    """The `stacklevel` at which a warning of the function that asks points past this package and torch's wrappers."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("entrenar", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _refuse(settings: dict[str, Any]) -> None:
    for name in ("amsgrad", "differentiable"):
        if settings.get(name):
            raise ValueError(f"{name}=True is not supported: use torch.optim's optimizer for it")


def check_number(name: str, value: Any, most: float = math.inf) -> None:
    """Raise ValueError unless value is a number, 0 or more and below `most`; a learning rate may be a tensor of one."""
    if name == "lr" and isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not value.is_cpu:
            return  # reading it would wait for the device
        value = value.item()
    if not (isinstance(value, (int, float)) and 0 <= value < most):
        kind = "a finite number, 0 or more" if most == math.inf else f"a number in [0, {most:g})"
        raise ValueError(f"{name} must be {kind}, and is {value!r}")


def check_betas(betas: Any) -> None:
    """Raise ValueError unless betas are two numbers in [0, 1)."""
    for name, value in zip(("beta1", "beta2"), betas, strict=True):
        check_number(name, value, 1)
