"""Attention without a matrix of all scores: a block of query rows at a time, forward and backward.

As in Dao et al., FlashAttention, https://arxiv.org/abs/2205.14135, the backward computes the probabilities anew instead
of keeping them. A kernel does so where there is one; elsewhere torch's operations do, with whole rows in a block, whose
softmax needs nothing else than query and key.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import entrenar.autograd.ops._attention_cuda  # noqa: F401 (registers kernels)
from entrenar.autograd.ops._attention_kernel import attention_backward, attention_forward, has_kernel, takes_mask
from entrenar.autograd.ops._autocast import autocast
from entrenar.autograd.ops._function import Function
from entrenar.autograd.ops._gradient import fit, layout, refuse_complex, widen
from entrenar.autograd.ops._override import overridable

BLOCK = 64
"""Query rows whose scores exist at a time."""


@overridable
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q Kᵀ + mask) V, as torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: [..., H, T, E]; key: [..., H, S, E]; value: [..., H, S, Ev]. Floating point, of one dtype; their leading
            dimensions are broadcast. Under autocast they are cast as torch casts them.
        attn_mask: broadcastable to [..., H, T, S]. Boolean: True where a query sees a key. Floating point, of query's
            dtype or float32: it is added to the scores, and may have a gradient.
        dropout_p: each probability is zeroed with this probability and else divided by 1 - dropout_p. The choice
            follows from one number that is drawn from torch's generator; it differs from the choice torch would make.
            The number breaks the graph of torch.compile, and torch.func.vmap takes it with randomness="same" only.
        is_causal: query i sees the keys up to i; not together with attn_mask.
        scale: 1 / sqrt(E) if None.
        enable_gqa: query may have a multiple of the heads of key and value; neighbours share one.

    Returns:
        [..., H, T, Ev] of query's dtype, computed in float32 or wider. A query that sees no key gets zeros.

    With P the probabilities, M the dropout's factors and dP = dO Vᵀ M:
    dV = (P M)ᵀ dO, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dSᵀ Q, dmask = dS.
    Query, key, value and mask are kept, and one block of scores exists at a time: memory is linear in T and in S. A
    second derivative works, but keeps all blocks of the backward, whose memory is quadratic.

    There are kernels, without dropout, for up to 256 columns, where nothing is broadcast but a mask, which has no
    gradient and is boolean or of query's dtype; for their backward the output and a number for each query are kept too.
    On the CPU they take float32 and bfloat16. On CUDA (from compute capability 8.0) they are torch's, for float32,
    bfloat16 and float16, the last two with is_causal only if T <= S; their gradients are the same in every run only
    under torch.use_deterministic_algorithms. Of a row whose every bias is far below its scores, as the dtype's lowest
    number is, the output sees all keys alike, but the kernels' gradients count each as the only one: -infinity, or a
    boolean mask, says that a key is not seen.

    Raises RuntimeError where shapes, dtypes or devices do not match, TypeError for values that are not floating point.
    """
    query, key, value = autocast(query), autocast(key), autocast(value)
    _check(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if attn_mask is not None:
        attn_mask = torch.atleast_2d(attn_mask)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1))
    seed = int(torch.randint(2**63 - 1, (), device="cpu")) if dropout_p > 0 else None
    output, _ = AttentionFunction.apply(query, key, value, attn_mask, scale, dropout_p, seed, is_causal, enable_gqa)
    return output


