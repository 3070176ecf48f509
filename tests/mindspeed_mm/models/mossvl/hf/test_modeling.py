"""The model beyond the golden numbers: inventory, generation, files, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.mossvl.hf import (
    MossVLConfig,
    MossVLForConditionalGeneration,
    register_auto_classes,
)
from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.visibility import masked_frames, row_chunks
from tests.mindspeed_mm.models.mossvl.golden import A, B, golden_batch, golden_config, golden_model

REPOSITORY = Path(__file__).resolve().parents[5]
CONFIGS = REPOSITORY / "configs" / "mossvl"
GROUPS = {
    "model.visual.patch_embed": (2, 885888),
    "model.visual.pos_embed": (1, 2654208),
    "model.visual.blocks": (324, 411466608),
    "model.visual.merger": (12, 415267840),
    "model.separator_token": (1, 4096),
    "model.language_model.embed_tokens": (1, 622329856),
    "model.language_model.norm": (1, 4096),
    "lm_head": (1, 622329856),
}


@pytest.fixture(scope="module")
def real_model() -> MossVLForConditionalGeneration:
    config = MossVLConfig.from_pretrained(CONFIGS / "11b" / "config.json")
    with torch.device("meta"):
        return MossVLForConditionalGeneration(config)


def test_the_real_model_has_the_published_tensors(real_model: MossVLForConditionalGeneration) -> None:
    published = json.loads((Path(__file__).parents[1] / "data" / "tensors_11b.json").read_text(encoding="utf-8"))
    ours = {name: list(tensor.shape) for name, tensor in real_model.state_dict().items()}
    assert len(published) == 895
    assert ours == published
    assert sum(parameter.numel() for parameter in real_model.parameters()) == 11_336_371_208


def test_the_groups_of_the_real_model(real_model: MossVLForConditionalGeneration) -> None:
    sizes = {name: parameter.numel() for name, parameter in real_model.named_parameters()}
    for group, expected in GROUPS.items():
        members = [size for name, size in sizes.items() if name == group or name.startswith(group + ".")]
        assert (len(members), sum(members)) == expected, group
    layers: dict[bool, list[int]] = {True: [], False: []}
    cross = real_model.config.text_config.cross_attention_layers
    for name, size in sizes.items():
        if name.startswith("model.language_model.layers."):
            layers[int(name.split(".")[3]) in cross].append(size)
    assert (len(layers[False]), sum(layers[False])) == (396, 6946071552)
    assert (len(layers[True]), sum(layers[True])) == (156, 2315357208)


def test_the_model_needs_no_megatron() -> None:
    code = "import sys, mindspeed_mm.models.mossvl.hf; print(any(m.split('.')[0] == 'megatron' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_equals_the_forward_pass(attention: str, use_cache: bool) -> None:
    model = golden_model(attention)
    batch = golden_batch("A")
    batch.pop("labels")
    generated = model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=use_cache, eos_token_id=63)
    ids = batch["input_ids"]
    for _ in range(6):
        layout = VisionLayout.build(batch["grid_thw"].tolist(), [2], merge_size=2)
        mask = masked_frames(ids, None, layout, image_token_id=3)
        step = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": mask}
        ids = torch.cat([ids, model(**step).logits[:, -1:].argmax(-1)], dim=1)
    assert generated.tolist() == ids.tolist()


def left_padded() -> dict[str, Any]:
    """A and B in one batch, padding on the left as generation wants it."""
    batch = golden_batch()
    batch.pop("labels")
    batch["input_ids"] = torch.tensor([A, [0] * 7 + B])
    batch["attention_mask"] = torch.tensor([[1] * 12, [0] * 7 + [1] * 5])
    layout = VisionLayout.build(batch["grid_thw"].tolist(), batch["media_nums_per_sample"], merge_size=2)
    batch["cross_attention_mask"] = masked_frames(batch["input_ids"], batch["attention_mask"], layout, image_token_id=3)
    return batch


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_generates_what_its_samples_do(attention: str, options: dict[str, Any]) -> None:
    model = golden_model(attention)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": 63, "pad_token_id": 0, **options}
    together = model.generate(**left_padded(), **options)
    for row, name in enumerate("AB"):
        alone = golden_batch(name)
        alone.pop("labels")
        assert model.generate(**alone, **options)[0, -5:].tolist() == together[row, -5:].tolist()


def test_many_rows_use_several_chunks_and_equal_the_dense_mask() -> None:
    frames, gap = 40, 9
    ids = torch.tensor([([3] + [10] * gap) * frames + [11] * 200])
    grid = torch.tensor([[frames, 4, 4]])
    layout = VisionLayout.build(grid.tolist(), merge_size=2)
    mask = masked_frames(ids, None, layout, image_token_id=3)
    assert len(row_chunks([5 * (i // 10 + 1) for i in range(400)] + [200] * 200)) > 3
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(ids == 3, -100),
        "pixel_values": torch.randn(frames * 16, 12, generator=torch.Generator().manual_seed(0)),
        "grid_thw": grid,
        "cross_attention_mask": mask,
    }
    results = {}
    for attention in ("sdpa", "eager"):
        model = golden_model(attention)
        loss = model(**batch).loss
        loss.backward()
        results[attention] = [loss.detach(), model.model.separator_token.grad, model.visual.pos_embed.weight.grad]
    for ours, reference in zip(results["sdpa"], results["eager"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)


def test_a_mask_that_is_no_prefix_uses_the_dense_path() -> None:
    batch = golden_batch("A")
    batch["cross_attention_mask"] = batch["cross_attention_mask"].clone()
    batch["cross_attention_mask"][:, :, 8:, 0] = True
    losses = [golden_model(attention)(**batch).loss.item() for attention in ("sdpa", "eager")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0] != pytest.approx(4.162825, abs=1e-5)


def test_no_supervised_token_gives_a_zero_loss_with_gradients() -> None:
    model = golden_model().train()
    batch = golden_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch).loss
    assert loss.item() == 0
    loss.backward()
    assert model.lm_head.weight.grad is not None


def test_bfloat16_is_close() -> None:
    model = golden_model().to(torch.bfloat16)
    assert model(**golden_batch()).loss.item() == pytest.approx(4.077848, abs=0.05)


def test_saved_files_load_again_and_keep_what_the_published_code_reads(tmp_path: Path) -> None:
    register_auto_classes()
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    published = json.loads((CONFIGS / "11b" / "config.json").read_text(encoding="utf-8"))
    model = golden_model()
    model.config.auto_map = published["auto_map"]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert saved["auto_map"] == published["auto_map"]
    assert saved["architectures"] == published["architectures"]
    assert saved["text_config"]["rope_theta"] == 10000.0
    assert saved["text_config"]["rope_scaling"]["mrope_section"] == [2, 1, 1]
    assert "rope_parameters" not in saved["text_config"]
    assert sorted(load_file(tmp_path / "model.safetensors")) == sorted(model.state_dict())
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MossVLConfig)
    for auto_class in (AutoModel, AutoModelForCausalLM):
        loaded = auto_class.from_pretrained(tmp_path)
        assert isinstance(loaded, MossVLForConditionalGeneration)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_published_configuration_survives_a_round_trip(tmp_path: Path) -> None:
    MossVLConfig.from_pretrained(CONFIGS / "11b" / "config.json").save_pretrained(tmp_path)
    published, saved = (
        json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (CONFIGS / "11b", tmp_path)
    )
    for values in (published, saved):
        values.pop("transformers_version")
    assert saved == published


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    register_auto_classes()
    from transformers import AutoModelForCausalLM

    marker = tmp_path / "was_run"
    model = golden_model()
    model.config.auto_map = {"AutoConfig": "evil.MossVLConfig", "AutoModelForCausalLM": "evil.Model"}
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n", encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert isinstance(loaded, MossVLForConditionalGeneration)
    assert not marker.exists()


def test_both_generations_of_rope_keys_are_read() -> None:
    old = golden_config().text_config
    new = type(old)(
        **{**old.to_dict(), "rope_theta": None, "rope_scaling": None, "rope_parameters": old.rope_parameters}
    )
    assert new.rope_parameters == old.rope_parameters
    assert new.rope_parameters["rope_theta"] == 10000.0
    assert new.rope_parameters["mrope_section"] == [2, 1, 1]
    assert type(old)(cross_attention_layers=[]).cross_attention_layers == list(range(2, 48, 4))


@pytest.mark.parametrize(
    ("text", "vision", "other", "message"),
    [
        ({"cross_attention_layers": [0, 2]}, {}, {}, "must ascend within 1..3"),
        ({"cross_attention_layers": [2, 9]}, {}, {}, "must ascend within 1..3"),
        ({"num_key_value_heads": 3}, {}, {}, "not a multiple"),
        ({"head_dim": 16}, {}, {}, "half of head_dim"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mrope_section": [2, 1, 1]}}, {}, {}, "'yarn'"),
        ({"attention_bias": True}, {}, {}, "biases"),
        ({}, {"out_hidden_size": 16}, {}, "out_hidden_size = 16"),
        ({}, {"num_position_embeddings": 15}, {}, "square"),
        ({}, {"temporal_patch_size": 2}, {}, "temporal_patch_size"),
        ({}, {"deepstack_visual_indexes": [1, 0]}, {}, "must ascend"),
        ({}, {"num_heads": 3}, {}, "multiple of 4"),
        ({}, {}, {"tie_word_embeddings": True}, "lm_head"),
        ({}, {}, {"vision_seq_pad_multiple": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(
    text: dict[str, Any], vision: dict[str, Any], other: dict[str, Any], message: str
) -> None:
    config = golden_config().to_dict()
    config["text_config"] |= text
    config["vision_config"] |= vision
    with pytest.raises(ConfigError, match=message):
        MossVLForConditionalGeneration(MossVLConfig(**{**config, **other}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"position_ids": torch.zeros(2, 12, dtype=torch.int64)}, ValueError, r"takes \[3, b, s\]"),
        ({"media_nums_per_sample": [1, 1]}, DataError, "adds up to 2"),
        ({"media_nums_per_sample": [3]}, ValueError, "the batch has 2"),
        ({"pixel_values": torch.zeros(10, 12)}, DataError, "10 patches"),
        ({"grid_thw": None, "media_nums_per_sample": None}, ValueError, "need grid_thw"),
        ({"pixel_values_videos": torch.zeros(1)}, ValueError, "does not take"),
        ({"output_attentions": True}, ValueError, "output_attentions"),
        ({"inputs_embeds": torch.zeros(2, 12, 32)}, ValueError, "either input_ids or inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 12, 32), "input_ids": None}, ValueError, "vision input needs input_ids"),
    ],
)
def test_inputs_that_contradict_each_other_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        golden_model()(**{**golden_batch(), **changes})
