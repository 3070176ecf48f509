from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from pydantic import BaseModel

from mindspeed_mm.config import Qwen2VLConfig, load_settings, parse_settings, read_json
from mindspeed_mm.errors import ConfigError

from .launch import FILES

HUB_7B: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "image_token_id": 151655,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "in_chans": 3,
        "mlp_ratio": 4,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_start_token_id": 151652,
    "vocab_size": 152064,
}

NOT_TEXT_KEYS = (
    "architectures",
    "image_token_id",
    "model_type",
    "tie_word_embeddings",
    "video_token_id",
    "vision_config",
    "vision_start_token_id",
)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as transformers 5 writes it."""
    config = {key: flat[key] for key in NOT_TEXT_KEYS}
    rope = {"rope_type": "default", "rope_theta": flat["rope_theta"], **flat["rope_scaling"]}
    left_out = (*NOT_TEXT_KEYS, "rope_scaling", "rope_theta")
    text = {key: value for key, value in flat.items() if key not in left_out}
    config["text_config"] = {**text, "rope_parameters": rope}
    vision = config["vision_config"] = dict(flat["vision_config"])
    vision["in_channels"] = vision.pop("in_chans")
    return config


def problems_of(**changes: Any) -> list[str]:
    """Problems of the 7b file after setting dotted names to values."""
    content = read_json(FILES / "model_7b.json")
    for name, value in changes.items():
        *path, key = name.split("__")
        section = content
        for part in path:
            section = section[part]
        section[key] = value
    with pytest.raises(ConfigError) as caught:
        parse_settings(Qwen2VLConfig, content, where="model.json")
    return list(caught.value.problems)


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_files_of_release_26_load_unchanged(size: str) -> None:
    notes: list[str] = []
    model = load_settings(Qwen2VLConfig, FILES / f"model_{size}.json", notes)
    assert model.video_token_id == 151656
    assert model.text_decoder.kv_channels == 128
    assert model.image_encoder is not None
    assert model.image_encoder.vision_encoder.head_size == 80
    assert model.image_encoder.vision_encoder.patch_dim == 1176
    assert model.text_decoder.is_tied == (size == "2b")
    assert len(notes) == 1
    assert "image_encoder.vision_encoder.llm_hidden_size (" in notes[0]


def test_the_shipped_values_are_kept() -> None:
    text = load_settings(Qwen2VLConfig, FILES / "model_72b.json").text_decoder
    assert text.pipeline_num_layers == (5, 11, 11, 11, 11, 11, 11, 9)
    assert (text.recompute_granularity, text.recompute_method, text.recompute_num_layers) == ("full", "uniform", 1)
    assert text.heads_per_group == 8


def test_freezes_have_their_own_defaults() -> None:
    content = read_json(FILES / "model_7b.json")
    for module in content["image_encoder"].values():
        del module["freeze"]
    model = parse_settings(Qwen2VLConfig, content, where="model.json")
    assert model.image_encoder is not None
    assert model.image_encoder.vision_encoder.freeze
    assert not model.image_encoder.vision_projector.freeze
    assert not model.text_decoder.freeze


def test_absent_sizes_are_derived() -> None:
    content = read_json(FILES / "model_7b.json")
    del content["image_encoder"]["vision_encoder"]["ffn_hidden_size"]
    del content["text_decoder"]["num_query_groups"]
    model = parse_settings(Qwen2VLConfig, content, where="model.json")
    assert model.image_encoder is not None
    assert model.image_encoder.vision_encoder.ffn_hidden_size == 5120
    assert model.text_decoder.num_query_groups == 28


def test_rope_scaling_may_hold_the_sections() -> None:
    content = read_json(FILES / "model_7b.json")
    content["text_decoder"]["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    del content["text_decoder"]["mrope_section"]
    model = parse_settings(Qwen2VLConfig, content, where="model.json")
    assert model.text_decoder.mrope_section == (16, 24, 24)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"text_decoder__num_query_group": 4},
            "text_decoder.num_query_group is not a setting; did you mean num_query_groups?",
        ),
        (
            {"text_decoder__num_query_groups": 3},
            "text_decoder.num_attention_heads = 28 is not divisible by num_query_groups = 3",
        ),
        ({"text_decoder__mrope_section": [16, 16, 16]}, "adds up to 48, but half the head size (kv_channels) is 64."),
        ({"text_decoder__mrope_section": [32, 32]}, "should be three counts"),
        (
            {"text_decoder__activation_func": "gelu"},
            "text_decoder.activation_func = \"gelu\" is not supported; expected 'silu'",
        ),
        ({"text_decoder__add_qkv_bias": False}, "text_decoder.add_qkv_bias = false is not supported"),
        (
            {"text_decoder__hidden_size": 4096, "text_decoder__kv_channels": 128},
            "vision_projector.hidden_size = 3584, but text_decoder.hidden_size = 4096",
        ),
        ({"text_decoder__recompute_granularity": "full"}, "needs recompute_method and recompute_num_layers"),
        ({"text_decoder__recompute_method": "block"}, 'has an effect only with recompute_granularity = "full"'),
        ({"text_decoder__vocab_size": 151655}, "img_context_token_id = 151655 is outside the vocabulary"),
        ({"text_decoder__rope_scaling": {"mrope_section": [24, 20, 20]}}, "differs from rope_scaling.mrope_section"),
        (
            {"image_encoder__vision_encoder__num_attention_heads": 15},
            "is not num_attention_heads * head size = 15 * 85",
        ),
        ({"image_encoder__vision_encoder__canonical_model": True}, "canonical_model = true is not supported"),
        (
            {"image_encoder__vision_encoder__spatial_merge_size": 3},
            "3 x 3 merged patches of width 1280 have 11520 values",
        ),
        ({"image_encoder__vision_projector__input_size": 1024}, "but vision_encoder.hidden_size = 1280"),
        ({"video_encoder": {}}, "video_encoder must be null"),
        ({"model_id": "qwen3vl"}, "model_id = \"qwen3vl\" is not supported; expected 'qwen2vl'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_model_that_does_not_fit_together_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in problem for problem in problems_of(**changes)), problems_of(**changes)


def test_a_text_only_model_has_no_vision_layers() -> None:
    content = read_json(FILES / "model_7b.json")
    content["image_encoder"] = None
    assert parse_settings(Qwen2VLConfig, content, where="model.json").vision_layers == 0


def test_both_generations_of_hub_files_give_the_same_model() -> None:
    model = Qwen2VLConfig.from_hf(HUB_7B)
    assert model == Qwen2VLConfig.from_hf(nested(HUB_7B))
    shipped = load_settings(Qwen2VLConfig, FILES / "model_7b.json")
    ours, theirs = (json.loads(config.model_dump_json()) for config in (model, shipped))
    how = {"pipeline_num_layers", "bf16", "fp16", "params_dtype", "init_method_std", "use_fused_rotary_pos_emb"}

    def structure(value: Any) -> Any:
        return {k: structure(v) for k, v in value.items() if k not in how} if isinstance(value, dict) else value

    assert structure(ours) == structure(theirs)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "qwen2_5_vl"}, 'model_type = "qwen2_5_vl", expected "qwen2_vl"'),
        ({"use_sliding_window": True}, "use_sliding_window = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu" is not supported'),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [16, 24, 24]}}, 'rope_scaling of type "yarn"'),
        ({"rope_scaling": None}, "mrope_section is missing"),
        ({"vision_config": HUB_7B["vision_config"] | {"hidden_act": "silu"}}, 'vision_config.hidden_act = "silu"'),
    ],
)
def test_a_hub_model_with_another_structure_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Qwen2VLConfig.from_hf(copy.deepcopy(HUB_7B) | change)
    assert expected in str(caught.value)


def test_every_setting_has_a_docstring() -> None:
    from mindspeed_mm.config.flags import SECTIONS

    def check(cls: type[BaseModel]) -> None:
        for name, field in cls.model_fields.items():
            annotation = field.annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                check(annotation)
            assert field.description or name in ("vision_encoder", "vision_projector"), f"{cls.__name__}.{name}"

    for section in (Qwen2VLConfig, *SECTIONS.values()):
        check(section)
