"""From a Hugging Face `config.json` of Qwen2-VL to the content of a model.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_mm.errors import ConfigError


def qwen2vl_json_from_hf(hf_config: Mapping[str, Any], *, where: str = "config.json") -> dict[str, Any]:
    """The content of a model.json for the model that `hf_config` describes, with `"auto"` stage lists.

    Both generations of the file are read: everything flat (transformers 4), or language settings in `text_config` and
    rotary settings in `rope_parameters` (transformers 5).

    Raises:
        ConfigError: the file describes another model, lacks a key, or asks for a feature that is not supported.
    """
    if hf_config.get("model_type") != "qwen2_vl":
        raise ConfigError(where, f'model_type = "{hf_config.get("model_type")}", expected "qwen2_vl".')
    text = {**hf_config, **(hf_config.get("text_config") or {})}
    vision = hf_config.get("vision_config")
    problems = _unsupported(text, vision)
    try:
        content = {
            "model_id": "qwen2vl",
            "img_context_token_id": hf_config.get("image_token_id", 151655),
            "video_token_id": hf_config.get("video_token_id", 151656),
            "vision_start_token_id": hf_config.get("vision_start_token_id", 151652),
            "image_encoder": None if vision is None else _image_encoder(vision, text),
            "text_decoder": _text_decoder(text, hf_config),
        }
    except KeyError as error:
        problems.append(f"{error.args[0]} is missing.")
    if problems:
        raise ConfigError(where, problems)
    return content


def _unsupported(text: Mapping[str, Any], vision: Mapping[str, Any] | None) -> list[str]:
    problems = []
    if text.get("use_sliding_window"):
        problems.append("use_sliding_window = true: attention inside a window is not supported.")
    if text.get("hidden_act", "silu") != "silu":
        problems.append(f'hidden_act = "{text["hidden_act"]}" is not supported; expected "silu".')
    if vision is not None and vision.get("hidden_act", "quick_gelu") != "quick_gelu":
        problems.append(f'vision_config.hidden_act = "{vision["hidden_act"]}" is not supported; expected "quick_gelu".')
    rope_type = _rope(text).get("rope_type") or _rope(text).get("type") or "mrope"
    if rope_type not in ("mrope", "default"):
        problems.append(f'rope_scaling of type "{rope_type}" is not supported; expected "mrope".')
    return problems


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, wherever this generation of the file keeps them."""
    return {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}


def _text_decoder(text: Mapping[str, Any], hf_config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope(text)
    heads = text["num_attention_heads"]
    # transformers 5 writes the tie at the top level; older nested files may have it inside text_config only
    is_tied = hf_config["tie_word_embeddings"] if "tie_word_embeddings" in hf_config else text["tie_word_embeddings"]
    return {
        "model_id": "qwen2lm",
        "num_layers": text["num_hidden_layers"],
        "pipeline_num_layers": "auto",
        "hidden_size": text["hidden_size"],
        "ffn_hidden_size": text["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": text.get("num_key_value_heads") or heads,
        "kv_channels": text.get("head_dim") or text["hidden_size"] // heads,
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["max_position_embeddings"],
        "rope_theta": float(text["rope_theta"] if "rope_theta" in text else rope["rope_theta"]),
        "untie_embeddings_and_output_weights": not is_tied,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "attention_dropout": float(text.get("attention_dropout", 0.0)),
        "hidden_dropout": 0.0,
        "init_method_std": text.get("initializer_range", 0.02),
        "position_embedding_type": "mrope",
        "mrope_section": list(rope["mrope_section"]),
        "normalization": "RMSNorm",
        "activation_func": "silu",
        "gated_linear_unit": True,
        "layernorm_epsilon": text["rms_norm_eps"],
        "freeze": False,
    }


def _image_encoder(vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    width = vision["embed_dim"]
    merge = vision.get("spatial_merge_size", 2)
    # Qwen2-VL's vision norms have this epsilon in code; config.json does not carry it
    epsilon = 1e-6
    encoder = {
        "model_id": "qwen2vit",
        "num_layers": vision["depth"],
        "pipeline_num_layers": "auto",
        "hidden_size": width,
        "ffn_hidden_size": int(width * vision.get("mlp_ratio", 4)),
        "num_attention_heads": vision["num_heads"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # hub files say in_chans, transformers writes in_channels
        "in_channels": vision.get("in_channels", vision.get("in_chans", 3)),
        "patch_size": vision.get("patch_size", 14),
        "temporal_patch_size": vision.get("temporal_patch_size", 2),
        "spatial_merge_size": merge,
        "layernorm_epsilon": epsilon,
        "normalization": "LayerNorm",
        "activation_func": "quick_gelu",
        "init_method_std": text.get("initializer_range", 0.02),
        "freeze": True,
    }
    projector = {
        "model_id": "lnmlp",
        "num_layers": 1,
        "input_size": width,
        "ffn_hidden_size": width * merge**2,
        "hidden_size": vision.get("hidden_size", text["hidden_size"]),
        "activation_func": "gelu",
        "normalization": "LayerNorm",
        "layernorm_epsilon": epsilon,
        "gated_linear_unit": False,
        "add_bias_linear": True,
        "init_method_std": text.get("initializer_range", 0.02),
        "freeze": True,
    }
    return {"vision_encoder": encoder, "vision_projector": projector}
