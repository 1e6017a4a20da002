"""Parameter groups of a model: no decay on vectors, and LoRA+'s rate for B."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, *, lora_plus_ratio: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer of what trains in `model`, each parameter under its name.

    Matrices decay by `weight_decay`; vectors and scalars (biases, the gains of norms) do not. The B of every LoRA layer
    learns `lora_plus_ratio` times as fast as the rest, as in LoRA+ (Hayou et al., 2024), which recommends about 16.

    Raises ValueError if nothing trains, or if the ratio is not positive.
    """
    if not lora_plus_ratio > 0:
        raise ValueError(f"lora_plus_ratio must be greater than 0, and is {lora_plus_ratio!r}")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = lr * lora_plus_ratio if name.rpartition(".")[2] == "lora_B" else lr
            decay = weight_decay if parameter.dim() >= 2 else 0.0
            groups.setdefault((rate, decay), []).append((name, parameter))
    if not groups:
        raise ValueError("nothing in this model trains; wrap it first: entrenar.wrap(model)")
    return [{"params": named, "lr": rate, "weight_decay": decay} for (rate, decay), named in groups.items()]
