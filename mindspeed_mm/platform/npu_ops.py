"""The four fused operators of torch_npu that training calls, with the checks that the operators leave out.

Only keywords of the oldest supported signature are passed. Where the facts come from: the operator help of the
torch_npu 2.13.0 wheel.
"""

from __future__ import annotations

import functools
from importlib import import_module
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

MAX_SEGMENTS = 1024
"""Most segments of one call; the operator's help says both 1K and 2K."""
MASK_SIZE = 2048
"""Side of the compressed causal mask, whatever the sequence length."""
_SPARSE_FULL = 0
_SPARSE_CAUSAL_BOTTOM_RIGHT = 3


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension: x [..., h], weight [h] -> [..., h]. The operator wants equal dtypes."""
    return _torch_npu().npu_rms_norm(x, weight.to(x.dtype), epsilon=eps)[0]


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 f] -> [..., f]: SiLU of the first half times the second half."""
    return _torch_npu().npu_swiglu(x, dim=-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, n, d] by halves with cos and sin [s, d], in x's dtype.

    The operator takes four dimensions and full tables; [s, 1, n, d] with [s, 1, 1, d] is its SBND form.
    """
    if cos.size(-1) != x.size(-1):
        raise ValueError(f"cos has {cos.size(-1)} columns and x has {x.size(-1)}: repeat the half table to full width")
    tables = (table.to(x.dtype)[:, None, None, :] for table in (cos, sin))
    return _torch_npu().npu_rotary_mul(x.unsqueeze(1), *tables).squeeze(1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float) -> Tensor:
    """Attention inside the segments of one row, in the operator's TND layout.

    Args:
        q: [s, n, d]; float16, bfloat16 or float32, like k and v.
        k: [s, g, d], n a multiple of g.
        v: [s, g, d].
        cu_seqlens: [segments + 1] int32 on the CPU (a device tensor would make the host wait).
        causal: whether a token sees only itself and earlier ones of its segment.
        scale: factor of the scores; the operator's default is 1.

    Returns:
        [s, n, d].

    Raises:
        ValueError: heads, lengths or the place of cu_seqlens do not fit; the operator would not notice.
    """
    check_attention(q, k, v, cu_seqlens)
    bounds: list[int] = cu_seqlens.tolist()
    if len(bounds) - 1 <= MAX_SEGMENTS:
        return _attend(q, k, v, bounds, causal, scale)
    outputs = []
    for first in range(0, len(bounds) - 1, MAX_SEGMENTS):
        part = bounds[first : first + MAX_SEGMENTS + 1]
        rows = slice(part[0], part[-1])
        outputs.append(_attend(q[rows], k[rows], v[rows], [bound - part[0] for bound in part], causal, scale))
    return torch.cat(outputs)


def check_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError for what the operator accepts and computes wrongly."""
    heads, groups = q.size(1), k.size(1)
    if groups == 0 or heads % groups or v.size(1) != groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key and {v.size(1)} value heads evenly")
    if cu_seqlens.device.type != "cpu":
        raise ValueError(f"cu_seqlens lies on {cu_seqlens.device}; lengths are needed on the host")
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != q.size(0):
        raise ValueError(f"cu_seqlens goes from {first} to {last}, and the row has tokens 0 to {q.size(0)}")


@functools.cache
def causal_mask(device: torch.device) -> Tensor:
    """The compressed mask [2048, 2048] of the causal modes, True where hidden; made once per device."""
    return torch.triu(torch.ones(MASK_SIZE, MASK_SIZE, dtype=torch.bool, device=device), diagonal=1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], causal: bool, scale: float) -> Tensor:
    # Without a mask the operator silently ignores sparse_mode and attends fully, so both are chosen together.
    mask = causal_mask(q.device) if causal else None
    return _torch_npu().npu_fusion_attention(
        q,
        k,
        v,
        q.size(1),
        "TND",
        atten_mask=mask,
        scale=scale,
        keep_prob=1.0,
        # Cumulative ends as ints; a leading 0 would count as an empty first segment.
        actual_seq_qlen=bounds[1:],
        actual_seq_kvlen=bounds[1:],
        sparse_mode=_SPARSE_CAUSAL_BOTTOM_RIGHT if causal else _SPARSE_FULL,
    )[0]


def _torch_npu() -> ModuleType:
    return import_module("torch_npu")
