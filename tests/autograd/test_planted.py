"""A wrong gradient of any operation is caught: each formula is spoiled in turn, and check_gradient must name it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

from entrenar.autograd import ops
from entrenar.autograd.gradcheck import GradientError, check_gradient
from entrenar.autograd.ops._function import Function

X = torch.tensor([[0.5, -1.2, 2.0], [1.5, 0.3, -0.7]])
POSITIVE = X.abs() + 0.5
BOTH = [X, POSITIVE.flip(0)]
QKV = [torch.linspace(-1, 1, 24).view(1, 2, 3, 4).roll(i, -1) for i in range(3)]
CLASSES = torch.tensor([0, 2])

# What is differentiated, and at which inputs, for the Function of each operation.
CASES = {
    "AddFunction": (ops.add, BOTH),
    "AddRMSNormFunction": (lambda x, y, w: ops.cat(ops.add_rms_norm(x, y, w)), [*BOTH, POSITIVE[0]]),
    "SubFunction": (ops.sub, BOTH),
    "MulFunction": (ops.mul, BOTH),
    "DivFunction": (ops.div, BOTH),
    "NegFunction": (ops.neg, X),
    "PowFunction": (ops.pow, [POSITIVE, X]),
    "ExpFunction": (ops.exp, X),
    "LogFunction": (ops.log, POSITIVE),
    "SqrtFunction": (ops.sqrt, POSITIVE),
    "SumFunction": (lambda x: ops.sum(x, 1), X),
    "MeanFunction": (lambda x: ops.mean(x, 1), X),
    "ReshapeFunction": (lambda x: ops.reshape(x, (3, 2)), X),
    "TransposeFunction": (lambda x: ops.transpose(x, 0, 1), X),
    "PermuteFunction": (lambda x: ops.permute(x, (1, 0)), X),
    "ExpandFunction": (lambda x: ops.expand(x, (4, 2, 3)), X),
    "CatFunction": (lambda x, y: ops.cat([x, y], 1), BOTH),
    "SliceFunction": (lambda x: ops.getitem(x, (slice(None), slice(1, 3))), X),
    "IndexFunction": (lambda x: ops.getitem(x, torch.tensor([1, 1, 0])), X),
    "MatmulFunction": (ops.matmul, [X, X.T + 1]),
    "LinearFunction": (ops.linear, [X, POSITIVE]),
    "ReluFunction": (ops.relu, X),
    "GeluFunction": (ops.gelu, X),
    "SiluFunction": (ops.silu, X),
    "SigmoidFunction": (ops.sigmoid, X),
    "TanhFunction": (ops.tanh, X),
    "SoftmaxFunction": (lambda x: ops.softmax(x, -1), X),
    "LogSoftmaxFunction": (lambda x: ops.log_softmax(x, -1), X),
    "HeadCrossEntropyFunction": (lambda x: ops.head_cross_entropy(torch.nn.Tanh(), x, CLASSES, 3), X),
    "CrossEntropyFunction": (lambda x: ops.cross_entropy(x, CLASSES), X),
    "ProbabilityCrossEntropyFunction": (lambda x, p: ops.cross_entropy(x, p), BOTH),
    "MSELossFunction": (ops.mse_loss, BOTH),
    "LayerNormFunction": (lambda x, w: ops.layer_norm(x, (3,), w), [X, POSITIVE[0]]),
    "RMSNormFunction": (lambda x, w: ops.rms_norm(x, (3,), w), [X, POSITIVE[0]]),
    "AttentionFunction": (lambda q, k, v: ops.attention(q, k, v, is_causal=True), QKV),
    "EmbeddingFunction": (lambda w: ops.embedding(torch.tensor([1, 0, 1]), w), X),
    "DropoutFunction": (lambda x: ops.dropout(x, 0.5), X),
    "RotaryEmbeddingFunction": (ops.rotary_embedding, [QKV[0], QKV[1][0, 0], QKV[2][0, 0]]),
    "SwiGLUFunction": (ops.swiglu, BOTH),
}
# Operations with int4 weights are linear in each input: any step will do, and float32 is what they have.
LINEAR = {"eps": 0.5, "threshold": 1e-3, "dtype": torch.float32}
PACKED = ops.int4_quantize(torch.linspace(-1, 1, 40).view(4, 10))
# The operators of our own, whose gradient torch keeps.
KERNEL_CASES = {
    "Int4LinearDxFunction": (
        lambda dy: torch.ops.entrenar.int4_linear_dx(dy, *PACKED, 10, 64),
        torch.linspace(-1, 1, 8).view(2, 4),
        LINEAR,
    ),
    "LinearCrossEntropyFunction": (
        lambda x, w: ops.linear_cross_entropy(x, w, CLASSES),
        [X, POSITIVE.repeat(2, 1)],
        {},
    ),
}


# The Functions that stand for a kernel alone, which knows no float64.
FLOAT32_CASES = {
    "Int4LinearFunction": (lambda x: ops.int4_linear(x, *PACKED), torch.linspace(-1, 1, 20).view(2, 10), LINEAR),
    "Int4LoRALinearFunction": (
        lambda x, a, b: ops.int4_lora_linear(x, *PACKED, None, a, b, 0.5),
        [
            torch.linspace(-1, 1, 20).view(2, 10),
            torch.linspace(0, 1, 20).view(2, 10),
            torch.linspace(1, 2, 8).view(4, 2),
        ],
        LINEAR,
    ),
    "Int4LoRALinearsFunction": (
        lambda x, a, b: torch.cat(ops.int4_lora_linears(x, *([each] * 2 for each in (*PACKED, None, a, b)), 0.5)),
        [
            torch.linspace(-1, 1, 20).view(2, 10),
            torch.linspace(0, 1, 20).view(2, 10),
            torch.linspace(1, 2, 8).view(4, 2),
        ],
        LINEAR,
    ),
    "SwiGLUInt4LoRALinearFunction": (
        lambda gate, up, a, b: ops.swiglu_int4_lora_linear(gate, up, *PACKED, None, a, b, 0.5),
        [
            torch.linspace(-1, 1, 20).view(2, 10),
            torch.linspace(1, 2, 20).view(2, 10),
            torch.linspace(0, 1, 20).view(2, 10),
            torch.linspace(1, 2, 8).view(4, 2),
        ],
        {"eps": 1e-2, "threshold": 2e-3, "dtype": torch.float32},
    ),
    "PackedAttentionFunction": (
        lambda q, k, v: ops.packed_attention(q, k, v, torch.tensor([0, 1, 3])),
        QKV,
        {"eps": 1e-2, "threshold": 2e-3, "dtype": torch.float32},
    ),
}


def functions() -> dict[str, type[torch.autograd.Function]]:
    """Every Function that an operation is made of, by name."""
    names = [m.name for m in pkgutil.iter_modules(ops.__path__) if m.name != "_function"]
    modules = [importlib.import_module(f"{ops.__name__}.{name}") for name in names]
    classes = [c for m in modules for _, c in inspect.getmembers(m, inspect.isclass) if c.__module__ == m.__name__]
    return {c.__name__: c for c in classes if issubclass(c, Function) and c is not Function}


def spoil(gradient):
    return gradient * 1.01 if isinstance(gradient, torch.Tensor) else gradient


def test_every_operation_has_a_case():
    assert functions().keys() == {*CASES, *KERNEL_CASES, *FLOAT32_CASES}


@pytest.mark.parametrize("name", [*CASES, *FLOAT32_CASES])
def test_planted_error_is_caught(name, monkeypatch):
    fn, inputs, settings = FLOAT32_CASES[name] if name in FLOAT32_CASES else (*CASES[name], {})
    report = check_gradient(fn, inputs, **settings)
    assert report.ok
    function = functions()[name]
    right = function.backward

    @staticmethod
    def wrong(ctx, *gradients):
        result = right(ctx, *gradients)
        return tuple(map(spoil, result)) if isinstance(result, tuple) else spoil(result)

    monkeypatch.setattr(function, "backward", wrong)
    with pytest.raises(GradientError, match=r"the gradient is wrong at input \d"):
        check_gradient(fn, inputs, **settings)


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_planted_error_of_a_kernel_op_is_caught(name):
    fn, inputs, settings = KERNEL_CASES[name]
    assert check_gradient(fn, inputs, **settings).ok

    class Spoiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.01

    with pytest.raises(GradientError, match=r"the gradient is wrong at input \d"):
        check_gradient(lambda *xs: Spoiled.apply(fn(*xs)), inputs, **settings)
