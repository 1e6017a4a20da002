"""What 4 bits cost: errors of the weights, and of layers' outputs, in int4 and in bitsandbytes' formats.

1. Weights from N(0, 1), blocks of 64: mean absolute and root mean square error of each format.
2. A layer of Gaussian weights: relative error ||y - y_dense|| / ||y_dense|| of QLoRALayer with its zero adapter, with
   either fit, and of bitsandbytes' Linear4bit (NF4), in float32.
3. The same for every linear layer of SmolLM2-135M-Instruct, on the inputs that it sees when the model reads text.
4. The model's loss on that text, dense and with the weights of its linear layers (not the head) as each format leaves
   them, computed in float32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn

from benchmarks.harness import print_table, refuse_if_red, write
from benchmarks.models import load_tokens, prepare
from benchmarks.peers import linear4bit
from entrenar.autograd.ops import int4_dequantize, int4_quantize
from entrenar.autograd.ops.int4 import Fit
from entrenar.lora import QLoRALayer

TESTS = [f"tests/autograd/test_{name}.py" for name in ("int4", "int4_fit", "int4_linear")]


def weight_errors(size: int) -> list[dict[str, Any]]:
    weight = torch.randn(size, size)

    def int4(scale_dtype: torch.dtype, fit: Fit) -> Tensor:
        return int4_dequantize(*int4_quantize(weight, scale_dtype=scale_dtype, fit=fit), size)

    def peer(quant_type: str) -> Tensor:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type))

    decoded = {
        "int4, float16 scales": (4.25, int4(torch.float16, "absmax")),
        "int4, float32 scales": (4.5, int4(torch.float32, "absmax")),
        "int4, float16 scales, mse": (4.25, int4(torch.float16, "mse")),
        "int4, float32 scales, mse": (4.5, int4(torch.float32, "mse")),
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
    layers = {
        "QLoRALayer": QLoRALayer(weight, rank=16, alpha=32),
        "QLoRALayer_mse": QLoRALayer(weight, rank=16, alpha=32, fit="mse"),
        "Linear4bit": linear4bit(weight, torch.float32),
    }
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


def model_losses(directory: Path) -> dict[str, float]:
    """Mean cross-entropy in nats of every token after a sequence's first, by the format of the linear layers."""
    from transformers import AutoModelForCausalLM

    def int4(weight: Tensor, fit: Fit) -> Tensor:
        return int4_dequantize(*int4_quantize(weight, fit=fit), weight.shape[1])

    def nf4(weight: Tensor) -> Tensor:
        return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))

    formats: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda weight: weight,
        "int4": lambda weight: int4(weight, "absmax"),
        "int4, mse": lambda weight: int4(weight, "mse"),
        "bitsandbytes NF4": nf4,
    }
    losses = {}
    for name, decoded in formats.items():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            for layer, module in model.named_modules():
                if isinstance(module, nn.Linear) and layer != "lm_head":
                    module.weight.copy_(decoded(module.weight.detach().contiguous()))
            sequences = [model(batch, labels=batch).loss.item() for batch in load_tokens(directory)]
        losses[name] = round(statistics.mean(sequences), 4)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    refuse_if_red(*TESTS)
    torch.manual_seed(0)
    weights = weight_errors(arguments.size)
    print_table(weights)
    gaussian = output_errors(torch.randn(arguments.size, arguments.size), torch.randn(64, arguments.size))
    print_table([gaussian])
    with tempfile.TemporaryDirectory() as directory:
        prepare("SmolLM2-135M", Path(directory), batches=16, batch_size=1, length=256)
        model = model_errors(Path(directory))
        losses = model_losses(Path(directory))
    print_table(model)
    print_table([losses])
    results = {
        "gaussian_weights": weights,
        "gaussian_layer_output": gaussian,
        "smollm2_135m_layer_outputs": model,
        "smollm2_135m_loss": losses,
    }
    write("quantization_error", {"size": arguments.size, **results})


if __name__ == "__main__":
    main()
