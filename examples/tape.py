"""What a pretrained model computes: its operations, their time and memory, and a check of every gradient.

python examples/tape.py
"""

from __future__ import annotations

import time

import torch
from smollm2 import gguf_path

from entrenar import Tape, load_pretrained, load_tokenizer, wrap


def main() -> None:
    path = gguf_path()
    model = load_pretrained(path, bits=4)
    wrap(model, rank=16)
    text = "The capital of France is Paris."
    input_ids = torch.tensor([load_tokenizer(path)(text)["input_ids"]])

    with Tape() as tape:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    tape.backward(loss)

    first = next(i for i, entry in enumerate(tape.entries) if entry.module.endswith("layers.0.mlp"))
    print("\n".join(str(entry) for entry in tape.entries[first : first + 4]))
    print(f"...\n\n{tape.summary()}\n\nNaN or infinity: {tape.first_nonfinite() or 'nowhere'}\n")
    start = time.perf_counter()
    print(f"{tape.check_gradients()}\nin {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
