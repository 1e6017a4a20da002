"""linear_cross_entropy and head_cross_entropy against whole logits in plain torch."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import weakref

import pytest
import torch
from float64 import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import DTYPES
from torch import Tensor, nn

from entrenar import Int4Linear, LoRALayer, QLoRALayer, Tape
from entrenar.autograd.ops import _product, head_cross_entropy, linear_cross_entropy
from entrenar.autograd.ops.head_cross_entropy import head_cross_entropy_reference
from entrenar.autograd.ops.linear_cross_entropy import linear_cross_entropy_reference

MODULE = importlib.import_module("entrenar.autograd.ops.linear_cross_entropy")
# The largest error of one rounding, relative.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}
WIDTH, CLASSES = 20, 50


@contextlib.contextmanager
def chunks_of(size: int):
    before, MODULE.CHUNK_BYTES = MODULE.CHUNK_BYTES, size
    try:
        yield
    finally:
        MODULE.CHUNK_BYTES = before


@pytest.fixture(params=[MODULE.CHUNK_BYTES, 3000, 1], ids=["whole", "chunks", "single rows"])
def chunk_bytes(request):
    with chunks_of(request.param):
        yield request.param


@pytest.fixture(params=[True, False], ids=["fast products", "slow products"])
def fast_products(request, monkeypatch):
    """As on a CPU that multiplies all dtypes fast, and as on one that converts 16 bits, in tiles of three classes."""
    monkeypatch.setattr(_product, "multiplies_fast", lambda dtype, device: request.param or dtype.itemsize > 2)
    monkeypatch.setattr(_product, "TILE_BYTES", 3 * 4 * (37 + WIDTH))


def problem(rows: int, width: int, classes: int, dtype: torch.dtype, ignored: float = 0.2) -> tuple[Tensor, ...]:
    """Input, weight and bias, whose logits are of size 1, and targets of which some are ignored."""
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, width), (classes, width), (classes,)))
    weight /= width**0.5
    target = torch.randint(0, classes, (rows,)).masked_fill(torch.rand(rows) < ignored, -100)
    return x, weight, bias, target


def check(x, weight, bias, target, reduction="mean", wanted=(True, True, True)):
    """Loss and gradients are those of the same values in float64.

    A logit, which may be several times 1, rounds once, and its exponential is off by as much; then its gradient, the
    products, their sum over the chunks, the factor and dy round. That is held against the largest element.
    """
    dtype = x.dtype
    leaves = [y.detach().requires_grad_(w) for y, w in zip((x, weight, bias), wanted, strict=True) if y is not None]
    wide = [y.detach().double().requires_grad_(y.requires_grad) for y in leaves]
    y = linear_cross_entropy(
        *leaves[:2], target, linear_bias=leaves[2] if bias is not None else None, reduction=reduction
    )
    expected = linear_cross_entropy_reference(*wide[:2], target, wide[2] if bias is not None else None, reduction)
    largest = torch.nn.functional.linear(*(v.detach() for v in wide)).abs().max().item() if x.numel() else 0.0
    tolerance = (8 + 2 * largest) * ROUNDING[dtype]
    assert y.dtype == torch.promote_types(dtype, torch.float32)
    assert y.requires_grad == any(leaf.requires_grad for leaf in leaves)
    assert_close(y, expected, tolerance)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    if not inputs:
        return
    gradients = torch.autograd.grad(3 * y, inputs)
    wide_gradients = torch.autograd.grad(3 * expected, [leaf for leaf in wide if leaf.requires_grad])
    for gradient, exact in zip(gradients, wide_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, exact, tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_those_of_float64(dtype, reduction, chunk_bytes, fast_products, backend):
    x, weight, bias, target = problem(37, WIDTH, CLASSES, dtype)
    check(x, weight, bias, target, reduction)
    check(x, weight, None, target, reduction, wanted=(True, True, False))


@given(
    st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 60)),
    st.sampled_from(DTYPES),
    st.sampled_from(["mean", "sum"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([1, 500, 2**20]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_any_shape(sizes, dtype, reduction, wanted, ignored, size, transposed, seed):
    torch.manual_seed(seed)
    x, weight, bias, target = problem(*sizes, dtype, ignored)
    if transposed:
        x, weight = x.T.contiguous().T, weight.T.contiguous().T
    with chunks_of(size):
        check(x, weight, bias, target, reduction, wanted)


def test_derivatives_are_those_of_finite_differences(chunk_bytes):
    x, weight, bias, target = problem(7, 5, 6, torch.float64)
    leaves = [y.requires_grad_() for y in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b), leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_target_to_ignore_is_the_one_that_was_named(reduction):
    x, weight, _, target = problem(37, WIDTH, 5, torch.float32, ignored=0.0)
    settings = {"reduction": reduction, "ignore_index": 3}
    expected = linear_cross_entropy_reference(x.requires_grad_(), weight, target, **settings)
    (dx,) = torch.autograd.grad(expected, x)
    head = nn.Linear(WIDTH, 5, bias=False)
    head.weight = nn.Parameter(weight)
    for y in (
        linear_cross_entropy(x, weight, target, **settings),
        head_cross_entropy(nn.Sequential(head), x, target, 5, **settings),
        head_cross_entropy_reference(head, x, target, **settings),
    ):
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x)[0], dx)


def test_references_compute_bfloat16_in_float32():
    x, weight, bias, target = problem(7, WIDTH, CLASSES, torch.bfloat16)
    y = linear_cross_entropy_reference(x, weight, target, bias)
    assert torch.equal(y, linear_cross_entropy_reference(x.float(), weight.float(), target, bias.float()))
    logits = nn.functional.linear(x, weight, bias)
    y = head_cross_entropy_reference(nn.Identity(), logits, target)
    assert torch.equal(y, head_cross_entropy_reference(nn.Identity(), logits.float(), target))


def test_gradients_of_chunks_are_summed_in_float32(fast_products):
    x, weight, bias = torch.ones(1000, 1), torch.zeros(2, 1), torch.zeros(2)
    leaves = [y.bfloat16().requires_grad_() for y in (weight, bias)]
    with chunks_of(1):
        y = linear_cross_entropy(
            x.bfloat16(),
            leaves[0],
            torch.zeros(1000, dtype=torch.int64),
            linear_bias=leaves[1],
            reduction="sum",
        )
    # Of each row it is -1/2 and 1/2; in bfloat16 128 + 1/2 is 128 again.
    for gradient in torch.autograd.grad(y, leaves):
        assert gradient.flatten().tolist() == [-500.0, 500.0]


def test_ignored_targets_alone_have_no_mean_and_no_gradient():
    x, weight, _, target = problem(5, WIDTH, CLASSES, torch.float32, ignored=1.0)
    y = linear_cross_entropy(x.requires_grad_(), weight, target)
    assert y.isnan()
    assert not torch.autograd.grad(y, x)[0].any()


def test_without_gradients_the_loss_is_the_same(chunk_bytes, fast_products):
    x, weight, _, target = problem(37, WIDTH, CLASSES, torch.bfloat16)
    with torch.no_grad():
        y = linear_cross_entropy(x.requires_grad_(), weight, target)
    assert not y.requires_grad
    assert torch.equal(y, linear_cross_entropy(x, weight, target))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_nothing_but_the_gradients_is_kept(dtype, trained):
    x, weight, bias, target = problem(37, WIDTH, CLASSES, dtype)
    weight.requires_grad_(trained)
    bias.requires_grad_(trained)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_cross_entropy(x.requires_grad_(), weight, target, linear_bias=bias)
    assert [t.nbytes for t in kept] == [x.nbytes, *((weight.nbytes, bias.nbytes) if trained else (0, 0))]


def test_chunks_stay_within_their_bytes_and_cover_all_rows():
    for rows in (0, 1, 7, 1000):
        for row_bytes in (0, 1, 100, 999, 1000, 10**9):
            with chunks_of(1000):
                parts = [range(rows)[part] for part in MODULE.chunks(rows, row_bytes)]
            assert [row for part in parts for row in part] == [*range(rows)]
            assert all(len(part) * row_bytes <= 1000 or len(part) == 1 for part in parts)


def test_a_second_derivative_is_refused():
    x, weight, _, target = problem(5, WIDTH, CLASSES, torch.float32)
    y = linear_cross_entropy(x.requires_grad_(), weight, target)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)
    y = head_cross_entropy(nn.Tanh(), x, target % WIDTH, WIDTH)
    with pytest.raises(RuntimeError, match="head_cross_entropy has no second derivative"):
        torch.autograd.grad(y, x, create_graph=True)


def test_autocast_computes_in_its_dtype():
    x, weight, bias, target = problem(37, WIDTH, CLASSES, torch.float32)
    leaves = [y.requires_grad_() for y in (x, weight, bias)]
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = linear_cross_entropy(x, weight, target, linear_bias=bias)
    assert torch.equal(y, linear_cross_entropy(x.bfloat16(), weight.bfloat16(), target, linear_bias=bias.bfloat16()))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(y, leaves))


def test_compiles_without_graph_breaks():
    x, weight, bias, target = problem(37, WIDTH, CLASSES, torch.float32)
    leaves = [y.requires_grad_() for y in (x, weight, bias)]

    def step(x, weight, bias):
        return 2 * linear_cross_entropy(x.sin(), weight, target, linear_bias=bias)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected, actual = (torch.autograd.grad(f(*leaves), leaves) for f in (step, compiled))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, False, False)])
def test_opcheck(wanted):
    x, weight, bias, target = problem(7, WIDTH, CLASSES, torch.float32)
    leaves = [y.requires_grad_(w) for y, w in zip((x, weight, bias), wanted, strict=True)]
    arguments = (*leaves[:2], target, leaves[2], "mean", -100, *wanted)
    results = torch.library.opcheck(torch.ops.entrenar.linear_cross_entropy.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_a_tape_records_it():
    x, weight, _, target = problem(7, WIDTH, CLASSES, torch.float32)
    weight.requires_grad_()
    with Tape() as tape:
        y = linear_cross_entropy(x, weight, target)
    assert [entry.op for entry in tape.entries] == ["linear_cross_entropy"]
    tape.backward(y)
    assert torch.equal(weight.grad, torch.autograd.grad(linear_cross_entropy(x, weight, target), weight)[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.randn(2, 37, WIDTH)}, ValueError, r"input must be floating point \[N, K\]"),
        ({"x": torch.ones(37, WIDTH, dtype=torch.int64)}, ValueError, "input must be floating point"),
        ({"target": torch.zeros(36, dtype=torch.int64)}, ValueError, r"target must be int64 \[37\], not .* \[36\]"),
        ({"target": torch.zeros(37, dtype=torch.int32)}, ValueError, "target must be int64"),
        ({"weight": torch.randn(CLASSES, 3)}, ValueError, r"linear_weight must be torch.float32 \[C, 20\]"),
        ({"weight": torch.randn(CLASSES, WIDTH).double()}, ValueError, "linear_weight must be torch.float32"),
        ({"bias": torch.randn(3)}, ValueError, r"linear_bias must be torch.float32 \[50\]"),
        ({"bias": torch.randn(CLASSES).double()}, ValueError, "linear_bias must be torch.float32"),
        ({"reduction": "none"}, ValueError, 'reduction must be "mean" or "sum", not \'none\''),
        pytest.param(
            {"target": torch.arange(37) + 20},
            IndexError,
            "Target 50 is out of bounds: row 30 has 50 classes",
            marks=pytest.mark.cpu("on CUDA an assertion of the kernel fails"),
        ),
    ],
)
def test_bad_input_is_refused(changed, error, message):
    x, weight, bias, target = problem(37, WIDTH, CLASSES, torch.float32)
    given = {"x": x, "weight": weight, "bias": bias, "target": target, "reduction": "mean", **changed}
    with pytest.raises(error, match=message), chunks_of(1000):
        linear_cross_entropy(
            given["x"], given["weight"], given["target"], linear_bias=given["bias"], reduction=given["reduction"]
        )


class Table(nn.Module):
    """A head whose logits are a slice of something larger, and not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[..., ::2]


