from __future__ import annotations

from pathlib import Path
from typing import Any

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
    """Write a model as GGUF the way llama.cpp does, with matrices stored as `kind`, and more or other `settings`."""

    def write(
        model: nn.Module,
        kind: str = "F32",
        extra: dict[str, np.ndarray] | None = None,
        architecture: str = "llama",
        settings: dict[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / "tiny.gguf"
        config = model.config
        writer = gguf.GGUFWriter(path, architecture)
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        usual = {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "rope.freq_base": config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"],
            "vocab_size": config.vocab_size,
        }
        if hasattr(config, "rms_norm_eps"):
            usual["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
        for key, value in {**usual, **(settings or {})}.items():
            add[type(value)](f"{architecture}.{key}", value)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
        stored = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        for name, parameter in model.named_parameters():
            values = parameter.detach().numpy()
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
                values = values + 1
            if (
                architecture == "llama" and name.split(".")[-2] in heads
            ):  # llama.cpp interleaves the two halves of each rotary head
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
