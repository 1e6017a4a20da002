"""A program for the tests to interrupt: fine-tunes the tiny model as `python run_tiny.py OUT [resume] [slow]`."""

from __future__ import annotations

import sys
import time

import torch
from tiny import add_adapters, make_model, make_tokenizer
from torch import nn

from entrenar.lora.layers import LoRALayer
from entrenar.training.config import FinetuneConfig
from entrenar.training.data import Record
from entrenar.training.encode import encode
from entrenar.training.interrupt import Interrupted
from entrenar.training.loop import finetune
from entrenar.training.metrics import StepMetrics
from entrenar.training.watcher import Nobody

STEPS = 24
CONFIG = FinetuneConfig(max_steps=STEPS, batch_size=3, accumulation=2, lr=1e-2, weight_decay=0.01, checkpoint_every=5)


def records(count: int, first: int = 0) -> list[Record]:
    return [
        Record(
            f"made:{n}",
            messages=(
                {"role": "user", "content": f"Count from {n} to {n + n % 7}."},
                {"role": "assistant", "content": " ".join(str(i) for i in range(n, n + n % 7 + 1))},
            ),
        )
        for n in range(first, first + count)
    ]


def make_run_model() -> nn.Module:
    """The tiny model in 4 bits, with dropout in its second layer: the first takes the path without."""
    model = add_adapters(make_model(), dropout=0.1, bits=4)
    for module in model.model.layers[0].modules():
        if isinstance(module, LoRALayer):
            module.dropout.p = 0.0
    return model


class Slow(Nobody):
    """Leaves a signal time to arrive between two steps."""

    def step(self, row: StepMetrics, total_steps: int) -> None:
        time.sleep(0.05)


def main(out: str, *words: str) -> None:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_run_model()
    train, heldout = (encode(records(*size), tokenizer).examples for size in ((20,), (4, 100)))
    watcher = Slow() if "slow" in words else Nobody()
    try:
        finetune(model, tokenizer, train, heldout, CONFIG, out, resume="resume" in words, watcher=watcher)
    except Interrupted as stop:
        print(stop)
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
