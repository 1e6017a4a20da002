"""Fused modules in models of transformers: the same results, in every way such a model is used."""

from __future__ import annotations

import copy

import pytest
import torch
from models import make
from torch import nn
from transformers import DataCollatorWithFlattening, StaticCache
from transformers.models.llama.modeling_llama import LlamaAttention

import entrenar.fusion.attention as fused_attention
from entrenar import Tape, fuse, wrap
from entrenar.autograd.ops import attention
from entrenar.fusion import FusedAttention, FusedMLP, FusedRMSNorm
from entrenar.fusion.fuse import FusionReport
from entrenar.lora import LoRALayer


def ids() -> torch.Tensor:
    return torch.arange(3, 39).view(2, 18)


def twins(family: str = "llama", dtype: torch.dtype = torch.float32, **settings):
    """A wrapped and fused model, and the same one with its own modules; B is not zero, so that A has gradients."""
    plain = make(family, **settings).to(dtype)
    wrap(plain, rank=4, alpha=8, fuse=False)
    for layer in plain.modules():
        if isinstance(layer, LoRALayer):
            nn.init.normal_(layer.lora_B, std=0.1)
        elif type(layer).__name__.endswith("RMSNorm"):
            nn.init.normal_(layer.weight, 1.0, 0.2)
    fused = copy.deepcopy(plain)
    return fused, plain, fuse(fused)


def loss_and_gradients(model: nn.Module, **inputs):
    loss = model(ids(), labels=ids(), use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(fused, plain, rtol=1e-4, **inputs):
    loss, gradients = loss_and_gradients(fused, **inputs)
    expected_loss, expected = loss_and_gradients(plain, **inputs)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= rtol * expected[name].norm(), name


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_model_trains_as_the_plain_one(family):
    fused, plain, report = twins(family)
    assert report.kept == {}
    assert set(report.fused.values()) == {"FusedAttention", "FusedMLP", "FusedRMSNorm"}
    assert_same_training(fused, plain)


def test_adapter_gradients_agree_in_bfloat16():
    fused, plain, report = twins(dtype=torch.bfloat16)
    assert report.kept == {}
    exact = copy.deepcopy(plain).float()
    _, found = loss_and_gradients(fused)
    _, expected = loss_and_gradients(exact)
    for name, gradient in found.items():
        assert torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) >= 0.999, name


def test_padding_mask_reaches_the_attention():
    fused, plain, _ = twins()
    mask = torch.ones_like(ids())
    mask[0, :5] = 0
    assert_same_training(fused, plain, attention_mask=mask)


def test_sliding_window_reaches_the_attention():
    fused, plain, report = twins("mistral", sliding_window=4)
    assert report.kept == {}
    assert_same_training(fused, plain)


