"""The report of mutation testing: a table of the files, and every survivor with a judgement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """# Mutants

`make mutants` changes one expression of the package at a time (mutmut's operators: numbers, strings, operators,
comparisons, arguments, assignments, conditions) and runs the tests that reach it. A mutant is killed when a test fails,
or when the tests take more than five times as long and 20 seconds. Where the time box ends before the mutants do, those
that ran are a random sample.

"wording" among the survivors are changes of a part of an error message that no test reads: tests match the part that
says what was wrong and where. They count as survivors all the same.

| file | mutants | run | killed | survive | killed, % | wording | judged equivalent |
|---|---:|---:|---:|---:|---:|---:|---:|
"""
WORDING, EQUIVALENT = "wording", "equivalent"


def render(results: dict[str, dict[str, Any]], judged: Path) -> str:
    """The Markdown report; `judged` is a JSON list of survivors, each with the reason why it is left."""
    why = {(j["file"], j["before"], j["after"]): j["why"] for j in json.loads(judged.read_text(encoding="utf-8"))}
    rows, lists = [], []
    totals = [0] * 6
    for file, result in results.items():
        reasons = [_reason(file, survivor, why) for survivor in result["survivors"]]
        killed, survive = result["killed"] + result["timeout"], result["survived"]
        kinds = [sum(reason.startswith(kind) for reason in reasons) for kind in (WORDING, EQUIVALENT)]
        row = [result["mutants"], killed + survive, killed, survive, *kinds]
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        rows.append(_row(f"`{file}`", row))
        listed = [(s, r) for s, r in zip(result["survivors"], reasons, strict=True) if r != WORDING]
        if listed:
            lists.append(f"\n### {file}\n")
            lists += [f"- line {s['line']}: `{s['before']}` → `{s['after'] or 'nothing'}`: {r}" for s, r in listed]
    rows.append(_row("all", totals))
    return HEAD + "\n".join(rows) + "\n\n## Survivors other than wording\n" + "\n".join(lists) + "\n"


def _row(name: str, values: list[int]) -> str:
    mutants, run, killed, survive, *kinds = values
    return (
        f"| {name} | {mutants} | {run} | {killed} | {survive} | {100 * killed / max(run, 1):.1f} | "
        + " | ".join(map(str, kinds))
        + " |"
    )


def _reason(file: str, survivor: dict[str, Any], why: dict[tuple[str, str, str], str]) -> str:
    # The string operator puts XX around a string; of an f-string only plain neighbours are strings.
    if "XX" in survivor["after"] and " " in survivor["after"].split("XX")[1]:
        return WORDING
    return why.get((file, survivor["before"], survivor["after"]), "not judged yet")
