from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def no_progress_bars():
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def tiny_llama():
    """Make a Llama with weights large enough for its logits to depend on all of them."""

    def make(**options) -> nn.Module:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            initializer_range=0.2,
            **options,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 24), generator=torch.Generator(torch.get_default_device()).manual_seed(1))


@pytest.fixture
def write_gguf(tmp_path):
    """Write a Llama as GGUF the way llama.cpp does, with its matrices stored as `kind`."""

    def write(model: nn.Module, kind: str = "F32", extra: dict[str, np.ndarray] | None = None) -> Path:
        path = tmp_path / "tiny.gguf"
        config = model.config
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        stored = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        for name, parameter in model.named_parameters():
            values = parameter.detach().numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if name.split(".")[-2] in heads:  # llama.cpp interleaves the two halves of each rotary head
                values = values.reshape(heads[name.split(".")[-2]], 2, -1, values.shape[1]).swapaxes(1, 2)
                values = np.ascontiguousarray(values.reshape(parameter.shape))
            quantization = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
            layer, _, leaf = name.rpartition(".")
            writer.add_tensor(
                f"{stored.get_name(layer)}.{leaf}", gguf.quants.quantize(values, quantization), raw_dtype=quantization
            )
        for name, values in (extra or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
