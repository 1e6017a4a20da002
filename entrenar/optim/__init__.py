from entrenar.optim.adam import Adam, Adam8bit
from entrenar.optim.adamw import AdamW, AdamW8bit
from entrenar.optim.clip import clip_grad_norm
from entrenar.optim.exchange import to_bitsandbytes
from entrenar.optim.groups import parameter_groups
from entrenar.optim.lion import Lion, Lion8bit
from entrenar.optim.schedulers import ConstantScheduler, CosineScheduler, StepScheduler, WSDScheduler
from entrenar.optim.sgd import SGD, SGD8bit

__all__ = [
    "SGD",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "ConstantScheduler",
    "CosineScheduler",
    "Lion",
    "Lion8bit",
    "SGD8bit",
    "StepScheduler",
    "WSDScheduler",
    "clip_grad_norm",
    "parameter_groups",
    "to_bitsandbytes",
]
