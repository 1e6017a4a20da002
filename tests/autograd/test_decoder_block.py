"""A block of a decoder made of our ops: compiled, under autocast, checkpointed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from entrenar.autograd import ops
from entrenar.autograd.ops.rotary import rotary_embedding_reference

HEADS, COLUMNS = 2, 8


class Torch:
    """Torch's ops under the names of ours."""

    embedding, layer_norm, rms_norm = map(staticmethod, (F.embedding, F.layer_norm, F.rms_norm))
    linear, attention, dropout = map(staticmethod, (F.linear, F.scaled_dot_product_attention, F.dropout))
    rotary_embedding = staticmethod(rotary_embedding_reference)

    @staticmethod
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


def parameters() -> list[Tensor]:
    width = HEADS * COLUMNS
    shapes = [(11, width), (width,), (2 * width, width), (width,), (2 * width, width), (width, 2 * width)]
    return [torch.randn(shape).div(4).requires_grad_() for shape in shapes]


def block(ops, tokens, table, norm1, w_qkv, norm2, w_up, w_down, dropout_p=0.0):
    width = table.shape[1]
    # A checkpoint's backward runs in a thread of torch's own, which knows no default device.
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    angles = torch.outer(positions, torch.arange(COLUMNS // 2, device=tokens.device) + 1.0).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    x = ops.embedding(tokens, table)
    h = ops.linear(ops.rms_norm(x, (width,), norm1, 1e-5), w_qkv)
    q, k, v = h.view(*tokens.shape, 2 * HEADS, COLUMNS).transpose(1, 2).split([HEADS, HEADS // 2, HEADS // 2], dim=1)
    q, k = (ops.rotary_embedding(x, cos, sin).to(v.dtype) for x in (q, k))
    y = ops.attention(q, k, v, dropout_p=dropout_p, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    x = x + ops.dropout(y, dropout_p)
    up = ops.linear(ops.layer_norm(x, (width,), norm2), w_up)
    return x + ops.linear(ops.swiglu(up, up.flip(-1)), w_down)


@pytest.fixture
def inputs():
    return torch.randint(11, (2, 5)), *parameters()


def gradients(loss, inputs):
    return torch.autograd.grad(loss.square().sum(), inputs[1:])


def test_equals_torchs_ops(inputs):
    ours, theirs = (block(which, *inputs) for which in (ops, Torch))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, inputs), gradients(theirs, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_autocast_gives_torchs_dtypes(inputs):
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        ours, theirs = (block(which, *inputs) for which in (ops, Torch))
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for a, b in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 0.02 * b.norm()


# Torch's compiler makes an object of a class that torch itself warns against making.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_without_graph_breaks(inputs):
    def ours(*inputs):
        return block(ops, *inputs)

    compiled, eager = torch.compile(ours, fullgraph=True, backend="aot_eager")(*inputs), ours(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, inputs), gradients(eager, inputs))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_repeats_the_dropout(inputs, reentrant):
    results = []
    for run in (block, lambda *inputs: checkpoint(block, *inputs, use_reentrant=reentrant)):
        torch.manual_seed(1)
        y = run(ops, *inputs, 0.3)
        y.square().sum().backward()
        results.append((y, *(p.grad for p in inputs[1:])))
        for p in inputs[1:]:
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
