"""Rotary position embedding: cosine and sine tables, and their application to queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def inverse_frequencies(dim: int, theta: float, *, device: torch.device | None = None) -> Tensor:
    """Inverse frequencies theta^(-2i/dim), i = 0 .. dim/2 - 1.

    Returns:
        [dim/2] float32. Always float32: rounded to bfloat16 they lose the position (3 digits).
    """
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def mrope_tables(
    position_ids: Tensor, sections: Sequence[int], theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of multimodal rotary positions for the text decoder.

    Args:
        position_ids: [3, s] int64, temporal, height and width positions.
        sections: how many of the d/2 frequencies take each row; adds up to d/2.
        theta: base of the frequencies.
        dtype: of the result; the angles are computed in float32.
    Returns:
        Two [s, d] tensors, the second half of d repeating the first. Frequency i of section j uses row j of the
        positions.
    Source: Qwen2-VL (arXiv 2409.12191), section 2.1; equal to transformers' apply_multimodal_rotary_pos_emb.
    """
    half = sum(sections)
    frequencies = inverse_frequencies(2 * half, theta, device=position_ids.device)
    row_of = torch.repeat_interleave(
        torch.arange(len(sections), device=position_ids.device),
        torch.tensor(list(sections), device=position_ids.device),
        output_size=half,
    )
    angles = position_ids.to(torch.float32)[row_of].t() * frequencies
    return _doubled(angles.cos().to(dtype)), _doubled(angles.sin().to(dtype))


def vision_tables(position_ids: Tensor, head_size: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2-D rotary positions of the vision tower.

    Args:
        position_ids: [p, 2] int64, height and width index of every patch.
        head_size: d; a quarter of it is the number of frequencies per axis.
    Returns:
        Two [p, d] float32 tensors: height angles, then width angles, then both again.
    """
    frequencies = inverse_frequencies(head_size // 2, theta, device=position_ids.device)
    angles = (position_ids.to(torch.float32)[:, :, None] * frequencies).flatten(1)
    return _doubled(angles.cos()), _doubled(angles.sin())


def _doubled(table: Tensor) -> Tensor:
    return torch.cat([table, table], dim=-1)


class _RotateHalf(torch.autograd.Function):
    """x -> (x1 cos - x2 sin, x2 cos + x1 sin); the backward is the rotation by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    # Three passes; the usual x * cos + cat((-x2, x1)) * sin makes five.
    wide, half = x.to(cos.dtype), x.shape[-1] // 2
    out = wide * cos[:, None]
    sin = sin[:, None, :half]
    out[..., :half].addcmul_(wide[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(wide[..., :half], sin, value=sign)
    return out.to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dim of x.

    Args:
        x: [s, n, d].
        cos, sin: [s, d], halves equal; the arithmetic is done in their dtype (float32 in the vision tower).
    Returns:
        [s, n, d] in the dtype of x.
    """
    return _RotateHalf.apply(x, cos, sin)
