from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, make_tokenizer

from entrenar.training.batches import IGNORED, Example
from entrenar.training.data import DataError, Message, Record
from entrenar.training.encode import encode

TOKENIZER = make_tokenizer()
turns = st.text(min_size=1, max_size=30).filter(str.strip)


def conversation(*contents: str, system: str | None = None) -> Record:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for index, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[index % 2], "content": content})
    return Record("data.jsonl:1", messages=tuple(messages))


def encode_one(record: Record, tokenizer: Any = TOKENIZER) -> Example:
    (example,) = encode([record], tokenizer).examples
    return example


def learned(example: Example, tokenizer: Any = TOKENIZER) -> str:
    return str(tokenizer.decode(example.labels[example.labels != IGNORED]))


def test_only_the_answer_and_its_end_are_learned() -> None:
    example = encode_one(conversation("What is up?", "The sky."))
    assert learned(example) == "The sky.<|im_end|>"
    kept = example.labels != IGNORED
    assert (example.labels[kept] == example.input_ids[kept]).all()


def test_the_prompt_is_what_generation_starts_from() -> None:
    record = conversation("What is up?", "The sky.", system="Be brief.")
    example = encode_one(record)
    prompt = TOKENIZER.apply_chat_template(list(record.messages[:2]), add_generation_prompt=True, return_dict=False)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert (example.labels[: len(prompt)] == IGNORED).all()
    assert example.labels[len(prompt)] != IGNORED


def test_every_answer_of_a_conversation_is_learned() -> None:
    example = encode_one(conversation("Up?", "Sky.", "Down?", "Earth."))
    assert learned(example) == "Sky.<|im_end|>Earth.<|im_end|>"


def test_what_follows_the_last_answer_is_left_out() -> None:
    example = encode_one(conversation("Up?", "Sky.", "And down?"))
    assert TOKENIZER.decode(example.input_ids).endswith("Sky.<|im_end|>")


@settings(max_examples=50)
@given(st.lists(st.tuples(turns, turns), min_size=1, max_size=3))
def test_labels_spell_the_answers(pairs: list[tuple[str, str]]) -> None:
    example = encode_one(conversation(*(turn for pair in pairs for turn in pair)))
    assert learned(example) == "".join(f"{answer}<|im_end|>" for _, answer in pairs)


def test_without_an_end_token_in_the_template_the_whole_answer_is_learned() -> None:
    plain = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = make_tokenizer(plain)
    example = encode_one(conversation("Up?", "Sky."), tokenizer)
    # The space before the answer and the answer's first letters may share a token; it belongs to the answer.
    assert learned(example, tokenizer).lstrip() == "Sky.\n"


def test_a_text_is_learned_from_its_first_token_to_the_end_of_sequence() -> None:
    example = encode_one(Record("book.txt", text="It is down."))
    assert learned(example) == "It is down.<|im_end|>"
    assert (example.labels == example.input_ids).all()


def test_a_long_text_becomes_consecutive_examples() -> None:
    text = "The opposite of up is down. " * 20
    examples = encode([Record("book.txt", text=text)], TOKENIZER, max_length=16).examples
    assert all(len(example.input_ids) == 16 for example in examples[:-1])
    assert "".join(TOKENIZER.decode(example.input_ids) for example in examples) == text + "<|im_end|>"


def test_long_conversations_are_cut_and_counted() -> None:
    short, long_answer = conversation("Up?", "Sky."), conversation("Up?", "Sky. " * 50)
    long_question = conversation("Up? " * 50, "Sky.")
    examples, truncated, dropped = encode([short, long_answer, long_question], TOKENIZER, max_length=40)
    assert (len(examples), truncated, dropped) == (2, 2, 1)
    assert len(examples[1].input_ids) == 40


def test_nothing_left_to_learn_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: no answer begins within max_length=8"):
        encode([conversation("Up? " * 50, "Sky.")], TOKENIZER, max_length=8)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "no chat template"),
        # A template that shows only the newest answer: what was learned would not be what is asked.
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}"),
            r"messages\[1\]",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[99].content.x }}", "refuses these messages"),
    ],
)
def test_a_template_that_cannot_serve_is_named(template: str | None, complaint: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{complaint}"):
        encode([conversation("Up?", "Sky.", "Down?", "Earth.")], make_tokenizer(template))
