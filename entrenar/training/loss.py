"""The next-token loss of a causal language model, on the tokens that carry a label and on no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from entrenar.autograd.ops.head_cross_entropy import head_cross_entropy
from entrenar.fusion.attention import FusedAttention
from entrenar.training.batches import IGNORED
from entrenar.training.packing import packed_inputs

# What was found out about models: whether they do something to the logits behind their head (capping, scaling).
_CHANGES_LOGITS: WeakSet[nn.Module] = WeakSet()
_KEEPS_LOGITS: WeakSet[nn.Module] = WeakSet()


def causal_lm_loss(
    model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, offsets: Tensor | None = None
) -> Tensor:
    """Return the mean next-token cross-entropy over the labels that are not -100: a float32 scalar.

    `input_ids` and `labels` are int64 [B, T]; `labels[b, t]` is the token wanted at position t (as in transformers,
    the shift by one happens here), and without `labels` every token is. `model` is a transformers causal language
    model: its own forward runs, so whatever it does to its logits (capping, scaling) holds, but its head sees only
    the positions that predict a label, and only some of them at a time: the logits are never whole (see
    `head_cross_entropy`), unless the model changes them behind its head. Raises ValueError where no position predicts
    a label, shapes differ or offsets do not fit, TypeError for a model without an output head.

    With `offsets`, int64 [n + 1] on the CPU, from 0 to T and nowhere decreasing, the one row of a batch holds n
    sequences behind each other, the i-th from offsets[i] up to offsets[i + 1]: the loss is that of the n as rows, and
    nothing is computed for padding. It holds for a model that keeps them apart (`entrenar.training.packs` says which
    do, and gain by it) where it is told of them as transformers tells: by `position_ids` that begin anew and by
    `cu_seq_lens_q`.

    On CUDA a model's first loss waits for the device; later ones, without `labels`, do not, and can be captured in a
    CUDA graph with their backward: that the model still leaves its logits as they are is then asserted on the device.
    """
    if input_ids.dim() != 2 or (labels is not None and labels.shape != input_ids.shape):
        shapes = [[*ids.shape] for ids in (input_ids, labels) if ids is not None]
        raise ValueError(f"input_ids and labels must both be [batch, tokens], not {' and '.join(map(str, shapes))}")
    inputs: dict[str, Any] = {"input_ids": input_ids}
    if offsets is not None:
        inputs |= packed_inputs(input_ids, offsets)
        labels = (input_ids if labels is None else labels).masked_fill(inputs["position_ids"] == 0, IGNORED)
    elif any(isinstance(module, FusedAttention) for module in model.modules()):
        inputs["mask_is_causal"] = True  # where transformers makes one, as while a CUDA graph is captured
    rows, targets = _predicting(input_ids) if labels is None else _labelled(labels)
    if not len(rows):
        raise ValueError("no position predicts a label: every label after the first token is -100")
    head = _head_of(model)
    if model not in _CHANGES_LOGITS:
        first = model not in _KEEPS_LOGITS
        generators = (torch.get_rng_state(), *get_device_states(input_ids)) if first else None
        hidden, sent, logits = _hidden_states(model, head, inputs)
        if _unchanged(logits, sent, first):
            _KEEPS_LOGITS.add(model)
            return head_cross_entropy(head, hidden.flatten(0, 1)[rows], targets, sent.numel())
        _CHANGES_LOGITS.add(model)
        _KEEPS_LOGITS.discard(model)
        # The forward was for nothing, and the next one must drop what a single one would have dropped.
        if generators is not None:
            torch.set_rng_state(generators[0])
            set_device_states(*generators[1:])
    logits = _logits(model, head, inputs, lambda hidden: hidden.flatten(0, 1)[rows]).squeeze(0)
    return head_cross_entropy(nn.Identity(), logits, targets, logits.shape[-1])


def _predicting(input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """All positions but the last of each sequence, of the flattened ids, and the ids that follow them."""
    batch, tokens = input_ids.shape
    rows = torch.arange(batch * tokens, device=input_ids.device).view(batch, tokens)[:, :-1]
    return rows.flatten(), input_ids[:, 1:].flatten()


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions whose next token has a label, of the flattened labels, and these labels."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    rows = (following != IGNORED).nonzero().squeeze(1)
    return rows, following[rows]


def _unchanged(logits: Tensor, sent: Tensor, first: bool) -> bool:
    """Whether a model returned the logits that a probe sent; asserted on the device for one that did so before."""
    sent = sent.view(1, 1, -1).to(logits.dtype)
    if logits.is_cuda and not first and logits.shape == sent.shape:
        torch._assert_async((logits == sent).all(), "the model changes its logits now, and did not in its first loss")
        return True
    return torch.equal(logits, sent)


def _head_of(model: nn.Module) -> nn.Module:
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(model).__name__} has no output head (get_output_embeddings), so no language-model loss")
    return head


def _hidden_states(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Run the model for its head's input [B, T, K]; and the logits that a probe sent and that the model returned.

    The head runs on no row, and the probe takes the place of its result: logits over a range beyond those of any
    model. If the model returns them as they are, it does nothing to logits behind its head.
    """
    seen: list[Tensor] = []

    def keep_all_pass_none(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[0, :0]

    def probe(logits: Tensor) -> Tensor:
        seen.append(torch.linspace(-1000, 1000, logits.shape[-1], dtype=logits.dtype, device=logits.device))
        return seen[-1].clone().view(1, 1, -1)

    logits = _logits(model, head, inputs, keep_all_pass_none, probe)
    hidden, sent = seen
    return hidden, sent, logits


def _logits(
    model: nn.Module,
    head: nn.Module,
    inputs: dict[str, Any],
    rows_of: Callable[[Tensor], Tensor],
    replace: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The model's logits where its head sees rows_of(hidden states) [n, K] alone and its result is replaced."""
    calls = 0

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls
        calls += 1
        return (rows_of(args[0]).unsqueeze(0), *args[1:])

    hooks = [head.register_forward_pre_hook(before, prepend=True)]
    if replace is not None:
        hooks.append(head.register_forward_hook(lambda module, args, logits: replace(logits)))
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if calls != 1:
        raise TypeError(f"{type(model).__name__} called its output head {calls} times in one forward; once is expected")
    return logits
