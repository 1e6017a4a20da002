from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tiny import records
from safetensors.torch import load_file
from tiny import add_adapters, make_model, make_tokenizer
from torch import nn

from entrenar.training.batches import Example, collate
from entrenar.training.config import FinetuneConfig
from entrenar.training.encode import encode
from entrenar.training.evaluate import heldout_loss
from entrenar.training.folder import only_run_in
from entrenar.training.loop import TrainingError, finetune
from entrenar.training.loss import causal_lm_loss
from entrenar.training.metrics import StepMetrics, running_mean
from entrenar.training.plan import Plan
from entrenar.training.resume import ResumeError

TOKENIZER = make_tokenizer()
TRAIN = encode(records(12), TOKENIZER).examples
HELDOUT = encode(records(4, first=100), TOKENIZER).examples


class Recorder:
    def __init__(self) -> None:
        self.rows: list[StepMetrics] = []
        self.remarks: list[str] = []

    def say(self, text: str) -> None:
        self.remarks.append(text)

    def step(self, row: StepMetrics, total_steps: int) -> None:
        self.rows.append(row)
        assert total_steps >= row.step


def run(out: Path, model: nn.Module | None = None, **settings: Any) -> tuple[dict[str, Any], nn.Module, Recorder]:
    model = add_adapters(make_model()) if model is None else model
    watcher = Recorder()
    config = FinetuneConfig(**{"batch_size": 4, "lr": 1e-2, **settings})
    return finetune(model, TOKENIZER, TRAIN, HELDOUT, config, out, watcher=watcher), model, watcher


def test_a_run_learns_and_leaves_its_files(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    report, model, watcher = run(out, epochs=6, lr=2e-2)
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "loss.png", "metrics.jsonl", "report.json"]
    assert sorted(p.name for p in (out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "report.json").read_text()) == report
    assert report["heldout_loss_after"] < 0.93 * report["heldout_loss_before"]
    assert report["heldout_loss_after"] == heldout_loss(model, HELDOUT, 4)
    assert report["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__
    assert report["steps"] == len(watcher.rows) == 18
    assert report["tokens"] == 6 * sum(len(example.input_ids) for example in TRAIN)
    assert [row.step for row in watcher.rows if row.heldout_loss is not None] == [5, 9, 14, 18]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))
    assert all(line["loss"] > 0 and line["lr"] > 0 and line["seconds"] > 0 for line in lines)
    assert [set(sample) for sample in report["samples"]] == [{"prompt", "wanted", "before", "after"}] * 3
    assert not model.training


def test_the_base_keeps_its_bytes(tmp_path: Path) -> None:
    model = add_adapters(make_model())
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run(tmp_path, model, max_steps=2)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])
            assert parameter.grad is None


def test_accumulated_batches_count_as_one_by_their_tokens(tmp_path: Path) -> None:
    """One step of 3 x 4 examples is a step of 12, though the labels are spread unevenly over the three."""
    _, _, first = run(tmp_path / "whole", max_steps=1, batch_size=12)
    _, _, second = run(tmp_path / "parts", max_steps=1, batch_size=4, accumulation=3)
    torch.testing.assert_close(first.rows[0].loss, second.rows[0].loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.rows[0].grad_norm, second.rows[0].grad_norm, rtol=1e-5, atol=0)


def test_the_held_out_loss_is_the_mean_over_all_labelled_tokens() -> None:
    model = make_model()
    input_ids, labels = collate(HELDOUT)
    with torch.no_grad():
        logits = model(input_ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    for batch_size in (1, 3, 4):
        assert math.isclose(heldout_loss(model, HELDOUT, batch_size), expected, rel_tol=1e-6)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(tmp_path: Path) -> None:
    adapters = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, add_adapters(make_model(), dropout=0.1), max_steps=2, seed=seed)
        adapters.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    first, same, other = adapters
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


class Detached(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x).detach()
        return output


def test_an_adapter_without_a_gradient_is_named(tmp_path: Path) -> None:
    model = add_adapters(make_model())
    block = model.model.layers[1].mlp
    block.up_proj = Detached(block.up_proj)
    with pytest.raises(TrainingError, match=r"no gradient.*: model\.layers\.1\.mlp\.up_proj\.inner;"):
        run(tmp_path, model)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = add_adapters(make_model())
    watcher = Recorder()

    def spoil(row: StepMetrics, total_steps: int) -> None:
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.lora_B.fill_(math.inf)

    watcher.step = spoil  # type: ignore[method-assign]
    config = FinetuneConfig(max_steps=3, batch_size=4, lr=1e-2)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan, at a learning rate of"):
        finetune(model, TOKENIZER, TRAIN, HELDOUT, config, tmp_path, watcher=watcher)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
