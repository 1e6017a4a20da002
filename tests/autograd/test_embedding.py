"""embedding and dropout, against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_db import (
    DTYPES,
    Twin,
    check_derivatives,
    check_errors,
    check_forward,
    check_gradients,
    check_no_forward_mode,
    check_refuses_complex,
    check_transforms,
    samples,
    twin_params,
)
from torch.nn import functional as F
from torch.testing._internal.common_methods_invocations import wrapper_set_seed

from entrenar.autograd.gradcheck import check_gradient
from entrenar.autograd.ops import dropout, embedding

# Torch's table has the arguments in the other order, and seeds its generator before each dropout.
EMBEDDING = Twin(
    lambda weight, input, **settings: embedding(input, weight, **settings), "nn.functional.embedding", wide=True
)
DROPOUT = Twin(lambda *args, **settings: wrapper_set_seed(dropout, *args, **settings), "nn.functional.dropout")
TWINS = [EMBEDDING, DROPOUT]


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES))
def test_forward_is_torchs(twin, dtype):
    for sample in samples(twin, dtype):
        check_forward(twin, sample)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, *DTYPES))
def test_gradients_are_torchs(twin, dtype):
    for sample in samples(twin, dtype):
        check_gradients(twin, sample)


@pytest.mark.parametrize(("twin", "dtype"), twin_params(TWINS, torch.float64))
def test_derivatives_are_those_of_finite_differences(twin, dtype):
    for sample in samples(twin, dtype):
        check_derivatives(twin, sample)


# Torch's own functional transforms compile with torch.jit when they are first used.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("twin", TWINS, ids=str)
def test_refused_input(twin):
    sample = samples(twin, torch.float32)[-1]
    check_refuses_complex(twin, sample)
    check_no_forward_mode(twin, sample)
    check_errors(twin)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_embedding_under_vmap():
    for sample in samples(EMBEDDING, torch.float64):
        check_transforms(EMBEDDING, sample)


@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 6),
    st.integers(0, 5),
    st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=60, deadline=None)
def test_embedding_of_any_shape(shape, rows, columns, dtype):
    weight = torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)
    compare_with_torch(torch.randint(rows, shape, dtype=dtype), weight, None)


@pytest.mark.parametrize("padding_idx", [0, 2, -1, -3])
def test_padding_gets_no_gradient(padding_idx):
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    gradient = compare_with_torch(torch.tensor([[0, 1, 2], [2, 0, 0]]), weight, padding_idx)
    assert (gradient == 0).all(-1).tolist() == [row == padding_idx % 3 for row in range(3)]


def compare_with_torch(input, weight, padding_idx):
    """On the CPU: torch's own gradient of a table without columns is written to no memory on CUDA."""
    results = [embedding(input, weight, padding_idx), F.embedding(input.cpu(), weight.cpu(), padding_idx)]
    assert torch.equal(results[0].cpu(), results[1])
    dy = torch.randn_like(results[0])
    gradients = [torch.autograd.grad(y, weight, dy.to(y.device))[0] for y in results]
    torch.testing.assert_close(*gradients)
    return gradients[0]


@pytest.mark.parametrize("padding_idx", [3, -4])
def test_padding_beyond_the_table_is_refused(padding_idx):
    with pytest.raises(AssertionError, match="within num_embeddings"):
        embedding(torch.tensor([0]), torch.ones(3, 2), padding_idx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_rows_are_summed_wide(dtype):
    """In 16 bits a sum of ones ends at 256 or at 2048."""
    weight = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    embedding(torch.ones(4096, dtype=torch.long), weight).sum().backward()
    assert torch.equal(weight.grad[1], torch.full((3,), 4096, dtype=dtype))


@pytest.mark.parametrize("setting", [dict(max_norm=1.0), dict(scale_grad_by_freq=True), dict(sparse=True)])
def test_options_that_embedding_lacks_are_refused(setting):
    with pytest.raises(NotImplementedError, match=next(iter(setting))):
        embedding(torch.tensor([0]), torch.ones(2, 2), **setting)


def test_all_options_that_embedding_lacks_are_named():
    message = "^embedding does not support max_norm, scale_grad_by_freq, sparse: use torch"
    with pytest.raises(NotImplementedError, match=message):
        embedding(torch.tensor([0]), torch.ones(2, 2), None, 1.0, 2.0, True, True)


@pytest.mark.cpu("on CUDA an assertion of torch's kernel fails")
def test_index_beyond_the_table_is_refused():
    with pytest.raises(IndexError, match="index out of range"):
        embedding(torch.tensor([2]), torch.ones(2, 2))


def test_dropout_outside_training_is_the_input_itself():
    x = torch.randn(3, requires_grad=True)
    assert dropout(x, training=False) is x
    assert dropout(x, 0.0) is x


def test_dropout_is_the_same_in_every_call_of_check_gradient():
    assert check_gradient(lambda x: dropout(x, 0.5).exp(), torch.randn(20)).ok


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_keeps_the_mean_and_a_byte_for_each_element(dtype):
    x = torch.ones(100_000, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, 0.3)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bool, x.numel())]
    # Of 100,000 draws the standard deviation is 0.0014 of them.
    assert abs((y == 0).float().mean() - 0.3) < 0.01
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], y)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(p=-0.1), ValueError, "between 0 and 1"),
        (dict(p=1.1), ValueError, "between 0 and 1"),
        (dict(inplace=True), NotImplementedError, "^dropout does not work in place"),
        (dict(input=torch.ones(2, dtype=torch.long)), TypeError, "floating-point"),
    ],
)
def test_bad_arguments_of_dropout(arguments, error, message):
    with pytest.raises(error, match=message):
        dropout(**{"input": torch.ones(2)} | arguments)


def test_dropout_under_vmap_needs_to_know_the_randomness():
    x = torch.ones(2, 1000)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(dropout)(x)
    same = torch.func.vmap(dropout, randomness="same")(x)
    different = torch.func.vmap(dropout, randomness="different")(x)
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])
