"""Linear regression with Tensor: the gradients come from our operations.

python examples/linear_regression.py
"""

from __future__ import annotations

import torch

from entrenar import AdamW, Tensor, backward


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    x = Tensor.randn((200, 1))
    y = 3.0 * x - 2.0 + 0.1 * Tensor.randn((200, 1))

    w, b = Tensor.zeros((1, 1), requires_grad=True), Tensor.zeros(1, requires_grad=True)
    optimizer = AdamW([w, b], learning_rate=0.1, weight_decay=0.0)
    for _ in range(200):
        error = x @ w + b - y
        loss = (error * error).mean()
        backward(loss)
        optimizer.step()
        w.zero_grad()
        b.zero_grad()
    print(f"y = {w.item():.3f} x + {b.item():.3f}, mean squared error {loss.item():.4f}")
    return w.item(), b.item()


if __name__ == "__main__":
    main()
