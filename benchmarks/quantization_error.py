"""What 4 bits cost: errors of the weights, and of layers' outputs, in int4 and in bitsandbytes' formats.

1. Weights from N(0, 1), blocks of 64: mean absolute and root mean square error of each format.
2. A layer of Gaussian weights: relative error ||y - y_dense|| / ||y_dense|| of QLoRALayer with its zero adapter and of
   bitsandbytes' Linear4bit (NF4), in float32.
3. The same for every linear layer of SmolLM2-135M-Instruct, on the inputs that it sees when the model reads text.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from benchmarks.harness import print_table, refuse_if_red, write
from benchmarks.models import load_tokens, prepare
from benchmarks.peers import linear4bit
from entrenar.autograd.ops import int4_dequantize, int4_quantize
from entrenar.lora import QLoRALayer

TESTS = "tests/autograd"


def weight_errors(size: int) -> list[dict[str, Any]]:
    weight = torch.randn(size, size)

    def int4(scale_dtype: torch.dtype) -> Tensor:
        return int4_dequantize(*int4_quantize(weight, scale_dtype=scale_dtype), size)

    def peer(quant_type: str) -> Tensor:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type))

    decoded = {
        "int4, float16 scales": (4.25, int4(torch.float16)),
        "int4, float32 scales": (4.5, int4(torch.float32)),
        "bitsandbytes NF4, float32 scales": (4.5, peer("nf4")),
        "bitsandbytes FP4, float32 scales": (4.5, peer("fp4")),
    }
    return [
        {
            "format": name,
            "bits_per_weight": bits,
            "mean_absolute_error": round((values - weight).abs().mean().item(), 5),
            "rms_error": round((values - weight).square().mean().sqrt().item(), 5),
        }
        for name, (bits, values) in decoded.items()
    ]


@torch.no_grad()
def output_errors(weight: Tensor, x: Tensor) -> dict[str, float]:
    """Relative output error of each layer against the dense one; weight [N, K] and x [..., K], float32."""
    dense = x @ weight.T
    layers = {"QLoRALayer": QLoRALayer(weight, rank=16, alpha=32), "Linear4bit": linear4bit(weight, torch.float32)}
    return {name: ((layer(x) - dense).norm() / dense.norm()).item() for name, layer in layers.items()}


def model_errors(directory: Path) -> list[dict[str, Any]]:
    """Output errors of the model's layers by kind, each on its own inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    errors: dict[str, list[dict[str, float]]] = {}

    def compare(kind: str, layer: nn.Linear, args: tuple[Tensor, ...]) -> None:
        errors.setdefault(kind, []).append(output_errors(layer.weight, args[0].flatten(0, 1)))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            kind = name.rpartition(".")[2]
            module.register_forward_pre_hook(lambda layer, args, kind=kind: compare(kind, layer, args))
    with torch.no_grad():
        model(load_tokens(directory)[0])
    return [
        {
            "layers": kind,
            "count": len(pairs),
            **{f"{name}_median": statistics.median(pair[name] for pair in pairs) for name in pairs[0]},
            **{f"{name}_worst": max(pair[name] for pair in pairs) for name in pairs[0]},
        }
        for kind, pairs in errors.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    refuse_if_red(TESTS)
    torch.manual_seed(0)
    weights = weight_errors(arguments.size)
    print_table(weights)
    gaussian = output_errors(torch.randn(arguments.size, arguments.size), torch.randn(64, arguments.size))
    print_table([gaussian])
    with tempfile.TemporaryDirectory() as directory:
        prepare("SmolLM2-135M", Path(directory), batches=1, batch_size=1, length=256)
        model = model_errors(Path(directory))
    print_table(model)
    results = {"gaussian_weights": weights, "gaussian_layer_output": gaussian, "smollm2_135m_layer_outputs": model}
    write("quantization_error", {"size": arguments.size, **results})


if __name__ == "__main__":
    main()
