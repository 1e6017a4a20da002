from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from entrenar.checkpoint.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor still in its file: its shape in the model's layout, and how to read it into fresh memory."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Checkpoint(Protocol):
    """What a reader of one file format offers: the model's configuration, and its tensors by the model's names."""

    path: Path
    config: Any

    def tensors(self, model: nn.Module) -> dict[str, StoredTensor]:
        """The stored tensors by their names in `model`; a tensor that `model` has no name for keeps its own."""


def read_bytes(path: Path, offset: int, size: int) -> Tensor:
    """Read `size` bytes of the file from `offset` on as a uint8 tensor [size].

    A plain read, not a memory map: the pages of a map count as the process's memory for as long as the map lives, so a
    mapped checkpoint ends up resident as a whole, and a file cut short under a map kills the process.
    """
    raw = torch.empty(size, dtype=torch.uint8, device="cpu")
    with path.open("rb") as file:
        file.seek(offset)
        got = file.readinto(raw.numpy().data)
    if got != size:
        raise CheckpointError(f"{path} is truncated: {got} of the {size} bytes at offset {offset}; copy it again")
    return raw
