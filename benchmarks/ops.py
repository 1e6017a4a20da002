"""Our differentiable operations beside torch's, at the shapes of a training step of SmolLM2-135M (4 x 256 tokens); and
what a tape costs around that step.

Each row is one operation, forward and backward together; times_ours is torch's time over ours. floor_ms is what its
products, or its bytes, take at least on this machine, and of_floor its fraction of our time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.harness import Floor, Work, floor, interleaved, print_table, ratio, refuse_if_red, write
from entrenar.autograd import ops

TESTS = ("tests/autograd",)
EPS = 1e-5
BATCH, TOKENS, WIDTH, INNER, HEADS, KV_HEADS, HEAD, CLASSES = 4, 256, 576, 1536, 9, 3, 64, 49152


# Of the products, forward and backward. Of attention's only what lies under the diagonal, and a frozen weight has no
# gradient.
OPERATIONS = {
    "linear": 6 * BATCH * TOKENS * WIDTH * INNER,
    "matmul": 6 * BATCH * HEADS * TOKENS * TOKENS * HEAD,
    "attention, causal": 6 * BATCH * HEADS * TOKENS * (TOKENS + 1) * HEAD,
    "linear_cross_entropy, frozen weight": 4 * BATCH * TOKENS * WIDTH * CLASSES,
}


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.rms_norm(total, (WIDTH,), weight, EPS)


def pairs(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]:
    """For each row ours, torch's, and the arguments."""
    x, y = (torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype) for _ in range(2))
    gate, up = (torch.randn(BATCH, TOKENS, INNER, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(WIDTH, dtype=dtype), torch.randn(WIDTH, dtype=dtype)
    q = torch.randn(BATCH, HEADS, TOKENS, HEAD, dtype=dtype)
    k, v = (torch.randn(BATCH, KV_HEADS, TOKENS, HEAD, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(1, 1, TOKENS, HEAD, dtype=dtype) for _ in range(2))
    matrix = torch.randn(INNER, WIDTH, dtype=dtype)
    scores = torch.randn(BATCH, HEADS, TOKENS, TOKENS, dtype=dtype)
    rows, head = x.flatten(0, 1), torch.randn(CLASSES, WIDTH, dtype=dtype) / WIDTH**0.5
    logits, target = torch.randn(BATCH * TOKENS, CLASSES, dtype=dtype), torch.randint(CLASSES, (BATCH * TOKENS,))
    causal = {"is_causal": True, "enable_gqa": True}
    return {
        "add": (ops.add, torch.add, (x, y)),
        "mul": (ops.mul, torch.mul, (gate, up)),
        "exp": (ops.exp, torch.exp, (x,)),
        "mean": (lambda x: ops.mean(x, -1), lambda x: x.mean(-1), (x,)),
        "relu": (ops.relu, torch.relu, (gate,)),
        "silu": (ops.silu, F.silu, (gate,)),
        "gelu": (ops.gelu, F.gelu, (gate,)),
        "softmax": (lambda x: ops.softmax(x, -1), lambda x: x.softmax(-1), (scores,)),
        "linear": (ops.linear, F.linear, (x, matrix)),
        "matmul": (ops.matmul, torch.matmul, (scores, q)),
        "layer_norm": (
            lambda x, w, b: ops.layer_norm(x, (WIDTH,), w, b),
            lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b),
            (x, weight, bias),
        ),
        "rms_norm": (
            lambda x, w: ops.rms_norm(x, (WIDTH,), w),
            lambda x, w: F.rms_norm(x, (WIDTH,), w),
            (x, weight),
        ),
        "add_rms_norm": (lambda x, y, w: ops.add_rms_norm(x, y, w, EPS), add_rms_norm, (x, y, weight)),
        "swiglu": (ops.swiglu, lambda a, b: F.silu(a) * b, (gate, up)),
        "rotary_embedding": (
            lambda q: ops.rotary_embedding(q, cos, sin),
            lambda q: q * cos + rotate_half(q) * sin,
            (q,),
        ),
        "attention, causal": (
            lambda q, k, v: ops.attention(q, k, v, **causal),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **causal),
            (q, k, v),
        ),
        "cross_entropy": (lambda x: ops.cross_entropy(x, target), lambda x: F.cross_entropy(x, target), (logits,)),
        "linear_cross_entropy, frozen weight": (
            lambda x: ops.linear_cross_entropy(x, head, target),
            lambda x: F.cross_entropy(F.linear(x, head).float(), target),
            (rows,),
        ),
    }


def work(name: str, arguments: Sequence[Tensor], dy: Any) -> Work:
    """All arguments and the output's gradient are read; the output and the arguments' gradients, as large, written."""
    moved = sum(x.nbytes for x in [*arguments, *tree_leaves(dy)])
    return Work(moved, moved, OPERATIONS.get(name, 0), str(arguments[0].dtype).removeprefix("torch."))


def measure(rounds: int, machine: Floor) -> list[dict[str, Any]]:
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for name, (ours, theirs, arguments) in pairs(dtype).items():
            leaves = [x.requires_grad_() for x in arguments]
            dy = tree_map(torch.randn_like, theirs(*leaves))

            def step(op: Callable[..., Any], leaves: list[Tensor] = leaves, dy: Any = dy) -> None:
                torch.autograd.grad(op(*leaves), leaves, dy)

            seconds = interleaved({"ours": lambda f=ours: step(f), "torch": lambda f=theirs: step(f)}, rounds)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "op": name,
                    "ours_ms": round(1e3 * statistics.median(seconds["ours"]), 4),
                    "torch_ms": round(1e3 * statistics.median(seconds["torch"]), 4),
                    "times_ours": round(ratio(seconds["torch"], seconds["ours"]), 3),
                    **machine.columns(work(name, leaves, dy), seconds["ours"]),
                }
            )
    return rows


def measure_tape(rounds: int) -> dict[str, float]:
    """Seconds of a forward and backward of the model: plain, and recorded and walked by a tape."""
    from entrenar import Tape, load_pretrained, wrap
    from examples.smollm2 import gguf_path

    model = load_pretrained(gguf_path(), bits=4)
    wrap(model)
    ids = torch.randint(1000, (BATCH, TOKENS))

    def plain() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def recorded() -> None:
        with Tape() as tape:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        tape.backward(loss)

    seconds = interleaved({"plain": plain, "recorded": recorded}, rounds)
    medians = {name: round(statistics.median(times), 3) for name, times in seconds.items()}
    return {**medians, "recorded / plain": round(ratio(seconds["recorded"], seconds["plain"]), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    machine = floor()
    rows = measure(arguments.rounds, machine)
    print_table(rows)
    tape = measure_tape(max(2, arguments.rounds // 10))
    print(tape)
    write("ops", {"rows": rows, "tape_seconds": tape, "floor": asdict(machine)})


if __name__ == "__main__":
    main()
