"""The processor: tokens, media order, masks, labels, files (test vectors 4, 11, 13, 15)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.mossvl.hf import (
    MossVLImageProcessor,
    MossVLImageProcessorFast,
    MossVLProcessor,
    register_auto_classes,
)
from mindspeed_mm.models.mossvl.hf.checkpoint import load_model
from mindspeed_mm.models.mossvl.hf.video_processing import VideoUnit

CONFIGS = Path(__file__).resolve().parents[5] / "configs" / "mossvl"
PUBLISHED = ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


def grey(level: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def unit(num_frames: int, level: int = 0) -> VideoUnit:
    return VideoUnit(
        torch.full((num_frames, 3, 64, 64), level, dtype=torch.uint8), tuple(map(float, range(num_frames)))
    )


def test_images_and_clips_come_in_the_order_of_the_text(processor: MossVLProcessor) -> None:
    out = processor(
        text=["a<|video|><|image|>", "no media", "<|image|>b<|image|><|video|>"],
        images=[grey(10), grey(20, (64, 96)), grey(30)],
        videos=[unit(2, 100), unit(1, 200)],
        padding=True,
    )
    assert out["media_nums_per_sample"] == [2, 1, 3]
    assert out["grid_thw"].tolist() == [[2, 4, 4], [1, 4, 4], [1, 8, 8], [1, 6, 4], [1, 4, 4], [1, 4, 4]]
    firsts = out["pixel_values"].split([32, 16, 64, 24, 16, 16])
    shown = [100, 10, None, 20, 30, 200]
    for patches, level in zip(firsts, shown, strict=True):
        expected = 0.0 if level is None else (level / 255 - 0.5) / 0.5
        assert patches.min().item() == pytest.approx(expected, abs=1e-6)
        assert patches.max().item() == pytest.approx(expected, abs=1e-6)
    assert out["cross_attention_mask"].shape == (3, 1, out["input_ids"].shape[1], 3)
    assert bool(out["cross_attention_mask"][1].all())
    assert not isinstance(out["media_nums_per_sample"], torch.Tensor)


def test_a_clip_becomes_stamped_frames(processor: MossVLProcessor) -> None:
    out = processor(text=["<|video|>"], videos=[VideoUnit(unit(3).frames, (0.0, 1.04, 2.08))])
    assert processor.tokenizer.decode(out["input_ids"][0]) == (
        "<|vision_start|><|time_start|>0.0 seconds<|time_end|><|image_pad|><|time_start|>1.0 seconds<|time_end|>"
        "<|image_pad|><|time_start|>2.1 seconds<|time_end|><|image_pad|><|vision_end|>"
    )
    visible = (~out["cross_attention_mask"][0, 0]).sum(-1)
    tokens = out["input_ids"][0]
    assert visible.tolist() == (tokens == processor.image_token_id).cumsum(0).tolist()


def test_a_text_alone_gets_a_blank_picture(processor: MossVLProcessor, nano_moss: Path) -> None:
    out = processor(text="Hello")
    assert out["pixel_values"].shape == (64, 768)
    assert not out["pixel_values"].any()
    assert out["grid_thw"].tolist() == [[1, 8, 8]]
    assert out["media_nums_per_sample"] == [1]
    assert bool(out["cross_attention_mask"].all())
    model = load_model(str(nano_moss), dtype="float32").eval()
    with torch.no_grad():
        difference = model(**out).logits - model(input_ids=out["input_ids"]).logits
    assert difference.abs().max() < 1e-6


def test_labels_cover_the_spans_alone(processor: MossVLProcessor) -> None:
    text = "<|im_start|>user\n<|image|>\nHi <|video|><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    out = processor(text=[text], images=[grey(1)], videos=[unit(2)], labels_spans=[[(72, 86)]])
    learned = out["labels"][0][out["labels"][0] != -100]
    assert processor.tokenizer.decode(learned) == "Yes.<|im_end|>"
    assert out["labels"][0, -1] == -100
    kept = out["labels"][0] != -100
    assert torch.equal(out["labels"][0][kept], out["input_ids"][0][kept])


def test_padding_is_neither_learned_nor_seen(processor: MossVLProcessor) -> None:
    text = "<|image|>ab"
    out = processor(
        text=[text, text + " longer text"], images=[grey(1)] * 2, labels_spans=[[(9, 11)], [(9, 11)]], padding=True
    )
    padding = out["attention_mask"] == 0
    assert bool(padding[0].any())
    assert out["labels"][padding].unique().tolist() == [-100]
    assert bool(out["cross_attention_mask"][:, 0, :, 0][padding].all())


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_every_kind_of_picture_gives_the_same_patches(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (100, 75, 3), dtype=np.uint8)
    picture = {
        "pil": Image.fromarray(pixels),
        "array": pixels,
        "tensor": torch.from_numpy(pixels).permute(2, 0, 1),
    }[kind]
    out = MossVLImageProcessorFast()(picture)
    assert out["image_grid_thw"].tolist() == [[1, 6, 4]]
    torch.testing.assert_close(out["pixel_values"], MossVLImageProcessorFast()(Image.fromarray(pixels))["pixel_values"])


def test_patches_equal_those_of_transformers_for_pictures_that_fit() -> None:
    import transformers

    pixels = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    # The class without torchvision: the plain one in transformers 4.57, the one with a suffix in 5.
    name = "Qwen2VLImageProcessor" + ("Pil" if transformers.__version__ >= "5" else "")
    theirs = getattr(transformers, name)(
        patch_size=16, temporal_patch_size=1, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )(Image.fromarray(pixels), return_tensors="pt")
    ours = MossVLImageProcessorFast()(Image.fromarray(pixels))
    assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])
    torch.testing.assert_close(theirs["pixel_values"].float(), ours["pixel_values"], atol=1e-6, rtol=0)


def test_limits_can_be_replaced_in_a_call(processor: MossVLProcessor) -> None:
    out = processor(text="<|image|>", images=grey(0, (1920, 1080)), max_pixels=262144)
    assert out["grid_thw"].tolist() == [[1, 384 // 16, 672 // 16]]


@pytest.mark.parametrize(
    ("text", "images", "videos", "message"),
    [
        ("<|image|>", [], [], "1 image placeholders, but 0 images"),
        ("x", [grey(0)], [], "0 image placeholders, but 1 images"),
        ("<|image|><|image|>", [grey(0)], [], "2 image placeholders, but 1 images"),
        ("<|video|>", [], [], "1 video placeholders, but the videos have 0 units"),
        ("x", [], [unit(1)], "0 video placeholders, but the videos have 1 units"),
        ("<|video|>", [], [5], "must be a path"),
        ("<|video|>", [], [{"segments": [[0, 1]]}], "must be a path"),
        ("", [], [], "at least one character"),
        ("<|image|>", ["not a picture"], [], "must be a PIL image"),
        ("<|image|>", [grey(0, (3, 900))], [], "more than 200 times"),
        ("<|video|>", [], [VideoUnit(torch.zeros(1, 3, 16, 64, dtype=torch.uint8), (0.0,))], "too small"),
    ],
)
def test_media_that_do_not_match_are_refused(
    processor: MossVLProcessor, text: str, images: list[object], videos: list[object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        processor(text=text, images=images, videos=videos)


def test_cutting_off_media_is_refused(processor: MossVLProcessor) -> None:
    processor(text="<|image|> and some text", images=[grey(0)], truncation=True, max_length=3)
    with pytest.raises(DataError, match=r"longer than max_length = 20.*frames would be cut off"):
        processor(text="<|video|>", videos=[unit(9)], truncation=True, max_length=20)


def test_a_tokenizer_without_time_tokens_is_refused(processor: MossVLProcessor) -> None:
    class Lacking:
        name_or_path = "somewhere"
        chat_template = None

        def get_vocab(self) -> dict[str, int]:
            return {"<|image_pad|>": 1, "<|video_pad|>": 2, "<|vision_start|>": 3, "<|vision_end|>": 4}

    with pytest.raises(ConfigError, match=r"lacks <\|time_start\|>, <\|time_end\|>"):
        MossVLProcessor(processor.image_processor, Lacking(), processor.video_processor)


def test_files_are_those_of_the_published_checkpoints(processor: MossVLProcessor, tmp_path: Path) -> None:
    register_auto_classes()
    from transformers import AutoImageProcessor, AutoProcessor

    for name in PUBLISHED[:2]:
        published = json.loads((CONFIGS / "11b" / name).read_text(encoding="utf-8"))
        part = processor.image_processor if name.startswith("pre") else processor.video_processor
        part.auto_map = published["auto_map"]
    processor.save_pretrained(tmp_path)
    for name in PUBLISHED:
        saved, published = (
            json.loads((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, CONFIGS / "11b")
        )
        assert saved == published, name
    assert not (tmp_path / "processor_config.json").exists()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, MossVLProcessor)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), MossVLImageProcessor)
    text, picture = "<|image|>a", grey(9, (200, 100))
    for key, value in processor(text=text, images=[picture]).items():
        other = again(text=text, images=[picture])[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_both_objects_render_alike(processor: MossVLProcessor) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    expected = "<|im_start|>user\n<|image|>Describe the image.<|im_end|>\n<|im_start|>assistant\n"
    for renderer in (processor, processor.tokenizer):
        messages = [{"role": "user", "content": content}]
        assert renderer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
