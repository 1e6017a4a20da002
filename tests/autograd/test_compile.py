"""torch.compile of operations: given one tensor twice, and by a compiler that does not look into them."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd import ops
from entrenar.autograd.ops import _override
from entrenar.autograd.ops._function import Function

# Torch's compiler makes an object of a class that torch itself warns against making.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

FUNCTIONS = {
    "square": lambda x: ops.mul(x, x),
    "sum": lambda x: ops.add(ops.exp(x), other=ops.exp(x)) + ops.sub(input=x, other=x, alpha=3),
    "gram": lambda x: ops.matmul(x, x),
    "gate": lambda x: ops.swiglu(x, x),
    "list": lambda x: ops.cat([x, x, ops.cat((x, x), 1).sum(1, keepdim=True).expand_as(x)]),
    "keywords": lambda x: ops.mse_loss(input=x, target=x, weight=x),
    "attention": lambda x: ops.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_graph_breaks(name):
    function, x = FUNCTIONS[name], torch.randn(4, 4, requires_grad=True)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results)


# After the break torch's compiler looks for the gradients of results.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_dropout_breaks_the_graph():
    args, results = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)], []
    for f in (ops.attention, torch.compile(ops.attention, backend="aot_eager")):
        torch.manual_seed(1)
        y = f(*args, dropout_p=0.5)
        results.append((y, *torch.autograd.grad(y.sin().sum(), args)))
    torch.testing.assert_close(*results)


class Double(Function):
    """An output that its Function also has under another name."""

    @staticmethod
    def forward(x):
        y = 2 * x
        return y.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_an_older_compiler_takes_operations_whole(monkeypatch):
    monkeypatch.setattr(_override, "TRACED", False)
    called = []

    @_override.overridable
    def double(x):
        return Double.apply(x)

    def backend(graph, inputs):
        called.extend(node.target.__name__ for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.randn(4, requires_grad=True)
    y = torch.compile(lambda x: double(x).sin(), fullgraph=True, backend=backend)(x)
    assert called == ["double"]
    assert torch.equal(y, (2 * x).sin())
    assert torch.equal(*torch.autograd.grad(y.sum(), x), 2 * (2 * x).cos())


def test_an_older_compiler_knows_operations_apart(monkeypatch):
    monkeypatch.setattr(_override, "TRACED", False)
    x = torch.randn(4)
    for op in (lambda x: x.sin(), lambda x: x.cos()):
        compiled = torch.compile(_override.overridable(op), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), op(x))


def test_an_older_compiler_leaves_alone_what_reads_a_value(monkeypatch):
    monkeypatch.setattr(_override, "TRACED", False)
    runs = []

    def within(x):
        runs.append(torch.compiler.is_compiling())
        return Double.apply(x)

    @_override.overridable
    def six_times(x):
        return within(x) * int(torch.ones(3).sum())

    x = torch.randn(4, requires_grad=True)
    y = torch.compile(six_times, backend="aot_eager")(x)
    assert torch.equal(y, 6 * x)
    assert torch.equal(*torch.autograd.grad(y.sum(), x), torch.full((4,), 6.0))
    assert not runs[-1]
