"""From records to token ids and labels, through the model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from entrenar.training.batches import IGNORED, Example
from entrenar.training.data import DataError, Message, Record


class Encoded(NamedTuple):
    """`examples`, how many conversations were `truncated` to the maximum length, and how many of those `dropped`
    because no token of an answer was left.
    """

    examples: list[Example]
    truncated: int
    dropped: int


def encode(records: Sequence[Record], tokenizer: Any, max_length: int = 1024) -> Encoded:
    """Tokenize records into examples of at most `max_length` tokens.

    A conversation becomes one example, rendered by the tokenizer's chat template; its labels are the assistant's
    answers with their end-of-turn tokens, all else is ignored; what exceeds `max_length` is cut off and counted. A
    text carries loss on every token; the end-of-sequence token closes it, and a long one is cut into consecutive
    examples. Raises DataError naming the record that cannot be encoded.
    """
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, not {max_length}")
    examples: list[Example] = []
    truncated = dropped = 0
    for record in records:
        if not record.messages:
            examples += _encode_text(record, tokenizer, max_length)
            continue
        example = _encode_conversation(record, tokenizer)
        if len(example.input_ids) > max_length:
            truncated += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length], example.question)
        if example.targets:
            examples.append(example)
        else:
            dropped += 1
    if not examples:
        raise DataError(
            f"{records[0].where if records else 'the data'}: no answer begins within max_length={max_length} tokens, "
            "so there is nothing to learn; raise max_length"
        )
    return Encoded(examples, truncated, dropped)


def _encode_text(record: Record, tokenizer: Any, max_length: int) -> list[Example]:
    # The windows are cut here, so the tokenizer's warning about its model's length would only mislead.
    ids = tokenizer(record.text, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    windows = [torch.tensor(ids[start : start + max_length], device="cpu") for start in range(0, len(ids), max_length)]
    return [Example(window, window.clone()) for window in windows if len(window) > 1]


def _encode_conversation(record: Record, tokenizer: Any) -> Example:
    text, answers = _render(record, tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoding["input_ids"]
    special = set(tokenizer.all_special_ids)
    labels = [IGNORED] * len(ids)
    for begin, end in answers:
        answer = [i for i, (left, right) in enumerate(encoding["offset_mapping"]) if left < end and right > begin]
        # Generation stops at the end-of-turn token; a line break that the template puts behind it is never asked for.
        closing = [i for i in answer if ids[i] in special]
        for i in answer:
            if not closing or i <= closing[-1]:
                labels[i] = ids[i]
    length = max((i + 1 for i, label in enumerate(labels) if label != IGNORED), default=0)
    if length < 2:
        raise DataError(f"{record.where}: the answer has no token to learn")
    first = [message["role"] for message in record.messages].index("assistant")
    question = record.messages[first - 1]["content"]
    return Example(torch.tensor(ids[:length], device="cpu"), torch.tensor(labels[:length], device="cpu"), question)


def _render(record: Record, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return its text and each answer's span of characters."""
    messages = list(record.messages)
    text = _apply_template(record, tokenizer, messages, add_generation_prompt=False)
    answers = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply_template(record, tokenizer, messages[:index], add_generation_prompt=True)
        answered = _apply_template(record, tokenizer, messages[: index + 1], add_generation_prompt=False)
        if not answered.startswith(prompt) or not text.startswith(answered):
            raise DataError(
                f"{record.where}: the model's chat template renders messages[{index}] differently as the conversation "
                'goes on, so its tokens cannot be told apart; give such data as rendered "text"'
            )
        answers.append((len(prompt), len(answered)))
    return text, answers


def _apply_template(record: Record, tokenizer: Any, messages: list[Message], *, add_generation_prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise DataError(f'{record.where}: this model has no chat template for messages; give lines with "text" instead')
    if not tokenizer.is_fast:
        raise DataError(f"{record.where}: {type(tokenizer).__name__} does not tell where its tokens stand in the text")
    from jinja2 import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise DataError(f"{record.where}: the model's chat template refuses these messages: {error}") from error
    return str(rendered)
