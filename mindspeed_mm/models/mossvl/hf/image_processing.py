"""Image processor of MOSS-VL without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.pixels import image_sizes, patchify, resize

PictureInput = Image.Image | np.ndarray | Tensor


class MossVLImageProcessor(BaseImageProcessor):
    """Pictures to normalised patches.

    Args:
        size: `shortest_edge` and `longest_edge`, least and most pixels of a picture.
        multi_image_max_pixels: pixels of all pictures of one call together; None: `longest_edge`.
        min_pixels, max_pixels: replace the two values of `size`.
    """

    model_input_names = ["pixel_values", "image_grid_thw"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        multi_image_max_pixels: int | None = None,
        patch_size: int = 16,
        temporal_patch_size: int = 1,
        merge_size: int = 2,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**_without_types(kwargs))
        self.size = merge_size_limits(size, min_pixels, max_pixels)
        self.multi_image_max_pixels = multi_image_max_pixels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def __call__(self, images: PictureInput | Sequence[PictureInput], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: PictureInput | Sequence[PictureInput],
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        return_tensors: str | None = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Patches of one call's pictures, which share the pixel budget.

        Returns:
            `pixel_values` [p, 3 * patch^2] float32 and `image_grid_thw` [images, 3] int64.
        Raises:
            DataError: a picture that is empty or too narrow.
        """
        given: Any = images if isinstance(images, list | tuple) else [images]
        pictures = [to_pixels(image) for image in given]
        limits = merge_size_limits(self.size, min_pixels, max_pixels)
        sizes = image_sizes(
            [(picture.shape[2], picture.shape[3]) for picture in pictures],
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
            budget=self.multi_image_max_pixels,
            factor=self.patch_size * self.merge_size,
        )
        patches = [
            patchify(
                resize(picture, *size),
                patch_size=self.patch_size,
                merge_size=self.merge_size,
                mean=self.image_mean,
                std=self.image_std,
            )
            for picture, size in zip(pictures, sizes, strict=True)
        ]
        grids = [[1, height // self.patch_size, width // self.patch_size] for height, width in sizes]
        return BatchFeature({"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)})

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint's file holds, under the name that published files carry."""
        return {**super().to_dict(), "image_processor_type": MossVLImageProcessorFast.__name__}


class MossVLImageProcessorFast(MossVLImageProcessor):
    """The same under its published name: transformers 4.57 looks for either, depending on what is installed."""


def to_pixels(image: PictureInput) -> Tensor:
    """[1, 3, h, w] uint8 of a picture: PIL in any mode, array [h, w, 3] or tensor [3, h, w] of bytes.

    Raises:
        DataError: another shape or type.
    """
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    pixels = torch.from_numpy(image).permute(2, 0, 1) if isinstance(image, np.ndarray) and image.ndim == 3 else image
    if not isinstance(pixels, Tensor) or pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
        raise DataError("a picture must be a PIL image, a uint8 array [h, w, 3] or a uint8 tensor [3, h, w]")
    return pixels[None]


def merge_size_limits(size: dict[str, int] | None, min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    """`size` with the published defaults, its values replaced where the caller gave pixels."""
    merged = {"longest_edge": 16777216, "shortest_edge": 4096, **dict(size or {})}
    if min_pixels is not None:
        merged["shortest_edge"] = min_pixels
    if max_pixels is not None:
        merged["longest_edge"] = max_pixels
    return {key: merged[key] for key in ("longest_edge", "shortest_edge")}


def _without_types(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keys that files carry for the loader, not for the processor; the class writes them back by itself."""
    drop = {"image_processor_type", "video_processor_type", "feature_extractor_type", "processor_class"}
    return {key: value for key, value in kwargs.items() if key not in drop}
