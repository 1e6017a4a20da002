"""Products with a 4-bit weight on a GPU, forward and backward, beside what else there is.

The sizes are those of Llama 7B's projections. Peers: cuBLAS on the dense bfloat16 weight, torch's `_weight_int4pack_mm`
(forward only), and bitsandbytes' NF4 where it is installed. times_ours is the contender's time over ours; of_floor is
the least time that the bytes and operations take, at the rates measured in the same run, over the contender's time.
Weights are used in turn, so that none is found in the cache. "decoded first" is our decode and then cuBLAS: the way of
products that have no kernel of their own.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cuda.timing import Call, copies_beyond_cache, floor, floor_us, interleaved, write
from benchmarks.harness import print_table
from entrenar.autograd.ops import (
    int4_dequantize,
    int4_linear,
    int4_lora_linear,
    int4_lora_linears,
    int4_quantize,
)

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 4, 16, 64, 512, 2048, 4096)
FEW_ROWS = 256
"""From there on the activations alone go beyond the cache, and two weights do."""
RANK, SCALING = 16, 2.0
TOGETHER, FEWEST_TOGETHER = 3, 64
"""Layers at one x, and the rows from which on they are measured: those of training."""
bfloat16 = torch.bfloat16


class Weights:
    """The same weights in every format, some of each."""

    def __init__(self, outputs: int, inputs: int, copies: int) -> None:
        self.outputs, self.inputs = outputs, inputs
        self.dense = [torch.randn(outputs, inputs, device="cuda", dtype=bfloat16) / 64 for _ in range(copies)]
        self.int4 = [int4_quantize(w) for w in self.dense]
        self.bytes = sum(x.numel() for x in self.int4[0])
        self.torch_int4 = [self._packed(i) for i in range(copies)]
        self.lora_A = torch.randn(RANK, inputs, device="cuda", requires_grad=True)
        self.lora_B = torch.randn(outputs, RANK, device="cuda", requires_grad=True)
        self.nf4: list[tuple[Tensor, Any]] = []
        if importlib.util.find_spec("bitsandbytes"):
            import bitsandbytes.functional as bnb

            quantize = functools.partial(bnb.quantize_4bit, blocksize=64, quant_type="nf4", compress_statistics=False)
            self.nf4 = [quantize(w) for w in self.dense]

    def _packed(self, i: int) -> tuple[Tensor, Tensor]:
        """The codes as torch's kernel takes them, and its scales and zeros."""
        codes, scales = self.int4[i]
        groups = codes.view(self.outputs, -1, 1, 16)
        q = torch.cat([groups & 15, groups >> 4], dim=2).flatten(1)
        packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), 8)
        s = scales.view(torch.float16).to(bfloat16).T
        return packed, torch.stack([s, torch.zeros_like(s)], dim=-1).contiguous()


def gradients(product: Callable[[Tensor], Tensor], leaves: tuple[Tensor, ...], dy: Tensor) -> None:
    torch.autograd.grad(product(leaves[0]), leaves, dy)


def adapted(x: Tensor, weights: Weights) -> Tensor:
    """The adapter's part in plain torch."""
    return SCALING * F.linear(F.linear(x, weights.lora_A.to(x.dtype)), weights.lora_B.to(x.dtype))


def dequantize_calls(w: Weights) -> dict[str, Call]:
    calls: dict[str, Call] = {"ours": lambda i: int4_dequantize(*w.int4[i], w.inputs, dtype=bfloat16)}
    if w.nf4:
        import bitsandbytes.functional as bnb

        calls["bitsandbytes NF4"] = lambda i: bnb.dequantize_4bit(*w.nf4[i])
    return calls


def forward_calls(w: Weights, x: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "ours": lambda i: int4_linear(x, *w.int4[i]),
        "decoded first": lambda i: F.linear(x, int4_dequantize(*w.int4[i], w.inputs, dtype=bfloat16)),
        "cuBLAS bfloat16": lambda i: F.linear(x, w.dense[i]),
        "torch int4pack": lambda i: torch.ops.aten._weight_int4pack_mm(x, w.torch_int4[i][0], 64, w.torch_int4[i][1]),
    }
    if w.nf4:
        import bitsandbytes as bnb

        calls["bitsandbytes NF4"] = lambda i: bnb.matmul_4bit(x, w.nf4[i][0].t(), w.nf4[i][1])
    return calls


def dx_calls(w: Weights, dy: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "ours": lambda i: torch.ops.entrenar.int4_linear_dx(dy, *w.int4[i], w.inputs, 64),
        "decoded first": lambda i: dy @ int4_dequantize(*w.int4[i], w.inputs, dtype=bfloat16),
        "cuBLAS bfloat16": lambda i: dy @ w.dense[i],
    }
    if w.nf4:
        import bitsandbytes.functional as bnb

        calls["bitsandbytes NF4"] = lambda i: dy @ bnb.dequantize_4bit(*w.nf4[i])
    return calls


