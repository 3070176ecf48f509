"""Adapters: peft to MM and back, and merged; the model computes the same each time."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoint.convert import hf_to_mm, mm_to_hf, resplit
from checkpoint.job import Options
from checkpoint.lora import export_adapter, import_adapter, merge
from checkpoint.plans import UNSAID, Cut
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.storage.manifest import check_manifest
from mindspeed_mm.storage.shard import read_shard
from tests.checkpoint.samples import LAYOUTS, edit_json, layout_plan, same_trees, write_hf

TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_TARGETS = r".*(self_attn\..*_proj|mlp\.(gate|up|down)_proj|attn\.(qkv|proj)|mlp\.fc[12]|merger\.mlp\.[02])"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied fp32 model."""
    return write_hf(tmp_path_factory.mktemp("base") / "hf", tied=False, dtype="float32")


def make_adapter(base: Path, path: Path, targets: list[str] | str, *, rank: int = 4) -> Path:
    """A peft directory with random adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(1)
    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(path)
    return path


def logits(base: Path, adapter: Path | None = None) -> Tensor:
    """What the model answers to fixed tokens and one picture."""
    from peft import PeftModel
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    config = json.loads((base / "config.json").read_text())
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 500, (1, 12), generator=generator)
    tokens[0, 2:8] = torch.tensor(
        [config["vision_start_token_id"], *[config["image_token_id"]] * 4, config["vision_end_token_id"]]
    )
    kinds = (tokens == config["image_token_id"]).int()
    with torch.no_grad():
        return model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=kinds,
            pixel_values=torch.randn((16, 1176), generator=generator),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        ).logits


@pytest.mark.parametrize("targets", [TEXT_TARGETS, ALL_TARGETS, ["q_proj", "v_proj"], ["down_proj"]], ids=str)
def test_an_adapter_computes_the_same_after_import_and_export_and_merged(
    targets: list[str] | str, base: Path, tmp_path: Path
) -> None:
    peft = make_adapter(base, tmp_path / "peft", targets)
    expected = logits(base, peft)
    assert (expected - logits(base)).abs().max() > 1e-2
    plan = layout_plan("tp2_pp2_vp2", base)
    import_adapter(peft, base, tmp_path / "mm_lora", plan)
    export_adapter(tmp_path / "mm_lora", base, tmp_path / "again")
    # Fused adapters hold several side by side, so sums are taken in another order: fp32 rounding only.
    torch.testing.assert_close(logits(base, tmp_path / "again"), expected, rtol=1e-4, atol=1e-5)
    hf_to_mm(base, tmp_path / "mm", plan)
    merge(tmp_path / "mm", tmp_path / "mm_lora", tmp_path / "merged")
    mm_to_hf(tmp_path / "merged", base, tmp_path / "merged_hf")
    torch.testing.assert_close(logits(tmp_path / "merged_hf"), expected, rtol=1e-4, atol=1e-5)


def test_a_shared_a_keeps_its_rank_and_every_bit(base: Path, tmp_path: Path) -> None:
    plan = layout_plan("tp2_pp1", base)
    import_adapter(make_adapter(base, tmp_path / "peft", TEXT_TARGETS), base, tmp_path / "wide", plan)
    export_adapter(tmp_path / "wide", base, tmp_path / "first")
    import_adapter(tmp_path / "first", base, tmp_path / "again", plan)
    export_adapter(tmp_path / "again", base, tmp_path / "second")
    same_trees(tmp_path / "wide", tmp_path / "again")
    same_trees(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("name", LAYOUTS)
def test_adapters_are_cut_and_merged_under_any_plan(name: str, base: Path, tmp_path: Path) -> None:
    peft = make_adapter(base, tmp_path / "peft", ALL_TARGETS)
    import_adapter(peft, base, tmp_path / "one", layout_plan("tp1_pp1", base))
    plan = layout_plan(name, base)
    import_adapter(peft, base, tmp_path / "cut", plan)
    cut = Cut(LAYOUTS[name][0], LAYOUTS[name][1], LAYOUTS[name][2])
    resplit(tmp_path / "one", tmp_path / "split", UNSAID, cut)
    for path in sorted((tmp_path / "cut").rglob("*.pt")):
        ours = read_shard(path)
        theirs = read_shard(tmp_path / "split" / path.relative_to(tmp_path / "cut"))
        for key in ours.keys() - {"args", "checkpoint_version"}:
            assert ours[key].keys() == theirs[key].keys()
            assert all(torch.equal(ours[key][name], theirs[key][name]) for name in ours[key])
    hf_to_mm(base, tmp_path / "base", plan)
    merge(tmp_path / "base", tmp_path / "one", tmp_path / "merged", alpha=10.0)
    merge(tmp_path / "base", tmp_path / "cut", tmp_path / "merged_cut", alpha=10.0)
    same_trees(tmp_path / "merged", tmp_path / "merged_cut")


def test_names_of_older_transformers_on_request(base: Path, tmp_path: Path) -> None:
    import_adapter(
        make_adapter(base, tmp_path / "peft", ["o_proj"]), base, tmp_path / "mm", layout_plan("tp1_pp1", base)
    )
    export_adapter(tmp_path / "mm", base, tmp_path / "old", has_hub_names=True)
    names = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight" in names


def test_merging_uses_alpha_and_rank_of_the_adapters(base: Path, tmp_path: Path) -> None:
    plan = layout_plan("tp1_pp1", base)
    import_adapter(make_adapter(base, tmp_path / "peft", ["o_proj"]), base, tmp_path / "lora", plan)
    hf_to_mm(base, tmp_path / "mm", plan)
    merge(tmp_path / "mm", tmp_path / "lora", tmp_path / "merged")
    model = {
        name: read_shard(tmp_path / name / "release/mp_rank_00/model_optim_rng.pt")["model"]
        for name in ("mm", "lora", "merged")
    }
    name = "text_decoder.decoder.layers.3.self_attention.linear_proj"
    product = model["lora"][f"{name}.lora_B.default.weight"] @ model["lora"][f"{name}.lora_A.default.weight"]
    assert torch.equal(model["merged"][f"{name}.weight"], model["mm"][f"{name}.weight"] + 2.0 * product)
    same = {key for key, value in model["mm"].items() if torch.equal(value, model["merged"][key])}
    assert {key for key in model["mm"] if "text_decoder" not in key or "linear_proj" not in key} == same
    with zipfile.ZipFile(tmp_path / "merged/release/mp_rank_00/model_optim_rng.pt") as archive:
        assert archive.testzip() is None
    check_manifest(tmp_path / "merged/release")


def test_what_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    plan = layout_plan("tp1_pp1", base)
    hf_to_mm(base, tmp_path / "mm", plan)
    with pytest.raises(CheckpointError, match="holds no LoRA adapters"):
        merge(tmp_path / "mm", tmp_path / "mm", tmp_path / "out")
    peft = make_adapter(base, tmp_path / "peft", ["o_proj"])
    import_adapter(peft, base, tmp_path / "lora", plan)
    with pytest.raises(ConfigError, match=r"rank \[4\], expected 8"):
        merge(tmp_path / "mm", tmp_path / "lora", tmp_path / "out", rank=8)
    edit_json(peft / "adapter_config.json", use_dora=True, rank_pattern={"x": 3})
    with pytest.raises(ConfigError, match=r"use_dora = True is not supported(.|\n)*rank_pattern"):
        import_adapter(peft, base, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_model_are_refused(base: Path, tmp_path: Path) -> None:
    from tools.make_tiny_checkpoint import TinySize, make_tiny_checkpoint

    other = make_tiny_checkpoint(
        tmp_path / "other", tied=False, seed=0, vocab_size=640, size=TinySize(32, 64, 6, 4, 2, (1, 1, 2), 32, 4, 2)
    )
    peft = make_adapter(other, tmp_path / "peft", ["o_proj"])
    with pytest.raises(CheckpointError, match="o_proj has shape"):
        import_adapter(peft, base, tmp_path / "out", layout_plan("tp1_pp1", base))
    import_adapter(peft, other, tmp_path / "lora", layout_plan("tp1_pp1", base))
    hf_to_mm(base, tmp_path / "mm", layout_plan("tp1_pp1", base))
    with pytest.raises(CheckpointError, match="belong to different models"):
        merge(tmp_path / "mm", tmp_path / "lora", tmp_path / "out", options=Options())
    assert not (tmp_path / "out").exists()
