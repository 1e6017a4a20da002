"""The CUDA kernels, compiled as C++ and run thread by thread on the CPU, give the CPU kernels' bits."""

from __future__ import annotations

import ctypes
import pathlib
import shutil
import subprocess

import pytest
import torch

from entrenar.autograd.ops.int4 import int4_dequantize_reference, int4_quantize_reference, packed_columns

HERE = pathlib.Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "cuda" / "int4.cu"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=["forward", "reversed"])
def kernels(request, tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    order = ["-DEMULATE_REVERSED"] if request.param == "reversed" else []
    flags = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    command = ["g++", *flags, *order, "-shared", "-fPIC", "-I", str(HERE / "emulator")]
    command += ["-x", "c++", str(KERNELS), str(HERE / "emulator" / "entry.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 31), (5, 96), (2, 129), (17, 64)])
def test_quantize_and_dequantize(kernels, rows, columns, block, scale_dtype, dtype):
    weight = torch.randn(rows, columns).to(dtype)
    weight[0, :32] = 0
    weight[-1, -1] = float("nan") if rows == 17 else 1e-6
    codes, scales = int4_quantize_reference(weight, block, scale_dtype)
    float32_scales = scale_dtype == torch.float32
    made_codes, made_scales = torch.full_like(codes, 255), torch.full_like(scales, 255)
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(columns))
    kernels.quantize(
        pointer(weight), DTYPES.index(dtype), *sizes, block, float32_scales, pointer(made_codes), pointer(made_scales)
    )
    assert made_codes.shape[1] == packed_columns(columns)
    assert torch.equal(made_codes, codes)
    expected, actual = scales.view(scale_dtype), made_scales.view(scale_dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())

    decoded = torch.full((rows, columns), torch.nan, dtype=dtype)
    kernels.dequantize(
        pointer(codes), pointer(scales), float32_scales, *sizes, block, DTYPES.index(dtype), pointer(decoded)
    )
    wanted = int4_dequantize_reference(codes, scales, columns, block, dtype)
    assert torch.equal(decoded.nan_to_num(), wanted.nan_to_num())
