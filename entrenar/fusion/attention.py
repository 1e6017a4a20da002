"""Llama's attention layer: projections, rotary embedding, and attention that keeps no scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entrenar.autograd.ops.attention import attention
from entrenar.autograd.ops.packed_attention import packed_attention
from entrenar.autograd.ops.rotary import rotary_embedding
from entrenar.fusion.structure import NotFusableError, own_settings, require_children
from entrenar.lora.layers import apply_together

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
# What the class may have set beside what is used here, without any effect on the output.
HARMLESS = {"num_key_value_groups", "layer_type"}


class FusedAttention(nn.Module):
    """o(softmax(scale rotate(q(x)) rotate(k(x))ᵀ) v(x)), called as transformers calls the attention layers of Llama.

    Args:
        layers: q_proj, k_proj, v_proj and o_proj; where the model has them q_norm and k_norm, applied to each head.
        head_dim: elements of a head.
        scale: multiplies the scores.
        dropout: of the probabilities, in training.
        layer_idx: the layer's place in the model's cache of keys and values.
        window: how many keys a query sees at most, or None; the model puts it into its masks.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module | None
    k_norm: nn.Module | None

    def __init__(
        self,
        layers: dict[str, nn.Module],
        *,
        head_dim: int,
        scale: float,
        dropout: float,
        layer_idx: int,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name in (*PROJECTIONS, *HEAD_NORMS):
            self.add_module(name, layers.get(name))
        self.head_dim = head_dim
        self.scale = scale
        self.dropout = dropout
        self.layer_idx = layer_idx
        self.window = window

    @classmethod
    def of(cls, module: nn.Module) -> FusedAttention:
        """The fused module with the layers of `module`. Raises NotFusableError where it is something else."""
        require_children(module, set(PROJECTIONS), set(HEAD_NORMS))
        settings = own_settings(module)
        config = settings.pop("config", None)
        # "sdpa" is the contract on masks that is kept here: none means causal, or a single query that sees all keys.
        if getattr(config, "_attn_implementation", None) != "sdpa" or not settings.pop("is_causal", False):
            raise NotFusableError("is not causal attention of the implementation 'sdpa'")
        try:
            known = {
                "head_dim": settings.pop("head_dim"),
                "scale": settings.pop("scaling"),
                "dropout": settings.pop("attention_dropout"),
                "layer_idx": settings.pop("layer_idx"),
                "window": settings.pop("sliding_window", getattr(config, "sliding_window", None)),
            }
        except KeyError as missing:
            raise NotFusableError(f"has no {missing.args[0]}") from None
        if unknown := sorted(set(settings) - HARMLESS):
            raise NotFusableError(f"has the settings {', '.join(unknown)}, whose effect is not known")
        return cls(dict(module.named_children()), **known)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cu_seq_lens_q: Tensor | None = None,
        mask_is_causal: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden_states [B, T, width] to the same shape; the second result stands for weights that do not exist.

        Args:
            position_embeddings: cos and sin, [B or 1, T, head_dim].
            attention_mask: as `attention` takes it, or None for causal attention.
            past_key_values: a cache of transformers, to which keys and values are added.
            cu_seq_lens_q: integers [n + 1], named as transformers names them: a batch of one row holds n sequences, the
                i-th from cu_seq_lens_q[i] up to cu_seq_lens_q[i + 1]. A token sees the earlier ones of its sequence,
                and the mask is not looked at.
            mask_is_causal: the mask says that each token sees the earlier ones of its row, and nothing else: it is not
                looked at, unless a window is shorter than the rows, or there is a cache.

        Raises ValueError for packed sequences that `packs` says are not taken.
        """
        q, k, v = (
            x.view(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)
            for x in apply_together((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = (x.unsqueeze(1) for x in position_embeddings)
        q, k, v = (
            rotary_embedding(q.transpose(1, 2), cos, sin),
            rotary_embedding(k.transpose(1, 2), cos, sin),
            v.transpose(1, 2),
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if mask_is_causal and past_key_values is None and (self.window is None or q.shape[2] <= self.window):
            attention_mask = None
        if cu_seq_lens_q is None:
            o = self._attend(q, k, v, attention_mask)
        else:
            o = self._attend_packed(q, k, v, cu_seq_lens_q.to("cpu", torch.int64))
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None

    def packs(self, longest: int) -> bool:
        """Return whether sequences of up to `longest` tokens can be packed: not with dropout, nor beyond a window."""
        return not self.dropout and (self.window is None or longest <= self.window)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and q.shape[2] > 1
        if causal:  # a cache of fixed size has room for keys that do not exist yet
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        dropout = self.dropout if self.training else 0.0
        return attention(q, k, v, mask, dropout, causal, scale=self.scale, enable_gqa=True)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
        longest = 0 if self.window is None else int(offsets.diff().max())
        if not self.packs(longest):
            raise ValueError(
                "attention to packed sequences has no dropout, and no window that is shorter than one of them; here "
                f"they are {self.dropout} and {self.window}: pad the sequences instead"
            )
        return packed_attention(q, k, v, offsets, scale=self.scale)
