"""The program `entrenar`: each command parses its arguments, calls the library and prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from entrenar.autograd.ops.int4 import Fit
from entrenar.checkpoint import load_pretrained, load_tokenizer
from entrenar.checkpoint.pretrained import available_device
from entrenar.fusion import fuse
from entrenar.lora.adapter import adapter_fit, load_adapter
from entrenar.lora.layers import check_adapter
from entrenar.lora.wrap import wrap
from entrenar.malloc import keep_freed_memory
from entrenar.training import (
    Example,
    FinetuneConfig,
    Interrupted,
    TrainingError,
    encode,
    finetune,
    generate,
    read_records,
    split_heldout,
)
from entrenar.training.folder import check_folder

try:
    import typer
    from rich.console import Console

    from entrenar.training.terminal import TerminalWatcher, describe_report
except ModuleNotFoundError as error:
    sys.exit(f"entrenar: the command line needs the package {error.name!r}: pip install 'entrenar[cli]'")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
DEFAULTS = FinetuneConfig()


def main() -> None:
    """Run the program; an error in what it was given is one line and exit status 1, Ctrl-C is status 130."""
    keep_freed_memory()
    try:
        app()
    except Interrupted as stop:
        resume = [] if "--resume" in sys.argv else ["--resume"]
        print(f"\n{stop}\nto go on: {shlex.join(['entrenar', *sys.argv[1:], *resume])}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ModuleNotFoundError, TrainingError) as error:
        print(f"entrenar: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


@app.callback()
def _program() -> None:
    """LoRA fine-tuning on 4-bit weights."""


@app.command(name="finetune")
def _finetune(
    model: Annotated[Path, typer.Option(help="Hugging Face directory or GGUF file to start from.")],
    data: Annotated[
        Path, typer.Option(help="Training data: .jsonl (messages, prompt and completion, or text) or .txt.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapter, metrics.jsonl, loss.png and report.json.")],
    heldout: Annotated[Path | None, typer.Option(help="Held-out data; by default a part of the data.")] = None,
    heldout_fraction: Annotated[float, typer.Option(help="That part, without --heldout.")] = 0.05,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="Numerator of their scaling, alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Dropout on the adapters' input.")] = 0.0,
    activations: Annotated[
        Literal["int8"] | None, typer.Option(help="int8: round the layers' inputs, which is faster with AVX-512 VNNI.")
    ] = None,
    fit: Annotated[Fit, typer.Option(help="How the 4-bit weights' scales are found: mse errs less.")] = "absmax",
    max_length: Annotated[int, typer.Option(help="Tokens at which an example is cut.")] = 1024,
    epochs: Annotated[int, typer.Option(help="Times to go through the data.")] = DEFAULTS.epochs,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a forward pass.")] = DEFAULTS.batch_size,
    accumulation: Annotated[int, typer.Option(help="Forward passes in an optimizer step.")] = DEFAULTS.accumulation,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULTS.lr,
    warmup: Annotated[float, typer.Option(help="Share of the steps that climb to it.")] = DEFAULTS.warmup,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the adapters.")] = DEFAULTS.weight_decay,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradients.")] = DEFAULTS.clip_norm,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = DEFAULTS.seed,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = DEFAULTS.checkpoint_every,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute activations anew in the backward: less memory, more time.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="Where to train: cuda (if there is one) or cpu.")] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit (small states) or lion.")] = DEFAULTS.optimizer,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out.")] = False,
) -> None:
    """Train LoRA adapters on the 4-bit weights of a pretrained model."""
    config = FinetuneConfig(
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        seed=seed,
        checkpoint_every=checkpoint_every,
        recompute=recompute,
        optimizer=optimizer,
    )
    # These and the data come first: a mistake shows before minutes go into loading a large model.
    check_folder(out, resume)
    check_adapter(rank, alpha, dropout)
    tokenizer = load_tokenizer(model)
    with TerminalWatcher(Console(soft_wrap=True)) as watcher:
        train = _examples(data, tokenizer, max_length, watcher)
        if heldout is None:
            train, held = split_heldout(train, heldout_fraction, seed)
        else:
            held = _examples(heldout, tokenizer, max_length, watcher)
        watcher.say(f"{len(train)} examples to train on, {len(held)} held out")
        place = _device(device)
        watcher.say(f"training on {place}{f' ({torch.cuda.get_device_name(place)})' if place.type == 'cuda' else ''}")
        torch.manual_seed(seed)
        network = load_pretrained(model, bits=4, device=place, fit=fit)
        report = wrap(network, rank=rank, alpha=alpha, dropout=dropout, activations=activations)
        watcher.say(str(report))
        result = finetune(network, tokenizer, train, held, config, out, resume=resume, watcher=watcher)
    print(describe_report(result, out))


def _device(name: str | None) -> torch.device:
    return available_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _examples(path: Path, tokenizer: Any, max_length: int, watcher: TerminalWatcher) -> list[Example]:
    encoded = encode(read_records(path), tokenizer, max_length)
    if encoded.truncated:
        watcher.say(
            f"{path}: cut {encoded.truncated} conversations at {max_length} tokens, "
            f"and left out {encoded.dropped} of them, whose answers begin later"
        )
    return encoded.examples


@app.command(name="generate")
def _generate(
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    model: Annotated[Path, typer.Option(help="Hugging Face directory or GGUF file.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter: entrenar's or PEFT's.")] = None,
    fit: Annotated[
        Fit | None, typer.Option(help="How the 4-bit weights' scales are found; the adapter says it, or else absmax.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    device: Annotated[str | None, typer.Option(help="Where to compute: cuda (if there is one) or cpu.")] = None,
) -> None:
    """Answer a prompt, word by word, with a pretrained model in 4 bits and an adapter."""
    tokenizer = load_tokenizer(model)
    found = fit or (adapter_fit(adapter) if adapter else None) or "absmax"
    network = load_pretrained(model, bits=4, device=_device(device), fit=found)
    if adapter is not None:
        load_adapter(network, adapter)
    fuse(network)
    generate(network, tokenizer, prompt, max_tokens, on_text=lambda text: print(text, end="", flush=True))
    print()
