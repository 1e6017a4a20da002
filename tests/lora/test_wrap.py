from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer, wrap


def llama(tie: bool = False) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, tie_word_embeddings=tie,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tokens() -> torch.Tensor:
    return torch.arange(24).view(2, 12)


def test_wrapped_model_equals_the_decoded_dense_one():
    model = llama()
    wrap(model, rank=4, alpha=8)
    dense = llama()
    dense.load_state_dict(model.state_dict(), strict=False)
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            dense.get_submodule(name.removesuffix(".base")).weight.data = module.dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-4, atol=1e-5)


def test_adapter_gradients_equal_those_of_the_dense_decoded_model():
    model = llama()
    wrap(model, rank=4, alpha=8)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.1)
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, Int4Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantize(), requires_grad=False)
            dense.set_submodule(name, linear)
    for m in (model, dense):
        m(tokens(), labels=tokens()).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.requires_grad}
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert actual.keys() == expected.keys()
    assert len(actual) == 2 * 7 * 2
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-6)


def test_report_counts_what_is_there():
    model = llama(tie=True)
    dense_bytes = 4 * sum(p.numel() for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    parameters = sum(p.numel() for p in model.parameters())
    report = wrap(model, rank=4, alpha=8)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable_parameters == trainable
    assert report.base_parameters == parameters
    assert report.trainable_share == trainable / (parameters + trainable)
    assert report.bytes_before == dense_bytes
    assert report.bytes_after == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert len(report.adapted) == 14
    assert report.kept["lm_head"].reason == "output head, shared with model.embed_tokens"
    assert report.kept["model.embed_tokens"].dtype == torch.float32
    lines = str(report).splitlines()
    assert lines[1].split() == ["model.layers.*.self_attn.q_proj", "2", "64", "x", "64", "int4", "LoRA", "r=4"]
    assert f"trainable: {trainable:,} of" in str(report)


def test_only_adapters_train_and_the_mode_stays():
    model = llama()
    wrap(model, rank=4, alpha=8)
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert not any(m.training for m in model.modules())


def test_tied_head_stays_tied_even_when_it_is_named():
    model = llama(tie=True)
    report = wrap(model, targets=["q_proj", "lm_head"])
    head = model.lm_head
    assert isinstance(head, LoRALayer)
    assert head.base.weight is model.model.embed_tokens.weight
    assert report.kept["lm_head"].reason == "target, shared with model.embed_tokens"


def test_untied_head_is_quantized_when_it_is_named():
    model = llama()
    wrap(model, targets=["lm_head"])
    assert isinstance(model.lm_head, QLoRALayer)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_bits_none_leaves_the_base_alone():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight
    report = wrap(model, bits=None)
    assert model.model.layers[0].mlp.up_proj.base.weight is weight
    assert report.kept["model.layers.0.mlp.up_proj"].reason == "bits=None"


def test_int4_layers_keep_their_bytes():
    model = llama()
    base = Int4Linear.from_weight(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj = base
    wrap(model, bits=None)
    assert model.model.layers[0].mlp.up_proj.base is base


def test_regular_expression_must_match_the_whole_name():
    model = llama()
    report = wrap(model, targets=r".*\.0\..*(q|v)_proj")
    assert sorted(report.adapted) == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]


def test_a_module_used_twice_stays_one():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model.append(model[0])
    wrap(model, rank=2)
    assert model[0] is model[2]
    assert isinstance(model[0], QLoRALayer)


def test_a_model_without_the_habits_of_transformers():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    report = wrap(model, rank=2)
    assert list(report.adapted) == ["0", "2"]


def test_an_encoder_works():
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50)
    model = BertModel(config)
    wrap(model, targets=["query", "value"], rank=2)
    model(tokens()).last_hidden_state.sum().backward()
    assert model.encoder.layer[0].attention.self.query.lora_B.grad.abs().sum() > 0


def test_layers_that_their_parent_reads_are_left_alone():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    report = wrap(model, rank=2)
    assert list(report.adapted) == ["out"]
    assert report.kept["attention.out_proj"].reason == "NonDynamicallyQuantizableLinear"


