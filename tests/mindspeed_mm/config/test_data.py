from __future__ import annotations

from typing import Any

import pytest

from mindspeed_mm.config import DataConfig, ToolConfig, load_settings, parse_settings, read_json
from mindspeed_mm.errors import ConfigError

from .launch import FILES


@pytest.mark.parametrize("name", ["2b", "7b", "72b", "72b_video", "72b_dpo", "7b_dpo"])
def test_files_of_release_26_load_unchanged(name: str) -> None:
    notes: list[str] = []
    data = load_settings(DataConfig, FILES / f"data_{name}.json", notes)
    assert data.dataset_param.attr.ranking == name.endswith("dpo")
    assert data.dataset_param.attr.videos == ("videos" if name.endswith("video") else None)
    assert data.dataset_param.preprocess_parameters.image_max_pixels == 262144
    assert data.dataloader_param.collate_param.model_name == ("qwen2vl_dpo" if name.endswith("dpo") else "qwen2vl")
    assert len(notes) == 1
    assert "basic_parameters.cache_dir (data is read lazily" in notes[0]


def test_absent_keys_have_the_documented_defaults() -> None:
    data = parse_settings(
        DataConfig,
        {
            "dataset_param": {
                "dataset_type": "huggingface",
                "preprocess_parameters": {"model_name_or_path": "hf"},
                "basic_parameters": {"dataset": "a.json, b.json"},
            },
            "dataloader_param": {"collate_param": {"model_name": "qwen2vl"}},
        },
        where="data.json",
    )
    sizes = data.dataset_param.preprocess_parameters
    assert (sizes.image_max_pixels, sizes.image_min_pixels) == (589824, 1024)
    assert (sizes.video_max_pixels, sizes.video_min_pixels) == (65536, 256)
    assert (sizes.video_fps, sizes.video_maxlen) == (2.0, 128)
    assert data.dataset_param.basic_parameters.dataset_files == ("a.json", "b.json")
    assert data.dataset_param.basic_parameters.val_dataset_files == ()
    assert (data.dataset_param.attr.messages, data.dataset_param.attr.role_tag) == ("conversations", "from")


BASIC, LOADER = "dataset_param.basic_parameters", "dataloader_param"


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        (BASIC, {"cutoff_len": 1024}, "basic_parameters.cutoff_len is deprecated; use `--seq-length` instead."),
        (BASIC, {"dataset": "a.json,,b.json"}, "has an empty entry between its commas."),
        (BASIC, {"val_dataset": "v.json", "val_rate": 0.1}, "val_dataset and val_rate exclude each other."),
        (BASIC, {"mask_histori": True}, "mask_histori is not a setting; did you mean mask_history?"),
        (LOADER, {"num_workers": 4}, "dataloader_param.num_workers is not set in this file; use `--num-workers`."),
        (LOADER, {"sampler_type": "RandomSampler"}, 'sampler_type = "RandomSampler" is not supported'),
        ("dataset_param.preprocess_parameters", {"image_min_pixels": 10**6}, "is greater than image_max_pixels"),
        ("dataset_param.attr", {"formatting": "multimodal_tool"}, 'formatting = "multimodal_tool" is not supported'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_data_file_is_refused(section: str, change: dict[str, Any], expected: str) -> None:
    content = read_json(FILES / "data_7b.json")
    target = content
    for part in section.split("."):
        target = target[part]
    target.update(change)
    with pytest.raises(ConfigError) as caught:
        parse_settings(DataConfig, content, where="data.json")
    assert expected in str(caught.value)


def test_the_tools_file_of_release_26_loads_unchanged() -> None:
    notes: list[str] = []
    tool = load_settings(ToolConfig, FILES / "tools.json", notes)
    assert tool == ToolConfig()
    assert len(notes) == 1
    assert "sorafeature" in notes[0]


def test_a_profile_must_last_a_step() -> None:
    with pytest.raises(ConfigError, match="end_step = 10 should be greater than start_step = 10"):
        parse_settings(ToolConfig, {"profile": {"static_param": {"end_step": 10}}}, where="tools.json")
