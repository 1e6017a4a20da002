from __future__ import annotations

import pytest
import torch

from entrenar.optim import AdamW
from entrenar.optim.adamw import adamw_update_

SHAPES = [(), (1,), (7,), (3, 5), (16, 33), (0, 4), (2, 3, 4)]
GROUPS = [
    {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0},
]


def parameters(dtype: torch.dtype, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def grouped(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:4], **GROUPS[0]}, {"params": params[4:], **GROUPS[1]}]


def run(optimizer, params, steps, *, first=0):
    """Random gradients of wide range, one in five missing, under a changing learning rate."""
    for step in range(first, steps):
        generator = torch.Generator(torch.get_default_device()).manual_seed(step)
        for param in params:
            grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            scale = 10 ** (torch.rand((), generator=generator, dtype=param.dtype) * 6 - 3)
            missing = torch.rand((), generator=generator) < 0.2
            param.grad = None if missing else grad * scale
        for group, base in zip(optimizer.param_groups, GROUPS, strict=True):
            group["lr"] = base["lr"] * (1 - step / 200)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_is_the_references_rounded_once(dtype, backend):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in [*SHAPES, (70, 301)]]
    optimizer = AdamW([{"params": params[:4], **GROUPS[0]}, {"params": params[4:], **GROUPS[1]}])
    for step in range(1, 4):
        expected = []
        for param, setting in zip(params, [GROUPS[0]] * 4 + [GROUPS[1]] * 4, strict=True):
            param.grad = torch.randn_like(param)
            state = optimizer.state[param] or {
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
            wide = [t.detach().double() for t in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])]
            beta1, beta2 = setting["betas"]
            rest = {"lr": setting["lr"], "eps": setting["eps"], "weight_decay": setting["weight_decay"]}
            adamw_update_(*wide, step, beta1=beta1, beta2=beta2, **rest)
            expected.append((wide[0], wide[2], wide[3]))
        optimizer.step()
        for param, wanted in zip(params, expected, strict=True):
            state = optimizer.state[param]
            # Half a unit for the one rounding, and what some float32 operations add: 8 of their roundings.
            unit = torch.finfo(dtype).eps / 2 + 8 * 2**-24
            for actual, want in zip((param, state["exp_avg"], state["exp_avg_sq"]), wanted, strict=True):
                assert actual.dtype == dtype
                torch.testing.assert_close(actual.double(), want, rtol=unit, atol=2**-24)


def test_decay_is_decoupled_and_scaled_by_the_learning_rate():
    param = torch.nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = AdamW([param], lr=0.1, weight_decay=0.01)
    for _ in range(100):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    torch.testing.assert_close(param.data, torch.full_like(param, 2.0 * 0.999**100))
    assert torch.equal(optimizer.state[param]["exp_avg_sq"], torch.zeros_like(param))


def test_first_update_by_hand():
    # m = 0.1 g, v = 0.001 g²; corrected they are g and g², so the step is lr * sign(g) up to eps.
    param, grad = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, -4.0], dtype=torch.float64)
    m, v = torch.zeros_like(param), torch.zeros_like(param)
    adamw_update_(param, grad, m, v, 1, lr=0.1, beta1=0.9, beta2=0.999, eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(param, torch.tensor([0.95 - 0.1, -1.9 + 0.1], dtype=torch.float64))
    torch.testing.assert_close(m, 0.1 * grad)
    torch.testing.assert_close(v, 0.001 * grad**2)


def test_set_lr_and_torch_schedulers():
    optimizer = AdamW(grouped(parameters(torch.float32)))
    optimizer.set_lr(0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=10)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optimizer.set_lr(float("nan"))
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_long_names():
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = AdamW([param], learning_rate=0.5, beta1=0.1, beta2=0.2, epsilon=0.3, weight_decay=0.4)
    expected = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 0.3, "weight_decay": 0.4}
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected
    assert AdamW([param], beta2=0.5).defaults["betas"] == (0.9, 0.5)


def test_settings_at_the_edge_of_their_range():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([param], lr=0.0, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0)
    param.grad = torch.tensor([1.0, -2.0])
    assert optimizer.step() is None
    assert torch.equal(param, torch.ones(2))
    # Without memory and eps the step is the sign of the gradient.
    optimizer.set_lr(0.5)
    optimizer.step()
    assert torch.equal(param, torch.tensor([0.5, 1.5]))


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999)])
def test_a_group_has_two_betas(betas):
    with pytest.raises(ValueError, match="betas must be two numbers"):
        AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))], "betas": betas}])


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"betas": (0.9, -0.1)}, "beta2"),
    ],
)
def test_settings_out_of_range(setting, name):
    param = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        AdamW([param], **setting)
    if not name.startswith("beta"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            AdamW([{"params": [param], **setting}])


def test_frozen_bytes_are_refused():
    codes = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    trained = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    optimizer = AdamW([{"params": [param]} for param in trained])
    with pytest.raises(TypeError, match=r"parameter 0 of the group is torch\.uint8"):
        optimizer.add_param_group({"params": [codes]})
    assert [group["params"] for group in optimizer.param_groups] == [[param] for param in trained]


def test_sparse_gradients_are_refused_before_anything_changes():
    dense = torch.nn.Parameter(torch.ones(2))
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = AdamW([dense, embedding.weight])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError,
        match=r"^AdamW does not take sparse gradients, and parameter 1 of group 0, of shape \(10, 3\).*sparse=False",
    ):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state