def lora(layer: nn.Module) -> nn.Module:
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


HEADS = {
    "linear": lambda: nn.Linear(WIDTH, CLASSES),
    "frozen linear": lambda: nn.Linear(WIDTH, CLASSES, bias=False).requires_grad_(False),
    "int4": lambda: Int4Linear.from_weight(torch.randn(CLASSES, WIDTH)),
    "lora": lambda: lora(LoRALayer(nn.Linear(WIDTH, CLASSES), rank=3, alpha=6)),
    "int4 and lora": lambda: lora(QLoRALayer(torch.randn(CLASSES, WIDTH), rank=3, alpha=6)),
    # Their own backward looks at the logits, which the gradient must not overwrite.
    "tanh": lambda: nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Tanh()),
    "softmax": lambda: nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.Softmax(-1)),
    "in place": lambda: nn.Sequential(nn.Linear(WIDTH, CLASSES), nn.ReLU(inplace=True)),
    "strided": Table,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_any_head_gives_the_loss_and_gradients_of_its_whole_logits(head, chunk_bytes):
    head = head()
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.float32)
    leaves = [x.requires_grad_(), *(p for p in head.parameters() if p.requires_grad)]
    y = head_cross_entropy(head, x, target, CLASSES)
    expected = head_cross_entropy_reference(head, x, target)
    # Both are float32, and sum up to 50 products in other orders.
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)
    for actual, wanted in zip(
        torch.autograd.grad(3 * y, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        assert_close(actual, wanted, 32 * ROUNDING[torch.float32])
    with torch.no_grad():
        assert torch.equal(head_cross_entropy(head, x, target, CLASSES), y)


def test_logits_themselves_are_left_as_they_were(chunk_bytes):
    logits, target = torch.randn(37, CLASSES, requires_grad=True), torch.randint(0, CLASSES, (37,))
    before = logits.detach().clone()
    y = head_cross_entropy(nn.Identity(), logits, target, CLASSES)
    expected = nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(torch.autograd.grad(y, logits), torch.autograd.grad(expected, logits))
    assert torch.equal(logits, before)


def test_gradients_of_a_bfloat16_head_are_summed_in_float32(chunk_bytes):
    head = nn.Sequential(nn.Linear(WIDTH, CLASSES)).bfloat16()
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.bfloat16)
    wide = copy.deepcopy(head).double()
    y, expected = (
        f(h, v, target, *c)
        for f, h, v, c in (
            (head_cross_entropy, head, x, (CLASSES,)),
            (head_cross_entropy_reference, wide, x.double(), ()),
        )
    )
    gradients = zip(
        torch.autograd.grad(y, [*head.parameters()]), torch.autograd.grad(expected, [*wide.parameters()]), strict=True
    )
    for actual, wanted in gradients:
        assert actual.dtype == torch.bfloat16
        # The logits, at most about 3, round; their gradient, its product, and the result.
        assert_close(actual, wanted, 12 * ROUNDING[torch.bfloat16])


@pytest.mark.parametrize("enabled", [False, True])
def test_dropout_in_a_head_is_drawn_once(enabled):
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES)).train(enabled)
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.float32)
    results = []
    for f, extra in ((head_cross_entropy, (CLASSES,)), (head_cross_entropy_reference, ())):
        torch.manual_seed(1)
        results.append(torch.autograd.grad(f(head, x.requires_grad_(), target, *extra), x))
    torch.testing.assert_close(*results)


