"""Sizes, patches and refusals of pictures; transformers' PIL processor is the reference."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from mindspeed_mm.data.image import (
    ImageSettings,
    grid_of,
    image_patches,
    load_patches,
    measure_image,
    read_image,
    read_image_size,
    target_size,
)
from mindspeed_mm.errors import ConfigError, DataError

NO_LIMITS = ImageSettings(image_min_pixels=0, image_max_pixels=10**9)
GREY_LEVEL = 1 / 255 / 0.2613
"""One step of 255 after normalisation, at most (the smallest std)."""


def picture(width: int, height: int, *, noise: bool = False) -> Image.Image:
    generator = np.random.default_rng(width * 10_000 + height)
    size = (height, width) if noise else (9, 9)
    image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
    return image if noise else image.resize((width, height), Image.Resampling.BICUBIC)


def reference(image: Image.Image, **options: Any) -> tuple[torch.Tensor, list[int]]:
    done = Qwen2VLImageProcessorPil(**options)(images=[image], return_tensors="pt")
    return done.pixel_values, done.image_grid_thw[0].tolist()


@pytest.mark.parametrize(("width", "height"), [(56, 56), (448, 448), (84, 252), (1008, 28)])
def test_patches_without_resizing_equal_transformers(width: int, height: int) -> None:
    """Only the order of float operations differs: mean and std are on the scale of bytes here."""
    image = picture(width, height, noise=True)
    expected, grid = reference(image, min_pixels=28 * 28)
    settings = ImageSettings(image_max_pixels=10**9, min_pixels=28 * 28)
    assert list(grid_of(width, height, settings)) == grid
    torch.testing.assert_close(image_patches(image, settings), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("width", "height"), [(640, 480), (1333, 777), (30, 400), (29, 29), (2000, 1500), (100, 3000), (57, 55)]
)
def test_patches_with_resizing_equal_transformers_within_two_grey_levels(width: int, height: int) -> None:
    """Both resample bytes in two passes and round after each, torch in the other order than PIL; one level per pass."""
    image = picture(width, height)
    expected, grid = reference(image)
    assert list(grid_of(width, height, NO_LIMITS)) == grid
    ours = image_patches(image, NO_LIMITS)
    difference = (ours - expected).abs()
    assert difference.max() <= 2.01 * GREY_LEVEL
    assert difference.mean() <= 0.05 * GREY_LEVEL


@pytest.mark.parametrize(
    "options",
    [{"min_pixels": 100_000}, {"max_pixels": 50_000}, {"size": {"shortest_edge": 90_000, "longest_edge": 120_000}}],
)
def test_pixel_limits_of_the_processor_file_are_kept(tmp_path: Path, options: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(options))
    settings = ImageSettings.from_directory(tmp_path, image_min_pixels=0, image_max_pixels=10**9)
    for size in [(300, 200), (500, 900), (60, 60)]:
        expected, grid = reference(picture(*size), **options)
        assert list(grid_of(*size, settings)) == grid
        assert image_patches(picture(*size), settings).shape == expected.shape


@given(st.integers(28, 3000), st.integers(28, 3000))
def test_sizes_equal_smart_resize(width: int, height: int) -> None:
    expected_height, expected_width = smart_resize(height, width, 28, 56 * 56, 28 * 28 * 1280)
    assert target_size(width, height, NO_LIMITS) == (expected_width, expected_height)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 768), (588, 448)),  # 262144 pixels: 591 x 443, then multiples of 28
        ((512, 512), (504, 504)),
        ((4000, 20), (4004, 28)),  # 20 rises to 28
        ((3, 3), (56, 56)),
    ],
)
def test_sizes_follow_the_limits_of_the_data_file(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert target_size(*size, ImageSettings(image_min_pixels=0, image_max_pixels=262144)) == expected


def test_small_pictures_rise_to_image_min_pixels() -> None:
    assert target_size(100, 100, ImageSettings(image_min_pixels=200_000)) == (448, 448)


def test_processor_file_of_transformers_5_is_read_before_the_flat_one(tmp_path: Path) -> None:
    nested = {"image_processor": {"size": {"shortest_edge": 1000, "longest_edge": 2000}, "image_mean": [0, 0, 0]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 7}))
    settings = ImageSettings.from_directory(tmp_path, image_min_pixels=1, image_max_pixels=2)
    assert (settings.min_pixels, settings.max_pixels, settings.mean) == (1000, 2000, (0, 0, 0))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
    assert ImageSettings.from_directory(tmp_path, image_min_pixels=1, image_max_pixels=2).min_pixels == 7


def test_processor_that_asks_for_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither preprocessor_config\.json"):
        ImageSettings.from_directory(tmp_path, image_min_pixels=0, image_max_pixels=1)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "resample": 0}))
    with pytest.raises(ConfigError, match=r"do_normalize = false(.|\n)*resample = 0"):
        ImageSettings.from_directory(tmp_path, image_min_pixels=0, image_max_pixels=1)


def test_settings_equal_the_processor_that_transformers_loads(checkpoint: Path) -> None:
    from transformers import AutoImageProcessor

    theirs = AutoImageProcessor.from_pretrained(checkpoint, use_fast=False)
    ours = ImageSettings.from_directory(checkpoint, image_min_pixels=0, image_max_pixels=1)
    assert (ours.min_pixels, ours.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert (ours.mean, ours.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    assert (ours.patch_size, ours.merge_size) == (theirs.patch_size, theirs.merge_size)
    assert ours.rescale_factor == theirs.rescale_factor


# ---------------------------------------------------------------------------------------------------------------------
# Files


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises this size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not a picture in one of the formats JPEG, PNG"),
        (b"this is text", "is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
        (bomb(12_000, 12_000), r"has 12000x12000 pixels; a picture may have 64,000,000"),
        (bomb(50_000, 50_000), "is too large"),
        (encoded(Image.new("RGB", (64, 64)), "PPM"), "is not a picture"),
    ],
    ids=["empty", "text", "svg", "144 Mpx", "2500 Mpx", "format not allowed"],
)
def test_files_that_are_no_pictures_are_refused_by_their_header(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"picture.jpg {problem}"):
        read_image_size(path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_that_are_cut_short_are_refused(tmp_path: Path, form: str) -> None:
    content = encoded(picture(200, 200, noise=True), form)
    path = tmp_path / "picture"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="picture"):
        read_image(path)


def test_pipes_directories_and_missing_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("pipe", "is not a regular file"),
        (".", "is not a regular file"),
        ("gone", "does not exist"),
    ):
        with pytest.raises(DataError, match=problem):
            read_image_size(tmp_path / name)


def test_extreme_shapes_are_refused_by_name(tmp_path: Path) -> None:
    Image.new("RGB", (6000, 20)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match=r"strip.png: 6000x20 pixels: one side is more than 200 times the other"):
        measure_image(tmp_path / "strip.png", NO_LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    form = "TIFF" if mode == "CMYK" else "PNG"
    picture(64, 48).convert(mode).save(tmp_path / "picture", form)
    image = read_image(tmp_path / "picture")
    assert (image.mode, image.size) == ("RGB", (64, 48))


def test_16_bit_grey_is_scaled_and_32_bit_grey_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "grey.png")
    levels = np.asarray(read_image(tmp_path / "grey.png"))
    assert (levels.min(), levels.max()) == (0, 255)
    assert 120 < levels.mean() < 135
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "grey.tiff")
    with pytest.raises(DataError, match="32-bit grey"):
        read_image(tmp_path / "grey.tiff")


def test_first_frame_of_an_animation_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((5, 5)) == (255, 0, 0)


def test_patches_come_from_a_file_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    picture(300, 200).save(path)
    grid = measure_image(path, NO_LIMITS)
    patches = load_patches(path, NO_LIMITS, grid)
    assert patches.shape == (grid[1] * grid[2], 3 * 2 * 14 * 14)
    assert patches.dtype == torch.float32
    picture(500, 500).save(path)
    with pytest.raises(DataError, match="changed after its size was read"):
        load_patches(path, NO_LIMITS, grid)
