"""Makes questions and answers about Python from the documentation that every Python carries.

    python examples/stdlib_qa.py FOLDER        writes FOLDER/train.jsonl and FOLDER/heldout.jsonl

A function or class of the standard library gives one question, answered by the first paragraph of its docstring; a
topic of `help()` gives one, answered by the first paragraph of its page. The side that a question falls on depends on
a hash of the last part of its name alone: it is the same on every version of Python, and `str.upper` and
`bytes.upper`, whose docstrings hardly differ, are never on different sides.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType

MODULES = """
    argparse array ast base64 bisect builtins calendar cmath cmd codecs collections colorsys concurrent.futures
    configparser contextlib contextvars copy csv dataclasses datetime decimal difflib dis email.message email.utils
    enum fileinput fnmatch fractions ftplib functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html
    http.client http.cookies imaplib inspect io ipaddress itertools json keyword linecache locale logging lzma
    mailbox math mimetypes numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint profile queue
    quopri random re reprlib sched secrets select selectors shelve shlex shutil signal smtplib socket socketserver
    sqlite3 stat statistics string struct subprocess symtable sys tarfile tempfile textwrap threading time timeit
    token tokenize trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.parse
    urllib.request uuid warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xmlrpc.client zipfile
    zlib
"""

TRAIN, HELDOUT = 960, 80
HELDOUT_SHARE = 0.15
SHORTEST, LONGEST = 30, 400  # characters of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description="questions and answers from Python's own documentation")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    train, heldout = split(sorted({*docstring_pairs(), *topic_pairs()}))
    for name, pairs in (("train", train[:TRAIN]), ("heldout", heldout[:HELDOUT])):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(map(as_line, pairs)), encoding="utf-8")
        print(f"{path}: {len(pairs)} questions")


def split(items: list[tuple[str, str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sort (name, question, answer) by the hash of the name and deal them out; an answer comes but once."""
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    answers = set()
    for name, question, answer in sorted(items, key=lambda item: (digest(item[0]), item)):
        if answer not in answers:
            answers.add(answer)
            held = digest(name.rpartition(".")[2].lower()) < HELDOUT_SHARE
            sides[held].append((question, answer))
    return sides


def digest(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12


def as_line(pair: tuple[str, str]) -> str:
    question, answer = pair
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def docstring_pairs() -> Iterator[tuple[str, str, str]]:
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # left out of some builds, as sqlite3 and lzma may be
            continue
        for name, thing in members(module):
            prefix = "" if module is importlib.import_module("builtins") else f"{module_name}."
            yield from pairs_of(f"{prefix}{name}", thing)
            if inspect.isclass(thing):
                for method_name, method in vars(thing).items():
                    if not method_name.startswith("_") and callable(method):
                        yield from pairs_of(f"{prefix}{name}.{method_name}", method)


def members(module: ModuleType) -> Iterator[tuple[str, object]]:
    """A module's own public functions and classes."""
    for name in getattr(module, "__all__", sorted(vars(module))):
        thing = getattr(module, name, None)
        own = getattr(thing, "__module__", None) in (module.__name__, f"_{module.__name__}", None)
        if not name.startswith("_") and callable(thing) and (own or hasattr(module, "__all__")):
            yield name, thing


def pairs_of(name: str, thing: object) -> Iterator[tuple[str, str, str]]:
    doc = getattr(thing, "__doc__", None)
    answer = first_paragraph(inspect.cleandoc(doc), name.rpartition(".")[2]) if isinstance(doc, str) else None
    if answer is not None:
        question = f"What is `{name}` in Python?" if inspect.isclass(thing) else f"What does `{name}` do in Python?"
        yield name, question, answer


def topic_pairs() -> Iterator[tuple[str, str, str]]:
    for name, page in topics.items():
        title, _, body = page.partition("\n***")
        answer = first_paragraph(body.lstrip("*\n"), name) if body else None
        if answer is not None:
            yield f"topic.{name}", f"Explain this topic of the Python language: {title.strip()}", answer


def first_paragraph(text: str, name: str) -> str | None:
    """The first paragraph of plain sentences that is not the signature of `name`; None if it is too short or long."""
    for paragraph in text.split("\n\n"):
        sentence = " ".join(paragraph.split())
        signature = re.match(rf"(\w+\.)*{re.escape(name)}\s*\(", sentence) is not None
        if paragraph[:1].isspace() or signature or not sentence.endswith((".", "!", ")", ":")):
            continue
        sentence = re.sub(r":$", ".", sentence)
        return sentence if SHORTEST <= len(sentence) <= LONGEST and sentence.isprintable() else None
    return None


if __name__ == "__main__":
    main()
