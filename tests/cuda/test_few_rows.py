"""The products of few rows are launched before the kernel before them has ended, and read nothing until it has."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd.ops import int4_linear, int4_quantize


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 8])
def test_what_comes_before_and_after_them_in_a_graph_keeps_its_order(rows):
    torch.set_default_device("cuda")
    weights = [int4_quantize(torch.randn(2048, 2048) / 64) for _ in range(3)]
    source = torch.empty(rows, 2048, dtype=torch.bfloat16)
    x, result, other = torch.empty_like(source), torch.empty_like(source), torch.cuda.Stream()

    def step():
        x.copy_(source)
        y = int4_linear(x, *weights[0])
        x.zero_()  # which that product has read
        z = int4_linear(y, *weights[1])
        y.zero_()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            weights[2][0].copy_(weights[1][0].flip(0))
        torch.cuda.current_stream().wait_stream(other)
        leaf = z.detach().requires_grad_()
        (dx,) = torch.autograd.grad(int4_linear(leaf, *weights[2]), leaf, z)
        result.copy_(dx)

    def eager():
        y = int4_linear(source.clone(), *weights[0])
        torch.cuda.synchronize()
        z = int4_linear(y, *weights[1])
        torch.cuda.synchronize()
        flipped = weights[1][0].flip(0)
        torch.cuda.synchronize()
        leaf = z.detach().requires_grad_()
        return torch.autograd.grad(int4_linear(leaf, flipped, weights[2][1]), leaf, z)[0]

    source.normal_()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(20):
        source.normal_()
        weights[2][0].zero_()
        graph.replay()
        assert torch.equal(result, eager())
