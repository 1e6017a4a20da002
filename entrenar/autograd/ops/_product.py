"""Products with one large matrix, in 16 bits where the device multiplies those fast, else in float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of float32 copies and results at one time: a large matrix is converted in tiles of its rows.
TILE_BYTES = 8 * 2**20


def multiplies_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch multiplies matrices of this dtype on this device about as fast as those of float32, or faster.

    On a CPU oneDNN does that for 16 bits where the processor has instructions for it. Elsewhere, or with
    `torch.backends.mkldnn.enabled` off, loops of torch's own do, and take up to a hundred times as long as for float32.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    # oneDNN takes bfloat16 on any AVX-512, but in about three times float32's time where it has to convert.
    converts = torch.cpu._is_avx512_supported() and not torch.cpu._is_avx512_bf16_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not converts


def linear_into(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compute y = x Wᵀ + b, for y [N, C], x [N, K], W [C, K] and b [C] of one dtype, to which y is rounded."""
    if multiplies_fast(x.dtype, x.device):
        if bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias, x, weight.T, out=y)
        return
    x = x.float()
    size = _tile_size(len(weight), sum(x.shape))
    weights, results = x.new_empty(size * x.shape[1]), x.new_empty(size * len(x))
    for tile in _tiles(len(weight), size):
        w = _float32(weight[tile], weights)
        result = results[: len(x) * len(w)].view(len(x), len(w))
        if bias is None:
            torch.mm(x, w.T, out=result)
        else:
            torch.addmm(bias[tile].float(), x, w.T, out=result)
        y[:, tile] = result


def linear_dx_into(dx: Tensor, dy: Tensor, weight: Tensor) -> None:
    """Compute dx = dy W, for dx [N, K], dy [N, C] and W [C, K] of one dtype, to which dx is rounded."""
    if multiplies_fast(dy.dtype, dy.device):
        torch.mm(dy, weight, out=dx)
        return
    total = torch.zeros_like(dx, dtype=torch.float32)
    size = _tile_size(len(weight), sum(dx.shape))
    weights, gradients = total.new_empty(size * dx.shape[1]), total.new_empty(size * len(dx))
    for tile in _tiles(len(weight), size):
        total.addmm_(_float32(dy[:, tile], gradients), _float32(weight[tile], weights))
    dx.copy_(total)


def add_linear_dw(dw: Tensor, dy: Tensor, x: Tensor) -> None:
    """Compute dw += dyᵀ x, for dy [N, C] and x [N, K] of one dtype, and dw [C, K] of that or of float32."""
    if dw.dtype == x.dtype:
        dw.addmm_(dy.T, x)
    elif multiplies_fast(x.dtype, x.device):
        dw += dy.T @ x
    else:
        x = x.float()
        size = _tile_size(len(dw), len(x))
        gradients = x.new_empty(size * len(x))
        for tile in _tiles(len(dw), size):
            dw[tile].addmm_(_float32(dy[:, tile], gradients).T, x)


def _tile_size(rows: int, columns: int) -> int:
    """How many of the rows have TILE_BYTES at most, as float32 of so many columns; one at least."""
    return max(1, min(rows, TILE_BYTES // (4 * max(1, columns))))


def _tiles(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, rows, size))


def _float32(part: Tensor, memory: Tensor) -> Tensor:
    """The part in float32, in memory for all parts: new memory for each of them would fragment the heap."""
    return memory[: part.numel()].view(part.shape).copy_(part)
