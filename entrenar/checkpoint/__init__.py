"""Reading pretrained models: Hugging Face directories of safetensors, and GGUF files."""

from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.pretrained import load_pretrained
from entrenar.checkpoint.tokenizer import load_tokenizer

__all__ = ["CheckpointError", "load_pretrained", "load_tokenizer"]
