from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import add_adapters, make_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, masking_utils

import entrenar.fusion.attention as fused_attention
from entrenar.fusion import FusedAttention
from entrenar.lora.layers import Int4Linear, LoRALayer, QLoRALayer
from entrenar.training.batches import IGNORED
from entrenar.training.loss import causal_lm_loss


def batch(rows: int = 3, tokens: int = 11, vocab: int = 320, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
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


def test_fused_attention_needs_no_mask_where_transformers_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_adapters(make_model(), bits=4)
    input_ids, labels = batch()
    expected = causal_lm_loss(model, input_ids, labels)
    # As while a CUDA graph is captured, when it cannot look at the positions.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    given = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for module in model.modules()
        if isinstance(module, FusedAttention)
    ]
    attend = fused_attention.attention

    def attend_without_mask(q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert mask is None
        return attend(q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(fused_attention, "attention", attend_without_mask)
    assert torch.equal(causal_lm_loss(model, input_ids, labels), expected)
    assert len(given) == len(hooks) > 0
    assert all(mask is not None for mask in given)


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


def test_the_model_is_left_without_hooks_even_after_an_error() -> None:
    model = make_model()
    input_ids, labels = batch()
    causal_lm_loss(model, input_ids, labels)
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks
    with pytest.raises(IndexError):
        causal_lm_loss(model, input_ids + 10_000, labels)
    assert not model.lm_head._forward_pre_hooks


# Logits scaled (Granite, Cohere), capped (Gemma) or cut off, masked in place (Chameleon): what models do to them.
CHANGES = {
    "scaled": lambda logits: logits / 8,
    "capped": lambda logits: 0.5 * torch.tanh(logits / 0.5),
    "cut off": lambda logits: logits.clamp(-30, 30),
    "masked": lambda logits: logits.index_fill_(-1, torch.tensor([7]), -1e9),
    "moved": lambda logits: logits.roll(1, -1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero head"])
def test_what_a_model_does_to_its_logits_holds(change: Any, zero: bool) -> None:
    model = make_model()
    model.lm_head.weight.data *= not zero
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward
    input_ids, labels = batch()
    logits = model(input_ids=input_ids).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for _ in range(2):
        loss = causal_lm_loss(model, input_ids, labels)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


def test_logits_that_are_only_cast_are_never_whole() -> None:
    model = make_model(dtype=torch.bfloat16)
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = forward
    shapes = shapes_at_the_head(model)
    causal_lm_loss(model, *batch())
    assert shapes == [(1, 0, 320), (1, 17, 320)]


def shapes_at_the_head(model: nn.Module) -> list[Any]:
    shapes: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    return shapes


def test_the_head_sees_no_row_and_then_the_positions_that_predict_a_label() -> None:
    input_ids, labels = batch()
    rows = int((labels[:, 1:] != IGNORED).sum())
    model = make_model()
    shapes = shapes_at_the_head(model)
    causal_lm_loss(model, input_ids, labels)
    assert shapes == [(1, 0, 320), (1, rows, 320)]
    model = make_gemma()
    shapes = shapes_at_the_head(model)
    for _ in range(2):
        causal_lm_loss(model, input_ids, labels)
    # The first call finds out that the model caps its logits; later ones know.
    assert shapes == [(1, 0, 320), (1, rows, 320), (1, rows, 320)]


def test_a_model_that_begins_to_change_its_logits_is_noticed() -> None:
    model, (input_ids, labels) = make_model(), batch()
    before = causal_lm_loss(model, input_ids, labels)
    plain = model.forward

    def forward(**kwargs: Any) -> Any:
        output = plain(**kwargs)
        output.logits = output.logits / 8
        return output

    model.forward = forward
    loss = causal_lm_loss(model, input_ids, labels)
    logits = model(input_ids=input_ids).logits[:, :-1]
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))
    assert loss != before


def test_finding_out_that_logits_are_capped_draws_no_random_numbers() -> None:
    model, (input_ids, labels) = make_gemma(), batch()
    model.model.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        causal_lm_loss(model, input_ids, labels)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def adapted(head: Callable[[nn.Linear], nn.Module], **settings: Any) -> nn.Module:
    """A model with LoRA on everything, its head made of the plain one."""
    model = add_adapters(make_model(**settings))
    model.lm_head = head(model.lm_head)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.05)
    return model


def trainable(head: nn.Linear) -> nn.Module:
    return head.requires_grad_()


HEADS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "frozen": lambda head: head,
    "trainable": trainable,
    "int4": lambda head: Int4Linear.from_weight(head.weight),
    "LoRA": lambda head: LoRALayer(head, rank=4, alpha=8),
    "LoRA on int4": lambda head: QLoRALayer(head, rank=4, alpha=8),
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def plain_loss(model: nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=input_ids).logits[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[:, 1:].flatten()
    )


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_any_head_trains_as_with_whole_logits(head: Any, tied: bool) -> None:
    model, (input_ids, labels) = adapted(head, tied=tied), batch()
    expected = plain_loss(model, input_ids, labels)
    wanted = torch.autograd.grad(expected, trained(model))
    loss = causal_lm_loss(model, input_ids, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, trained(model)), wanted)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_in_bfloat16_the_loss_is_as_close_as_with_whole_logits(head: Any, autocast: bool) -> None:
    model, (input_ids, labels) = adapted(head), batch()
    wanted = torch.autograd.grad(plain_loss(model, input_ids, labels), trained(model))
    if not autocast:
        model = model.bfloat16()
    distances = []
    for f in (plain_loss, causal_lm_loss):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=autocast):
            loss = f(model, input_ids, labels)
        assert loss.dtype == torch.float32
        gradients = torch.autograd.grad(loss, trained(model))
        errors = [(a.float() - b).square().sum() for a, b in zip(gradients, wanted, strict=True)]
        distances.append(torch.stack(errors).sum().sqrt().item())
    plain, fused = distances
    # Both round at every layer; what the head adds is one rounding of the logits and one of their gradient, as plain.
    assert fused <= 1.25 * plain


