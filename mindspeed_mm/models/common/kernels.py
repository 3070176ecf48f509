"""The four operations that platforms have fused kernels for, and torch's own where they have none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mindspeed_mm.ops.attention import AttentionBackend, segment_attention
from mindspeed_mm.ops.fused import rms_norm, swiglu
from mindspeed_mm.ops.rotary import apply_rotary

if TYPE_CHECKING:
    from mindspeed_mm.platform.base import Platform, Rotary


@dataclass(frozen=True, slots=True)
class Kernels:
    """Functions that the layers call; shapes are those of `mindspeed_mm.ops`."""

    attention: AttentionBackend
    rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]


def choose_kernels(platform: Platform) -> Kernels:
    """The platform's fused kernels where it has them; attention only for the dtypes that its kernel takes."""
    fused = platform.fused
    return Kernels(
        attention=_attention(platform),
        rotary=apply_rotary if fused.rotary is None else _rotary(fused.rotary),
        rms_norm=fused.rms_norm or rms_norm,
        swiglu=fused.swiglu or swiglu,
    )


def _attention(platform: Platform) -> AttentionBackend:
    fused, dtypes = platform.fused.varlen_attention, platform.fused.varlen_dtypes
    if fused is None:
        return segment_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
        function = fused if query.dtype in dtypes else segment_attention
        return function(query, key, value, cu_seqlens, causal, scale)

    return attention


def _rotary(fused: Rotary) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # The arithmetic is done in the dtype of the tables: float32 in the vision tower.
        return fused(x.to(cos.dtype), cos, sin).to(x.dtype)

    return rotary
