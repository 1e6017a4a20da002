"""What the layers make of their arguments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrenar.autograd.ops import int4_dequantize, int4_quantize
from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer


def test_print_shows_sizes_and_bits():
    layer = Int4Linear.from_weight(torch.randn(24, 128), torch.zeros(24))
    assert repr(layer) == "Int4Linear(in_features=128, out_features=24, bias=True, block=64, bits_per_weight=4.25)"
    assert "bias=False, block=32, bits_per_weight=4.5)" in repr(Int4Linear.from_weight(torch.randn(24, 128), block=32))


def test_the_bias_is_frozen_too():
    layer = Int4Linear.from_weight(torch.randn(24, 80), torch.zeros(24))
    assert {name: p.requires_grad for name, p in layer.named_parameters()} == dict.fromkeys(
        ("codes", "scales", "bias"), False
    )


def test_blocks_of_64_unless_told_otherwise():
    layer = Int4Linear.from_weight(torch.randn(24, 80))
    assert torch.equal(Int4Linear(layer.codes, layer.scales, in_features=80).dequantize(), layer.dequantize())


@pytest.mark.parametrize("block", [32, 64])
def test_decodes_with_its_block_to_the_dtype(block):
    layer = Int4Linear.from_weight(torch.randn(24, 80), block=block)
    expected = int4_dequantize(layer.codes, layer.scales, 80, block=block, dtype=torch.bfloat16)
    decoded = layer.dequantize(torch.bfloat16)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, expected)


def test_a_vector_is_mapped_and_a_number_refused():
    layer = Int4Linear.from_weight(torch.randn(24, 80))
    assert layer(torch.randn(80)).shape == (24,)
    with pytest.raises(ValueError, match=r"x has shape \(\), the layer takes"):
        layer(torch.tensor(1.0))


def test_the_adapter_is_made_where_the_base_is():
    layer = LoRALayer(nn.Linear(4, 3, device="meta"), rank=2, alpha=4)
    assert {layer.lora_A.device.type, layer.lora_B.device.type} == {"meta"}


def test_qlora_takes_a_flat_weight_and_the_formats_settings():
    weight = torch.randn(24, 80)
    layer = QLoRALayer(weight.flatten(), 24, 80, rank=4, alpha=8)
    assert torch.equal(layer.base.codes, Int4Linear.from_weight(weight).codes)
    linear = nn.Linear(80, 24)
    for base in (linear, linear.weight):
        wide = QLoRALayer(base, rank=4, alpha=8, block=32, scale_dtype=torch.float32, fit="mse").base
        assert (wide.block, wide.scales.shape) == (32, (24, 3 * 4))
        codes, scales = int4_quantize(linear.weight, block=32, scale_dtype=torch.float32, fit="mse")
        assert torch.equal(wide.codes, codes)
        assert torch.equal(wide.scales, scales)


@pytest.mark.parametrize("sizes", [(24, 81), (23, 80)])
def test_qlora_checks_the_sizes_of_its_base(sizes):
    with pytest.raises(ValueError, match="the base maps 80 to 24 features"):
        QLoRALayer(nn.Linear(80, 24), *sizes, rank=4, alpha=8)
