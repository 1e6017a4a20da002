"""Walking a part of torch's graph, node by node: what the gradients at some edges become at others."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Edge: TypeAlias = tuple[Any, int]
"""A node of the graph, and which of its gradients: where the gradient of a tensor arrives."""
Gradients: TypeAlias = dict[Edge, Tensor]


def edge_of(tensor: Tensor) -> Edge:
    """The edge at which the gradient of `tensor` arrives.

    Where the tensor's node is a function written in Python, it can be walked from only as long as the tensor lives: the
    edge does not own the node.
    """
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def accumulate(gradients: Gradients, more: Gradients) -> None:
    """Add the gradients in `more` to those in `gradients`, edge by edge."""
    for edge, gradient in more.items():
        gradients[edge] = gradients[edge] + gradient if edge in gradients else gradient


def walk(incoming: Gradients, stops: Set[Edge]) -> Gradients:
    """Carry the gradients `incoming` backwards as far as the edges `stops` and the leaves.

    The nodes between run in the reverse order of their recording, each once, like in torch's engine.
    """
    arrived: Gradients = {}
    waiting: dict[Any, Gradients] = {}
    for edge, gradient in incoming.items():
        waiting.setdefault(edge[0], {})[edge] = gradient
    while waiting:
        node = max(waiting, key=lambda node: node._sequence_nr())
        for edge, gradient in _run(node, waiting.pop(node)).items():
            ends = edge in stops or hasattr(edge[0], "variable")
            accumulate(arrived if ends else waiting.setdefault(edge[0], {}), {edge: gradient})
    return arrived


def deliver(edge: Edge, gradient: Tensor) -> None:
    """Add a gradient to the leaf at the end of its edge; or have torch's engine carry it on from there."""
    leaf = getattr(edge[0], "variable", None)
    if not isinstance(leaf, Tensor):
        torch.autograd.backward([GradientEdge(*edge)], [gradient], retain_graph=True)
    elif leaf.grad is None:
        leaf.grad = gradient.clone()
    else:
        leaf.grad += gradient


def _run(node: Any, gradients: Gradients) -> Gradients:
    outputs = [gradients.get((node, i)) for i in range(len(node._input_metadata))]
    if hasattr(node, "needs_input_grad"):
        # A function written in Python: torch's engine gives it zeros for what nothing depends on.
        outputs = [_zeros(meta) if g is None else g for g, meta in zip(outputs, node._input_metadata, strict=True)]
        results = node.apply(*outputs)
        results = results if isinstance(results, tuple) else (results,)
        # The arguments of the forward that are no tensors have a result, but no edge. For those that were left out as
        # they have their defaults, there may be results too many.
        results = [g for g, needed in zip(results, node.needs_input_grad, strict=False) if needed]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
    else:
        results = node(*outputs)
        results = results if isinstance(results, tuple) else (results,)
        edges = list(node.next_functions)
    flowing: Gradients = {}
    for edge, gradient in zip(edges, results, strict=True):
        if edge[0] is not None and gradient is not None:
            accumulate(flowing, {edge: _fit(gradient, edge[0]._input_metadata[edge[1]])})
    return flowing


def _zeros(metadata: Any) -> Tensor:
    return torch.zeros(metadata.shape, dtype=metadata.dtype, device=metadata.device)


def _fit(gradient: Tensor, metadata: Any) -> Tensor:
    """The gradient in the shape and dtype that it arrives with: formulas may leave broadcasting and casts to torch."""
    if gradient.shape != metadata.shape:
        gradient = gradient.sum_to_size(metadata.shape)
    return gradient.to(metadata.dtype)
