"""Attention of MOSS-VL on its backends.

`sdpa` (default) never builds a mask of text times vision tokens; `eager` is the reference with dense masks; any other
name is looked up in transformers' registry (flash_attention_2 and relatives) for attention over text and inside frames,
while cross-attention stays with SDPA as upstream does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from mindspeed_mm.models.mossvl.visibility import RowChunk

OWN_BACKENDS = ("eager", "sdpa")


def registered_attention(name: str) -> object:
    """transformers' attention function of this name; KeyError when there is none."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention in float32 with an additive bias.

    Args:
        q: [b, n, s, d]; k, v: [b, g, t, d] with n a multiple of g.
        bias: broadcasts to [b, n, s, t].
    Returns:
        [b, n, s, d] in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def additive(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, the smallest number of `dtype` where masked."""
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill(masked, torch.finfo(dtype).min)


def grouped_sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """SDPA with fewer key heads than query heads; `visible` is a bool mask, True = attended."""
    return scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@dataclass(frozen=True, slots=True)
class TextMask:
    """What self-attention needs to know of a forward pass, computed once for all layers.

    Attributes:
        padding: the caller's [b, t] mask over past and present tokens, when it has zeros; for flash backends.
        visible: [b, 1, s, t] bool, or None when causality alone is enough.
        is_causal: causality is left to the backend.
    """

    padding: Tensor | None
    visible: Tensor | None
    is_causal: bool

    @classmethod
    def build(
        cls, attention_mask: Tensor | None, *, num_new: int, num_past: int, is_dense: bool, device: torch.device
    ) -> TextMask:
        """Mask of `num_new` tokens after `num_past` cached ones; `is_dense` asks for `visible` in every case."""
        total = num_past + num_new
        padding = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        # Tokens never see later ones, so padding on the right needs no mask: nothing that counts can see it.
        is_right = padding is None or bool((padding[:, 1:] <= padding[:, :-1]).all())
        if not is_dense and is_right and (num_past == 0 or (num_new == 1 and padding is None)):
            return cls(padding, None, is_causal=num_past == 0 and num_new > 1)
        row = torch.arange(num_past, total, device=device)[:, None]
        column = torch.arange(total, device=device)[None]
        visible = (column <= row)[None, None]
        if padding is not None:
            # A padding row keeps itself, else it would have nothing to attend to.
            visible = (visible & padding[:, None, None]) | (column == row)
        return cls(padding, visible, is_causal=False)


def self_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: TextMask, backend: str) -> Tensor:
    """Causal attention over text: q [b, n, s, d], k and v [b, g, t, d] -> [b, s, n, d]."""
    scale = q.shape[-1] ** -0.5
    if backend == "sdpa":
        return grouped_sdpa(q, k, v, scale, visible=mask.visible, is_causal=mask.is_causal).transpose(1, 2)
    if backend == "eager":
        if mask.visible is None:
            raise AssertionError("the eager backend builds its mask")
        return dense_attention(q, k, v, additive(~mask.visible, q.dtype), scale).transpose(1, 2)
    attention = registered_attention(backend)
    return attention(module, q, k, v, mask.padding, dropout=0.0, scaling=scale)[0]  # type: ignore[operator]


def prefix_attention(q: Tensor, k: Tensor, v: Tensor, chunks: list[tuple[RowChunk, ...]]) -> Tensor:
    """Attention of text rows to a prefix of the vision tokens, without a mask over all of them.

    Args:
        q: [b, n, s, d]; k, v: [b, g, t, d].
        chunks: rows of each sample (`visibility.row_chunks`).
    Returns:
        [b, s, n, d]; zero on rows that see nothing.
    """
    scale = q.shape[-1] ** -0.5
    samples = []
    for index, sample_chunks in enumerate(chunks):
        parts = []
        for chunk in sample_chunks:
            rows = q[index : index + 1, :, chunk.start : chunk.stop]
            if chunk.num_visible == 0:
                # Zero, but with a gradient of zero for keys and values: data-parallel engines wait for every parameter,
                # also in a batch where no text sees a picture.
                parts.append(grouped_sdpa(rows, k[index : index + 1, :, :1], v[index : index + 1, :, :1], scale) * 0)
                continue
            keys, values = (x[index : index + 1, :, : chunk.num_visible] for x in (k, v))
            visible = None
            if chunk.lengths is not None:
                lengths = torch.tensor(chunk.lengths, device=q.device)[:, None]
                visible = torch.arange(chunk.num_visible, device=q.device)[None] < lengths
            parts.append(grouped_sdpa(rows, keys, values, scale, visible=visible))
        samples.append(torch.cat(parts, dim=2))
    return torch.cat(samples).transpose(1, 2)
