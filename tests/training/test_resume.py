from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tiny import CONFIG, STEPS, make_run_model, records
from safetensors.torch import save_file
from tiny import add_adapters, make_model, make_tokenizer

from entrenar.lora.wrap import wrap
from entrenar.optim.adamw import AdamW
from entrenar.training.encode import encode
from entrenar.training.folder import CHECKPOINT
from entrenar.training.loop import finetune
from entrenar.training.resume import ResumeError, RunState, fingerprint, load_checkpoint, save_checkpoint

PROGRAM = Path(__file__).with_name("run_tiny.py")
ROOT = PROGRAM.parents[2]


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), str(out), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process: subprocess.Popen[str], status: int) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return output


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(out), 0)
    return out


def test_a_run_stopped_by_ctrl_c_resumes_to_the_same_bytes(tmp_path: Path, uninterrupted: Path) -> None:
    process = start(tmp_path, "slow")
    wait_for_step(process, tmp_path, 7)
    process.send_signal(signal.SIGINT)
    output = finish(process, 130)
    done = steps_logged(tmp_path)[-1]
    assert 7 <= done < STEPS
    assert f"stopped after step {done} of {STEPS}; the run is saved in {tmp_path}" in output
    assert not (tmp_path / "adapter").exists()
    finish(start(tmp_path, "resume"), 0)
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted)
    assert steps_logged(tmp_path) == list(range(1, STEPS + 1))


def test_a_run_that_was_killed_resumes_to_the_same_bytes(tmp_path: Path, uninterrupted: Path) -> None:
    process = start(tmp_path, "slow")
    wait_for_step(process, tmp_path, 13)
    process.kill()
    finish(process, -signal.SIGKILL)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')
    finish(start(tmp_path, "resume"), 0)
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted)
    assert steps_logged(tmp_path) == list(range(1, STEPS + 1))
    reports = [json.loads((out / "report.json").read_text()) for out in (tmp_path, uninterrupted)]
    for key in ("heldout_loss_before", "heldout_loss_after", "samples", "tokens", "steps", "config"):
        assert reports[0][key] == reports[1][key]


def test_the_uninterrupted_run_equals_one_in_this_process(tmp_path: Path, uninterrupted: Path) -> None:
    """The order of data and dropout depends on the seed, not on what the process did before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.rand(100)
    tokenizer = make_tokenizer()
    train, heldout = encode(records(20), tokenizer).examples, encode(records(4, 100), tokenizer).examples
    finetune(make_run_model(), tokenizer, train, heldout, CONFIG, tmp_path)
    torch.set_num_threads(threads)
    assert adapter_bytes(tmp_path) == adapter_bytes(uninterrupted)


Run = tuple[torch.nn.Module, AdamW]


def make_run(seed: int = 0) -> Run:
    model = add_adapters(make_model(seed=seed))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return model, optimizer


FINGERPRINT: dict[str, Any] = {"lr": 0.01, "base model": "0123456789", "adapter a": [4, 8.0], "packed": False}


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    model, optimizer = make_run()
    state = RunState(step=3, tokens=50, seconds=1.25, heldout_losses={0: 2.5, 3: 2.0}, samples_before=[{"answer": "ü"}])
    save_checkpoint(path, model, optimizer, state, FINGERPRINT)
    drawn = torch.rand(5)
    other, other_optimizer = make_run(seed=1)
    assert load_checkpoint(path, other, other_optimizer, FINGERPRINT) == state
    assert torch.equal(torch.rand(5), drawn)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if mine.requires_grad:
            assert torch.equal(mine, theirs)
            saved, loaded = optimizer.state[mine], other_optimizer.state[theirs]
            assert saved.keys() == loaded.keys()
            assert all(torch.equal(saved[key], loaded[key]) and saved[key].dtype == loaded[key].dtype for key in saved)


def test_another_run_is_refused_and_the_differences_named(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    model, optimizer = make_run()
    save_checkpoint(path, model, optimizer, RunState(), FINGERPRINT)
    load_checkpoint(path, model, optimizer, {**FINGERPRINT, "fit": "mse"})  # one that was saved before fits were
    save_checkpoint(path, model, optimizer, RunState(), {**FINGERPRINT, "fit": "absmax"})
    changed = {"fit": "mse", "lr": 0.02, "base model": "9876543210", "adapter b": [4, 8.0], "packed": False}
    with pytest.raises(ResumeError) as caught:
        load_checkpoint(path, model, optimizer, changed)
    for difference in (
        "fit (absmax then, mse now)",
        "lr (0.01 then, 0.02 now)",
        "base model (01234567 then, 98765432 now)",
        "adapter a ([4, 8.0] then, absent now)",
        "adapter b (absent then, [4, 8.0] now)",
    ):
        assert difference in str(caught.value)


def test_a_checkpoint_from_before_examples_were_packed_is_one_of_padded_batches(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    model, optimizer = make_run()
    older = {name: value for name, value in FINGERPRINT.items() if name != "packed"}
    save_checkpoint(path, model, optimizer, RunState(), older)
    load_checkpoint(path, model, optimizer, FINGERPRINT)
    with pytest.raises(ResumeError, match=r"packed \(False then, True now\)"):
        load_checkpoint(path, model, optimizer, {**FINGERPRINT, "packed": True})


def test_a_base_of_another_fit_is_another_run() -> None:
    train, heldout = (encode(records(*size), make_tokenizer()).examples for size in ((3,), (2, 100)))
    found = []
    for fit in ("absmax", "mse", "mse"):
        model = make_model()
        wrap(model, fit=fit)
        found.append(fingerprint(model, train, heldout, {}))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == ["fit", "base model"]
    assert [each["fit"] for each in found] == ["absmax", "mse", "mse"]
    assert found[1] == found[2]


def test_rounded_activations_are_another_run() -> None:
    train, heldout = (encode(records(*size), make_tokenizer()).examples for size in ((3,), (2, 100)))
    found = []
    for activations in (None, "int8"):
        torch.manual_seed(0)
        model = make_model()
        wrap(model, activations=activations)
        found.append(fingerprint(model, train, heldout, {}))
    assert [(name, found[1][name]) for name in found[0] if found[0][name] != found[1][name]] == [
        ("activations", "int8")
    ]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    model, optimizer = make_run()
    path = tmp_path / CHECKPOINT
    with pytest.raises(ResumeError, match="no checkpoint to resume from"):
        load_checkpoint(path, model, optimizer, FINGERPRINT)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ResumeError, match="not a readable checkpoint"):
        load_checkpoint(path, model, optimizer, FINGERPRINT)
    save_checkpoint(path, model, optimizer, RunState(), FINGERPRINT)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ResumeError, match="not a readable checkpoint"):
        load_checkpoint(path, model, optimizer, FINGERPRINT)


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond 4 KiB: a write fails halfway, as on a full disk.

    Not a fixture, which would still hold when pytest writes its report into a file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / CHECKPOINT
    model, optimizer = make_run()
    save_checkpoint(path, model, optimizer, RunState(step=5), FINGERPRINT)
    before = path.read_bytes()
    expected = r"checkpoint of step 10 .*; the previous checkpoint there is intact"
    with full_disk(), pytest.raises(OSError, match=expected):
        save_checkpoint(path, model, optimizer, RunState(step=10), FINGERPRINT)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [CHECKPOINT]
