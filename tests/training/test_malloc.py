from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path(__file__).parents[2] / "entrenar" / "malloc.py"
PROGRAM = """
import ctypes, resource, runpy, sys
if sys.argv[2] == "keep":
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 64 * 2**20
faults = []
for _ in range(3):
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(block, 1, size)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


def faults_of_a_reused_block(*words: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, SETTING, *words], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_large_block_is_reused_without_page_faults() -> None:
    assert faults_of_a_reused_block("keep") < faults_of_a_reused_block("usual") / 10
