"""What of the Hopper product needs no GPU, as no emulator runs it: its index maps agree with the byte format and the
hardware, and its warps do not wait for each other for ever."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("name", ["product_sm90_maps", "product_sm90_pipeline"])
def test_on_the_host(name, tmp_path):
    program = tmp_path / name
    source = HERE / f"{name}.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    subprocess.run([program], check=True)
