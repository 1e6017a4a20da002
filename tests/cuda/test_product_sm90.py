"""The index maps of the Hopper product, which no emulator runs, agree with the byte format and the hardware."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_maps(tmp_path):
    program = tmp_path / "maps"
    source = HERE / "product_sm90_maps.cpp"
    subprocess.run(["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True)
    subprocess.run([program], check=True)
