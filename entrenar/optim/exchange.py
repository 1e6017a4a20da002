"""Optimizer states from and to bitsandbytes, whose 8-bit codes are ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from entrenar.optim.codes import dynamic_map

if TYPE_CHECKING:
    from entrenar.optim.base import KernelOptimizer

BITSANDBYTES_WRAPPER = "__bnb_optimizer_quant_state__"  # in which it hides codes and scales from FSDP


def to_bitsandbytes(optimizer: KernelOptimizer) -> dict[str, Any]:
    """The state of an optimizer, as the one of bitsandbytes with the same name loads it; codes keep their bytes.

    It shares the tensors of the state. Loading goes the other way by `optimizer.load_state_dict`.
    """
    ours = optimizer.state_dict()
    state = {}
    for index, values in ours["state"].items():
        converted: dict[str, Any] = {"step": int(values["step"])}
        wrapped: dict[str, Any] = {}
        for k, (name, signed) in enumerate(zip(optimizer.STATES, optimizer.SIGNED, strict=True), start=1):
            if name in values:
                wrapped[f"state{k}"] = values[name]
            if name + "_absmax" in values:
                wrapped[f"absmax{k}"] = values[name + "_absmax"]
                wrapped[f"qmap{k}"] = dynamic_map(signed).to(values[name].device)
        state[index] = {**converted, BITSANDBYTES_WRAPPER: wrapped}
    groups = []
    for group in ours["param_groups"]:
        betas = group.get("betas", (group.get("momentum"), group.get("dampening")))
        groups.append(
            {
                "params": group["params"],
                "lr": float(group["lr"]),
                "betas": betas,
                "eps": group.get("eps", 0.0),
                "weight_decay": group["weight_decay"],
            }
        )
    return {"state": state, "param_groups": groups}


def from_bitsandbytes(state_dict: dict[str, Any], names: tuple[str, ...], signs: tuple[bool, ...]) -> dict[str, Any]:
    """The state_dict of an optimizer of bitsandbytes with our names; one of another origin stays as it is."""
    states = {}
    for index, saved in state_dict["state"].items():
        flat = {**saved, **saved.get(BITSANDBYTES_WRAPPER, {})}
        if "state1" not in flat:
            return state_dict
        found = [f"state{k}" for k in (1, 2) if f"state{k}" in flat]
        if len(found) != len(names):
            raise ValueError(
                f"bitsandbytes' state has {len(found)} tensors for a parameter; due are those of {', '.join(names)}"
            )
        state = {"step": flat["step"]}
        for k, (name, signed) in enumerate(zip(names, signs, strict=True), start=1):
            state[name] = flat[f"state{k}"]
            if f"absmax{k}" in flat:
                state[name + "_absmax"] = flat[f"absmax{k}"]
                if not torch.equal(flat[f"qmap{k}"].float().cpu(), dynamic_map(signed)):
                    raise ValueError(f"the map of {name}, qmap{k}, is not the dynamic map")
        states[index] = state
    groups = [_group(group, names) for group in state_dict["param_groups"]] if states else state_dict["param_groups"]
    return {"state": states, "param_groups": groups}


def _group(group: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    kept: dict[str, Any] = {name: group[name] for name in ("params", "lr", "weight_decay") if name in group}
    if names == ("momentum_buffer",):
        return {**kept, "momentum": group["betas"][0]}
    if len(names) == 2:
        kept["eps"] = group["eps"]
    return {**kept, "betas": tuple(group["betas"])}
