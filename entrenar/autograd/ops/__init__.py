"""Differentiable operations, each with a gradient derived by hand and kernels in csrc/."""

from entrenar.autograd.ops._library import cpu_level, load_kernels, set_cpu_level
from entrenar.autograd.ops.activation import gelu, log_softmax, relu, sigmoid, silu, softmax, tanh
from entrenar.autograd.ops.add_rms_norm import add_rms_norm
from entrenar.autograd.ops.attention import attention, scaled_dot_product_attention
from entrenar.autograd.ops.elementwise import add, div, exp, log, mul, neg, pow, sqrt, sub
from entrenar.autograd.ops.embedding import dropout, embedding
from entrenar.autograd.ops.head_cross_entropy import head_cross_entropy
from entrenar.autograd.ops.int4 import int4_dequantize, int4_quantize
from entrenar.autograd.ops.int4_linear import int4_linear
from entrenar.autograd.ops.int4_lora_linear import int4_lora_linear
from entrenar.autograd.ops.int4_lora_linears import int4_lora_linears
from entrenar.autograd.ops.linear_cross_entropy import linear_cross_entropy
from entrenar.autograd.ops.loss import cross_entropy, mse, mse_loss
from entrenar.autograd.ops.matmul import linear, matmul
from entrenar.autograd.ops.norm import layer_norm, rms_norm
from entrenar.autograd.ops.packed_attention import packed_attention
from entrenar.autograd.ops.reduction import mean, sum
from entrenar.autograd.ops.rotary import rotary_embedding
from entrenar.autograd.ops.shape import cat, expand, getitem, permute, reshape, transpose
from entrenar.autograd.ops.swiglu import swiglu
from entrenar.autograd.ops.swiglu_int4_lora_linear import swiglu_int4_lora_linear

__all__ = [
    "add",
    "add_rms_norm",
    "attention",
    "cat",
    "cpu_level",
    "cross_entropy",
    "div",
    "dropout",
    "embedding",
    "exp",
    "expand",
    "gelu",
    "getitem",
    "head_cross_entropy",
    "int4_dequantize",
    "int4_linear",
    "int4_lora_linear",
    "int4_lora_linears",
    "int4_quantize",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "log",
    "log_softmax",
    "matmul",
    "mean",
    "mse",
    "mse_loss",
    "mul",
    "neg",
    "packed_attention",
    "permute",
    "pow",
    "relu",
    "reshape",
    "rms_norm",
    "rotary_embedding",
    "scaled_dot_product_attention",
    "set_cpu_level",
    "sigmoid",
    "silu",
    "softmax",
    "sqrt",
    "sub",
    "sum",
    "swiglu",
    "swiglu_int4_lora_linear",
    "tanh",
    "transpose",
]

load_kernels()
