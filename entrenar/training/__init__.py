"""Fine-tuning: data, loss, the training loop, its files, and generation."""

from __future__ import annotations

from entrenar.training.batches import IGNORED, Example, collate, epoch_batches, pack, split_heldout
from entrenar.training.config import FinetuneConfig
from entrenar.training.data import DataError, Record, read_records
from entrenar.training.encode import Encoded, encode
from entrenar.training.generate import generate
from entrenar.training.interrupt import Interrupted
from entrenar.training.loop import TrainingError, finetune
from entrenar.training.loss import causal_lm_loss
from entrenar.training.packing import packs
from entrenar.training.resume import ResumeError
from entrenar.training.watcher import Watcher

__all__ = [
    "IGNORED",
    "DataError",
    "Encoded",
    "Example",
    "FinetuneConfig",
    "Interrupted",
    "Record",
    "ResumeError",
    "TrainingError",
    "Watcher",
    "causal_lm_loss",
    "collate",
    "encode",
    "epoch_batches",
    "finetune",
    "generate",
    "pack",
    "packs",
    "read_records",
    "split_heldout",
]