def test_hooks_of_a_linear_head_run():
    head, seen = nn.Linear(WIDTH, CLASSES), []
    head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.float32)
    head_cross_entropy(head, x, target, CLASSES)
    assert seen == [(1, 37, CLASSES)]


def test_a_parameter_that_the_head_does_not_use_has_no_gradient():
    head = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    head.spare = nn.Parameter(torch.ones(3))
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.float32)
    assert not torch.autograd.grad(head_cross_entropy(head, x, target, CLASSES), head.spare)[0].any()


def test_rows_that_are_none_and_frozen_heads_are_no_exception():
    head = nn.Sequential(nn.Linear(WIDTH, CLASSES)).requires_grad_(False)
    x, _, _, target = problem(0, WIDTH, CLASSES, torch.float32)
    y = head_cross_entropy(head, x.requires_grad_(), target, CLASSES, reduction="sum")
    assert y == 0
    assert torch.autograd.grad(y, x)[0].shape == x.shape
    x, _, _, target = problem(3, WIDTH, CLASSES, torch.float32)
    assert not head_cross_entropy(head, x, target, CLASSES).requires_grad


def test_a_head_with_another_number_of_logits_is_refused():
    x, _, _, target = problem(3, WIDTH, CLASSES, torch.float32, ignored=0.0)
    for requires_grad in (False, True):
        with pytest.raises(ValueError, match=r"the head gives logits \[1, 3, 20\], not \[1, 3, 50\]"):
            head_cross_entropy(nn.Identity(), x.requires_grad_(requires_grad), target, CLASSES)


