"""QLoRA in torch's DistributedDataParallel: processes that share out a batch get the gradients of all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_autocast import gradients, make_qlora
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from entrenar.training import causal_lm_loss

PROCESSES = 2


class Loss(nn.Module):
    """The loss as a forward, which DistributedDataParallel wants to call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return causal_lm_loss(self.model, ids)


def work(rank: int, device: str, out: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_device(device)
    # gloo: nccl refuses two processes on one GPU.
    distributed.init_process_group("gloo", f"file://{out / 'meeting'}", rank=rank, world_size=PROCESSES)
    model = make_qlora()
    if rank > 0:  # as what starts elsewhere: all begin with the weights of the first
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
    parallel = DistributedDataParallel(Loss(model))
    for step in range(2):  # the first one finds out that the model leaves its logits alone
        parallel.zero_grad()
        parallel(torch.load(out / "ids").chunk(PROCESSES)[rank]).backward()
        found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        torch.save(found, out / f"gradients {rank} {step}")
    distributed.barrier()  # nobody leaves while another needs it
    os._exit(0)  # gloo's destructor joins a thread that may be waiting for the interpreter, which the destructor holds


def test_two_processes_get_the_gradients_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # whatever the machine's name resolves to
    ids = torch.randint(320, (2 * PROCESSES, 17))
    torch.save(ids, tmp_path / "ids")
    device = torch.get_default_device().type
    multiprocessing.spawn(work, (device, tmp_path), nprocs=PROCESSES)
    whole = gradients(make_qlora(), ids)
    for step in range(2):
        first, second = (torch.load(tmp_path / f"gradients {rank} {step}") for rank in range(PROCESSES))
        assert first.keys() == second.keys() == whole.keys()
        for name, gradient in first.items():
            assert torch.equal(gradient, second[name]), name
            error = (gradient.to(device) - whole[name]).norm() / whole[name].norm()
            assert error <= 1e-4, name  # float32 sums, in another order
