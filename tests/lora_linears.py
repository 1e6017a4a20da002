"""What tests of LoRA layers share: layers at one x, and their formula in float64."""

from __future__ import annotations

import torch

from entrenar.autograd.ops import int4_dequantize, int4_lora_linears, int4_quantize
from entrenar.autograd.ops.int4_lora_linears import int4_lora_linears_reference


def make(columns: int, sizes: tuple[int, ...], ranks: tuple[int, ...], biased: tuple[bool, ...]):
    packed = [int4_quantize(torch.randn(n, columns)) for n in sizes]
    codes, scales = (list(each) for each in zip(*packed, strict=True))
    bias = [torch.randn(n) if b else None for n, b in zip(sizes, biased, strict=True)]
    lora_A = [torch.randn(r, columns, requires_grad=True) for r in ranks]
    lora_B = [torch.randn(n, r, requires_grad=True) for n, r in zip(sizes, ranks, strict=True)]
    return codes, scales, bias, lora_A, lora_B


def assert_near_float64(rows: int, columns: int, sizes: tuple[int, ...], ranks: tuple[int, ...], dtype, limit: float):
    """Results and gradients are off by at most `limit` of the largest of their kind."""
    count = len(sizes)
    codes, scales, _, lora_A, lora_B = make(columns, sizes, ranks, (False,) * count)
    x = torch.randn(columns, rows).to(dtype).T.requires_grad_()
    ys = int4_lora_linears(x, codes, scales, [None] * count, lora_A, lora_B, 2.0)
    dys = [torch.randn_like(y) for y in ys]
    leaves = [x, *lora_A, *lora_B]
    found = torch.autograd.grad(ys, leaves, dys)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    adapters = wide[1 : 1 + count], wide[1 + count :]
    exact = int4_lora_linears_reference(wide[0], codes, scales, None, *adapters, 2.0, 64)
    expected = torch.autograd.grad(exact, wide, [dy.double() for dy in dys])
    weights = [int4_dequantize(c, s, columns, dtype=dtype).double() for c, s in zip(codes, scales, strict=True)]
    products = sum(dy.double() @ w for dy, w in zip(dys, weights, strict=True))  # which the adapter's part may cancel
    for i, (a, e) in enumerate(zip(found, expected, strict=True)):
        scale = max(e.abs().max(), products.abs().max()) if i == 0 else e.abs().max()
        assert (a.double() - e).abs().max() <= limit * scale
    for y, w, e in zip(ys, weights, exact, strict=True):
        scale = max(e.abs().max(), (x.double() @ w.T).abs().max())
        assert (y.double() - e).abs().max() <= limit * scale
