"""Tiny encoders of transformers: their configurations, their weights from a seed, and the texts that they are given.

Shared by make_encoders.py, which runs transformers, and tests/test_encoders.py, which writes the same folders.
"""

from __future__ import annotations

from typing import Any

import numpy as np

L = 12  # tokens of a text
_LM: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_T5: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 3,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
_CLIP: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 14,
    "projection_dim": 10,
}
_SEES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 2}
_CLIP_VISION = {**_SEES, "num_hidden_layers": 3, "image_size": 20, "patch_size": 6, "projection_dim": 10}
_QWEN_VISION = {**_SEES, "depth": 1, "num_heads": 2, "out_hidden_size": 16, "patch_size": 4}
_PIXTRAL = {**_SEES, "model_type": "pixtral", "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
_PLAIN = {"rope_type": "default", "rope_theta": 1e6}
_MROPE = {"rope_type": "default", "type": "mrope", "rope_theta": 5000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_FEW = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}

# name -> class of transformers, its configuration
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5EncoderModel", _T5),
    "t5_relu": ("T5EncoderModel", {**_T5, "feed_forward_proj": "relu", "num_layers": 2}),
    "t5_buckets": ("T5EncoderModel", {**_T5, **_FEW}),
    "mt5": ("MT5EncoderModel", {**_T5, "num_layers": 2}),
    "umt5": ("UMT5EncoderModel", _T5),
    "clip_l": ("CLIPTextModel", {**_CLIP, "eos_token_id": 2}),
    "clip_g": (
        "CLIPTextModelWithProjection",
        {**_CLIP, "hidden_act": "gelu", "eos_token_id": 38, "layer_norm_eps": 1e-3},
    ),
    "clip_vision": ("CLIPVisionModelWithProjection", {**_CLIP_VISION, "hidden_act": "gelu"}),
    "clip_vision_plain": ("CLIPVisionModel", {**_CLIP_VISION, "num_hidden_layers": 2}),
    "llama": ("LlamaModel", {**_LM, "rope_parameters": _LLAMA3, "max_position_embeddings": 64}),
    "llama_lm": ("LlamaForCausalLM", {**_LM, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**_LM, "model_type": "llama"},
            "vision_config": {**_CLIP_VISION, "model_type": "clip_vision_model"},
        },
    ),
    "qwen2": ("Qwen2ForCausalLM", _LM),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**_LM, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 0]}},
            "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0], "window_size": 16},
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", {**_LM, "head_dim": 6, "rope_parameters": _PLAIN}),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": {**_LM, "head_dim": 6, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1]}},
            "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        },
    ),
    "gemma2": ("Gemma2Model", {**_LM, "head_dim": 6, "query_pre_attn_scalar": 9, "attn_logit_softcapping": 2.0}),
    "mistral": ("MistralModel", {**_LM, "head_dim": 6, "sliding_window": 5}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {**_LM, "model_type": "mistral", "head_dim": 6, "sliding_window": None},
            "vision_config": _PIXTRAL,
        },
    ),
    "bert": ("BertModel", {**_LM, "max_position_embeddings": 16}),
}


def kind_of(name: str) -> str:
    """ "t5", "clip", "vision", "bert", or "lm"."""
    for kind in ("vision", "t5", "clip", "bert"):
        if kind in name.replace("qwen2_5_vl", "").replace("qwen3_vl", ""):
            return kind
    return "lm"


def text(name: str) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask [B, L]: a full text, one padded at its right, and for language models one padded at its left."""
    rng = np.random.default_rng(3)
    ids = rng.integers(1, 37, (3 if kind_of(name) == "lm" else 2, L))
    mask = np.ones_like(ids)
    mask[1, 7:] = 0
    if kind_of(name) == "lm":
        mask[2, :4] = 0
    if kind_of(name) == "clip":  # the end tokens of both conventions, and the padding that pipelines have
        ids[0, 9:], ids[1, 6:] = (38, 39, 38), 38
    return ids, mask


def pixels() -> np.ndarray:
    """[B, H, W, C] float32."""
    return np.random.default_rng(4).standard_normal((2, 20, 20, 3)).astype(np.float32)


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 values of tensors: none zero, none neutral, products of the size of their inputs."""
    out = {}
    for i, name in enumerate(sorted(shapes)):
        shape = tuple(shapes[name])
        z = np.random.default_rng([seed, i]).standard_normal(shape)
        if len(shape) < 2:
            z = 1 + 0.2 * z if name.endswith("weight") else 0.2 * z
        elif "embed" not in name and "relative" not in name and name != "shared.weight":
            z = z * np.prod(shape[1:]) ** -0.5
        out[name] = z.astype(np.float32)
    return out
