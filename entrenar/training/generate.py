"""Answers from a model: greedy generation, whole or word by word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    """Return a prompt's token ids, int64 [T]: one user message in the chat template, or the bare text without one."""
    if tokenizer.chat_template is None:
        return torch.tensor(tokenizer(prompt)["input_ids"], device="cpu")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], device="cpu")


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Tensor,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Return the model's greedy answer to `prompt`, a user's message or token ids (int64 [T]), as text.

    `on_text` gets the answer piece by piece as it is generated. The model stays in the mode (train or eval) that it
    was in. Raises ValueError for an empty prompt.
    """
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if not len(ids):
        raise ValueError("the prompt is empty")
    ids = ids.to(next(model.parameters()).device).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        # The sampling settings that many models ship mean nothing to greedy search, which warns about them.
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=None if on_text is None else _streamer(tokenizer, on_text),
        )
    finally:
        model.train(training)
    answer: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
