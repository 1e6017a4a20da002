"""The chapter's snippets, in Python."""

from __future__ import annotations

import pytest
import torch

from entrenar.autograd import ops
from entrenar.autograd.tensor import Tensor, backward


def test_creation():
    assert Tensor.from_vec([3.14], False).shape == (1,)
    matrix = Tensor.from_vec([[1.0, 2.0], [3.0, 4.0]], True)
    assert matrix.requires_grad
    assert matrix.is_leaf
    assert not Tensor.from_vec([1.0, 2.0]).requires_grad
    assert Tensor.randn([256], True).shape == (256,)
    assert Tensor.zeros(128).tolist() == [0.0] * 128
    assert Tensor.ones((2, 3)).sum() == 6
    torch.manual_seed(5)
    drawn = Tensor.randn(4)
    torch.manual_seed(5)
    assert drawn.tolist() == torch.randn(4).tolist()


@pytest.mark.parametrize("make", [Tensor.zeros, Tensor.ones, Tensor.randn])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0, 2, 1)])
def test_shape_is_one_sequence_or_several_numbers(make, shape):
    for tensor in (make(shape), make(*shape), make(*shape, False)):
        assert tensor.shape == shape
        assert not tensor.requires_grad
    for tensor in (make(shape, True), make(*shape, True), make(*shape, requires_grad=True)):
        assert tensor.shape == shape
        assert tensor.requires_grad


def test_no_shape_at_all_is_refused():
    assert Tensor.zeros(()).shape == ()
    with pytest.raises(TypeError, match="size"):
        Tensor.zeros()


def test_square_plus_itself():
    x = Tensor.from_vec([2.0], True)
    y = x * x
    z = y + x
    backward(z)
    assert x.grad[0] == 5.0


def test_shared_nodes_accumulate():
    x = Tensor.from_vec([1.0], True)
    h = 3 * x
    backward(h + h * h)
    assert x.grad[0] == 3 + 2 * 3 * 3


def operation(result: Tensor) -> str:
    """The name of the Function that made a Tensor; the node before it makes a Tensor of a torch.Tensor."""
    return type(result.grad_fn.next_functions[0][0]).__name__.removesuffix("FunctionBackward")


def test_operators_run_our_operations():
    a, b = Tensor.from_vec([1.0, 2.0], True), Tensor.from_vec([3.0, 4.0], True)
    for result, name in [(a + b, "Add"), (a * b, "Mul"), (a - b, "Sub"), (a / b, "Div"), (-a, "Neg"), (a**2, "Pow")]:
        assert type(result) is Tensor
        assert operation(result) == name
    for result, name in [(1 - a, "Sub"), (1 / a, "Div"), (2**a, "Pow"), (torch.exp(a), "Exp"), (a.sum(), "Sum")]:
        assert operation(result) == name


class Named(torch.Tensor):
    """Gives the name of the function that it was passed to."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return func.__name__


def test_operands_and_settings_are_taken_by_name():
    a, b = Tensor.from_vec([1.0, 2.0], True), Tensor.from_vec([3.0, 4.0])
    assert ops.sub(a, other=b, alpha=3).tolist() == [-8.0, -10.0]
    assert ops.sub(input=torch.ones(2), other=torch.ones(2).as_subclass(Named)) == "sub"


def test_what_is_not_ours_is_torchs():
    a = Tensor.from_vec([1.0, 2.0], True)
    result = torch.cumsum(a, 0)
    assert type(result) is Tensor
    backward(result)
    assert a.grad.tolist() == [2.0, 1.0]


def test_matmul_of_the_chapter():
    a, b = Tensor.from_vec([[1.0, 2.0], [3.0, 4.0]]), Tensor.from_vec([[5.0, 6.0], [7.0, 8.0]])
    assert ops.matmul(a, b).tolist() == [[19.0, 22.0], [43.0, 50.0]]
    assert ops.matmul(a, Tensor.from_vec([5.0, 7.0])).tolist() == [19.0, 43.0]
    assert (a @ b).tolist() == [[19.0, 22.0], [43.0, 50.0]]


def test_backward_takes_a_gradient():
    x = Tensor.from_vec([1.0, 2.0], True)
    backward(x * x, torch.tensor([1.0, 10.0]))
    assert x.grad.tolist() == [2.0, 40.0]
    x.zero_grad()
    assert x.grad is None
    with pytest.raises(RuntimeError, match="does not require grad"):
        backward(Tensor.ones(2))


def test_relu_at_zero_has_gradient_zero():
    x = Tensor.from_vec([-1.0, 0.0, 1.0], True)
    backward(torch.relu(x))
    assert x.grad.tolist() == [0.0, 0.0, 1.0]
