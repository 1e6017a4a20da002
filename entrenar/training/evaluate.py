"""What a model knows of the held-out data: its loss, and a few sample answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from entrenar.training.batches import IGNORED, Example, collate
from entrenar.training.generate import generate
from entrenar.training.loss import causal_lm_loss

SAMPLES = 3
SAMPLE_TOKENS = 48


def heldout_loss(model: nn.Module, examples: Sequence[Example], batch_size: int) -> float:
    """Return the mean cross-entropy in nats over all labelled tokens of `examples`, in evaluation mode."""
    device = next(model.parameters()).device
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    training = model.training
    model.eval()
    total, targets = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                input_ids, labels = collate(batch)
                count = sum(example.targets for example in batch)
                total += causal_lm_loss(model, input_ids.to(device), labels.to(device)).item() * count
                targets += count
    finally:
        model.train(training)
    return total / targets


def sample_answers(model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> list[dict[str, str]]:
    """Return a few `{"prompt", "wanted", "answer"}`, greedy and short, for examples spread evenly over the list."""
    chosen = [examples[i * len(examples) // SAMPLES] for i in range(min(SAMPLES, len(examples)))]
    return [_sample(model, tokenizer, example) for example in chosen]


def _sample(model: nn.Module, tokenizer: Any, example: Example) -> dict[str, str]:
    unlabelled = int((example.labels != IGNORED).int().argmax())
    # A text carries labels from its first token on; its first half, if short, serves as the prompt.
    cut = unlabelled or min(32, len(example.input_ids) // 2)
    prompt = example.input_ids[:cut]
    wanted = example.labels[cut : cut + SAMPLE_TOKENS]
    return {
        "prompt": example.question or tokenizer.decode(prompt, skip_special_tokens=True),
        "wanted": tokenizer.decode(wanted[wanted != IGNORED], skip_special_tokens=True).strip(),
        "answer": generate(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS),
    }