attention = scaled_dot_product_attention


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> None:
    operands = {"query": query, "key": key, "value": value}
    refuse_complex("scaled_dot_product_attention", *operands.values(), attn_mask)

    def described() -> str:
        return ", ".join(f"{name} {tuple(x.shape)} {x.dtype} on {x.device}" for name, x in operands.items())

    if not all(x.is_floating_point() for x in operands.values()):
        raise TypeError(f"attention takes floating-point values: {described()}")
    if any(x.dtype != query.dtype or x.device != query.device for x in operands.values()):
        raise RuntimeError(f"query, key and value must have one dtype and one device: {described()}")
    least = 3 if enable_gqa else 2
    if any(x.dim() < least for x in operands.values()):
        raise RuntimeError(f"query, key and value must have at least {least} dimensions: {described()}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"query and key must have as many columns, key and value as many rows: {described()}")
    if enable_gqa and (key.shape[-3] != value.shape[-3] or key.shape[-3] == 0 or query.shape[-3] % key.shape[-3]):
        raise RuntimeError(
            f"key and value must have as many heads, and query a multiple of them, in dimension -3: {described()}"
        )
    if not 0 <= dropout_p <= 1:
        raise RuntimeError(f"dropout_p must be between 0 and 1, not {dropout_p}")
    if attn_mask is None:
        return
    if is_causal:
        raise RuntimeError("attn_mask and is_causal exclude each other: put the causal part into the mask")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"attn_mask must be of torch.bool, torch.float32 or {query.dtype}, not {attn_mask.dtype}")


class AttentionSettings(NamedTuple):
    """What AttentionFunction takes beside tensors; `seed` is None without dropout."""

    scale: float
    dropout_p: float
    seed: int | None
    is_causal: bool
    enable_gqa: bool


class AttentionFunction(Function):
    """O = (P M) V with P = softmax(S); dP = dO Vᵀ M, dS = P (dP - rowsum(P dP)).

    The second result is the kernel's logarithms of the softmax's sums, and empty where there is no kernel.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        dropout_p: float,
        seed: int | None,
        is_causal: bool,
        enable_gqa: bool,
    ) -> tuple[Tensor, Tensor]:
        takes = attn_mask is None or takes_mask(query, attn_mask)
        if takes and seed is None and has_kernel(query, key, value, enable_gqa, is_causal):
            return attention_forward(query, key, value, None, scale, is_causal, attn_mask)
        outputs = []
        with torch.autocast(query.device.type, enabled=False):
            heads = _Heads(query, key, value, attn_mask, scale, is_causal, enable_gqa)
            generator = _generator(seed, query.device)
            for block in heads.blocks():
                p = heads.probabilities(block)
                p = _multiply(p, _dropout_factors(p, dropout_p, generator))
                outputs.append(heads.split(heads.clear(torch.bmm(p, heads.v[:, block.keys]), block)))
        output = torch.cat(outputs, dim=-2).to(query.dtype)
        return output.view(*heads.shape, *output.shape[-2:]), query.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
        query, key, value, attn_mask, *settings = inputs
        output, lse = outputs
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # or zeros would be made for lse
        ctx.settings = AttentionSettings(*settings)
        ctx.by_kernel = lse.dim() > 1
        ctx.save_for_backward(query, key, value, attn_mask, *((output, lse) if ctx.by_kernel else ()))

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_lse: None) -> tuple[Tensor | None, ...]:
        if d_output is None:
            return (None,) * len(ctx.needs_input_grad)
        query, key, value, attn_mask, *kept = ctx.saved_tensors
        settings = ctx.settings
        gradients: tuple[Tensor | None, ...]
        takes = attn_mask is None or takes_mask(query, attn_mask)
        if ctx.by_kernel and takes and not torch.is_grad_enabled():  # its gradients could not be differentiated again
            output, lse = kept
            gradients = attention_backward(
                d_output, query, key, value, output, lse, None, settings.scale, settings.is_causal, attn_mask
            )
            gradients = (*gradients, None)
        else:
            needs = ctx.needs_input_grad[:4]
            gradients = attention_gradients(d_output, query, key, value, attn_mask, settings, needs)
        return *gradients, *(None for _ in settings)


def attention_gradients(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    settings: AttentionSettings,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of query, key, value and mask that are needed, by operations that can be differentiated again."""
    needs_query, needs_key, needs_value, needs_mask = needs
    scale, dropout_p, seed, is_causal, enable_gqa = settings
    dq_blocks, dk_sum, dv_sum, dmask_blocks = [], None, None, []
    with torch.autocast(query.device.type, enabled=False):
        heads = _Heads(query, key, value, attn_mask, scale, is_causal, enable_gqa)
        generator = _generator(seed, query.device)
        d_output = heads.fold(d_output)
        for block in heads.blocks():
            rows, keys = block.rows, block.keys
            p = heads.probabilities(block)
            factors = _dropout_factors(p, dropout_p, generator)
            dy = heads.clear(heads.stack(d_output, rows), block)
            if needs_value:
                dv_sum = heads.add_to_keys(dv_sum, torch.bmm(_multiply(p, factors).mT, dy))
            if not (needs_query or needs_key or needs_mask):
                continue
            dp = _multiply(torch.bmm(dy, heads.v[:, keys].mT), factors)
            p_dp = p * dp
            ds = torch.addcmul(p_dp, p, p_dp.sum(-1, keepdim=True), value=-1)
            if needs_query:
                dq_blocks.append(heads.split(torch.bmm(ds, heads.k[:, keys])))
            if needs_key:
                dk_sum = heads.add_to_keys(dk_sum, torch.bmm(ds.mT, heads.stack(heads.q, rows)))
            if needs_mask:
                assert attn_mask is not None
                dmask_blocks.append(heads.mask_gradient(ds, attn_mask.shape))
    dq = dk = dv = dmask = None
    if needs_query:
        dq = torch.cat(dq_blocks, dim=-2) * scale
        dq = fit(dq.view(*heads.shape, *query.shape[-2:]), layout(query))
    if dk_sum is not None:
        dk = fit(dk_sum.view(*heads.lead, *key.shape[-2:]), layout(key))
    if dv_sum is not None:
        dv = fit(dv_sum.view(*heads.lead, *value.shape[-2:]), layout(value))
    if needs_mask:
        dmask = fit(torch.cat(dmask_blocks, dim=-2), layout(attn_mask))
    return dq, dk, dv, dmask


