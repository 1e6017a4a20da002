"""Whole QLoRA training steps on a GPU: this package, and PEFT + bitsandbytes NF4 under bf16 autocast.

Models have random weights in the shapes of Llama 7B and SmolLM2-135M. Each is laid out on the meta device and every
linear layer quantized on the GPU as it is made, so that the 16-bit model never exists. Rank 16 on all linear layers,
loss on every token, gradient clipping, AdamW (the peer's is torch's fused one). "recompute" is activation checkpointing
by decoder layer, the same on both sides. "captured" is the whole step as one CUDA graph, launched at once. Where a cap
is given, torch may take no more memory than that for everything.

Each side of a model has a process of its own. Rows already measured at this commit on this GPU are kept, so that a run
that was cut short goes on; --again measures anew.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cuda.timing import circumstances, write
from benchmarks.harness import RESULTS, ROOT, print_table

RANK, ALPHA, LR, MAX_NORM = 16, 32, 2e-4, 1.0
WARM_UP, STEPS = 2, 5
MODELS: dict[str, dict[str, Any]] = {
    "7B-shaped Llama": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "135M-shaped Llama": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "tiny": {  # to try this program, on the CPU too
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
    },
}


@dataclass(frozen=True)
class Workload:
    batch_size: int
    length: int
    recompute: bool = False
    cap_gb: float | None = None
    captured: bool = False


WORKLOADS = {
    "7B-shaped Llama": (
        Workload(1, 512, recompute=True, cap_gb=8.0),
        Workload(4, 512, recompute=True, cap_gb=8.0),
        Workload(1, 2048, recompute=True),
        Workload(1, 512),
        Workload(4, 512),
        Workload(1, 512, captured=True),
    ),
    "135M-shaped Llama": (Workload(4, 256), Workload(4, 256, captured=True)),
    "tiny": (Workload(2, 16), Workload(2, 16, recompute=True)),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Step = Callable[[Tensor], Tensor]
"""Takes token ids [batch, length], returns the loss."""


def build(name: str, quantized: Callable[[Tensor], nn.Module]) -> Any:
    """The model with random weights, its linear layers made by `quantized` one after the other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from entrenar.checkpoint.fill import compute_buffers

    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**MODELS[name])).to(torch.bfloat16)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            weight = torch.randn(module.weight.shape, device=DEVICE, dtype=torch.bfloat16).mul_(0.02)
            model.set_submodule(path, quantized(weight))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            value = torch.ones(parameter.shape, device=DEVICE, dtype=torch.bfloat16)
            setattr(module, key, nn.Parameter(value.normal_(std=0.02) if parameter.dim() > 1 else value))
    model.tie_weights()
    compute_buffers(model, DEVICE)
    return model


def ours(name: str) -> tuple[nn.Module, Any, Step]:
    from entrenar.lora.layers import Int4Linear
    from entrenar.lora.wrap import wrap
    from entrenar.optim import AdamW
    from entrenar.training import causal_lm_loss

    model = build(name, Int4Linear.from_weight)
    print(wrap(model, rank=RANK, alpha=ALPHA), file=sys.stderr)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=LR, max_norm=MAX_NORM)

    def step(ids: Tensor) -> Tensor:
        loss = causal_lm_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, optimizer, step


