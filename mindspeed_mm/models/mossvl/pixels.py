"""Sizes of pictures and video frames, and their patches; no torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mindspeed_mm.errors import DataError

MAX_ASPECT_RATIO = 200


def image_size(height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int) -> tuple[int, int]:
    """Height and width, multiples of `factor`, that a picture is resized to.

    Raises:
        DataError: an empty picture, or one side more than 200 times the other.
    Source: smart_resize of the Qwen2-VL image processors.
    """
    _check_ratio(height, width)
    # Python's round, half to even, is part of the rule; a side may round to 0 and then grows below.
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        return _shrink(height, width, math.sqrt(height * width / max_pixels), factor)
    if new_height * new_width < min_pixels:
        return _grow(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return new_height, new_width


def image_sizes(
    sizes: Sequence[tuple[int, int]], *, min_pixels: int, max_pixels: int, budget: int | None, factor: int
) -> list[tuple[int, int]]:
    """Sizes of all pictures of one call, which share `budget` pixels (None: max_pixels)."""
    total = sum(height * width for height, width in sizes)
    result = []
    for height, width in sizes:
        share = int((max_pixels if budget is None else budget) * height * width / max(total, 1))
        limit = min(max(share, min_pixels), max_pixels)
        result.append(image_size(height, width, min_pixels=min_pixels, max_pixels=limit, factor=factor))
    return result


def video_sizes(
    units: Sequence[tuple[int, int, int]], *, min_pixels: int, max_pixels: int, budget: int | None, factor: int
) -> list[tuple[int, int]]:
    """Frame sizes of all video units of one call.

    Args:
        units: (frames, height, width) of each.
        min_pixels: least pixels of a frame, and of a unit. max_pixels: most pixels of a frame.
        budget: pixels of all frames of all units together; None: every unit may have max_pixels.
    Raises:
        DataError: a side below `factor`, or one side more than 200 times the other.
    """
    total = sum(frames * height * width for frames, height, width in units)
    result = []
    for frames, height, width in units:
        if min(height, width) < factor:
            raise DataError(f"video frames of {width}x{height} pixels are too small; each side needs {factor}")
        _check_ratio(height, width)
        volume = max_pixels if budget is None else int(budget * frames * height * width / total)
        result.append(_video_size(frames, height, width, min_pixels, max_pixels, volume, factor))
    return result


def _video_size(
    frames: int, height: int, width: int, min_pixels: int, max_pixels: int, volume: int, factor: int
) -> tuple[int, int]:
    new_height, new_width = (round(side / factor) * factor for side in (height, width))
    if new_height * new_width > max_pixels:
        new_height, new_width = _shrink(height, width, math.sqrt(height * width / max_pixels), factor)
    if frames * new_height * new_width > volume:
        new_height, new_width = _shrink(height, width, math.sqrt(frames * height * width / volume), factor)
    elif frames * new_height * new_width < min_pixels:
        new_height, new_width = _grow(height, width, math.sqrt(min_pixels / (frames * height * width)), factor)
    if new_height * new_width < min_pixels:
        new_height, new_width = _grow(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return new_height, new_width


def _check_ratio(height: int, width: int) -> None:
    if min(height, width) < 1:
        raise DataError(f"{width}x{height} pixels: the picture is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise DataError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def _shrink(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    new_height, new_width = (max(factor, math.floor(side / scale / factor) * factor) for side in (height, width))
    return new_height, new_width


def _grow(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    new_height, new_width = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return new_height, new_width


def resize(frames: Tensor, height: int, width: int) -> Tensor:
    """[t, 3, h, w] uint8 to the given size: bicubic with antialiasing on bytes, as torchvision does it."""
    if tuple(frames.shape[2:]) == (height, width):
        return frames
    return functional.interpolate(frames, size=(height, width), mode="bicubic", antialias=True, align_corners=False)


def patchify(
    frames: Tensor, *, patch_size: int, merge_size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalised patches in the order of the vision tower.

    Args:
        frames: [t, 3, h, w] uint8, h and w multiples of patch_size * merge_size.
    Returns:
        [t * h/patch * w/patch, 3 * patch^2] float32: frame, block row, block column, row and column in the block;
        inside a patch channel, row, column. Equal to transformers' Qwen2-VL layout with one frame per patch.
    """
    num_frames, channels, height, width = frames.shape
    rows, columns = height // patch_size // merge_size, width // patch_size // merge_size
    grid = frames.view(num_frames, channels, rows, merge_size, patch_size, columns, merge_size, patch_size)
    patches = grid.permute(0, 2, 5, 3, 6, 1, 4, 7).to(torch.float32).div_(255)
    shift, scale = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return patches.sub_(shift).div_(scale).reshape(-1, channels * patch_size**2)
