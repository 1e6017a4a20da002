from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model

from entrenar.training.batches import IGNORED, Example, collate, epoch_batches, split_heldout
from entrenar.training.config import FinetuneConfig
from entrenar.training.plan import Plan

lengths_lists = st.lists(st.integers(2, 500), min_size=1, max_size=300)


def example(length: int, start: int = 3) -> Example:
    ids = torch.arange(start, start + length) % 320
    return Example(ids, ids.clone())


@given(lengths_lists, st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.booleans())
def test_an_epoch_takes_each_example_once(
    lengths: list[int], batch_size: int, seed: int, epoch: int, packed: bool
) -> None:
    batches = epoch_batches(lengths, batch_size, seed, epoch, packed)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch, packed)


@pytest.mark.parametrize("packed", [False, True])
def test_epochs_and_seeds_differ_in_order(packed: bool) -> None:
    lengths = list(range(2, 102))
    orders = [epoch_batches(lengths, 4, seed, epoch, packed) for seed in (0, 1) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_grouping_by_length_saves_padding() -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    lengths = torch.randint(10, 400, (1000,), generator=generator).tolist()
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in epoch_batches(lengths, 8, 0, 0))
    unsorted = sum(max(lengths[i : i + 8]) * 8 for i in range(0, 1000, 8))
    assert padded < 1.15 * sum(lengths) < 1.5 * sum(lengths) < unsorted


def test_packed_batches_are_of_about_as_many_tokens() -> None:
    """The longest examples do not meet in one batch, whose memory would be the run's."""
    lengths = list(range(8, 1032))
    most = []
    for packed in (False, True):
        tokens = [sum(lengths[i] for i in batch) for batch in epoch_batches(lengths, 8, 0, 0, packed)]
        most.append(max(tokens) / (sum(tokens) / len(tokens)))
    # The mean of 8 lengths that are spread evenly deviates by 0.58 / sqrt(8) of itself; not one of 128 by thrice that.
    assert most[1] < 1 + 3 * 0.58 / 8**0.5 < 1.9 < most[0]


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_the_plan_covers_every_epoch(count: int, batch_size: int, accumulation: int, epochs: int, packed: bool) -> None:
    config = FinetuneConfig(epochs=epochs, batch_size=batch_size, accumulation=accumulation)
    plan = Plan([example(4)] * count, config, packed)
    for epoch in range(epochs):
        steps = range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1)
        taken = [index for step in steps for batch in plan.batches(step) for index in batch]
        assert sorted(taken) == list(range(count))
    assert plan.total_steps == epochs * plan.steps_per_epoch


@given(st.integers(1, 200))
def test_milestones_are_the_ends_of_the_quarters(steps: int) -> None:
    plan = Plan([example(4)], FinetuneConfig(max_steps=steps), packed=False)
    milestones = [step for step in range(1, steps + 1) if plan.is_milestone(step)]
    assert milestones == sorted({math.ceil(steps * quarter / 4) for quarter in (1, 2, 3, 4)})


def test_padding_stands_on_the_right_and_carries_no_label() -> None:
    input_ids, labels = collate([example(3), example(5)], pad_id=9)
    assert input_ids.tolist() == [[3, 4, 5, 9, 9], [3, 4, 5, 6, 7]]
    assert labels.tolist() == [[3, 4, 5, IGNORED, IGNORED], [3, 4, 5, 6, 7]]


def test_nothing_leaks_between_the_examples_of_a_batch() -> None:
    model = make_model().double()
    alone, other = example(5), example(12, start=40)
    with torch.no_grad():
        together = model(collate([alone, other])[0]).logits[0, :5]
        by_itself = model(alone.input_ids.unsqueeze(0)).logits[0]
    # Only the order of sums may differ between the two shapes, in float64.
    torch.testing.assert_close(together, by_itself, rtol=0, atol=1e-12)


def test_held_out_examples_are_chosen_by_the_seed() -> None:
    examples = [example(4, start) for start in range(50)]
    train, held = split_heldout(examples, 0.1, seed=3)
    assert (len(train), len(held)) == (45, 5)
    starts = [int(e.input_ids[0]) for e in train + held]
    assert sorted(starts) == list(range(50))
    again = split_heldout(examples, 0.1, seed=3)
    assert [id(e) for e in again[1]] == [id(e) for e in held]
    assert [id(e) for e in split_heldout(examples, 0.1, seed=4)[1]] != [id(e) for e in held]


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (5, 0.0), (5, 1.0)])
def test_an_impossible_split_is_an_error(count: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="held-out"):
        split_heldout([example(4)] * count, fraction, seed=0)


@pytest.mark.parametrize(
    "settings", [{"epochs": 0}, {"batch_size": 0}, {"max_steps": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"warmup": 1.0}]
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, float]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        FinetuneConfig(**settings)
