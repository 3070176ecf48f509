"""The rules name exactly what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path

from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import HfStore, read_model_config
from tests.checkpoint.samples import TEXT_LAYERS, VISION_LAYERS


def test_rule_names_are_the_names_of_the_checkpoint(hf_tied: Path, hf_untied: Path) -> None:
    for directory, head in ((hf_tied, 0), (hf_untied, 1)):
        rules = qwen2vl_rules(read_model_config(directory))
        names = [name for weight in rules.weights for name in weight.hf]
        assert sorted(names) == sorted(HfStore.open(directory).tensors)
        assert len(names) == 1 + 12 * VISION_LAYERS + 6 + 1 + 12 * TEXT_LAYERS + 1 + head
        assert len(rules.weights) == 1 + 12 * VISION_LAYERS + 6 + 1 + 7 * TEXT_LAYERS + 1 + head


def test_rule_shapes_are_the_shapes_of_the_checkpoint(hf_untied: Path) -> None:
    HfStore.open(hf_untied).check(qwen2vl_rules(read_model_config(hf_untied)))