@pytest.mark.parametrize("bits", [4, None])
def test_hooks_and_forwards_of_a_layer_still_run(bits):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    x = torch.randn(2, 8)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    forward = model[1].forward
    model[1].forward = lambda x: 2 * forward(x)
    expected = model[:2](x)
    calls.clear()
    report = wrap(model, rank=2, bits=bits)
    assert torch.equal(model[:2](x), expected)
    assert calls == ["hook"]
    assert list(report.adapted) == ["0", "1", "2"]
    assert {name: kept.reason for name, kept in report.kept.items()} == (
        {name: "target, has hooks, or another forward" for name in "01"}
        if bits
        else {**dict.fromkeys("01", "bits=None, has hooks, or another forward"), "2": "bits=None"}
    )


def encoder_of_torch(kind: str) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, dropout=0.0)
    return nn.Sequential(layer) if kind == "layer" else nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["layer", "encoder", "encoder of padded sequences"])
def test_torchs_fast_path_computes_the_adapters_too(kind, grad, bits):
    model = encoder_of_torch(kind)
    report = wrap(model, rank=2, bits=bits)
    for layer in report.adapted.values():
        nn.init.normal_(layer.lora_B)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    settings = {"src_key_padding_mask": padding} if "padded" in kind else {}
    x = torch.randn(2, 5, 64)
    with torch.set_grad_enabled(grad):
        expected, found = (model.train(mode)(x, **settings) for mode in (True, False))
    valid = ~padding if settings else slice(None)
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)
    reason = "target, read by TransformerEncoderLayer" if bits else "bits=None, read by TransformerEncoderLayer"
    assert {report.kept[name].reason for name in report.adapted} == {reason}


def test_models_that_read_the_weights_of_their_layers_run_and_train():
    config = {"vocab_size": 100, "num_layers": 1, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=100, hidden_size=64, num_hidden_layers=1))
    for model in (t5, mamba):
        report = wrap(model, rank=2, bits=None)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        assert all(layer.lora_B.grad.any() for layer in report.adapted.values())


class Holder(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


@pytest.mark.parametrize(("holder", "name"), [(nn.DataParallel, "module.lm_head"), (Holder, "model.lm_head")])
def test_the_head_of_a_model_inside_another_is_left_out(holder, name):
    report = wrap(holder(llama()), rank=2)
    assert len(report.adapted) == 14
    assert report.kept[name].reason == "output head"


@pytest.mark.parametrize("targets", [["q_proj", "no_such"], "no_such", []])
def test_target_that_matches_nothing_is_an_error_that_lists_what_exists(targets):
    model = llama()
    with pytest.raises(ValueError, match=r"no linear layer matches .*down_proj, gate_proj, k_proj, lm_head") as error:
        wrap(model, targets=targets)
    assert "'q_proj';" not in str(error.value)
    assert not any(isinstance(m, LoRALayer) for m in model.modules())


def test_a_bad_weight_leaves_the_model_as_it_was():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\[3, 5\] is nan"):
        wrap(model)
    assert not any(isinstance(m, (LoRALayer, Int4Linear)) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2.5}, "rank must be at least 1 and a whole number, not 2.5"),
        ({"rank": True}, "rank must be at least 1 and a whole number, not True"),
        ({"rank": 0}, "rank must be at least 1 and a whole number, not 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number, not inf"),
        ({"alpha": "8"}, "alpha must be a finite number, not '8'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
        ({"targets": "*_proj"}, r"targets: '\*_proj' is no regular expression: nothing to repeat"),
    ],
)
def test_bad_settings_leave_the_model_as_it_was(settings, message, bits):
    model = llama()
    with pytest.raises(ValueError, match=message):
        wrap(model, bits=bits, **settings)
    assert not any(isinstance(m, (LoRALayer, Int4Linear)) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_a_bad_weight_behind_a_shared_one_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"2\[0, 0\] is nan"):
        wrap(model)
    assert all(p.requires_grad for p in model.parameters())


def test_wrapping_twice_and_wrapping_a_bare_layer_are_refused():
    model = llama()
    wrap(model)
    with pytest.raises(ValueError, match=r"has adapters already.*model\.layers\.0\.self_attn\.q_proj"):
        wrap(model)
    with pytest.raises(ValueError, match="itself a linear layer"):
        wrap(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="bits must be 4 or None"):
        wrap(llama(), bits=8)
