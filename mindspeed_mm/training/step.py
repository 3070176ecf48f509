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
    }
    if kind is LossKind.PER_TOKEN:
        return loss, torch.tensor(rows.numel(), dtype=torch.int32, device=losses.device), measures
    return loss, measures


@dataclass(frozen=True, slots=True)
class StepResult:
    """What an iteration measured; equal on all ranks of the last stage."""

    loss: float
    tokens_per_sample: float
    supervised_tokens: int


def summarise(measures: list[Measures], kind: LossKind, group: dist.ProcessGroup, device: torch.device) -> StepResult:
    """Means over micro-batches and data-parallel replicas.

    Args:
        measures: one entry per micro-batch of this rank.
        kind: the per-token loss is summed and divided by the tokens of the global batch, the others are averaged.
        group: the data-parallel group.
        device: where collectives of that group run.
    """
    rows = [[m["loss"].item(), m["supervised"].item(), m["tokens"].item(), m["samples"].item(), 1.0] for m in measures]
    total = torch.tensor(rows, dtype=torch.float64).sum(dim=0)
    # float32 on the wire: some accelerators' collectives have no float64.
    total = total.to(device=device, dtype=torch.float32)
    dist.all_reduce(total, group=group)
    loss, supervised, tokens, samples, count = total.tolist()
    denominator = supervised if kind is LossKind.PER_TOKEN else count
    return StepResult(
        loss=loss / max(denominator, 1.0),
        tokens_per_sample=tokens / max(samples, 1.0),
        supervised_tokens=int(supervised),
    )
