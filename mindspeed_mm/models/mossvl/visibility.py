"""Which vision tokens a text token sees: always a prefix of its sample's vision tokens.

A text token sees the frames whose image token stands at or before it, whole and with their separators. One integer per
text token says it all; the dense mask exists for the reference attention and for callers who pass their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.positions import frame_of_token

MIN_CHUNK_ROWS = 128


def masked_frames(
    input_ids: Tensor, attention_mask: Tensor | None, layout: VisionLayout, *, image_token_id: int
) -> Tensor:
    """The processor's `cross_attention_mask`: [b, 1, s, frames] bool, True where a text token does not see a frame."""
    last = frame_of_token(input_ids, attention_mask, image_token_id)[1]
    frame = torch.arange(layout.num_frames, device=input_ids.device)
    counts = torch.tensor([len(frames) for frames in layout.frames], device=input_ids.device)
    visible = (frame <= last[..., None]) & (frame < counts[:, None, None])
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[..., None]
    return ~visible[:, None]


def visible_lengths(cross_attention_mask: Tensor, layout: VisionLayout) -> Tensor | None:
    """Vision tokens that each text token sees, or None when some token does not see a prefix.

    Args:
        cross_attention_mask: [b, 1, s, frames] bool, True masked.
    Returns:
        [b, s] int64.
    """
    visible = ~cross_attention_mask[:, 0]
    if bool((visible[..., 1:] & ~visible[..., :-1]).any()):
        return None
    boundaries = layout.boundaries().to(visible.device)
    num_visible = visible.sum(-1).clamp(max=boundaries.shape[1] - 1)
    return boundaries.gather(1, num_visible)


def dense_mask(cross_attention_mask: Tensor, layout: VisionLayout) -> Tensor:
    """Token-level form of the frame mask: [b, 1, s, padded_length] bool, True masked, padding masked."""
    boundaries = layout.boundaries()
    token = torch.arange(layout.padded_length).expand(boundaries.shape[0], -1).contiguous()
    frame = torch.searchsorted(boundaries[:, 1:].contiguous(), token, right=True).to(cross_attention_mask.device)
    masked = torch.nn.functional.pad(cross_attention_mask, (0, 1), value=True)
    index = frame.clamp(max=masked.shape[-1] - 1)[:, None, None].expand(-1, 1, masked.shape[2], -1)
    return masked.gather(3, index)


@dataclass(frozen=True, slots=True)
class RowChunk:
    """Neighbouring text rows of one sample that are attended together.

    `lengths` is None when all rows see the same `num_visible` vision tokens, else it says how many each row sees.
    """

    start: int
    stop: int
    num_visible: int
    lengths: tuple[int, ...] | None


def row_chunks(lengths: list[int], min_rows: int = MIN_CHUNK_ROWS) -> tuple[RowChunk, ...]:
    """Cut the rows of a sample so that most need no mask.

    Neighbouring rows that see the same tokens form a run; runs are joined until they have `min_rows` rows, because each
    chunk costs a kernel call and, in the backward pass, one gradient of the size of the keys. Rows that see nothing
    stay apart: their attention is defined as zero.
    """
    runs: list[tuple[int, int, int]] = []
    for row, length in enumerate(lengths):
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], row + 1, length)
        else:
            runs.append((row, row + 1, length))
    chunks: list[RowChunk] = []
    pending: list[tuple[int, int, int]] = []
    for run in runs:
        is_large = run[1] - run[0] >= min_rows
        if pending and (is_large or run[2] == 0):
            chunks.append(_chunk(pending, lengths))
            pending = []
        if is_large or run[2] == 0:
            chunks.append(_chunk([run], lengths))
            continue
        pending.append(run)
        if pending[-1][1] - pending[0][0] >= min_rows:
            chunks.append(_chunk(pending, lengths))
            pending = []
    if pending:
        chunks.append(_chunk(pending, lengths))
    return tuple(chunks)


def _chunk(runs: list[tuple[int, int, int]], lengths: list[int]) -> RowChunk:
    start, stop = runs[0][0], runs[-1][1]
    return RowChunk(start, stop, max(run[2] for run in runs), None if len(runs) == 1 else tuple(lengths[start:stop]))
