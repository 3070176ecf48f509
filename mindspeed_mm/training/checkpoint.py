"""Saves of a training run in the MM `torch` layout, and going on from them bit by bit."""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage import layout
from mindspeed_mm.storage.files import make_dir, write_file
from mindspeed_mm.storage.publish import publish_directory
from mindspeed_mm.storage.shard import read_shard, write_shard

if TYPE_CHECKING:
    from mindspeed_mm.config import RunConfig
    from mindspeed_mm.models.qwen2vl.chunk import Qwen2VLChunk
    from mindspeed_mm.plan import StagePlan
    from mindspeed_mm.platform.base import Platform
    from mindspeed_mm.platform.groups import Groups

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 3.0


@dataclass(slots=True)
class TrainState:
    """Position of a run; with the seed it decides which samples come next."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True, slots=True)
class Trainee:
    """What a save writes and a resume fills."""

    chunks: Sequence[Qwen2VLChunk]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    platform: Platform


def save_checkpoint(
    root: Path, run: RunConfig, plan: StagePlan, groups: Groups, trainee: Trainee, state: TrainState
) -> None:
    """Write one training save; every rank calls it.

    Shards go to a temporary sibling that gets its name in one step when all ranks are done; the tracker follows. A save
    that is interrupted leaves the previous ones as they were.

    Raises:
        CheckpointError, DiskFullError: writing failed.
    """
    final = layout.iteration_dir(root, state.iteration)
    staging = final.parent / f".tmp_{final.name}"
    if groups.ranks.rank == 0:
        logger.info("saving checkpoint at iteration %7d to %s in torch format", state.iteration, root)
        make_dir(root)
        shutil.rmtree(staging, ignore_errors=True)
        make_dir(staging)
    dist.barrier()
    with_optimizer = not run.checkpoint.no_save_optim and trains_something(trainee.optimizer)
    distributed = with_optimizer and run.optimizer.use_distributed_optimizer
    parameter_state = gather_parameter_state(trainee.optimizer) if distributed else None
    if groups.ranks.dp_rank == 0 and groups.ranks.cp_rank == 0:
        folder = make_dir(staging / layout.rank_name(groups.ranks.tp_rank, groups.ranks.pp_rank, plan.pp_size))
        write_shard(folder / layout.SHARD_FILE, _shard_content(run, trainee, state, with_optimizer=with_optimizer))
        if parameter_state is not None:
            write_shard(folder / layout.DISTRIB_FILE, parameter_state)
    dist.barrier()
    if groups.ranks.rank == 0:
        write_file(staging / layout.PLAN_FILE, plan.to_json().encode())
        publish_directory(staging, final, overwrite=True)
        layout.write_tracker(root, state.iteration)
        logger.info("  successfully saved checkpoint from iteration %7d to %s", state.iteration, root)
    dist.barrier()


def save_weights(root: Path, plan: StagePlan, groups: Groups, chunks: Sequence[Qwen2VLChunk]) -> None:
    """Write the weights alone as a `release` directory; every rank calls it. What lay at `root` is replaced."""
    ranks = groups.ranks
    release = layout.iteration_dir(root, layout.RELEASE)
    if ranks.rank == 0:
        shutil.rmtree(root, ignore_errors=True)
        make_dir(release)
        write_file(release / layout.PLAN_FILE, plan.to_json().encode())
        layout.write_tracker(root, layout.RELEASE)
    dist.barrier()
    if ranks.dp_rank == 0 and ranks.cp_rank == 0:
        folder = make_dir(layout.shard_dir(root, layout.RELEASE, ranks.tp_rank, ranks.pp_rank, plan.pp_size))
        content = {"checkpoint_version": CHECKPOINT_VERSION, **_model_content(chunks)}
        write_shard(folder / layout.SHARD_FILE, content)
    dist.barrier()


def load_training_state(
    root: Path, iteration: int, run: RunConfig, plan: StagePlan, groups: Groups, trainee: Trainee
) -> TrainState:
    """Restore optimizer, schedule, random states and position of a training save; weights are loaded before.

    Raises:
        CheckpointError: the save was made under another layout, or lacks what should be loaded.
    """
    ranks = groups.ranks
    folder = layout.shard_dir(root, iteration, ranks.tp_rank, ranks.pp_rank, plan.pp_size)
    content = read_shard(folder / layout.SHARD_FILE)
    state = TrainState(iteration=int(content["iteration"]), consumed_samples=_consumed_samples(content, run))
    if not run.checkpoint.no_load_optim and trains_something(trainee.optimizer):
        if "optimizer" not in content:
            raise CheckpointError(
                f"{folder} holds no optimizer state (it was saved with --no-save-optim).\n"
                "  Add --no-load-optim to go on with fresh optimizer state, or --finetune to begin at iteration 0."
            )
        _load_optimizer(trainee.optimizer, content["optimizer"])
        if run.optimizer.use_distributed_optimizer:
            path = folder / layout.DISTRIB_FILE
            parameter_state = read_shard(path) if ranks.dp_rank == 0 and ranks.cp_rank == 0 else None
            scatter_parameter_state(trainee.optimizer, parameter_state)
        _load_scheduler(trainee.scheduler, content["opt_param_scheduler"], run)
    else:
        trainee.scheduler.step(increment=state.consumed_samples)
    if not run.checkpoint.no_load_rng:
        if "rng_state" not in content:
            raise CheckpointError(
                f"{folder} holds no random states (it was saved with --no-save-rng); add --no-load-rng."
            )
        restore_rng(content["rng_state"][0], trainee.platform)
    return state


# ---- content of a shard --------------------------------------------------------------------------------------------


def _shard_content(run: RunConfig, trainee: Trainee, state: TrainState, *, with_optimizer: bool) -> dict[str, Any]:
    content: dict[str, Any] = {
        "args": _saved_arguments(run, state),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": state.iteration,
        "num_floating_point_operations_so_far": 0,
        "rerun_state_machine": {},
    }
    content.update(_model_content(trainee.chunks))
    if with_optimizer:
        content["optimizer"] = trainee.optimizer.state_dict()
        content["opt_param_scheduler"] = trainee.scheduler.state_dict()
    if not run.checkpoint.no_save_rng:
        content["rng_state"] = [capture_rng(trainee.platform)]
    return content


def _model_content(chunks: Sequence[Qwen2VLChunk]) -> dict[str, Any]:
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return {
        key: {name: _detached(value) for name, value in chunk.state_dict().items()}
        for key, chunk in zip(keys, chunks, strict=True)
    }


def _detached(value: torch.Tensor | None) -> torch.Tensor | None:
    # Parameters are views into DDP's contiguous buffers: without the copy torch.save would write the buffer for each.
    return None if value is None else value.detach().cpu().clone()


def _saved_arguments(run: RunConfig, state: TrainState) -> argparse.Namespace:
    """The arguments that Megatron compares when it loads, and the position that it restores from them."""
    text = run.model.text_decoder
    return argparse.Namespace(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        add_position_embedding=True,
        tensor_model_parallel_size=run.parallel.tp_size,
        pipeline_model_parallel_size=run.parallel.pp_size,
        virtual_pipeline_model_parallel_size=run.parallel.vp_size if run.parallel.vp_size > 1 else None,
        use_distributed_optimizer=run.optimizer.use_distributed_optimizer,
        params_dtype=run.training.params_dtype,
        micro_batch_size=run.training.micro_batch_size,
        global_batch_size=run.training.global_batch_size,
        seq_length=run.training.seq_length,
        seed=run.training.seed,
        iteration=state.iteration,
        consumed_train_samples=state.consumed_samples,
        consumed_valid_samples=0,
    )


def _consumed_samples(content: dict[str, Any], run: RunConfig) -> int:
    saved = getattr(content.get("args"), "consumed_train_samples", None)
    return int(content["iteration"]) * run.training.global_batch_size if saved is None else int(saved)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def trains_something(optimizer: MegatronOptimizer) -> bool:
    """Whether this rank has trainable parameters; a stage with frozen layers only has no optimizer state to save."""
    return any(group["params"] for group in optimizer.param_groups)


def gather_parameter_state(optimizer: MegatronOptimizer) -> dict[Any, Any] | None:
    """Weights and moments of a distributed optimizer on the first data-parallel rank, None on the others."""
    return _inner(optimizer).get_parameter_state_dp_zero()


@torch.no_grad()
def scatter_parameter_state(optimizer: MegatronOptimizer, state: dict[Any, Any] | None) -> None:
    """Give every data-parallel rank its part of what `gather_parameter_state` collected."""
    inner = _inner(optimizer)
    # Megatron copies every tensor of the optimizer's state from the file and knows no `step` there; torch's Adam has
    # one, which load_state_dict has set already; one tensor for all parameters, which every update would count up once
    # for each.
    steps = {parameter: entry.pop("step") for parameter, entry in inner.optimizer.state.items() if "step" in entry}
    inner.load_parameter_state_from_dp_zero(state)
    for parameter, step in steps.items():
        inner.optimizer.state[parameter]["step"] = step.clone()


def _load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    try:
        optimizer.load_state_dict(state)
    except (KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(
            f"the saved optimizer state does not fit this run: {error}\n"
            "  Freezing, --bf16 and --use-distributed-optimizer must be as in the save; or add --no-load-optim."
        ) from error


def _inner(optimizer: MegatronOptimizer) -> Any:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    assert len(chained) == 1, "one dense optimizer: there are no expert parameters here"
    return chained[0]


def _load_scheduler(scheduler: OptimizerParamScheduler, saved: dict[str, Any], run: RunConfig) -> None:
    wanted = scheduler.state_dict()
    differences = [
        f"{key}: saved {saved[key]}, now {value}"
        for key, value in wanted.items()
        if key != "num_steps" and key in saved and saved[key] != value
    ]
    if differences and not (
        run.optimizer.override_opt_param_scheduler or run.optimizer.use_checkpoint_opt_param_scheduler
    ):
        raise CheckpointError(
            "\n  ".join(
                [
                    "the learning-rate schedule of the save differs from the command line:",
                    *differences,
                    "Add --override-opt-param-scheduler to use the command line's, or "
                    "--use-checkpoint-opt-param-scheduler to keep the save's.",
                ]
            )
        )
    scheduler.override_opt_param_scheduler = run.optimizer.override_opt_param_scheduler
    scheduler.use_checkpoint_opt_param_scheduler = not run.optimizer.override_opt_param_scheduler
    scheduler.load_state_dict(saved)


# ---- random states -------------------------------------------------------------------------------------------------


def capture_rng(platform: Platform) -> dict[str, Any]:
    """Random states of this process under Megatron's names."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": platform.rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }


def restore_rng(state: dict[str, Any], platform: Platform) -> None:
    """Set the random states that `capture_rng` took."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = state["random_rng_state"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    platform.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(state["rng_tracker_states"])


def remove_staging(root: Path) -> None:
    """Delete what interrupted saves left in `root`; rank 0 calls it before training starts."""
    if root.is_dir():
        for entry in os.scandir(root):
            if entry.name.startswith(".tmp_iter_") and entry.is_dir(follow_symlinks=False):
                logger.warning("removing %s, left by a save that was interrupted", entry.path)
                shutil.rmtree(entry.path, ignore_errors=True)
