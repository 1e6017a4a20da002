"""The folder of a run: what may be in it, and that one run at a time writes there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from entrenar.training.resume import ResumeError, require_checkpoint

CHECKPOINT = "checkpoint.safetensors"
REPORT = "report.json"


def check_folder(out: Path, resume: bool) -> None:
    """Raise ResumeError where a run cannot begin, or be resumed, in `out`; NotADirectoryError where that is a file."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; a run needs a folder")
    if (out / REPORT).exists():
        raise ResumeError(f"the run in {out} is finished; choose another folder, or delete this one to start over")
    if not resume and (out / CHECKPOINT).exists():
        raise ResumeError(f"{out} holds an unfinished run; resume it, or delete the folder to start over")
    if resume:
        require_checkpoint(out / CHECKPOINT)


@contextmanager
def only_run_in(out: Path) -> Iterator[None]:
    """Keep other runs from `out`, until this one ends or is killed. Raises ResumeError where another one is there."""
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise ResumeError(f"another run is writing to {out}; wait for its end, or choose another folder") from None
    try:
        yield
    finally:
        os.close(folder)
