"""Every kernel gives the same bits again, whatever the device does at once."""

from __future__ import annotations

import calls
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import entrenar  # noqa: F401 (registers the ops)


class Record(TorchDispatchMode):
    """Which ops are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.cpu("what is called does not depend on the device")
def test_the_calls_reach_every_op_that_has_a_kernel():
    registered = {n for n in torch._C._dispatch_get_registrations_for_dispatch_key("CPU") if n.startswith("entrenar::")}
    # On CUDA the first are torch's, and the other does not exist.
    registered -= {"entrenar::attention_backward", "entrenar::masked_attention_backward"}
    registered -= {"entrenar::linear_cross_entropy_rows"}
    with Record() as called:
        for part in calls.PARTS:
            for _ in part():
                pass
    assert registered <= {name.split(".")[0] for name in called.names}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_bits_again_on_a_gpu():
    torch.set_default_device("cuda")
    runs = [[*calls.all_digests()] for _ in range(3)]
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]
