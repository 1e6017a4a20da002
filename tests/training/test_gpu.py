"""A run on a GPU: trained, resumed, described and asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_tiny import CONFIG, make_run_model, records
from tiny import add_adapters, make_model, make_tokenizer

from entrenar.fusion import FusedAttention, FusedMLP, FusedRMSNorm
from entrenar.optim import AdamW
from entrenar.training import causal_lm_loss, encode, finetune, generate
from entrenar.training.metrics import StepMetrics
from entrenar.training.watcher import Nobody

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
STOP = 7


@pytest.fixture(autouse=True)
def no_default(device: None) -> None:
    """Tensors are made where the code says, as in a program."""
    torch.set_default_device(None)


class KilledError(Exception):
    pass


class Killer(Nobody):
    def step(self, row: StepMetrics, total_steps: int) -> None:
        if row.step == STOP:
            raise KilledError


def train(out: Path, **settings: object) -> bytes:
    tokenizer = make_tokenizer()
    examples = encode(records(20), tokenizer).examples
    heldout = encode(records(4, 100), tokenizer).examples
    finetune(make_run_model().cuda(), tokenizer, examples, heldout, CONFIG, out, **settings)
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("poisoned")  # for deterministic kernels
def test_a_run_with_dropout_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "killed", watcher=Killer())
    torch.manual_seed(9)
    assert train(tmp_path / "killed", resume=True) == whole


@pytest.mark.usefixtures("poisoned")  # without it attention's backward adds up in any order
def test_two_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    examples = encode(records(20), tokenizer).examples
    adapters = []
    for name in ("one", "other"):
        # Of multiples of 64, in bfloat16, which Hopper's own product takes.
        model = add_adapters(make_model(hidden=128, dtype=torch.bfloat16), rank=8, dropout=0.1, bits=4).cuda()
        finetune(model, tokenizer, examples, examples[:4], CONFIG, tmp_path / name)
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    model = add_adapters(make_model(dtype=dtype), bits=4)
    there = add_adapters(make_model(dtype=dtype).cuda(), bits=4)
    kinds = {type(module) for module in there.modules()}
    assert {FusedAttention, FusedMLP, FusedRMSNorm} <= kinds
    there.load_state_dict(model.state_dict())
    ids = torch.randint(320, (2, 9))
    losses = [causal_lm_loss(model, ids), causal_lm_loss(there, ids.cuda())]
    for loss in losses:
        loss.backward()
    # Of 20 layers' worth of roundings, each 2^-8 in bfloat16.
    tolerance = 1e-4 if dtype is torch.float32 else 20 * 2**-8
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=tolerance, atol=0)
    for (name, here), other in zip(model.named_parameters(), there.parameters(), strict=True):
        if here.grad is not None:
            error = (other.grad.cpu() - here.grad).norm() / here.grad.norm().clamp(min=1e-30)
            assert error <= tolerance, name


def test_generates(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), make_model(dtype=torch.bfloat16).cuda()
    pieces: list[str] = []
    answer = generate(add_adapters(model, bits=4), tokenizer, "Count from 1 to 3.", 8, on_text=pieces.append)
    assert answer == "".join(pieces).strip()


def test_a_step_in_a_cuda_graph_is_the_step_itself() -> None:
    losses = []
    for captured in (False, True):
        model = add_adapters(make_model(dtype=torch.bfloat16).cuda(), bits=4).train()
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, max_norm=1.0)
        ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0)).cuda()
        loss = torch.zeros((), device="cuda")

        def step(model=model, optimizer=optimizer, ids=ids, loss=loss) -> None:
            found = causal_lm_loss(model, ids)
            found.backward()
            loss.copy_(found.detach())
            optimizer.step()
            optimizer.zero_grad()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                step()
        losses.append([])
        for _ in range(5):
            graph.replay() if captured else step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0]
    # The backward of attention adds up in any order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
