"""One layer's adapter as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from entrenar.lora.adapter import load_adapter, save_adapter
from entrenar.lora.layers import LoRALayer, QLoRALayer


def trained(weight: torch.Tensor, rank: int = 4, alpha: float = 8.0, kind: type[LoRALayer] = LoRALayer) -> LoRALayer:
    layer = kind(weight, rank=rank, alpha=alpha)
    nn.init.normal_(layer.lora_B)
    return layer


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    alpha=st.floats(0.1, 100),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_exact(tmp_path, sizes, alpha, seed):
    torch.manual_seed(seed)
    d_out, d_in, rank = sizes
    weight, x = torch.randn(d_out, d_in), torch.randn(3, d_in)
    layer = trained(weight, rank, alpha)
    save_adapter(layer, tmp_path / "adapter.json")
    loaded = load_adapter(str(tmp_path / "adapter.json"), weight)
    assert torch.equal(loaded.lora_A, layer.lora_A)
    assert torch.equal(loaded.lora_B, layer.lora_B)
    assert (loaded.rank, loaded.alpha) == (rank, alpha)
    assert torch.equal(loaded(x), layer(x))


def test_fields_and_layout(tmp_path):
    layer = trained(torch.zeros(3, 2), rank=1, alpha=4.0)
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.lora_B.copy_(torch.tensor([[3.0], [4.0], [5.0]]))
    save_adapter(layer, tmp_path / "adapter.json")
    assert json.loads((tmp_path / "adapter.json").read_text()) == {
        "version": "1.0",
        "rank": 1,
        "alpha": 4.0,
        "d_out": 3,
        "d_in": 2,
        "scale": 4.0,
        "lora_a": [1.0, 2.0],
        "lora_b": [3.0, 4.0, 5.0],
    }


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_scale_decides(tmp_path, scale):
    fields = {"version": "1.0", "rank": 1, "alpha": 2.0, "d_out": 1, "d_in": 2, "scale": scale}
    (tmp_path / "a.json").write_text(json.dumps({**fields, "lora_a": [1, 2], "lora_b": [3]}))
    layer = load_adapter(tmp_path / "a.json", torch.zeros(1, 2))
    assert layer(torch.tensor([[1.0, 1.0]])).item() == scale * 9


def test_onto_an_int4_base_and_into_a_layer(tmp_path):
    weight, x = torch.randn(64, 64), torch.randn(2, 64)
    layer = trained(weight, kind=QLoRALayer)
    save_adapter(layer, tmp_path / "adapter.json")
    assert torch.equal(load_adapter(tmp_path / "adapter.json", layer.base)(x), layer(x))
    other = QLoRALayer(weight, rank=4, alpha=8)
    assert load_adapter(other, tmp_path / "adapter.json") is other
    assert torch.equal(other(x), layer(x))
    with pytest.raises(ValueError, match=r"rank=4, scale=2.0; the layer is of .*rank=2"):
        load_adapter(QLoRALayer(weight, rank=2, alpha=4), tmp_path / "adapter.json")


GOOD = {"version": "1.0", "rank": 1, "alpha": 2.0, "d_out": 1, "d_in": 2, "scale": 2.0, "lora_a": [1, 2], "lora_b": [3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2.0"}, "of version '2.0'"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"d_in": 3}, r"lora_a has 2 values; 1 x 3 = 3"),
        ({"d_out": 2}, r"lora_b has 1 values; 2 x 1 = 2"),
        ({"lora_a": [1, float("nan")]}, "NaN is no value"),
        ({"lora_b": [float("inf")]}, "Infinity is no value"),
        ({"lora_b": [1e39]}, r"lora_b\[0\] is 1e\+39, which float32 cannot hold"),
        ({"lora_b": ["3"]}, "lora_b must be a flat list of numbers"),
        ({"lora_a": [[1, 2]]}, "lora_a must be a flat list of numbers"),
        ({"alpha": "2"}, "alpha must be a finite number"),
        ({"scale": None}, "scale must be a finite number"),
    ],
)
def test_bad_files(tmp_path, change, message):
    (tmp_path / "adapter.json").write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path / "adapter.json", torch.zeros(1, 2))


@pytest.mark.parametrize("text", ['{"version": "1.0"', "[1]", '{"version": "1.0"}', "\x00\xff"])
def test_no_adapter_at_all(tmp_path, text):
    (tmp_path / "adapter.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"adapter\.json (is not whole JSON|holds a list|lacks rank)"):
        load_adapter(tmp_path / "adapter.json", torch.zeros(1, 2))


def test_wrong_base_and_missing_file(tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match="does not fit the base"):
        load_adapter(tmp_path / "adapter.json", torch.zeros(2, 2))
    with pytest.raises(FileNotFoundError, match=r"other\.json"):
        load_adapter(tmp_path / "other.json", torch.zeros(1, 2))


def test_nan_is_not_saved(tmp_path):
    layer = trained(torch.zeros(3, 2))
    with torch.no_grad():
        layer.lora_B[1, 1] = float("nan")
    with pytest.raises(ValueError, match="lora_B has NaN"):
        save_adapter(layer, tmp_path / "adapter.json")
    assert not list(tmp_path.iterdir())


def test_layer_and_model_paths_are_told_apart(tmp_path):
    layer = trained(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"ends in \.json"):
        save_adapter(layer, tmp_path / "adapter")
    with pytest.raises(ValueError, match="saved to a directory"):
        save_adapter(nn.Sequential(layer), tmp_path / "adapter.json")
    with pytest.raises(ValueError, match=r"is a \.json file"):
        load_adapter(tmp_path, torch.zeros(3, 2))
    with pytest.raises(TypeError, match="in either order"):
        load_adapter("a", "b")
