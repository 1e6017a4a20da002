"""A tape: what a model computed, operation by operation, and the walk back along it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten

from entrenar.autograd import ops
from entrenar.autograd.route import route
from entrenar.autograd.tape_export import export
from entrenar.autograd.tape_gradients import TapeCheck, check_entry
from entrenar.autograd.walk import Edge, Gradients, accumulate, deliver, edge_of, walk

SHORT = {"float64": "f64", "float32": "f32", "bfloat16": "bf16", "float16": "f16", "int64": "i64", "int32": "i32"}
OURS = {getattr(ops, name): name for name in ops.__all__}
# Attributes that hold another view of the tensor; reading any other attribute computes nothing.
VIEWS = {"T", "mT", "H", "mH", "data"}


@dataclass
class Value:
    """A tensor at one point of the run: in-place changes make another value of it."""

    name: str
    tensor: Tensor
    version: int
    edge: Edge | None

    def __str__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        return f"{self.name}: {list(self.tensor.shape)} {SHORT.get(dtype, dtype)}"

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to since."""
        return self.tensor._version != self.version


@dataclass
class Entry:
    """One recorded operation.

    Attributes:
        index: its place on the tape, from 1.
        op: its name.
        ours: whether it is one of `entrenar.autograd.ops`; otherwise it is torch's, with torch's gradient.
        module: path of the module that called it, "" outside of any.
        function, args, kwargs: what was called.
        inputs, outputs: the tensors in and out.
        seconds: time of the forward.
        saved_bytes: memory that it keeps for the backward, beyond parameters and what earlier operations keep already.
    """

    index: int
    op: str
    ours: bool
    module: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    seconds: float
    saved_bytes: int

    @property
    def input_edges(self) -> set[Edge]:
        """Where the gradients of the inputs that require one go."""
        return {value.edge for value in self.inputs if value.edge is not None}

    @property
    def output_edges(self) -> set[Edge]:
        """Where the gradients of the outputs come from."""
        return {value.edge for value in self.outputs if value.edge is not None}

    def __str__(self) -> str:
        inputs, outputs = ", ".join(map(str, self.inputs)), ", ".join(value.name for value in self.outputs)
        op = self.op if self.ours else f"torch {self.op}"
        return f"{self.index}. {op}({inputs}) -> {outputs}" + (f"  [{self.module}]" if self.module else "")


