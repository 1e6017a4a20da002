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


def write(path, **change) -> None:
    path.write_text(json.dumps({**GOOD, **change}))


def test_alpha_of_another_scale_is_that_of_the_rank(tmp_path):
    # rsLoRA's scale: the layer's own alpha / rank must come out as 3.
    write(tmp_path / "a.json", rank=2, alpha=1.0, scale=3.0, lora_a=[1, 2, 3, 4], lora_b=[5, 6])
    layer = load_adapter(tmp_path / "a.json", torch.zeros(1, 2))
    assert (layer.alpha, layer.scaling) == (6.0, 3.0)


def test_alpha_stays_to_the_bit_where_scale_is_its_quotient(tmp_path):
    alpha = 0.9
    assert alpha / 3 * 3 != alpha
    lists = {"lora_a": [1] * 6, "lora_b": [1] * 3}
    # As written by this package, and by one that computes the scale in float32.
    for scale in (alpha / 3, float(torch.tensor(alpha / 3))):
        write(tmp_path / "a.json", rank=3, alpha=alpha, scale=scale, **lists)
        layer = load_adapter(tmp_path / "a.json", torch.zeros(1, 2))
        assert layer.alpha == alpha
        assert load_adapter(tmp_path / "a.json", layer) is layer


def test_whole_numbers_of_any_size(tmp_path):
    write(tmp_path / "a.json", lora_a=[10**30, 2])
    assert load_adapter(tmp_path / "a.json", torch.zeros(1, 2)).lora_A.tolist() == torch.tensor([[1e30, 2]]).tolist()


def test_an_infinite_alpha_is_not_saved(tmp_path):
    layer = LoRALayer(torch.zeros(3, 2), rank=1, alpha=1)
    layer.alpha = float("inf")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_adapter(layer, tmp_path / "adapter.json")
    assert not list(tmp_path.iterdir())


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
    with pytest.raises(ValueError, match=r"rank=4, scale=2.0; the layer is of .*rank=4, scale=1.0"):
        load_adapter(QLoRALayer(weight, rank=4, alpha=4), tmp_path / "adapter.json")
    with pytest.raises(ValueError, match=r"is of d_out=64, d_in=64, .* the layer is of d_out=3, d_in=2, rank=4"):
        load_adapter(LoRALayer(torch.zeros(3, 2), rank=4, alpha=8), tmp_path / "adapter.json")


GOOD = {"version": "1.0", "rank": 1, "alpha": 2.0, "d_out": 1, "d_in": 2, "scale": 2.0, "lora_a": [1, 2], "lora_b": [3]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "2.0"}, "of version '2.0'"),
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"d_in": 3}, r"adapter\.json: lora_a has 2 values; 1 x 3 = 3"),
        ({"d_out": 2}, r"adapter\.json: lora_b has 1 values; 2 x 1 = 2"),
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
    with pytest.raises(ValueError, match=r"adapter\.json (is not whole JSON|holds a list|lacks rank, alpha, d_out)"):
        load_adapter(tmp_path / "adapter.json", torch.zeros(1, 2))


def test_wrong_base_and_missing_file(tmp_path):
    (tmp_path / "adapter.json").write_text(json.dumps(GOOD))
    for base in (torch.zeros(2, 2), torch.zeros(1, 3), torch.zeros(3), nn.Linear(3, 1)):
        with pytest.raises(ValueError, match="does not fit the base"):
            load_adapter(tmp_path / "adapter.json", base)
    assert load_adapter(tmp_path / "adapter.json", torch.zeros(2)).in_features == 2
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
    with pytest.raises(TypeError, match="in either order"):
        load_adapter(layer, layer)
