from entrenar.optim.adam import Adam, Adam8bit
from entrenar.optim.adamw import AdamW, AdamW8bit
from entrenar.optim.clip import clip_grad_norm
from entrenar.optim.lion import Lion, Lion8bit
from entrenar.optim.schedulers import CosineScheduler
from entrenar.optim.sgd import SGD, SGD8bit

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "CosineScheduler",
    "Lion",
    "Lion8bit",
    "SGD8bit",
    "clip_grad_norm",
]
