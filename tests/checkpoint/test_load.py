"""Reading one rank's weights from either kind of checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.convert import hf_to_mm
from checkpoint.load import read_stage, recognise
from checkpoint.stores.hf import read_model_config
from mindspeed_mm.errors import CheckpointError
from tests.checkpoint.samples import LAYOUTS, assert_same_tensors, layout_plan


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_both_routes_give_the_same_weights(
    name: str, tied: bool, hf_tied: Path, hf_untied: Path, tmp_path: Path
) -> None:
    directory = hf_tied if tied else hf_untied
    plan, model = layout_plan(name, directory), read_model_config(directory)
    hf_to_mm(directory, tmp_path / "mm", plan)
    for stage in plan.stages:
        for tp_rank in range(plan.tp_size):
            ours = read_stage(directory, model, plan, stage, tp_rank)
            assert_same_tensors(ours, read_stage(tmp_path / "mm", model, plan, stage, tp_rank))
            assert all(tensor.dtype == torch.bfloat16 and tensor.is_contiguous() for tensor in ours.values())


def test_a_rank_reads_only_its_own_bytes(hf_tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        count = preadv(descriptor, buffers, offset)
        read += count
        return count

    plan, model = layout_plan("tp2_pp3_vision_on_two", hf_tied), read_model_config(hf_tied)
    monkeypatch.setattr(os, "preadv", counting)
    tensors = read_stage(hf_tied, model, plan, plan.at(1), 0)
    wanted = sum(tensor.nbytes for tensor in tensors.values())
    # Column slices of row-split weights are read with the gaps between them.
    assert wanted <= read < 1.5 * wanted


def test_another_plan_is_refused_with_the_first_difference(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp2", hf_tied))
    plan = layout_plan("tp1_pp2_text_last", hf_tied)
    with pytest.raises(CheckpointError, match=r"text layers of pp_rank 0, vp_stage 0: 0-0, -.*\n.*resplit"):
        read_stage(tmp_path / "mm", read_model_config(hf_tied), plan, plan.at(0), 0)


def test_a_checkpoint_without_a_plan_is_compared_by_names(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp2", hf_tied))
    (tmp_path / "mm" / "release" / "stage_plan.json").unlink()
    model = read_model_config(hf_tied)
    plan = layout_plan("tp1_pp2", hf_tied)
    assert read_stage(tmp_path / "mm", model, plan, plan.at(1), 0)
    other = layout_plan("tp1_pp2_text_last", hf_tied)
    with pytest.raises(CheckpointError, match=r"layers\.5\.input_layernorm\.weight is missing"):
        read_stage(tmp_path / "mm", model, other, other.at(1), 0)


def test_a_directory_is_recognised_by_its_content(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp1", hf_tied))
    assert recognise(hf_tied) == "hf"
    assert recognise(tmp_path / "mm") == "mm"
    (tmp_path / "mm" / "latest_checkpointed_iteration.txt").unlink()
    assert recognise(tmp_path / "mm") == "mm"
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "empty", "holds no checkpoint"), (tmp_path / "nowhere", "is not a directory")):
        with pytest.raises(CheckpointError, match=words):
            recognise(path)
    shutil.copytree(hf_tied, tmp_path / "mm", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="at once"):
        recognise(tmp_path / "mm")
