from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entrenar.autograd.ops.int4 import BLOCKS, SCALE_DTYPES, Fit, check_fit
from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.extra import require
from entrenar.checkpoint.fill import check_names_and_shapes, compute_buffers, fill
from entrenar.checkpoint.gguf import GgufFile
from entrenar.checkpoint.safetensors import SafetensorsDirectory
from entrenar.checkpoint.stored import Checkpoint


def load_pretrained(
    path: str | PathLike[str],
    bits: int | None = 4,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    block: int = 64,
    scale_dtype: torch.dtype = torch.float16,
    fit: Fit = "absmax",
) -> nn.Module:
    """Load a pretrained transformers model into 4 bits without ever holding it in 16.

    The model is laid out without memory, then filled tensor by tensor: each is read, moved to the device, quantized
    there and dropped before the next, so the peak is the loaded size plus one tensor (with its float32 copy where it
    is stored as float16). It comes back in `eval()`, as from transformers.

    Args:
        path: a Hugging Face directory (config.json with model.safetensors or its shards), or a GGUF file of an
            architecture of the Llama kind. Pickled weights are refused, and nothing is downloaded.
        bits: 4 turns every nn.Linear but the output head into an Int4Linear; None loads the model dense.
        device: where the model lies; the CPU if None. On a GPU the CPU's memory holds one tensor at a time.
        dtype: of what stays dense: embeddings, head, norms, biases.
        block: elements of a row that share a scale, 64 or 32.
        scale_dtype: float16 or float32, in which the scales are stored.
        fit: how scales are found, "absmax" or "mse", as in int4_quantize.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        CheckpointError: (a ValueError) the files are damaged, their tensors are not the model's (all missing,
            superfluous and misshapen ones are listed), a weight is not finite (its name and index are given), a GGUF
            file has hyper-parameters that are not read, or, for 4 bits, there is no nn.Linear to quantize, or most
            weights are in stacked experts, which would stay dense.
        ModuleNotFoundError: transformers or gguf is not installed.
        ValueError: also for a device that torch does not have here.
    """
    if bits not in (4, None):
        raise ValueError(f"bits must be 4, or None for a dense model, not {bits!r}")
    if block not in BLOCKS or scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"block must be 64 or 32 and scale_dtype float16 or float32, not {block} and {scale_dtype}")
    check_fit(fit)
    if bits == 4 and dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"4-bit layers compute in float32 or bfloat16, not {dtype}")
    device = available_device("cpu" if device is None else device)
    checkpoint = _open(Path(path))
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise CheckpointError(f"{path} is already quantized (quantization_config); load the model it was made from")

    generation = _generation_config(checkpoint.path)
    checkpoint.config.name_or_path = str(path)
    model = _empty_model(checkpoint.config, dtype)
    stored = checkpoint.tensors(model)
    head = _head_weight(model)
    if head is not None and head not in stored and not getattr(checkpoint.config, "tie_word_embeddings", False):
        # Writers leave a head out where it shares its storage with the embedding, whatever the configuration says.
        checkpoint.config.tie_word_embeddings = True
        model = _empty_model(checkpoint.config, dtype)
    check_names_and_shapes(model, stored, checkpoint.path)
    int4 = {"block": block, "scale_dtype": scale_dtype, "fit": fit} if bits == 4 else None
    try:
        fill(model, stored, int4=int4, device=device)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    compute_buffers(model, device)
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def available_device(device: torch.device | str) -> torch.device:
    """The device, with its index where its kind has several. Raises ValueError where torch can put no tensor there."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to be missing
        reason = str(error).splitlines()[0]
        there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"there is no device {str(device)!r} ({reason}); choose one of {', '.join(there)}") from error


def _open(path: Path) -> Checkpoint:
    if path.is_dir():
        return SafetensorsDirectory(path)
    if path.suffix == ".gguf" and path.is_file():
        return GgufFile(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}: give a Hugging Face directory or a .gguf file (nothing is downloaded)"
        )
    raise CheckpointError(
        f"{path} is neither a directory nor a .gguf file; of a safetensors checkpoint, give the directory"
    )


def _generation_config(directory: Path) -> Any:
    """What the directory says about generation, or None."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return require("transformers").GenerationConfig.from_pretrained(directory)
    except Exception as error:  # of no JSON, of another thing than an object, and of values out of range
        raise CheckpointError(f"{path} is no configuration of generation ({error}): mend it or remove it") from error


def _empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model that `config` describes, on the meta device: shapes and dtypes without memory."""
    transformers = require("transformers")
    named = (config.architectures or [None])[0]
    if named is not None and not hasattr(transformers, named):
        raise CheckpointError(
            f"{config.name_or_path} is a model of class {named!r}, which this version of transformers does not have"
        )
    try:
        with torch.device("meta"):
            if named is None:
                return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
            return getattr(transformers, named)._from_config(config, dtype=dtype)
    except Exception as error:  # sizes that do not fit together show only here, in whatever way the class trips
        raise CheckpointError(f"{config.name_or_path}: its configuration builds no model: {error!r}") from error


def _head_weight(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
