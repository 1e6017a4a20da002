"""What `wrap` makes of its arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer, wrap


def test_defaults():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
    weight, bias = model[0].weight, model[0].bias
    wrap(model)
    layer = model[0]
    assert (layer.rank, layer.alpha, layer.scaling, layer.dropout.p) == (16, 32, 2.0, 0.0)
    expected = QLoRALayer(nn.Linear(64, 32), rank=1, alpha=1).base.from_weight(weight, bias)
    assert torch.equal(layer.base.codes, expected.codes)
    assert torch.equal(layer.base.scales, expected.scales)
    assert torch.equal(layer.base.bias, bias)


def test_settings_reach_the_layers():
    model = nn.Sequential(nn.Linear(64, 32))
    expected = Int4Linear.from_weight(model[0].weight, block=32, scale_dtype=torch.float32, fit="mse")
    wrap(model, rank=2, alpha=6, dropout=0.25, block=32, scale_dtype=torch.float32, fit="mse")
    layer = model[0]
    assert (layer.rank, layer.alpha, layer.dropout.p, layer.base.block) == (2, 6, 0.25, 32)
    assert layer.base.scales.shape == (32, 2 * 4)
    assert torch.equal(layer.base.codes, expected.codes)
    assert torch.equal(layer.base.scales, expected.scales)


def test_all_linear_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert list(wrap(model, targets="all-linear").adapted) == ["0", "1"]
    assert all(isinstance(layer, LoRALayer) for layer in model)


@pytest.mark.parametrize(
    ("model", "targets", "message"),
    [
        (nn.Sequential(nn.ReLU()), "all-linear", r"matches 'all-linear'; .* end in: \(there are none\)$"),
        (nn.Sequential(nn.Linear(8, 8)), [], r"matches '\(an empty list\)'; .* end in: 0$"),
    ],
)
def test_nothing_to_wrap(model, targets, message):
    with pytest.raises(ValueError, match=message):
        wrap(model, targets=targets)


def test_int8_activations_are_set_on_every_int4_layer_and_shown():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    wrap(model, rank=2, targets=["0"], activations="int8")
    assert model[0].base.int8
    assert "int8 input" in repr(model)
    x = torch.randn(40, 64)
    exact = model[0].base.dequantize()
    assert 0 < (model[0](x) - x @ exact.T - model[0].base.bias).norm() / (x @ exact.T).norm() < 0.01


@pytest.mark.parametrize("bits", [4, None])
def test_an_unknown_fit_is_refused(bits):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="fit must be one of 'absmax', 'mse', not 'nf4'"):
        wrap(model, bits=bits, fit="nf4")
    assert type(model[0]) is nn.Linear


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="activations must be 'int8' or None, not 'fp8'"):
        wrap(nn.Sequential(nn.Linear(64, 64)), activations="fp8")


def test_int8_activations_without_an_int4_layer_are_refused():
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"activations='int8' rounds .* no target is one \(bits=None\)"):
        wrap(model, bits=None, activations="int8")
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_int8_activations_of_layers_that_are_int4_already():
    model = nn.Sequential(Int4Linear.from_weight(torch.randn(64, 64)))
    wrap(model, rank=2, bits=None, activations="int8")
    assert model[0].base.int8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_inputs_of_other_dtypes_are_refused_with_a_way_out(dtype):
    model = nn.Sequential(nn.Linear(64, 64, dtype=dtype))
    wrap(model, rank=2)
    with pytest.raises(ValueError, match=r"call its \.bfloat16\(\) or \.float\(\) before it is wrapped"):
        model(torch.randn(2, 64, dtype=dtype))


def test_settings_are_checked_before_any_weight_is_quantized():
    model = nn.Sequential(nn.Linear(64, 64))
    nn.init.constant_(model[0].weight, torch.nan)
    with pytest.raises(ValueError, match="rank must be"):
        wrap(model, rank=0)
