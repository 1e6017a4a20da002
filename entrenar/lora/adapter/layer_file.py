"""The adapter of a single layer as one JSON file.

Fields: version ("1.0"), rank, alpha, d_out, d_in, scale (the factor of B A x), and lora_a [rank, d_in] and lora_b
[d_out, rank] as flat row-major lists.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from entrenar.lora.adapter.files import write_file
from entrenar.lora.layers import LoRALayer

VERSION = "1.0"
FIELDS = ("version", "rank", "alpha", "d_out", "d_in", "scale", "lora_a", "lora_b")


def save_layer(layer: LoRALayer, path: Path) -> None:
    """Write `layer`'s adapter to the file `path`; ValueError for NaN or infinity in it."""
    for name in ("lora_A", "lora_B"):
        if not getattr(layer, name).isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values: nothing was written to {path}")
    fields = {
        "version": VERSION,
        "rank": layer.rank,
        "alpha": layer.alpha,
        "d_out": layer.out_features,
        "d_in": layer.in_features,
        "scale": layer.scaling,
        "lora_a": layer.lora_A.detach().float().flatten().tolist(),
        "lora_b": layer.lora_B.detach().float().flatten().tolist(),
    }
    write_file(path, lambda beside: _dump(fields, beside))


def _dump(fields: dict[str, Any], path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(fields, file, allow_nan=False)


def load_layer(path: Path, base: nn.Module | Tensor) -> LoRALayer:
    """Read the file `path` onto `base`, a weight or a linear layer, or into `base`, a LoRALayer.

    `scale` decides: where it is not alpha / rank, the layer's alpha becomes scale * rank.
    """
    fields = _read(path)
    rank, d_out, d_in, scale = fields["rank"], fields["d_out"], fields["d_in"], fields["scale"]
    lora_A = _matrix(fields, "lora_a", rank, d_in, path)
    lora_B = _matrix(fields, "lora_b", d_out, rank, path)
    alpha = fields["alpha"] if math.isclose(scale, fields["alpha"] / rank, rel_tol=1e-6) else scale * rank
    if isinstance(base, LoRALayer):
        layer = base
        found = (layer.out_features, layer.in_features, layer.rank)
        if found != (d_out, d_in, rank) or not math.isclose(layer.scaling, scale, rel_tol=1e-6):
            raise ValueError(
                f"{path} is of d_out={d_out}, d_in={d_in}, rank={rank}, scale={scale}; the layer is of "
                f"d_out={found[0]}, d_in={found[1]}, rank={found[2]}, scale={layer.scaling}"
            )
    else:
        try:
            layer = LoRALayer(base, d_out, d_in, rank=rank, alpha=alpha)
        except ValueError as error:
            raise ValueError(f"{path} does not fit the base: {error}") from error
    with torch.no_grad():
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
    return layer


def _read(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{path}: {constant} is no value of an adapter")

    try:
        fields = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not whole JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, not an adapter's fields")
    if missing := [name for name in FIELDS if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if fields["version"] != VERSION:
        raise ValueError(f"{path} is of version {fields['version']!r}; this package reads {VERSION!r}")
    for name in ("rank", "d_out", "d_in"):
        if type(fields[name]) is not int or fields[name] < 1:
            raise ValueError(f"{path}: {name} must be a whole number, 1 or more, and is {fields[name]!r}")
    for name in ("alpha", "scale"):
        if type(fields[name]) not in (int, float) or not math.isfinite(fields[name]):
            raise ValueError(f"{path}: {name} must be a finite number, and is {fields[name]!r}")
    return fields


def _matrix(fields: dict[str, Any], name: str, rows: int, columns: int, path: Path) -> Tensor:
    values = fields[name]
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        raise ValueError(f"{path}: {name} must be a flat list of numbers")
    if len(values) != rows * columns:
        raise ValueError(f"{path}: {name} has {len(values)} values; {rows} x {columns} = {rows * columns} are expected")
    matrix = torch.tensor(values, dtype=torch.float64, device="cpu").float().view(rows, columns)
    if not matrix.isfinite().all():
        index = int((~matrix.isfinite()).flatten().nonzero()[0])
        raise ValueError(f"{path}: {name}[{index}] is {values[index]}, which float32 cannot hold")
    return matrix
