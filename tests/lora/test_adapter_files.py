"""Saving never loses what was there: every failing write, and a kill at every step."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from entrenar.lora.adapter import files, load_adapter, save_adapter
from entrenar.lora.layers import LoRALayer


def adapted(seed: int, width: int = 256) -> nn.Module:
    torch.manual_seed(seed)
    layers = [LoRALayer(nn.Linear(width, width, bias=False), rank=8, alpha=16) for _ in range(2)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(*layers)


def same_adapter(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x.lora_A, y.lora_A) and torch.equal(x.lora_B, y.lora_B) for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def disk_full_after(size: int):
    """Writes beyond `size` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_model_adapter_survives_a_full_disk(tmp_path):
    old, new, read = adapted(0), adapted(1), adapted(2)
    save_adapter(old, tmp_path / "adapter")
    with disk_full_after(4096), pytest.raises(OSError, match=r"cannot write .*too large") as error:
        save_adapter(new, tmp_path / "adapter")
    assert error.value.errno == errno.EFBIG
    assert names(tmp_path / "adapter") == ["adapter_config.json", "adapter_model.safetensors"]
    assert same_adapter(load_adapter(read, tmp_path / "adapter"), old)
    with disk_full_after(4096), pytest.raises(OSError, match=r"cannot write .*too large"):
        save_adapter(new, tmp_path / "first")
    assert names(tmp_path) == ["adapter"]


def test_layer_file_survives_a_full_disk(tmp_path):
    old, new = adapted(0)[0], adapted(1)[0]
    save_adapter(old, tmp_path / "adapter.json")
    before = (tmp_path / "adapter.json").read_bytes()
    with disk_full_after(4096), pytest.raises(OSError, match="too large"):
        save_adapter(new, tmp_path / "adapter.json")
    assert names(tmp_path) == ["adapter.json"]
    assert (tmp_path / "adapter.json").read_bytes() == before


