"""The core attention that megatron's SelfAttention calls, and what it is told about the row it works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mindspeed_mm.ops.attention import segment_attention
from mindspeed_mm.ops.rotary import apply_rotary

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_mm.ops.attention import AttentionBackend
    from mindspeed_mm.platform.base import Platform


def attention_backend(platform: Platform) -> AttentionBackend:
    """The platform's fused attention for the dtypes that it takes, torch's attention per segment for the others."""
    fused, dtypes = platform.fused.varlen_attention, platform.fused.varlen_dtypes
    if fused is None:
        return segment_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
        function = fused if query.dtype in dtypes else segment_attention
        return function(query, key, value, cu_seqlens, causal, scale)

    return attention


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Segments and rotary tables of one padding-free row; the same for all layers of a tower.

    It travels through megatron in the `packed_seq_params` argument, which every layer hands on untouched (also through
    activation recompute) as long as `qkv_format` is not one that the library itself knows.
    """

    cu_seqlens: Tensor
    """[segments + 1] int32 from 0 to s; on the host, where every backend wants the lengths."""
    causal: bool
    cos: Tensor
    """[s, 1, d/2]; the rotation is done in this dtype."""
    sin: Tensor
    qkv_format: ClassVar[str] = "row"


class CoreAttention(torch.nn.Module):
    """Rotary embedding and attention inside the segments of a row.

    Args:
        backend: the attention function, `mindspeed_mm.ops.attention` says what it takes.
        config: of the tower. Other arguments are what megatron's SelfAttention passes; none of them matters here.
    """

    def __init__(self, config: TransformerConfig, *, backend: AttentionBackend, **_: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.scale = 1.0 / math.sqrt(config.kv_channels)
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: RowLayout,
        **_: Any,
    ) -> Tensor:
        """Attention output [s, 1, n*d] of query [s, 1, n, d], key and value [s, 1, g, d]; there is no mask tensor."""
        assert attention_mask is None, "segments come in the RowLayout, not as a mask"
        layout = packed_seq_params
        query = apply_rotary(query.squeeze(1), layout.cos, layout.sin)
        key = apply_rotary(key.squeeze(1), layout.cos, layout.sin)
        out = self.backend(query, key, value.squeeze(1), layout.cu_seqlens, layout.causal, self.scale)
        return out.reshape(out.shape[0], 1, -1)
