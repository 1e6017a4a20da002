from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


# torch's per-tensor and multi-tensor paths round differently: 100 steps add up to at most 100 roundings of the
# parameter, each half an ulp; the values here stay below 8.
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 100 * 2**-22), (torch.float64, 100 * 2**-51)])
@pytest.mark.parametrize("foreach", [False, True])
def test_100_steps_equal_torch(dtype, atol, foreach):
    ours, theirs = parameters(dtype), parameters(dtype)
    run(AdamW(grouped(ours)), ours, 100)
    run(torch.optim.AdamW(grouped(theirs), foreach=foreach), theirs, 100)
    for a, b in zip(ours, theirs, strict=True):
        assert not a.numel() or a.abs().max() < 8
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


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


def test_a_step_does_not_depend_on_threads_nor_on_what_is_beside_it(backend):
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        generator = torch.Generator(torch.get_default_device()).manual_seed(1)
        shapes = [(3,), (200, 333), (5, 7), (1,)]
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        torch.set_num_threads(threads)
        optimizer = AdamW(params[:: -1 if threads == 2 else 1])
        for param in params:
            param.grad = param.detach().sin()
        optimizer.step()
        results.append(params)
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_parameters_that_are_not_contiguous_are_trained(backend):
    dense = torch.nn.Parameter(torch.randn(6, 5))
    turned = torch.nn.Parameter(dense.detach().clone().T)
    dense.grad, turned.grad = torch.ones(6, 5), torch.ones(5, 6)
    AdamW([dense, turned]).step()
    torch.testing.assert_close(turned.T, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lists: lists[1].pop(), "lists of one length"),
        (lambda lists: lists[2].__setitem__(0, torch.zeros(3)), "must have the shape and dtype"),
        (lambda lists: lists[3].__setitem__(0, torch.zeros(2, dtype=torch.float64)), "must have the shape and dtype"),
        (lambda lists: [each.append(torch.zeros(1, dtype=torch.float16)) for each in lists], "must have one dtype"),
        (lambda lists: lists[1].__setitem__(0, torch.zeros(4)[::2]), "must be contiguous"),
    ],
)
def test_kernel_refuses_what_does_not_fit(change, message, backend):
    lists = [[torch.zeros(2)] for _ in range(4)]
    change(lists)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.entrenar.adamw_(*lists, 1, 1e-3, 0.9, 0.999, 1e-8, 0.0)


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


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.integers(1, 6), lr=st.floats(0.05, 0.5))
def test_converges_on_convex_quadratics(seed, size, lr):
    """f(x) = ½ (x - x*)ᵀ H (x - x*) with eigenvalues of H in [0.1, 10]."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    eigenvalues = 10 ** (torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1)
    hessian = basis @ torch.diag(eigenvalues) @ basis.T
    optimum = torch.randn(size, generator=generator, dtype=torch.float64)
    x = torch.nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
    optimizer = AdamW([x], lr=lr, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (x - optimum) @ hessian @ (x - optimum) / 2
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for step in range(600):
        optimizer.set_lr(lr * (1 - step / 600))
        last = optimizer.step(closure)
    # Curvatures differ by up to 100, and v remembers the first, large gradients for about 1000 steps: the flat
    # directions come in slowly where the steps are small.
    assert last <= 1e-2 * first + 1e-6


@settings(max_examples=10, deadline=None)
@given(at=st.integers(0, 30), dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_resume_is_bit_identical(at, dtype):
    straight = parameters(dtype)
    run(AdamW(grouped(straight)), straight, 30)

    params = parameters(dtype)
    before = AdamW(grouped(params))
    run(before, params, at)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    after = AdamW(grouped(resumed))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(after, resumed, 30, first=at)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dict_goes_both_ways_with_torch(ours_first):
    straight, params = parameters(torch.float64), parameters(torch.float64)
    run(torch.optim.AdamW(grouped(straight), foreach=False), straight, 20)
    kinds = (AdamW, torch.optim.AdamW) if ours_first else (torch.optim.AdamW, AdamW)
    before = kinds[0](grouped(params))
    run(before, params, 10)
    after = kinds[1](grouped(params))
    after.load_state_dict(before.state_dict())
    run(after, params, 20, first=10)
    for a, b in zip(straight, params, strict=True):
        torch.testing.assert_close(a, b)


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


def test_defaults_are_torchs():
    param = torch.nn.Parameter(torch.zeros(1))
    ours, theirs = AdamW([param]).defaults, torch.optim.AdamW([param]).defaults
    assert ours == {name: theirs[name] for name in ("lr", "betas", "eps", "weight_decay")}


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
    with pytest.raises(ValueError, match="zip"):
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
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0, of shape \(10, 3\).*sparse=False"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(2))
    assert not optimizer.state
