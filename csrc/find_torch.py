"""Print the directory of the torch package to compile against, without importing torch.

An isolated build environment holds no torch, and naming it among the build requirements would download gigabytes; so
the one of the environment being installed into is looked up by path.
"""

import importlib.util
import os
import pathlib
import sys
import sysconfig


def candidates():
    if "ENTRENAR_TORCH_DIR" in os.environ:
        yield pathlib.Path(os.environ["ENTRENAR_TORCH_DIR"])
        return
    spec = importlib.util.find_spec("torch")
    if spec and spec.origin:
        yield pathlib.Path(spec.origin).parent
    yield pathlib.Path(sysconfig.get_path("platlib")) / "torch"


for directory in candidates():
    if (directory / "include/torch/csrc/stable/library.h").is_file():
        print(directory)
        break
else:
    sys.exit("no torch 2.10 or later was found: install it first (pip install torch), or set ENTRENAR_TORCH_DIR")
