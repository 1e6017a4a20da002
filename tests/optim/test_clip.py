from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.optim import clip_grad_norm


def with_gradients(seed: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(), (3,), (4, 5), (0,), (2, 2, 2)]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    params[1].grad = None
    return params


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), max_norm=st.floats(1e-3, 100))
def test_equals_torch(seed, max_norm):
    ours, theirs = with_gradients(seed), with_gradients(seed)
    norm = clip_grad_norm(iter(ours), max_norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    after = torch.cat([p.grad.flatten() for p in ours if p.grad is not None]).norm()
    assert after <= min(max_norm, norm.item()) * (1 + 1e-6)


def test_infinite_limit_only_measures():
    params, same = with_gradients(0), with_gradients(0)
    norm = clip_grad_norm(params, float("inf"))
    assert norm.item() == pytest.approx(torch.cat([p.grad.flatten() for p in same if p.grad is not None]).norm().item())
    assert all(p.grad is None or torch.equal(p.grad, q.grad) for p, q in zip(params, same, strict=True))


def test_single_tensor_and_none():
    param = torch.nn.Parameter(torch.zeros(2))
    assert clip_grad_norm(param, 1.0).item() == 0.0
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_grad_norm(param, 1.0).item() == 5.0
    torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_gradient_is_named_and_left_alone(bad):
    params = with_gradients(0)
    params[2].grad[1, 1] = bad
    kept = [None if p.grad is None else p.grad.clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 2, of shape \(4, 5\)"):
        clip_grad_norm(params, 1.0)
    for param, grad in zip(params, kept, strict=True):
        assert grad is None or torch.equal(param.grad.nan_to_num(), grad.nan_to_num())


def test_overflowing_norm():
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.full((2,), 3e38)
    with pytest.raises(RuntimeError, match="every gradient is finite"):
        clip_grad_norm(param, 1.0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_bad_limit(max_norm):
    with pytest.raises(ValueError, match="max_norm must be greater than 0"):
        clip_grad_norm(with_gradients(0), max_norm)
