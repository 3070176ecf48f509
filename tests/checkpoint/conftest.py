"""Small Qwen2-VL checkpoints, made once per test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.samples import write_hf


@pytest.fixture(scope="session")
def hf_tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model in two bfloat16 files with an index, under the hub's names."""
    return write_hf(tmp_path_factory.mktemp("hf") / "tied", tied=True)


@pytest.fixture(scope="session")
def hf_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model in one file without an index."""
    return write_hf(tmp_path_factory.mktemp("hf") / "untied", tied=False, num_shards=1)


@pytest.fixture(scope="session")
def hf_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model as the installed transformers saves it: nested config.json."""
    from transformers import Qwen2VLForConditionalGeneration

    hub = write_hf(tmp_path_factory.mktemp("hf") / "hub", tied=True, dtype="float32")
    model = Qwen2VLForConditionalGeneration.from_pretrained(hub)
    saved = tmp_path_factory.mktemp("hf") / "saved"
    model.save_pretrained(saved)
    return saved
