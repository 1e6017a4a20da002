from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from entrenar.autograd.ops import int4_dequantize, swiglu
from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer
from entrenar.lora.layers import apply_to_swiglu, apply_together

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def trained(layer: LoRALayer) -> LoRALayer:
    """The layer with a B that is not zero."""
    nn.init.normal_(layer.lora_B, std=0.1)
    return layer


@DTYPES
def test_int4_linear_equals_the_decoded_linear(dtype):
    linear = nn.Linear(80, 24)
    layer = Int4Linear.from_weight(linear.weight, linear.bias)
    x = torch.randn(3, 5, 80, dtype=dtype)
    expected = F.linear(x.float(), layer.dequantize(), linear.bias)
    torch.testing.assert_close(layer(x).float(), expected, rtol=1e-5 if dtype == torch.float32 else 2**-6, atol=2**-7)


def test_frozen_bytes_survive_casts_and_copies():
    layer = Int4Linear.from_weight(torch.randn(24, 80))
    codes, scales = layer.codes.clone(), layer.scales.clone()
    for other in (copy.deepcopy(layer), layer.to(torch.bfloat16), layer.half(), layer.double()):
        assert torch.equal(other.codes, codes)
        assert torch.equal(other.scales, scales)
        assert not any(p.requires_grad for p in other.parameters())


def test_state_dict_round_trip():
    saved = trained(QLoRALayer(torch.randn(24, 80), rank=4, alpha=8)).state_dict()
    other = QLoRALayer(torch.randn(24, 80), rank=4, alpha=8)
    assert other.load_state_dict(saved).missing_keys == []
    x = torch.randn(2, 80)
    weight = int4_dequantize(saved["base.codes"], saved["base.scales"], 80) + 2 * saved["lora_B"] @ saved["lora_A"]
    torch.testing.assert_close(other(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_first_output_is_the_bases():
    linear = nn.Linear(80, 24)
    x = torch.randn(5, 80)
    assert torch.equal(LoRALayer(linear, rank=4, alpha=8)(x), linear(x))
    layer = QLoRALayer(linear, rank=4, alpha=8)
    if x.is_cuda:  # where the bias, the adapter's part and the product are added in another order
        torch.testing.assert_close(layer(x), layer.base(x))
    else:
        assert torch.equal(layer(x), layer.base(x))


def test_adapter_starts_as_in_peft():
    torch.manual_seed(3)
    layer = LoRALayer(torch.zeros(24, 80), rank=4, alpha=8)
    torch.manual_seed(3)
    expected = nn.init.kaiming_uniform_(torch.empty(4, 80), a=math.sqrt(5))
    assert torch.equal(layer.lora_A, expected)
    assert not layer.lora_B.any()
    assert layer.scaling == 2.0


@DTYPES
@pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
def test_output_and_gradients_equal_the_dense_layer_with_the_product_added(kind, dtype):
    layer = trained(kind(nn.Linear(80, 24), rank=4, alpha=8))
    x = torch.randn(6, 80).to(dtype).requires_grad_()
    dy = torch.randn(6, 24).to(dtype)
    if kind is LoRALayer:
        layer.base.to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    actual = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)

    base = layer.base.dequantize(dtype) if kind is QLoRALayer else layer.base.weight
    A, B, wide = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    z = F.linear(wide, base.double() + layer.scaling * B @ A, layer.base.bias.double())
    expected = torch.autograd.grad(z, [wide, A, B], dy.double())
    # bfloat16 rounds A, B, x Aᵀ and the sums, each by up to 2^-9.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for a, e in zip((y, *actual), (z, *expected), strict=True):
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
def test_first_step_moves_b_only_and_never_the_base(kind):
    layer = kind(nn.Linear(80, 24), rank=4, alpha=8)
    before = {name: p.clone() for name, p in layer.base.named_parameters()}
    layer(torch.randn(5, 80)).square().sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0
    assert not layer.lora_A.grad.any()
    for name, parameter in layer.base.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
def test_dropout_acts_on_the_adapter_in_training_only(kind):
    layer = trained(kind(torch.randn(24, 80), rank=4, alpha=8, dropout=0.5))
    x = torch.randn(4000, 80)
    base = layer.base(x)
    update = layer.eval()(x) - base
    dropped = layer.train()(x) - base
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    assert not torch.allclose(dropped, update, atol=1e-2)
    # Dropout keeps the mean: each element of x is dropped or doubled.
    torch.testing.assert_close(dropped.mean(0), update.mean(0), rtol=0, atol=0.1 * float(update.detach().std()))


def test_prequantized_base_keeps_its_bytes():
    base = Int4Linear.from_weight(torch.randn(24, 80), block=32)
    layer = QLoRALayer(base, rank=4, alpha=8)
    assert layer.base is base


def test_chapters_constructor_takes_a_flat_weight():
    flat = torch.arange(12.0)
    layer = LoRALayer(flat, 3, 4, rank=2, alpha=4)
    assert torch.equal(layer.base.weight, flat.view(3, 4))
    assert (layer.out_features, layer.in_features) == (3, 4)


@DTYPES
def test_weight_and_bias_are_those_that_the_layer_computes_with(dtype):
    layer = trained(LoRALayer(nn.Linear(80, 24, dtype=dtype), rank=4, alpha=8))
    x = torch.randn(5, 80, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.bias is layer.base.bias
    tolerance = 1e-5 if dtype == torch.float32 else 2**-4
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), layer(x), rtol=tolerance, atol=tolerance)


