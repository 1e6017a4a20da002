"""Sequences behind each other in one row of a batch, instead of in padded rows: how a model is told, and whether."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entrenar.fusion.attention import PROJECTIONS, FusedAttention


def packed_inputs(input_ids: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    """What a model of transformers is given beside input_ids [1, T] to keep the sequences in it apart.

    `position_ids` [1, T] begin anew with each sequence: transformers makes its masks accordingly. `cu_seq_lens_q` are
    the offsets, int64 [n + 1] on the CPU: fused attention goes by them alone. Raises ValueError where they do not fit.
    """
    at, tokens = offsets.tolist(), input_ids.shape[1]
    if len(input_ids) != 1 or at[:1] != [0] or at[-1:] != [tokens] or at != sorted(at):
        raise ValueError(
            f"offsets must go up from 0 to the number of tokens of a batch of one row, and are {at} for input_ids "
            f"{[*input_ids.shape]}"
        )
    positions = torch.arange(tokens, device="cpu") - offsets[:-1].repeat_interleave(offsets.diff())
    return {"position_ids": positions.unsqueeze(0).to(input_ids.device), "cu_seq_lens_q": offsets}


def packs(model: nn.Module, longest: int) -> bool:
    """Return whether `model` takes sequences of up to `longest` tokens packed, at no cost for their being together.

    All its attention must be fused, without dropout or a window that is shorter: any other would compute the scores of
    all pairs of tokens. And a sequence's logits must be the same bits whatever stands before it, tried on a few tokens.
    """
    attention = [module for module in model.modules() if set(PROJECTIONS) <= set(module._modules)]
    fused = all(isinstance(module, FusedAttention) and module.packs(longest) for module in attention)
    return bool(attention) and fused and _keeps_apart(model)


def _keeps_apart(model: nn.Module) -> bool:
    first, other, second = torch.arange(9, device=next(model.parameters()).device).split(3)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            behind_first, behind_other = (_logits_of_last(model, before, second) for before in (first, other))
    finally:
        model.train(training)
    return torch.equal(behind_first, behind_other)


def _logits_of_last(model: nn.Module, before: Tensor, last: Tensor) -> Tensor:
    input_ids = torch.cat([before, last]).unsqueeze(0)
    offsets = torch.tensor([0, len(before), input_ids.shape[1]], device="cpu")
    logits: Tensor = model(input_ids=input_ids, **packed_inputs(input_ids, offsets), use_cache=False).logits
    return logits[0, len(before) :]
