"""The forward step that megatron's schedules call, and what a training iteration measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from mindspeed_mm.ops.loss import IGNORE_INDEX, LossKind, token_weights

if TYPE_CHECKING:
    from mindspeed_mm.config import TrainingConfig
    from mindspeed_mm.models.qwen2vl.chunk import Qwen2VLChunk
    from mindspeed_mm.ops.batch import Batch

Measures = dict[str, Tensor | float]


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
    model = cast("Qwen2VLChunk", getattr(chunk, "module", chunk))
    return chunk(batch), partial(_reduce, batch=batch, model=model, kind=kind)


def _reduce(losses: Tensor, *, batch: Batch, model: Qwen2VLChunk, kind: LossKind) -> tuple[Any, ...]:
    rows = model.local_supervised_rows(batch)
    weights = token_weights(batch.labels, batch.cu_seqlens, kind)[rows]
    loss = (losses * weights.to(losses.device, non_blocking=True)).sum()
    # With context parallelism every rank has a part of the row; what belongs to the whole row is counted once.
    once = float(model.split.cp_rank == 0)
    supervised = float((batch.labels != IGNORE_INDEX).sum())
    measures = {
        "loss": loss.detach().clone(),  # the schedule divides the loss itself in place
        "supervised": once * supervised,
        "tokens": once * batch.num_tokens,
        "samples": once * batch.num_samples,
        "image_tokens": once * batch.image_rows.numel(),
        "micro_batches": once,
        "learning_micro_batches": once * float(supervised > 0),
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
        group: the ranks of all replicas and of one row: data and context parallel.
        device: where collectives of that group run.
    """
    rows = [[float(value) for value in measure.values()] for measure in measures]
    total = torch.tensor(rows, dtype=torch.float64).sum(dim=0)
    # float32 on the wire: some accelerators' collectives have no float64.
    total = total.to(device=device, dtype=torch.float32)
    dist.all_reduce(total, group=group)
    loss, *counts = total.tolist()
    return StepResult(kind, loss, *(int(count) for count in counts))