def test_an_infinite_loss_with_finite_gradients_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    model = add_adapters(make_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr("entrenar.training.loop.causal_lm_loss", lambda *args: causal_lm_loss(*args) + math.inf)
    with pytest.raises(TrainingError, match="step 1: the loss is inf, at a learning rate of"):
        run(tmp_path, model, max_steps=3, optimizer=optimizer)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert any(gradient.any() for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "lion"])
@pytest.mark.parametrize("bad", [math.nan, 3e38])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path: Path, optimizer: str, bad: float) -> None:
    model = add_adapters(make_model())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    spoilt = "model.layers.1.mlp.up_proj.lora_A"
    model.get_parameter(spoilt).register_hook(lambda gradient: torch.full_like(gradient, bad))
    why = f"nan: the gradient of {spoilt}, of shape (4, 32), has NaN or infinite values"
    if not math.isnan(bad):
        why = "inf: every gradient is finite, but their squares overflow"
    message = f"step 1: the gradients' norm is {why}, at a learning rate of"
    with pytest.raises(TrainingError, match=re.escape(message)):
        run(tmp_path, model, max_steps=3, optimizer=optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("clip_norm", [1e-3, math.inf])
def test_gradients_are_clipped_and_their_norm_before_that_is_logged(tmp_path: Path, clip_norm: float) -> None:
    config = FinetuneConfig(max_steps=2, batch_size=4, clip_norm=clip_norm, checkpoint_every=1)
    watcher, moments = Recorder(), []

    def read_checkpoint_of_step_1(row: StepMetrics, total_steps: int) -> None:
        watcher.rows.append(row)
        if row.step == 2:
            tensors = load_file(tmp_path / "checkpoint.safetensors")
            moments.extend(tensor.flatten() for name, tensor in tensors.items() if name.endswith(".exp_avg"))

    watcher.step = read_checkpoint_of_step_1  # type: ignore[method-assign]
    finetune(add_adapters(make_model()), TOKENIZER, TRAIN, HELDOUT, config, tmp_path, watcher=watcher)
    model = add_adapters(make_model()).train()
    (batch,) = Plan(TRAIN, config, packed=True).batches(1)
    causal_lm_loss(model, *collate([TRAIN[index] for index in batch])).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    assert norm > 1e-3
    # Sums of the same float32 numbers in two orders.
    assert watcher.rows[0].grad_norm == pytest.approx(norm, rel=1e-5)
    # The first moment of AdamW's first step is a tenth of the gradient that it was given.
    assert torch.cat(moments).norm().item() == pytest.approx(0.1 * min(norm, clip_norm), rel=1e-5)


def test_a_model_without_adapters_and_empty_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrap it first"):
        run(tmp_path, make_model().requires_grad_(False))
    with pytest.raises(ValueError, match="0 held out"):
        finetune(add_adapters(make_model()), TOKENIZER, TRAIN, [], FinetuneConfig(), tmp_path)


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    run(tmp_path, max_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = add_adapters(make_model())
    for resume in (False, True):
        with pytest.raises(ResumeError, match=r"is finished; choose another folder"):
            finetune(model, TOKENIZER, TRAIN, HELDOUT, FinetuneConfig(), tmp_path, resume=resume)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_that_fails_behind_its_last_step_is_finished_by_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(model: nn.Module, path: Path) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("entrenar.training.loop.save_adapter", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path, max_steps=2)
    config = FinetuneConfig(max_steps=2, batch_size=4, lr=1e-2)
    with pytest.raises(ResumeError, match="holds an unfinished run"):
        finetune(add_adapters(make_model()), TOKENIZER, TRAIN, HELDOUT, config, tmp_path)
    report = finetune(add_adapters(make_model()), TOKENIZER, TRAIN, HELDOUT, config, tmp_path, resume=True)
    _, model, _ = run(tmp_path / "other", max_steps=2)
    assert report["heldout_loss_after"] == heldout_loss(model, HELDOUT, 4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_text_can_be_trained_on_and_sampled(tmp_path: Path) -> None:
    texts = [Example(torch.arange(start, start + 9), torch.arange(start, start + 9)) for start in range(20, 26)]
    config = FinetuneConfig(max_steps=1, batch_size=2)
    report = finetune(add_adapters(make_model()), TOKENIZER, texts, texts[:1], config, tmp_path)
    (sample,) = report["samples"]
    assert sample["prompt"] == TOKENIZER.decode(texts[0].input_ids[:4], skip_special_tokens=True)


def test_a_running_mean_of_a_constant_is_that_constant() -> None:
    assert running_mean([2.5] * 7) == pytest.approx([2.5] * 7)
    assert running_mean([1.0, 3.0]) == pytest.approx([1.0, (0.09 * 1 + 0.1 * 3) / 0.19])


def test_recomputed_activations_train_the_same_adapter(tmp_path: Path) -> None:
    _, kept, _ = run(tmp_path / "kept", epochs=2)
    _, recomputed, _ = run(tmp_path / "recomputed", epochs=2, recompute=True)
    assert recomputed.is_activation_checkpointing
    for name, parameter in recomputed.named_parameters():
        torch.testing.assert_close(parameter, kept.get_parameter(name), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_recompute_is_refused(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model
            self.get_output_embeddings = model.get_output_embeddings
            self.generate = model.generate
            self.config = model.config

        def forward(self, **inputs: Any) -> Any:
            return self.model(**inputs)

    with pytest.raises(ValueError, match="Wrapper cannot recompute activations"):
        run(tmp_path, Wrapper(add_adapters(make_model())), recompute=True)


@pytest.mark.parametrize(("name", "lr"), [("adamw8bit", 2e-2), ("lion", 5e-3)])
def test_another_optimizer_learns_too(tmp_path: Path, name: str, lr: float) -> None:
    report, _, _ = run(tmp_path / "run", epochs=6, lr=lr, optimizer=name)
    assert report["config"]["optimizer"] == name
    assert report["heldout_loss_after"] < 0.93 * report["heldout_loss_before"]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, adamw8bit, lion, not 'adam8'"):
        FinetuneConfig(optimizer="adam8")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be greater than 0, not 0.0"),
        ({"clip_norm": math.nan}, "clip_norm must be greater than 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number, 0 or more, not -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number"),
        ({"seed": 2**63}, "seed must be a whole number of 64 bits"),
    ],
)
def test_numbers_out_of_range_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**setting)


def test_a_held_out_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    """As where the last step went too far, and no other follows to notice."""
    with pytest.raises(TrainingError, match="step 1: the held-out loss is nan"):
        run(tmp_path, max_steps=1, lr=1e5, weight_decay=1e30)
    assert not (tmp_path / "report.json").exists()
    assert not (tmp_path / "adapter").exists()


def test_held_out_losses_are_remarks(tmp_path: Path) -> None:
    report, _, watcher = run(tmp_path, max_steps=4)
    said = [remark for remark in watcher.remarks if remark.startswith("held-out loss after")]
    assert said[-1] == f"held-out loss after 4 of 4 steps: {report['heldout_loss_after']:.4f}"
    assert len(said) == 4


def test_queries_and_keys_need_no_gradient_where_nobody_has_a_choice(tmp_path: Path) -> None:
    """Of two tokens the one with a label attends to itself alone."""
    pairs = [Example(torch.tensor([5, 6]), torch.tensor([-100, 6]))] * 3
    config = FinetuneConfig(max_steps=1)
    finetune(add_adapters(make_model()), TOKENIZER, pairs, HELDOUT, config, tmp_path / "pairs")
    with pytest.raises(TrainingError, match="no gradient"):
        run(tmp_path / "longer", _detached())


def _detached() -> nn.Module:
    model = add_adapters(make_model())
    model.model.layers[0].mlp.up_proj = Detached(model.model.layers[0].mlp.up_proj)
    return model


def test_a_model_without_adapters_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="no adapters that train; wrap it first"):
        run(tmp_path / "run", model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not (tmp_path / "run").exists()


def test_examples_without_labels_are_refused(tmp_path: Path) -> None:
    bare = Example(torch.tensor([5, 6, 7]), torch.tensor([-100, -100, -100]))
    for train, heldout in (([*TRAIN, bare], HELDOUT), (TRAIN, [bare])):
        with pytest.raises(ValueError, match="1 examples have no labelled tokens"):
            finetune(add_adapters(make_model()), TOKENIZER, train, heldout, FinetuneConfig(), tmp_path)


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    with only_run_in(tmp_path), pytest.raises(ResumeError, match="another run is writing to"):
        run(tmp_path, max_steps=1)
    assert os.listdir(tmp_path) == []
    run(tmp_path, max_steps=1)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; a run needs a folder"):
        run(tmp_path / "file")
