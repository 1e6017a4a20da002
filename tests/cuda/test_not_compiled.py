"""A package without its CUDA library says so where an op meets CUDA tensors, and how to build it."""

from __future__ import annotations

import subprocess
import sys

# A torch that has CUDA, as far as the package can see, beside a package that was compiled without.
CALL = """
import pathlib, torch
torch.version.cuda = "13.0"
is_file = pathlib.Path.is_file
pathlib.Path.is_file = lambda path: path.name != "libentrenar_cuda.so" and is_file(path)
import entrenar
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.entrenar.rms_norm.default.redispatch(cuda, torch.randn(2, 4), None, 1e-5)
except NotImplementedError as error:
    print(error)
"""


def test_the_error_says_how_to_build():
    done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True)
    assert "the CUDA kernels were not compiled: install with nvcc on the PATH" in done.stdout, done.stderr
