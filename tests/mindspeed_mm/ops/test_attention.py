"""Attention per segment equals one masked product in float64, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mindspeed_mm.ops.attention import equal_runs, segment_attention


def reference(query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], causal: bool, scale: float) -> Tensor:
    """Dense float64 attention with a [s, s] mask."""
    size, repeat = query.shape[0], query.shape[1] // key.shape[1]
    segment = torch.zeros(size, dtype=torch.int64)
    for number, (start, end) in enumerate(pairwise(boundaries)):
        segment[start:end] = number
    visible = segment[:, None] == segment[None]
    if causal:
        visible &= torch.ones(size, size, dtype=torch.bool).tril()
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = torch.einsum("snd,tnd->nst", query, key) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("nst,tnd->snd", weights, value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("boundaries", [[0, 13], [0, 1, 5, 9, 13], [0, 4, 8, 12, 13], [0, 0, 6, 6, 13]])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_segments_equal_a_masked_product(boundaries: list[int], causal: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(13, heads, 8, generator=generator, requires_grad=True) for heads in (4, groups, groups)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = segment_attention(*tensors, torch.tensor(boundaries, dtype=torch.int32), causal, 0.3)
    expected = reference(*exact, boundaries, causal, 0.3)
    weights = torch.randn(13, 4, 8, generator=generator)
    (out * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    # float32 sums over at most 13 keys
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(tensors, exact, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_no_tensor_of_the_whole_row_squared_is_made() -> None:
    size = 512
    seen: list[int] = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    query = torch.randn(size, 1, 4)
    with Largest():
        segment_attention(query, query, query, torch.arange(0, size + 1, 64, dtype=torch.int32), True, 1.0)
    assert max(seen) < size * size


def test_equal_neighbours_are_one_run_and_empty_segments_none() -> None:
    assert list(equal_runs([0, 4, 8, 10])) == [(0, 2, 4), (8, 1, 2)]
    assert list(equal_runs([0, 0, 3, 3, 6])) == [(0, 2, 3)]
    assert list(equal_runs([0])) == []
