"""Adapters of models, between this package and PEFT."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from entrenar.lora.adapter import adapter_fit, load_adapter, save_adapter
from entrenar.lora.adapter.files import STAGED
from entrenar.lora.adapter.peft_save import _target_modules
from entrenar.lora.layers import Int4Linear, LoRALayer, QLoRALayer
from entrenar.lora.wrap import wrap

# PEFT asks transformers by a name that it deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Two float32 evaluations that sum in another order: activations and logits here are of size 4, and some fifteen
# products follow one another, so allow 100 roundings of 4. The adapters move the logits by more than 0.1.
TOLERANCE = {"rtol": 0, "atol": 100 * 4 * 2**-23}
QV = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
UNEVEN = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]


def tiny(seed: int = 0, **config) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    others = {"vocab_size": 97, "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **others, **config})).eval()


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


def adapt(model: nn.Module, names: list[str], kind=LoRALayer, ranks=(4,), alphas=(8,), seed=0) -> nn.Module:
    for i, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        layer = kind(model.get_submodule(name), rank=ranks[i % len(ranks)], alpha=alphas[i % len(alphas)])
        setattr(model.get_submodule(parent), child, layer)
    torch.manual_seed(seed)
    randomize(model)
    return model.eval()


def dequantized(model: nn.Module) -> nn.Module:
    """The dense model whose weights are what the adapted model's int4 codes stand for."""
    dense = tiny(1)
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            name = name.removesuffix(".base")
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state[f"{name}.weight"] = module.dequantize()
    dense.load_state_dict(state)
    return dense


IDS = torch.arange(24).reshape(2, 12) * 7 % 97


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def peft_model(model: nn.Module, **config) -> nn.Module:
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **config})
    )
    randomize(adapted)
    return adapted.eval()


@pytest.mark.parametrize("names", [QV, UNEVEN, None], ids=["qv", "uneven", "all"])
@pytest.mark.parametrize(("ranks", "alphas"), [((4,), (8,)), ((4, 2, 6), (8, 3.5))])
def test_ours_in_peft_on_the_dense_model(tmp_path, names, ranks, alphas):
    dense = tiny()
    names = names or linears(dense)
    ours = adapt(copy.deepcopy(dense), names, ranks=ranks, alphas=alphas)
    save_adapter(ours, tmp_path / "adapter")
    plain = logits(dense)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    adapted = [name for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == [name for name in linears(tiny()) if name in names]
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    assert (logits(ours) - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 16},
        {"target_modules": r".*\.1\.mlp\.\w+_proj", "lora_dropout": 0.1},
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 1, r"^model\.layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"layers.0.mlp.down_proj": 5},
        },
        {"target_modules": ["k_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=["suffixes", "rslora", "regex", "patterns", "one-layer"],
)
def test_peft_in_ours(tmp_path, config):
    theirs = peft_model(tiny(), **config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = tiny()
    assert load_adapter(ours, tmp_path / "adapter") is ours
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    assert (logits(ours) - logits(tiny())).abs().max() > 0.01
    trains = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(trains) == sum("lora_" in name for name, _ in theirs.named_parameters())
    assert all(".lora_" in name for name in trains)
    assert not any(module.training for module in ours.modules())
    dropouts = {module.dropout.p for module in ours.modules() if isinstance(module, LoRALayer)}
    assert dropouts == {config.get("lora_dropout", 0.0)}

    save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(theirs), **TOLERANCE)


def test_int4_equals_peft_on_the_dequantized_model(tmp_path):
    ours = adapt(tiny(), linears(tiny()), QLoRALayer)
    save_adapter(ours, tmp_path / "adapter")
    dense = dequantized(ours)
    plain = logits(dense)
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    torch.testing.assert_close(logits(ours), logits(theirs), **TOLERANCE)
    assert (logits(ours) - plain).abs().max() > 0.1
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(input_ids=IDS, **greedy), theirs.generate(input_ids=IDS, **greedy))


@pytest.mark.parametrize("kind", [LoRALayer, QLoRALayer])
def test_round_trip_is_exact(tmp_path, kind):
    names = linears(tiny())
    ours = adapt(tiny(), names, kind)
    save_adapter(ours, tmp_path / "adapter")

    filled = adapt(tiny(), names, kind, seed=1)
    assert not torch.equal(logits(filled), logits(ours))
    load_adapter(str(tmp_path / "adapter"), filled)
    assert torch.equal(logits(filled), logits(ours))

    bare = tiny()
    if kind is QLoRALayer:
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(bare.get_submodule(parent), child, Int4Linear.from_weight(bare.get_submodule(name).weight))
    load_adapter(bare, tmp_path / "adapter")
    assert torch.equal(logits(bare), logits(ours))


