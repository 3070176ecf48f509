"""Small models for plan tests."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig, parse_settings


def small_model(
    *,
    vision_layers: int = 4,
    text_layers: int = 6,
    vision_lists: Any = "auto",
    text_lists: Any = "auto",
    is_tied: bool = False,
    freeze_vision: bool = False,
    freeze_projector: bool = False,
    freeze_text: bool = False,
) -> Qwen2VLConfig:
    """A Qwen2-VL of the shape of configs/qwen2vl/tiny; without vision tower when `vision_layers` is 0."""
    image = {
        "vision_encoder": {
            "model_id": "qwen2vit",
            "num_layers": vision_layers,
            "pipeline_num_layers": vision_lists,
            "hidden_size": 96,
            "num_attention_heads": 4,
            "freeze": freeze_vision,
        },
        "vision_projector": {
            "model_id": "lnmlp",
            "input_size": 96,
            "ffn_hidden_size": 384,
            "hidden_size": 128,
            "freeze": freeze_projector,
        },
    }
    content = {
        "model_id": "qwen2vl",
        "img_context_token_id": 1,
        "video_token_id": 2,
        "vision_start_token_id": 3,
        "image_encoder": image if vision_layers else None,
        "text_decoder": {
            "model_id": "qwen2lm",
            "num_layers": text_layers,
            "pipeline_num_layers": text_lists,
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": 1024,
            "max_position_embeddings": 4096,
            "untie_embeddings_and_output_weights": not is_tied,
            "mrope_section": [4, 6, 6],
            "freeze": freeze_text,
        },
    }
    return parse_settings(Qwen2VLConfig, content, where="small model")


def parallel(*, tp: int = 1, pp: int = 1, vp: int = 1) -> ParallelConfig:
    """A layout with one replica."""
    return ParallelConfig(tp_size=tp, pp_size=pp, vp_size=vp, world_size=tp * pp)
