"""Pictures: from a file to the patches of the vision tower, without torchvision."""

from __future__ import annotations

import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from mindspeed_mm.config.base import read_json
from mindspeed_mm.errors import ConfigError, DataError

MAX_IMAGE_PIXELS = 64_000_000
MAX_ASPECT_RATIO = 200
_CLIPPED_ASPECT_RATIO = 180
Grid = tuple[int, int, int]
"""Patches in time, height and width."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, which the processor files carry


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How pictures become patches: the processor of the checkpoint, after the pixel limits of data.json."""

    image_min_pixels: int = 0
    """data.json: smaller pictures are scaled up to about this many pixels before the processor's own rule."""
    image_max_pixels: int = 768 * 768
    """data.json: larger pictures are scaled down to at most this many pixels before the processor's own rule."""
    min_pixels: int = 56 * 56
    """Processor: least pixels after rounding the sides."""
    max_pixels: int = 28 * 28 * 1280
    """Processor: most pixels after rounding the sides."""
    patch_size: int = 14
    """Side of a patch in pixels."""
    temporal_patch_size: int = 2
    """Frames of a patch; a picture is repeated to fill it."""
    merge_size: int = 2
    """Side of the square of patches that becomes one token."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """Per channel, on the scale 0 to 1."""
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    """Per channel, on the scale 0 to 1."""
    rescale_factor: float = 1 / 255
    """Brings bytes to the scale of mean and std."""
    filter: str = "bicubic"
    """Interpolation, with anti-aliasing: "bicubic" or "bilinear"."""

    @property
    def factor(self) -> int:
        """Both sides are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @classmethod
    def from_directory(cls, directory: str | Path, *, image_min_pixels: int, image_max_pixels: int) -> ImageSettings:
        """The settings of a Hugging Face checkpoint directory.

        They are in `processor_config.json` (transformers 5, when it holds an image processor), else in
        `preprocessor_config.json`.

        Raises:
            ConfigError: neither file is there, or it asks for something that this family does not do.
        """
        path, values = _processor_values(Path(directory))
        default = cls()
        switches = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
        problems = [f"{key} = false is not supported." for key in switches if values.get(key) is False]
        if (resample := values.get("resample", 3)) not in _FILTERS:
            problems.append(f"resample = {resample} is not supported; expected one of {_FILTERS}.")
        if problems:
            raise ConfigError(str(path), problems)
        size = values.get("size") or {}
        return cls(
            image_min_pixels=image_min_pixels,
            image_max_pixels=image_max_pixels,
            min_pixels=values.get("min_pixels") or size.get("shortest_edge") or default.min_pixels,
            max_pixels=values.get("max_pixels") or size.get("longest_edge") or default.max_pixels,
            patch_size=values.get("patch_size") or default.patch_size,
            temporal_patch_size=values.get("temporal_patch_size") or default.temporal_patch_size,
            merge_size=values.get("merge_size") or default.merge_size,
            mean=tuple(values.get("image_mean") or default.mean),
            std=tuple(values.get("image_std") or default.std),
            rescale_factor=values.get("rescale_factor") or default.rescale_factor,
            filter=_FILTERS[resample],
        )