def test_the_fit_of_the_base_is_recorded_and_held_to(tmp_path):
    ours = tiny()
    wrap(ours, rank=4, alpha=8, targets=["q_proj", "v_proj"], fit="mse")
    save_adapter(ours, tmp_path)
    assert adapter_fit(tmp_path) == "mse"
    weights = tmp_path / "adapter_model.safetensors"
    found = set()
    for _ in range(8):
        save_adapter(ours, tmp_path)
        found.add(weights.read_bytes())
    assert len(found) == 1
    assert load_file(weights).keys() == {f"base_model.model.{name}.lora_{m}.weight" for name in QV for m in "AB"}
    other = tiny()
    wrap(other, rank=4, alpha=8, targets=["q_proj", "v_proj"])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"trained on 4-bit weights of fit 'mse', and the model's are of fit 'absmax'"):
        load_adapter(other, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())

    # Dense weights, and codes of which nobody knows how they were made, take any adapter.
    load_adapter(tiny(), tmp_path)
    for module in other.modules():
        if isinstance(module, Int4Linear):
            module.fit = None
    load_adapter(other, tmp_path)
    save_adapter(other, tmp_path)
    assert adapter_fit(tmp_path) is None
    load_adapter(ours, tmp_path)

    # Weights of both fits are of neither.
    next(module for module in ours.modules() if isinstance(module, Int4Linear)).fit = "absmax"
    save_adapter(ours, tmp_path)
    assert adapter_fit(tmp_path) is None


def test_a_shared_layer_stays_one(tmp_path):
    torch.manual_seed(0)
    linear, x = nn.Linear(8, 8), torch.randn(3, 8)
    bare = nn.Sequential(linear, nn.ReLU(), linear)
    layer = LoRALayer(copy.deepcopy(linear), rank=2, alpha=4)
    nn.init.normal_(layer.lora_B)
    ours = nn.Sequential(layer, nn.ReLU(), layer)
    save_adapter(ours, tmp_path)
    load_adapter(bare, tmp_path)
    assert bare[0] is bare[2]
    assert torch.equal(bare(x), ours(x))


def test_the_two_files(tmp_path):
    ours = adapt(tiny(), QV)
    ours.get_submodule(QV[0]).lora_A.data = torch.randn(64, 4).bfloat16().T
    save_adapter(ours, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{name}.lora_{m}.weight" for name in QV for m in "AB"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors[f"base_model.model.{QV[0]}.lora_A.weight"], ours.get_submodule(QV[0]).lora_A.float())

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= peft.LoraConfig().to_dict().keys()
    assert config["target_modules"] == ["q_proj", "v_proj"]
    read = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(read, peft.LoraConfig)
    assert (read.r, read.lora_alpha, read.task_type, read.inference_mode) == (4, 8, "CAUSAL_LM", True)
    assert config["base_model_name_or_path"] is None

    ours.config._name_or_path = "someone/model"
    save_adapter(ours, tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "someone/model"


NAMES = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), unique=True, min_size=1)


@settings(max_examples=100, deadline=None)
@given(names=NAMES, data=st.data())
def test_targets_match_the_wrapped_layers_and_no_others(names, data):
    layers = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1))
    others = [name for name in names if name not in layers]
    config = peft.LoraConfig(target_modules=_target_modules(layers, others))
    assert [name for name in names if check_target_module_exists(config, name)] == [n for n in names if n in layers]


