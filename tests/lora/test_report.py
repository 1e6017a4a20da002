"""The words and figures of the report."""

from __future__ import annotations

import torch
from torch import nn

from entrenar.lora import Int4Linear, wrap
from entrenar.lora.report import storage_bytes


def small() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 64, dtype=torch.bfloat16),
            "blocks": nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)),
            "out": nn.Linear(64, 3, bias=False),
        }
    )


def test_the_table():
    # 2 blocks of 4096 codes in half a byte and 64 scales of 2 bytes, and adapters of 2 x (64 + 64) in float32.
    assert str(wrap(small(), rank=2, targets=["blocks.0", "blocks.1"])).splitlines() == [
        "layer     count  weight   kept in",
        "blocks.*  2      64 x 64  int4      LoRA r=2",
        "embed     1      10 x 64  bfloat16  not in int4: Embedding",
        "out       1      3 x 64   float32   not in int4: not a target",
        "trainable: 512 of 9,536 parameters (5.37 %)",
        "bytes: 34,816 before, 8,448 after, adapters included",
    ]


def test_the_table_without_int4():
    lines = str(wrap(small(), rank=2, targets=["out"], bits=None)).splitlines()
    assert lines[1].split() == ["out", "1", "3", "x", "64", "float32", "LoRA", "r=2"]
    assert "out       1      3 x 64   float32   not in int4: bits=None" in lines


def test_every_matrix_is_listed():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.randn(4, 64, 64))
            self.scale = nn.Parameter(torch.ones(4))

    model = small()
    model.update({"attention": nn.MultiheadAttention(64, 2), "lstm": nn.LSTM(64, 8), "experts": Experts()})
    model.table = nn.Parameter(torch.randn(5, 3))
    model["packed"] = Int4Linear.from_weight(torch.randn(64, 64))
    report = wrap(model, rank=2, targets=["blocks.0", "blocks.1"])
    assert {name: (kept.shape, kept.reason) for name, kept in report.kept.items()} == {
        "table": ((5, 3), "ModuleDict"),
        "embed": ((10, 64), "Embedding"),
        "out": ((3, 64), "not a target"),
        "attention.in_proj_weight": ((192, 64), "MultiheadAttention"),
        "attention.out_proj": ((64, 64), "NonDynamicallyQuantizableLinear"),
        "lstm.weight_ih_l0": ((32, 64), "LSTM"),
        "lstm.weight_hh_l0": ((32, 8), "LSTM"),
        "experts.gate_up": ((4, 64, 64), "Experts"),
    }


def test_int4_weights_count_by_their_elements():
    model = small()
    model["out"] = Int4Linear.from_weight(model["out"].weight)
    assert wrap(model, rank=2, targets=["blocks.0"]).base_parameters == 640 + 2 * 4096 + 192


def test_tensors_without_memory_count_one_by_one():
    assert storage_bytes(nn.Linear(8, 4, device="meta")) == 4 * (8 * 4 + 4)
