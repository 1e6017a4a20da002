from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from entrenar.checkpoint import CheckpointError, load_pretrained, load_tokenizer
from entrenar.lora import Int4Linear

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "initializer_range": 0.2,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, rope_parameters=LLAMA3_ROPE)),
    "llama tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "qwen2 with biases": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=16)),
    "gemma3 with scaled embeddings": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**LLAMA, head_dim=16, sliding_window=8)
    ),
    "phi3 with fused projections": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**LLAMA)),
    "gpt2 without linear layers": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64, eos_token_id=2)
    ),
    "bert, an encoder": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
}


def output(model, tokens):
    with torch.no_grad():
        return model(tokens)[0]


def linears(model) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@pytest.fixture
def saved(tmp_path, tiny_llama):
    """A model and the directory that it is saved in."""

    def save(**options):
        model = tiny_llama(**options)
        model.save_pretrained(tmp_path / "model")
        return model, tmp_path / "model"

    return save


@pytest.fixture
def damaged(saved):
    """The directory of a model whose tensors went through `change` before they were saved."""

    def save(change, **options):
        _, path = saved(**options)
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path

    return save


@pytest.mark.parametrize("name", MODELS)
def test_dense_model_equals_the_one_of_transformers(name, tmp_path, tokens):
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModel if "bert" in name else transformers.AutoModelForCausalLM
    theirs = theirs.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_pretrained(tmp_path, bits=None, dtype=torch.float32)

    assert type(ours) is type(theirs)
    assert torch.equal(output(ours, tokens), output(theirs, tokens))
    buffers = dict(ours.named_buffers())
    for key, expected in theirs.named_buffers():
        assert torch.equal(buffers[key], expected), key
    assert ours.training is theirs.training is False
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    assert ours.config.to_dict() == theirs.config.to_dict()
    if ours.can_generate():
        assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2 without linear layers"])
@pytest.mark.parametrize("block", [32, 64])
def test_int4_model_equals_the_dense_model_of_the_decoded_weights(name, block, tmp_path, tokens):
    torch.manual_seed(0)
    dense = MODELS[name]().eval()
    dense.save_pretrained(tmp_path, max_shard_size="50KB")
    ours = load_pretrained(tmp_path, dtype=torch.float32, block=block)

    assert not linears(ours)
    for layer, linear in linears(dense).items():
        packed = ours.get_submodule(layer)
        assert isinstance(packed, Int4Linear)
        assert packed.block == block
        decoded = packed.dequantize()
        half_a_step = linear.weight.abs().max() / 14 * 1.001  # the scale itself is rounded to float16
        assert (decoded - linear.weight).abs().max() <= half_a_step
        linear.weight.data = decoded
    # Sums in another order over at most 96 products and two layers: a few hundred roundings of float32.
    torch.testing.assert_close(output(ours, tokens), output(dense, tokens), rtol=1e-4, atol=1e-5)


def test_the_fit_reaches_every_layer(saved):
    model, path = saved()
    ours = load_pretrained(path, fit="mse")
    for name, linear in linears(model).items():
        expected = Int4Linear.from_weight(linear.weight, fit="mse")
        packed = ours.get_submodule(name)
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.scales, expected.scales)
    by_absmax = load_pretrained(path, fit="absmax").state_dict()
    assert any(not torch.equal(value, by_absmax[key]) for key, value in ours.state_dict().items() if "codes" in key)


def test_a_model_without_linear_layers_is_not_called_quantized(tmp_path):
    MODELS["gpt2 without linear layers"]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"GPT2LMHeadModel has no nn\.Linear .* bits=None"):
        load_pretrained(tmp_path)


def test_what_stays_dense_has_the_asked_dtype_and_codes_are_frozen(saved):
    _, path = saved(attention_bias=True)
    model = load_pretrained(path)
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith((".codes", ".scales")))
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.q_proj.bias.device.type == "cpu"
    assert model.config.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, None])
