"""Hugging Face to MM and back: the layout on disk, and nothing changed on the way."""

from __future__ import annotations

import argparse
import enum
import json
import stat
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.job import Options
from checkpoint.plans import Cut
from checkpoint.rules.qwen2vl import qwen2vl_rules
from checkpoint.stores.hf import INDEX_FILE, read_model_config
from checkpoint.verify import Subject, verify
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.storage.layout import read_tracker
from mindspeed_mm.storage.manifest import check_manifest
from mindspeed_mm.storage.pickle_tree import Global
from mindspeed_mm.storage.shard import index_shard, read_shard
from tests.checkpoint.samples import (
    LAYOUTS,
    assert_same_tensors,
    edit_json,
    layout_plan,
    read_tensors,
    rewrite_tensors,
    same_trees,
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_round_trip_changes_no_byte_of_a_tied_model(name: str, hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan(name, hf_tied))
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back")
    same_trees(hf_tied, tmp_path / "back")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_round_trip_changes_no_byte_of_an_untied_model(name: str, hf_untied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_untied, tmp_path / "mm", layout_plan(name, hf_untied))
    mm_to_hf(tmp_path / "mm", hf_untied, tmp_path / "back")
    same_trees(hf_untied, tmp_path / "back")


@pytest.mark.parametrize("name", LAYOUTS)
def test_torch_loads_the_shards_that_the_rules_describe(name: str, hf_tied: Path, tmp_path: Path) -> None:
    plan = layout_plan(name, hf_tied)
    hf_to_mm(hf_tied, tmp_path / "mm", plan)
    rules, tensors = qwen2vl_rules(read_model_config(hf_tied)), read_tensors(hf_tied)
    for stage in plan.stages:
        for tp_rank in range(plan.tp_size):
            suffix = f"_{stage.pp_rank:03d}" if plan.pp_size > 1 else ""
            path = tmp_path / "mm" / "release" / f"mp_rank_{tp_rank:02d}{suffix}" / "model_optim_rng.pt"
            content = torch.load(path, weights_only=True)
            assert content["checkpoint_version"] == 3.0
            keys = {f"model{number}" for number in range(plan.vp_size)} if plan.vp_size > 1 else {"model"}
            assert content.keys() == keys | {"checkpoint_version"}
            expected = {
                name: rule.tp.shard(rule.pack.join([tensors[hf] for hf in rule.hf_names(layer)]), plan.tp_size)[tp_rank]
                for rule, layer, name in rules.for_stage(plan, stage)
            }
            assert_same_tensors(content[f"model{stage.vp_stage}" if plan.vp_size > 1 else "model"], expected)


def test_every_shard_is_a_sound_zip_file(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp2_vp2", hf_tied))
    shards = list((tmp_path / "mm").rglob("*.pt"))
    assert len(shards) == 4
    for path in shards:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def test_names_modes_and_tracker_are_those_of_the_layout(hf_tied: Path, tmp_path: Path) -> None:
    root = tmp_path / "mm"
    hf_to_mm(hf_tied, root, layout_plan("tp2_pp3_vision_on_two", hf_tied))
    assert (root / "latest_checkpointed_iteration.txt").read_bytes() == b"release"
    assert read_tracker(root) == "release"
    folders = sorted(path.name for path in (root / "release").iterdir() if path.is_dir())
    assert folders == [f"mp_rank_{tp:02d}_{pp:03d}" for tp in range(2) for pp in range(3)]
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    check_manifest(root / "release")
    saved = StagePlan.from_json((root / "release" / "stage_plan.json").read_text())
    assert saved == layout_plan("tp2_pp3_vision_on_two", hf_tied)


def test_a_tied_head_is_written_only_where_another_stage_holds_the_embedding(hf_tied: Path, tmp_path: Path) -> None:
    head = "text_decoder.output_layer.weight"
    for name, last, is_there in (("tp1_pp1", "mp_rank_00", False), ("tp1_pp2", "mp_rank_00_001", True)):
        hf_to_mm(hf_tied, tmp_path / name, layout_plan(name, hf_tied))
        model = torch.load(tmp_path / name / "release" / last / "model_optim_rng.pt", weights_only=True)["model"]
        assert (head in model) == is_there
        if is_there:
            assert torch.equal(model[head], read_tensors(hf_tied)["model.embed_tokens.weight"])


def test_what_transformers_saves_is_read_and_transformers_reads_what_comes_back(
    hf_transformers: Path, tmp_path: Path
) -> None:
    from transformers import Qwen2VLForConditionalGeneration

    hf_to_mm(hf_transformers, tmp_path / "mm", layout_plan("tp2_pp2_vp2", hf_transformers))
    mm_to_hf(tmp_path / "mm", hf_transformers, tmp_path / "back")
    model, info = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = Qwen2VLForConditionalGeneration.from_pretrained(hf_transformers)
    assert_same_tensors(model.state_dict(), original.state_dict())


def test_names_of_newer_transformers_are_read_and_hub_names_are_written(hf_tied: Path, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)

    newer = rewrite_tensors(hf_tied, tmp_path / "newer", lambda found: {rename(name): found[name] for name in found})
    hf_to_mm(newer, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied))
    mm_to_hf(tmp_path / "mm", newer, tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_tied))


def test_a_tied_model_that_also_stores_its_head_keeps_it(hf_tied: Path, tmp_path: Path) -> None:
    double = rewrite_tensors(
        hf_tied,
        tmp_path / "double",
        lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()},
    )
    hf_to_mm(double, tmp_path / "mm", layout_plan("tp1_pp2", hf_tied))
    mm_to_hf(tmp_path / "mm", double, tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(double))


