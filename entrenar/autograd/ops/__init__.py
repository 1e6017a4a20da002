"""Differentiable operations, each with a gradient derived by hand and kernels in csrc/."""

from entrenar.autograd.ops._library import cpu_level, load_kernels, set_cpu_level
from entrenar.autograd.ops.int4 import int4_dequantize, int4_quantize
from entrenar.autograd.ops.int4_linear import int4_linear
from entrenar.autograd.ops.int4_lora_linear import int4_lora_linear

__all__ = [
    "cpu_level",
    "int4_dequantize",
    "int4_linear",
    "int4_lora_linear",
    "int4_quantize",
    "set_cpu_level",
]

load_kernels()
