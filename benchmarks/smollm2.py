"""SmolLM2-135M-Instruct and text of the standard library's documentation, the same for every contender."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from examples.smollm2 import gguf_path

logging.disable_progress_bar()


def prepare(directory: Path, batches: int, batch_size: int, length: int) -> None:
    """Write the dense bfloat16 model as a Hugging Face directory, and token batches of real text, to `directory`."""
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
    ids = AutoTokenizer.from_pretrained(**source)(text[: 8 * batches * batch_size * length])["input_ids"]
    tokens = torch.tensor(ids[: batches * batch_size * length]).view(batches, batch_size, length)
    (directory / "tokens.json").write_text(json.dumps(tokens.tolist()))


def load_tokens(directory: Path) -> torch.Tensor:
    """The token batches that `prepare` wrote, int64 [batches, batch_size, length]."""
    return torch.tensor(json.loads((directory / "tokens.json").read_text()))