def test_tied_head_shares_its_storage(saved, bits):
    _, path = saved(tie_word_embeddings=True)
    model = load_pretrained(path, bits=bits)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_head_left_out_of_the_files_is_tied(damaged, tokens):
    path = damaged(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=False)
    model = load_pretrained(path, bits=None, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    model.save_pretrained(path)
    again = load_pretrained(path, bits=None, dtype=torch.float32)
    assert torch.equal(output(again, tokens), output(model, tokens))


def test_tied_head_may_be_stored_twice_if_it_is_the_same(damaged):
    path = damaged(
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}), tie_word_embeddings=True
    )
    model = load_pretrained(path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight .*are tied but differ"):
        load_pretrained(path)


def test_names_of_the_model_without_its_head_are_understood(saved, tmp_path, tokens):
    """The files of a base model, whose names lack the prefix, load into the model with a (tied) head."""
    model, path = saved(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "base")
    shutil.copy(path / "config.json", tmp_path / "base" / "config.json")
    ours = load_pretrained(tmp_path / "base", bits=None, dtype=torch.float32)
    assert torch.equal(output(ours, tokens), output(model, tokens))


def test_leftovers_that_the_class_declares_are_passed_over(damaged):
    path = damaged(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert load_pretrained(path) is not None


def test_all_missing_superfluous_and_misshapen_tensors_are_listed_at_once(damaged):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 64)
        tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 63)

    with pytest.raises(CheckpointError) as caught:
        load_pretrained(damaged(change))
    message = str(caught.value)
    assert "2 missing: " in message
    assert "model.norm.weight" in message
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "1 superfluous: model.layers.2.mlp.up_proj.weight" in message
    assert "1 misshapen: model.layers.0.self_attn.q_proj.weight [64, 63] instead of [64, 64]" in message