class Tape(TorchFunctionMode):
    """Records every operation of the code that it surrounds.

        with Tape() as tape:
            loss = model(batch).sum()
        print(tape)
        tape.backward(loss)

    Torch's functions, operators and modules are routed to the operations of `entrenar.autograd.ops`; one that has no
    counterpart there is recorded as torch's. The tape keeps every tensor that it saw, so that it can be walked and
    checked: memory grows with the computation, whatever is checkpointed. It records its own thread only. A tape inside
    another records too. What bypasses torch's functions (a custom autograd.Function, reentrant checkpointing) is not
    seen, and the gradient goes through it by torch's engine. After an exception the tape holds what came before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self._values: dict[tuple[int, int], Value] = {}
        self._kept: set[int] = set()  # storages that some operation keeps for the backward
        self._saved_bytes = 0
        self._names: dict[nn.Module, str] = {}
        self._modules: list[str] = []
        self._exits = ExitStack()
        self._bad_gradient: str | None = None

    def __enter__(self) -> Tape:
        """Start recording."""
        self._exits.enter_context(saved_tensors_hooks(self._note_saved, lambda tensor: tensor))
        before = nn.modules.module.register_module_forward_pre_hook(self._enter_module)
        self._exits.callback(before.remove)
        after = nn.modules.module.register_module_forward_hook(self._leave_module, always_call=True)
        self._exits.callback(after.remove)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop recording."""
        self._exits.close()
        self._modules.clear()
        super().__exit__(kind, error, traceback)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, or our operation in its place, and record it if it computed a tensor."""
        kwargs = kwargs or {}
        own = func in OURS
        target = func if own else route(func, args, kwargs)
        inputs = [self._value(x) for x in _tensors((args, kwargs))]
        self._saved_bytes = 0
        start = time.perf_counter()
        result = (target or func)(*args, **kwargs)
        seconds = time.perf_counter() - start
        name = _name(target or func)
        if name is None:
            return result
        written = [value.tensor for value in inputs if value.changed]
        returned = [y for y in _tensors(result) if all(y is not value.tensor for value in inputs)]
        outputs = [self._value(y) for y in (*written, *returned)]
        if outputs:
            self.entries.append(
                Entry(
                    index=len(self.entries) + 1,
                    op=name,
                    ours=target is not None,
                    module=self._modules[-1] if self._modules else "",
                    function=target or func,
                    args=args,
                    kwargs=kwargs,
                    inputs=inputs,
                    outputs=outputs,
                    seconds=seconds,
                    saved_bytes=self._saved_bytes,
                )
            )
        return result

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Walk the tape from `loss` to its beginning, and accumulate into the `.grad` of the leaves.

        `gradient` is that of what is differentiated with respect to `loss`, ones by default. The graph stays, so the
        walk can be repeated, and torch's engine can walk it too. Hooks of tensors do not run. Raises RuntimeError where
        `loss` requires no gradient.
        """
        if not loss.requires_grad:
            raise RuntimeError("this tensor depends on nothing that requires a gradient: there is nothing to walk to")
        with torch.no_grad(), torch._C.DisableTorchFunction():
            pending = {edge_of(loss): torch.ones_like(loss) if gradient is None else gradient}
            for entry in reversed(self.entries):
                incoming = {edge: pending.pop(edge) for edge in entry.output_edges if edge in pending}
                if incoming:
                    flowing = walk(incoming, entry.input_edges)
                    self._note_bad_gradient(entry, incoming, flowing)
                    accumulate(pending, flowing)
            for edge, arrived in pending.items():
                deliver(edge, arrived)

    def summary(self) -> str:
        """A table: for each kind of operation how often it ran, its forward time, and the bytes it keeps."""
        kinds: dict[tuple[bool, str], list[Entry]] = {}
        for entry in self.entries:
            kinds.setdefault((entry.ours, entry.op), []).append(entry)
        rows = [
            (
                op if ours else f"torch {op}",
                len(found),
                sum(e.seconds for e in found),
                sum(e.saved_bytes for e in found),
            )
            for (ours, op), found in kinds.items()
        ]
        rows.sort(key=lambda row: -row[2])
        rows.append(("all", len(self.entries), sum(row[2] for row in rows), sum(row[3] for row in rows)))
        width = max(len(row[0]) for row in rows)
        lines = [f"{'operation':{width}}  {'count':>6}  {'forward ms':>10}  {'saved MB':>9}"]
        lines += [f"{op:{width}}  {n:6}  {1e3 * s:10.2f}  {b / 1e6:9.2f}" for op, n, s, b in rows]
        return "\n".join(lines)

    def check_gradients(self) -> TapeCheck:
        """Check every operation that a gradient flows through by finite differences, at the inputs that it had.

        In float64, and in float32 where an operation has no float64; along a few random directions of each input. The
        result names what is wrong, or else the worst, and says what could not be checked.
        """
        with torch._C.DisableTorchFunction():
            return TapeCheck([check_entry(entry) for entry in self.entries if entry.output_edges])

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the tape to a file: as JSON (.json), or as a picture of the graph (.png, .svg, .pdf) if it is small.

        Raises ValueError for another ending, and for a picture of more than 60 operations.
        """
        export(self.entries, Path(path))

    def first_nonfinite(self) -> str | None:
        """Where NaN or infinity first came out of finite numbers, in the forward, else in `backward`; None if nowhere.

        An infinity that was asked for by a number in the call (filling a mask with -inf) is not reported.
        """
        for entry in self.entries:
            known = [value.tensor for value in entry.inputs if not value.changed]
            for value in entry.outputs:
                if not value.changed and (kind := _worse(value.tensor, known, entry)):
                    return f"{kind} in {value.name}, the result of {entry}"
        return self._bad_gradient

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def _value(self, tensor: Tensor) -> Value:
        key = (id(tensor), tensor._version)
        if key not in self._values:
            name, version = f"v{len(self._values)}", tensor._version
            with torch._C.DisableTorchFunction():  # a subclass's own functions would become part of the graph
                try:
                    edge = edge_of(tensor) if tensor.requires_grad else None
                except AssertionError:
                    # A custom Function is about to return it: its node is made after this call.
                    return Value(name, tensor, version, None)
            self._values[key] = Value(name, tensor, version, edge)
            if isinstance(tensor, nn.Parameter):
                self._kept.add(_storage(tensor))
        return self._values[key]

    def _note_saved(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided and (storage := _storage(tensor)) not in self._kept:
            self._kept.add(storage)
            self._saved_bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _note_bad_gradient(self, entry: Entry, incoming: Gradients, flowing: Gradients) -> None:
        if self._bad_gradient is None:
            bad = [g for g in flowing.values() if not g.isfinite().all()]
            if bad and all(g.isfinite().all() for g in incoming.values()):
                kind = "NaN" if any(g.isnan().any() for g in bad) else "infinity"
                self._bad_gradient = f"{kind} in the gradient that comes out of {entry}"

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        if not self._modules:
            for name, child in module.named_modules():
                self._names.setdefault(child, name)
        self._modules.append(self._names.get(module, type(module).__name__))

    def _leave_module(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._modules:
            self._modules.pop()


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name(func: Callable[..., Any]) -> str | None:
    """What to call a function; None for the reading of an attribute."""
    if func in OURS:
        return OURS[func]
    parts = (resolve_name(func) or getattr(func, "__name__", str(func))).split(".")
    if parts[-1] == "__get__":
        return parts[-2] if parts[-2] in VIEWS else None
    return parts[-1].strip("_") if parts[-1].startswith("_") else parts[-1]


def _worse(result: Tensor, inputs: list[Tensor], entry: Entry) -> str | None:
    """What `result` has that none of `inputs` has and the call did not ask for: "NaN", "infinity", or None."""
    if not result.is_floating_point() or result.isfinite().all():
        return None
    inputs = [x for x in inputs if x.is_floating_point()]
    if result.isnan().any():
        return None if any(x.isnan().any() for x in inputs) else "NaN"
    numbers = [leaf for leaf in tree_flatten((entry.args, entry.kwargs))[0] if isinstance(leaf, float)]
    asked = any(number in (float("inf"), float("-inf")) for number in numbers)
    return None if asked or any(not x.isfinite().all() for x in inputs) else "infinity"