def test_weight_files_of_a_chosen_size(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp1", hf_tied))
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back", max_shard_bytes=200_000)
    files = sorted(tmp_path.glob("back/*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(path.stat().st_size < 220_000 for path in files)
    index = json.loads((tmp_path / "back" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(hf_tied).values())
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_tied))


def test_only_the_vision_side_is_written_on_request(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp2", hf_tied), vision_only=True)
    names = [name for path in (tmp_path / "mm").rglob("*.pt") for name in torch.load(path, weights_only=True)["model"]]
    assert names
    assert all(name.startswith("image_encoder.") for name in names)


def test_vision_rows_of_release_2_3_are_put_in_order_on_request(hf_tied: Path, tmp_path: Path) -> None:
    plan = layout_plan("tp1_pp1", hf_tied)
    hf_to_mm(hf_tied, tmp_path / "mm", plan)
    path = tmp_path / "mm" / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content, tensors = torch.load(path, weights_only=True), read_tensors(hf_tied)
    for layer in range(plan.vision_layers):
        for kind in ("weight", "bias"):
            name = f"image_encoder.encoder.blocks.layers.{layer}.self_attention.linear_qkv.{kind}"
            content["model"][name] = tensors[f"visual.blocks.{layer}.attn.qkv.{kind}"]
    torch.save(content, path)
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back", is_vit_qkv_in_hf_order=True)
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "unasked")
    assert not torch.equal(
        read_tensors(tmp_path / "unasked")["visual.blocks.0.attn.qkv.weight"],
        tensors["visual.blocks.0.attn.qkv.weight"],
    )


def test_overwriting_needs_permission_and_then_replaces_everything(hf_tied: Path, tmp_path: Path) -> None:
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp1", hf_tied))
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp1_pp1", hf_tied), options=Options(overwrite=True))
    assert [path.name for path in (tmp_path / "mm" / "release").iterdir() if path.is_dir()] == ["mp_rank_00"]
    assert [path.name for path in tmp_path.iterdir()] == ["mm"]


def test_the_index_is_written_anew_where_the_sizes_differ(hf_tied: Path, tmp_path: Path) -> None:
    wide = rewrite_tensors(hf_tied, tmp_path / "wide", lambda found: {name: t.float() for name, t in found.items()})
    edit_json(wide / "config.json", torch_dtype="float32")
    hf_to_mm(wide, tmp_path / "mm", layout_plan("tp1_pp1", hf_tied))
    mm_to_hf(tmp_path / "mm", hf_tied, tmp_path / "back")
    index = json.loads((tmp_path / "back" / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(wide).values())
    assert index["weight_map"] == json.loads((hf_tied / INDEX_FILE).read_text())["weight_map"]
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(wide))


def test_a_training_save_of_another_project_is_read(hf_tied: Path, tmp_path: Path) -> None:
    """Arguments whose classes do not exist here, `_extra_state` entries, weights that are views of one buffer."""
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp2_vp2", hf_tied))
    root = tmp_path / "foreign"
    module = types.ModuleType("megatron_enums")
    module.AttnBackend = enum.Enum("AttnBackend", {"flash": 1}, module="megatron_enums")
    module.ConfigReader = type("ConfigReader", (), {"__module__": "megatron_enums"})
    reader = module.ConfigReader()
    reader.layers, reader.backend, reader.dtype = [1, [2]], module.AttnBackend.flash, torch.bfloat16
    sys.modules[module.__name__] = module
    try:
        for path in (tmp_path / "mm" / "release").glob("*/model_optim_rng.pt"):
            content = torch.load(path, weights_only=True)
            for chunk in ("model0", "model1"):
                buffer = torch.cat([tensor.flatten() for tensor in content[chunk].values()])
                start, views = 0, OrderedDict()
                for name, tensor in content[chunk].items():
                    views[name] = torch.nn.Parameter(buffer[start : start + tensor.numel()].view(tensor.shape))
                    start += tensor.numel()
                    if name.endswith("linear_fc1.weight"):
                        views[name.replace("weight", "_extra_state")] = None
                content[chunk] = views
            content |= {
                "args": argparse.Namespace(mm=reader, num_query_groups=2, tensor_model_parallel_size=2),
                "iteration": 10,
                "rerun_state_machine": {"mode": module.AttnBackend.flash},
                "rng_state": [{"np_rng_state": np.random.get_state(), "torch_rng_state": torch.get_rng_state()}],
            }
            target = root / "iter_0000010" / path.parent.name / path.name
            target.parent.mkdir(parents=True)
            torch.save(content, target)
    finally:
        del sys.modules[module.__name__]
    (root / "latest_checkpointed_iteration.txt").write_text("10\n")
    cut = Cut([[2, 2], [0, 0]], [[0, 1], [2, 3]], 2)
    mm_to_hf(root, hf_tied, tmp_path / "back", cut)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(hf_tied))
    resplit(root, tmp_path / "new", cut, Cut([4, 0], [1, 5], 1))
    assert verify(Subject(hf_tied), Subject(tmp_path / "new")).is_same
    # What cannot be understood is carried along as it is, with the new sizes.
    kept = index_shard(tmp_path / "new" / "iter_0000010" / "mp_rank_00_001" / "model_optim_rng.pt")
    args = kept.tree["args"].attributes()
    assert args["tensor_model_parallel_size"] == 1
    assert args["mm"].target == Global("megatron_enums", "ConfigReader")
    assert args["mm"].attributes()["layers"] == [1, [2]]
    assert read_shard(kept.path)["iteration"] == 10
