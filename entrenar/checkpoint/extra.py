from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import `module`, or raise a ModuleNotFoundError that says which extra brings it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"pretrained checkpoints need the package {package!r}: pip install 'entrenar[cli]'", name=package
        ) from error
