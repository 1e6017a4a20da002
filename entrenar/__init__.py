"""LoRA fine-tuning on 4-bit weights, as a PyTorch extension."""

from entrenar.autograd.ops import cpu_level, int4_dequantize, int4_quantize, set_cpu_level
from entrenar.lora import Int4Linear, LoRALayer, QLoRALayer

__all__ = [
    "Int4Linear",
    "LoRALayer",
    "QLoRALayer",
    "cpu_level",
    "int4_dequantize",
    "int4_quantize",
    "set_cpu_level",
]
