"""Calls of every op that has a CUDA kernel, small but awkward, for compute-sanitizer to watch: no result is checked."""

from __future__ import annotations

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "autograd"))

from cases import CASES
from test_pointwise_kernels import KERNELS, SHAPES, arguments, restrided

from entrenar.lora import QLoRALayer
from entrenar.optim import SGD, AdamW, AdamW8bit, Lion

SAMPLES = {"one", "few rows", "odd", "sixteen rows", "batch", "deep", "sliced", "no rows"}
POINTWISE = {"one", "odd", "some vectors", "wide", "no rows"}


def call_cases() -> None:
    for case in CASES.values():
        for sample in [sample for sample in case.samples if sample in SAMPLES]:
            for dtype in (torch.float32, torch.bfloat16):
                given = list(case.arguments(sample, dtype))
                for i in case.linear_in:
                    given[i] = given[i].detach().requires_grad_()
                result = case.op(*given)
                first = result[0] if isinstance(result, tuple) else result
                if first.requires_grad:
                    torch.autograd.grad(first, [given[i] for i in case.linear_in], torch.ones_like(first))


def call_pointwise_kernels() -> None:
    """Activations, norms, rotary embedding: aligned, and one element past it."""
    for kernel in KERNELS.values():
        for shape in POINTWISE:
            for dtype in (torch.float32, torch.bfloat16):
                given = arguments(kernel, *SHAPES[shape], dtype)
                kernel.call(*given)
                kernel.call(*(restrided(x, "shifted") for x in given))


def call_optimizers() -> None:
    for kind in (AdamW, AdamW8bit, Lion, SGD):
        for dtype in (torch.float32, torch.bfloat16):
            params = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in (1, 5, 4099, 70_001)]
            for param in params:
                param.grad = torch.randn_like(param)
            kind(params, lr=1e-3, max_norm=1.0).step()


def call_layers() -> None:
    for rows, inputs, outputs, rank in ((3, 71, 53, 5), (67, 201, 139, 9)):
        layer = QLoRALayer(torch.randn(outputs, inputs), rank=rank, alpha=rank)
        for dtype in (torch.float32, torch.bfloat16):
            layer(torch.randn(rows, inputs, dtype=dtype, requires_grad=True)).sum().backward()


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    for part in (call_cases, call_pointwise_kernels, call_optimizers, call_layers):
        part()
        torch.cuda.synchronize()
        print(part.__name__, flush=True)


if __name__ == "__main__":
    main()
