"""The next-token loss of a causal language model, on the tokens that carry a label and on no others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entrenar.training.batches import IGNORED

# Rows of logits that are in float32 at one time: 256 rows of a vocabulary of 49,152 take 50 MB.
CHUNK_ROWS = 256


def causal_lm_loss(model: nn.Module, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the mean next-token cross-entropy over the labels that are not -100: a float32 scalar.

    `input_ids` and `labels` are int64 [B, T]; `labels[b, t]` is the token wanted at position t (as in transformers,
    the shift by one happens here), and without `labels` every token is. `model` is a transformers causal language
    model: its own forward runs, so whatever it does to its logits (capping, scaling) holds, but its head sees only
    the positions that predict a label. Raises ValueError where no position does or shapes differ, TypeError for a
    model without an output head.
    """
    labels = input_ids if labels is None else labels
    if input_ids.dim() != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and labels must both be [batch, tokens], not {[*input_ids.shape]} and {[*labels.shape]}"
        )
    wanted = labels[:, 1:] != IGNORED
    if not wanted.any():
        raise ValueError("no position predicts a label: every label after the first token is -100")
    logits = _logits_where(model, input_ids, wanted)
    loss: Tensor = _ChunkedCrossEntropy.apply(logits, labels[:, 1:][wanted])
    return loss


def _logits_where(model: nn.Module, input_ids: Tensor, wanted: Tensor) -> Tensor:
    """Run the model with its head on the `wanted` positions (bool [B, T-1]) alone; return logits [n, V]."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(model).__name__} has no output head (get_output_embeddings), so no language-model loss")
    calls = 0

    def keep_wanted(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        hidden = args[0]
        return (hidden[:, :-1][wanted].unsqueeze(0), *args[1:])

    hook = head.register_forward_pre_hook(keep_wanted)
    try:
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    finally:
        hook.remove()
    if calls != 1:
        raise TypeError(f"{type(model).__name__} called its output head {calls} times in one forward; once is expected")
    return logits.squeeze(0)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits [n, V] and targets int64 [n], in float32 on a few rows at a time.

    The logits stay in their own dtype, and the backward recomputes their softmax, so no float32 copy of them is ever
    whole. For a row, d loss / d logits = (softmax(logits) - onehot(target)) / n.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.cat([rows.to(wide).logsumexp(-1) for rows in logits.split(CHUNK_ROWS)])
        ctx.save_for_backward(logits, targets, normalizer)
        picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return (normalizer - picked.to(wide)).mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizer = ctx.saved_tensors
        scale = grad_loss / len(targets)
        grad = torch.empty_like(logits)
        for rows, target, norm, out in zip(
            *(x.split(CHUNK_ROWS) for x in (logits, targets, normalizer, grad)), strict=True
        ):
            probability = (rows.to(norm.dtype) - norm.unsqueeze(-1)).exp_().mul_(scale)
            index = target.unsqueeze(-1)
            probability.scatter_add_(-1, index, -scale.expand_as(index))
            out.copy_(probability)
        return grad, None