def lora_calls(w: Weights, x: Tensor, dy: Tensor) -> dict[str, Call]:
    leaves = x.requires_grad_(), w.lora_A, w.lora_B

    def ours(i: int) -> None:
        gradients(lambda x: int4_lora_linear(x, *w.int4[i], None, w.lora_A, w.lora_B, SCALING), leaves, dy)

    def dense(i: int) -> None:
        gradients(lambda x: F.linear(x, w.dense[i]) + adapted(x, w), leaves, dy)

    calls: dict[str, Call] = {"ours": ours, "cuBLAS bfloat16": dense}
    if w.nf4:
        import bitsandbytes as bnb

        def nf4(i: int) -> None:
            gradients(lambda x: bnb.matmul_4bit(x, w.nf4[i][0].t(), w.nf4[i][1]) + adapted(x, w), leaves, dy)

        calls["bitsandbytes NF4"] = nf4
    return calls


def together_calls(w: Weights, x: Tensor, dy: Tensor) -> dict[str, Call]:
    """Layers at one x, as q, k and v are."""
    A, B = ([a.detach().clone().requires_grad_() for _ in range(TOGETHER)] for a in (w.lora_A, w.lora_B))
    leaves, dys = (x.requires_grad_(), *A, *B), [dy] * TOGETHER
    copies = len(w.dense)

    def chosen(i: int) -> list[int]:
        return [(i + j) % copies for j in range(TOGETHER)]

    def ours(i: int) -> None:
        codes, scales = zip(*(w.int4[j] for j in chosen(i)), strict=True)
        torch.autograd.grad(int4_lora_linears(x, codes, scales, [None] * TOGETHER, A, B, SCALING), leaves, dys)

    def separate(i: int, product: Callable[[int], Tensor]) -> None:
        ys = [
            product(j) + SCALING * F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            for j, a, b in zip(chosen(i), A, B, strict=True)
        ]
        torch.autograd.grad(ys, leaves, dys)

    calls: dict[str, Call] = {
        "ours": ours,
        "cuBLAS bfloat16": lambda i: separate(i, lambda j: F.linear(x, w.dense[j])),
    }
    if w.nf4:
        import bitsandbytes as bnb

        calls["bitsandbytes NF4"] = lambda i: separate(i, lambda j: bnb.matmul_4bit(x, w.nf4[j][0].t(), w.nf4[j][1]))
    return calls


def measure(shape: tuple[int, int], rows: list[int], rounds: int, machine: dict[str, float]) -> list[dict[str, Any]]:
    n, k = shape
    copies = copies_beyond_cache(n * k * 17 // 32)
    w = Weights(n, k, copies)
    results = []

    def add(step: str, m: int, calls: dict[str, Call], moved: float, operations: float) -> None:
        least = floor_us(machine, moved, operations)
        times = interleaved(calls, copies if m < FEW_ROWS else 2, rounds)
        for name, figures in times.items():
            median = figures["median_us"]
            results.append(
                {"N": n, "K": k, "M": m, "step": step, "contender": name, **figures}
                | {
                    "times_ours": round(median / times["ours"]["median_us"], 3),
                    "of_floor": round(least / median, 3),
                }
            )

    add("dequantize", 0, dequantize_calls(w), w.bytes + 2 * n * k, 0)
    for m in rows:
        x, dy = (torch.randn(m, columns, device="cuda", dtype=bfloat16) for columns in (k, n))
        activations, product = 2 * m * (n + k), 2 * m * n * k
        add("forward", m, forward_calls(w, x), w.bytes + activations, product)
        add("dx", m, dx_calls(w, dy), w.bytes + activations, product)
        # x and dy are read twice, y and dx written; the adapter's six narrow products come on top.
        adapter = 6 * m * RANK * (n + k)
        add("LoRA forward + backward", m, lora_calls(w, x, dy), 2 * (w.bytes + activations), 2 * product + adapter)
        if m >= FEWEST_TOGETHER:
            moved = 2 * TOGETHER * w.bytes + 2 * 2 * m * (k + TOGETHER * n)
            operations = TOGETHER * (2 * product + adapter)
            add(f"{TOGETHER} LoRA layers at one x", m, together_calls(w, x, dy), moved, operations)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="M")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    machine = floor()
    print(machine, flush=True)
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        rows += measure(shape, arguments.rows, arguments.rounds, machine)
        write("int4_linear", {"rank": RANK, "floor": machine, "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    main()
