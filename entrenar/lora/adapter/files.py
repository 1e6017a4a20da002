"""Files that replace their older version only when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

Writer = Callable[[Path], None]

STAGED = ".saving"
"""What a name ends in until its bytes are whole; alone it is a directory inside the one that its files are for."""


def write_file(path: Path, write: Writer) -> None:
    """Let `write` make a file beside `path`, and rename it to `path`; on failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}{STAGED}")
    try:
        write(beside)
        _flush(beside)
        os.replace(beside, path)
        _flush(path.parent)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_directory(directory: Path, writers: dict[str, Writer]) -> None:
    """Write the named files into `directory` as one change; its other files stay.

    If `directory` is there already, all are written to a directory inside it, in the order of `writers`, and then
    renamed in the same order: from the first rename on the change is decided, and a process killed halfway leaves the
    rest for `finish_writing`. Otherwise they are written to a directory beside it, which is then renamed. One process
    writes at a time, while others may read.

    Raises NotADirectoryError where `directory` is a file.
    """
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; an adapter is saved to a directory")
    names = list(writers)
    finish_writing(directory, names)
    exists = directory.exists()
    staged = directory / STAGED if exists else directory.with_name(f".{directory.name}{STAGED}")
    _discard(staged, names)  # of a process that was killed before its first rename
    staged.mkdir(parents=True)
    try:
        for name, write in writers.items():
            write(staged / name)
            _flush(staged / name)
    except BaseException:
        _discard(staged, names)
        raise
    if exists:
        _move(staged, directory, names)
    else:
        os.rename(staged, directory)
        _flush(directory.parent)


def finish_writing(directory: Path, names: list[str]) -> None:
    """Complete a `write_directory` that was killed, or still is, between its renames; leave one before them alone."""
    staged = directory / STAGED
    first, *others = names
    left = [name for name in others if (staged / name).exists()]
    if left and not (staged / first).exists():
        _move(staged, directory, left)


def _discard(staged: Path, names: list[str]) -> None:
    """Remove what is not to be renamed, the first file last: without that one the others would count as decided."""
    for name in reversed(names):
        (staged / name).unlink(missing_ok=True)
    shutil.rmtree(staged, ignore_errors=True)


def _move(staged: Path, directory: Path, names: list[str]) -> None:
    for name in names:
        try:
            os.replace(staged / name, directory / name)
        except FileNotFoundError:
            if (staged / name).exists() or not (directory / name).exists():
                raise  # it is not that another process completes the change at the same time
        _flush(directory)
    with contextlib.suppress(FileNotFoundError):
        staged.rmdir()


def _flush(path: Path) -> None:
    """Have a file's bytes, or a directory's entries, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
