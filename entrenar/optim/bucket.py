"""Buckets: parameters that take their steps together, and whose states lie behind each other.

One tensor more costs a kernel call as much time as a thousand elements more, and the hundreds of parameters of a LoRA
have a few thousand elements each.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from itertools import compress
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from entrenar.optim.codes import BLOCK

State = dict[str, Any]  # of a parameter: its step, tensors of its shape, and where they are codes the maxima of blocks


class Bucket:
    """Parameters of one group, device and dtype, and their states, of which `names` are those that the rule has.

    `positions` are the parameters' in the group. Where the states are `laid` behind each other, they are views of one
    tensor for each name. It is theirs alone: whoever takes the states from the optimizer frees it.
    """

    def __init__(
        self, positions: list[int], params: list[Tensor], states: list[State], names: list[str], *, laid: bool
    ) -> None:
        self.positions, self.params, self.states = positions, params, states
        self._names, self._laid = names, laid
        self._dtypes = {param.dtype for param in params}
        self._values = [weakref.ref(state[name]) for state in states for name in names]

    def is_current(self, states: Mapping[Tensor, State]) -> bool:
        """Whether the parameters have the dtype that they had, and in `states` the tensors that they had."""
        absent = object()
        values = [state.get(name, absent) for state in self.states for name in self._names]
        return (
            self._dtypes == set(map(attrgetter("dtype"), self.params))
            and all(map(is_, map(states.get, self.params), self.states))
            and all(map(is_, values, [value() for value in self._values]))
        )

    def tensors(self, name: str) -> list[Tensor]:
        """Where the states of that name lie, in the order of the parameters, as the ops of the rules take them."""
        return [self.states[0][name]._base] if self._laid else [state[name] for state in self.states]

    def only(self, present: list[bool]) -> Bucket:
        """Those of the parameters that are `present`, at least one."""
        positions, params = [*compress(self.positions, present)], [*compress(self.params, present)]
        return Bucket(positions, params, [*compress(self.states, present)], self._names, laid=False)


@torch.inference_mode(False)  # in which views do not know their base
def lay_together(positions: list[int], params: list[Tensor], states: Iterable[State], names: list[str]) -> Bucket:
    """A bucket of these parameters, with their states moved behind each other; a single one's stay where they are.

    Each parameter's begin with a block of their own.
    """
    if len(params) == 1:
        return Bucket(positions, params, [*states], names, laid=False)
    blocks = [-(-param.numel() // BLOCK) for param in params]
    wholes: dict[str, Tensor] = {}
    laid: list[State] = []
    block = 0
    for i, state in enumerate(states):
        for name in names:
            if name == "step":
                begin, size, total = i, 1, len(params)
            else:
                unit = 1 if name.endswith("_absmax") else BLOCK
                begin, size, total = block * unit, blocks[i] * unit, sum(blocks) * unit
            value = state[name]
            if name not in wholes:
                wholes[name] = value.new_empty(total)
            room = wholes[name][begin : begin + size]
            room[value.numel() :].zero_()
            state[name] = room[: value.numel()].view(value.shape).copy_(value)
        laid.append(state)
        block += blocks[i]
    return Bucket(positions, params, laid, names, laid=True)
