from __future__ import annotations

import pytest
import torch
from torch import nn

from entrenar import wrap
from entrenar.optim import AdamW, CosineScheduler
from entrenar.optim.groups import parameter_groups


def wrapped() -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 64)), nn.LayerNorm(64), nn.Linear(64, 64))
    wrap(model, rank=2, targets=["0.0", "2"], bits=None)
    model[1].requires_grad_(True)
    return model


def test_groups_of_a_wrapped_model():
    model = wrapped()
    groups = parameter_groups(model, 1e-3, 0.1, lora_plus_ratio=16)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert set(by_name) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, group in by_name.items():
        assert group["lr"] == (16e-3 if name.endswith("lora_B") else 1e-3)
        assert group["weight_decay"] == (0.0 if name.startswith("1.") else 0.1)
    assert len(groups) == 3


def test_without_a_ratio_matrices_are_one_group():
    groups = parameter_groups(wrapped(), 1e-3)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-3, 0.0)]


def test_a_schedule_keeps_the_ratio_of_rates():
    optimizer = AdamW(parameter_groups(wrapped(), 1e-3, lora_plus_ratio=4), lr=1e-3)
    scheduler = CosineScheduler(1e-3, 1e-4, 10, 2).attach(optimizer)
    for step in range(12):
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs[0] == CosineScheduler(1e-3, 1e-4, 10, 2).get_lr(step)
        assert lrs[1] == pytest.approx(4 * lrs[0])
        optimizer.step()
        scheduler.step()


def test_b_moves_as_much_faster_as_it_is_told():
    moved = {}
    for ratio in (1, 8):
        torch.manual_seed(0)
        model = wrapped()
        optimizer = AdamW(parameter_groups(model, 1e-3, lora_plus_ratio=ratio))
        model(torch.ones(2, 64)).square().sum().backward()
        optimizer.step()
        moved[ratio] = model[2].lora_B.detach().abs().max()
    torch.testing.assert_close(moved[8], 8 * moved[1])


def test_bad_requests():
    with pytest.raises(ValueError, match="lora_plus_ratio must be greater than 0"):
        parameter_groups(wrapped(), 1e-3, lora_plus_ratio=0)
    with pytest.raises(ValueError, match="nothing in this model trains"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)
