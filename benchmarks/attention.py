"""Our attention beside torch's, forward and backward each, at the head sizes of SmolLM2-135M: 9 heads of 64 columns
that share 3 heads of keys, seen in the projections' memory. "padded" is by such a mask as transformers makes where rows
have padding: here the first begins with an eighth of it. "window" is by one where each token sees a quarter of the row
at most, up to itself. "single" is of one query to keys and values in a cache, as when text is generated.

times_ours is torch's time over ours; floor_ms what the products of queries and the keys that they see (with padding
those under the diagonal), or the bytes, take at least on this machine, and of_floor its fraction of our time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Floor, Work, floor, interleaved, print_table, ratio, refuse_if_red, write
from entrenar.autograd.ops import attention

TESTS = tuple(f"tests/autograd/test_{name}.py" for name in ("attention", "masked_attention", "single_queries"))
HEADS, KV_HEADS, HEAD = 9, 3, 64
SIZES = ((4, 256), (1, 1024), (4, 1024))
WINDOWS = 4
OPS = {"ours": attention, "torch": F.scaled_dot_product_attention}


def work(batch: int, tokens: int, window: int, dtype: torch.dtype, *, backward: bool) -> Work:
    """Two products of every query with the keys of a window up to its own; backward, the four of their gradients."""
    outer, inner = (dtype.itemsize * batch * tokens * heads * HEAD for heads in (HEADS, KV_HEADS))
    pairs = tokens * window - window * (window - 1) // 2
    product = 2 * batch * HEADS * HEAD * pairs
    name = str(dtype).removeprefix("torch.")
    if backward:
        return Work(2 * outer + 2 * inner, outer + 2 * inner, 4 * product, name)
    return Work(outer + 2 * inner, outer, 2 * product, name)


def measure(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, tokens in SIZES:
            query, key, value = (
                torch.randn(batch, tokens, heads, HEAD, dtype=dtype).transpose(1, 2).requires_grad_()
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            dy = torch.randn_like(query)

            kinds: dict[str, dict[str, Any]] = {
                "causal": {"is_causal": True},
                "padded": {"attn_mask": padded(batch, tokens)},
                "window": {"attn_mask": windowed(tokens)},
            }
            for kind, seen in kinds.items():
                for step, calls in steps((query, key, value), dy, enable_gqa=True, **seen).items():
                    seconds = interleaved(calls, rounds)
                    window = tokens // WINDOWS if kind == "window" else tokens
                    least = work(batch, tokens, window, dtype, backward=step == "backward")
                    rows.append(
                        row_of(dtype, batch, tokens, kind, step, seconds, machine.columns(least, seconds["ours"]))
                    )
    return rows


def measure_single(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch, tokens in SIZES:
            query = torch.randn(batch, HEADS, 1, HEAD, dtype=dtype)
            key, value = (torch.randn(batch, KV_HEADS, tokens, HEAD, dtype=dtype) for _ in range(2))
            calls = {name: functools.partial(op, query, key, value, enable_gqa=True) for name, op in OPS.items()}
            seconds = interleaved(calls, rounds)
            least = Work(key.nbytes + value.nbytes + query.nbytes, query.nbytes)
            rows.append(
                row_of(dtype, batch, tokens, "single", "forward", seconds, machine.columns(least, seconds["ours"]))
            )
    return rows


def row_of(
    dtype: torch.dtype, batch: int, tokens: int, kind: str, step: str, seconds: dict[str, Any], floors: dict[str, Any]
) -> dict[str, Any]:
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "kind": kind,
        "step": step,
        "ours_ms": round(1e3 * statistics.median(seconds["ours"]), 3),
        "torch_ms": round(1e3 * statistics.median(seconds["torch"]), 3),
        "times_ours": round(ratio(seconds["torch"], seconds["ours"]), 3),
        **floors,
    }


def padded(batch: int, tokens: int) -> Tensor:
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, tokens, tokens).clone()
    mask[0, :, :, : tokens // 8] = False
    return mask


def windowed(tokens: int) -> Tensor:
    return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril().triu(1 - tokens // WINDOWS)


def steps(args: tuple[Tensor, ...], dy: Tensor, **settings: Any) -> dict[str, dict[str, Callable[[], Any]]]:
    """The contenders' calls, forward and backward."""
    outputs = {name: op(*args, **settings) for name, op in OPS.items()}
    return {
        "forward": {name: functools.partial(op, *args, **settings) for name, op in OPS.items()},
        "backward": {
            name: functools.partial(torch.autograd.grad, y, args, dy, retain_graph=True) for name, y in outputs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    machine = floor()
    rows = measure(arguments.rounds, machine) + measure_single(arguments.rounds, machine)
    print_table(rows)
    write("attention", {"rows": rows, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
