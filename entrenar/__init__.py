"""LoRA fine-tuning on 4-bit weights, as a PyTorch extension."""

from entrenar.autograd import GradientError, Tape, Tensor, backward, check_gradient
from entrenar.autograd.ops import cpu_level, int4_dequantize, int4_quantize, set_cpu_level
from entrenar.checkpoint import CheckpointError, load_pretrained, load_tokenizer
from entrenar.fusion import fuse
from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer, load_adapter, save_adapter, wrap
from entrenar.optim import AdamW, AdamW8bit, CosineScheduler, clip_grad_norm
from entrenar.training import causal_lm_loss

__all__ = [
    "AdamW",
    "AdamW8bit",
    "CheckpointError",
    "CosineScheduler",
    "GradientError",
    "Int4Linear",
    "LoRALayer",
    "QLoRALayer",
    "Tape",
    "Tensor",
    "backward",
    "causal_lm_loss",
    "check_gradient",
    "clip_grad_norm",
    "cpu_level",
    "fuse",
    "int4_dequantize",
    "int4_quantize",
    "load_adapter",
    "load_pretrained",
    "load_tokenizer",
    "save_adapter",
    "set_cpu_level",
    "wrap",
]
