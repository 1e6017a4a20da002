"""A tape as a file: a picture of the graph, or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entrenar.autograd.tape import Entry, Value

DRAWABLE = 60
"""Operations that a picture can hold and still be read."""


def export(entries: Sequence[Entry], path: Path) -> None:
    """Write the entries to `path`: .json, or a picture (.png, .svg, .pdf) of at most 60 operations."""
    if path.suffix == ".json":
        path.write_text(json.dumps([_as_dict(entry) for entry in entries], indent=1), encoding="utf-8")
    elif path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: a tape is written as .json, or drawn as .png, .svg or .pdf")
    elif len(entries) > DRAWABLE:
        raise ValueError(
            f"{path}: a picture holds at most {DRAWABLE} operations, and the tape has {len(entries)}: use .json"
        )
    else:
        _draw(entries, path)


def _as_dict(entry: Entry) -> dict[str, Any]:
    return {
        "index": entry.index,
        "op": entry.op,
        "ours": entry.ours,
        "module": entry.module,
        "inputs": [_value(value) for value in entry.inputs],
        "outputs": [_value(value) for value in entry.outputs],
        "seconds": entry.seconds,
        "saved_bytes": entry.saved_bytes,
    }


def _value(value: Value) -> dict[str, Any]:
    dtype = str(value.tensor.dtype).removeprefix("torch.")
    return {"name": value.name, "shape": list(value.tensor.shape), "dtype": dtype, "gradient": value.edge is not None}


def _draw(entries: Sequence[Entry], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a tape is drawn with matplotlib: pip install 'entrenar[cli]'") from error

    places = _places(entries)
    width = max(x for x, _ in places.values()) + 1
    height = max(y for _, y in places.values()) + 1
    figure = Figure(figsize=(2.2 * width + 0.5, 0.8 * height + 0.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(-0.7, width - 0.3)
    axes.set_ylim(height - 0.3, -0.7)
    axes.axis("off")
    for entry in entries:
        for source in entry.inputs:
            axes.annotate(
                "",
                xy=places[f"#{entry.index}"],
                xytext=places[source.name],
                arrowprops={"arrowstyle": "-|>", "color": "0.55", "shrinkA": 14, "shrinkB": 14},
            )
    for entry in entries:
        label = f"{entry.index}. {entry.op}\n{', '.join(value.name for value in entry.outputs)}"
        color = "#d9e6f7" if entry.ours else "#f5e3d3"
        _box(axes, places[f"#{entry.index}"], label, color, "round,pad=0.4")
    produced = {value.name for entry in entries for value in entry.outputs}
    for value in {v.name: v for entry in entries for v in entry.inputs if v.name not in produced}.values():
        _box(axes, places[value.name], str(value), "#e6f2dc" if value.edge is not None else "#eeeeee", "square,pad=0.3")
    figure.savefig(os.fspath(path), dpi=120)


def _box(axes: Any, place: tuple[float, float], label: str, color: str, style: str) -> None:
    axes.text(
        *place, label, ha="center", va="center", fontsize=8, bbox={"boxstyle": style, "facecolor": color, "lw": 0.6}
    )


def _places(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Where each leaf, operation and value stands: a row below everything that it is computed from."""
    depth: dict[str, int] = {}
    rows: dict[int, int] = {}
    places: dict[str, tuple[float, float]] = {}

    def put(name: str, row: int) -> None:
        depth[name] = row
        places[name] = (rows.get(row, 0), row)
        rows[row] = rows.get(row, 0) + 1

    for entry in entries:
        for value in entry.inputs:
            if value.name not in depth:
                put(value.name, 0)
        name = f"#{entry.index}"
        put(name, 1 + max((depth[value.name] for value in entry.inputs), default=0))
        for value in entry.outputs:
            depth[value.name], places[value.name] = depth[name], places[name]
    return places
