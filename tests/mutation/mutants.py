"""The mutants of a Python file: mutmut's operators, applied one at a time to every expression that runs."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import libcst as cst
from libcst.metadata import CodeRange, MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

# What is never run as code, or says nothing of behaviour.
SKIPPED = (cst.Annotation, cst.Import, cst.ImportFrom)


@dataclass(frozen=True)
class Mutant:
    """A changed file: its source, the changed lines before and after, and the lines of the statement changed."""

    source: str
    before: str
    after: str
    lines: range


def mutants(source: str) -> list[Mutant]:
    """Every mutant of `source` that compiles, in the order of the file, none twice."""
    found: dict[str, Mutant] = {}
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    positions, parents = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider)
    for node in _nodes(wrapper.module):
        for replacement in _replacements(node):
            changed = wrapper.module.deep_replace(node, replacement).code
            if changed == source or changed in found or not _compiles(changed):
                continue
            found[changed] = Mutant(changed, *_difference(source, changed), _statement(node, positions, parents))
    return list(found.values())


def _nodes(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    if isinstance(node, SKIPPED) or _is_export_list(node) or _is_cast(node):
        return
    yield node
    for child in node.children:
        yield from _nodes(child)


def _is_export_list(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Assign) and getattr(node.targets[0].target, "value", None) == "__all__"


def _is_cast(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Arg) and isinstance(node.value, cst.SimpleString) and "[" in node.value.value


def _replacements(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    for kind, operator in mutation_operators:
        if isinstance(node, kind):
            # Of a string one mutant is enough; the others only change its case.
            yield from itertools.islice(operator(node), 1 if isinstance(node, cst.BaseString) else None)


def _compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def _difference(source: str, changed: str) -> tuple[str, str]:
    lines = list(difflib.ndiff(source.splitlines(), changed.splitlines()))
    before, after = ([line[2:].strip() for line in lines if line.startswith(sign)] for sign in ("- ", "+ "))
    return " ".join(before), " ".join(after)


def _statement(node: cst.CSTNode, positions: dict[cst.CSTNode, CodeRange], parents: dict) -> range:
    """The lines of the simple statement, or of the head of the compound one, that `node` stands in."""
    while not isinstance(node, (cst.SimpleStatementLine, cst.BaseCompoundStatement)):
        node = parents[node]
    first, last = positions[node].start.line, positions[node].end.line
    if isinstance(node, cst.BaseCompoundStatement):
        last = max(first, positions[node.body].start.line)
    return range(first, last + 1)
