"""torch.compile of operations: given one tensor twice, and by a compiler that they are not tested with."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd import ops
from entrenar.autograd.ops import _override

FUNCTIONS = {
    "square": lambda x: ops.mul(x, x),
    "sum": lambda x: ops.add(ops.exp(x), other=ops.exp(x)) + ops.sub(input=x, other=x, alpha=3),
    "gram": lambda x: ops.matmul(x, x),
    "gate": lambda x: ops.swiglu(x, x),
    "list": lambda x: ops.cat([x, x, ops.cat((x, x), 1).sum(1, keepdim=True).expand_as(x)]),
    "keywords": lambda x: ops.mse_loss(input=x, target=x, weight=x),
    "attention": lambda x: ops.scaled_dot_product_attention(x, x, x),
}


# Torch's compiler makes an object of a class that torch itself warns against making.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_graph_breaks(name):
    function, x = FUNCTIONS[name], torch.randn(4, 4, requires_grad=True)
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.sin().sum(), x)))
    torch.testing.assert_close(*results)


def test_an_older_compiler_goes_around(monkeypatch):
    monkeypatch.setattr(_override, "COMPILES", False)
    runs = []

    @_override.overridable
    def double(x):
        runs.append(torch.compiler.is_compiling())
        return 2 * x

    x = torch.randn(4)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"compiles with torch 2\.13 or later"):
        torch.compile(lambda x: double(x).sin(), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(torch.compile(lambda x: double(x).sin(), backend="aot_eager")(x), (2 * x).sin())
    assert runs == [False]
