"""Examples behind each other in one row: the loss, the gradients and the run are those of padded rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_tiny import records
from tiny import add_adapters, make_model, make_tokenizer
from torch import nn

from entrenar.fusion import FusedAttention
from entrenar.lora.layers import LoRALayer
from entrenar.lora.wrap import wrap
from entrenar.training.batches import IGNORED, Example, collate, pack
from entrenar.training.config import FinetuneConfig
from entrenar.training.encode import encode
from entrenar.training.loop import finetune
from entrenar.training.loss import causal_lm_loss
from entrenar.training.packing import packs
from entrenar.training.watcher import Nobody

# One token alone has nothing to predict; two at an end and in a row; rows of one length, which padding leaves as they
# are; rows longer than the attention's blocks.
LENGTHS = {
    "varied": [5, 17, 2, 30, 9],
    "single tokens": [1, 6, 1, 1, 11, 1],
    "full rows": [16, 16, 16],
    "one": [12],
    "long": [150, 64, 3, 129],
}


def examples(lengths: Sequence[int], seed: int = 0) -> list[Example]:
    """Random ones; a fifth of the labels carries no loss, but of an example's last token."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(320, (length,), generator=generator)
        ignored = torch.rand(length, generator=generator) < 0.2
        ignored[-1] = False
        made.append(Example(ids, ids.masked_fill(ignored, IGNORED)))
    return made


