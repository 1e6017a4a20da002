from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from entrenar.autograd import ops
from entrenar.autograd.tape import Tape
from entrenar.autograd.tensor import Tensor
from entrenar.lora import LoRALayer, wrap


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    wrap(model, rank=4, fuse=False)
    for layer in model.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


TOKENS = torch.arange(32).view(2, 16)


def gradients(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return found


def assert_walks_like_torch(compute, *leaves: torch.Tensor) -> Tape:
    """The gradients by the tape are, to the bit, those of torch's engine over the same recorded graph."""
    named = {str(i): leaf for i, leaf in enumerate(leaves)}
    with Tape() as tape:
        result = compute(*leaves)
    tape.backward(result)
    by_tape = gradients(named)
    result.backward(torch.ones_like(result))
    by_torch = gradients(named)
    assert by_tape.keys() == by_torch.keys()
    assert by_tape
    for name, gradient in by_tape.items():
        assert torch.equal(gradient, by_torch[name])
    return tape


def test_prints_as_the_chapter_does():
    x = Tensor.from_vec([2.0], True)
    with Tape() as tape:
        z = x * x + x
    assert str(tape) == "1. mul(v0: [1] f32, v0: [1] f32) -> v1\n2. add(v1: [1] f32, v0: [1] f32) -> v2"
    tape.backward(z)
    assert x.grad.tolist() == [5.0]


def test_modules_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    x = torch.randn(2, 4)
    with Tape() as tape:
        model(x).sum()
    assert [(entry.op, entry.module) for entry in tape.entries] == [
        ("linear", "0"),
        ("relu", "1.0"),
        ("layer_norm", "1.1"),
        ("sum", ""),
    ]
    assert all(entry.ours for entry in tape.entries)


def test_calls_that_ours_cannot_stand_for_are_torchs():
    x = torch.randn(3, 4, requires_grad=True)

    def compute(x):
        y = F.relu(x * 1, inplace=True)
        y = nn.Dropout(0.5, inplace=True)(y + 1)
        return F.embedding(torch.tensor([0, 1]), y, scale_grad_by_freq=True).sum()

    tape = assert_walks_like_torch(compute, x)
    assert {entry.op: entry.ours for entry in tape.entries} == {
        "mul": True,
        "relu": False,
        "add": True,
        "dropout": False,
        "tensor": False,
        "embedding": False,
        "sum": True,
    }


def test_operations_that_we_lack_are_torchs():
    tape = assert_walks_like_torch(lambda x: torch.cumsum(x, 0).sum(), torch.randn(3, requires_grad=True))
    assert [(entry.op, entry.ours) for entry in tape.entries] == [("cumsum", False), ("sum", True)]
    assert "torch cumsum(" in str(tape)


def test_our_operations_called_directly_are_recorded():
    x = torch.randn(3, 4, requires_grad=True)
    tape = assert_walks_like_torch(lambda x: ops.sum(ops.softmax(x, -1) * x), x)
    assert [(entry.op, entry.ours) for entry in tape.entries] == [("softmax", True), ("mul", True), ("sum", True)]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: (x * y + x).exp().sum() / y.norm(),
        lambda x, y: (x @ y.T).sum(),
        lambda x, y: torch.cat([x, y], 1)[:, ::2].square().mean() - F.mse_loss(x, y),
        lambda x, y: torch.stack(x.split(2, -1)).mul(y.view(2, 3, 2)).sum(),
        lambda x, y: torch.where(x > 0, x, y).logsumexp(-1),
        lambda x, y: F.layer_norm(x, (4,)) * F.gelu(y).softmax(-1),
        lambda x, y: 2 - 1 / (x * x + 1) ** 0.5 + 2**y,
    ],
)
def test_walks_like_torchs_engine(compute):
    assert_walks_like_torch(compute, torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True))


