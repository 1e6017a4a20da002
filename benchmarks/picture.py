"""Draws the results of a CPU level: how many times as long each peer takes, or how many times as fast a step is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, results_folder

Bar = tuple[str, float]


def bars(folder: Path) -> Iterator[Bar]:
    """Labels and ratios, from those result files that there are."""
    for row in _read(folder, "training_step", "ratios"):
        if row["ratio"] == "entrenar / PEFT + bitsandbytes":
            yield f"training step, {row['workload']}: PEFT + bitsandbytes", row["tokens_per_second"]
    for row in _read(folder, "int4_linear"):
        dense = row["contender"] in ("torch dense", "torch int4pack") and row["direction"] == "forward"
        adapter = row["contender"].endswith("+ adapter") and row["direction"] != "forward" and row["M"] == 512
        if row["dtype"] == "bfloat16" and (dense or adapter):
            yield f"int4 linear 4096², M = {row['M']}, {row['direction']}: {row['contender']}", row["times_ours"]
    for row in _read(folder, "layers"):
        if row["contender"] == "torch dense + adapter":
            yield f"{row['layers']}, forward + backward: {row['contender']}", row["times_ours"]
    for row in _read(folder, "attention"):
        if row["dtype"] == "bfloat16":
            kind = row.get("kind", "causal")
            yield f"{kind} attention {row['batch']} x {row['tokens']}, {row['step']}: torch", row["times_ours"]
    for row in _read(folder, "ops"):
        if row["dtype"] == "bfloat16":
            yield f"{row['op']}: torch", row["times_ours"]
    ours = ""
    for row in _read(folder, "optimizers"):
        if row["times_ours"] == 1:
            ours = row["contender"]
        else:
            yield f"{ours}, {row['tensors']}: {row['contender']}", row["times_ours"]


def _read(folder: Path, name: str, key: str = "rows") -> list[dict[str, Any]]:
    path = folder / f"{name}.json"
    return json.loads(path.read_text())[key] if path.exists() else []


def draw(labelled: list[Bar], path: Path) -> None:
    """Horizontal bars on a logarithmic axis, from 1: to the right we are faster, to the left the peer is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, ratios = zip(*labelled[::-1], strict=True)
    figure = Figure(figsize=(10, 1 + 0.22 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = ["tab:blue" if ratio >= 1 else "tab:orange" for ratio in ratios]
    axes.barh(range(len(labels)), [ratio - 1 for ratio in ratios], left=1, color=colors)
    axes.set_xscale("log")
    axes.set_xticks((0.5, 1, 2, 5, 10), ("0.5", "1", "2", "5", "10"))
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.margins(y=0.01)
    for i, ratio in enumerate(ratios):
        axes.annotate(f" {ratio:.2f} ", (max(ratio, 1), i), va="center", fontsize=7)
    axes.set_xlabel(f"times as long as entrenar ({path.parent.name})")
    beside = path.with_name(f"{path.name}.saving")
    figure.savefig(beside, format="png", dpi=110)
    os.replace(beside, path)


def main() -> None:
    folder = results_folder()
    labelled = [*bars(folder)]
    if not labelled:
        raise SystemExit(f"there are no results in {folder.relative_to(ROOT)} yet: make bench")
    draw(labelled, folder / "ratios.png")
    print(f"drawn to {(folder / 'ratios.png').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