def test_there_is_no_weight_over_int4():
    layer = QLoRALayer(nn.Linear(80, 24), rank=4, alpha=8)
    assert layer.bias is layer.base.bias
    assert not hasattr(layer, "weight")


@pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
def test_hooks_of_the_base_run(kind):
    layer = trained(kind(nn.Linear(64, 24, bias=False), rank=4, alpha=8))
    x = torch.randn(5, 64)
    base, y = layer.base(x), layer(x)
    layer.base.register_forward_hook(lambda _layer, _x, y: 2 * y)
    torch.testing.assert_close(layer(x), y + base)


def test_a_base_that_is_refused_stays_as_it_was():
    base = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="rank must be"):
        LoRALayer(base, rank=2.5, alpha=4)
    assert base.weight.requires_grad


def test_autocast_casts_inside():
    layer = trained(QLoRALayer(torch.randn(24, 80), rank=4, alpha=8))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        y = layer(torch.randn(5, 80))
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == torch.float32


def test_compiles_without_graph_breaks():
    model = nn.Sequential(*(trained(QLoRALayer(torch.randn(64, 64), rank=4, alpha=8)) for _ in range(2)))
    x = torch.randn(5, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    model(x).sum().backward()
    for compiled_gradient, parameter in zip(gradients, (p for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(compiled_gradient, parameter.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRALayer(nn.ReLU(), rank=4, alpha=8), "ReLU has no in_features"),
        (lambda: LoRALayer(nn.Linear(4, 3), 4, 3, rank=2, alpha=8), "not d_in=3 to d_out=4"),
        (lambda: LoRALayer(torch.ones(12), rank=2, alpha=8), "needs d_out and d_in"),
        (lambda: LoRALayer(torch.ones(12), 3, rank=2, alpha=8), "needs d_out and d_in"),
        (lambda: LoRALayer(torch.ones(12), None, 4, rank=2, alpha=8), "needs d_out and d_in"),
        (lambda: LoRALayer(torch.ones(12), 3, 5, rank=2, alpha=8), "is not d_out x d_in"),
        (lambda: LoRALayer(torch.ones(4, 3), 3, 4, rank=2, alpha=8), "is not d_out x d_in"),
        (lambda: LoRALayer(nn.Linear(4, 3), rank=0, alpha=8), "rank must be at least 1"),
        (lambda: LoRALayer(nn.Linear(4, 3), rank=2, alpha=8, dropout=1.0), "dropout"),
        (lambda: QLoRALayer(nn.Bilinear(2, 2, 2), rank=2, alpha=8), "Bilinear cannot be quantized"),
        (lambda: LoRALayer(nn.Linear(4, 3), rank=2, alpha=8)(torch.ones(2, 5)), r"takes \[\.\.\., 4\]"),
        (lambda: Int4Linear.from_weight(torch.ones(4, 40))(torch.ones(2, 41)), r"takes \[\.\.\., 40\]"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Calls(torch.overrides.TorchFunctionMode):
    """The names of the package's operations that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


def hooked(layers):
    layers[0].register_forward_hook(lambda *_: None)


def hooked_before(layers):
    layers[0].register_forward_pre_hook(lambda *_: None)


def hooked_backward(layers):
    layers[0].register_full_backward_hook(lambda *_: None)


def hooked_before_the_backward(layers):
    layers[0].register_full_backward_pre_hook(lambda *_: None)


def replaced(layers):
    forward = layers[1].forward
    layers[1].forward = lambda x: 2 * forward(x)


def dropping(layers):
    layers[1].dropout.p = 0.5
    layers[1].train()


def scaled(layers):
    layers[1].scaling = 3.0


def undecorated(layers):
    layers[1] = layers[1].base


HOOKED = [hooked, hooked_before, hooked_backward, hooked_before_the_backward]


def hooked_base(layers):
    layers[1].base.register_forward_hook(lambda _layer, _x, y: 2 * y)


@pytest.mark.parametrize("change", [None, *HOOKED, replaced, dropping, scaled, undecorated, hooked_base])
def test_layers_are_applied_together_where_they_are_alike(change):
    layers = [QLoRALayer(torch.randn(n, 64), rank=4, alpha=8) for n in (16, 24)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    if change:
        change(layers)
    x = torch.randn(5, 64, requires_grad=True)
    with Calls() as calls:
        torch.manual_seed(1)
        found = apply_together(layers, x)
    assert ("int4_lora_linears" in calls.names) == (change is None)
    torch.manual_seed(1)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(found, layers, strict=True))


def test_layers_applied_together_check_x():
    with pytest.raises(ValueError, match=r"the layer takes \[..., 64\]"):
        apply_together([QLoRALayer(torch.randn(16, 64), rank=4, alpha=8)], torch.randn(5, 63))


@pytest.mark.parametrize("change", [None, *HOOKED, replaced, dropping, undecorated, hooked_base])
def test_layer_after_swiglu_is_one_call_where_it_is_a_plain_adapter(change):
    layers = [QLoRALayer(torch.randn(16, 64), rank=4, alpha=8)] * 2
    nn.init.normal_(layers[1].lora_B)
    if change:
        change(layers)
    gate, up = (torch.randn(5, 64, requires_grad=True) for _ in range(2))
    with Calls() as calls:
        torch.manual_seed(1)
        found = apply_to_swiglu(layers[1], gate, up)
    assert ("swiglu_int4_lora_linear" in calls.names) == (change is None)
    torch.manual_seed(1)
    expected = layers[1](swiglu(gate, up))
    assert torch.equal(found, expected)
    dy = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, [gate, up], dy) for y in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.cpu("int8 activations are the CPU's")
def test_every_way_to_apply_a_layer_rounds_its_input_to_int8_where_that_is_asked_for(dtype, dropout):
    layer = trained(QLoRALayer(torch.randn(16, 128), rank=4, alpha=8, dropout=dropout))
    gate, up = torch.randn(2, 40, 128, dtype=dtype)  # few rows are not rounded
    x = swiglu(gate, up)

    def results():
        torch.manual_seed(1)
        return [layer.base(x), layer(x), *apply_together([layer], x), apply_to_swiglu(layer, gate, up)]

    exact = results()
    layer.base.int8 = True
    rounded = results()
    for have, want in zip(rounded, exact, strict=True):
        assert 1e-3 < (have - want).norm() / want.norm() < 2e-2


def test_layer_after_swiglu_checks_its_input():
    with pytest.raises(ValueError, match=r"the layer takes \[\.\.\., 64\]"):
        apply_to_swiglu(QLoRALayer(torch.randn(16, 64), rank=4, alpha=8), *torch.randn(2, 5, 63))