def test_in_place_changes():
    def compute(x):
        h = x * 2
        h[:, 0] = 0
        h.add_(1)
        v = h.view(-1)
        v.mul_(3)
        return (h * h).sum()

    tape = assert_walks_like_torch(compute, torch.randn(3, 4, requires_grad=True))
    assert [entry.op for entry in tape.entries] == ["mul", "setitem", "add_", "view", "mul_", "mul", "sum"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_segments(reentrant):
    x = torch.randn(3, 4, requires_grad=True)
    with Tape() as tape:
        y = checkpoint(lambda x: torch.tanh(x * x), x, use_reentrant=reentrant).sum()
    tape.backward(y)
    torch.testing.assert_close(x.grad, (1 - torch.tanh(x * x) ** 2).detach() * 2 * x.detach())


def test_a_custom_function_is_passed_by_torchs_engine():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * ctx.saved_tensors[0] * dy

    x = torch.tensor([3.0], requires_grad=True)
    with Tape() as tape:
        y = Square.apply(x + 1) * 2
    tape.backward(y)
    assert x.grad.tolist() == [16.0]


class SaveInput(torch.autograd.Function):
    """x itself, which is kept for no purpose; its gradient is doubled."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_a_custom_function_that_returns_its_input():
    x = torch.ones(2, requires_grad=True)
    with Tape() as tape:
        y = SaveInput.apply(x).exp()
    assert [(entry.op, entry.saved_bytes) for entry in tape.entries] == [("view_as", 0), ("exp", 8)]
    returned = tape.entries[0].outputs[0]
    assert str(tape.entries[1].inputs[0]) == str(returned)
    assert not returned.changed
    assert not tape.check_gradients().skipped
    tape.backward(y)
    assert torch.equal(x.grad, 2 * y)


def test_hooks_of_tensors_do_not_run():
    x = torch.ones(2, requires_grad=True)
    ran = []
    x.register_hook(ran.append)
    with Tape() as tape:
        y = x * 3
        y.register_hook(ran.append)
    tape.backward(y)
    assert x.grad.tolist() == [3.0, 3.0]
    assert not ran


def test_a_module_that_fails_is_left():
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 3)
    with Tape() as tape:
        with pytest.raises(RuntimeError, match="shape"):
            model(x)
        x.exp()
    assert [(entry.op, entry.module) for entry in tape.entries] == [("exp", "")]


def test_modules_that_are_made_on_the_way_are_named_after_their_class():
    class Outer(nn.Module):
        def forward(self, x):
            return nn.ReLU()(x) * 2

    x = torch.randn(2)
    with Tape() as tape:
        nn.Sequential(Outer())(x)
    assert [(entry.op, entry.module) for entry in tape.entries] == [("relu", "ReLU"), ("mul", "0")]


def test_real_model_equals_torchs_engine_and_the_plain_model():
    model = llama()
    parameters = dict(model.named_parameters())
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    plain = gradients(parameters)
    with Tape() as tape:
        recorded = model(TOKENS, labels=TOKENS).loss
    tape.backward(recorded)
    by_tape = gradients(parameters)
    recorded.backward()
    by_engine = gradients(parameters)
    torch.testing.assert_close(recorded, loss, rtol=1e-6, atol=0)
    assert by_tape.keys() == by_engine.keys() == plain.keys()
    for name, gradient in by_tape.items():
        # The order in which a shared value's gradients are added may differ from the engine's.
        torch.testing.assert_close(gradient, by_engine[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient, plain[name], rtol=1e-3, atol=1e-6)
    modules = {entry.module for entry in tape.entries if entry.op == "int4_lora_linear"}
    assert "model.layers.1.mlp.down_proj" in modules
    assert len(modules) == 14


def test_summary_counts_time_and_memory():
    x = torch.randn(100, 100, requires_grad=True)
    with Tape() as tape:
        y = torch.exp(x)
        (y * y).sum() + torch.exp(x).sum()
    table = {row.split()[0]: row.split()[1:] for row in tape.summary().splitlines()[1:]}
    assert table["exp"][0] == "2"
    # Each exp keeps its result of 40 kB; mul keeps y, which is kept already.
    assert table["exp"][2] == "0.08"
    assert table["mul"][2] == "0.00"
    assert table["all"][0] == str(len(tape)) == "6"


def test_parameters_do_not_count_as_saved():
    layer, x = nn.Linear(64, 64), torch.randn(2, 64, requires_grad=True)
    with Tape() as tape:
        layer(x)
    assert sum(entry.saved_bytes for entry in tape.entries) == 2 * 64 * 4


def test_check_gradients_finds_a_planted_error(monkeypatch):
    from entrenar.autograd.ops.activation import SiluFunction

    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    with Tape() as tape:
        model(x).sum()
    right = tape.check_gradients()
    assert not right.wrong
    assert not right.skipped
    assert "4 operations checked, 0 wrong" in str(right)

    backward = SiluFunction.backward
    monkeypatch.setattr(SiluFunction, "backward", staticmethod(lambda ctx, dy: 1.001 * backward(ctx, dy)))
    wrong = tape.check_gradients()
    assert [check.entry.op for check in wrong.wrong] == ["silu"]
    assert wrong.worst.entry.module == "1"
    assert "WRONG: 2. silu" in str(wrong)


def test_check_gradients_of_a_real_model():
    model = llama()
    with Tape() as tape:
        model(TOKENS, labels=TOKENS)
    found = tape.check_gradients()
    assert not found.wrong, str(found)
    assert {check.dtype for check in found.checks if check.entry.op == "int4_lora_linear"} == {torch.float32}
    assert {check.dtype for check in found.checks if check.entry.op == "silu"} == {torch.float64}
    assert not [check for check in found.skipped if check.entry.ours]


def test_first_nonfinite_in_the_forward():
    x = torch.ones(2, 4)
    with Tape() as tape:
        torch.log(x - 1).sum()
    assert tape.first_nonfinite() == "infinity in v2, the result of 2. log(v1: [2, 4] f32) -> v2"
    with Tape() as tape:
        torch.sqrt(x - 2).sum()
    assert tape.first_nonfinite() == "NaN in v2, the result of 2. sqrt(v1: [2, 4] f32) -> v2"


def test_first_nonfinite_names_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 1] = 3e38
    with Tape() as tape:
        model(torch.full((2, 4), 1e3)).sum()
    assert "infinity in" in tape.first_nonfinite()
    assert tape.first_nonfinite().endswith("[1]")


def test_first_nonfinite_in_the_backward():
    x = torch.zeros(3, requires_grad=True)
    with Tape() as tape:
        y = torch.sqrt(x * 1).sum()
    assert tape.first_nonfinite() is None
    tape.backward(y)
    assert tape.first_nonfinite().startswith("infinity in the gradient that comes out of 2. sqrt(")


def test_a_mask_of_infinities_is_not_reported():
    with Tape() as tape:
        scores = torch.zeros(2, 2).masked_fill(torch.tensor([[False, True], [False, False]]), -math.inf)
        (scores + torch.full((2, 2), -math.inf).triu(1)).softmax(-1).sum()
    assert tape.first_nonfinite() is None


def test_recording_changes_nothing():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(5, 4)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with Tape():
        recorded = model(x)
    torch.testing.assert_close(recorded, plain)


def test_nested_tapes_record_both():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    with Tape() as outer:
        x.exp()
        with Tape() as inner:
            layer(x)
    assert [entry.op for entry in outer.entries] == ["exp", "linear"]
    assert [entry.op for entry in inner.entries] == ["linear"]


def compute_and_fail(tape: Tape, layer: nn.Module, x: torch.Tensor) -> None:
    with tape:
        layer(x)
        layer(x[:, :3])


def test_an_exception_leaves_what_came_before_it():
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    tape = Tape()
    with pytest.raises(RuntimeError, match="shape"):
        compute_and_fail(tape, layer, x)
    assert [entry.op for entry in tape.entries] == ["linear", "getitem"]
    layer(x)
    assert len(tape) == 2
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_what_requires_no_gradient_is_refused():
    with Tape() as tape:
        y = torch.ones(2).exp()
    with pytest.raises(RuntimeError, match=r"^this tensor depends on nothing that requires a gradient"):
        tape.backward(y)
