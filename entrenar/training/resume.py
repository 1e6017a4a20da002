"""Checkpoints of a run: everything that the next step depends on, in one safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from entrenar.lora.adapter.files import write_file
from entrenar.lora.layers import Int4Linear, LoRALayer, common_fit
from entrenar.training.batches import Example

HEADER = "entrenar.run"


class ResumeError(ValueError):
    """A run cannot be started or resumed here; the message says why and what to do."""


@dataclass
class RunState:
    """How far a run has come: steps done, what they cost, and what was measured on the way."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    heldout_losses: dict[int, float] = field(default_factory=dict)
    samples_before: list[dict[str, str]] = field(default_factory=list)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fingerprint(
    model: nn.Module, train: Sequence[Example], heldout: Sequence[Example], config: dict[str, Any]
) -> dict[str, Any]:
    """Return what a run depends on beside its state, as JSON values by the names that an error message calls them."""
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad)
    adapters = {
        f"adapter {name}": [layer.in_features, layer.out_features, layer.rank, layer.alpha, layer.dropout.p]
        for name, layer in model.named_modules()
        if isinstance(layer, LoRALayer)
    }
    return {
        **config,
        **adapters,
        "fit": common_fit(model),
        "activations": "int8" if any(isinstance(m, Int4Linear) and m.int8 for m in model.modules()) else None,
        "base model": _digest(frozen),
        "training data": _digest(_tensors(train)),
        "held-out data": _digest(_tensors(heldout)),
    }


def _tensors(examples: Sequence[Example]) -> Iterator[tuple[str, Tensor]]:
    for example in examples:
        length = str(len(example.input_ids))
        yield length, example.input_ids
        yield length, example.labels


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: RunState, fingerprint: dict[str, Any]
) -> None:
    """Write parameters, optimizer state, random generators and `state` to `path`, which is replaced only when whole.

    Raises OSError where they cannot be written, with the previous checkpoint as it was.
    """
    parameters = trainable_parameters(model)
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    optimizer_state = optimizer.state_dict()["state"]
    for index, name in enumerate(parameters):
        for key, value in optimizer_state.get(index, {}).items():
            tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value)
    tensors |= _random_state(model)
    header = {HEADER: json.dumps({"state": asdict(state), "fingerprint": fingerprint})}
    try:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_file(path, lambda beside: save_file(contiguous, beside, metadata=header))
    except (OSError, SafetensorError) as error:
        kept = "the previous checkpoint there is intact" if path.exists() else "there is no earlier one"
        raise OSError(f"cannot write the checkpoint of step {state.step} to {path}: {error}; {kept}") from error


def require_checkpoint(path: Path) -> None:
    """Raise ResumeError where there is none."""
    if not path.exists():
        raise ResumeError(f"{path.parent} holds no checkpoint to resume from; start without resuming")


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: dict[str, Any]
) -> RunState:
    """Put parameters, optimizer state and random generators back as `save_checkpoint` found them; return the state.

    From there a run goes on to bit-identical parameters, given the same machine, library versions and number of
    threads, and on a GPU under torch.use_deterministic_algorithms. Raises ResumeError for a file that is missing or
    damaged, and for one made with another model, other data or another configuration, saying which.
    """
    require_checkpoint(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ResumeError(f"{path} is not a readable checkpoint of a run: {error}") from error
    _check_fingerprint(path, header["fingerprint"], fingerprint)
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for index, name in enumerate(parameters):
        prefix = f"optimizer.{name}."
        optimizer_state[index] = {
            key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)
        }
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"], next(model.parameters()).device)
    state = RunState(**header["state"])
    # JSON has only strings for keys.
    state.heldout_losses = {int(step): loss for step, loss in state.heldout_losses.items()}
    return state


def _random_state(model: nn.Module) -> dict[str, Tensor]:
    state = {"random.cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        state["random.cuda"] = torch.cuda.get_rng_state(device)
    return state


def _check_fingerprint(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    # Older checkpoints do not say the fit, but the base model's digest tells; and they are of padded batches.
    saved = {"fit": current.get("fit"), "packed": False, **saved}
    differing = [name for name in {**saved, **current} if saved.get(name) != current.get(name)]
    if not differing:
        return
    shown = "; ".join(
        f"{name} ({_shorten(saved.get(name))} then, {_shorten(current.get(name))} now)" for name in differing[:5]
    )
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise ResumeError(
        f"{path} belongs to another run; what differs: {shown}{more}. Resume with what it was started with"
    )


def _shorten(value: Any) -> str:
    return value[:8] if isinstance(value, str) else "absent" if value is None else str(value)
