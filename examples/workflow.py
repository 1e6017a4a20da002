"""The whole workflow on one layer: quantize, train the adapter, save it.

python examples/workflow.py [custom_adapter.json]
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import cross_entropy

from entrenar import AdamW, CosineScheduler, QLoRALayer, save_adapter

STEPS = 60


def main(path: str = "custom_adapter.json") -> list[float]:
    torch.manual_seed(0)
    base_weight = torch.randn(512, 512) / 512**0.5
    qlora = QLoRALayer(base_weight, 512, 512, rank=16, alpha=32.0)
    optimizer = AdamW(qlora.trainable_parameters(), learning_rate=0.01, weight_decay=0.01)
    scheduler = CosineScheduler(initial_lr=0.01, min_lr=0.0001, total_steps=STEPS, warmup_steps=5)

    # The answers come from the base weight with a change of low rank, which is what the adapter can learn.
    change = torch.randn(512, 4) @ torch.randn(4, 512) / 32
    losses = []
    for step in range(STEPS):
        inputs = torch.randn(64, 512)
        targets = (inputs @ (base_weight + change).T).argmax(-1)
        loss = cross_entropy(qlora(inputs), targets)
        loss.backward()  # only the adapter gets gradients
        optimizer.set_lr(scheduler.get_lr(step))
        optimizer.step()
        qlora.zero_grad()
        losses.append(loss.item())

    save_adapter(qlora, path)
    print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last; adapter in {path}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
