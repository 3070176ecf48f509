"""Two checkpoints hold the same weights, or the first difference is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.convert import hf_to_mm
from checkpoint.job import Options
from checkpoint.plans import Cut
from checkpoint.verify import Subject, verify
from mindspeed_mm.errors import CheckpointError, ConfigError
from tests.checkpoint.samples import LAYOUTS, layout_plan, rewrite_tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_conversion_holds_the_same_weights(name: str, hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan(name, hf_tied))
    hf_to_mm(hf_tied, tmp_path / "one", layout_plan("tp1_pp1", hf_tied))
    hf, mm, one = Subject(hf_tied), Subject(tmp_path / "mm"), Subject(tmp_path / "one")
    for first, second in ((hf, mm), (mm, hf), (mm, one), (one, mm), (hf, hf)):
        comparison = verify(first, second)
        assert comparison.is_same, comparison.first
        assert sum(group.tensors for group in comparison.groups) == 99


def test_the_first_difference_is_named_and_the_largest_of_each_group_shown(hf_untied: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer, value in ((1, 0.5), (3, 2.0)):
            tensors[f"model.layers.{layer}.self_attn.k_proj.weight"][5, 7] = value
        tensors["lm_head.weight"][0, 0] = 0.0
        return tensors

    other = rewrite_tensors(hf_untied, tmp_path / "other", change)
    hf_to_mm(other, tmp_path / "mm", layout_plan("tp2_pp2_vp2", hf_untied))
    comparison = verify(Subject(hf_untied), Subject(tmp_path / "mm"))
    assert not comparison.is_same
    assert comparison.first is not None
    assert comparison.first.startswith(
        "text_decoder.decoder.layers.1.self_attention.linear_qkv.weight: values differ by up to 0."
    )
    groups = {group.name: group for group in comparison.groups if group.different}
    assert groups.keys() == {
        "text_decoder.decoder.layers.*.self_attention.linear_qkv.weight",
        "text_decoder.output_layer.weight",
    }
    qkv = groups["text_decoder.decoder.layers.*.self_attention.linear_qkv.weight"]
    assert (qkv.tensors, qkv.different) == (6, 2)
    assert 1.5 < qkv.largest < 2.5
    assert "linear_qkv.weight" in comparison.table()


def test_another_dtype_is_a_difference(hf_tied: Path, tmp_path: Path) -> None:
    wide = rewrite_tensors(hf_tied, tmp_path / "wide", lambda found: {name: t.float() for name, t in found.items()})
    comparison = verify(Subject(hf_tied), Subject(wide))
    assert comparison.first == "image_encoder.encoder.patch_embed.proj.weight: dtypes bfloat16 and float32"


def test_nan_is_equal_to_itself_and_different_from_numbers(hf_tied: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.norm.weight"][0] = torch.nan
        return tensors

    other = rewrite_tensors(hf_tied, tmp_path / "other", spoil)
    assert verify(Subject(other), Subject(other)).is_same
    comparison = verify(Subject(hf_tied), Subject(other))
    assert comparison.first == "text_decoder.decoder.final_layernorm.weight: values differ by up to nan"


def test_models_of_other_sizes_are_not_compared(hf_tied: Path, hf_untied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_untied, tmp_path / "mm", layout_plan("tp1_pp1", hf_untied))
    with pytest.raises(ConfigError, match=r"tied output head|tie_word_embeddings"):
        verify(Subject(hf_tied), Subject(tmp_path / "mm"))


def test_hashes_are_compared_on_request(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp1", hf_tied))
    hf_to_mm(hf_tied, tmp_path / "two", layout_plan("tp2_pp1", hf_tied))
    mm, two = Subject(tmp_path / "mm"), Subject(tmp_path / "two")
    assert verify(mm, two, Options(check_hashes=True)).is_same
    folder = tmp_path / "two" / "release"
    shutil.move(folder / "mp_rank_00", folder / "x")
    shutil.move(folder / "mp_rank_01", folder / "mp_rank_00")
    shutil.move(folder / "x", folder / "mp_rank_01")
    with pytest.raises(CheckpointError, match=r"mp_rank_00/model_optim_rng\.pt has another content"):
        verify(mm, two, Options(check_hashes=True))
    assert not verify(mm, two).is_same


def test_shards_without_a_plan_need_lists(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp2", hf_tied))
    (tmp_path / "mm" / "release" / "stage_plan.json").unlink()
    with pytest.raises(ConfigError, match="its layout must be said"):
        verify(Subject(hf_tied), Subject(tmp_path / "mm"))
    assert verify(Subject(hf_tied), Subject(tmp_path / "mm", Cut([4, 0], [1, 5]))).is_same
