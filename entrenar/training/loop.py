"""The training loop: from a wrapped model and encoded examples to a trained adapter and its report."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entrenar.lora.adapter import save_adapter
from entrenar.lora.layers import LoRALayer, common_fit
from entrenar.optim.base import KernelOptimizer
from entrenar.optim.clip import why_not_finite
from entrenar.optim.schedulers import CosineScheduler
from entrenar.training.batches import Example, collate, pack
from entrenar.training.config import OPTIMIZERS, FinetuneConfig
from entrenar.training.evaluate import heldout_loss, sample_answers
from entrenar.training.folder import CHECKPOINT, REPORT, check_folder, only_run_in
from entrenar.training.interrupt import Interrupted, stop_between_steps
from entrenar.training.loss import causal_lm_loss
from entrenar.training.metrics import (
    MetricsLog,
    StepMetrics,
    peak_memory_bytes,
    plot_losses,
    versions,
    write_report,
)
from entrenar.training.packing import packs
from entrenar.training.plan import Plan
from entrenar.training.resume import (
    RunState,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    trainable_parameters,
)
from entrenar.training.watcher import Nobody, Watcher


class TrainingError(RuntimeError):
    """Training went wrong in a way that going on would not mend; the message says at which step and what to do."""


def finetune(
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Example],
    heldout: Sequence[Example],
    config: FinetuneConfig,
    out: str | Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Train the adapters of a wrapped model on `train`, and return the report that is also written.

    The folder `out` gets `adapter/` (PEFT's two files), `metrics.jsonl`, `loss.png` and `report.json`; while training,
    also `checkpoint.safetensors`, from which a run that was interrupted or killed goes on with `resume=True` to
    bit-identical adapters (on a GPU if torch.use_deterministic_algorithms is on). Batches go to the device that the
    adapters lie on, with their examples behind each other in one row where the model `packs` them, and padded where it
    does not. Ctrl-C finishes the step, saves a checkpoint and raises Interrupted. The held-out loss is measured before
    and after each quarter of the run. torch's random generators are seeded with `config.seed`.

    Raises ResumeError if `out` holds a run and `resume` is false, if it holds none, a finished or a different one and
    `resume` is true, and if another run is writing there; TrainingError for a loss or gradient that is not finite, and
    for adapters that get no gradient at the first step; ValueError for a model without adapters, without data, and for
    examples without labels; OSError where files cannot be written. A step whose loss or gradient is not finite changes
    no adapter.
    """
    out, watcher = Path(out), watcher or Nobody()
    parameters = _check(model, train, heldout)
    check_folder(out, resume)
    out.mkdir(parents=True, exist_ok=True)
    with only_run_in(out):
        return _run(model, tokenizer, train, heldout, config, out, parameters, resume, watcher)


def _run(
    model: nn.Module,
    tokenizer: Any,
    train: Sequence[Example],
    heldout: Sequence[Example],
    config: FinetuneConfig,
    out: Path,
    parameters: dict[str, nn.Parameter],
    resume: bool,
    watcher: Watcher,
) -> dict[str, Any]:
    device = next(iter(parameters.values())).device
    torch.manual_seed(config.seed)
    optimizer = OPTIMIZERS[config.optimizer](
        parameters.values(), lr=config.lr, weight_decay=config.weight_decay, max_norm=config.clip_norm
    )
    packed = packs(model, max(len(example.input_ids) for example in train))
    watcher.say(f"the examples of a batch are {'packed into one row' if packed else 'padded to the longest'}")
    plan = Plan(train, config, packed)
    schedule = CosineScheduler(config.lr, config.lr / 10, plan.total_steps, int(config.warmup * plan.total_steps))
    identity = fingerprint(model, train, heldout, {**asdict(config), "packed": packed})

    if resume:
        state = load_checkpoint(out / CHECKPOINT, model, optimizer, identity)
        watcher.say(f"resuming after step {state.step} of {plan.total_steps}")
    else:
        state = RunState()
        state.heldout_losses[0] = heldout_loss(model, heldout, config.batch_size)
        watcher.say(f"held-out loss before: {state.heldout_losses[0]:.4f} ({len(heldout)} examples)")
        state.samples_before = sample_answers(model, tokenizer, heldout)

    model.train()
    if config.recompute:
        _recompute_activations(model)
    with MetricsLog(out / "metrics.jsonl", last_step=state.step) as log, stop_between_steps() as stopping:
        for step in range(state.step + 1, plan.total_steps + 1):
            lr = schedule.get_lr(step - 1)
            batches = [[train[index] for index in batch] for batch in plan.batches(step)]
            start = time.perf_counter()
            loss, grad_norm = _train_step(model, optimizer, parameters, batches, lr, step, packed)
            row = StepMetrics(
                step=step,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens=sum(len(example.input_ids) for batch in batches for example in batch),
                seconds=time.perf_counter() - start,
                peak_memory_bytes=max(state.peak_memory_bytes, peak_memory_bytes(device)),
                heldout_loss=heldout_loss(model, heldout, config.batch_size) if plan.is_milestone(step) else None,
            )
            if row.heldout_loss is not None and not math.isfinite(row.heldout_loss):
                raise TrainingError(_diverged(f"the held-out loss is {row.heldout_loss}", lr, step))
            _count(state, row)
            log.write(row)
            watcher.step(row, plan.total_steps)
            if row.heldout_loss is not None:
                watcher.say(f"held-out loss after {step} of {plan.total_steps} steps: {row.heldout_loss:.4f}")
            last, stop = step == plan.total_steps, stopping()
            if last or stop or step % config.checkpoint_every == 0:
                save_checkpoint(out / CHECKPOINT, model, optimizer, state, identity)
            if stop and not last:
                raise Interrupted(f"stopped after step {step} of {plan.total_steps}; the run is saved in {out}")
    model.eval()

    report = _report(model, state, config, train, heldout, sample_answers(model, tokenizer, heldout))
    save_adapter(model, out / "adapter")
    plot_losses(out / "loss.png", log.rows, state.heldout_losses)
    write_report(out / REPORT, report)
    (out / CHECKPOINT).unlink()
    return report


