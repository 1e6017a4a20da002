"""The walk along torch's graph, apart from tapes."""

from __future__ import annotations

import torch

from entrenar.autograd.tape import Tape
from entrenar.autograd.tensor import Tensor
from entrenar.autograd.walk import edge_of, walk


def test_gradients_add_up_from_one_walk_to_the_next():
    x = torch.tensor([2.0], requires_grad=True)
    with Tape() as tape:
        y = x * x
    tape.backward(y)
    tape.backward(y, torch.tensor([10.0]))
    assert x.grad.tolist() == [44.0]


class Counted(torch.autograd.Function):
    """2x, which counts its backward calls."""

    @staticmethod
    def forward(ctx, x, calls):
        ctx.calls = calls
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        ctx.calls.append(dy.tolist())
        return 2 * dy, None


def test_each_node_runs_once_after_all_that_came_later():
    calls = []
    x = torch.ones(1, requires_grad=True)
    h = Counted.apply(x, calls)
    y = h + (h * 3).neg().neg()
    arrived = walk({edge_of(y): torch.ones(1)}, set())
    assert calls == [[4.0]]
    assert [g.tolist() for g in arrived.values()] == [[8.0]]


class Pair(torch.autograd.Function):
    """x and 3x."""

    @staticmethod
    def forward(ctx, x):
        return x.clone(), 3 * x

    @staticmethod
    def backward(ctx, first, second):
        assert second.dtype == first.dtype
        return first + 3 * second


def test_an_output_that_nothing_depends_on_has_gradient_zero():
    x = torch.ones(2, dtype=torch.float64, requires_grad=True)
    y, _ = Pair.apply(x)
    arrived = walk({edge_of(y): torch.full_like(x, 5.0)}, set())
    assert [g.tolist() for g in arrived.values()] == [[5.0, 5.0]]


def test_gradients_of_outputs_are_on_their_device():
    x = torch.ones(2, device="meta", requires_grad=True)
    y, _ = Pair.apply(x)
    arrived = walk({edge_of(y): torch.ones(2, device="meta")}, set())
    assert [g.device.type for g in arrived.values()] == ["meta"]


class Silent(torch.autograd.Function):
    """x y, which gives no gradient for y."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x * y

    @staticmethod
    def backward(ctx, dy):
        return dy * ctx.saved_tensors[0], None


def test_a_gradient_that_a_function_leaves_out_does_not_arrive():
    x, y = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    z = Silent.apply(x, y)
    arrived = walk({edge_of(z): torch.ones(2)}, set())
    assert {edge: g.tolist() for edge, g in arrived.items()} == {edge_of(x): [3.0, 3.0]}


class Careless(torch.autograd.Function):
    """x + y, whose gradient leaves broadcasting and casts to torch."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, dy):
        return dy.double(), dy.double()


def test_gradients_arrive_in_the_shape_and_dtype_of_their_tensors():
    x, y = torch.ones(4, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    z = Careless.apply(x, y)
    arrived = walk({edge_of(z): torch.ones(4, 3)}, set())
    assert arrived[edge_of(x)].shape == (4, 3)
    assert arrived[edge_of(y)].tolist() == [[4.0, 4.0, 4.0]]
    assert {g.dtype for g in arrived.values()} == {torch.float32}


def test_the_walk_ends_at_its_stops():
    x = torch.ones(2, requires_grad=True)
    h = x * 3
    stop = edge_of(h)
    assert walk({edge_of(h.exp().log()): torch.ones(2)}, {stop}).keys() == {stop}


def test_tensors_are_float32_and_without_a_gradient_unless_told():
    assert Tensor.from_vec([1, 2]).dtype == torch.float32
    for make in (Tensor.zeros, Tensor.ones, Tensor.randn):
        assert not make(2).requires_grad