@pytest.mark.cpu("on CUDA an assertion of the kernel fails")
def test_a_target_that_is_no_class_is_refused():
    x, _, _, target = problem(3, WIDTH, CLASSES, torch.float32, ignored=0.0)
    with pytest.raises(IndexError, match="Target 50 is out of bounds: row 0 has 50 classes"):
        head_cross_entropy(nn.Sequential(nn.Linear(WIDTH, CLASSES)), x, target.fill_(50), CLASSES)


def test_logits_are_freed_at_once_without_the_garbage_collector():
    x, _, _, target = problem(37, WIDTH, CLASSES, torch.float32)
    for head in (HEADS["tanh"](), HEADS["lora"]()):
        logits = []
        head.register_forward_hook(lambda module, args, output, logits=logits: logits.append(weakref.ref(output)))
        gc.disable()
        head_cross_entropy(head, x.requires_grad_(), target, CLASSES)
        gc.enable()
        assert [ref() for ref in logits] == [None]


def test_a_hook_of_a_parameter_gets_the_whole_gradient_once(chunk_bytes):
    x, target = torch.randn(50, WIDTH), torch.randint(20, (50,))
    gradients = []
    for loss in (head_cross_entropy, head_cross_entropy_reference):
        head = nn.Sequential(nn.Linear(WIDTH, 20))
        with torch.no_grad():
            head[0].weight.copy_(torch.linspace(-1, 1, 20 * WIDTH).view(20, WIDTH))
            head[0].bias.zero_()
        seen = []
        head[0].weight.register_hook(lambda gradient, seen=seen: seen.append(gradient) or 2 * gradient)
        y = loss(head, x, target, 20) if loss is head_cross_entropy else loss(head, x, target)
        assert not seen
        y.backward()
        assert len(seen) == 1
        gradients.append(head[0].weight.grad)
    torch.testing.assert_close(*gradients)
