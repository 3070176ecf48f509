"""Outputs of the MOSS-VL models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput

from mindspeed_mm.models.mossvl.hf.vision import Grids
from mindspeed_mm.models.mossvl.layout import VisionLayout


@dataclass
class MossVLModelOutput(ModelOutput):
    """Output of the towers.

    Attributes:
        last_hidden_state: [b, s, h] after the final norm.
        hidden_states: inputs of all layers and the last hidden state, when asked for.
        vision_token_info: layout of the vision sequence, one entry per sample; None without vision input.
        rope_deltas: [b] int64, what a token's index lacks to its position after the sample.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vision_token_info: list[dict[str, Any]] | None = None
    rope_deltas: Tensor | None = None


@dataclass
class MossVLCausalLMOutput(ModelOutput):
    """Output of the whole model; `logits` is None in training, where only supervised rows reach the head."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vision_token_info: list[dict[str, Any]] | None = None
    rope_deltas: Tensor | None = None


def vision_token_info(layout: VisionLayout, grids: Grids, media_nums: Sequence[int] | None) -> list[dict[str, Any]]:
    """Layout of the vision sequence in the form of upstream's output: one dictionary per sample."""
    info: list[dict[str, Any]] = []
    first = 0
    for length, count in zip(layout.lengths, media_nums or [len(grids)], strict=True):
        medias, start = [], 0
        for (t, h, w), frame in _media_frames(grids[first : first + count], layout, len(info)):
            size = t * frame
            medias.append(
                {
                    "start": start,
                    "end": start + size,
                    "length": size,
                    "num_frames": t,
                    "grid_h": h,
                    "grid_w": w,
                    "vision_tokens_per_frame": frame - 1,
                }
            )
            start += size
        info.append({"medias": medias, "total_length": length, "pad_start": length, "pad_end": layout.padded_length})
        first += count
    return info


def _media_frames(media: Grids, layout: VisionLayout, sample: int) -> list[tuple[tuple[int, int, int], int]]:
    pairs, frame = [], 0
    for grid in media:
        pairs.append((grid, layout.frames[sample][frame].num_tokens))
        frame += grid[0]
    return pairs
