from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.config import DataConfig, ParallelConfig, Qwen2VLConfig, ToolConfig, load_settings, read_json
from mindspeed_mm.plan import StagePlan, check_trainable
from tools.model_json import to_json_text

FAMILY = Path(__file__).parents[2] / "configs" / "qwen2vl"
RELEASED = Path(__file__).parents[1] / "mindspeed_mm" / "config" / "files_26_0_0"

LAYOUTS = {"2b": (1, 1), "7b": (1, 4), "72b": (2, 8), "tiny": (1, 2)}
"""Tensor and pipeline size that the lists of each model.json are written for."""


def test_every_file_is_known() -> None:
    assert sorted(path.name for path in FAMILY.iterdir() if path.is_dir()) == sorted(LAYOUTS)
    names = {path.name for path in FAMILY.rglob("*") if path.is_file()}
    assert names == {"model.json", "data.json", "tools.json", "README.md"}


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_shipped_model_loads_without_a_remark_and_plans(size: str) -> None:
    notes: list[str] = []
    model = load_settings(Qwen2VLConfig, FAMILY / size / "model.json", notes)
    assert notes == []
    tp_size, pp_size = LAYOUTS[size]
    plan = StagePlan.build(model, ParallelConfig(tp_size=tp_size, pp_size=pp_size, world_size=tp_size * pp_size))
    check_trainable(model, plan, enable_dummy_optimizer=False)
    assert len(plan.stages) == pp_size


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_shipped_data_file_loads_without_a_remark(size: str) -> None:
    notes: list[str] = []
    load_settings(DataConfig, FAMILY / size / "data.json", notes)
    assert notes == []


def test_the_shipped_tools_file_holds_the_defaults() -> None:
    assert load_settings(ToolConfig, FAMILY / "tools.json", []) == ToolConfig()


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_shipped_models_have_the_values_of_release_26(size: str) -> None:
    ours = load_settings(Qwen2VLConfig, FAMILY / size / "model.json")
    theirs = load_settings(Qwen2VLConfig, RELEASED / f"model_{size}.json", [])
    # those files also name the precision, which the command line decides here
    precision = {"bf16", "fp16", "params_dtype"}
    assert theirs.image_encoder is not None
    exclude = {
        "text_decoder": precision,
        "image_encoder": {"vision_encoder": precision, "vision_projector": precision},
    }
    assert ours.model_dump(exclude=exclude) == theirs.model_dump(exclude=exclude)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_shipped_data_files_have_the_values_of_release_26(size: str) -> None:
    ours = load_settings(DataConfig, FAMILY / size / "data.json")
    assert ours == load_settings(DataConfig, RELEASED / f"data_{size}.json", [])


@pytest.mark.parametrize("path", sorted(FAMILY.rglob("*.json")), ids=lambda path: "-".join(path.parts[-2:]))
def test_shipped_files_have_one_form(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == to_json_text(read_json(path))
