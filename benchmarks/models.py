"""The models that training steps are measured on, and their tokens: the same for every contender."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from examples.smollm2 import gguf_path

logging.disable_progress_bar()


def write_smollm2(directory: Path, count: int) -> list[int]:
    """SmolLM2-135M-Instruct, dense in bfloat16; and `count` tokens of the standard library's documentation."""
    gguf = gguf_path()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are plain bfloat16 from here on.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(directory)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return AutoTokenizer.from_pretrained(**source)(text[: 8 * count])["input_ids"][:count]


def write_llama_1b(directory: Path, count: int) -> list[int]:
    """A model of the shape of Llama 3.2 1B with random weights, and `count` random tokens."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(directory)
    return torch.randint(config.vocab_size, (count,)).tolist()


MODELS = {"SmolLM2-135M": write_smollm2, "1B-shaped Llama": write_llama_1b}


def prepare(name: str, directory: Path, batches: int, batch_size: int, length: int) -> None:
    """Write a model as a Hugging Face directory, and token batches, to `directory`."""
    tokens = torch.tensor(MODELS[name](directory, batches * batch_size * length))
    (directory / "tokens.json").write_text(json.dumps(tokens.view(batches, batch_size, length).tolist()))


def operations(directory: Path, batch_size: int, length: int, rank: int) -> int:
    """Those of a training step's products: two of each frozen weight, three of an adapter's, and attention."""
    config = LlamaConfig.from_pretrained(directory)
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = [(queries, width), (keys, width), (keys, width), (width, queries)]
    shapes += [(inner, width), (inner, width), (width, inner)]
    layer = sum(4 * n * k + 6 * rank * (n + k) for n, k in shapes) + 6 * queries * (length + 1)
    return batch_size * length * (config.num_hidden_layers * layer + 4 * config.vocab_size * width)


def load_tokens(directory: Path) -> torch.Tensor:
    """The token batches that `prepare` wrote, int64 [batches, batch_size, length]."""
    return torch.tensor(json.loads((directory / "tokens.json").read_text()))
