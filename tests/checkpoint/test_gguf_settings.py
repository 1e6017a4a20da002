from __future__ import annotations

import pytest
import torch
import transformers

from entrenar.checkpoint import CheckpointError, load_pretrained

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
HEADS = {"attention.key_length": 16, "attention.value_length": 16}
EPSILON = 2.0**-6  # far from every configuration's own, and the same in float32


def rope(**parameters):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **parameters}}


def scaling(kind: str, **parameters):
    named = {f"rope.scaling.{key}": value for key, value in parameters.items()}
    return {"rope.scaling.type": kind, "rope.scaling.factor": 4.0, **named}


YARN = {"original_max_position_embeddings": 32, "factor": 4.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
# The architecture, the class, the options of its configuration, and the settings in which the file says them.
SETTINGS = {
    "llama, linear": ("llama", "Llama", rope(rope_type="linear", factor=4.0), scaling("linear")),
    "llama, linear under the old key": (
        "llama",
        "Llama",
        rope(rope_type="linear", factor=4.0),
        {"rope.scale_linear": 4.0},
    ),
    "llama, no scaling": ("llama", "Llama", rope(), scaling("none")),
    "llama, heads": ("llama", "Llama", {"head_dim": 32}, {"attention.key_length": 32, "rope.dimension_count": 32}),
    "qwen2, yarn": (
        "qwen2",
        "Qwen2",
        rope(rope_type="yarn", **YARN),
        scaling("yarn", original_context_length=32, yarn_ext_factor=1.0),
    ),
    "qwen2, yarn of the context's length": (
        "qwen2",
        "Qwen2",
        rope(rope_type="yarn", **{**YARN, "original_max_position_embeddings": 256}),
        scaling("yarn"),
    ),
    "qwen2, yarn with its betas": (
        "qwen2",
        "Qwen2",
        rope(rope_type="yarn", beta_fast=4.0, beta_slow=0.5, **YARN),
        scaling("yarn", original_context_length=32, yarn_beta_fast=4.0, yarn_beta_slow=0.5),
    ),
    "qwen3, heads": ("qwen3", "Qwen3", {"head_dim": 16}, HEADS),
    "starcoder2, base": (
        "starcoder2",
        "Starcoder2",
        {"norm_epsilon": EPSILON, **rope(rope_theta=500.0)},
        {"attention.layer_norm_epsilon": EPSILON},
    ),
    "stablelm, whole heads": (
        "stablelm",
        "StableLm",
        {"layer_norm_eps": EPSILON, **rope(partial_rotary_factor=1.0)},
        {
            "attention.layer_norm_epsilon": EPSILON,
            "attention.layer_norm_rms_epsilon": 1.0,
            "rope.dimension_count": 16,
            "use_parallel_residual": True,
        },
    ),
    "nemotron, whole heads": (
        "nemotron",
        "Nemotron",
        {"norm_eps": EPSILON, **rope(partial_rotary_factor=1.0)},
        {"attention.layer_norm_epsilon": EPSILON, "rope.dimension_count": 16, "rope.scaling.type": "none"},
    ),
    "falcon, epsilon": (
        "falcon",
        "Falcon",
        {"layer_norm_epsilon": EPSILON, "num_key_value_heads": 1, "intermediate_size": 256},
        {"attention.layer_norm_epsilon": EPSILON, "tensor_data_layout": "jploski"},
    ),
    "phi3, window": (
        "phi3",
        "Phi3",
        {"sliding_window": 6},
        {"attention.sliding_window": 6, "rope.dimension_count": 16, "rope.scaling.original_context_length": 256},
    ),
    "phi3, no window": ("phi3", "Phi3", {}, {"attention.sliding_window": 0, "rope.dimension_count": 16}),
    "phi3, parts of heads": ("phi3", "Phi3", rope(partial_rotary_factor=0.75), {"rope.dimension_count": 12}),
    "gemma2, caps": (
        "gemma2",
        "Gemma2",
        {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {
            **HEADS,
            "attention.sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2 of 27B": (
        "gemma2",
        "Gemma2",
        {"head_dim": 32, "sliding_window": 6, "num_hidden_layers": 46, "query_pre_attn_scalar": 16},
        {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 6},
    ),
    "gemma3, bases, scaling and layers": (
        "gemma3",
        "Gemma3",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "rope_parameters": GEMMA3_ROPE,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {
            **HEADS,
            **scaling("linear"),
            "rope.freq_base_swa": 5000.0,
            "attention.sliding_window": 6,
            "attention.sliding_window_pattern": [False, True],
        },
    ),
    "gemma3, layers by a number": (
        "gemma3",
        "Gemma3",
        {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        {**HEADS, "attention.sliding_window": 6, "attention.sliding_window_pattern": 2},
    ),
}


def make(kind: str, options: dict):
    torch.manual_seed(0)
    name = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_file_are_the_models(name, write_gguf, tokens, tmp_path):
    architecture, kind, options, settings = SETTINGS[name]
    model = make(kind, options)
    ours = load_pretrained(
        write_gguf(model, architecture=architecture, settings=settings), bits=None, dtype=torch.float32
    )
    # Some settings are rounded to float32 in the file.
    torch.testing.assert_close(logits(ours, tokens), logits(model, tokens), rtol=1e-5, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved", bits=None, dtype=torch.float32)
    assert torch.equal(logits(again, tokens), logits(ours, tokens))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention.sliding_window": 6}, r"llama\.attention\.sliding_window = 6"),
        ({"attention.scale": 0.5}, r"llama\.attention\.scale = 0\.5"),
        ({"logit_scale": 0.5, "residual_scale": 0.25}, r"llama\.logit_scale = 0\.5, llama\.residual_scale = 0\.25"),
        ({"attention.causal": False}, r"llama\.attention\.causal = False"),
        ({"expert_count": 8, "expert_used_count": 2}, r"llama\.expert_count = 8;"),
        ({"attention.value_length": 8}, r"llama\.attention\.value_length = 8"),
        ({"attention.key_length": 16, "rope.dimension_count": 8}, r"llama\.rope\.dimension_count = 8"),
        ({"final_logit_softcapping": 30.0}, r"llama\.final_logit_softcapping = 30\.0"),
        (scaling("longrope"), r"llama\.rope\.scaling\.factor = 4\.0, llama\.rope\.scaling\.type = 'longrope'"),
        (scaling("yarn", yarn_attn_factor=2.0), r"llama\.rope\.scaling\.yarn_attn_factor = 2\.0"),
        (scaling("yarn", yarn_ext_factor=0.5), r"llama\.rope\.scaling\.yarn_ext_factor = 0\.5"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(settings, reason, tiny_llama, write_gguf):
    path = write_gguf(tiny_llama(), settings=settings)
    with pytest.raises(CheckpointError, match=rf"not read: {reason}.*load the Hugging Face directory instead"):
        load_pretrained(path)


def test_phi3_whose_class_knows_no_scaling_is_refused_with_one(write_gguf):
    path = write_gguf(make("Phi3", {}), architecture="phi3", settings=scaling("linear"))
    with pytest.raises(CheckpointError, match=r"phi3\.rope\.scaling\.factor = 4\.0"):
        load_pretrained(path)


def test_settings_without_an_effect_are_passed_over(tiny_llama, write_gguf, tokens):
    settings = {
        "attention.causal": True,
        "attention.sliding_window": 4096,  # longer than the context
        "expert_count": 0,
        "expert_used_count": 0,
        "logit_scale": 1.0,
        "pooling_type": 3,
        "rope.dimension_count": 16,
        "rope.scaling.finetuned": True,
        "tensor_data_layout": "Meta AI original pth",
    }
    model = tiny_llama()
    ours = load_pretrained(write_gguf(model, settings=settings), bits=None, dtype=torch.float32)
    assert torch.equal(logits(ours, tokens), logits(model, tokens))


def test_frequencies_scaled_by_a_setting_and_by_a_tensor_are_refused(tiny_llama, write_gguf):
    factors = {"rope_freqs.weight": torch.full((8,), 2.0).numpy()}
    path = write_gguf(tiny_llama(), extra=factors, settings=scaling("linear"))
    with pytest.raises(CheckpointError, match=r"scales its rotary frequencies twice"):
        load_pretrained(path)
