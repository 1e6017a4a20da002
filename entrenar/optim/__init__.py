from entrenar.optim.adamw import AdamW
from entrenar.optim.clip import clip_grad_norm
from entrenar.optim.schedulers import CosineScheduler

__all__ = ["AdamW", "CosineScheduler", "clip_grad_norm"]