def adapted(fuse: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The tiny model with adapters whose B is not zero, so that A has gradients."""
    model = make_model(dtype=dtype)
    wrap(model, rank=4, alpha=8, fuse=fuse)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model.train()


def loss_and_gradients(model: nn.Module, *batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss = causal_lm_loss(model, *batch)
    return loss.detach(), list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@given(st.lists(st.integers(1, 70), min_size=1, max_size=40), st.integers(0, 9))
def test_packing_loses_nothing_and_keeps_the_order(lengths: list[int], seed: int) -> None:
    batch = examples(lengths, seed)
    input_ids, labels, offsets = pack(batch)
    assert offsets.dtype == torch.int64
    assert input_ids.shape == labels.shape == (1, sum(lengths))
    assert offsets.diff().tolist() == lengths
    for packed, example in zip(range(len(batch)), batch, strict=True):
        begin, end = offsets[packed : packed + 2].tolist()
        assert torch.equal(input_ids[0, begin:end], example.input_ids)
        assert torch.equal(labels[0, begin:end], example.labels)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_loss_and_gradients_are_those_of_padded_rows(lengths: list[int], fuse: bool) -> None:
    model, batch = adapted(fuse), examples(lengths)
    loss, gradients = loss_and_gradients(model, *pack(batch))
    wanted_loss, wanted = loss_and_gradients(model, *collate(batch))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    for found, gradient in zip(gradients, wanted, strict=True):
        # Sums of as many float32 numbers as there are tokens, in another order.
        assert (found - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_in_bfloat16_point_where_those_of_padded_rows_do(fuse: bool) -> None:
    model, batch = adapted(fuse, torch.bfloat16), examples(LENGTHS["varied"])
    _, gradients = loss_and_gradients(model, *pack(batch))
    _, wanted = loss_and_gradients(model, *collate(batch))
    for found, gradient in zip(gradients, wanted, strict=True):
        assert torch.cosine_similarity(found.flatten(), gradient.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_can_be_recomputed(fuse: bool, reentrant: bool) -> None:
    model, batch = adapted(fuse), pack(examples(LENGTHS["varied"]))
    _, wanted = loss_and_gradients(model, *batch)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    causal_lm_loss(model, *batch).backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.requires_grad], wanted)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_model_that_changes_its_logits_keeps_examples_apart(fuse: bool) -> None:
    model, batch = adapted(fuse), examples(LENGTHS["varied"])
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        output.logits = torch.tanh(output.logits)
        return output

    model.forward = forward
    loss, gradients = loss_and_gradients(model, *pack(batch))
    wanted_loss, wanted = loss_and_gradients(model, *collate(batch))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def test_without_labels_every_token_but_the_first_ones_is_one() -> None:
    model, batch = adapted(fuse=True), examples(LENGTHS["single tokens"])
    input_ids, _, offsets = pack(batch)
    rows = [example.input_ids.unsqueeze(0) for example in batch if len(example.input_ids) > 1]
    counts = [row.shape[1] - 1 for row in rows]
    losses = [causal_lm_loss(model, row).item() * count for row, count in zip(rows, counts, strict=True)]
    assert causal_lm_loss(model, input_ids, None, offsets).item() == pytest.approx(sum(losses) / sum(counts), rel=1e-6)


def test_single_tokens_alone_predict_nothing() -> None:
    with pytest.raises(ValueError, match="no position predicts a label"):
        causal_lm_loss(adapted(fuse=True), *pack(examples([1, 1, 1])))


@pytest.mark.parametrize("offsets", [[], [0], [0, 5], [1, 6], [0, 4, 3, 6], [0, 7]])
def test_offsets_that_do_not_fit_are_named(offsets: list[int]) -> None:
    input_ids = torch.arange(6).unsqueeze(0)
    with pytest.raises(ValueError, match=r"offsets must go up from 0 .* for input_ids \[1, 6\]"):
        causal_lm_loss(adapted(fuse=True), input_ids, None, torch.tensor(offsets, dtype=torch.int64, device="cpu"))


def test_rows_of_a_batch_are_not_packed_again() -> None:
    input_ids, offsets = torch.arange(6).view(2, 3), torch.tensor([0, 3], device="cpu")
    with pytest.raises(ValueError, match=r"a batch of one row, .* for input_ids \[2, 3\]"):
        causal_lm_loss(adapted(fuse=True), input_ids, None, offsets)


def test_a_fused_model_packs_in_either_mode_and_is_left_in_it() -> None:
    model = adapted(fuse=True)
    before = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        assert packs(model, 1000)
        assert all(module.training is training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def with_dropout(model: nn.Module) -> None:
    model.model.layers[1].self_attn.attention_dropout = 0.1


def with_a_window(model: nn.Module) -> None:
    model.model.layers[1].self_attn.window = 99


def with_a_layer_of_its_own(model: nn.Module) -> None:
    model.model.layers[1].self_attn = make_model().model.layers[1].self_attn


def without_offsets(model: nn.Module) -> None:
    """As a model whose layers are not handed what it does not know, and that makes its masks itself."""
    plain = model.model.forward

    def forward(cu_seq_lens_q: Any = None, position_ids: Any = None, **inputs: Any) -> Any:
        return plain(**inputs)

    model.model.forward = forward


def with_a_state(model: nn.Module) -> None:
    """As a model some of whose layers mix tokens otherwise than by attention."""
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, y: y.cumsum(-2))


@pytest.mark.parametrize(
    "change", [with_dropout, with_a_window, with_a_layer_of_its_own, without_offsets, with_a_state]
)
def test_other_models_do_not_pack(change: Any) -> None:
    model = adapted(fuse=True)
    change(model)
    assert not packs(model, 100)


def test_models_without_attention_that_is_known_do_not_pack() -> None:
    assert not packs(adapted(fuse=False), 10)
    assert not packs(nn.Linear(2, 2), 10)


def test_a_window_that_holds_the_longest_example_does_not_matter() -> None:
    model = adapted(fuse=True)
    for module in model.modules():
        if isinstance(module, FusedAttention):
            module.window = 30
    batch = examples(LENGTHS["varied"])
    assert packs(model, 30)
    loss, _ = loss_and_gradients(model, *pack(batch))
    torch.testing.assert_close(loss, loss_and_gradients(adapted(fuse=True), *collate(batch))[0], rtol=1e-6, atol=0)


TOKENIZER = make_tokenizer()
TRAIN = encode(records(12), TOKENIZER).examples
HELDOUT = encode(records(4, first=100), TOKENIZER).examples


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The shapes of the batches that the loop trains on."""
    seen = []

    def recorded(model: nn.Module, input_ids: torch.Tensor, *labels_and_offsets: Any) -> torch.Tensor:
        seen.append([*input_ids.shape])
        return causal_lm_loss(model, input_ids, *labels_and_offsets)

    monkeypatch.setattr("entrenar.training.loop.causal_lm_loss", recorded)
    return seen


def run(out: Path, fuse: bool = True, batch_size: int = 5) -> nn.Module:
    model = make_model()
    wrap(model, rank=4, alpha=8, fuse=fuse)
    config = FinetuneConfig(epochs=2, batch_size=batch_size, lr=1e-2)
    finetune(model, TOKENIZER, TRAIN, HELDOUT, config, out, watcher=Nobody())
    return model


def test_a_run_of_a_fused_model_computes_no_padding(tmp_path: Path, shapes: list[list[int]]) -> None:
    run(tmp_path)
    assert all(rows == 1 for rows, _ in shapes)
    assert sum(tokens for _, tokens in shapes) == 2 * sum(len(example.input_ids) for example in TRAIN)


def test_a_run_of_another_model_is_padded(tmp_path: Path, shapes: list[list[int]]) -> None:
    run(tmp_path, fuse=False)
    assert [rows for rows, _ in shapes] != [1] * len(shapes)


def test_a_packed_run_trains_the_adapter_of_a_padded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all examples in a batch, in whatever order."""
    packed = run(tmp_path / "packed", batch_size=len(TRAIN))
    monkeypatch.setattr("entrenar.training.loop.packs", lambda model, longest: False)
    padded = run(tmp_path / "padded", batch_size=len(TRAIN))
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(parameter, padded.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_a_run_in_four_bits_packs() -> None:
    assert packs(add_adapters(make_model(dtype=torch.bfloat16), bits=4), 100)
