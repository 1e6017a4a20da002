from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from entrenar.checkpoint.errors import CheckpointError
from entrenar.checkpoint.extra import require


def load_tokenizer(path: str | PathLike[str]) -> Any:
    """Load the tokenizer, with its chat template, of a Hugging Face directory or of a GGUF file.

    Returns a transformers tokenizer. Raises FileNotFoundError if there is nothing at `path`, and CheckpointError if it
    holds no tokenizer. Nothing is downloaded and no code of the checkpoint is run.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    where = {"gguf_file": path.name} if path.is_file() else {}
    directory = path.parent if path.is_file() else path
    transformers = require("transformers")
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, **where, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the parsers of the many kinds of tokenizer raise anything on bytes that are not theirs
        raise CheckpointError(
            f"{path} holds no tokenizer that can be built (a directory needs tokenizer.json): {error}"
        ) from error
