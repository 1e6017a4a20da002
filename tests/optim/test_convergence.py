"""Convex quadratics, on which what every rule does is known, whatever the learning rate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import BOTH, EIGHT_BITS, KINDS

DESCENT = ("sgd", "momentum", "nesterov")
NORMALIZED = ("adam", "adamw", "lion")


def powers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high).map(lambda exponent: 10.0**exponent)


def quadratic(seed: int, size: int, decades: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues over so many decades around 1, eigenvectors as columns, and a point."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    basis, _ = torch.linalg.qr(torch.randn(size, size, **like))
    eigenvalues = 10 ** (decades * (torch.rand(size, **like) - 0.5))
    return eigenvalues, basis, torch.randn(size, **like)


def descend(optimizer: torch.optim.Optimizer, x: torch.nn.Parameter, hessian: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        x.grad = hessian @ x.detach()
        optimizer.step()


@pytest.mark.cpu("its float64 is what the linear map is compared in")
@pytest.mark.parametrize("kind", DESCENT)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 6),
    rate=powers(-6, 0.3) | st.floats(0.95, 1.05),
    scale=powers(-6, 6),
)
def test_descent_is_a_linear_map_that_contracts_below_a_limit(kind, seed, size, rate, scale):
    """f(x) = ½ xᵀ H x. With s = lr λ, an eigenvector's share e and its momentum b go the way of a 2 x 2 matrix.

    Its spectral radius is below 1 for all eigenvalues λ if and only if lr is below a limit: 2 / L for plain descent (L
    the largest λ), 2 (1 + m) / (1 - dampening) / L with momentum m, 2 (1 + m) / (1 + 2 m) / L with Nesterov's.
    """
    eigenvalues, basis, start = quadratic(seed, size, decades=3)
    eigenvalues = scale * eigenvalues
    cls, first, _ = KINDS[kind]
    given_settings = {**first, "weight_decay": 0.0}
    m, share = given_settings.get("momentum", 0.0), 1 - given_settings.get("dampening", 0.0)
    limit = 2 * (1 + m) / (1 + 2 * m if kind == "nesterov" else share)
    lr = rate * limit / eigenvalues.max().item()
    s = (lr * eigenvalues)[:, None, None]
    # b' = m b + share λ e, and e' = e - lr b'; b is kept as lr b, of e's size.
    momentum = torch.cat([share * s, torch.full_like(s, m)], -1)
    if kind == "nesterov":
        step = torch.cat([1 - s, torch.zeros_like(s)], -1) - m * momentum
    else:
        step = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64) - momentum
    maps = torch.cat([step, momentum], 1)
    radius = torch.linalg.eigvals(maps).abs().max().item()
    assert (radius < 1) == (rate < 1) or abs(rate - 1) < 1e-6

    x = torch.nn.Parameter(start.clone())
    descend(cls([x], **{**given_settings, "lr": lr}), x, basis @ torch.diag(eigenvalues) @ basis.T, 60)
    e = basis.T @ start
    b = s[:, 0, 0] * e  # it begins as the gradient, whatever the dampening
    e = e - (s[:, 0, 0] * e + m * b if kind == "nesterov" else b)
    expected = torch.linalg.matrix_power(maps, 59) @ torch.stack([e, b], -1)[..., None]
    largest = torch.linalg.matrix_norm(maps, 2).max().item()
    # Every step rounds; what grows, grows from there.
    atol = 1e-13 * 60 * max(1.0, largest, radius**60) * start.norm().item()
    torch.testing.assert_close(basis.T @ x.detach(), expected[:, 0, 0], rtol=1e-9, atol=atol)


def bounds(kind: str, betas: tuple[float, float], steps: int) -> tuple[float, float]:
    """In learning rates: how long a coordinate's step can be, and how far away it can be and still step further.

    A step follows an average of past gradients, with weights w. A coordinate that moves by at most U a step was at most
    k U away k steps ago, so that beyond U Σ k w_k the average has the sign of its present gradient, and the step goes
    towards the optimum. Lion's U is 1. Adam's is that of Σ w_k g_k / √(Σ u_k g_k²), with the weights u of the second
    moment: √(Σ w_k² / u_k), by Cauchy and Schwarz.
    """
    beta1, beta2 = betas
    past = torch.arange(steps, dtype=torch.float64)
    longest = turning = 1.0
    for t in range(1, steps + 1):
        k = past[:t]
        if kind == "lion":
            w = torch.cat([torch.tensor([1 - beta1], dtype=torch.float64), beta1 * (1 - beta2) * beta2 ** k[:-1]])
            w /= w.sum()
        else:
            w, u = ((1 - beta) * beta**k / (1 - beta**t) for beta in betas)
            longest = max(longest, (w.square() / u).sum().sqrt().item())
        turning = max(turning, (k * w).sum().item())
    return longest, longest * turning


@pytest.mark.parametrize("betas", [None, (0.8, 0.95)])
@pytest.mark.parametrize("kind", NORMALIZED)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), lr=powers(-6, 2))
def test_normalized_steps_reach_a_neighbourhood_of_the_size_of_the_learning_rate(kind, seed, lr, betas):
    """f(x) = ½ Σ h_i (x_i - x*_i)², with curvatures h that differ by eight orders of magnitude.

    Lion comes nearer by lr a step until it is no further away than `bounds` say. So does Adam by (d - r) / M, where d
    is the distance and r the one from which on steps can lead away, both in learning rates, and M the largest distance
    so far, since √(Σ u_k g_k²) is at most h M.
    """
    steps, furthest = 1000, 300.0
    betas = betas or KINDS[kind][1]["betas"]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    h = 10 ** (8 * torch.rand(50, generator=generator) - 4)
    optimum = 100 * lr * torch.randn(50, generator=generator)
    start = furthest * (2 * torch.rand(50, generator=generator) - 1)
    x = torch.nn.Parameter(optimum + lr * start)
    optimizer = KINDS[kind][0]([x], lr=lr, betas=betas, weight_decay=0.0, **({} if kind == "lion" else {"eps": 0.0}))
    for _ in range(steps):
        x.grad = h * (x.detach() - optimum)
        optimizer.step()
    longest, turning = bounds(kind, betas, steps)
    neighbourhood = turning + longest
    assert neighbourhood < furthest / 2  # or it would say nothing
    if kind != "lion":
        neighbourhood += furthest * (1 - 1 / max(furthest, neighbourhood)) ** steps
    assert ((x.detach() - optimum).abs().max() / lr).item() <= neighbourhood


@pytest.mark.parametrize(("kind", "bits"), [case for case in BOTH if case[0] in NORMALIZED])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 40), lr=st.integers(-30, 20), scale=st.integers(-20, 20))
def test_normalized_steps_measure_distances_in_learning_rates(kind, bits, seed, size, lr, scale):
    """Of f(x) = ½ xᵀ c H x, neither lr nor c changes x / lr, on the whole way, if eps is as large beside gradients.

    Powers of two change nothing in the rounding either: the bits are the same, of codes too.
    """
    eigenvalues, basis, start = quadratic(seed, size, decades=3)
    hessian = (basis @ torch.diag(eigenvalues) @ basis.T).to(torch.get_default_device(), torch.float32)
    cls = EIGHT_BITS[kind] if bits == 8 else KINDS[kind][0]
    ways = []
    for rate, c in ((1.0, 1.0), (2.0**lr, 2.0**scale)):
        x = torch.nn.Parameter((20 * rate * start).to(hessian))
        eps = {} if kind == "lion" else {"eps": 2.0**-20 * rate * c}
        optimizer = cls([x], lr=rate, weight_decay=0.0, **eps, **({"min_8bit_size": 0} if bits == 8 else {}))
        way = []
        for _ in range(60):
            x.grad = c * (hessian @ x.detach())
            optimizer.step()
            way.append(x.detach() / rate)
        ways.append(torch.stack(way))
    assert torch.equal(*ways)


@pytest.mark.parametrize(("kind", "bits"), BOTH)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 6), rate=st.floats(0.4, 1))
def test_converges_under_a_falling_learning_rate(kind, bits, seed, size, rate):
    """f(x) = ½ (x - x*)ᵀ H (x - x*) with eigenvalues of H in [0.18, 5.6]."""
    eigenvalues, basis, optimum = quadratic(seed, size, decades=1.5)
    hessian = (basis @ torch.diag(eigenvalues) @ basis.T).to(torch.get_default_device(), torch.float32)
    optimum = optimum.to(hessian)
    x = torch.nn.Parameter(quadratic(seed + 1, size, decades=0)[2].to(hessian))
    # Plain descent needs a rate below 2 / 5.6; momentum 0.9 is ten times as fast, with dampening less.
    highest = {"sgd": 0.3, "momentum": 0.05, "nesterov": 0.05, "lion": 0.1}.get(kind, 0.4)
    cls = EIGHT_BITS[kind] if bits == 8 else KINDS[kind][0]
    given_settings = {**KINDS[kind][1], "weight_decay": 0.0, "lr": rate * highest}
    optimizer = cls([x], **given_settings, **({"min_8bit_size": 0} if bits == 8 else {}))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (x - optimum) @ hessian @ (x - optimum) / 2
        loss.backward()
        return loss

    begin = optimizer.step(closure)
    for step in range(300):
        optimizer.set_lr(rate * highest * (1 - step / 300))
        last = optimizer.step(closure)
    # Curvatures differ by up to 30, and Adam's v remembers the first, large gradients: flat directions come in slowly.
    assert last <= 3e-2 * begin + 1e-4
