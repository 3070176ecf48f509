"""Names and files of Hugging Face directories."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint.rules.qwen2vl import ALIASES
from checkpoint.stores.hf import HfStore, hub_name, read_weight_map
from tests.checkpoint.samples import read_tensors


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.language_model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("my.model.visual.x", "my.model.visual.x"),
    ],
)
def test_every_generation_has_the_names_of_the_hub(name: str, hub: str) -> None:
    assert hub_name(name, ALIASES) == hub


def test_links_into_a_cache_are_followed(hf_tied: Path, tmp_path: Path) -> None:
    for path in hf_tied.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert HfStore.open(tmp_path).tensors.keys() == read_tensors(hf_tied).keys()


def test_a_single_file_has_no_map(hf_untied: Path) -> None:
    assert read_weight_map(hf_untied) is None
