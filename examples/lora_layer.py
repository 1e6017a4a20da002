"""LoRA on one layer: only the adapter gets gradients, and it is saved without the base weight.

python examples/lora_layer.py [adapter.json]
"""

from __future__ import annotations

import sys

import torch

from entrenar import LoRALayer, load_adapter, save_adapter


def main(path: str = "adapter.json") -> None:
    torch.manual_seed(0)
    base_weight = torch.randn(256, 256)  # pretrained, frozen
    lora = LoRALayer(base_weight, 256, 256, rank=16, alpha=32.0)

    x = torch.randn(8, 256)
    loss = lora(x).square().mean()
    loss.backward()
    assert lora.base.weight.grad is None
    assert lora.lora_B.grad is not None

    trainable = sum(p.numel() for p in lora.trainable_parameters())
    print(f"trainable: {trainable:,} of {base_weight.numel() + trainable:,} parameters")

    save_adapter(lora, path)
    loaded = load_adapter(path, base_weight)
    assert torch.equal(loaded(x), lora(x))
    print(f"{path} holds the same adapter")


if __name__ == "__main__":
    main(*sys.argv[1:])
