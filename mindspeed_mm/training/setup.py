"""Puts a trainer together on every rank: start of the run, chunks, optimizer, batches, reports."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from checkpoint.load import recognise
from mindspeed_mm.data.loader import BatchLoader, build_train_loader, build_valid_loader
from mindspeed_mm.errors import CheckpointError, ConfigError
from mindspeed_mm.plan import Part, StagePlan
from mindspeed_mm.storage import layout
from mindspeed_mm.training.build import build_chunks, load_weights, wrap_chunks
from mindspeed_mm.training.checkpoint import Trainee, TrainState, load_training_state, remove_staging
from mindspeed_mm.training.loop import Trainer
from mindspeed_mm.training.metrics import Reporter
from mindspeed_mm.training.optimizer import build_optimizer, build_scheduler
from mindspeed_mm.training.relay import BatchRelay

if TYPE_CHECKING:
    from mindspeed_mm.config import RunConfig
    from mindspeed_mm.platform.base import Platform
    from mindspeed_mm.platform.groups import Groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run takes its weights and its position from."""

    path: Path | None
    """MM or Hugging Face directory; None for a random start."""
    iteration: layout.Iteration | None
    """Which iteration of an MM directory; None for Hugging Face."""
    resume_iteration: int | None
    """The iteration whose optimizer state and position are taken up; None to begin at 0."""


def find_start(run: RunConfig) -> Start:
    """What `--load`, `--ckpt-step`, `--finetune` and `--init-random` mean for what lies on the disk.

    Raises:
        ConfigError: neither a checkpoint nor a random start was asked for, or both.
        CheckpointError: `--load` holds no checkpoint.
    """
    checkpoint = run.checkpoint
    if checkpoint.load is None:
        if checkpoint.init_random:
            return Start(None, None, None)
        raise ConfigError(
            "command line",
            "no --load: name an MM checkpoint or a Hugging Face directory, or say --init-random for random weights.",
        )
    if checkpoint.init_random:
        raise ConfigError("command line", "--load and --init-random exclude each other.")
    path = Path(checkpoint.load)
    if recognise(path) == "hf":
        if checkpoint.ckpt_step is not None:
            raise ConfigError(
                "command line", f"--ckpt-step {checkpoint.ckpt_step}: {path} is a Hugging Face directory."
            )
        return Start(path, None, None)
    iteration = checkpoint.ckpt_step if checkpoint.ckpt_step is not None else layout.read_tracker(path)
    if not layout.iteration_dir(path, iteration).is_dir():
        there = ", ".join(map(str, layout.list_iterations(path))) or "none"
        raise CheckpointError(f"{path} has no iteration {iteration}; there are: {there}.")
    if iteration == layout.RELEASE:
        logger.info(" loading release checkpoint from %s", path)
        return Start(path, iteration, None)
    logger.info(" loading checkpoint from %s at iteration %s", path, iteration)
    return Start(path, iteration, None if checkpoint.finetune else iteration)


def build_trainer(run: RunConfig, plan: StagePlan, groups: Groups, platform: Platform) -> Trainer:
    """Everything that `Trainer` needs, with weights loaded and a resumed position restored."""
    ranks = groups.ranks
    chunks = build_chunks(run, plan, groups, platform)
    start = find_start(run)
    if start.path is not None:
        load_weights(chunks, start.path, run, plan, groups, iteration=start.iteration)
        logger.info(
            "  successfully loaded checkpoint from %s [ t %d/%d, p %d/%d ] at iteration %d",
            start.path,
            ranks.tp_rank + 1,
            ranks.tp_size,
            ranks.pp_rank + 1,
            ranks.pp_size,
            start.resume_iteration or 0,
        )
    models = wrap_chunks(chunks, run.optimizer, run.training)
    optimizer = build_optimizer(run.optimizer, run.training, models, log_num_zeros=run.logging.log_num_zeros_in_grad)
    scheduler = build_scheduler(optimizer, run.optimizer, run.training)
    state = TrainState()
    if start.resume_iteration is not None and start.path is not None:
        trainee = Trainee(chunks, optimizer, scheduler, platform)
        state = load_training_state(start.path, start.resume_iteration, run, plan, groups, trainee)
    save = Path(run.checkpoint.save) if run.checkpoint.save else None
    if ranks.rank == 0 and save is not None:
        remove_staging(save)
    relay = _train_relay(run, plan, groups, state)
    validation, validation_iters = _validation(run, plan, groups)
    is_last_rank = ranks.rank == ranks.world_size - 1
    return Trainer(
        run=run,
        plan=plan,
        groups=groups,
        platform=platform,
        models=models,
        optimizer=optimizer,
        scheduler=scheduler,
        relay=relay,
        validation=validation,
        validation_iters=validation_iters,
        reporter=Reporter(run.logging, save, start_iteration=state.iteration) if is_last_rank else None,
        state=state,
    )


def make_relay(run: RunConfig, plan: StagePlan, groups: Groups, source: BatchLoader | None) -> BatchRelay:
    """The relay of this rank; `source` is the loader on the first rank of the replica, None elsewhere."""
    ranks, image = groups.ranks, run.model.image_encoder
    pixel_ranks: frozenset[int] = frozenset()
    if image is not None:
        pp_rank = plan.stage_of(Part.PATCH_EMBED).pp_rank
        pixel_ranks = frozenset(
            ranks.global_rank(tp_rank=tp, cp_rank=cp, dp_rank=ranks.dp_rank, pp_rank=pp_rank)
            for tp in range(ranks.tp_size)
            for cp in range(ranks.cp_size)
        )
    return BatchRelay(
        ranks,
        groups.replica,
        source,
        pixel_ranks=pixel_ranks,
        patch_dim=0 if image is None else image.vision_encoder.patch_dim,
        num_chunks=plan.vp_size,
    )


def _loads_data(groups: Groups) -> bool:
    return groups.ranks.replica_ranks(groups.ranks.dp_rank)[0] == groups.ranks.rank


def _train_relay(run: RunConfig, plan: StagePlan, groups: Groups, state: TrainState) -> BatchRelay:
    if run.data is None:
        raise ConfigError("command line", "--mm-data is missing: training needs a data file.")
    source = None
    if _loads_data(groups):
        source = build_train_loader(
            run.data,
            run.model,
            run.training,
            dp_rank=groups.ranks.dp_rank,
            dp_size=groups.ranks.dp_size,
            consumed_samples=state.consumed_samples,
        )
    return make_relay(run, plan, groups, source)


def _validation(run: RunConfig, plan: StagePlan, groups: Groups) -> tuple[BatchRelay | None, int]:
    """The relay over the validation set and its number of global batches; (None, 0) without a set."""
    assert run.data is not None
    ranks, source = groups.ranks, None
    if _loads_data(groups) and run.training.eval_iters > 0:
        source = build_valid_loader(run.data, run.model, run.training, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
    size = torch.tensor([0 if source is None or source.num_iterations is None else source.num_iterations])
    # Only the loading rank knows the set; all ranks of the replica run the same number of iterations.
    dist.broadcast(size, src=ranks.replica_ranks(ranks.dp_rank)[0], group=groups.replica)
    return (make_relay(run, plan, groups, source), int(size)) if int(size) else (None, 0)
