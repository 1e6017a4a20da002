from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_tiny import records
from tiny import make_model, make_tokenizer

from entrenar import Int4Linear, cli, load_pretrained
from entrenar.lora.layers import common_fit
from entrenar.training.evaluate import SAMPLE_TOKENS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny chat"
    make_model(hidden=64, tied=True).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": record.messages}) + "\n" for record in records(24)))
    return path


def entrenar(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "entrenar", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    return output, errors


def run_here(monkeypatch: pytest.MonkeyPatch, *words: object) -> object:
    """Run the program within this process, whose allocator it leaves alone; return its exit status."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["entrenar", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


def test_finetune_then_generate(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ("--model", checkpoint, "--data", data, "--out", out, "--lr", "2e-2", "--epochs", 3, "--rank", 4)
    output, _ = result(entrenar("finetune", *arguments))
    assert "23 examples to train on, 1 held out" in output
    assert "step 9/9" in output
    assert re.search(r"loss [\d.]+  lr [\d.e-]+  \d+ tokens/s  ETA 0:00  peak [\d.]+ GiB", output)
    for step in (3, 5, 7, 9):
        assert re.search(rf"held-out loss after {step} of 9 steps: [\d.]+", output)
    report = json.loads((out / "report.json").read_text())
    assert f"held-out loss {report['heldout_loss_before']:.4f} -> {report['heldout_loss_after']:.4f}" in output
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["r"] == 4

    (sample,) = report["samples"]
    assert sample["before"] != sample["after"]
    ask = ("generate", "--model", checkpoint, "--max-tokens", SAMPLE_TOKENS, sample["prompt"])
    for words, answer in ((ask, sample["before"]), ((*ask, "--adapter", out / "adapter"), sample["after"])):
        assert run_here(monkeypatch, *words) == 0
        assert capsys.readouterr().out.strip() == answer


def test_cut_conversations_are_counted(checkpoint: Path, tmp_path: Path, data: Path) -> None:
    path = tmp_path / "long.jsonl"
    long = {"prompt": "Up? " * 50, "completion": "Sky."}
    path.write_text(data.read_text() + json.dumps(long) + "\n")
    words = ("--model", checkpoint, "--data", path, "--heldout", data, "--out", tmp_path / "run", "--max-steps", 1)
    output, _ = result(entrenar("finetune", *words, "--max-length", 100))
    assert f"{path}: cut 1 conversations at 100 tokens, and left out 1 of them" in output
    assert "24 examples to train on, 24 held out" in output


def test_ctrl_c_says_how_to_go_on(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = entrenar("finetune", "--model", checkpoint, "--data", data, "--out", out, "--max-steps", 100_000)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = result(process, 130)
    assert f"the run is saved in {out}" in errors
    assert re.search(r"to go on: entrenar finetune --model '.*tiny chat' .* --max-steps 100000 --resume", errors)
    assert "Traceback" not in errors
    assert (out / "checkpoint.safetensors").exists()


def test_the_fit_reaches_the_model(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scales = {}
    for command, words in {
        "finetune": ("finetune", "--model", checkpoint, "--data", data, "--out", tmp_path / "run"),
        "generate": ("generate", "--model", checkpoint, "Hello?"),
    }.items():
        for fit in ("default", "absmax", "mse"):
            seen = []
            monkeypatch.setattr(cli, command, lambda network, *_, seen=seen, **__: seen.append(network))
            monkeypatch.setattr(cli, "describe_report", lambda *_: "")
            assert run_here(monkeypatch, *words, *(() if fit == "default" else ("--fit", fit))) == 0
            (network,) = seen
            packed = [module for module in network.modules() if isinstance(module, Int4Linear)]
            scales[command, fit] = torch.cat([layer.scales.flatten() for layer in packed])
    expected = {fit: load_pretrained(checkpoint, fit=fit) for fit in ("absmax", "mse")}
    for (_, fit), found in scales.items():
        model = expected["absmax" if fit == "default" else fit]
        packed = [module for module in model.modules() if isinstance(module, Int4Linear)]
        assert torch.equal(found, torch.cat([layer.scales.flatten() for layer in packed]))
    assert not torch.equal(scales["finetune", "absmax"], scales["finetune", "mse"])

    assert run_here(monkeypatch, "generate", "--model", checkpoint, "Hello?", "--fit", "nf4") == 2
    errors = capsys.readouterr().err
    assert "'absmax'" in errors
    assert "'mse'" in errors


def test_generate_takes_the_fit_of_the_adapter(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ("finetune", "--model", checkpoint, "--data", data, "--out", out, "--max-steps", 1, "--fit", "mse")
    assert run_here(monkeypatch, *words) == 0
    assert json.loads((out / "report.json").read_text())["fit"] == "mse"
    seen = []
    monkeypatch.setattr(cli, "generate", lambda network, *_, **__: seen.append(common_fit(network)))
    ask = ("generate", "--model", checkpoint, "--adapter", out / "adapter", "Hello?")
    assert run_here(monkeypatch, *ask) == run_here(monkeypatch, *ask, "--fit", "mse") == 0
    assert seen == ["mse", "mse"]
    errors = complaint(monkeypatch, capsys, *ask, "--fit", "absmax")
    assert f"{out / 'adapter'} was trained on 4-bit weights of fit 'mse', and the model's are of fit 'absmax'" in errors


def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the program says of a mistake."""
    assert run_here(monkeypatch, *words) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("entrenar: ")
    assert errors.count("\n") == 1
    return errors


@pytest.mark.parametrize(
    ("line", "wrong"), [("{}", "a line needs"), ("", "the file is empty"), ('{"text": 1}', "text must be a string")]
)
def test_bad_data_is_one_line(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    line: str,
    wrong: str,
) -> None:
    path, out = tmp_path / "bad.jsonl", tmp_path / "run"
    path.write_text(line)
    words = ("finetune", "--model", checkpoint, "--data", path, "--out", out)
    errors = complaint(monkeypatch, capsys, *words)
    assert errors.startswith(f"entrenar: {path}")
    assert wrong in errors
    assert not out.exists()


def test_what_is_missing_is_one_line(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere, out = tmp_path / "nowhere", tmp_path / "run"
    run = ("finetune", "--out", out, "--data")
    for words in (
        (*run, data, "--model", nowhere),
        (*run, nowhere.with_suffix(".jsonl"), "--model", checkpoint),
        ("generate", "--model", checkpoint, "--adapter", nowhere, "Hello?"),
    ):
        assert "nowhere" in complaint(monkeypatch, capsys, *words)
    assert "holds no checkpoint" in complaint(monkeypatch, capsys, *run, data, "--model", checkpoint, "--resume")
    words = (*run, data, "--model", checkpoint, "--device", "cuda:99")
    assert "there is no device 'cuda:99'" in complaint(monkeypatch, capsys, *words)
    assert "lr must be a positive number" in complaint(
        monkeypatch, capsys, *run, data, "--model", checkpoint, "--lr", 0
    )


def test_mistakes_show_before_anything_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("finetune", "--data", data, "--model", tmp_path / "nowhere")
    finished, file = tmp_path / "finished", tmp_path / "file"
    finished.mkdir()
    (finished / "report.json").write_text("{}")
    file.write_text("")
    for words, message in (
        (("--out", finished), "is finished; choose another folder"),
        (("--out", file), "is a file; a run needs a folder"),
        (("--out", tmp_path / "new", "--resume"), "holds no checkpoint to resume from"),
        (("--out", tmp_path / "new", "--rank", 0), "rank must be at least 1"),
        (("--out", tmp_path / "new", "--dropout", 1), "dropout must be in [0, 1)"),
        (("--out", tmp_path / "new", "--clip-norm", 0), "clip_norm must be greater than 0"),
    ):
        assert message in complaint(monkeypatch, capsys, *run, *words)
    assert not (tmp_path / "new").exists()