def _recompute_activations(model: nn.Module) -> None:
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        raise ValueError(
            f"{type(model).__name__} cannot recompute activations: it has no activation_checkpointing_enable"
        )
    enable({"use_reentrant": False})


def _check(model: nn.Module, train: Sequence[Example], heldout: Sequence[Example]) -> dict[str, nn.Parameter]:
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "fine-tuning draws its loss with matplotlib; install it with: pip install entrenar[cli]"
        )
    if not train or not heldout:
        raise ValueError(
            f"there are {len(train)} examples to train on and {len(heldout)} held out; both need at least one"
        )
    if bare := sum(example.targets == 0 for example in (*train, *heldout)):
        raise ValueError(f"{bare} examples have no labelled tokens: leave them out")
    parameters = trainable_parameters(model)
    if not parameters or not any(isinstance(module, LoRALayer) for module in model.modules()):
        raise ValueError("this model has no adapters that train; wrap it first: entrenar.wrap(model)")
    return parameters


def _train_step(
    model: nn.Module,
    optimizer: KernelOptimizer,
    parameters: dict[str, nn.Parameter],
    batches: Sequence[Sequence[Example]],
    lr: float,
    step: int,
    packed: bool,
) -> tuple[float, float]:
    """Do one optimizer step on the batches together; return their loss and the gradients' norm before clipping."""
    device = next(iter(parameters.values())).device
    targets = sum(example.targets for batch in batches for example in batch)
    total = torch.zeros((), device=device)
    for batch in batches:
        input_ids, labels, offsets = pack(batch) if packed else (*collate(batch), None)
        share = sum(example.targets for example in batch) / targets
        loss = causal_lm_loss(model, input_ids.to(device), labels.to(device), offsets) * share
        loss.backward()
        total += loss.detach()
    optimizer.set_lr(lr)
    # As gradients do that are not finite, such a loss leaves the step out; a GPU is not waited for.
    optimizer.found_inf = total.isfinite().logical_not()
    optimizer.step()
    # Read together, for a GPU is waited for here. The step left the gradients as they are.
    norm = total.new_zeros(()) if optimizer.grad_norm is None else optimizer.grad_norm
    loss, grad_norm = torch.stack([total, norm]).tolist()
    if not math.isfinite(loss):
        raise TrainingError(_diverged(f"the loss is {loss}", lr, step))
    if step == 1 and any(len(example.input_ids) > 2 for batch in batches for example in batch):
        _check_every_adapter_learns(model)
    if not math.isfinite(grad_norm):
        why = why_not_finite(parameters.items())
        raise TrainingError(_diverged(f"the gradients' norm is {grad_norm}: {why}", lr, step))
    optimizer.zero_grad()
    return loss, grad_norm


def _diverged(what: str, lr: float, step: int) -> str:
    return f"step {step}: {what}, at a learning rate of {lr:.2g}; start over with a lower one, or look at the data"


def _check_every_adapter_learns(model: nn.Module) -> None:
    """At the first step B is zero, so A has no gradient yet, but B must: one without is cut off from the loss.

    Of two tokens only the first is followed by a label, and it attends to itself alone, whatever queries and keys are.
    """
    idle = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALayer) and (layer.lora_B.grad is None or not layer.lora_B.grad.any())
    ]
    if idle:
        shown = ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if len(idle) > 5 else "")
        raise TrainingError(
            f"these adapters got no gradient at the first step and would never learn: {shown}; leave them out of the "
            "targets, or look for what detaches them from the loss"
        )


def _count(state: RunState, row: StepMetrics) -> None:
    state.step = row.step
    state.tokens += row.tokens
    state.seconds += row.seconds
    state.peak_memory_bytes = row.peak_memory_bytes
    if row.heldout_loss is not None:
        state.heldout_losses[row.step] = row.heldout_loss


def _report(
    model: nn.Module,
    state: RunState,
    config: FinetuneConfig,
    train: Sequence[Example],
    heldout: Sequence[Example],
    samples_after: Sequence[dict[str, str]],
) -> dict[str, Any]:
    samples = [
        {"prompt": before["prompt"], "wanted": before["wanted"], "before": before["answer"], "after": after["answer"]}
        for before, after in zip(state.samples_before, samples_after, strict=True)
    ]
    return {
        "heldout_loss_before": state.heldout_losses[0],
        "heldout_loss_after": state.heldout_losses[state.step],
        "tokens_per_second": state.tokens / state.seconds,
        "training_seconds": state.seconds,
        "peak_memory_bytes": state.peak_memory_bytes,
        "steps": state.step,
        "tokens": state.tokens,
        "trainable_parameters": sum(p.numel() for p in trainable_parameters(model).values()),
        "train_examples": len(train),
        "heldout_examples": len(heldout),
        "fit": common_fit(model),
        "seed": config.seed,
        "config": asdict(config),
        "versions": versions(),
        "samples": samples,
    }
