"""The hyper-parameters of a GGUF file that transformers passes over, put into the model's configuration."""

from __future__ import annotations

from typing import Any

from entrenar.checkpoint.extra import require

# Keys are without the prefix of their architecture. These change no output, or say what the tensors say too.
HARMLESS = (
    "expert_used_count",  # a model that has experts has an expert_count
    "pooling_type",
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "use_parallel_residual",
)
# These are harmless at the value at which they say what every model here does.
NEUTRAL = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "expert_count": 0,
    "logit_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
}
# Configurations name the epsilon of a LayerNorm each in their own way; the other models have RMS norms.
LAYER_NORM_EPSILON = {
    "falcon": "layer_norm_epsilon",
    "nemotron": "norm_eps",
    "stablelm": "layer_norm_eps",
    "starcoder2": "norm_epsilon",
}
ROPE_SCALING = (
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
# Gemma's models of 27B by their layers, as llama.cpp tells them: no key holds the scale of their scores.
GEMMA_27B = {("gemma2", 46), ("gemma3_text", 62)}


def apply_settings(config: Any, architecture: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Put into `config` what transformers passes over of a file's `settings`; returns those that nothing reads."""
    left = {key: value for key, value in settings.items() if not _is_harmless(key, value)}
    _apply_head(config, left)
    _apply_norms_and_caps(config, left)
    _apply_window(config, left)
    _apply_rope(config, left)
    _apply_rope_scaling(config, left)
    known = require("transformers.integrations.ggml").GGUF_CONFIG_MAPPING.get(architecture, {})
    # Of some models transformers takes the rotated dimensions for the whole head, which they need not be.
    known = {**known, "rope.dimension_count": None}
    return {key: value for key, value in left.items() if known.get(key) is None}


def _is_harmless(key: str, value: Any) -> bool:
    return key in HARMLESS or (key in NEUTRAL and value == NEUTRAL[key])


def _apply_head(config: Any, left: dict[str, Any]) -> None:
    attributes = config.to_dict()
    if "head_dim" in attributes and "attention.key_length" in left:
        config.head_dim = left["attention.key_length"]
    for key in ("attention.key_length", "attention.value_length"):
        if left.get(key) == _head_dim(config):
            del left[key]
    if (config.model_type, config.num_hidden_layers) in GEMMA_27B:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def _apply_norms_and_caps(config: Any, left: dict[str, Any]) -> None:
    attributes = config.to_dict()
    epsilon = left.pop("attention.layer_norm_epsilon", None)
    if epsilon is not None and config.model_type in LAYER_NORM_EPSILON:
        setattr(config, LAYER_NORM_EPSILON[config.model_type], epsilon)
        left.pop("attention.layer_norm_rms_epsilon", None)
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "vocab_size"):
        if key in attributes and left.get(key):
            setattr(config, key, left.pop(key))


def _apply_window(config: Any, left: dict[str, Any]) -> None:
    window = left.get("attention.sliding_window", 0)
    if config.model_type in ("mistral", "phi3", "starcoder2") and "attention.sliding_window" in left:
        config.sliding_window = left.pop("attention.sliding_window") or None
    elif window == 0 or window >= config.max_position_embeddings:
        left.pop("attention.sliding_window", None)
    pattern = left.get("attention.sliding_window_pattern")
    if pattern is not None and config.model_type in ("gemma2", "gemma3_text"):
        if isinstance(pattern, int):
            pattern = [(layer + 1) % pattern != 0 for layer in range(config.num_hidden_layers)]
        config.layer_types = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
        del left["attention.sliding_window_pattern"]


def _apply_rope(config: Any, left: dict[str, Any]) -> None:
    rope = _rope(config)
    if "rope.freq_base" in left:
        rope["rope_theta"] = left.pop("rope.freq_base")
    if "sliding_attention" in config.rope_parameters and "rope.freq_base_swa" in left:
        config.rope_parameters["sliding_attention"]["rope_theta"] = left.pop("rope.freq_base_swa")
    rotated = left.get("rope.dimension_count")
    if rotated is not None and "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = rotated / _head_dim(config)
    if rotated == int(_head_dim(config) * rope.get("partial_rotary_factor", 1)):
        del left["rope.dimension_count"]


def _apply_rope_scaling(config: Any, left: dict[str, Any]) -> None:
    read = {key: left[key] for key in ROPE_SCALING if key in left}
    # As llama.cpp takes them: a factor without a type is linear, and zero is no factor.
    kind = read.get("rope.scaling.type", "linear")
    factor = read.get("rope.scaling.factor") or read.get("rope.scale_linear") or 1
    scales = kind != "none" and factor != 1
    if kind not in ("none", "linear", "yarn") or (scales and config.model_type == "phi3"):  # whose class knows neither
        return
    if scales:
        _rope(config).update(rope_type=kind, factor=factor)
    if scales and kind == "yarn":
        _rope(config).update(
            original_max_position_embeddings=read.get(
                "rope.scaling.original_context_length", config.max_position_embeddings
            ),
            beta_fast=read.get("rope.scaling.yarn_beta_fast", 32),
            beta_slow=read.get("rope.scaling.yarn_beta_slow", 1),
        )
    for key in read:
        del left[key]


def _rope(config: Any) -> dict[str, Any]:
    """The rotary parameters of the layers that see everything: some models keep others for those with a window."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
