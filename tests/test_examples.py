"""The examples run as they stand."""

from __future__ import annotations

import json
import pathlib
import runpy

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def load(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / name))


def test_lora_layer(tmp_path, capsys):
    load("lora_layer.py")["main"](str(tmp_path / "adapter.json"))
    assert json.loads((tmp_path / "adapter.json").read_text())["rank"] == 16
    assert "trainable: 8,192 of 73,728" in capsys.readouterr().out


def test_qlora_layer(capsys):
    load("qlora_layer.py")["main"]()
    # 4.25 bits against 32, and the error of the format on Gaussian weights.
    assert "86.7% less" in (printed := capsys.readouterr().out)
    assert 0.10 < float(printed.rpartition(":")[2].strip(" %\n")) / 100 < 0.115


def test_workflow(tmp_path):
    losses = load("workflow.py")["main"](str(tmp_path / "adapter.json"))
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "adapter.json").exists()


def test_linear_regression():
    slope, intercept = load("linear_regression.py")["main"]()
    # 200 points with noise 0.1: a standard error of 0.007.
    assert abs(slope - 3) < 0.03
    assert abs(intercept + 2) < 0.03


def test_digits():
    assert load("digits.py")["main"]() > 0.9


def test_schedules(tmp_path):
    load("schedules.py")["main"](str(tmp_path / "schedules.png"))
    assert (tmp_path / "schedules.png").stat().st_size > 1000


def test_tape(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    load("tape.py")["main"]()
    printed = capsys.readouterr().out
    assert "int4_lora_linear" in printed
    assert "NaN or infinity: nowhere" in printed
    assert " operations checked, 0 wrong" in printed