def _processor_values(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The image processor's part of the checkpoint; transformers 5 nests it, and prefers the nested one."""
    nested, flat = directory / "processor_config.json", directory / "preprocessor_config.json"
    if nested.is_file():
        values = read_json(nested).get("image_processor")
        if isinstance(values, dict):
            return nested, values
    if flat.is_file():
        return flat, read_json(flat)
    raise ConfigError(
        str(directory),
        "neither preprocessor_config.json nor an image processor in processor_config.json is there; "
        "model_name_or_path must be a Qwen2-VL checkpoint directory.",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def target_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Width and height that a picture has when it is cut into patches.

    The rule of MindSpeed-MM and LLaMA-Factory (limits of data.json, sides of at least 28 pixels), then the processor's.

    Raises:
        DataError: one side is more than 200 times the other.
    """
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise DataError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")
    for limit, is_outside in ((settings.image_max_pixels, int.__gt__), (settings.image_min_pixels, int.__lt__)):
        if is_outside(width * height, limit):
            scale = math.sqrt(limit / (width * height))
            width, height = int(width * scale), int(height * scale)
    least = settings.factor
    width, height = max(width, least), max(height, least)
    # Rounding down the sides above can lift a ratio just under the limit over it.
    if width > MAX_ASPECT_RATIO * height:
        width = _CLIPPED_ASPECT_RATIO * height
    elif height > MAX_ASPECT_RATIO * width:
        height = _CLIPPED_ASPECT_RATIO * width
    return _smart_resize(width, height, settings)


def _smart_resize(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """Sides as multiples of `factor`, pixels within the processor's limits; equal to transformers' smart_resize."""
    factor = settings.factor
    new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
    if new_width * new_height > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_width * new_height < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_width, new_height


def grid_of(width: int, height: int, settings: ImageSettings) -> Grid:
    """The grid of a picture of this size; needs no pixels. DataError as `target_size`."""
    new_width, new_height = target_size(width, height, settings)
    return 1, new_height // settings.patch_size, new_width // settings.patch_size


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_image_size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header; nothing is decoded.

    Raises:
        DataError: no regular file, a format outside JPEG, PNG, WEBP, BMP, GIF and TIFF, or more than 64 million pixels.
    """
    with _open(path) as image:
        return image.size


def read_image(path: Path) -> Image.Image:
    """The picture as RGB; the first frame of an animation. EXIF rotation is not applied, as in transformers.

    An alpha channel is dropped. 16-bit grey is scaled to 8 bits.

    Raises:
        DataError: as `read_image_size`, or the file is cut short or damaged.
    """
    with _open(path) as image:
        try:
            if image.mode.startswith("I;16"):
                grey = np.asarray(image).astype(np.uint16) >> 8
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise DataError(
                    f"{path} has 32-bit grey values ({image.mode}), whose range is not known; store it with 8 bits"
                )
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path} cannot be decoded: {error}") from None


def _open(path: Path) -> Image.Image:
    try:
        # A pipe or a device would block the worker for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is not a regular file")
        image = Image.open(path, formats=_FORMATS)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise DataError(f"{path} is not a picture in one of the formats {', '.join(_FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large: {error}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        image.close()
        raise DataError(f"{path} has {width}x{height} pixels; a picture may have {MAX_IMAGE_PIXELS:,}")
    return image


def measure_image(path: Path, settings: ImageSettings) -> Grid:
    """The grid of a picture, from the header of its file; DataError, which names the file, as `read_image_size`."""
    width, height = read_image_size(path)
    try:
        return grid_of(width, height, settings)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Patches


def load_patches(path: Path, settings: ImageSettings, grid: Grid) -> Tensor:
    """The patches of the picture in a file, which was measured before; see `image_patches` and `read_image`."""
    image = read_image(path)
    if grid_of(*image.size, settings) != grid:
        raise DataError(f"{path} changed after its size was read")
    return image_patches(image, settings)


def image_patches(image: Image.Image, settings: ImageSettings) -> Tensor:
    """The patches of one RGB picture.

    The picture is resampled once, from its own size to the final one. MindSpeed-MM resamples twice, the first time with
    the nearest neighbour, which aliases; sizes and grids are the same.

    Returns:
        [t*h*w, channels * temporal_patch_size * patch_size**2] float32; the patches of one token are neighbours.
    Source: equal to transformers' Qwen2VLImageProcessor on the same final size.
    """
    width, height = target_size(*image.size, settings)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if (width, height) != image.size:
        # On bytes, as torchvision does: rounding to whole grey levels is part of the reference.
        pixels = functional.interpolate(
            pixels[None], size=(height, width), mode=settings.filter, antialias=True, align_corners=False
        )[0]
    patch, merge = settings.patch_size, settings.merge_size
    rows, columns = height // patch, width // patch
    blocks = pixels.reshape(-1, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(1, 4, 2, 5, 0, 3, 6).to(torch.float32)
    scale = 1 / settings.rescale_factor
    mean, std = (torch.tensor(values).mul(scale).view(-1, 1, 1) for values in (settings.mean, settings.std))
    blocks = blocks.sub_(mean).div_(std).unsqueeze(5)
    return blocks.expand(*[-1] * 5, settings.temporal_patch_size, -1, -1).reshape(rows * columns, -1)
