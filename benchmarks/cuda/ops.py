"""Our memory-bound operations on a GPU beside torch's and Liger's, at the shapes of a model of 7B parameters.

bfloat16, 2048 tokens. of_floor is the least time that the bytes take which must be moved, at the rate of a copy in the
same run, over the contender's time; times_ours is the contender's time over ours. Liger's cross entropies write
over the logits.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.cuda.timing import copies_beyond_cache, floor, floor_us, interleaved, write
from benchmarks.harness import print_table
from entrenar.autograd import ops

TOKENS, WIDTH, INNER, HEADS, HEAD, CLASSES = 2048, 4096, 11008, 32, 128, 32000
EPS = 1e-5
ROUNDS = 9

Op = Callable[..., Any]


def randn(*shape: int, grad: bool = True) -> Tensor:
    """Random numbers, drawn on the CPU: a capture that fails leaves a GPU's generator unusable."""
    return torch.randn(shape).to("cuda", torch.bfloat16).requires_grad_(grad)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def add_then_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, F.rms_norm(total, (WIDTH,), weight, EPS)


def head_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), target)


def cases() -> dict[str, tuple[dict[str, Op], tuple[Any, ...]]]:
    """For each operation its contenders, and arguments, of which some require gradients."""
    x, gate, up = randn(TOKENS, WIDTH), randn(TOKENS, INNER), randn(TOKENS, INNER)
    # As attention gets it: a transpose of [1, tokens, heads, head].
    q = randn(1, TOKENS, HEADS, HEAD, grad=False).transpose(1, 2).requires_grad_()
    cos, sin = randn(1, 1, TOKENS, HEAD, grad=False), randn(1, 1, TOKENS, HEAD, grad=False)
    target = torch.randint(CLASSES, (TOKENS,)).cuda()
    frozen, weight = randn(WIDTH, grad=False), randn(WIDTH)
    shape = (WIDTH,)
    found: dict[str, tuple[dict[str, Op], tuple[Any, ...]]] = {
        "silu": ({"ours": ops.silu, "torch": F.silu}, (gate,)),
        "gelu": ({"ours": ops.gelu, "torch": F.gelu}, (gate,)),
        "swiglu": ({"ours": ops.swiglu, "torch": lambda gate, up: F.silu(gate) * up}, (gate, up)),
        "softmax": (
            {"ours": lambda x: ops.softmax(x, -1), "torch": lambda x: x.softmax(-1)},
            (randn(8, TOKENS, TOKENS),),
        ),
        "layer_norm": (
            {
                "ours": lambda x, w, b: ops.layer_norm(x, shape, w, b),
                "torch": lambda x, w, b: F.layer_norm(x, shape, w, b),
            },
            (x, weight, randn(WIDTH)),
        ),
        "add_rms_norm, frozen weight": (
            {"ours": lambda x, y, w: ops.add_rms_norm(x, y, w, EPS), "torch": add_then_norm},
            (x, randn(TOKENS, WIDTH), frozen),
        ),
        "rotary_embedding": ({"ours": ops.rotary_embedding, "torch": rotate}, (q, cos, sin)),
        "cross_entropy": (
            {"ours": ops.cross_entropy, "torch": F.cross_entropy},
            (randn(TOKENS, CLASSES), target),
        ),
        "linear_cross_entropy, frozen weight": (
            {"ours": ops.linear_cross_entropy, "torch": head_loss},
            (x, randn(CLASSES, WIDTH, grad=False), target),
        ),
    }
    for name, w in (("rms_norm", weight), ("rms_norm, frozen weight", frozen)):
        found[name] = (
            {"ours": lambda x, w: ops.rms_norm(x, shape, w, EPS), "torch": lambda x, w: F.rms_norm(x, shape, w, EPS)},
            (x, w),
        )
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import functional as liger

        found["swiglu"][0]["Liger"] = liger.liger_swiglu
        found["rms_norm"][0]["Liger"] = functools.partial(liger.liger_rms_norm, eps=EPS, in_place=False)
        found["cross_entropy"][0]["Liger"] = liger.liger_cross_entropy
        found["linear_cross_entropy, frozen weight"][0]["Liger"] = liger.liger_fused_linear_cross_entropy
    return found


def differentiable(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [x for x in arguments if x.requires_grad]


def bytes_of(*tensors: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(tensors))


def copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def backward(op: Op, arguments: tuple[Any, ...], dy: Any) -> None:
    torch.autograd.grad(op(*arguments), differentiable(arguments), dy)


def measure(name: str, contenders: dict[str, Op], arguments: tuple[Any, ...], machine: Any) -> list[dict[str, Any]]:
    count = min(8, copies_beyond_cache(bytes_of(arguments)))
    inputs = [arguments, *(tuple(map(copied, arguments)) for _ in range(count - 1))]
    with torch.no_grad():  # a graph that lives on would tie its leaves to another stream than that of the capture
        y = contenders["torch"](*arguments)
    dy = tree_map(lambda x: torch.randn(x.shape).to(x), y)
    forward = bytes_of(arguments, y)
    # The forward's bytes once, dy and what the forward was given or made once more, and the gradients.
    both = forward + bytes_of(dy, arguments, differentiable(arguments))
    products = 2 * arguments[0].numel() * CLASSES if name.startswith("linear") else 0

    def with_no_grad(op: Op, i: int) -> None:
        with torch.no_grad():
            op(*inputs[i])

    steps = {
        "forward": ({key: functools.partial(with_no_grad, op) for key, op in contenders.items()}, forward, products),
        "forward + backward": (
            {key: functools.partial(lambda op, i: backward(op, inputs[i], dy), op) for key, op in contenders.items()},
            both,
            2 * products,
        ),
    }
    rows = []
    for step, (calls, moved, operations) in steps.items():
        times = interleaved(calls, count, ROUNDS)
        least = floor_us(machine, moved, operations)
        for contender, figures in times.items():
            row = {"op": name, "step": step, "contender": contender, **figures}
            row["times_ours"] = round(figures["median_us"] / times["ours"]["median_us"], 3)
            rows.append(row | {"of_floor": round(least / figures["median_us"], 3)})
    return rows


def main() -> None:
    torch.manual_seed(0)
    machine = floor()
    rows: list[dict[str, Any]] = []
    for name, (contenders, arguments) in cases().items():
        rows += measure(name, contenders, arguments, machine)
    write("ops", {"tokens": TOKENS, "floor": machine, "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    main()
