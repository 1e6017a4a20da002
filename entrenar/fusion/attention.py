"""Llama's attention layer: projections, rotary embedding, and attention that keeps no scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entrenar.autograd.ops.attention import attention
from entrenar.autograd.ops.packed_attention import packed_attention
from entrenar.autograd.ops.rotary import rotary_embedding
from entrenar.fusion.structure import (
    NotFusableError,
    own_settings,
    refuse_unknown,
    require_children,
    require_inputs,
)
from entrenar.lora.layers import apply_together

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
INPUTS = {"hidden_states", "position_embeddings", "attention_mask", "past_key_values"}
# What the class may have set beside what is used here, without any effect on the output.
HARMLESS = {"num_key_value_groups", "layer_type"}
# What transformers, its collators and its losses let reach every layer, and sdpa attention does not look at.
HARMLESS_INPUTS = {
    "cache_position",
    "cu_seq_lens_k",
    "ignore_index",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "seq_idx",
    "shift_labels",
    "token_type_ids",
    "use_cache",
}


class FusedAttention(nn.Module):
    """o(softmax(scaling rotate(q(x)) rotate(k(x))ᵀ) v(x)), called as transformers calls the attention layers of Llama.

    Args:
        layers: q_proj, k_proj, v_proj and o_proj; where the model has them q_norm and k_norm, applied to each head.
        config: the model's, which says what attention it is asked for.
        head_dim: elements of a head.
        scaling: multiplies the scores.
        attention_dropout: of the probabilities, in training.
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
        config: Any,
        head_dim: int,
        scaling: float,
        attention_dropout: float,
        layer_idx: int,
        window: int | None = None,
    ) -> None:
        super().__init__()
        for name in (*PROJECTIONS, *HEAD_NORMS):
            self.add_module(name, layers.get(name))
        self.config = config
        self.head_dim = head_dim
        self.scaling = scaling
        self.attention_dropout = attention_dropout
        self.layer_idx = layer_idx
        self.window = window
        self.is_causal = True

    @classmethod
    def of(cls, module: nn.Module) -> FusedAttention:
        """The fused module with the layers of `module`. Raises NotFusableError where it is something else."""
        require_children(module, set(PROJECTIONS), set(HEAD_NORMS))
        require_inputs(module, INPUTS)
        settings = own_settings(module)
        config = settings.pop("config", None)
        is_causal = settings.pop("is_causal", False) and getattr(config, "is_causal", True)
        # "sdpa" is the contract on masks that is kept here: none means causal, or a single query that sees all keys.
        if getattr(config, "_attn_implementation", None) != "sdpa" or not is_causal:
            raise NotFusableError("is not causal attention of the implementation 'sdpa'")
        if getattr(config, "clip_qkv", None) is not None:
            raise NotFusableError("clips queries, keys and values")
        try:
            known = {name: settings.pop(name) for name in ("head_dim", "scaling", "attention_dropout", "layer_idx")}
        except KeyError as missing:
            raise NotFusableError(f"has no {missing.args[0]}") from None
        window = settings.pop("sliding_window", getattr(config, "sliding_window", None))
        refuse_unknown(settings, HARMLESS)
        return cls(dict(module.named_children()), config=config, window=window, **known)

    def forward(
        self,
        hidden_states: Tensor,
        *,  # families have the others in different orders
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        is_causal: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        mask_is_causal: bool = False,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Map hidden_states [B, T, width] to the same shape; the second result stands for weights that do not exist.

        Args:
            position_embeddings: cos and sin, [B or 1, T, head_dim].
            attention_mask: as `attention` takes it, or None for what `is_causal` says.
            past_key_values: a cache of transformers, to which keys and values are added.
            is_causal: without a mask, a token sees the earlier ones, else all; None for the attribute of that name.
            cu_seq_lens_q: integers [n + 1], named as transformers names them: a batch of one row holds n sequences, the
                i-th from cu_seq_lens_q[i] up to cu_seq_lens_q[i + 1]. A token sees those of its sequence that
                `is_causal` lets it see, and the mask is not looked at.
            mask_is_causal: the mask says that each token sees the earlier ones of its row, and nothing else: it is not
                looked at, unless a window is shorter than the rows, or there is a cache, or `is_causal` is false.
            others: what transformers lets reach every layer, without any effect here (`HARMLESS_INPUTS`).

        Raises ValueError for packed sequences that `packs` says are not taken, and where the config asks for another
        implementation than 'sdpa'; TypeError for inputs whose effect is not known.
        """
        self._check(others)
        if is_causal is None:
            is_causal = self.is_causal
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
        fits = self.window is None or q.shape[2] <= self.window
        if mask_is_causal and is_causal and past_key_values is None and fits:
            attention_mask = None
        if cu_seq_lens_q is None:
            o = self._attend(q, k, v, attention_mask, is_causal)
        else:
            o = self._attend_packed(q, k, v, cu_seq_lens_q.to("cpu", torch.int64), is_causal)
        return self.o_proj(o.transpose(1, 2).flatten(-2)), None

    def packs(self, longest: int) -> bool:
        """Return whether sequences of up to `longest` tokens can be packed: not with dropout, nor beyond a window."""
        return not self.attention_dropout and (self.window is None or longest <= self.window)

    def _check(self, others: dict[str, Any]) -> None:
        if self.config._attn_implementation != "sdpa":
            raise ValueError(
                f"fused attention computes the implementation 'sdpa' only, not {self.config._attn_implementation!r}: "
                "wrap(..., fuse=False) leaves the model its own, which has the others"
            )
        unknown = [name for name, x in others.items() if x is not None and name not in HARMLESS_INPUTS]
        if unknown:
            raise TypeError(
                f"fused attention does not know the effect of {', '.join(unknown)}: wrap(..., fuse=False) leaves the "
                "model its own"
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        causal = is_causal and mask is None and q.shape[2] > 1
        if causal:  # a cache of fixed size has room for keys that do not exist yet
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        dropout = self.attention_dropout if self.training else 0.0
        return attention(q, k, v, mask, dropout, causal, scale=self.scaling, enable_gqa=True)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, is_causal: bool) -> Tensor:
        longest = 0 if self.window is None else int(offsets.diff().max())
        if not self.packs(longest):
            raise ValueError(
                "attention to packed sequences has no dropout, and no window that is shorter than one of them; here "
                f"they are {self.attention_dropout} and {self.window}: pad the sequences instead"
            )
        return packed_attention(q, k, v, offsets, is_causal=is_causal, scale=self.scaling)
