"""The peak of the loss behind a head, measured in a process of its own: a chunk of logits, never all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import entrenar
from entrenar.autograd.ops._product import TILE_BYTES, multiplies_fast
from entrenar.autograd.ops.linear_cross_entropy import CHUNK_BYTES

MIB = 2**20
ROWS, WIDTH, CLASSES = 8192, 64, 32768
# What the arithmetic below does not explain: code loaded on the first use, threads, the products' own buffers.
SLACK = 24 * MIB

LOSS = """
import json, sys
import torch
from torch import nn
from entrenar import Int4Linear
from entrenar.autograd.ops import head_cross_entropy

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

kind, products, rows, width, classes = *sys.argv[1:3], *map(int, sys.argv[3:])
if products == "slow":
    torch.backends.mkldnn.enabled = False
head = nn.Linear(width, classes, bias=False).bfloat16().requires_grad_(kind == "trainable")
if kind == "int4":
    head = Int4Linear.from_weight(head.weight)

def run(rows):
    x = torch.randn(rows, width).bfloat16().requires_grad_(kind != "no gradient")
    y = head_cross_entropy(head, x, torch.randint(0, classes, (rows,)), classes)
    if y.requires_grad:
        y.backward()

run(8)  # loads everything that the loss needs
head.zero_grad()
before = status("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # restarts VmHWM
run(rows)
print(json.dumps(status("VmHWM") - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("products", ["as they are", "slow"])
@pytest.mark.parametrize("kind", ["frozen", "trainable", "no gradient", "int4"])
def test_peak_is_one_chunk_of_logits(kind, products):
    done = subprocess.run(
        [sys.executable, "-c", LOSS, kind, products, *map(str, (ROWS, WIDTH, CLASSES))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    logits, hidden, weight = (2 * n for n in (ROWS * CLASSES, ROWS * WIDTH, WIDTH * CLASSES))
    assert logits > 4 * (CHUNK_BYTES + SLACK)
    # Input and gradient, the latter also scaled; of a weight's gradient its float32 sum, one chunk's, and both results.
    bound = CHUNK_BYTES + 4 * hidden + SLACK + (5 * weight if kind == "trainable" else 0)
    if products == "slow" or not multiplies_fast(torch.bfloat16, torch.device("cpu")):
        # Tiles of one product; and of the others', which differ in size, what the heap has kept: 20 MiB in ten runs.
        bound += 3 * TILE_BYTES
    if kind == "int4" and entrenar.cpu_level() == "amx":
        bound += CHUNK_BYTES  # the gradient's rows are a multiple of 4 KiB apart, and are copied to lie otherwise
    if kind == "int4" and entrenar.cpu_level() in ("base", "avx2"):
        bound += 2 * CHUNK_BYTES  # below AVX-512 products read float32, for which they convert a chunk's gradient
    increase = json.loads(done.stdout)
    assert increase < bound, f"{increase / MIB:.0f} MiB, where {bound / MIB:.0f} are explained"
