"""torch.func's transforms of every operation: they equal loops and torch's engine, or say that they do not work."""

from __future__ import annotations

import pytest
import torch
from test_planted import CASES, FLOAT32_CASES
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

# Torch's own functional transforms compile with torch.jit when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
INT4 = {name: case[:2] for name, case in FLOAT32_CASES.items() if name.startswith("Int4")}
# Not among them: the head's loss, whose module runs in pieces.
NAMES = pytest.mark.parametrize("name", [name for name in {**CASES, **INT4} if name != "HeadCrossEntropyFunction"])


def case(name: str) -> tuple:
    """The function, always with the same random numbers; its inputs; and the numbers of its arguments."""
    fn, inputs = {**CASES, **INT4}[name]
    inputs = [inputs] if isinstance(inputs, Tensor) else inputs
    if name in CASES:
        inputs = [x.double() for x in inputs]

    def repeatable(*xs: Tensor) -> Tensor:
        torch.manual_seed(0)
        return fn(*xs)

    return repeatable, inputs, tuple(range(len(inputs)))


@NAMES
def test_jacobian_is_that_of_torchs_engine(name):
    fn, inputs, every = case(name)
    actual = jacrev(fn, every)(*inputs)
    torch.testing.assert_close(actual, torch.autograd.functional.jacobian(fn, tuple(inputs)))


@NAMES
def test_a_batch_equals_its_elements(name):
    fn, inputs, every = case(name)
    batches = [torch.stack([x, x + 0.25, 0.5 * x + 0.75], 1) for x in inputs]

    def gradient(*xs: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda *xs: fn(*xs).sin().sum(), every)(*xs)

    for function in (fn, gradient):
        batched = vmap(function, in_dims=1, randomness="same")(*batches)
        single = [function(*(x.select(1, i) for x in batches)) for i in range(3)]
        outputs = zip(*single, strict=True) if isinstance(batched, tuple) else [single]
        for actual, expected in zip(batched if isinstance(batched, tuple) else [batched], outputs, strict=True):
            torch.testing.assert_close(actual, torch.stack(tuple(expected)))


@NAMES
def test_a_batch_of_one_argument_alone(name):
    fn, inputs, every = case(name)
    for i in every:
        dims = tuple(0 if j == i else None for j in every)
        batch = torch.stack([inputs[i], 0.5 * inputs[i] + 0.75])
        actual = vmap(fn, in_dims=dims, randomness="same")(*inputs[:i], batch, *inputs[i + 1 :])
        expected = [fn(*inputs[:i], x, *inputs[i + 1 :]) for x in batch]
        torch.testing.assert_close(actual, torch.stack(expected))


@NAMES
def test_forward_mode_says_that_it_does_not_work(name):
    fn, inputs, _ = case(name)
    with pytest.raises(NotImplementedError, match="jvp"):
        jvp(fn, tuple(inputs), tuple(inputs))
    with pytest.raises(NotImplementedError, match="jvp"):
        jacfwd(fn, randomness="same")(*inputs)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        fn(*(forward_ad.make_dual(x, x) for x in inputs))


def test_the_loss_of_any_head_says_that_it_cannot_be_transformed():
    fn, inputs, _ = case("HeadCrossEntropyFunction")
    for transform in (grad(fn), jacrev(fn)):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(*inputs)
