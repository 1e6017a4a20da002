"""Examples as token ids, and the batches that they form."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that carries no loss (the field's usual value)."""


class Example(NamedTuple):
    """One row of training data: `input_ids` and `labels`, both int64 [T]; a label is its token's id or `IGNORED`.

    `question` is what a conversation's first answer answers, for people to read.
    """

    input_ids: Tensor
    labels: Tensor
    question: str = ""

    @property
    def targets(self) -> int:
        """How many tokens carry loss (the first never does: nothing predicts it)."""
        return int((self.labels[1:] != IGNORED).sum())


def collate(examples: Sequence[Example], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Stack examples as `(input_ids, labels)`, int64 [B, T], padded on the right up to the longest.

    A causal model needs no attention mask for this: a token sees only what is left of it in its own row, where no
    padding stands, and the padding's own outputs carry no label.
    """
    input_ids = torch.nn.utils.rnn.pad_sequence([e.input_ids for e in examples], batch_first=True, padding_value=pad_id)
    labels = torch.nn.utils.rnn.pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORED)
    return input_ids, labels


def pack(examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay examples behind each other as `(input_ids, labels, offsets)`: int64 [1, N] twice, and int64 [n + 1].

    Example i has the tokens from offsets[i] up to offsets[i + 1]. The tensors are those that `causal_lm_loss` takes.
    """
    input_ids = torch.cat([e.input_ids for e in examples]).unsqueeze(0)
    labels = torch.cat([e.labels for e in examples]).unsqueeze(0)
    lengths = [len(e.input_ids) for e in examples]
    return input_ids, labels, torch.tensor([0, *itertools.accumulate(lengths)], device="cpu")


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, packed: bool = False
) -> list[list[int]]:
    """Return one epoch's batches as lists of indices into `lengths`, each index once.

    Examples are shuffled. Unless they are packed, they are then sorted by length within pools of 32 batches, so that a
    batch pads little, and the batches shuffled again. The order depends on the arguments alone: resuming needs no more
    than the number of the step.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    if not packed:
        pool = 32 * batch_size
        order = [
            index
            for start in range(0, len(order), pool)
            for index in sorted(order[start : start + pool], key=lengths.__getitem__)
        ]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def split_heldout(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into `(train, heldout)`, holding out `fraction` of the examples (at least one), chosen by `seed`."""
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
    if len(examples) < 2:
        raise ValueError(
            "one example cannot be split into training and held-out data; add more or give a held-out file"
        )
    count = min(max(1, round(fraction * len(examples))), len(examples) - 1)
    held = set(random.Random(seed).sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in held]
    return train, [examples[index] for index in sorted(held)]
