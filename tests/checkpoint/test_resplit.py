"""MM shards cut another way."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.plans import UNSAID, Cut
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.storage.shard import read_shard
from tests.checkpoint.samples import LAYOUTS, layout_plan, same_trees

PAIRS = [("tp1_pp1", name) for name in LAYOUTS] + list(itertools.permutations(list(LAYOUTS)[1:], 2))[::4]


def cut(name: str) -> Cut:
    return Cut(*LAYOUTS[name])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_a_resplit_is_what_a_direct_conversion_gives(
    old: str, new: str, tied: bool, hf_tied: Path, hf_untied: Path, tmp_path: Path
) -> None:
    directory = hf_tied if tied else hf_untied
    hf_to_mm(directory, tmp_path / "old", layout_plan(old, directory))
    hf_to_mm(directory, tmp_path / "direct", layout_plan(new, directory))
    resplit(tmp_path / "old", tmp_path / "new", UNSAID, cut(new))
    same_trees(tmp_path / "new", tmp_path / "direct")
    resplit(tmp_path / "new", tmp_path / "again", UNSAID, cut(old))
    same_trees(tmp_path / "again", tmp_path / "old")


@pytest.mark.parametrize("name", ["tp2_pp3_vision_on_two", "tp1_pp2_vp3", "tp1_pp1"])
@pytest.mark.parametrize("is_flat", [True, False])
def test_shards_of_other_projects_are_described_by_lists(
    name: str, is_flat: bool, hf_tied: Path, tmp_path: Path
) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan(name, hf_tied))
    for extra in ("stage_plan.json", "manifest.json"):
        (tmp_path / "old" / "release" / extra).unlink()
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("release\n")
    vision, text, tp_size = LAYOUTS[name]
    described = (
        Cut(list(itertools.chain(*vision)), list(itertools.chain(*text)), tp_size)
        if is_flat
        else Cut(vision, text, tp_size)
    )
    resplit(tmp_path / "old", tmp_path / "new", described, cut("tp2_pp1"))
    hf_to_mm(hf_tied, tmp_path / "direct", layout_plan("tp2_pp1", hf_tied))
    same_trees(tmp_path / "new", tmp_path / "direct")
    mm_to_hf(tmp_path / "old", hf_tied, tmp_path / "back", described)
    same_trees(tmp_path / "back", hf_tied)


def test_a_head_that_other_resplits_left_out_or_left_over_is_put_right(hf_tied: Path, tmp_path: Path) -> None:
    head = "text_decoder.output_layer.weight"
    for name, rank, has_head in (("tp1_pp2", "mp_rank_00_001", False), ("tp1_pp1", "mp_rank_00", True)):
        hf_to_mm(hf_tied, tmp_path / name, layout_plan(name, hf_tied))
        path = tmp_path / name / "release" / rank / "model_optim_rng.pt"
        content = read_shard(path, mmap=False)
        if has_head:
            content["model"][head] = content["model"]["text_decoder.embedding.word_embeddings.weight"].clone()
        else:
            del content["model"][head]
        torch.save(content, path)
        resplit(tmp_path / name, tmp_path / f"{name}_new", UNSAID, cut("tp2_pp3_vision_on_two"))
        hf_to_mm(hf_tied, tmp_path / f"{name}_direct", layout_plan("tp2_pp3_vision_on_two", hf_tied))
        same_trees(tmp_path / f"{name}_new", tmp_path / f"{name}_direct")


def test_lists_that_disagree_with_the_saved_plan_are_refused(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp2", hf_tied))
    with pytest.raises(ConfigError) as caught:
        resplit(tmp_path / "old", tmp_path / "new", Cut([3, 1], [1, 5], 2), cut("tp1_pp1"))
    text = str(caught.value)
    assert "vit_pp_layers = [3, 1], but the checkpoint was written with [[4, 0]]" in text
    assert "tp_size = 2, but the checkpoint was written with 1" in text
    assert "llm" not in text


def test_another_number_of_layers_is_refused_with_both_numbers(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp2", hf_tied))
    with pytest.raises(ConfigError, match=r"vit_pp_layers = \[4, 1\] adds up to 5, but num_layers = 4"):
        resplit(tmp_path / "old", tmp_path / "new", UNSAID, Cut([4, 1], [1, 5]))


def test_more_ranks_than_key_value_heads_are_refused(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp1", hf_tied))
    with pytest.raises(ConfigError, match=r"key-value heads \(2\) must be divisible by TP size \(4\)"):
        resplit(tmp_path / "old", tmp_path / "new", UNSAID, Cut([4], [6], 4))
    assert not (tmp_path / "new").exists()


def test_without_a_plan_the_lists_are_required(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp1", hf_tied))
    (tmp_path / "old" / "release" / "stage_plan.json").unlink()
    with pytest.raises(ConfigError, match="its layout must be said"):
        resplit(tmp_path / "old", tmp_path / "new", UNSAID, cut("tp1_pp2"))


def test_a_given_iteration_is_read(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp1", hf_tied))
    shutil.copytree(tmp_path / "old" / "release", tmp_path / "old" / "iter_0000020")
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("20")
    resplit(tmp_path / "old", tmp_path / "new", UNSAID, cut("tp1_pp2"), iteration="release")
    assert (tmp_path / "new" / "release").is_dir()
    resplit(tmp_path / "old", tmp_path / "by_tracker", UNSAID, cut("tp1_pp2"))
    assert (tmp_path / "by_tracker" / "iter_0000020").is_dir()
    assert (tmp_path / "by_tracker" / "latest_checkpointed_iteration.txt").read_text() == "20"
    with pytest.raises(CheckpointError, match="has no iteration 30; there are: release, 20"):
        resplit(tmp_path / "old", tmp_path / "x", UNSAID, cut("tp1_pp2"), iteration=30)


def test_an_unusable_tracker_is_made_up_for_where_there_is_no_choice(
    hf_tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp1_pp1", hf_tied))
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("abc")
    resplit(tmp_path / "old", tmp_path / "new", UNSAID, cut("tp1_pp2"))
    assert "Taking the only iteration that is there: release" in caplog.text
    shutil.copytree(tmp_path / "old" / "release", tmp_path / "old" / "iter_0000020")
    with pytest.raises(CheckpointError, match="Several iterations are there"):
        resplit(tmp_path / "old", tmp_path / "x", UNSAID, cut("tp1_pp2"))


def test_copies_that_differ_are_refused(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "old", layout_plan("tp2_pp1", hf_tied))
    path = tmp_path / "old" / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = read_shard(path, mmap=False)
    content["model"]["text_decoder.decoder.final_layernorm.weight"][3] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"final_layernorm\.weight: mp_rank_00 and mp_rank_01 differ at byte 6"):
        resplit(tmp_path / "old", tmp_path / "new", UNSAID, cut("tp1_pp1"))
