"""Beside bitsandbytes, where it has the same rule, within the tolerances of its own tests."""

from __future__ import annotations

import copy

import bitsandbytes.optim as bnb
import pytest
import torch
from runs import parameters
from runs import set_gradients as set_large_gradients

from entrenar import optim
from entrenar.optim.exchange import to_bitsandbytes


@pytest.fixture(autouse=True)
def on_the_cpu(device):
    """Whose rules are the ones that ours are; its CUDA kernels decay after the step."""
    torch.set_default_device(None)


# Its SGD has no dampening, and its Adam decays as AdamW does.
SETTINGS = {
    "SGD": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 1e-3, "betas": (0.8, 0.99), "eps": 1e-8, "weight_decay": 0.0},
    "AdamW": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    "Lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1},
}
SHAPES = [(32, 32), (100, 129), (4097,)]
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2), torch.float16: (1e-4, 1e-3)}


def set_gradients(params, step: int, missing: float) -> None:
    """Of the size that its tests use, for which the tolerances are meant."""
    set_large_gradients(params, step, missing)
    for param in params:
        param.grad *= 0.01


@pytest.mark.parametrize("name", SETTINGS)
def test_20_steps_in_32_bits(name):
    ours, theirs = (parameters(torch.float32, shapes=SHAPES) for _ in range(2))
    optimizer, other = getattr(optim, name)(ours, **SETTINGS[name]), getattr(bnb, name)(theirs, **SETTINGS[name])
    atol, rtol = TOLERANCES[torch.float32]
    for step in range(20):
        for params, each in ((ours, optimizer), (theirs, other)):
            set_gradients(params, step, missing=0)
            each.step()
        for a, b in zip(ours, theirs, strict=True):
            far = ~torch.isclose(a, b, atol=atol, rtol=rtol)
            # A sign that rounding turns moves an element by twice the rate.
            assert far.sum() <= (3 if name == "Lion" else 0)
            b.data.copy_(a)


@pytest.mark.parametrize("name", SETTINGS)
def test_50_steps_in_8_bits(name):
    ours, theirs = (parameters(torch.float32, shapes=SHAPES) for _ in range(2))
    settings = {**SETTINGS[name], "min_8bit_size": 0}
    optimizer, other = getattr(optim, name + "8bit")(ours, **settings), getattr(bnb, name + "8bit")(theirs, **settings)
    errors = []
    for step in range(50):
        for params, each in ((ours, optimizer), (theirs, other)):
            set_gradients(params, step, missing=0)
            each.step()
        for a, b in zip(ours, theirs, strict=True):
            errors.append((a - b).abs().mean())
            assert (~torch.isclose(a, b, atol=1e-5, rtol=1e-3)).sum() <= (3 if name == "Lion" else 0)
            b.data.copy_(a)
            for k, (state, signed) in enumerate(zip(optimizer.STATES, optimizer.SIGNED, strict=True), start=1):
                codes, absmax = optimizer.state[a][state], optimizer.state[a][state + "_absmax"]
                mine = optim.codes.dequantize_blockwise(codes, absmax, signed)
                peer = other.state[b]
                its = optim.codes.dequantize_blockwise(peer[f"state{k}"], peer[f"absmax{k}"], signed)
                assert (~torch.isclose(mine, its, atol=3e-3, rtol=1e-3)).sum() < 20
                peer[f"state{k}"].copy_(codes)
                peer[f"absmax{k}"].copy_(absmax)
    assert torch.stack(errors).mean() < 6e-5


@pytest.mark.parametrize("bits", ["", "8bit"])
@pytest.mark.parametrize("name", SETTINGS)
def test_state_dicts_go_both_ways(name, bits):
    params, same = (parameters(torch.float32, shapes=SHAPES) for _ in range(2))
    others = {setting: (0.5, 0.5) if setting == "betas" else 0.5 for setting in SETTINGS[name]}
    ours = getattr(optim, name + bits)(params, **SETTINGS[name])
    theirs = getattr(bnb, name + bits)(same, **others)
    for step in range(2):
        set_gradients(params, step, missing=0)
        ours.step()
    without = {"betas": (SETTINGS[name].get("momentum"), 0.0), "eps": 0.0}  # what its optimizers have in their place
    theirs.load_state_dict(copy.deepcopy(to_bitsandbytes(ours)))
    settings = {setting: theirs.param_groups[0][setting] for setting in ("lr", "betas", "eps", "weight_decay")}
    assert settings == {**without, **{k: v for k, v in SETTINGS[name].items() if k != "momentum"}}
    for param, other in zip(params, same, strict=True):
        for k, state in enumerate(ours.STATES, start=1):
            assert theirs.state[other][f"state{k}"].dtype == ours.state[param][state].dtype
            assert torch.equal(theirs.state[other][f"state{k}"], ours.state[param][state])
    set_gradients(same, 2, missing=0)
    theirs.step()
    back = getattr(optim, name + bits)(params, **others)
    back.load_state_dict(theirs.state_dict())
    assert {setting: back.param_groups[0][setting] for setting in SETTINGS[name]} == SETTINGS[name]
    for param, other in zip(params, same, strict=True):
        assert back.state[param]["step"] == 3
        for k, state in enumerate(ours.STATES, start=1):
            assert torch.equal(back.state[param][state], theirs.state[other][f"state{k}"])


def test_another_map_is_refused():
    params = parameters(torch.float32, shapes=[(5000,)])
    theirs = bnb.AdamW8bit(params)
    set_gradients(params, 0, missing=0)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    next(iter(saved["state"].values()))["__bnb_optimizer_quant_state__"]["qmap1"][3] = 0
    with pytest.raises(ValueError, match="qmap1, is not the dynamic map"):
        optim.AdamW8bit(params).load_state_dict(saved)
