from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.extra import require
from entrenar.checkpoint.gguf_settings import apply_settings
from entrenar.checkpoint.stored import StoredTensor, read_bytes

ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """A GGUF file of an architecture whose tensors map one to one onto the model's, in the same shapes."""

    def __init__(self, path: Path):
        self.path = path
        gguf, transformers = require("gguf"), require("transformers")
        try:
            header = gguf.GGUFReader(path)
            if header.byte_order != "I":
                raise ValueError("its byte order is not this machine's")
            if "split.count" in header.fields and header.fields["split.count"].contents() > 1:
                raise ValueError("it is one part of several: join them with llama.cpp's gguf-split --merge")
            self._architecture: str = header.fields["general.architecture"].contents()
            self._processor_class = self._find_processor_class()
            prefix = f"{self._architecture}."
            settings = {
                key.removeprefix(prefix): field.contents()
                for key, field in header.fields.items()
                if key.startswith(prefix)
            }
            # Not the tensors themselves, which would keep the whole file mapped.
            self._entries = {
                entry.name: (entry.tensor_type, tuple(reversed(entry.shape.tolist())), entry.data_offset, entry.n_bytes)
                for entry in header.tensors
            }
            del header
            self.config = transformers.AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
            if self.config.num_hidden_layers > len(self._entries):  # a model of that many would take hours to lay out
                raise ValueError(f"{len(self._entries)} tensors for {self.config.num_hidden_layers} layers")
            unread = apply_settings(self.config, self._architecture, settings)
        except CheckpointError:
            raise
        except Exception as error:  # damaged bytes are taken for lengths, types and sizes: anything may be raised
            raise CheckpointError(
                f"{path} cannot be read as a GGUF file (truncated, corrupt or of an unread kind): {error!r}"
            ) from error
        if unread:
            listed = ", ".join(f"{prefix}{key} = {value!r}" for key, value in sorted(unread.items()))
            raise CheckpointError(
                f"{path} has hyper-parameters that are not read: {listed}; load the Hugging Face directory instead"
            )
        if ROPE_FACTORS in self._entries:
            self._keep_rope_factors()

    def tensors(self, model: nn.Module) -> dict[str, StoredTensor]:
        """The stored tensors by the model's names, decoded to float32 when they are read."""
        processor = self._processor_class(config=self.config.to_dict())
        gguf = require("gguf")
        architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[self._architecture]
        names = gguf.get_tensor_name_map(architecture, self.config.num_hidden_layers)
        named = {}
        for name in model.state_dict():
            layer, _, leaf = name.rpartition(".")
            named[f"{names.get_name(layer)}.{leaf}"] = name
        return {
            named.get(name, name): StoredTensor(shape, partial(self._read, name, processor))
            for name, (_, shape, _, _) in self._entries.items()
        }

    def _find_processor_class(self) -> Any:
        """The class that turns stored values into the model's. Raises CheckpointError if it does more than that."""
        conversion = require("transformers.modeling_gguf_pytorch_utils")
        kind = conversion.TENSOR_PROCESSORS.get(self._architecture, conversion.TensorProcessor)
        # The processors of the other architectures reshape or merge tensors.
        one_to_one = (
            conversion.TensorProcessor,
            conversion.LlamaTensorProcessor,
            conversion.Gemma2TensorProcessor,
            conversion.NemotronTensorProcessor,
        )
        if kind not in one_to_one or self._architecture not in require("gguf").MODEL_ARCH_NAMES.values():
            raise CheckpointError(
                f"{self.path}: GGUF files of architecture {self._architecture!r} are not read; "
                "use the model's safetensors checkpoint"
            )
        return kind

    def _read(self, name: str, processor: Any) -> Tensor:
        kind, shape, offset, size = self._entries[name]
        rows = read_bytes(self.path, offset, size).reshape(*shape[:-1], -1).numpy()
        try:
            values = require("gguf").dequantize(rows, kind)
        except NotImplementedError as error:
            raise ValueError(f"{name} is stored as {kind.name}, which is not read") from error
        values = processor.process(weights=values, name=name).weights
        return torch.from_numpy(values).contiguous()

    def _keep_rope_factors(self) -> None:
        """Put the file's own divisors of the rotary frequencies (Llama 3.1 and later) into the configuration.

        transformers passes over them; its "longrope" is the rule that takes a divisor for every frequency.
        """
        if self.config.rope_parameters.get("rope_type") != "default":
            raise CheckpointError(
                f"{self.path} scales its rotary frequencies twice, by {ROPE_FACTORS} and by rope.scaling, which is not "
                "read; load the Hugging Face directory instead"
            )
        kind, _, offset, size = self._entries.pop(ROPE_FACTORS)
        factors = require("gguf").dequantize(read_bytes(self.path, offset, size).numpy(), kind).tolist()
        self.config.rope_parameters |= {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": self.config.max_position_embeddings,
        }
