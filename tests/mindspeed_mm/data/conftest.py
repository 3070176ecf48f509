"""A tiny checkpoint directory, its tokenizer, and pictures to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.config.base import parse_settings
from mindspeed_mm.config.data import DataConfig, PreprocessParameters
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.data.template import Qwen2VLTemplate
from mindspeed_mm.data.tokenizer import TextTokenizer
from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), tied=False, seed=0, size="nano")


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> TextTokenizer:
    return TextTokenizer.from_directory(PreprocessParameters(model_name_or_path=str(checkpoint)))


@pytest.fixture(scope="session")
def template(tokenizer: TextTokenizer) -> Qwen2VLTemplate:
    return Qwen2VLTemplate(tokenizer, merge_size=2)


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Qwen2VLConfig:
    return Qwen2VLConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A directory with pictures `0.png` (56x56), `1.png` (84x56), `2.png` (56x112)."""
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate([(56, 56), (84, 56), (56, 112)]):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture
def data_config(checkpoint: Path, data_dir: Path) -> Callable[..., DataConfig]:
    """Makes data settings for records, in the form of the shipped files."""

    def make(
        records: list[dict[str, Any]], *, loader: dict[str, Any] | None = None, attr: Any = None, **basic: Any
    ) -> Any:
        file = data_dir / "records.json"
        file.write_text(json.dumps(records))
        tags = {"messages": "messages", "role_tag": "role", "content_tag": "content", "user_tag": "user"}
        content = {
            "dataset_param": {
                "dataset_type": "huggingface",
                "preprocess_parameters": {"model_name_or_path": str(checkpoint), "image_min_pixels": 0},
                "basic_parameters": {"dataset": str(file), "dataset_dir": str(data_dir)} | basic,
                "attr": tags | {"assistant_tag": "assistant", "images": "images"} | (attr or {}),
            },
            "dataloader_param": {"collate_param": {"model_name": "qwen2vl"}, "pin_memory": False} | (loader or {}),
        }
        return parse_settings(DataConfig, content, where="data.json")

    return make
