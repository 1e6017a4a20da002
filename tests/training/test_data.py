from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.training.data import DataError, read_records

QUESTION = {"role": "user", "content": "What is up?"}
ANSWER = {"role": "assistant", "content": "The sky."}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def test_the_three_forms_of_a_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl",
        {"messages": [QUESTION, ANSWER], "id": 7},
        "",
        {"prompt": "What is up?", "completion": "The sky."},
        {"text": "Grün ist die Hoffnung."},
    )
    first, second, third = read_records(path)
    assert first.messages == second.messages == (QUESTION, ANSWER)
    assert third.messages == ()
    assert third.text == "Grün ist die Hoffnung."
    assert [record.where for record in (first, second, third)] == [f"{path}:1", f"{path}:3", f"{path}:4"]


def test_a_text_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("One.\n\nTwo.\n", "utf-8")
    (record,) = read_records(path)
    assert record.text == "One.\n\nTwo.\n"


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [record.text for record in read_records(path)] == ["a", "b"]


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", '{"text": "one\u2028two"}')
    assert read_records(path)[0].text == "one\u2028two"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "not valid JSON"),
        ("[1, 2]", "must be a JSON object"),
        ({"question": "?"}, 'its keys are: "question"'),
        ({"messages": []}, "an empty list"),
        ({"messages": "hello"}, "a string"),
        ({"messages": [1]}, r"messages\[0\] must be an object"),
        ({"messages": [QUESTION, {"role": "bot", "content": "x"}]}, r'messages\[1\].role .* not "bot"'),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, r"messages\[1\].content must be a string"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " "}]}, r"messages\[1\].content is empty"),
        ({"messages": [ANSWER]}, "no user message comes before"),
        ({"messages": [QUESTION]}, "no answer to learn"),
        ({"prompt": "x"}, "completion must be a string, not missing"),
        ({"prompt": 3, "completion": "x"}, "prompt must be a string, not a number"),
        ({"text": True}, "text must be a string, not a boolean"),
        ({"text": ""}, "text is empty"),
        ({"text": "\ud800"}, "text has half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, complaint: str) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "fine"}, line)
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{complaint}"):
        read_records(path)


@pytest.mark.parametrize("line", ['{"text": ' + "1" * 5000 + "}", "[" * 100_000], ids=["digits", "brackets"])
def test_json_beyond_what_python_reads_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"data\.jsonl:2: JSON that cannot be read"):
        read_records(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl:2: not UTF-8"):
        read_records(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt"])
def test_an_empty_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n \n")
    with pytest.raises(DataError, match=rf"{name}: the file is empty"):
        read_records(tmp_path / name)


def test_an_unknown_kind_of_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"data\.csv: unknown kind"):
        read_records(tmp_path / "data.csv")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["messages", "role", "content", "text"]), inner),
    max_leaves=6,
)


@given(json_values)
def test_any_json_is_read_or_refused_with_its_place(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = write(tmp_path_factory.mktemp("any") / "data.jsonl", json.dumps(value))
    try:
        (record,) = read_records(path)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ")  # noqa: PT017 (one outcome of two)
    else:
        assert record.messages or record.text.strip()
