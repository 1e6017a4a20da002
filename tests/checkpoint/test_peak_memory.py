"""The peak of loading, measured in a process of its own: the loaded size and one tensor, not the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

MIB = 2**20
# What neither the model nor one tensor explains: code loaded on the first use, threads, what the allocator keeps.
SLACK = 32 * MIB
LAYERS = 5

LOAD = """
import json, sys
import torch, transformers
from entrenar.checkpoint import load_pretrained

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))

small, large, bits = sys.argv[1:]
bits = json.loads(bits)
load_pretrained(small, bits=bits)  # imports everything that loading imports
before = status("VmRSS")
model = load_pretrained(large, bits=bits)
print(json.dumps({
    "increase": status("VmHWM") - before,
    "final": sum(p.numel() * p.element_size() for p in model.parameters()),
}))
"""


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("bits", [4, None])
def test_peak_is_the_loaded_size_and_one_tensor(tmp_path, bits):
    write_checkpoint(tmp_path / "small", 64, 1)
    largest = write_checkpoint(tmp_path / "large", 2048, LAYERS)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "small", tmp_path / "large", json.dumps(bits)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert on_disk > 20 * SLACK
    assert measured["final"] < (0.3 if bits == 4 else 1.01) * on_disk
    assert measured["increase"] < measured["final"] + 4 * largest + SLACK, measured
