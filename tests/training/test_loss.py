from __future__ import annotations

import pytest
import torch
from tiny import make_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config

from entrenar.training.batches import IGNORED
from entrenar.training.loss import CHUNK_ROWS, _ChunkedCrossEntropy, causal_lm_loss


def batch(rows: int = 3, tokens: int = 11, vocab: int = 320, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, vocab, (rows, tokens), generator=generator)
    ignored = torch.rand(rows, tokens, generator=generator) < 0.5
    return input_ids, input_ids.masked_fill(ignored, IGNORED)


def make_gemma() -> nn.Module:
    """An architecture that caps its logits behind the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        attn_implementation="eager",
    )
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize("make", [make_model, lambda: make_model(tied=True), make_gemma])
def test_loss_and_gradients_are_those_of_transformers(make: object) -> None:
    model = make().double()  # type: ignore[operator]
    input_ids, labels = batch()
    output = model(input_ids=input_ids, labels=labels)
    # transformers computes its loss in float32 whatever the model's dtype, so its logits make the tight comparison.
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    loss = causal_lm_loss(model, input_ids, labels)
    found = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.float(), output.loss.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss, expected)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_without_labels_every_token_is_one() -> None:
    model = make_model()
    input_ids, _ = batch()
    torch.testing.assert_close(causal_lm_loss(model, input_ids), model(input_ids=input_ids, labels=input_ids).loss)


def test_the_loss_of_a_bfloat16_model_is_computed_in_float32() -> None:
    model = make_model(dtype=torch.bfloat16)
    input_ids, labels = batch()
    loss = causal_lm_loss(model, input_ids, labels)
    assert loss.dtype == torch.float32
    logits = model(input_ids=input_ids).logits[:, :-1].float()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    # The head sees other rows together, so a bfloat16 logit may differ in its last bit (2^-8 of it, at most about 1).
    torch.testing.assert_close(loss, expected, rtol=0, atol=2**-8)


def test_the_head_sees_only_positions_that_predict_a_label() -> None:
    model = make_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    input_ids, labels = batch()
    causal_lm_loss(model, input_ids, labels)
    assert seen == [(1, int((labels[:, 1:] != IGNORED).sum()), 320)]


def test_the_model_is_left_without_hooks_even_after_an_error() -> None:
    model = make_model()
    input_ids, labels = batch()
    causal_lm_loss(model, input_ids, labels)
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(IndexError):
        causal_lm_loss(model, input_ids + 10_000, labels)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 3])
def test_chunks_of_rows_change_nothing(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(rows, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 7, (rows,), generator=generator)
    loss = _ChunkedCrossEntropy.apply(logits, targets)
    expected = nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(loss, expected)
    # The factor checks that the gradient of what follows is passed on.
    (gradient,) = torch.autograd.grad(3 * loss, logits)
    (wanted,) = torch.autograd.grad(3 * expected, logits)
    torch.testing.assert_close(gradient, wanted)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: _ChunkedCrossEntropy.apply(x, torch.tensor([0, 4, 2])), [logits])


def test_bad_input_is_named() -> None:
    model = make_model()
    input_ids, _ = batch()
    only_first = torch.full_like(input_ids, IGNORED)
    only_first[:, 0] = input_ids[:, 0]
    with pytest.raises(ValueError, match="no position predicts a label"):
        causal_lm_loss(model, input_ids, only_first)
    with pytest.raises(ValueError, match=r"\[3, 11\] and \[3, 10\]"):
        causal_lm_loss(model, input_ids, input_ids[:, 1:])
    with pytest.raises(TypeError, match="Linear has no output head"):
        causal_lm_loss(nn.Linear(2, 2), input_ids)
