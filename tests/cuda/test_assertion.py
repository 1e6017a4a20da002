"""On CUDA a target that is no class fails an assertion of the kernel: nothing waits for the device."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

CALL = """
import torch, entrenar
torch.ops.entrenar.cross_entropy_losses(torch.randn(2, 5, device="cuda"), torch.tensor([0, 5], device="cuda"), -100)
print("launched", flush=True)
torch.cuda.synchronize()
"""


def test_a_target_that_is_no_class_fails_an_assertion(backend):
    if backend == "cuda":  # in a process of its own, whose device is lost
        done = subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True)
        assert done.returncode != 0
        assert "launched" in done.stdout
        assert "target < p.classes" in done.stderr
    elif backend == "emulated":
        for target in ([0, 5], [-1, 0]):
            with pytest.raises(RuntimeError, match="not launched"):
                torch.ops.entrenar.cross_entropy_losses(torch.randn(2, 5), torch.tensor(target), -100)
        losses = torch.ops.entrenar.cross_entropy_losses(torch.zeros(1, 5), torch.tensor([4]), -100)
        assert losses.item() == pytest.approx(1.6094379)
    else:
        pytest.skip("the CPU raises IndexError")
