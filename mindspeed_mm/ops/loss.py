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


def reduce_token_losses(losses: Tensor, samples: Tensor, num_samples: int, kind: LossKind) -> Tensor:
    """One number from the losses of the supervised tokens of a micro-batch.

    Args:
        losses: [k] float32.
        samples: [k] int64, the sample of each loss.
        num_samples: samples in the micro-batch, with or without supervised tokens.
        kind: `default` is the mean over tokens, `sample` the mean over samples of the mean over their tokens, `token`
            the plain sum (the division by the token count of the global batch comes after the last micro-batch).
    Returns:
        scalar float32; 0 (with zero gradients) where nothing is supervised, never NaN. Samples without supervised
        tokens are left out of the mean over samples.
    """
    if kind is LossKind.PER_TOKEN or losses.numel() == 0:
        return losses.sum()
    if kind is LossKind.PER_MICRO_BATCH:
        return losses.mean()
    counts = torch.bincount(samples, minlength=num_samples).to(losses.device)
    weights = 1.0 / counts.clamp(min=1).to(losses.dtype)
    return (losses * weights[samples.to(losses.device)]).sum() / (counts > 0).sum()
