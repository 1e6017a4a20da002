"""What all optimizers share: settings and their checks, states, and the gathering of parameters into kernel calls."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from abc import abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from entrenar.autograd.ops._kernel import DEVICES, DTYPES, PLAIN
from entrenar.autograd.ops._library import define
from entrenar.optim.clip import global_norm, why_not_finite
from entrenar.optim.codes import BLOCK, ZERO_CODE, codebook, dequantize_blockwise, quantize_blockwise
from entrenar.optim.exchange import from_bitsandbytes
from entrenar.optim.settings import refuse_unsupported

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

ALL_STATES = {"momentum_buffer", "exp_avg", "exp_avg_sq"}  # of all rules
STEP, ABSMAX = "step", "_absmax"  # the state that counts, and what a name ends with that has the maxima of codes
State = dict[str, Any]  # of a parameter, by name
Row = tuple[Tensor, Tensor, State]  # a parameter, its gradient and its state

LISTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] absmaxes, Tensor(d!)[] steps, "
    "Tensor[] codebooks, Tensor? factor, int? seed"
)


def define_step(name: str, settings: str) -> None:
    """Define the op of a rule: one step of many tensors, computed in float32 and rounded once.

    All tensors are contiguous. `states` holds the first state of every parameter, then the second of every one:
    in the dtype of the parameters, in float32, or as uint8 codes with their `absmaxes`, in the same order, and a
    codebook for each state. `steps` (float32 scalars) count up. `factor` scales the gradients; if it is not finite,
    nothing changes. With a `seed` bfloat16 parameters are rounded stochastically.
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
        refuse_unsupported({"amsgrad": amsgrad, "differentiable": differentiable})
        if min_8bit_size is not None:
            defaults["min_8bit_size"] = min_8bit_size
        self.max_norm = max_norm
        self._skipped: dict[torch.device, Tensor] = {}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "_skipped": self._skipped}

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
        refuse_unsupported(param_group)
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
        for group, grads in zip(self.param_groups, gradients, strict=True):
            self._step_group(group, grads, factor)
        return loss

    def _step_group(self, group: dict[str, Any], grads: list[Tensor | None], factor: Tensor | None) -> None:
        first = next(iter(self._signs(group)), STEP)
        together: dict[Any, list[Row]] = defaultdict(list)
        for param, grad in zip(group["params"], grads, strict=True):
            if grad is None:
                continue
            state = self.state[param]
            if state.get(first) is None:
                self._start(group, param, state)
            kind = param.device, param.dtype, state[first].dtype, type(param), type(grad)
            together[kind].append((param, grad, state))
        for rows in together.values():
            self._step_alike(group, rows, factor)

    def _step_alike(self, group: dict[str, Any], rows: list[Row], factor: Tensor | None) -> None:
        """A step of parameters of one device, dtype and class, whose states and gradients are of one each too."""
        params, grads, states = zip(*rows, strict=True)
        device = params[0].device
        factor = None if factor is None else factor.to(device)
        if not _has_kernel(params[0]) or type(grads[0]) not in PLAIN:
            if factor is None or bool(factor.isfinite()):
                for param, grad, state in rows:
                    self._step_in_torch(group, param, grad if factor is None else grad * factor, state)
            return
        signs = self._signs(group)
        absmaxes = [name + ABSMAX for name in signs if name + ABSMAX in states[0]]
        contiguous = [param.contiguous() for param in params]
        lists = (
            contiguous,
            [grad.contiguous() for grad in grads],
            [state[name] for name in signs for state in states],
            [state[name] for name in absmaxes for state in states],
            [state[STEP] for state in states],
            [codebook(signed, device) for signed in signs.values()] if absmaxes else [],
            factor,
            group["seed"] if group["stochastic_rounding"] else None,
        )
        self._step_op(group, lists)
        for param, copy in zip(params, contiguous, strict=True):
            if copy is not param:
                param.copy_(copy)

    def _step_in_torch(self, group: dict[str, Any], param: Tensor, grad: Tensor, state: State) -> None:
        if group["stochastic_rounding"] and param.dtype is torch.bfloat16:
            raise RuntimeError(f"stochastic rounding needs the compiled kernels, which {param.device} does not have")
        state[STEP] += 1
        grad = -grad if group["maximize"] else grad
        signs = self._signs(group)
        states = [
            dequantize_blockwise(state[name], state[name + ABSMAX], signed)
            if state[name].dtype is torch.uint8
            else state[name]
            for name, signed in signs.items()
        ]
        dtype = functools.reduce(torch.promote_types, (each.dtype for each in states), param.dtype)
        wide, *wide_states = (each.to(dtype) for each in (param, *states))
        self._update(group, wide, grad.to(dtype), wide_states, int(state[STEP]))
        if wide is not param:
            param.copy_(wide)
        for (name, signed), values in zip(signs.items(), wide_states, strict=True):
            if state[name].dtype is torch.uint8:
                codes, absmax = quantize_blockwise(values, signed)
                state[name].copy_(codes)
                state[name + ABSMAX].copy_(absmax)
            elif values is not state[name]:
                state[name].copy_(values)

    def _start(self, group: dict[str, Any], param: Tensor, state: State) -> None:
        codes = self.BITS == 8 and param.numel() >= group["min_8bit_size"]
        wide = self.BITS == 8 or (group["stochastic_rounding"] and param.dtype is torch.bfloat16)
        dtype = torch.float32 if wide and param.dtype in DTYPES else param.dtype
        state[STEP] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name, signed in self._signs(group).items():
            if codes:
                zero = ZERO_CODE if signed else 0
                state[name] = torch.full(param.shape, zero, dtype=torch.uint8, device=param.device)
                blocks = -(-param.numel() // BLOCK)
                state[name + ABSMAX] = torch.zeros(blocks, dtype=torch.float32, device=param.device)
            else:
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.contiguous_format)

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
            factor = torch.ones((), dtype=torch.float32, device=grads[0].device)
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
        that the other optimizer does not have stay as they are. Raises ValueError for a state that does not fit, with
        all as it was.
        """
        state_dict = state_dict.copy()  # as torch's hooks expect
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        kept = self.state, self.param_groups
        try:
            self._load(from_bitsandbytes(state_dict, self.STATES, self.SIGNED))
        except BaseException:
            self.state, self.param_groups = kept
            raise
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
        ours = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        saved = dict(state_dict["state"])
        # Torch loads the groups alone, for it would cast states to the parameters' dtypes. The hooks, which are to see
        # states as well, are called around this.
        hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict({**state_dict, "state": {}})
        finally:
            self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks = hooks
        for group, before in zip(self.param_groups, ours, strict=True):
            for name, value in before.items():
                group.setdefault(name, value)
            refuse_unsupported(group)
            self._check_settings(group)
        places = iter(indices)
        for group in self.param_groups:
            states = {param: saved.pop(next(places), None) for param in group["params"]}
            for param, state in states.items():
                if state:
                    self._load_state(group, param, state)
        self.state.update(saved)  # of nobody here, as torch keeps it

    def _load_state(self, group: dict[str, Any], param: Tensor, saved: State) -> None:
        state = self.state[param]
        self._start(group, param, state)
        state[STEP].fill_(saved.get(STEP, 1))  # torch's SGD does not count, and needs only to know that it began
        where = f"the state of a parameter of shape {tuple(param.shape)}"
        if others := sorted(name for name in ALL_STATES - {*self.STATES} if saved.get(name) is not None):
            raise ValueError(f"{where} has {others[0]}, which {type(self).__name__} has not: it is another rule's")
        for name, signed in self._signs(group).items():
            value, absmax = saved.get(name), saved.get(name + ABSMAX)
            if value is None:
                if absmax is not None or len(self.STATES) > 1:
                    raise ValueError(f"{where} has no {name}")
                state.clear()  # it has not begun
                return
            if value.shape != param.shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, and its parameter {tuple(param.shape)}")
            value = value.detach()
            if state[name].dtype is torch.uint8:
                codes, absmax = (value, absmax) if absmax is not None else quantize_blockwise(value, signed)
                state[name].copy_(codes)
                state[name + ABSMAX].copy_(absmax)
            else:
                state[name].copy_(value if absmax is None else dequantize_blockwise(value, absmax, signed))
        known = {STEP, *(each for name in ALL_STATES for each in (name, name + ABSMAX))}
        state.update((name, value) for name, value in saved.items() if name not in known)

    def _refuse_sparse(self, gradients: list[list[Tensor | None]]) -> None:
        for g, grads in enumerate(gradients):
            for i, grad in enumerate(grads):
                if grad is not None and grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} does not take sparse gradients, and parameter {i} of group {g}, of "
                        f"shape {tuple(grad.shape)}, has one: build its Embedding with sparse=False"
                    )


def _has_kernel(param: Tensor) -> bool:
    """Whether the ops of the rules take such a parameter."""
    return type(param) in PLAIN and param.dtype in DTYPES and param.device.type in DEVICES


def _stacklevel_of_caller() -> int:
    """The `stacklevel` at which a warning of the function that asks points past this package and torch's wrappers."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("entrenar", "torch"):
        frame, level = frame.f_back, level + 1
    return level
