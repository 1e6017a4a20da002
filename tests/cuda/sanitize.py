"""Calls of every op that has a CUDA kernel, small but awkward, for compute-sanitizer to watch: no result is checked."""

from __future__ import annotations

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from cases import CASES

SAMPLES = {"one", "few rows", "odd", "sixteen rows", "batch", "deep", "sliced", "no rows"}


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    calls, missing = 0, []
    for name, case in CASES.items():
        for sample in [sample for sample in case.samples if sample in SAMPLES]:
            for dtype in (torch.float32, torch.bfloat16):
                arguments = list(case.arguments(sample, dtype))
                for i in case.linear_in:
                    arguments[i] = arguments[i].detach().requires_grad_()
                try:
                    result = case.op(*arguments)
                except NotImplementedError:
                    missing.append(name)
                    continue
                first = result[0] if isinstance(result, tuple) else result
                if first.requires_grad:
                    torch.autograd.grad(first, [arguments[i] for i in case.linear_in], torch.ones_like(first))
                calls += 1
    torch.cuda.synchronize()
    print(f"{calls} calls; without a kernel on CUDA: {', '.join(sorted(set(missing))) or 'none'}")


if __name__ == "__main__":
    main()
