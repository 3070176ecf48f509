"""Our side of the parity tests: real processes, real schedules, results mapped back to Hugging Face names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.load import read_stage
from mindspeed_mm.config import OptimizerConfig, ParallelConfig, RuntimeConfig, TrainingConfig
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.ops.loss import LossKind
from mindspeed_mm.plan import StagePlan
from tests.parity.problem import (
    Layers,
    make_samples,
    read_config,
    to_batch,
    with_frozen,
    with_layout,
    with_recompute,
)
from tests.parity.reference import CLIP, LEARNING_RATE, WEIGHT_DECAY


@dataclass(frozen=True)
class Case:
    """One layout of the lattice."""

    tp: int = 1
    pp: int = 1
    vision: Layers = ()
    text: Layers = ()
    dp: int = 1
    vp: int = 1
    cp: int = 1
    sp: bool = False
    recompute: str = ""
    distributed_optimizer: bool = False
    overlap: str = ""
    """What runs beside the computation: "reduce" of gradients, or also "gather" of weights."""
    bf16: bool = False
    steps: int = 20
    frozen: tuple[str, ...] = ()
    """Some of "vision", "projector" and "text"."""
    loss: str = "default"
    batches: str = "mixed"

    @property
    def world_size(self) -> int:
        """Processes that the case needs."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def problem(self) -> tuple[int, tuple[str, ...], str, str]:
        """What the reference has to solve for this case: steps, frozen parts, loss, batches."""
        return self.steps, self.frozen, self.loss, self.batches

    @property
    def name(self) -> str:
        """Identifier in test reports."""
        lists = f"-v{_join(self.vision)}-t{_join(self.text)}" if self.pp > 1 else ""
        flags = [f"cp{self.cp}"] * (self.cp > 1) + ["sp"] * self.sp
        flags += [f"dp{self.dp}"] * (self.dp > 1) + ["dist"] * self.distributed_optimizer + ["bf16"] * self.bf16
        flags += [f"overlap_{self.overlap}"] * bool(self.overlap) + [self.recompute] * bool(self.recompute)
        flags += ["frozen_" + "_".join(self.frozen)] * bool(self.frozen)
        flags += [self.loss] * (self.loss != "default") + [self.batches] * (self.batches != "mixed")
        return "-".join([f"tp{self.tp}pp{self.pp}" + (f"vp{self.vp}" if self.vp > 1 else "") + lists, *flags])


def _join(layers: Layers) -> str:
    return ".".join("_".join(map(str, entry)) if isinstance(entry, tuple) else str(entry) for entry in layers)


@dataclass(frozen=True)
class Result:
    """What the last rank knows."""

    logits: list[Tensor]
    loss: float
    losses: list[float]
    grad_norms: list[float]


def solve_all(cases: list[Case], checkpoints: list[Path], out: Path) -> dict[str, Any]:
    """Every case with every checkpoint on the processes of this job; gradients go to `out/<case>-<checkpoint>`."""
    from mindspeed_mm.platform.groups import destroy, init_process_group
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform("cpu")
    activate(platform)
    init_process_group(platform, RuntimeConfig(distributed_timeout_minutes=5))
    results = {}
    for case in cases:
        for checkpoint in checkpoints:
            key = f"{case.name}-{checkpoint.name}"
            results[key] = _solve(case, checkpoint, out / key, platform)
    destroy()
    return results


