"""Attention over one row of segments: the backends behind one signature.

A backend is a function of (query, key, value, cu_seqlens, causal, scale). Every token attends only inside its own
segment, causally or fully; no mask over the whole row is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionBackend = Callable[[Tensor, Tensor, Tensor, Tensor, bool, float], Tensor]


def equal_runs(boundaries: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbouring segments of equal length, as (start, number of segments, length); empty segments are left
    out.

    Example: boundaries 0, 4, 8, 10 give (0, 2, 4) and (8, 1, 2).
    """
    start, count, length = 0, 0, 0
    for begin, end in pairwise(boundaries):
        if end == begin:
            continue
        if count and end - begin == length:
            count += 1
            continue
        if count:
            yield start, count, length
        start, count, length = begin, 1, end - begin
    if count:
        yield start, count, length


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool, scale: float
) -> Tensor:
    """Scaled dot-product attention, one call per run of equally long segments.

    Args:
        query: [s, n, d].
        key, value: [s, g, d]; g divides n, and key head j serves query heads j*n/g .. (j+1)*n/g - 1.
        cu_seqlens: [segments + 1] int32 on the host, from 0 to s: where segments begin and end.
        causal: whether a token sees only itself and what comes before it in its segment.
        scale: multiplies the products, usually 1/sqrt(d).
    Returns:
        [s, n, d].
    """
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    outputs = []
    for start, count, length in equal_runs(cu_seqlens.tolist()):
        q, k, v = (
            t[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2) for t in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return torch.zeros_like(query)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
