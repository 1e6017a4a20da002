"""The peak of loading, measured on a process of its own: the loaded size and one tensor, not the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

MIB = 2**20
STATUS = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else ""
# What neither the model nor one tensor explains: code loaded on the first use, threads, small blocks.
SLACK = 32 * MIB
LAYERS = 5

LOAD = """
import json, sys
from entrenar.checkpoint import load_pretrained

small, large, bits = sys.argv[1:]
bits = json.loads(bits)
load_pretrained(small, bits=bits)  # imports everything that loading imports
print("ready", flush=True)
sys.stdin.readline()
model = load_pretrained(large, bits=bits)
print(sum(p.numel() * p.element_size() for p in model.parameters()))
"""


def anonymous_memory(process: int) -> int:
    """Its resident bytes but those of files, which the kernel shows for as long as it has no other use for them."""
    status = Path(f"/proc/{process}/status").read_text()
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def write_checkpoint(path: Path, width: int, layers: int) -> int:
    """Write a Llama in bfloat16 in two shards; return the elements of its largest tensor."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        vocab_size=1024,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(path)
    with torch.device("meta"):
        slots = transformers.LlamaForCausalLM(config).state_dict()
    names = list(slots)
    shard_of = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        shard_of |= dict.fromkeys(part, shard)
        save_file({name: torch.full(slots[name].shape, 0.25, dtype=torch.bfloat16) for name in part}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return max(slot.numel() for slot in slots.values())


@pytest.mark.skipif("RssAnon:" not in STATUS, reason="memory is read from /proc")
@pytest.mark.parametrize("bits", [4, None])
def test_peak_is_the_loaded_size_and_one_tensor(tmp_path, bits):
    write_checkpoint(tmp_path / "small", 64, 1)
    largest = write_checkpoint(tmp_path / "large", 2048, LAYERS)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large", json.dumps(bits)]
    # What is freed goes back to the system at once; otherwise the allocator keeps some of it, more or less by chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as loading:
        assert loading.stdin
        assert loading.stdout
        assert loading.stdout.readline() == "ready\n"
        before = peak = anonymous_memory(loading.pid)
        loading.stdin.write("\n")
        loading.stdin.flush()
        while loading.poll() is None:
            peak = max(peak, anonymous_memory(loading.pid))
            time.sleep(0.001)
        final = int(loading.stdout.read())
    assert on_disk > 20 * SLACK
    assert final < (0.3 if bits == 4 else 1.01) * on_disk
    assert final < peak - before < final + 4 * largest + SLACK
