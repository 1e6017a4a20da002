"""Times on a GPU: CUDA graphs between events, on buffers that no cache holds from one call to the next."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

CALLS = 20  # in a graph; its launch is spread over them
ROUNDS = 15


def median_us(function: Callable[..., Any], inputs: Sequence[Sequence[Any]], rounds: int = ROUNDS) -> float:
    """The median microseconds of a call of `function` on one of the `inputs`, which take turns.

    Together the inputs should be larger than the L2 cache (see `copies`). The calls are captured in a CUDA graph: what
    is timed is the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in inputs:
            function(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    calls = max(CALLS, len(inputs))
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(*inputs[i % len(inputs)])
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def copies(arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
    """The arguments, and as many copies of their tensors as make all together at least four times the L2 cache."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    size = sum(x.nbytes for x in arguments if isinstance(x, torch.Tensor))
    count = max(1, min(16, -(-4 * l2 // max(1, size))))
    return [
        tuple(
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in arguments
        )
        for _ in range(count)
    ]


def copy_bandwidth() -> float:
    """Bytes per microsecond, read and written, of a copy of 512 MiB."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(target.copy_, [(source,)])
