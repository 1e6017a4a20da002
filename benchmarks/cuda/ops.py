"""Our memory-bound operations on a GPU beside torch's, at the shapes of a model of 7B parameters (2048 tokens).

Each row is the forward or the backward of one operation. of_copy is the share of the bandwidth of a plain copy,
measured in the same run, that ours reaches on the bytes that it must move; times_ours is torch's time over ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.cuda.timing import copies, copy_bandwidth, median_us
from benchmarks.harness import print_table, refuse_if_red, write
from entrenar.autograd import ops

TESTS = ("tests/autograd/test_pointwise_kernels.py", "tests/autograd/test_cross_entropy_kernel.py")
TOKENS, WIDTH, INNER, HEADS, HEAD, CLASSES = 2048, 4096, 11008, 32, 128, 32000
EPS = 1e-5


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.rms_norm(total, (WIDTH,), weight, EPS)


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """For each row ours, torch's, and the arguments, of which those require a gradient that have one."""

    def randn(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda").requires_grad_(grad)

    x, residual, gate, up = randn(TOKENS, WIDTH), randn(TOKENS, WIDTH), randn(TOKENS, INNER), randn(TOKENS, INNER)
    frozen, weight, bias = randn(WIDTH, grad=False), randn(WIDTH), randn(WIDTH)
    # As attention gets it: a transpose of [1, tokens, heads, head].
    q = randn(1, TOKENS, HEADS, HEAD, grad=False).transpose(1, 2).requires_grad_()
    cos, sin = randn(1, 1, TOKENS, HEAD, grad=False), randn(1, 1, TOKENS, HEAD, grad=False)
    logits, target = randn(TOKENS, CLASSES), torch.randint(CLASSES, (TOKENS,), device="cuda")
    scores = randn(8, TOKENS, TOKENS)
    shape = (WIDTH,)
    return {
        "silu": (ops.silu, F.silu, (gate,)),
        "gelu": (ops.gelu, F.gelu, (gate,)),
        "softmax": (lambda x: ops.softmax(x, -1), lambda x: x.softmax(-1), (scores,)),
        "swiglu": (ops.swiglu, lambda gate, up: F.silu(gate) * up, (gate, up)),
        "rms_norm, frozen": (
            lambda x, w: ops.rms_norm(x, shape, w, EPS),
            lambda x, w: F.rms_norm(x, shape, w, EPS),
            (x, frozen),
        ),
        "rms_norm": (
            lambda x, w: ops.rms_norm(x, shape, w, EPS),
            lambda x, w: F.rms_norm(x, shape, w, EPS),
            (x, weight),
        ),
        "add_rms_norm, frozen": (
            lambda x, y, w: ops.add_rms_norm(x, y, w, EPS),
            add_rms_norm,
            (x, residual, frozen),
        ),
        "layer_norm": (
            lambda x, w, b: ops.layer_norm(x, shape, w, b),
            lambda x, w, b: F.layer_norm(x, shape, w, b),
            (x, weight, bias),
        ),
        "rotary_embedding": (
            ops.rotary_embedding,
            lambda q, cos, sin: q * cos + rotate_half(q) * sin,
            (q, cos, sin),
        ),
        "cross_entropy": (ops.cross_entropy, F.cross_entropy, (logits, target)),
    }


def differentiable(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in arguments if x.requires_grad]


def bytes_of(*tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors))


def measure(dtype: torch.dtype, bandwidth: float) -> list[dict[str, Any]]:
    rows = []
    for name, (ours, theirs, arguments) in pairs(dtype).items():
        inputs = copies(arguments)
        y = theirs(*arguments)
        moved = {"forward": bytes_of(arguments, y)}
        # dy is read, and what the forward was given or made; the gradients are written.
        kept = y if name == "softmax" else (y[0], arguments[2]) if "add_rms" in name else arguments
        moved["backward"] = bytes_of(y, kept, differentiable(arguments)[: 1 if "add_rms" in name else None])
        if name == "rotary_embedding":
            moved["backward"] -= bytes_of(arguments[0])  # which is linear in it
        times: dict[str, list[float]] = {}
        for op in (ours, theirs):
            with torch.no_grad():
                times.setdefault("forward", []).append(median_us(op, inputs))
            # The engine runs a backward on the stream of its forward, so both are captured, and the forward taken off.
            dys = [tree_map(torch.randn_like, y) for _ in inputs]

            def both(dy: Any, *arguments: Any, op: Callable[..., Any] = op) -> Any:
                return torch.autograd.grad(op(*arguments), differentiable(arguments), dy)

            whole = median_us(both, [(dy, *x) for dy, x in zip(dys, inputs, strict=True)])
            times.setdefault("backward", []).append(whole - times["forward"][-1])
        for direction, (mine, torchs) in times.items():
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "op": name,
                    "direction": direction,
                    "mbytes": round(moved[direction] / 1e6, 1),
                    "ours_us": round(mine, 2),
                    "torch_us": round(torchs, 2),
                    "of_copy": round(moved[direction] / mine / bandwidth, 3),
                    "times_ours": round(torchs / mine, 3),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trust", action="store_true", help="measure without running the tests first")
    if not parser.parse_args().trust:
        refuse_if_red(*TESTS, "-k", "cuda")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    rows = [row for dtype in (torch.bfloat16, torch.float32) for row in measure(dtype, bandwidth)]
    print_table(rows)
    device = torch.cuda.get_device_name()
    print(f"{device}: a copy moves {bandwidth / 1e3:.0f} GB/s")
    write("cuda_ops", {"device": device, "copy_gb_per_second": round(bandwidth / 1e3), "rows": rows})


if __name__ == "__main__":
    main()
