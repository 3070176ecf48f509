"""Rotary tables and the interpolated position table of MOSS-VL."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_mm.ops.mrope import vision_position_ids


def inverse_frequencies(theta: float, size: int) -> Tensor:
    """theta ** (-2k / size) for k < size / 2: [size / 2] float32."""
    return 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))


def rope_axes(section: Sequence[int]) -> Tensor:
    """Axis (0 time, 1 row, 2 column) of every angle: interleaved T H W T H W ..., the rest time. [d / 2] int64."""
    axes = torch.zeros(sum(section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def interleaved_rope(
    positions: Tensor, *, theta: float, section: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token, for the half-split rotation.

    Args:
        positions: [3, b, s] or [b, s] (all axes equal) int64.
    Returns:
        two tensors [b, s, d], computed in float32 and cast to `dtype`.
    Source: interleaved M-RoPE of Qwen3-VL.
    """
    frequencies = inverse_frequencies(theta, 2 * sum(section)).to(positions.device)
    if positions.ndim == 2:
        per_angle = positions[..., None].float()
    else:
        axes = rope_axes(section).to(positions.device)
        per_angle = positions.float().permute(1, 2, 0).index_select(2, axes)
    angles = per_angle * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., d] rotated by cos and sin, which broadcast to it; first half of d with second half."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def vision_rope(grid_thw: Tensor, *, head_size: int, merge_size: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every patch: half of the angles follow the row, half the column; frames do not differ.

    Args:
        grid_thw: [media, 3] int64 on the CPU.
    Returns:
        two tensors [p, head_size] float32 on the CPU.
    """
    positions = vision_position_ids(grid_thw, merge_size).float()
    frequencies = inverse_frequencies(10000.0, head_size // 2)
    angles = (positions[:, :, None] * frequencies).flatten(1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def position_corners(height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Corners of the learned side x side table that surround each patch of a frame, and their weights.

    Returns:
        [4, height * width] int64 and [4, height * width] float32, patches in row-major order; a corner outside the
        table is clamped to its edge, where its weight is 0.
    """
    rows, columns = torch.linspace(0, side - 1, height), torch.linspace(0, side - 1, width)
    row, column = rows.to(torch.int64), columns.to(torch.int64)
    row_share, column_share = (rows - row)[:, None], (columns - column)[None]
    rows_of, columns_of = ((x, (x + 1).clamp(max=side - 1)) for x in (row, column))
    indices = torch.stack([(r[:, None] * side + c[None]).flatten() for r in rows_of for c in columns_of])
    weights = [r * c for r in (1 - row_share, row_share) for c in (1 - column_share, column_share)]
    return indices, torch.stack([weight.flatten() for weight in weights])


def merge_block_order(x: Tensor, height: int, width: int, merge_size: int) -> Tensor:
    """Rows of x [height * width, ...] from row-major order to the order of the patches (blocks of merge_size^2)."""
    grid = x.view(height // merge_size, merge_size, width // merge_size, merge_size, *x.shape[1:])
    return grid.transpose(1, 2).reshape(x.shape)
