"""Positions of text tokens and vision patches: pure index arithmetic without loops over tokens or media."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_mm.errors import DataError


def mrope_position_ids(
    input_ids: Tensor,
    grid_thw: Tensor,
    *,
    media_token_ids: Sequence[int],
    merge_size: int,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Temporal, height and width positions of every token of one sample, or of a row of samples.

    Text tokens count up in all three rows. A vision block of grid (t, h, w) holds t*h*w/merge_size**2 tokens, placed at
    the running position plus their place in the merged grid; text after it goes on at the largest position plus one.

    Args:
        input_ids: [s] int64, without padding.
        grid_thw: [media, 3] int64, in patches before merging, in order of appearance; [0, 3] when there is no media.
        media_token_ids: ids of the tokens that stand for vision embeddings (image pad, video pad).
        merge_size: side of the square of patches that becomes one token.
        cu_seqlens: [samples + 1] integer; positions start again at 0 at each of these rows. None: one sample.
    Returns:
        [3, s] int64.
    Raises:
        DataError: vision tokens do not match the grids, a block is interrupted, or a block spans two samples.
    Source: Qwen2-VL (arXiv 2409.12191), section 2.1. Equal to transformers' get_rope_index, except after a video with
        more frame pairs than merged rows and columns: transformers 5 goes on at start + max(h, w) / merge_size, which
        gives text the positions of earlier frames; transformers 4 and the paper go on after the largest position, and
        so does this function.
    """
    _check_grids(grid_thw, merge_size)
    merged = grid_thw.clone()
    merged[:, 1:] //= merge_size
    counts = merged.prod(dim=1)
    rows = torch.isin(input_ids, torch.as_tensor(media_token_ids, dtype=torch.int64)).nonzero().flatten()
    first, last = _block_ends(rows, counts, grid_thw)

    # A block moves the running position on only at its last token, so all of its tokens see the position at its start.
    advance = torch.ones_like(input_ids)
    advance[rows] = 0
    advance[last] = merged.amax(dim=1) if merged.shape[0] else merged.new_zeros(0)
    base = advance.cumsum(0) - advance
    if cu_seqlens is not None:
        starts = cu_seqlens.to(torch.int64)
        _check_blocks_stay_in_samples(first, last, starts)
        base = base - base[starts[:-1]].repeat_interleave(starts.diff())

    height, width = (merged[:, dim].repeat_interleave(counts) for dim in (1, 2))
    place = _place_in_segment(counts)
    positions = base.repeat(3, 1)
    positions[:, rows] += torch.stack([place // (height * width), place // width % height, place % width])
    return positions


def _place_in_segment(counts: Tensor) -> Tensor:
    """0, 1, ... within each of the segments of these lengths, one after another: [counts.sum()] int64."""
    return torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _check_grids(grid_thw: Tensor, merge_size: int) -> None:
    if bool((grid_thw <= 0).any()) or bool((grid_thw[:, 1:] % merge_size).any()):
        raise DataError(
            f"grids {grid_thw.tolist()} must be positive, with height and width multiples of merge_size = {merge_size}"
        )


def _block_ends(rows: Tensor, counts: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor]:
    """First and last row of every vision block, checked against the rows that hold vision tokens."""
    needed = int(counts.sum())
    if rows.numel() != needed:
        raise DataError(f"{rows.numel()} vision tokens in the row, but the grids {grid_thw.tolist()} need {needed}")
    ends = counts.cumsum(0)
    first, last = rows[ends - counts], rows[ends - 1]
    broken = (last - first + 1 != counts).nonzero().flatten().tolist()
    if broken:
        grid = grid_thw[broken[0]].tolist()
        raise DataError(f"vision block {broken[0]} of grid {grid} is interrupted by other tokens")
    return first, last


def _check_blocks_stay_in_samples(first: Tensor, last: Tensor, starts: Tensor) -> None:
    crossing = torch.bucketize(first, starts, right=True) != torch.bucketize(last, starts, right=True)
    if bool(crossing.any()):
        raise DataError(f"vision block {int(crossing.nonzero()[0])} spans two samples: cu_seqlens {starts.tolist()}")


def vision_position_ids(grid_thw: Tensor, merge_size: int) -> Tensor:
    """Height and width position of every patch, in the order of the image processor.

    In that order the merge_size x merge_size patches which become one token are neighbours; the frames of a video
    repeat the same positions.

    Args:
        grid_thw: [media, 3] int64, height and width multiples of merge_size.
    Returns:
        [p, 2] int64 (height, width).
    Raises:
        DataError: a grid is not positive or not a multiple of merge_size.
    Source: equal to the position ids of the vision tower in transformers.
    """
    _check_grids(grid_thw, merge_size)
    counts = grid_thw.prod(dim=1)
    place = _place_in_segment(counts) % (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(counts)
    blocks_per_row = grid_thw[:, 2].repeat_interleave(counts) // merge_size
    block = place // merge_size**2
    height = block // blocks_per_row * merge_size + place // merge_size % merge_size
    width = block % blocks_per_row * merge_size + place % merge_size
    return torch.stack([height, width], dim=1)


def vision_cu_seqlens(grid_thw: Tensor) -> Tensor:
    """Boundaries of the attention segments of the vision tower: each image, and each frame pair of a video, is one.

    Args:
        grid_thw: [media, 3] int64.
    Returns:
        [segments + 1] int32.
    """
    sizes = (grid_thw[:, 1] * grid_thw[:, 2]).repeat_interleave(grid_thw[:, 0])
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)
