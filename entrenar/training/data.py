"""Training data as people write it: JSONL conversations, prompts and completions, texts, or a plain text file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
FORMS = '"messages", "prompt" and "completion", or "text"'


class DataError(ValueError):
    """The training data cannot be used; the message names the file and the line."""


@dataclass(frozen=True)
class Record:
    """One line of data: a conversation (`messages`) or a text, and `where` it stands (`train.jsonl:12`)."""

    where: str
    messages: tuple[Message, ...] = ()
    text: str = ""


def read_records(path: str | Path) -> list[Record]:
    """Read a `.jsonl` file, one record a line, or a `.txt` or `.md` file, which is one text.

    A JSONL line is an object with `messages` (a list of `{"role": ..., "content": ...}`), or `prompt` and
    `completion` (one user message and one answer), or `text`; the first of these that it has counts, other keys are
    ignored, and blank lines are skipped. Raises DataError naming file and line for anything else, OSError for a file
    that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        lines = enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        records = [_parse_line(f"{path}:{number}", line) for number, line in lines if line.strip()]
    elif path.suffix in (".txt", ".md"):
        text = _decode(str(path), path.read_bytes())
        records = [Record(str(path), text=text)] if text.strip() else []
    else:
        raise DataError(f"{path}: unknown kind of data file; name it .jsonl (one JSON object a line), .txt or .md")
    if not records:
        raise DataError(f"{path}: the file is empty; it needs at least one example")
    return records


def _decode(where: str, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from error


def _parse_line(where: str, line: bytes) -> Record:
    text = _decode(where, line)
    try:
        item = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets in thousands of others
        raise DataError(f"{where}: JSON that cannot be read ({error})") from error
    if not isinstance(item, dict):
        raise DataError(f"{where}: a line must be a JSON object with {FORMS}, not {_kind(item)}")
    if "messages" in item:
        return Record(where, messages=_check_messages(where, item["messages"]))
    if "prompt" in item or "completion" in item:
        prompt, completion = (_check_string(where, key, item.get(key)) for key in ("prompt", "completion"))
        return Record(
            where, messages=({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        )
    if "text" in item:
        return Record(where, text=_check_string(where, "text", item["text"]))
    found = ", ".join(json.dumps(key) for key in item) or "none"
    raise DataError(f"{where}: a line needs {FORMS}; its keys are: {found}")


def _check_messages(where: str, messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{where}: "messages" must be a list of at least one message, not {_kind(messages)}')
    checked: list[Message] = []
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f'{where}: {name} must be an object with "role" and "content", not {_kind(message)}')
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f"{where}: {name}.role must be one of {', '.join(ROLES)}, not {json.dumps(role)}")
        if role == "assistant" and not any(earlier["role"] == "user" for earlier in checked):
            raise DataError(f"{where}: {name} is an answer, but no user message comes before it")
        checked.append({"role": role, "content": _check_string(where, f"{name}.content", message.get("content"))})
    if not any(message["role"] == "assistant" for message in checked):
        raise DataError(f'{where}: no message has the role "assistant", so there is no answer to learn')
    return tuple(checked)


def _check_string(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} must be a string, not {_kind(value)}")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: {name} has half of a surrogate pair, which is no character")
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "an empty list" if value == [] else names[type(value)]
