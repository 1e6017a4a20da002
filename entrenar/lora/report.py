"""What `wrap` did to a model."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from entrenar.fusion.fuse import FusionReport
from entrenar.lora.layers import Int4Linear, LoRALayer


@dataclass
class Kept:
    """A parameter that stays as it was, and why."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    reason: str


@dataclass
class WrapReport:
    """What was adapted, what was kept and why, and what it costs. `print(report)` shows it as a table.

    Attributes:
        adapted: the new LoRA layers by name.
        kept: each parameter of two or more dimensions that was not quantized, with the reason.
        base_parameters: parameters of the model before, an int4 weight counted by its elements.
        bytes_before, bytes_after: bytes of all parameters and buffers.
        fusion: which modules were replaced by faster ones; None if that was not asked for.
    """

    adapted: dict[str, nn.Module]
    kept: dict[str, Kept]
    base_parameters: int
    bytes_before: int
    bytes_after: int
    fusion: FusionReport | None = None

    @property
    def trainable_parameters(self) -> int:
        """Elements of all adapters."""
        return sum(p.numel() for layer in self._layers() for p in layer.trainable_parameters())

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a fraction of all."""
        return self.trainable_parameters / (self.base_parameters + self.trainable_parameters)

    def _layers(self) -> list[LoRALayer]:
        return [layer for layer in self.adapted.values() if isinstance(layer, LoRALayer)]

    def __str__(self) -> str:
        adapted = Counter(
            (_pattern(name), f"{lora.out_features} x {lora.in_features}", _kind(lora.base), f"LoRA r={lora.rank}")
            for name, lora in zip(self.adapted, self._layers(), strict=True)
        )
        kept = Counter(
            (_pattern(name), " x ".join(map(str, k.shape)), _name(k.dtype), f"not in int4: {k.reason}")
            for name, k in self.kept.items()
        )
        rows = [("layer", "count", "weight", "kept in", "")]
        rows += [(row[0], str(count), *row[1:]) for row, count in (adapted + kept).items()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        table = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        )
        return (
            f"{table}\n"
            f"trainable: {self.trainable_parameters:,} of {self.base_parameters + self.trainable_parameters:,} "
            f"parameters ({100 * self.trainable_share:.2f} %)\n"
            f"bytes: {self.bytes_before:,} before, {self.bytes_after:,} after, adapters included"
            + (f"\n{self.fusion}" if self.fusion and (self.fusion.fused or self.fusion.kept) else "")
        )


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, shared ones once, an int4 weight counted by the elements that it stands for."""
    packed = [m for m in model.modules() if isinstance(m, Int4Linear)]
    stored = {id(p) for m in packed for p in (m.codes, m.scales)}
    dense = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    return dense + sum(m.in_features * m.out_features for m in packed)


def storage_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared memory counted once."""
    storages = {
        (t.device, t.untyped_storage().data_ptr() or id(t)): t.untyped_storage().nbytes()
        for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())


def _pattern(name: str) -> str:
    """The name with the numbers of repeated blocks left out."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _kind(base: nn.Module) -> str:
    if isinstance(base, Int4Linear):
        return "int4"
    return _name(next(base.parameters()).dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
