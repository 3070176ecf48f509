"""Loss reductions over the supervised tokens of a packed micro-batch."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

IGNORE_INDEX = -100


class LossKind(StrEnum):
    """How token losses become the number that is differentiated."""

    PER_MICRO_BATCH = "default"
    PER_TOKEN = "token"
    PER_SAMPLE = "sample"


def supervised_rows(labels: Tensor) -> Tensor:
    """Positions whose label is not -100: [k] int64, ascending. `labels`: [s] int64, already shifted, on the host."""
    return (labels != IGNORE_INDEX).nonzero().flatten()


def sample_of_rows(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Number of the sample that each position belongs to: [k] int64. `cu_seqlens`: [samples + 1] int32."""
    return torch.searchsorted(cu_seqlens.to(torch.int64), rows, right=True) - 1


def token_weights(labels: Tensor, cu_seqlens: Tensor, kind: LossKind) -> Tensor:
    """What the loss of every supervised position counts for in the loss of its micro-batch.

    The weights follow from the labels of the whole row, so any rank can apply them to the losses that it computed, and
    the sum over ranks is the loss of the micro-batch.

    Args:
        labels: [s] int64, already shifted, on the host.
        cu_seqlens: [samples + 1] int32.
        kind: `default` is the mean over tokens, `sample` the mean over samples of the mean over their tokens, `token`
            the plain sum (the division by the token count of the global batch comes after the last micro-batch).
    Returns:
        [s] float32, 0 where nothing is supervised. Samples without supervised tokens are left out of the mean over
        samples.
    """
    rows = supervised_rows(labels)
    weights = torch.zeros(labels.shape[0])
    if kind is LossKind.PER_TOKEN:
        weights[rows] = 1.0
    elif kind is LossKind.PER_MICRO_BATCH:
        weights[rows] = 1.0 / max(rows.numel(), 1)
    else:
        samples = sample_of_rows(rows, cu_seqlens)
        counts = torch.bincount(samples, minlength=cu_seqlens.numel() - 1)
        weights[rows] = 1.0 / (counts[samples] * max(int((counts > 0).sum()), 1))
    return weights
