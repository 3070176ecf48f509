"""The forward step that megatron's schedules call, and what a training iteration measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.ops.loss import LossKind, reduce_token_losses, sample_of_rows, supervised_rows

if TYPE_CHECKING:
    from mindspeed_mm.config import TrainingConfig
    from mindspeed_mm.ops.batch import Batch

Measures = dict[str, Tensor]


def loss_kind(training: TrainingConfig) -> LossKind:
    """The reduction that the command line asks for."""
    if training.calculate_per_token_loss:
        return LossKind.PER_TOKEN
    return LossKind.PER_SAMPLE if training.calculate_per_sample_loss else LossKind.PER_MICRO_BATCH


def forward_step(
    iterator: Iterator[Batch], chunk: torch.nn.Module, *, kind: LossKind
) -> tuple[Tensor, Callable[[Tensor], tuple[Any, ...]]]:
    """One micro-batch through one chunk.

    Returns:
        the chunk's output, and the function that turns the output of the last stage into
        (loss, measures), or (loss sum, number of supervised tokens, measures) for the per-token loss: megatron divides
        gradients by the tokens of the global batch in that case.
    """
    batch = next(iterator)
    return chunk(batch), partial(_reduce, batch=batch, kind=kind)


def _reduce(losses: Tensor, *, batch: Batch, kind: LossKind) -> tuple[Any, ...]:
    rows = supervised_rows(batch.labels)
    loss = reduce_token_losses(losses, sample_of_rows(rows, batch.cu_seqlens), batch.num_samples, kind)
    measures = {
        "loss": loss.detach().clone(),
        "supervised": torch.tensor(float(rows.numel())),
        "tokens": torch.tensor(float(batch.num_tokens)),
        "samples": torch.tensor(float(batch.num_samples)),
        "image_tokens": torch.tensor(float(batch.image_rows.numel())),
    }
    if kind is LossKind.PER_TOKEN:
        return loss, torch.tensor(rows.numel(), dtype=torch.int32, device=losses.device), measures
    return loss, measures


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sums over the micro-batches of all replicas; equal on all ranks of the last stage."""

    kind: LossKind
    loss_sum: float = 0.0
    supervised_tokens: int = 0
    tokens: int = 0
    samples: int = 0
    image_tokens: int = 0
    micro_batches: int = 0
    learning_micro_batches: int = 0
    """Micro-batches with at least one supervised token."""

    def __add__(self, other: StepResult) -> StepResult:
        return StepResult(
            self.kind,
            self.loss_sum + other.loss_sum,
            self.supervised_tokens + other.supervised_tokens,
            self.tokens + other.tokens,
            self.samples + other.samples,
            self.image_tokens + other.image_tokens,
            self.micro_batches + other.micro_batches,
            self.learning_micro_batches + other.learning_micro_batches,
        )

    @property
    def loss(self) -> float:
        """The number that was differentiated: a mean over micro-batches, or over tokens for the per-token loss."""
        return self.loss_sum / max(self._token_count(self.micro_batches), 1)

    @property
    def evaluation_loss(self) -> float:
        """The same mean without the micro-batches that have nothing to predict."""
        return self.loss_sum / max(self._token_count(self.learning_micro_batches), 1)

    @property
    def tokens_per_sample(self) -> float:
        """Real tokens, vision tokens included."""
        return self.tokens / max(self.samples, 1)

    def _token_count(self, otherwise: int) -> int:
        return self.supervised_tokens if self.kind is LossKind.PER_TOKEN else otherwise


def summarise(measures: list[Measures], kind: LossKind, group: dist.ProcessGroup, device: torch.device) -> StepResult:
    """Add up what the micro-batches of all replicas measured.

    Args:
        measures: one entry per micro-batch of this rank.
        kind: the reduction that made the losses.
        group: the data-parallel group.
        device: where collectives of that group run.
    """
    names = ("loss", "supervised", "tokens", "samples", "image_tokens")
    rows = [[*(m[name].item() for name in names), 1.0, float(m["supervised"].item() > 0)] for m in measures]
    total = torch.tensor(rows, dtype=torch.float64).sum(dim=0)
    # float32 on the wire: some accelerators' collectives have no float64.
    total = total.to(device=device, dtype=torch.float32)
    dist.all_reduce(total, group=group)
    loss, *counts = total.tolist()
    return StepResult(kind, loss, *(int(count) for count in counts))
