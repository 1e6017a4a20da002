"""Files that replace their older version only when they are whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

Writer = Callable[[Path], None]


def write_file(path: Path, write: Writer) -> None:
    """Let `write` make a file beside `path`, and rename it to `path`; on failure `path` is as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.saving")
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

    All are written to a directory beside it first, in the order of `writers`. If `directory` is there already, they
    are then renamed into it in the same order: from the first rename on the change is decided, and a process killed
    halfway leaves the rest beside, for `finish_writing`. One process writes at a time, while others may read.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; an adapter is saved to a directory")
    names = list(writers)
    finish_writing(directory, names)
    beside = _beside(directory)
    if beside.exists():  # of a process that was killed before its first rename
        shutil.rmtree(beside)
    beside.mkdir(parents=True)
    try:
        for name, write in writers.items():
            write(beside / name)
            _flush(beside / name)
    except BaseException:
        shutil.rmtree(beside)
        raise
    if directory.exists():
        _move(beside, directory, names)
    else:
        os.rename(beside, directory)
        _flush(directory.parent)


def finish_writing(directory: Path, names: list[str]) -> None:
    """Complete a `write_directory` that was killed, or still is, between its renames; leave one before them alone."""
    beside = _beside(directory)
    first, *others = names
    left = [name for name in others if (beside / name).exists()]
    if left and not (beside / first).exists():
        _move(beside, directory, left)


def _beside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.saving")


def _move(beside: Path, directory: Path, names: list[str]) -> None:
    for name in names:
        try:
            os.replace(beside / name, directory / name)
        except FileNotFoundError:
            if (beside / name).exists() or not (directory / name).exists():
                raise  # it is not that another process completes the change at the same time
        _flush(directory)
    with contextlib.suppress(FileNotFoundError):
        beside.rmdir()


def _flush(path: Path) -> None:
    """Have a file's bytes, or a directory's entries, on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
