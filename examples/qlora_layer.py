"""QLoRA on one layer: the frozen weight takes 4.25 bits an element instead of 32.

python examples/qlora_layer.py
"""

from __future__ import annotations

import torch

from entrenar import QLoRALayer


def main() -> None:
    torch.manual_seed(0)
    base_weight = torch.randn(4096, 4096) / 64
    qlora = QLoRALayer(base_weight, 4096, 4096, rank=64, alpha=128.0)

    packed = sum(p.nbytes for p in qlora.base.parameters())
    saved = 1 - packed / base_weight.nbytes
    print(f"weight: {base_weight.nbytes:,} bytes as float32, {packed:,} packed: {saved:.1%} less")

    x = torch.randn(16, 4096)
    expected = x @ base_weight.T
    output = qlora(x)  # decoded on the fly
    print(f"relative error of the output: {(output - expected).norm() / expected.norm():.1%}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
