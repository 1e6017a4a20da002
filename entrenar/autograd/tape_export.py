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
COLUMN, ROW = 2.2, 0.8
"""Inches."""


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
    columns = max((x for x, _ in places.values()), default=0) + 1
    rows = max((y for _, y in places.values()), default=0) + 1
    figure = Figure(figsize=(COLUMN * columns, ROW * rows))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.axis("off")
    boxes: dict[str, Any] = {}
    for entry in entries:
        color = "#d9e6f7" if entry.ours else "#f5e3d3"
        box = _box(axes, places[_name(entry)], _label(entry), color, "round,pad=0.4")
        boxes |= dict.fromkeys([_name(entry), *(value.name for value in entry.outputs)], box)
    for entry in entries:
        for value in entry.inputs:
            if value.name not in boxes:
                color = "#e6f2dc" if value.edge is not None else "#eeeeee"
                boxes[value.name] = _box(axes, places[value.name], str(value), color, "square,pad=0.3")
            _arrow(axes, boxes[value.name], boxes[_name(entry)])
    figure.savefig(os.fspath(path), dpi=120)


def _name(entry: Entry) -> str:
    return f"#{entry.index}"


def _label(entry: Entry) -> str:
    return f"{entry.index}. {entry.op}\n{', '.join(value.name for value in entry.outputs)}"


def _box(axes: Any, place: tuple[float, float], label: str, color: str, style: str) -> Any:
    return axes.text(
        *place, label, ha="center", va="center", fontsize=8, bbox={"boxstyle": style, "facecolor": color, "lw": 0.6}
    )


def _arrow(axes: Any, source: Any, target: Any) -> None:
    ends = {"patchA": source.get_bbox_patch(), "patchB": target.get_bbox_patch()}
    axes.annotate(
        "",
        xy=target.get_position(),
        xytext=source.get_position(),
        arrowprops={"arrowstyle": "-|>", "color": "0.55", **ends},
    )


def _places(entries: Sequence[Entry]) -> dict[str, tuple[float, float]]:
    """Where each leaf and operation stands: a row below everything that it is computed from."""
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
        put(_name(entry), 1 + max((depth[value.name] for value in entry.inputs), default=0))
        depth |= dict.fromkeys((value.name for value in entry.outputs), depth[_name(entry)])
    return places
