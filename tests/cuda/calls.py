"""Calls of every op that has a CUDA kernel, small but awkward, with all their results.

`python calls.py LIBRARY` prints a digest of each call's, by the kernels of an emulated CUDA library.
"""

from __future__ import annotations

import hashlib
import pathlib
import sys
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "autograd"))

from cases import CASES
from lora_linears import make
from test_pointwise_kernels import KERNELS, SHAPES, arguments, restrided

from entrenar.autograd.ops import int4_lora_linears, swiglu_int4_lora_linear
from entrenar.lora import QLoRALayer
from entrenar.optim import SGD, AdamW, AdamW8bit, Lion

Call = tuple[str, list[Tensor]]

SAMPLES = {"one", "few rows", "odd", "sixteen rows", "batch", "deep", "sliced", "no rows"}
POINTWISE = ("one", "odd", "some vectors", "wide", "no rows")
DTYPES = (torch.float32, torch.bfloat16)
# Rows, inputs, outputs, rank. Hopper's own product takes the last two, and cuts the contraction of one in its forward,
# that of the other in its gradient.
LAYERS = ((3, 71, 53, 5), (67, 201, 139, 9), (41, 1024, 64, 8), (41, 64, 1024, 8))


def tensors(result: object) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, Tensor)]


def call_cases() -> Iterator[Call]:
    return _call_cases(name for name in CASES if "linear" not in name)


def call_products() -> Iterator[Call]:
    """Some of them are cuBLAS's."""
    return _call_cases(name for name in CASES if "linear" in name)


def _call_cases(names: Iterable[str]) -> Iterator[Call]:
    for name in names:
        case = CASES[name]
        for sample in [sample for sample in case.samples if sample in SAMPLES]:
            for dtype in DTYPES:
                given = list(case.arguments(sample, dtype))
                for i in case.linear_in:
                    given[i] = given[i].detach().requires_grad_()
                found = tensors(case.op(*given))
                if found[0].requires_grad:
                    leaves = [given[i] for i in case.linear_in]
                    found += torch.autograd.grad(found[0], leaves, torch.randn_like(found[0]))
                yield f"{name}, {sample}, {dtype}", found


def call_few_rows() -> Iterator[Call]:
    """So few that a block has all columns of W, in as many warps as there can be: more are a cluster's."""
    for block in (32, 64):
        codes, scales = torch.ops.entrenar.int4_quantize(torch.randn(70, 1100), block, torch.float16, False)
        for rows, dtype in ((1, torch.float32), (3, torch.bfloat16)):
            x, bias = torch.randn(rows, 1100, dtype=dtype), torch.randn(70)
            y = torch.ops.entrenar.int4_linear(x, codes, scales, bias, block, False)
            yield f"int4_linear, {rows} rows, blocks of {block}, {dtype}", [y]


def call_pointwise_kernels() -> Iterator[Call]:
    """Activations, norms, rotary embedding: aligned, and one element past it."""
    for name, kernel in KERNELS.items():
        for shape in POINTWISE:
            for dtype in DTYPES:
                given = arguments(kernel, *SHAPES[shape], dtype)
                yield f"{name}, {shape}, {dtype}", tensors(kernel.call(*given))
                shifted = [restrided(x, "shifted") for x in given]
                yield f"{name}, {shape}, {dtype}, shifted", tensors(kernel.call(*shifted))


def call_losses_in_place() -> Iterator[Call]:
    for dtype in DTYPES:
        logits, target, ignore_index = CASES["cross_entropy_losses"].arguments("batch", dtype)
        losses = torch.ops.entrenar.cross_entropy_gradient_(logits, target, ignore_index)
        yield f"cross_entropy_gradient_, {dtype}", [losses, logits]


def call_optimizers() -> Iterator[Call]:
    for kind in (AdamW, AdamW8bit, Lion, SGD):
        for dtype in DTYPES:
            params = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in (1, 5, 4099, 70_001)]
            optimizer = kind(params, lr=1e-3, max_norm=1.0)
            for _ in range(2):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            states = [state for param in params for state in optimizer.state[param].values()]
            yield f"{kind.__name__}, {dtype}", [*params, *tensors(states)]


def call_layers() -> Iterator[Call]:
    for rows, inputs, outputs, rank in LAYERS:
        layer = QLoRALayer(torch.randn(outputs, inputs), rank=rank, alpha=rank)
        torch.nn.init.normal_(layer.lora_B)
        for dtype in DTYPES:
            x = torch.randn(rows, inputs, dtype=dtype, requires_grad=True)
            y = layer(x)
            leaves = [x, layer.lora_A, layer.lora_B]
            gradients = torch.autograd.grad(y, leaves, torch.randn_like(y))
            yield f"QLoRALayer {rows}, {inputs}, {outputs}, {rank}, {dtype}", [y, *gradients]


def call_layers_at_one_x() -> Iterator[Call]:
    codes, scales, bias, lora_A, lora_B = make(80, (24, 8, 40), (4, 1, 3), (True, False, True))
    for dtype in DTYPES:
        x = torch.randn(13, 80, dtype=dtype, requires_grad=True)
        ys = int4_lora_linears(x, codes, scales, bias, lora_A, lora_B, 0.5)
        gradients = torch.autograd.grad(ys, [x, *lora_A, *lora_B], [torch.randn_like(y) for y in ys])
        yield f"int4_lora_linears, {dtype}", [*ys, *gradients]


def call_layers_after_swiglu() -> Iterator[Call]:
    (codes,), (scales,), (bias,), (lora_A,), (lora_B,) = make(80, (24,), (4,), (True,))
    for dtype in DTYPES:
        gate, up = (torch.randn(13, 80, dtype=dtype, requires_grad=True) for _ in range(2))
        y = swiglu_int4_lora_linear(gate, up, codes, scales, bias, lora_A, lora_B, 0.5)
        gradients = torch.autograd.grad(y, [gate, up, lora_A, lora_B], torch.randn_like(y))
        yield f"swiglu_int4_lora_linear, {dtype}", [y, *gradients]


PARTS = (
    call_cases,
    call_products,
    call_few_rows,
    call_pointwise_kernels,
    call_losses_in_place,
    call_optimizers,
    call_layers_at_one_x,
    call_layers_after_swiglu,
    call_layers,
)


def digests(calls: Iterable[Call]) -> Iterator[str]:
    """A line for each call: its name, and a hash of the bits of its results."""
    for name, results in calls:
        bits = hashlib.sha256()
        for result in results:
            bits.update(result.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        yield f"{name}: {bits.hexdigest()}"


def all_digests() -> Iterator[str]:
    torch.manual_seed(0)
    for part in PARTS:
        yield from digests(part())


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that kernels are registered again
        torch.ops.load_library(sys.argv[1])
    for line in all_digests():
        print(line)