@pytest.mark.parametrize(
    ("family", "settings", "looked_at"),
    [
        ("llama", {}, False),
        ("mistral", {"sliding_window": 4}, True),
        ("mistral", {"sliding_window": 17}, True),
        ("mistral", {"sliding_window": 18}, False),
    ],
)
def test_a_mask_is_looked_at_where_it_says_more_than_causal(family, settings, looked_at, monkeypatch):
    fused, plain, _ = twins(family, **settings)
    masks = []

    def attend(q, k, v, mask, *args, **kwargs):
        masks.append(mask)
        return attention(q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(fused_attention, "attention", attend)
    mask = torch.ones(18, 18, dtype=torch.bool).tril().triu(-settings.get("sliding_window", 18) + 1).view(1, 1, 18, 18)
    found = fused(ids(), attention_mask=mask, mask_is_causal=True, use_cache=False).logits
    torch.testing.assert_close(found, plain(ids(), use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert [mask is not None for mask in masks] == [looked_at] * len(masks)
    assert masks


def by_keyword(model: nn.Module) -> dict[str, bool]:
    return {"is_causal": False}


def by_config(model: nn.Module) -> dict[str, bool]:
    model.config.is_causal = False
    return {}


def by_attribute(model: nn.Module) -> dict[str, bool]:
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    return {}


@pytest.mark.parametrize("tell", [by_keyword, by_config, by_attribute])
def test_attention_sees_later_tokens_where_it_is_told_to(tell):
    fused, plain, _ = twins()
    causal = plain(ids()).logits
    found, expected = (model(ids(), **tell(model)).logits for model in (fused, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - causal).norm() > 0.1 * causal.norm()


def test_packed_sequences_may_see_their_later_tokens():
    fused, plain, _ = twins()
    positions = torch.cat([torch.arange(5), torch.arange(4)]).unsqueeze(0)
    offsets = torch.tensor([0, 5, 9], device="cpu")
    row = ids()[:1, :9]
    found = fused(row, cu_seq_lens_q=offsets, position_ids=positions, is_causal=False, use_cache=False).logits
    expected = torch.cat([plain(part, is_causal=False).logits for part in row.split([5, 4], 1)], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_attention_that_is_not_causal_is_looked_at():
    fused, plain, _ = twins()
    mask = torch.ones(1, 1, 18, 18, dtype=torch.bool).triu(-2).logical_and(torch.ones(18, 18).tril(2).bool())
    found = fused(ids(), attention_mask=mask, mask_is_causal=True, is_causal=False, use_cache=False).logits
    torch.testing.assert_close(found, plain(ids(), attention_mask=mask).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_sequences_packed_by_transformers_are_kept_apart(family):
    """Its collator hands over the bounds of the sequences, which the fused attention takes, and positions, of which
    transformers makes the mask for its own."""
    fused, plain, _ = twins(family)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": list(range(3, 3 + length))} for length in (18, 1, 7)])
    batch = {name: x.to(ids().device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
    found, expected = (model(**batch, use_cache=False) for model in (fused, plain))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"attention_dropout": 0.5}, "they are 0.5 and None"),
        ("mistral", {"sliding_window": 4}, "they are 0.0 and 4"),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, "they are 0.0 and 4"),
    ],
)
def test_packed_sequences_that_need_a_mask_are_refused(family, settings, reason):
    fused, _, report = twins(family, **settings)
    assert report.kept == {}
    offsets = torch.tensor([0, 5, 9], device="cpu")
    with pytest.raises(ValueError, match=reason):
        fused(ids()[:1, :9], cu_seq_lens_q=offsets, use_cache=False)


@pytest.mark.parametrize("window", [5, 6])
def test_a_packed_sequence_may_be_as_long_as_the_window(window):
    fused, _, _ = twins("mistral", sliding_window=window)
    offsets = torch.tensor([0, 6, 9], device="cpu")
    layer = fused.model.layers[0].self_attn
    assert [layer.packs(length) for length in (window, window + 1)] == [True, False]
    if window < 6:
        with pytest.raises(ValueError, match="no window that is shorter"):
            fused(ids()[:1, :9], cu_seq_lens_q=offsets, use_cache=False)
    else:
        assert fused(ids()[:1, :9], cu_seq_lens_q=offsets, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    fused, plain, _ = twins()
    fused.train(), plain.train()
    fused.activation_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    assert_same_training(fused, plain)


def test_attention_dropout_applies_in_training_only():
    fused, plain, report = twins(attention_dropout=0.5)
    assert report.kept == {}
    expected = plain(ids()).logits
    torch.testing.assert_close(fused(ids()).logits, expected)
    fused.train()
    assert (fused(ids()).logits - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("length", [1, 2])
def test_short_inputs_give_the_same_output(length):
    fused, plain, _ = twins()
    torch.testing.assert_close(fused(ids()[:, :length]).logits, plain(ids()[:, :length]).logits)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_generates_the_same_tokens(cache):
    fused, plain, _ = twins()
    settings = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache != "none"}
    mask = torch.ones_like(ids())
    mask[0, :3] = 0
    for attention_mask in (torch.ones_like(ids()), mask):
        tokens = []
        for model in (fused, plain):
            static = {"past_key_values": StaticCache(model.config, max_cache_len=40)} if cache == "static" else {}
            tokens.append(model.generate(ids(), attention_mask=attention_mask, **settings, **static))
        assert torch.equal(*tokens)


def test_state_dict_keeps_its_names_and_tensors():
    fused, plain, _ = twins()
    expected = plain.state_dict()
    found = fused.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    fused.load_state_dict(expected)


def test_copies_are_independent():
    fused, _, _ = twins()
    copied = copy.deepcopy(fused)
    assert torch.equal(copied(ids()).logits, fused(ids()).logits)
    nn.init.zeros_(copied.model.layers[0].self_attn.o_proj.lora_B)
    assert not torch.equal(copied(ids()).logits, fused(ids()).logits)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_decoder_layer_compiles_without_graph_breaks():
    fused, plain, _ = twins()
    layer, x = fused.model.layers[0], torch.randn(2, 6, 64, requires_grad=True)
    position = fused.model.rotary_emb(x, torch.arange(6).unsqueeze(0))
    compiled = torch.compile(lambda x: layer(x, position_embeddings=position), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    expected = plain.model.layers[0](x, position_embeddings=position)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_attention_to_packed_sequences_compiles_without_graph_breaks():
    fused, _, _ = twins()
    attention, x = fused.model.layers[0].self_attn, torch.randn(1, 12, 64, requires_grad=True)
    position = fused.model.rotary_emb(x, torch.arange(12).unsqueeze(0))
    offsets = torch.tensor([0, 5, 12], device="cpu")

    def attend(x):
        return attention(x, position_embeddings=position, cu_seq_lens_q=offsets)[0]

    y, expected = torch.compile(attend, fullgraph=True, backend="aot_eager")(x), attend(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_tape_sees_through_the_fused_modules():
    fused, _, _ = twins()
    with Tape() as tape:
        loss = fused(ids(), labels=ids(), use_cache=False).loss
    tape.backward(loss)
    found = {name: p.grad.clone() for name, p in fused.named_parameters() if p.requires_grad}
    fused.zero_grad()
    _, expected = loss_and_gradients(fused)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert {"scaled_dot_product_attention", "swiglu_int4_lora_linear", "rms_norm", "rotary_embedding"} <= {
        entry.op for entry in tape.entries
    }


def test_other_models_keep_their_classes():
    fused, plain, _ = twins()
    assert type(plain.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert type(fused.model.layers[0].mlp) is FusedMLP
    assert type(fused.model.layers[0].self_attn) is FusedAttention
    assert type(fused.model.norm) is FusedRMSNorm
    assert type(make().model.norm).__name__ == "LlamaRMSNorm"


def test_wrap_fuses_unless_told_otherwise():
    assert isinstance(make_wrapped().model.norm, FusedRMSNorm)
    assert not any(isinstance(m, (FusedMLP, FusedRMSNorm)) for m in make_wrapped(fuse=False).modules())


def make_wrapped(**settings):
    model = make()
    report = wrap(model, rank=4, **settings)
    assert ("fused: " in str(report)) == settings.get("fuse", True)
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fusing_draws_no_random_numbers_and_leaves_gradients_and_modes_alone(dropout):
    model = make(attention_dropout=dropout)
    wrap(model, rank=4, fuse=False)
    model.train()
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_fusing_does_not_depend_on_the_default_device():
    model = make()
    with torch.device("meta"):
        report = fuse(model)
    assert report.kept == {}


def test_fusing_twice_finds_nothing_more():
    fused, _, _ = twins()
    again = fuse(fused)
    assert again.fused == again.kept == {}


def test_gemma_keeps_what_it_computes_differently():
    model = make("gemma2")
    before = model(ids()).logits
    report = fuse(model)
    assert report.fused == {}
    reasons = " ".join(report.kept.values())
    assert "computes something else: its output differs" in reasons  # its norms scale by 1 + weight
    assert "GELUTanh, not SiLU" in reasons
    assert torch.equal(model(ids()).logits, before)
    assert "fused: nothing" in str(report)


class Doubling(nn.Module):
    """An MLP with the parts of Llama's and another formula."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = mlp.children()

    def forward(self, x):
        return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class StraightThrough(Doubling):
    """The same output, and another gradient."""

    def forward(self, x):
        y = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y.detach() + x - x.detach()


class Limited(Doubling):
    """The same for inputs of ordinary size."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=4.0) * self.up_proj(x))


class Dropping(Doubling):
    """The same in evaluation."""

    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.dropout(h, 0.1, self.training))


class WithAPair(Doubling):
    """One that returns more."""

    def forward(self, x):
        return super().forward(x), None


class WithAnotherInput(Doubling):
    """One that is given more."""

    def forward(self, x, residual=None):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Broken(Doubling):
    """One that cannot be run."""

    def forward(self, x):
        raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Doubling, "its output differs"),
        (StraightThrough, "its gradient of input differs"),
        (Limited, "its output at 30 times an input differs"),
        (Dropping, "computes something else in training"),
        (WithAPair, "cannot be compared: 'tuple' object"),
        (WithAnotherInput, "takes 2 inputs, not one"),
        (Broken, "cannot be compared: out of order"),
    ],
)
def test_module_with_the_same_parts_and_another_formula_stays(other, reason):
    model = make()
    model.model.layers[1].mlp = other(model.model.layers[1].mlp)
    report = fuse(model)
    assert type(model.model.layers[1].mlp) is other
    assert reason in report.kept["model.layers.1.mlp"]
    assert report.fused["model.layers.0.mlp"] == "FusedMLP"


def test_mlp_with_unknown_settings_stays():
    model = make()
    model.model.layers[0].mlp.limit = 10.0
    assert fuse(model).kept == {"model.layers.0.mlp": "has the settings limit, whose effect is not known"}


def test_mlp_and_norm_take_their_input_by_the_name_that_it_had():
    fused, plain, _ = twins()
    x = torch.randn(2, 64)
    for name, key in (("mlp", "x"), ("input_layernorm", "hidden_states")):
        found, expected = (getattr(model.model.layers[0], name)(**{key: x}) for model in (fused, plain))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for module in (fused.model.norm, fused.model.layers[0].mlp):
        with pytest.raises(TypeError, match=r"takes one input, not 1 by position and \['residual'\] by name"):
            module(x, residual=x)
        with pytest.raises(TypeError, match=r"takes one input, not 0 by position and \[\] by name"):
            module()


def test_attention_refuses_inputs_that_it_does_not_know():
    fused, _, _ = twins()
    with pytest.raises(TypeError, match="does not know the effect of position_bias, softcap: wrap"):
        fused(ids(), position_bias=torch.zeros(1, 4, 18, 18), softcap=30.0)


def test_attention_takes_what_a_model_hands_through_to_its_layers():
    fused, plain, _ = twins()
    inputs = {
        "softcap": None, "token_type_ids": torch.zeros_like(ids()), "output_attentions": True, "return_dict": True,
        "labels": ids(), "shift_labels": ids(), "ignore_index": -1, "num_items_in_batch": torch.tensor(40),
    }  # fmt: skip
    found, expected = fused(ids(), **inputs), plain(ids(), **inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_refuses_to_be_another_implementation(implementation):
    fused, _, _ = twins()
    layer, x = fused.model.layers[0], torch.randn(2, 6, 64)
    position = fused.model.rotary_emb(x, torch.arange(6).unsqueeze(0))
    fused.set_attn_implementation(implementation)
    with pytest.raises(ValueError, match=rf"'sdpa' only, not '{implementation}': wrap\(..., fuse=False\)"):
        layer(x, position_embeddings=position)


def test_attention_is_set_by_the_names_of_the_originals_attributes():
    fused, plain, _ = twins()
    for model in (fused, plain):
        for layer in model.model.layers:
            sharp(layer.self_attn)
            layer.self_attn.attention_dropout = 0.5
    torch.testing.assert_close(fused(ids()).logits, plain(ids()).logits, rtol=1e-4, atol=1e-5)
    fused.train()
    assert not torch.equal(fused(ids()).logits, fused(ids()).logits)


def sharp(attention: nn.Module) -> None:
    attention.scaling = 3.0


def with_sinks(attention: nn.Module) -> None:
    attention.sinks = 4
    attention.softcap = 30.0


def with_a_gate(attention: nn.Module) -> None:
    attention.gate_proj = nn.Linear(64, 64)


def with_a_parameter(attention: nn.Module) -> None:
    attention.sinks = nn.Parameter(torch.zeros(4))


def with_a_buffer(attention: nn.Module) -> None:
    attention.register_buffer("sinks", torch.zeros(4))


def not_known_to_be_causal(attention: nn.Module) -> None:
    del attention.is_causal


def without_a_config(attention: nn.Module) -> None:
    del attention.config


def without_a_scale(attention: nn.Module) -> None:
    del attention.scaling


def replaced(attention: nn.Module) -> None:
    attention.forward = attention.forward


def hooked(attention: nn.Module) -> None:
    attention.register_forward_hook(lambda *_: None)


def eager(attention: nn.Module) -> None:
    attention.config = copy.copy(attention.config)
    attention.config._attn_implementation_internal = "eager"


def with_a_bidirectional_config(attention: nn.Module) -> None:
    attention.config = copy.copy(attention.config)
    attention.config.is_causal = False


def with_clipping(attention: nn.Module) -> None:
    attention.config = copy.copy(attention.config)
    attention.config.clip_qkv = 8.0


class NamesItsCacheOtherwise(LlamaAttention):
    """As it was in earlier releases of transformers, whose decoder layers hand over a `past_key_value`."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_value=None, **kwargs):
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_value, **kwargs)


class ReturnsItsCache(LlamaAttention):
    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        results = super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return (*results, past_key_values)


def with_another_input(attention: nn.Module) -> None:
    attention.__class__ = NamesItsCacheOtherwise


def with_another_result(attention: nn.Module) -> None:
    attention.__class__ = ReturnsItsCache


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_sinks, "has the settings sinks, softcap"),
        (with_a_gate, "does not consist of"),
        (with_a_parameter, "does not consist of"),
        (with_a_buffer, "does not consist of"),
        (hooked, "has hooks"),
        (replaced, "has hooks"),
        (eager, "implementation 'sdpa'"),
        (not_known_to_be_causal, "is not causal"),
        (without_a_config, "implementation 'sdpa'"),
        (without_a_scale, "has no scaling"),
        (with_a_bidirectional_config, "is not causal"),
        (with_clipping, "clips queries, keys and values"),
        (
            with_another_input,
            "takes the inputs attention_mask, hidden_states, past_key_value, ",
        ),
        (with_another_result, "returns 3 results, not two"),
    ],
)
def test_attention_with_unknown_parts_stays(change, reason):
    model = make()
    change(model.model.layers[0].self_attn)
    report = fuse(model)
    assert reason in report.kept["model.layers.0.self_attn"]
    assert "model.layers.1.self_attn" in report.fused


def with_a_bias(norm: nn.Module) -> None:
    norm.bias = nn.Parameter(torch.zeros(64))


def with_a_gain(norm: nn.Module) -> None:
    norm.gain = 2.0


def without_an_epsilon(norm: nn.Module) -> None:
    norm.gain = norm.variance_epsilon
    del norm.variance_epsilon


@pytest.mark.parametrize("change", [with_a_bias, with_a_gain, without_an_epsilon])
def test_norm_with_unknown_parts_stays(change):
    model = make()
    change(model.model.norm)
    report = fuse(model)
    assert report.kept == {"model.norm": "has other settings than a weight and an epsilon"}


class EpsilonOutsideRMSNorm(nn.Module):
    """The same where the epsilon is small beside the input."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


def test_norm_that_differs_for_small_inputs_only_stays():
    model = make()
    model.model.norm = EpsilonOutsideRMSNorm()
    assert "its output at 0.01 times an input differs" in fuse(model).kept["model.norm"]


def test_torchs_silu_is_known():
    model = make()
    model.model.layers[0].mlp.act_fn = nn.SiLU()
    assert fuse(model).kept == {}


def test_norm_shows_its_width_and_epsilon():
    assert str(make_wrapped().model.norm) == "FusedRMSNorm(64, eps=1e-06)"


def test_changed_scale_is_taken_over():
    model = make()
    sharp(model.model.layers[0].self_attn)
    before = model(ids()).logits
    assert fuse(model).kept == {}
    torch.testing.assert_close(model(ids()).logits, before, rtol=1e-4, atol=1e-5)


def test_model_without_a_rotary_embedding_keeps_its_attention():
    layer = make().model.layers[0]
    report = fuse(layer)
    assert "without a rotary embedding" in report.kept["self_attn"]
    assert type(layer.mlp) is FusedMLP


def test_compares_in_the_dtype_of_the_model_and_not_of_its_adapters():
    layer = make().model.layers[0].to(torch.bfloat16)
    wrap(layer, rank=4, fuse=False)
    assert next(layer.parameters()).dtype == torch.float32
    assert fuse(layer).fused["mlp"] == "FusedMLP"


def test_report_of_what_has_some_parts_only_says_why():
    mlp = make().model.layers[0].mlp
    del mlp.act_fn
    report = fuse(nn.Sequential(mlp))
    assert report.kept == {"0": "does not consist of act_fn, down_proj, gate_proj, up_proj"}


def test_model_without_parameters_has_nothing_to_fuse():
    assert fuse(nn.Sequential(nn.ReLU())) == FusionReport()


def test_report_counts_by_class_and_reason():
    report = FusionReport(
        fused={"a.norm": "FusedRMSNorm", "a.mlp": "FusedMLP", "b.norm": "FusedRMSNorm"},
        kept={"a.attention": "has hooks", "b.attention": "has hooks", "b.mlp": "has no scaling"},
    )
    assert str(report).splitlines() == [
        "fused: 2 FusedRMSNorm, 1 FusedMLP",
        "not fused: 2 that has hooks",
        "not fused: 1 that has no scaling",
    ]
