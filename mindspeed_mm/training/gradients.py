"""The end of a backward pass: gradients of all replicas, of sequence shards and of tied weights brought together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel


class GradientFinalizer:
    """What megatron's schedules call after the last micro-batch.

    Args:
        embedding_group: ranks that hold a copy of the tied embedding; None on the others, and where it is not tied.
    """

    def __init__(self, embedding_group: dist.ProcessGroup | None) -> None:
        self.embedding_group = embedding_group

    def __call__(
        self, models: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **kw: Any
    ) -> None:
        """Megatron's own work (replicas, sequence parallelism, division by tokens), then the tied weights."""
        finalize_model_grads(models, num_tokens, **kw)
        tied = [weight for model in models if (weight := model.module.tied_weight()) is not None]
        self._add_up([weight.main_grad for weight in tied if weight.requires_grad])

    def _add_up(self, gradients: Sequence[torch.Tensor]) -> None:
        if not gradients:
            return
        # Both copies may be chunks of this one rank; otherwise the other copy is on the other rank of the group.
        total = gradients[0]
        for gradient in gradients[1:]:
            total.add_(gradient)
        if self.embedding_group is not None and self.embedding_group.size() > 1:
            dist.all_reduce(total, group=self.embedding_group)
        for gradient in gradients[1:]:
            gradient.copy_(total)
