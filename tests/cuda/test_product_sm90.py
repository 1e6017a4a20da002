"""The Hopper product. What needs no GPU, as no emulator runs it: its index maps agree with the byte format and the
hardware, and its warps do not wait for each other for ever. On one: its results, however it cuts a product up."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from entrenar.autograd.ops import int4_dequantize, int4_linear, int4_lora_linear, int4_lora_linears, int4_quantize

HERE = pathlib.Path(__file__).parent
BLOCK, RANK, SCALING = 64, 8, 0.5
# Whether of a gradient, tokens of a tile, parts of the contraction, whether whole tiles come before those with parts:
# which costs too much with the smallest.
CUTS = [
    (gradient, tokens, parts, whole)
    for gradient in (False, True)
    for tokens in (64, 128, 256)
    for parts in (1, 2, 4, 8)
    for whole in (False, True)
    if 16 * parts <= tokens and (parts > 1 or whole) and not (tokens == 64 and parts > 1 and whole)
]
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def compiled(name: str, directory: pathlib.Path) -> pathlib.Path:
    program = directory / name
    source = HERE / f"{name}.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    return program


@needs_compiler
@pytest.mark.parametrize("name", ["product_sm90_maps", "product_sm90_pipeline"])
def test_on_the_host(name, tmp_path):
    subprocess.run([compiled(name, tmp_path)], check=True)


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """From a number of multiprocessors to features, tokens and contraction of a product for each cut."""
    program = compiled("product_sm90_cuts", tmp_path_factory.mktemp("cuts"))

    def products(processors: int) -> dict[tuple[bool, int, int, bool], tuple[int, int, int]]:
        lines = subprocess.check_output([program, str(processors)], text=True).splitlines()
        numbers = [[int(word) for word in line.split()] for line in lines]
        return {(bool(gradient), n, parts, bool(whole)): tuple(sizes) for gradient, n, parts, whole, *sizes in numbers}

    return products


@needs_compiler
@pytest.mark.parametrize("processors", [132, 114, 78])  # of an H100 and an H200; of others of Hopper
def test_products_are_found_for_every_cut_that_can_be(processors, cuts):
    assert sorted(cuts(processors)) == sorted(CUTS)


@needs_compiler
@needs_hopper
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_cut_gives_the_results_of_float64(cut, cuts):
    torch.set_default_device("cuda")
    gradient, tokens, *_ = cut
    sizes = cuts(torch.cuda.get_device_properties(0).multi_processor_count)[cut]
    kernels = product_kernels(lambda: (check_gradients if gradient else check_results)(*sizes))
    assert {n for of_gradient, n in kernels if of_gradient == gradient} == {tokens}


def product_kernels(run: Callable[[], None]) -> list[tuple[bool, int]]:
    """Of each launch of the kernel, whether it was of a gradient, and the tokens of its tiles."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    kernels = re.findall(r"product_kernel<(\w+), (\d+)>", " ".join(event.name for event in seen.events()))
    return [(gradient == "true", int(tokens)) for gradient, tokens in kernels]


@needs_hopper
@pytest.mark.parametrize(
    ("tokens", "columns", "sizes", "rank"),
    [
        (130, 192, (128, 64, 320), 8),
        (700, 1024, (2048, 512, 512), 72),
        (2100, 576, (1600, 1472), 16),
        (64, 64, (64,), 200),
    ],
)
def test_products_at_one_x_are_one_product(tokens, columns, sizes, rank):
    torch.set_default_device("cuda")
    layers = [make_layer(rows, columns, rank) for rows in sizes]
    w, codes, scales, As, Bs = zip(*layers, strict=True)
    bias = [30 * torch.randn(rows) for rows in sizes]
    x = torch.randn(tokens, columns).bfloat16().requires_grad_()
    dys = [torch.randn(tokens, rows).bfloat16() for rows in sizes]

    def run() -> None:
        ys = int4_lora_linears(x, codes, scales, bias, As, Bs, SCALING, block=BLOCK)
        (dx,) = torch.autograd.grad(ys, x, dys)
        for y, w_i, b, A, B in zip(ys, w, bias, As, Bs, strict=True):
            assert_near(y, x.double() @ w_i.T + b + low(x, A.T) @ B.bfloat16().double().T)
        parts = [
            dy.double() @ w_i + low(dy, B) @ A.bfloat16().double() for dy, w_i, A, B in zip(dys, w, As, Bs, strict=True)
        ]
        assert_near(dx, sum(parts))

    kernels = product_kernels(run)
    for gradient in (False, True):  # whole tiles, and those whose contraction is shared out
        assert 1 <= sum(of == gradient for of, _ in kernels) <= 2


def check_results(features: int, tokens: int, contraction: int) -> None:
    """y = x Wᵀ + b, with and without an adapter's term."""
    w, codes, scales, A, B = make_layer(features, contraction)
    x, bias = torch.randn(tokens, contraction).bfloat16(), 30 * torch.randn(features)
    product = x.double() @ w.T + bias
    y = int4_linear(x, codes, scales, bias, block=BLOCK)
    assert_rounded_once(y, product)
    y = int4_lora_linear(x, codes, scales, bias, A, B, SCALING, block=BLOCK)
    assert_near(y, product + low(x, A.T) @ B.bfloat16().double().T)


def check_gradients(features: int, tokens: int, contraction: int) -> None:
    """dx = dy W, with and without an adapter's term."""
    w, codes, scales, A, B = make_layer(contraction, features)
    dy, x = torch.randn(tokens, contraction).bfloat16(), torch.randn(tokens, features).bfloat16().requires_grad_()
    product = dy.double() @ w
    y = int4_lora_linear(x, codes, scales, None, A, B, SCALING, block=BLOCK)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_near(dx, product + low(dy, B) @ A.bfloat16().double())
    (dx,) = torch.autograd.grad(int4_linear(x, codes, scales, block=BLOCK), x, dy)
    assert_rounded_once(dx, product)


def make_layer(rows: int, columns: int, rank: int = RANK) -> tuple[Tensor, ...]:
    """A weight as bfloat16 has it, its codes and scales, and an adapter."""
    codes, scales = int4_quantize(torch.randn(rows, columns), block=BLOCK)
    w = int4_dequantize(codes, scales, columns, block=BLOCK, dtype=torch.bfloat16).double()
    return w, codes, scales, torch.randn(rank, columns), torch.randn(rows, rank)


def low(x: Tensor, factor: Tensor) -> Tensor:
    """The adapter's middle, which is rounded."""
    return (SCALING * x.double() @ factor.bfloat16().double()).bfloat16().double()


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    # Up to 1024 additions of 16 products, each off by up to 2^-23 of the largest sum; then one rounding.
    limit = 2**-8 * expected.abs() + 2**-13 * expected.abs().max()
    assert ((actual.double() - expected).abs() <= limit).all()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    # The middle may be rounded the other way, and off by 2^-7 of itself.
    assert (actual.double() - expected).abs().max() <= 2**-7 * expected.abs().max()
