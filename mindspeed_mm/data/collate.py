"""Collators: from the samples of a micro-batch to one padding-free `Batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mindspeed_mm.data.features import IGNORE_INDEX
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.ops.mrope import mrope_position_ids


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """One sample, ready to be put into a batch."""

    name: str
    """The record it comes from."""
    input_ids: Tensor
    """[s] int64."""
    labels: Tensor
    """[s] int64, shifted; the last is -100."""
    grid_thw: Tensor
    """[media, 3] int64, in order of appearance."""
    pixel_values: tuple[Tensor, ...]
    """[patches, patch_dim] float32 of every medium."""


@dataclass(frozen=True, slots=True)
class VisionShape:
    """What a collator must know of the vision tower."""

    media_token_ids: tuple[int, ...]
    merge_size: int
    patch_dim: int


class Qwen2VLCollator:
    """Puts the samples of a micro-batch one after another into one row.

    A micro-batch without media gets one dummy picture of (1, merge_size, merge_size) zero patches, so that the vision
    tower runs (and its collectives are entered) on every replica; no row takes its embedding.

    Args:
        vision: None for a model without vision tower; then there are neither grids nor pixels.
    """

    def __init__(self, vision: VisionShape | None) -> None:
        self.vision = vision

    def __call__(self, samples: Sequence[PreparedSample]) -> Batch:
        input_ids = torch.cat([sample.input_ids for sample in samples])
        lengths = torch.tensor([0, *(sample.input_ids.numel() for sample in samples)])
        cu_seqlens = lengths.cumsum(0).to(torch.int32)
        grid_thw = torch.cat([sample.grid_thw for sample in samples])
        vision = self.vision
        position_ids = mrope_position_ids(
            input_ids,
            grid_thw,
            media_token_ids=() if vision is None else vision.media_token_ids,
            merge_size=1 if vision is None else vision.merge_size,
            cu_seqlens=cu_seqlens,
        )
        pixels = [patches for sample in samples for patches in sample.pixel_values]
        if vision is not None and not pixels:
            grid_thw = torch.tensor([[1, vision.merge_size, vision.merge_size]])
            pixels = [torch.zeros(vision.merge_size**2, vision.patch_dim)]
            image_rows = torch.empty(0, dtype=torch.int64)
        else:
            media = torch.tensor(() if vision is None else vision.media_token_ids, dtype=torch.int64)
            image_rows = torch.isin(input_ids, media).nonzero().flatten()
        return Batch(
            input_ids=input_ids,
            labels=torch.cat([sample.labels for sample in samples]),
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            image_rows=image_rows,
            grid_thw=grid_thw,
            pixel_values=torch.cat(pixels) if pixels else None,
        )

    def filler(self, token_id: int) -> Batch:
        """A batch of two tokens from which nothing is learned: what a replica without samples runs to stay in step."""
        nothing = torch.full((2,), IGNORE_INDEX)
        ids, grids = torch.full((2,), token_id), torch.empty(0, 3, dtype=torch.int64)
        return self([PreparedSample("filler", ids, nothing, grids, ())])


COLLATORS: Mapping[str, type[Qwen2VLCollator]] = MappingProxyType({"qwen2vl": Qwen2VLCollator})


def build_collator(name: str, vision: VisionShape | None) -> Qwen2VLCollator:
    """The collator of this name; ConfigError when there is none."""
    if name not in COLLATORS:
        problem = f'collate_param.model_name = "{name}" is not available here; known are: {", ".join(COLLATORS)}.'
        raise ConfigError("data.json", problem)
    return COLLATORS[name](vision)