@pytest.mark.parametrize("bits", [4, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_weight_that_is_not_finite_is_named_with_its_index(damaged, bits, bad, name):
    path = damaged(lambda tensors: tensors[name].__setitem__((3, 17), bad))
    with pytest.raises(CheckpointError, match=rf"{name}\[3, 17\] is {bad}"):
        load_pretrained(path, bits=bits)


def test_a_weight_beyond_the_range_of_the_dtype_is_named(damaged):
    path = damaged(lambda tensors: tensors["model.norm.weight"].__setitem__(5, 1e5))
    assert load_pretrained(path, bits=None, dtype=torch.float32).model.norm.weight[5] == 1e5
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight\[5\] is inf in torch\.float16"):
        load_pretrained(path, bits=None, dtype=torch.float16)


@pytest.mark.parametrize("bits", [4, None])
def test_integers_where_weights_belong_are_refused(damaged, bits):
    name = "model.layers.0.self_attn.q_proj.weight"
    path = damaged(lambda tensors: tensors.update({name: torch.zeros(64, 64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{name}.* torch\.int8"):
        load_pretrained(path, bits=bits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error_wherever_it_ends(saved, kept):
    _, path = saved()
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load_pretrained(path)


@pytest.mark.parametrize("start", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"{]", b"not safetensors at all"])
def test_a_corrupt_header_is_an_error(saved, start):
    _, path = saved()
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(0 if not start else None)
        file.write(start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or corrupt"):
        load_pretrained(path)


def test_a_file_without_permission_is_no_missing_file(saved, monkeypatch):
    _, path = saved()
    opened = Path.open

    def without_permission(self, *arguments, **options):
        if self.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", without_permission)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*Permission denied"):
        load_pretrained(path)


def test_a_tensor_stored_under_two_names_is_refused_with_both(damaged):
    name = "layers.0.mlp.up_proj.weight"
    path = damaged(lambda tensors: tensors.update({name: tensors[f"model.{name}"].clone()}))
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(path)
    message = str(caught.value)
    assert f"stores model.{name} twice" in message
    assert f"as {name} " in message or f"as {name}:" in message
    assert f"as model.{name} " in message or f"as model.{name}:" in message


def test_a_dtype_that_is_not_read_is_named(damaged):
    path = damaged(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has dtype F8_E4M3"):
        load_pretrained(path)


def test_shards_must_be_there_and_agree_with_their_index(tmp_path, tiny_llama):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    index = tmp_path / "model.safetensors.index.json"
    listing = json.loads(index.read_text())
    missing = copy.deepcopy(listing)
    missing["weight_map"]["model.norm.weight"] = "model-00099-of-00099.safetensors"
    index.write_text(json.dumps(missing))
    with pytest.raises(CheckpointError, match=r"shards that are not there: model-00099-of-00099\.safetensors"):
        load_pretrained(tmp_path)

    moved = copy.deepcopy(listing)
    first = moved["weight_map"]["model.embed_tokens.weight"]
    moved["weight_map"]["model.norm.weight"] = first
    index.write_text(json.dumps(moved))
    with pytest.raises(CheckpointError, match=r"disagree about model\.norm\.weight"):
        load_pretrained(tmp_path)

    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="is not an index of shards"):
            load_pretrained(tmp_path)


def test_what_is_no_checkpoint_is_refused_with_the_reason(saved, tmp_path):
    _, path = saved()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="give the directory"):
        load_pretrained(path / "model.safetensors")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json \(it is empty\)"):
        load_pretrained(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load_pretrained(empty)
    (path / "model.safetensors").rename(path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights.*other\.safetensors"):
        load_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="no pickle is loaded: convert it to safetensors"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "unheard-of"}, "describes no model"),
        (
            {"architectures": ["UnheardOfForCausalLM"]},
            "'UnheardOfForCausalLM', which this version of transformers does not have",
        ),
        ({"num_key_value_heads": 0}, "builds no model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantized"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(saved, change, reason):
    _, path = saved()
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=reason):
        load_pretrained(path)


def test_a_config_that_is_no_json_is_refused(saved):
    _, path = saved()
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json describes no model"):
        load_pretrained(path)


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 8}, {"block": 48}, {"scale_dtype": torch.bfloat16}, {"fit": "nf4"}, {"dtype": torch.float16}],
)
def test_arguments_are_checked_before_anything_is_read(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"must be|compute in"):
        load_pretrained(tmp_path / "nowhere", **arguments)


def test_the_model_generates_as_its_generation_config_says(saved, tokens):
    model, path = saved()
    model.generation_config.max_new_tokens = 3
    model.generation_config.save_pretrained(path)
    ours = load_pretrained(path, bits=None, dtype=torch.float32)
    assert torch.equal(ours.generate(tokens, do_sample=False), model.generate(tokens, do_sample=False))


@pytest.mark.parametrize("text", ["", "{not json", "[1]", '{"max_new_tokens": -5}'])
def test_a_corrupt_generation_config_is_refused_before_a_weight_is_read(text, saved, monkeypatch):
    _, path = saved()
    (path / "generation_config.json").write_text(text)
    monkeypatch.setattr("entrenar.checkpoint.pretrained.fill", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError, match=r"generation_config\.json is no configuration of generation"):
        load_pretrained(path)


@pytest.mark.parametrize(
    ("kind", "options", "stack"),
    [
        ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}, "block_sparse_moe.experts.gate_up_proj"),
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}, "mlp.experts.gate_up_proj"),
    ],
)
def test_stacked_experts_are_refused_in_four_bits_and_load_dense(kind, options, stack, tmp_path, tokens):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**LLAMA, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{stack} \(experts\), which stay dense: load it with bits=None"):
        load_pretrained(tmp_path)
    ours = load_pretrained(tmp_path, bits=None, dtype=torch.float32)
    assert torch.equal(output(ours, tokens), output(model, tokens))


def test_convolutions_beside_the_linear_layers_are_no_stacks(tmp_path):
    model = transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**LLAMA, layer_types=["full_attention", "conv"]))
    model.save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).model.layers[1].conv.conv.weight.dtype == torch.bfloat16


def test_tokenizer_of_a_directory_has_its_chat_template(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "user": 1, "hello": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.apply_chat_template([{"role": "user", "content": "hello"}])["input_ids"] == [1, 2]

    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(device, saved):
    _, path = saved()
    with pytest.raises(ValueError, match=f"there is no device '{device}' .*; choose one of cpu"):
        load_pretrained(path, device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [4, None])
def test_loads_onto_a_gpu_what_it_loads_onto_the_cpu(bits, saved, tokens):
    _, path = saved()
    there, here = load_pretrained(path, bits, device="cuda"), load_pretrained(path, bits)
    assert {x.device.type for x in (*there.parameters(), *there.buffers())} == {"cuda"}
    for name, tensor in here.state_dict().items():
        assert torch.equal(there.state_dict()[name].cpu(), tensor)
    logits = here(tokens).logits
    torch.testing.assert_close(there(tokens.cuda()).logits.cpu(), logits, rtol=2**-6, atol=2**-6 * logits.abs().max())
