"""A step of QLoRA under torch.autocast."""

from __future__ import annotations

import torch
from tiny import add_adapters, make_model
from torch import Tensor, nn
from torch.nn import functional as F

from entrenar.training import causal_lm_loss


def make_qlora() -> nn.Module:
    """In 4 bits, with adapters both of whose factors get a gradient, where the test makes its tensors."""
    model = add_adapters(make_model(hidden=64).to(torch.get_default_device()), rank=8, bits=4)
    generator = torch.Generator("cpu").manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, device="cpu"))
    return model


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    causal_lm_loss(model, ids).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def test_gradients_under_autocast_point_where_those_without_do() -> None:
    model, ids = make_qlora(), torch.randint(320, (2, 33))
    expected = gradients(model, ids)
    model.zero_grad(set_to_none=True)
    seen: list[torch.dtype] = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found = gradients(model, ids)
    assert seen == [torch.bfloat16]
    assert len(found) == len(expected) == 2 * 2 * 7
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        # Of 20 layers' worth of roundings, each 2^-8, in any direction: an error of 2^-4, whose cosine is this.
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 1 - 2**-9, name