def peers(name: str) -> tuple[nn.Module, Any, Step]:
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    def nf4(weight: Tensor) -> nn.Module:
        rows, columns = weight.shape
        layer = bnb.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
        layer.weight = packed.to(DEVICE)
        return layer

    base = build(name, nf4)
    base.is_loaded_in_4bit = True  # PEFT's sign for its own 4-bit adapter layers
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True, capturable=True)

    def step(ids: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, optimizer, step


SIDES = {"entrenar": ours, "PEFT + bitsandbytes": peers}


def nbytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def account(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Gigabytes that live from step to step; a quantized weight's own tensors count as weights."""
    parameters = list(model.parameters())
    states = [getattr(p, "quant_state", None) for p in parameters]
    scales = [state.absmax for state in states if state is not None]
    frozen = [p for p in parameters if not p.requires_grad]
    kept = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    return {
        "weights_gb": round(nbytes([*frozen, *model.buffers(), *scales]) / 1e9, 3),
        "adapters_gb": round(nbytes(p for p in parameters if p.requires_grad) / 1e9, 3),
        "optimizer_gb": round(nbytes(kept) / 1e9, 3),
    }


def run(step: Step, ids: Tensor) -> tuple[list[float], list[float]]:
    losses, seconds = [], []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        losses.append(step(ids).item())  # which waits for the GPU
        seconds.append(time.perf_counter() - start)
    return losses, seconds[WARM_UP:]


def captured(step: Step, ids: Tensor) -> Step:
    """The step as a CUDA graph, after two plain ones, in which what is made once is made."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(ids)
    torch.cuda.current_stream().wait_stream(stream)
    graph, static = torch.cuda.CUDAGraph(), ids.clone()
    with torch.cuda.graph(graph):
        loss = step(static)

    def replay(ids: Tensor) -> Tensor:
        static.copy_(ids)
        graph.replay()
        return loss

    return replay


def cap(gigabytes: float | None) -> None:
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gigabytes is None else gigabytes * 1e9 / total)


def set_recompute(model: Any, on: bool) -> None:
    base = getattr(model, "base_model", model)
    base = getattr(base, "model", base) if hasattr(base, "peft_config") else model
    if on:
        # Without dropout there are no random numbers to repeat.
        base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    else:
        base.activation_checkpointing_disable()


def measure(side: str, name: str, chosen: list[int]) -> None:
    """Print a row of figures for each workload as a line of JSON; in the process that is measured."""
    on_gpu = DEVICE.type == "cuda"
    caps = [WORKLOADS[name][i].cap_gb for i in chosen]
    if on_gpu and None not in caps:
        cap(max(caps))  # loading, too, happens within it
    start = time.perf_counter()
    model, optimizer, step = SIDES[side](name)
    model.train()
    build_seconds = time.perf_counter() - start
    for i in chosen:
        workload = WORKLOADS[name][i]
        row = {"model": name, **asdict(workload), "side": side}
        set_recompute(model, workload.recompute)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            cap(workload.cap_gb)
            torch.cuda.reset_peak_memory_stats()
        shape = workload.batch_size, workload.length
        ids = torch.randint(MODELS[name]["vocab_size"], shape, generator=torch.Generator().manual_seed(i)).to(DEVICE)
        try:
            losses, seconds = run(captured(step, ids) if workload.captured else step, ids)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            print(json.dumps(row | {"outcome": "out of memory"}), flush=True)
            continue
        except RuntimeError as error:
            if not workload.captured:
                raise
            print(json.dumps(row | {"outcome": f"not captured: {str(error).splitlines()[0]}"}), flush=True)
            break  # the stream may be lost with it
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        reserved = torch.cuda.max_memory_reserved() if on_gpu else 0
        memory = account(model, optimizer)
        figures = {
            "outcome": "trained",
            "tokens_per_second": round(ids.numel() / statistics.median(seconds), 1),
            "step_ms": round(1e3 * statistics.median(seconds), 2),
            "peak_gb": round(peak / 1e9, 3),
            "reserved_gb": round(reserved / 1e9, 3),
            **memory,
            "activations_and_gradients_gb": round(peak / 1e9 - sum(memory.values()), 3),
            "build_seconds": round(build_seconds, 1),
            "first_loss": round(losses[0], 4),
            "last_loss": round(losses[-1], 4),
        }
        print(json.dumps(row | figures), flush=True)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("side", "model", "batch_size", "length", "recompute", "cap_gb", "captured"))


def earlier_rows() -> list[dict[str, Any]]:
    """The rows of an earlier run of the same code on the same GPU."""
    path = RESULTS / "cuda" / "training_step.json"
    if not path.exists():
        return []
    before, now = json.loads(path.read_text()), circumstances("training_step")
    return before["rows"] if all(before[name] == now[name] for name in ("commit", "gpu", "versions")) else []


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the peers' where both trained."""
    trained = {key(row): row for row in rows if row["outcome"] == "trained"}
    compared = []
    for (side, *rest), mine in trained.items():
        theirs = trained.get(("PEFT + bitsandbytes", *rest))
        if side == "entrenar" and theirs:
            compared.append(
                {name: mine[name] for name in ("model", "batch_size", "length", "recompute", "cap_gb", "captured")}
                | {name: round(mine[name] / theirs[name], 3) for name in ("tokens_per_second", "peak_gb")}
            )
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["7B-shaped Llama", "135M-shaped Llama"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--time-limit", type=float, default=120, help="seconds after which nothing more is started")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured already")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        side, name, *chosen = arguments.child
        measure(side, name, [int(i) for i in chosen])
        return
    deadline = time.monotonic() + arguments.time_limit
    rows = [] if arguments.again else earlier_rows()
    notes = []
    for side, name in [(side, name) for name in arguments.models for side in arguments.sides]:
        if side != "entrenar" and not all(map(importlib.util.find_spec, ("bitsandbytes", "peft"))):
            notes.append(f"{name}: {side} is not installed here")
            continue
        done = {key(row) for row in rows}
        todo = [
            str(i)
            for i, workload in enumerate(WORKLOADS[name])
            if key({"side": side, "model": name, **asdict(workload)}) not in done
        ]
        left = deadline - time.monotonic()
        if not todo:
            continue
        if left <= 0:
            notes.append(f"{name}: {side} was left out, the time was up")
            continue
        command = [sys.executable, "-m", "benchmarks.cuda.training_step", "--child", side, name, *todo]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    rows.append(json.loads(line))
                    print(line.rstrip(), flush=True)
                    write("training_step", {"rank": RANK, "rows": rows, "ratios": ratios(rows), "notes": notes})
        if child.returncode:
            notes.append(f"{name}: {side} ended with status {child.returncode}")
    write("training_step", {"rank": RANK, "rows": rows, "ratios": ratios(rows), "notes": notes})
    if compared := ratios(rows):
        print_table(compared)
    print("\n".join(notes))
    if any("ended with status" in note for note in notes):
        sys.exit(1)


if __name__ == "__main__":
    main()
