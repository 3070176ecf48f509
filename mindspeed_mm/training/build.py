"""Builds what a rank trains: its model chunks with their weights, wrapped for data parallelism."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from checkpoint.load import read_stage
from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.models.qwen2vl.chunk import Qwen2VLChunk, build_chunk

if TYPE_CHECKING:
    from mindspeed_mm.config import OptimizerConfig, RunConfig, TrainingConfig
    from mindspeed_mm.plan import StagePlan
    from mindspeed_mm.platform.base import Platform
    from mindspeed_mm.platform.groups import Groups
    from mindspeed_mm.storage.layout import Iteration

logger = logging.getLogger(__name__)


def build_chunks(run: RunConfig, plan: StagePlan, groups: Groups, platform: Platform) -> list[Qwen2VLChunk]:
    """The chunks of this rank, in virtual-stage order; random only where `--init-random` says so."""
    cp_group = groups.cp if run.parallel.cp_size > 1 else None
    initialize = run.checkpoint.init_random
    chunks = [
        build_chunk(run.model, plan, stage, run.parallel, run.training, platform, cp_group, initialize=initialize)
        for stage in plan.stages_of_rank(groups.ranks.pp_rank)
    ]
    if run.checkpoint.init_random and groups.embedding is not None:
        _copy_tied_embedding(chunks, groups.embedding)
    return chunks


def load_weights(
    chunks: Sequence[Qwen2VLChunk],
    path: Path,
    run: RunConfig,
    plan: StagePlan,
    groups: Groups,
    *,
    iteration: Iteration | None = None,
) -> None:
    """Fill every parameter from an MM directory or a Hugging Face directory; each rank reads only its slices.

    Raises:
        CheckpointError: a weight is missing, has another shape, or does not belong to this stage.
    """
    for chunk in chunks:
        tensors = read_stage(path, run.model, plan, chunk.stage, groups.ranks.tp_rank, iteration=iteration)
        problems = fill(chunk, tensors)
        if problems:
            raise CheckpointError("\n  ".join([f"{path} does not fit pipeline rank {chunk.stage.pp_rank}:", *problems]))


def fill(chunk: nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Copy tensors into the parameters of the same names; returns what does not fit (nothing is copied then)."""
    parameters = dict(chunk.named_parameters())
    problems = [f"{name} is missing" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"{name} has no place in the model" for name in sorted(tensors.keys() - parameters.keys())]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, the model wants {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if not problems:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
    return problems


def wrap_chunks(
    chunks: Sequence[Qwen2VLChunk], optimizer: OptimizerConfig, training: TrainingConfig
) -> list[DistributedDataParallel]:
    """Megatron's DDP around every chunk: contiguous gradient buffers, reduction over the data-parallel ranks."""
    config = DistributedDataParallelConfig(
        # bf16 gradients are summed over micro-batches and replicas in fp32, as Megatron's arguments do.
        grad_reduce_in_fp32=optimizer.accumulate_allreduce_grads_in_fp32 or training.params_dtype == "bf16",
        overlap_grad_reduce=optimizer.overlap_grad_reduce,
        overlap_param_gather=optimizer.overlap_param_gather,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the training loop looks at the gradient norm, which every rank knows
        average_in_collective=False,
    )
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=config,
            module=chunk,
            # Only the chunk that backward reaches last can be overlapped bucket by bucket.
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]


def _copy_tied_embedding(chunks: Sequence[Qwen2VLChunk], group: dist.ProcessGroup) -> None:
    """Give the head's copy of a randomly made tied embedding the values of the original."""
    for chunk in chunks:
        weight = chunk.tied_weight()
        if weight is not None:
            if not chunk.pre_process:
                weight.data.zero_()
            dist.all_reduce(weight.data, group=group)
