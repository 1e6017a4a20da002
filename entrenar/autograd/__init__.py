"""Operations with hand-derived gradients, the tape that records them, and the check of their gradients."""

from entrenar.autograd.gradcheck import GradientError, check_gradient
from entrenar.autograd.tape import Tape
from entrenar.autograd.tensor import Tensor, backward

__all__ = ["GradientError", "Tape", "Tensor", "backward", "check_gradient"]
