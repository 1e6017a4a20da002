from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.extra import require
from entrenar.checkpoint.stored import StoredTensor, read_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsDirectory:
    """A Hugging Face directory: config.json with model.safetensors, or with shards and their index."""

    def __init__(self, path: Path):
        self.path = path
        if not (path / "config.json").is_file():
            adapter = (path / "adapter_config.json").is_file()
            hint = "it holds an adapter: load its base model, then the adapter" if adapter else _contents(path)
            raise CheckpointError(f"{path} has no config.json ({hint})")
        self._stored = _read_shards(path)
        transformers = require("transformers")
        try:
            self.config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each of the many configurations has checks of its own
            raise CheckpointError(f"{path / 'config.json'} describes no model that can be built: {error}") from error

    def tensors(self, model: nn.Module) -> dict[str, StoredTensor]:
        """The stored tensors by the model's names, less those that its class declares to be leftovers."""
        leftover = _leftovers(model)
        named = _model_names(model, list(self._stored), self.path)
        keys: dict[str, str] = {}
        for key, name in named.items():
            if not leftover(name) and keys.setdefault(name, key) != key:
                raise CheckpointError(f"{self.path} stores {name} twice, as {keys[name]} and as {key}: remove one")
        return {name: self._stored[key] for name, key in keys.items()}


def _read_shards(directory: Path) -> dict[str, StoredTensor]:
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").is_file():
        return _read_header(directory / "model.safetensors")
    if not index.is_file():
        if (directory / "pytorch_model.bin").exists() or (directory / "pytorch_model.bin.index.json").exists():
            raise CheckpointError(
                f"{directory} holds only pickled weights (pytorch_model.bin), and no pickle is loaded: "
                "convert it to safetensors, e.g. with transformers' save_pretrained, where you trust it"
            )
        raise CheckpointError(
            f"{directory} has no weights: neither model.safetensors nor {index.name} ({_contents(directory)})"
        )

    try:
        shard_of: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        shards = {shard: directory / shard for shard in sorted(set(shard_of.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error!r}") from error
    if lacking := [shard for shard, path in shards.items() if not path.is_file()]:
        raise CheckpointError(f"{index} names shards that are not there: {', '.join(lacking)}")

    stored: dict[str, StoredTensor] = {}
    for shard, path in shards.items():
        header = _read_header(path)
        listed = {name for name, where in shard_of.items() if where == shard}
        if difference := sorted(listed ^ header.keys()):
            raise CheckpointError(f"{index} and {shard} disagree about {', '.join(difference)}")
        stored |= header
    return stored


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        # safe_open checks the header against itself and against the file's length.
        with path.open("rb") as file, safe_open(path, framework="pt"):
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}); copy it again") from error
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: {name} has dtype {entry['dtype']}, which is not read: save the checkpoint in BF16, F16 or F32"
            )
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        read = partial(_read_tensor, path, 8 + length + begin, end - begin, DTYPES[entry["dtype"]], shape)
        stored[name] = StoredTensor(shape, read)
    return stored


def _read_tensor(path: Path, offset: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return read_bytes(path, offset, size).view(dtype).reshape(shape)


def _model_names(model: Any, keys: list[str], path: Path) -> dict[str, str]:
    """Each key of the files with its name in the model, by transformers' own rules of renaming."""
    loading = require("transformers.core_model_loading")
    rules = require("transformers.conversion_mapping").get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, loading.WeightConverter)]
    slots = model.state_dict()
    named: dict[str, str] = {}
    converted = []
    for key in keys:
        name, converter = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, slots)
        named[key] = name
        if converter is not None:
            converted.append(key)
    if converted:
        raise CheckpointError(
            f"{path}: a {type(model).__name__} is built from merged or split tensors, which is not read yet: "
            f"{', '.join(converted[:8])}{' ...' if len(converted) > 8 else ''}"
        )
    return named


def _leftovers(model: Any) -> Callable[[str], bool]:
    # Old checkpoints carry buffers that the models now compute; transformers ignores the same ones.
    patterns = {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())}
    slots = model.state_dict().keys()
    leftover = re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))
    return lambda name: name not in slots and leftover.search(name) is not None


def _contents(directory: Path) -> str:
    names = sorted(entry.name for entry in directory.iterdir())
    return f"it holds {', '.join(names[:12])}{' ...' if len(names) > 12 else ''}" if names else "it is empty"