def saved(tmp_path: Path) -> Path:
    save_adapter(adapt(tiny(), QV), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(directory: Path, **change) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def untouched(model: nn.Module, directory: Path, message: str) -> None:
    """Loading fails with the message and leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trains = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, directory)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trains == [parameter.requires_grad for parameter in model.parameters()]


def test_adapter_of_another_model(tmp_path):
    directory = saved(tmp_path)
    untouched(tiny(num_hidden_layers=1), directory, r"this LlamaForCausalLM, which has no model\.layers\.1\.self_attn")
    sizes = rf"^{re.escape(str(directory))}: .*q_proj maps 32 to 32 features, and its adapter 64 to 64"
    untouched(tiny(hidden_size=32), directory, sizes)
    untouched(adapt(tiny(hidden_size=32), QV), directory, sizes)
    untouched(adapt(tiny(), QV[:1]), directory, r"missing are nothing; superfluous are \S+, \S+, \S+$")
    untouched(
        adapt(tiny(), QV[:3]), directory, r"missing are nothing; superfluous are model\.layers\.1\.self_attn\.v_proj$"
    )
    untouched(adapt(tiny(), linears(tiny())), directory, r"missing are lm_head, .* and 8 more; superfluous are nothing")


def test_the_model_that_an_adapter_was_made_for_is_named(tmp_path):
    directory = saved(tmp_path)
    untouched(tiny(num_hidden_layers=1), directory, "it was made for a model that it does not name$")
    change_config(directory, base_model_name_or_path="someone/model")
    untouched(tiny(num_hidden_layers=1), directory, "it was made for someone/model$")


# Of PEFT's settings, those that leave the result of a saved adapter as it is.
@pytest.mark.parametrize(
    "setting",
    [
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
        {"base_model_name_or_path": "someone/model"},
        {"eva_config": {"rho": 2.0}},
        {"exclude_modules": ["lm_head"]},
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"init_lora_weights": "orthogonal"},
        {"layers_pattern": "layers"},
        {"layers_to_transform": [0, 1]},
        {"megatron_core": "megatron.core"},
        {"peft_version": "0.21.2"},
        {"qalora_group_size": 16},
        {"revision": "main"},
        {"task_type": "CAUSAL_LM"},
    ],
    ids=lambda setting: "-".join(map(str, *setting.items())),
)
def test_settings_that_say_nothing_of_the_result(tmp_path, setting):
    directory = saved(tmp_path)
    expected = logits(load_adapter(tiny(), directory))
    change_config(directory, **setting)
    assert torch.equal(logits(load_adapter(tiny(), directory)), expected)


def test_loading_finishes_a_save_that_was_killed(tmp_path):
    directory = saved(tmp_path)
    (directory / STAGED).mkdir()
    (directory / "adapter_config.json").rename(directory / STAGED / "adapter_config.json")
    load_adapter(tiny(), directory)
    assert sorted(path.name for path in directory.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_adapter_of_another_rank_or_scaling(tmp_path):
    directory = saved(tmp_path)
    untouched(adapt(tiny(), QV, ranks=(2,)), directory, "has rank 4 and alpha 8, and in the model rank 2 and alpha 8")
    untouched(adapt(tiny(), QV, alphas=(4,)), directory, "has rank 4 and alpha 8, and in the model rank 4 and alpha 4")


def test_not_beside_a_linear_layer(tmp_path):
    directory = saved(tmp_path)
    model = tiny()
    model.model.layers[0].self_attn.q_proj = nn.Identity()
    untouched(model, directory, r"layers\.0\.self_attn\.q_proj is of class Identity")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(tmp_path, keep):
    path = saved(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    untouched(tiny(), path.parent, "is not a whole safetensors file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({KEY_A: torch.full((4, 64), float("nan"))}), r"q_proj\.lora_A\.weight has NaN or infinite"),
        (lambda t: t.pop(KEY_A), "q_proj has only lora_B"),
        (lambda t: t.update({KEY_A: torch.zeros(3, 64)}), r"lora_A of shape \(3, 64\) .* rank 4"),
        (lambda t: t.update({KEY_A: torch.zeros(4, 64, 1, 1)}), r"of shape \(4, 64, 1, 1\), not a real matrix"),
        (lambda t: t.update({KEY_A: torch.zeros(4, 64, dtype=torch.int8)}), r"is torch\.int8 of shape"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(1)}), r"lm_head\.weight is not the lora_A"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_bad_weights(tmp_path, change, message):
    path = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    untouched(tiny(), path.parent, message)


KEY_A = f"base_model.model.{QV[0]}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "does not compute: use_dora=True"),
        ({"bias": "all"}, "does not compute: bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"does not compute: modules_to_save=\['lm_head'\]"),
        ({"fan_in_fan_out": True}, "does not compute: fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "does not compute: init_lora_weights='pissa'"),
        ({"tomorrows_feature": 1}, "does not compute: tomorrows_feature=1"),
        ({"peft_type": "IA3"}, "peft_type is not LORA"),
        ({"r": 8}, "in adapter_config.json rank 8"),
        ({"r": "4"}, "has rank '4' and lora_alpha 8"),
        ({"lora_alpha": None}, "has rank 4 and lora_alpha None"),
        ({"lora_dropout": 1.5}, r"lora_dropout must be a number in \[0, 1\), and is 1.5"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern must map patterns to values"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    ],
)
def test_bad_config(tmp_path, change, message):
    directory = saved(tmp_path)
    change_config(directory, **change)
    untouched(tiny(), directory, message)


def test_dora_of_peft_is_refused_by_name(tmp_path):
    peft_model(tiny(), target_modules=["q_proj"], use_dora=True).save_pretrained(tmp_path)
    untouched(tiny(), tmp_path, "use_dora=True")


def test_damaged_and_missing_files(tmp_path):
    directory = saved(tmp_path)
    config = directory / "adapter_config.json"
    config.write_text(config.read_text()[:50])
    untouched(tiny(), directory, "is not whole JSON")
    with pytest.raises(FileNotFoundError, match=r"nowhere.adapter_config\.json"):
        load_adapter(tiny(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder; an adapter is one"):
        adapter_fit(tmp_path / "nowhere")
    config.write_text(json.dumps({"peft_type": "LORA"}))
    (directory / "adapter_model.safetensors").unlink()
    for read in (lambda: load_adapter(tiny(), directory), lambda: adapter_fit(directory)):
        with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors is missing"):
            read()


def test_nothing_to_save_and_nan(tmp_path):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRALayer"):
        save_adapter(tiny(), tmp_path / "adapter")
    model = adapt(tiny(), QV)
    with torch.no_grad():
        model.get_submodule(QV[1]).lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"v_proj\.lora_B has NaN or infinite"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