def _solve(case: Case, checkpoint: Path, out: Path, platform: Any) -> Result | None:
    from megatron.core import parallel_state

    from mindspeed_mm.models.qwen2vl.chunk import build_chunk
    from mindspeed_mm.platform.groups import init_model_parallel, seed_everything
    from mindspeed_mm.training.build import fill, wrap_chunks
    from mindspeed_mm.training.loop import connect_schedule
    from mindspeed_mm.training.optimizer import build_optimizer
    from mindspeed_mm.training.step import loss_kind

    config = read_config(checkpoint)
    model = with_frozen(config, case.frozen)
    if case.pp > 1:
        model = with_layout(model, case.vision, case.text)
    if case.recompute:
        model = with_recompute(model, case.recompute)
    parallel = ParallelConfig(
        tp_size=case.tp,
        pp_size=case.pp,
        vp_size=case.vp,
        cp_size=case.cp,
        world_size=case.world_size,
        sequence_parallel=case.sp,
    )
    batches = [to_batch(samples, config) for samples in make_samples(config, case.batches)]
    training = TrainingConfig(
        micro_batch_size=2,
        global_batch_size=2 * len(batches),
        train_iters=case.steps,
        seq_length=512,
        bf16=case.bf16,
        calculate_per_token_loss=case.loss == "token",
        calculate_per_sample_loss=case.loss == "sample",
    )
    settings = OptimizerConfig(
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        clip_grad=CLIP,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=bool(case.overlap),
        overlap_param_gather=case.overlap == "gather",
    )
    plan = StagePlan.build(model, parallel)
    groups = init_model_parallel(parallel, plan, timeout_minutes=5)
    seed_everything(platform, 1, groups.ranks)
    chunks = []
    for stage in plan.stages_of_rank(groups.ranks.pp_rank):
        cp_group = groups.cp if case.cp > 1 else None
        chunk = build_chunk(model, plan, stage, parallel, training, platform, cp_group, initialize=False)
        problems = fill(chunk, read_stage(checkpoint, model, plan, stage, groups.ranks.tp_rank))
        assert not problems, problems
        chunks.append(chunk)
    models = wrap_chunks(chunks, settings, training)
    optimizer = build_optimizer(settings, training, models)
    connect_schedule(models, optimizer, groups.embedding, overlaps_gather=settings.overlap_param_gather)
    # Replicas share the micro-batches out in turn, as the sampler does.
    mine = batches[groups.ranks.dp_rank :: case.dp]
    job = _Job(models, optimizer, mine, groups, platform, loss_kind(training))
    logits = job.logits()
    losses, norms = [], []
    for step in range(case.steps):
        loss = job.forward_backward()
        if step == 0:
            _write_gradients(out, plan, groups, models)
        _, norm, _ = optimizer.step()
        losses.append(loss)
        norms.append(float(norm))
    parallel_state.destroy_model_parallel()
    is_last = int(os.environ["RANK"]) == case.world_size - 1
    return Result(logits, losses[0], losses, norms) if is_last else None


@dataclass
class _Job:
    models: list[Any]
    optimizer: Any
    batches: list[Batch]
    groups: Any
    platform: Any
    kind: LossKind

    def _schedule(self, step: Any, *, forward_only: bool, **kwargs: Any) -> list[Any]:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        interleaved = len(self.models) > 1
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(self.batches) for _ in self.models] if interleaved else iter(self.batches),
            model=self.models if interleaved else self.models[0],
            num_microbatches=len(self.batches),
            seq_length=512,
            micro_batch_size=2,
            forward_only=forward_only,
            **kwargs,
        )

    def logits(self) -> list[Tensor]:
        """Logits of every micro-batch, on the last stage."""

        def step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
            output = chunk(next(iterator), wants_logits=True)
            return output, lambda logits, non_loss_data=True: logits.float().clone()

        with torch.no_grad():
            return self._schedule(step, forward_only=True, collect_non_loss_data=True)

    def forward_backward(self) -> float:
        """One iteration without its update; the loss as the log would report it (0 on other stages)."""
        from mindspeed_mm.training.step import forward_step, summarise

        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        measures = self._schedule(partial(forward_step, kind=self.kind), forward_only=False)
        if not measures:
            return 0.0
        return summarise(measures, self.kind, self.groups.dp_cp, self.platform.device).loss


def _write_gradients(out: Path, plan: StagePlan, groups: Any, models: list[Any]) -> None:
    """Gradients as an MM checkpoint: the converter then maps them back to Hugging Face names."""
    import torch.distributed as dist

    from mindspeed_mm.storage import layout
    from mindspeed_mm.storage.files import make_dir, write_file
    from mindspeed_mm.storage.shard import write_shard

    release = layout.iteration_dir(out, layout.RELEASE)
    if groups.ranks.rank == 0:
        make_dir(release)
        write_file(release / layout.PLAN_FILE, plan.to_json().encode())
        layout.write_tracker(out, layout.RELEASE)
    dist.barrier()
    for model in models:
        _gather_shards(model)
    keys = ["model"] if len(models) == 1 else [f"model{number}" for number in range(len(models))]
    gradients = {
        key: {name: _gradient(parameter) for name, parameter in model.module.named_parameters()}
        for key, model in zip(keys, models, strict=True)
    }
    if groups.ranks.cp_rank == 0 and groups.ranks.dp_rank == 0:
        folder = layout.shard_dir(out, layout.RELEASE, groups.ranks.tp_rank, groups.ranks.pp_rank, plan.pp_size)
        write_shard(make_dir(folder) / layout.SHARD_FILE, {"checkpoint_version": 3.0, **gradients})
    dist.barrier()


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    return parameter.main_grad.float().clone() if parameter.requires_grad else torch.zeros_like(parameter)


def _gather_shards(model: Any) -> None:
    """With the distributed optimizer every rank holds the sum of its part of a bucket: bring the parts together."""
    import torch.distributed as dist

    if not model.ddp_config.use_distributed_optimizer:
        return
    for buffer in model.buffers:
        for bucket in buffer.buckets:
            group = buffer.data_parallel_group
            parts = bucket.grad_data.chunk(group.size())
            dist.all_gather(list(parts), parts[group.rank()].clone(), group=group)