def test_gradients_of_parts_of_a_batch_add_up() -> None:
    model, (input_ids, labels) = adapted(HEADS["LoRA"]), batch(rows=4)
    counts = [int((labels[i : i + 2, 1:] != IGNORED).sum()) for i in (0, 2)]
    wanted = torch.autograd.grad(causal_lm_loss(model, input_ids, labels), trained(model))
    for i, count in zip((0, 2), counts, strict=True):
        (causal_lm_loss(model, input_ids[i : i + 2], labels[i : i + 2]) * (count / sum(counts))).backward()
    torch.testing.assert_close([parameter.grad for parameter in trained(model)], list(wanted))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, (input_ids, labels) = adapted(HEADS["LoRA"]), batch()
    model.train()
    wanted = torch.autograd.grad(causal_lm_loss(model, input_ids, labels), trained(model))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    causal_lm_loss(model, input_ids, labels).backward()
    torch.testing.assert_close([parameter.grad for parameter in trained(model)], list(wanted))


def test_without_gradients_the_loss_is_the_same() -> None:
    model, (input_ids, labels) = make_model(), batch()
    loss = causal_lm_loss(model, input_ids, labels)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            alone = causal_lm_loss(model, input_ids, labels)
        assert not alone.requires_grad
        assert torch.equal(alone, loss)


def test_a_head_that_runs_twice_is_refused() -> None:
    model, (input_ids, labels) = make_model(), batch()
    plain = model.forward
    model.forward = lambda **kwargs: (plain(**kwargs), plain(**kwargs))[0]
    with pytest.raises(TypeError, match="called its output head 2 times in one forward"):
        causal_lm_loss(model, input_ids, labels)


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
