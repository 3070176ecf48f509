"""The core attention that megatron's SelfAttention calls, and what it is told about the row it works on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mindspeed_mm.models.common.kernels import Kernels
    from mindspeed_mm.models.common.sequence import RowSplit


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
    """[s, d]; the rotation is done in this dtype."""
    sin: Tensor
    split: RowSplit
    """How the row is spread over ranks; segments and tables are those of the whole padded row."""
    qkv_format: ClassVar[str] = "row"


class CoreAttention(torch.nn.Module):
    """Rotary embedding and attention inside the segments of a row.

    Args:
        kernels: attention and rotation of the platform.
        config: of the tower. Other arguments are what megatron's SelfAttention passes; none of them matters here.
    """

    def __init__(self, config: TransformerConfig, *, kernels: Kernels, **_: Any) -> None:
        super().__init__()
        assert config.kv_channels is not None
        self.head_size = config.kv_channels
        self.scale = 1.0 / math.sqrt(config.kv_channels)
        self.kernels = kernels

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
        """Attention output [s/cp, 1, n*d] of query [s/cp, 1, n, d], key and value [s/cp, 1, g, d]; no mask tensor."""
        assert attention_mask is None, "segments come in the RowLayout, not as a mask"
        layout = packed_seq_params
        # Megatron 0.12 drops the batch dim before the call, later releases keep it.
        query, key, value = (t.reshape(t.shape[0], -1, self.head_size) for t in (query, key, value))
        exchange = layout.split.exchange(query.shape[1], key.shape[1])
        if exchange is not None:
            query, key, value = exchange.to_heads(query, key, value)
        if query.shape[1]:
            query = self.kernels.rotary(query, layout.cos, layout.sin)
            key = self.kernels.rotary(key, layout.cos, layout.sin)
            out = self.kernels.attention(query, key, value, layout.cu_seqlens, layout.causal, self.scale)
        else:
            # More context ranks than heads: this one has none, but takes part in all exchanges, also backwards.
            out = query + key + value
        if exchange is not None:
            out = exchange.to_rows(out)
        return out.reshape(out.shape[0], 1, -1)