class _Block(NamedTuple):
    """Some query rows, and the keys that they may see.

    Attributes:
        bias: is added to the scores, [*shape, rows, keys] or broadcastable to it.
        blind: the rows whose mask excludes every key, broadcastable to [*shape, rows, 1]. They have no softmax. The
            bias lets them see all keys, and what comes of it is cleared.
    """

    rows: slice
    keys: slice
    bias: Tensor | None = None
    blind: Tensor | None = None


class _Heads:
    """Query, key and value as batches of matrices: N heads of keys, and with each the G heads of queries that share it.

    Attributes:
        q: [N, G, T, E], multiplied by the scale; k: [N, S, E]; v: [N, S, Ev]; in float32 or wider.
        lead: the dimensions that became N.
        shape: the leading dimensions of the output, which hold N G heads.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        is_causal: bool,
        enable_gqa: bool,
    ) -> None:
        shared = key.shape[-3] if enable_gqa else 1
        # Not by unflatten, which torch.compile of 2.11 does not trace under a default device.
        query = (
            query.view(*query.shape[:-3], shared, query.shape[-3] // shared, *query.shape[-2:])
            if enable_gqa
            else query.unsqueeze(-3)
        )
        self.lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-2], value.shape[:-2])
        self.groups, self.length = query.shape[-3], query.shape[-2]
        self.shape = (*self.lead[:-1], self.lead[-1] * self.groups) if enable_gqa else self.lead
        self.count = math.prod(self.lead)
        self.q = self._batch(widen(query) * scale, 3)
        self.k = self._batch(widen(key), 2)
        self.v = self._batch(widen(value), 2)
        self.is_causal = is_causal
        self.mask = attn_mask
        if attn_mask is not None:
            # For its error, where the mask does not fit.
            attn_mask.expand(*self.shape, self.length, key.shape[-2])

    def _batch(self, x: Tensor, own: int) -> Tensor:
        tail = x.shape[-own:]
        return x.expand(*self.lead, *tail).reshape(self.count, *tail)

    def blocks(self) -> Iterator[_Block]:
        keys = self.k.shape[-2]
        for start in range(0, max(self.length, 1), BLOCK):
            stop = min(start + BLOCK, self.length)
            rows = slice(start, stop)
            if self.is_causal:
                end = min(stop, keys)
                mask = torch.ones(stop - start, end, dtype=torch.bool, device=self.q.device).tril(start)
                yield _Block(rows, slice(0, end), self._bias(mask))
            elif self.mask is None:
                yield _Block(rows, slice(0, keys))
            else:
                mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., rows, :]
                seen = mask if mask.dtype == torch.bool else mask != -math.inf
                blind = ~seen.any(-1, keepdim=True)
                bias = self._bias(mask | blind) if mask.dtype == torch.bool else mask.masked_fill(blind, 0)
                yield _Block(rows, slice(0, keys), bias, blind)

    def _bias(self, mask: Tensor) -> Tensor:
        # To add -inf to the scores takes a fraction of the time of choosing between two values.
        return torch.zeros_like(mask, dtype=self.q.dtype).masked_fill(~mask, -math.inf)

    def probabilities(self, block: _Block) -> Tensor:
        """[N, G rows, keys]."""
        scores = torch.bmm(self.stack(self.q, block.rows), self.k[:, block.keys].mT)
        if block.bias is None:
            return scores.softmax(-1)
        # In this shape, as torch.compile takes the softmax of the other for that of an attention with a key for each
        # query's head.
        return (self._unstack(scores) + block.bias).softmax(-1).view_as(scores)

    def clear(self, x: Tensor, block: _Block) -> Tensor:
        """[N, G rows, C] with zeros in the rows that see no key."""
        return x if block.blind is None else self._unstack(x).masked_fill(block.blind, 0).view_as(x)

    def add_to_keys(self, total: Tensor | None, x: Tensor) -> Tensor:
        """`total` [N, S, C], or zeros, plus x for the first keys."""
        x = F.pad(x, (0, 0, 0, self.k.shape[1] - x.shape[1]))
        return x if total is None else total + x

    def mask_gradient(self, ds: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of a block's scores, [N, G rows, keys], summed to the same rows of a mask of `shape`."""
        ds = self._unstack(ds)
        return ds.sum_to_size(*shape[:-2], min(shape[-2], ds.shape[-2]), shape[-1])

    def fold(self, x: Tensor) -> Tensor:
        """[*shape, T, C] as [N, G, T, C], in float32 or wider."""
        return widen(x).reshape(self.count, self.groups, *x.shape[-2:])

    def stack(self, x: Tensor, rows: slice) -> Tensor:
        """Some rows of [N, G, T, C] as [N, G rows, C]."""
        return x[:, :, rows].flatten(1, 2)

    def split(self, x: Tensor) -> Tensor:
        """[N, G rows, C] as [N, G, rows, C]."""
        return x.view(x.shape[0], self.groups, x.shape[1] // self.groups, x.shape[2])

    def _unstack(self, x: Tensor) -> Tensor:
        """[N, G rows, C] as [*shape, rows, C]."""
        return x.view(*self.shape, x.shape[1] // self.groups, x.shape[2])


def _generator(seed: int | None, device: torch.device) -> torch.Generator | None:
    return None if seed is None else torch.Generator(device).manual_seed(seed)


def _dropout_factors(p: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    """0 or 1 / (1 - dropout_p) for each probability, the same in the backward's blocks as in the forward's."""
    if generator is None:
        return None
    kept = torch.empty_like(p).bernoulli_(1 - dropout_p, generator=generator)
    return kept / (1 - dropout_p) if dropout_p < 1 else kept


def _multiply(x: Tensor, factors: Tensor | None) -> Tensor:
    return x if factors is None else x * factors