def test_other_files_in_the_directory_stay(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("mine")
    save_adapter(adapted(0), tmp_path / "adapter")
    assert names(tmp_path / "adapter") == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"
    assert names(tmp_path) == ["adapter"]


def test_missing_parents_are_made(tmp_path):
    model = adapted(0)
    save_adapter(model, tmp_path / "runs" / "1" / "adapter")
    assert same_adapter(load_adapter(adapted(1), tmp_path / "runs" / "1" / "adapter"), model)
    save_adapter(model[0], tmp_path / "layers" / "1" / "adapter.json")
    assert names(tmp_path / "layers" / "1") == ["adapter.json"]


def test_the_error_is_that_of_the_write(tmp_path):
    def fail(path: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_file(tmp_path / "adapter.json", fail)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_adapter(adapted(0), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"


# Saves over an older pair of files, and dies at the n-th operation on the file system.
KILLED = """
import importlib.util, os, sys
source, directory, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
spec = importlib.util.spec_from_file_location("files", source)
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
from pathlib import Path

def hook(event, args):
    global n
    if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and "adapter" in str(args[0]):
        n -= 1
        if n < 0:
            os._exit(9)

write = lambda path: path.write_text("new")
sys.addaudithook(hook)
files.write_directory(Path(directory), {"weights": write, "config": write})
"""


@pytest.mark.parametrize("exists", [True, False])
def test_killed_anywhere_it_is_the_old_adapter_or_the_new_one(tmp_path, exists):
    outcomes = []
    for n in range(100):
        directory = tmp_path / str(n) / "adapter"
        directory.parent.mkdir()
        if exists:
            directory.mkdir()
            (directory / "weights").write_text("old")
            (directory / "config").write_text("old")
        result = subprocess.run([sys.executable, "-c", KILLED, files.__file__, directory, str(n)], check=False)
        files.finish_writing(directory, ["weights", "config"])
        assert {*names(directory.parent)} <= {"adapter", ".adapter.saving"}
        if directory.exists():
            weights, config = (directory / "weights").read_text(), (directory / "config").read_text()
            assert weights == config
            outcomes.append(weights)
        else:
            outcomes.append(None)
        files.write_directory(
            directory, {name: lambda path: path.write_text("newer") for name in ("weights", "config")}
        )
        assert names(directory.parent) == ["adapter"]
        assert {path.read_text() for path in directory.iterdir()} == {"newer"}
        if result.returncode == 0:
            break
        assert result.returncode == 9
    assert n > 5
    first = "old" if exists else None
    decided = outcomes.index("new")
    assert outcomes == [first] * decided + ["new"] * (len(outcomes) - decided)


def test_a_save_finishes_the_one_that_was_killed(tmp_path):
    """Killed between the two renames, then a second save fails: the first one's pair must be whole."""
    directory = tmp_path / "adapter"
    staged = directory / files.STAGED
    staged.mkdir(parents=True)
    (directory / "weights").write_text("new")
    (directory / "config").write_text("old")
    (staged / "config").write_text("new")

    def fail(path: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        files.write_directory(directory, {"weights": fail, "config": fail})
    assert (directory / "config").read_text() == "new"
    assert names(directory) == ["config", "weights"]


@pytest.mark.parametrize("exists", [True, False])
def test_who_reads_meanwhile_disturbs_nothing(tmp_path, exists, monkeypatch):
    """Before, between and after all steps of the writer; what it has decided a reader may complete."""
    directory = tmp_path / "adapter"
    if exists:
        files.write_directory(directory, {name: lambda path: path.write_text("old") for name in ("weights", "config")})

    def read(*_: object) -> None:
        files.finish_writing(directory, ["weights", "config"])
        if directory.exists():
            assert len({(directory / name).read_text() for name in ("weights", "config")}) == 1

    def write(path: Path) -> None:
        read()
        path.write_text("new")
        read()

    flush = files._flush
    monkeypatch.setattr(files, "_flush", lambda path: (read(), flush(path), read()))
    files.write_directory(directory, {"weights": write, "config": write})
    assert names(tmp_path) == ["adapter"]
    assert {path.read_text() for path in directory.iterdir()} == {"new"}


def test_files_are_staged_on_the_disk_of_the_directory(tmp_path):
    """A link can point to another disk, and a mount point lies on another one than its parent."""
    other = tmp_path / "disk"
    (other / "adapter").mkdir(parents=True)
    (tmp_path / "link").symlink_to(other / "adapter")

    def write(path: Path) -> None:
        assert path.parent.parent.samefile(other / "adapter")
        assert names(tmp_path) == ["disk", "link"]
        path.write_text("new")

    files.write_directory(tmp_path / "link", {"weights": write, "config": write})
    assert names(other) == ["adapter"]
    assert names(other / "adapter") == ["config", "weights"]


def test_a_link_to_a_directory_that_is_still_missing_stays_one(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "adapter")
    save_adapter(model := adapted(0), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert same_adapter(load_adapter(adapted(1), tmp_path / "disk" / "adapter"), model)


def test_a_discarded_change_is_never_completed(tmp_path, monkeypatch):
    """A write fails after the first file; a reader looks while the rest is removed."""
    directory = tmp_path / "adapter"
    files.write_directory(directory, {name: lambda path: path.write_text("old") for name in ("weights", "config")})

    def fail(path: Path) -> None:
        path.write_text("ne")
        raise OSError("no space left on device")

    def reading(remove: Callable[..., None]) -> Callable[..., None]:
        def removed(*arguments: object, **options: object) -> None:
            remove(*arguments, **options)
            files.finish_writing(directory, ["weights", "config"])

        return removed

    monkeypatch.setattr(os, "unlink", reading(os.unlink))
    with pytest.raises(OSError, match="no space"):
        files.write_directory(directory, {"weights": lambda path: path.write_text("new"), "config": fail})
    assert names(directory) == ["config", "weights"]
    assert {path.read_text() for path in directory.iterdir()} == {"old"}


def test_a_directory_that_vanishes_is_no_success(tmp_path):
    directory = tmp_path / "adapter"
    directory.mkdir()

    def write(path: Path) -> None:
        path.write_text("new")
        if path.name == "config":
            shutil.rmtree(directory)

    with pytest.raises(FileNotFoundError):
        files._move(tmp_path / "nowhere", directory, ["weights"])
    with pytest.raises(FileNotFoundError):
        files.write_directory(directory, {"weights": write, "config": write})
    assert names(tmp_path) == []
