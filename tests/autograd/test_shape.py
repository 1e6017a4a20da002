"""Views, and every kind of index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from entrenar.autograd import ops

VIEWS = {
    "reshape": lambda x: ops.reshape(x, (3, 2)),
    "transpose": lambda x: ops.transpose(x, 0, 1),
    "permute": lambda x: ops.permute(x, (1, 0)),
    "expand": lambda x: ops.expand(x, (4, 2, 3)),
    "getitem": lambda x: ops.getitem(x, (slice(None), 1)),
    "the same shape": lambda x: ops.reshape(x, (2, 3)),
    "everything": lambda x: ops.getitem(x, ...),
}
BY_VIEW = pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))


@BY_VIEW
def test_view_shows_a_change_of_its_input(view):
    x = torch.zeros(2, 3)
    y = view(x)
    assert y is not x
    assert y._base is x
    x += 1
    assert (y == 1).all()


def test_view_without_gradient_can_be_changed():
    x = torch.zeros(2, 3)
    ops.reshape(x, (6,)).add_(1)
    assert (x == 1).all()


@BY_VIEW
def test_view_with_gradient_cannot_be_changed_in_place(view):
    y = view(torch.zeros(2, 3, requires_grad=True) * 1)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        y.mul_(2)


@BY_VIEW
def test_view_cannot_be_used_after_a_change_of_its_input_in_place(view):
    x = torch.zeros(2, 3, requires_grad=True) * 1
    y = view(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="its base or another view of its base has been modified inplace"):
        y.sum().backward()


MASK = torch.tensor([True, False, True, False])
INDICES = [
    2,
    -1,
    np.int64(1),
    torch.tensor(1),
    slice(1, None, 2),
    slice(-2, None),
    slice(4, 2),
    None,
    ...,
    (),
    True,
    False,
    (1, ..., -1),
    (..., None, 0),
    (None, 1, slice(None), None, slice(0, 2)),
    [0, 2, 0],
    ([],),
    (slice(None), [2, 1], 2),
    np.array([1, 3]),
    torch.tensor([[0, 1], [3, 3]]),
    torch.tensor([-1, 0], dtype=torch.int32),
    MASK,
    torch.tensor(True),
    (torch.tensor(False), 1),
    MASK[:, None, None].expand(4, 3, 5),
    (MASK[:, None].expand(4, 3), slice(0, 2)),
    (slice(None), torch.tensor([True, False, True]), torch.tensor([1, 4])),
    (torch.tensor([1, 2]), slice(None), torch.tensor([0, 0])),
    (torch.tensor([1, 2]), ..., torch.tensor([[0], [1]])),
    (0, torch.tensor([2, 1]), torch.tensor([0, 0])),
    (torch.tensor([1, 1]), 0, slice(None)),
    (slice(None), 0, torch.tensor([1, 1, 2])),
    (torch.tensor(2), slice(None), torch.tensor([1, 1, 2])),
    (None, torch.tensor([1, 1]), None, slice(1, 3), torch.tensor([0, 2])),
    (slice(1, 4), True, torch.tensor([1])),
]


@pytest.mark.parametrize("index", INDICES, ids=lambda i: str(i).replace("\n", ""))
@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 5, 2)], ids=str)
def test_every_index(index, shape):
    if isinstance(index, torch.Tensor) and index.dim() == 3:
        shape = (4, 3, 5)
    results = []
    for op in (ops.getitem, torch.Tensor.__getitem__):
        x = torch.arange(0.0, np.prod(shape)).reshape(shape).requires_grad_()
        y = op(x, index)
        (dx,) = torch.autograd.grad(y, x, torch.arange(1.0, 1 + y.numel()).reshape(y.shape))
        results.append((y, dx, torch.tensor(y.data_ptr() == x.data_ptr())))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.cpu("on CUDA an assertion of torch's kernel fails")
@pytest.mark.parametrize(
    "index", [5, (0, 0, 0, 0), (0, 0, 0, 0, ...), torch.tensor([4]), "a", 1.5, torch.tensor(1.5), (slice(None), MASK)]
)
def test_bad_index_is_refused_as_by_torch(index):
    x = torch.zeros(4, 3, 5)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        x[index]
    with pytest.raises(expected.type):
        ops.getitem(x, index)


def test_gradient_of_an_element_picked_often_is_summed_in_float32():
    x = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    ops.getitem(x, torch.zeros(1000, dtype=torch.long)).sum().backward()
    assert x.grad.tolist() == [1000, 0]


def test_cat_takes_vectors_without_elements_and_mixed_dtypes():
    results = []
    for op in (ops.cat, torch.cat):
        xs = [torch.ones(2, 3), torch.ones(0), torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 3).int()]
        inputs = [x.requires_grad_() for x in xs if x.is_floating_point()]
        y = op(xs, -2)
        results.append((y, *torch.autograd.grad(y, inputs, torch.randn(4, 3, generator=torch.manual_seed(0)))))
    torch.testing.assert_close(*results)


def test_an_index_of_tensors_under_checkpointing():
    x, picks = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2])
    y = checkpoint(lambda x: ops.getitem(x, picks).exp(), x, use_reentrant=False)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx[picks], y)
    assert not dx[1::2].any()
