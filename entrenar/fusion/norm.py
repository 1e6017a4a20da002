"""Normalization by the root mean square in one pass."""

from __future__ import annotations

from torch import Tensor, nn

from entrenar.autograd.ops.norm import rms_norm
from entrenar.fusion.structure import NotFusableError, one_input, own_settings, require_one_input


class FusedRMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight over the last dimension, as transformers' norms of that name compute it.

    Args:
        weight: [width].
        eps: is added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    @classmethod
    def of(cls, norm: nn.Module) -> FusedRMSNorm:
        """The fused module with the parameters of `norm`. Raises NotFusableError where it is something else."""
        require_one_input(norm)
        settings = own_settings(norm)
        if set(settings) - {"eps", "variance_epsilon"} or len(settings) != 1 or list(norm._parameters) != ["weight"]:
            raise NotFusableError("has other settings than a weight and an epsilon")
        return cls(norm.weight, *settings.values())  # type: ignore[arg-type]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Map x [..., width], by any name, to the same shape, in the dtype that torch promotes x and the weight to."""
        return rms_norm(one_input(inputs, named), self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"{self.weight.shape[0]}, eps={self.eps:g}"
