"""Llama's feed-forward layer, whose activation is computed anew in the backward instead of being kept."""

from __future__ import annotations

from torch import Tensor, nn

from entrenar.fusion.structure import (
    NotFusableError,
    one_input,
    own_settings,
    refuse_unknown,
    require_children,
    require_one_input,
)
from entrenar.lora.layers import apply_to_swiglu, apply_together

# What the class may have set, without any effect on the output.
HARMLESS = {"config", "hidden_size", "intermediate_size", "layer_idx"}


class FusedMLP(nn.Module):
    """y = down(silu(gate(x)) up(x)).

    Args:
        gate_proj, up_proj: layers that map x to the inner width; down_proj: one that maps it back.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    @classmethod
    def of(cls, mlp: nn.Module) -> FusedMLP:
        """The fused module with the layers of `mlp`. Raises NotFusableError where it is something else."""
        require_children(mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
        require_one_input(mlp)
        refuse_unknown(own_settings(mlp), HARMLESS)
        if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            raise NotFusableError(f"has the activation {type(mlp.act_fn).__name__}, not SiLU")
        return cls(mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Map x [..., width], by any name, to [..., width]."""
        gate, up = apply_together((self.gate_proj, self.up_proj), one_input(inputs, named))
        return apply_to_swiglu(self.down_proj, gate, up)
