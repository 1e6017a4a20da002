"""What the benchmarks hold times against: the least that a machine can take for the bytes and the operations."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import attention, int4_linear, models, ops, optimizers
from benchmarks.harness import Floor, Work
from entrenar.autograd.ops import int4_quantize

MACHINE = Floor(
    read_gb_per_second=10, moved_gb_per_second=16, float32_gflop_per_second=100, bfloat16_gflop_per_second=1000
)


@pytest.mark.parametrize(
    ("work", "milliseconds"),
    [
        (Work(read=10e6, written=0), 1),
        (Work(read=10e6, written=6e6), 1),
        (Work(read=12e6, written=13.6e6), 1.6),
        (Work(read=0, written=16e6), 1),
        (Work(read=10e6, written=0, operations=1e8), 1),
        (Work(read=10e6, written=0, operations=3e8), 3),
        (Work(read=10e6, written=0, operations=3e8, dtype="bfloat16"), 1),
    ],
)
def test_the_floor_is_the_longest_of_its_bounds(work, milliseconds):
    assert MACHINE.milliseconds(work) == pytest.approx(milliseconds)
    assert MACHINE.columns(work, [9.0, 4e-3, 1e-3]) == {
        "floor_ms": pytest.approx(milliseconds),
        "of_floor": pytest.approx(milliseconds / 4),
    }


def operations(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_work_of_linear_layers(rank, backward):
    m, columns, sizes = 5, 100, (70, 30)
    x = torch.randn(m, columns, dtype=torch.bfloat16, requires_grad=True)
    weights = [torch.randn(n, columns) for n in sizes]
    adapters = [p for n in sizes if rank for p in (torch.randn(rank, columns), torch.randn(n, rank))]
    pairs = [[p.bfloat16().requires_grad_() for p in adapters[i : i + 2]] for i in range(0, len(adapters), 2)]

    def plain() -> list[torch.Tensor]:
        ys = [x @ weight.bfloat16().T for weight in weights]
        for i, (a, b) in enumerate(pairs):
            ys[i] = ys[i] + (x @ a.T) @ b.T
        if backward:
            torch.autograd.backward(ys, [torch.ones_like(y) for y in ys])
        return ys

    quantized = sum(tensor.nbytes for weight in weights for tensor in int4_quantize(weight))
    outputs = sum(y.nbytes for y in plain())
    parameters = sum(p.nbytes for p in adapters)
    work = int4_linear.work(m, columns, sizes, torch.bfloat16, rank=rank, backward=backward)
    assert work == Work(
        read=quantized + parameters + x.nbytes + backward * outputs,
        written=outputs + backward * (x.nbytes + parameters),
        operations=operations(plain),
        dtype="bfloat16",
    )


@pytest.mark.parametrize("window", [1, 4, 6])
def test_work_of_attention(window, monkeypatch):
    monkeypatch.setattr(attention, "HEADS", 4)
    monkeypatch.setattr(attention, "KV_HEADS", 2)
    monkeypatch.setattr(attention, "HEAD", 8)
    batch, tokens = 2, 6
    q = torch.randn(batch, 4, tokens, 8)
    k = torch.randn(batch, 2, tokens, 8)
    products = operations(lambda: q @ q.mT @ q)
    seen = torch.ones(tokens, tokens).tril().triu(1 - window).mean().item()
    forward = attention.work(batch, tokens, window, torch.float32, backward=False)
    assert forward == Work(q.nbytes + 2 * k.nbytes, q.nbytes, pytest.approx(products * seen), "float32")
    backward = attention.work(batch, tokens, window, torch.float32, backward=True)
    assert backward == Work(
        2 * (q.nbytes + k.nbytes), q.nbytes + 2 * k.nbytes, pytest.approx(2 * products * seen), "float32"
    )


def test_work_of_operations():
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    assert ops.work("add", (x, y), torch.randn(3, 5)) == Work(3 * x.nbytes, 3 * x.nbytes, 0, "float32")
    assert ops.work("two outputs", (x,), (y, y)) == Work(3 * x.nbytes, 3 * x.nbytes, 0, "float32")


@pytest.mark.parametrize("name", ["linear", "matmul", "linear_cross_entropy, frozen weight"])
def test_operations_of_products(name):
    _, theirs, arguments = ops.pairs(torch.bfloat16)[name]
    leaves = [x.requires_grad_() for x in arguments]
    assert ops.OPERATIONS[name] == operations(lambda: theirs(*leaves).sum().backward())


def test_bytes_of_steps():
    assert optimizers.work(10, 8, clipped=False) == Work(read=160, written=120)
    assert optimizers.work(10, 8, clipped=True) == Work(read=200, written=120)
    made = optimizers.contenders([(64, 256)])
    expected = {
        "AdamW": 28,
        "AdamW, clipped": 32,
        "AdamW8bit": 16 + 16 / 256,
        "Lion8bit": 14 + 8 / 256,
        "SGD, momentum": 20,
    }
    for name, moved in expected.items():
        ours, optimizer, step = made[name]
        step()
        work = optimizers.work(64 * 256, optimizers.state_bytes(optimizer), clipped="clipped" in ours)
        counter = 8 / (64 * 256)  # of steps, one float32 for the tensor, read and written
        assert (work.read + work.written) / (64 * 256) == pytest.approx(moved + counter)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_operations_of_a_training_step(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    batch, length, rank = 3, 7, 4
    # PEFT's adapters are plain torch, which the counter sees.
    model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.enable_input_require_grads()
    ids = torch.randint(50, (batch, length))
    counted = operations(lambda: model(input_ids=ids, labels=ids).loss.backward())
    # This attention computes what lies above the diagonal too: six products of 64 columns in each of two layers.
    above_diagonal = 2 * 6 * 2 * 64 * batch * length * (length - 1) / 2
    assert models.operations(tmp_path, batch, length, rank) == counted - above_diagonal
