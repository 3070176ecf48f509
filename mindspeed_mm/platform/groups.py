"""Processes and their groups: start torch.distributed, build megatron's groups from the plan, end them."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch.distributed as dist

from mindspeed_mm.errors import SetupError
from mindspeed_mm.platform.base import Platform

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mindspeed_mm.config.run import ParallelConfig, RuntimeConfig

logger = logging.getLogger(__name__)

ORDER = "tp-cp-ep-dp-pp"
"""Which ranks are neighbours: tensor-parallel ones first, pipeline stages last (megatron's default)."""


TOKEN_EMBED, LM_HEAD = "token_embed", "lm_head"
"""Words of the plan for the parts that tied weights live in."""


class StageParts(Protocol):
    """What groups need of a stage."""

    @property
    def pp_rank(self) -> int: ...

    @property
    def parts(self) -> AbstractSet[str]: ...


class EmbeddingPlan(Protocol):
    """What groups need of the stage plan (`StagePlan` fits; this room lies below the plan)."""

    @property
    def is_tied(self) -> bool: ...

    @property
    def stages(self) -> Sequence[StageParts]: ...


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where a process stands on every parallel axis."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int

    @classmethod
    def of(cls, rank: int, *, tp_size: int, cp_size: int, dp_size: int, pp_size: int) -> Ranks:
        """Place of the global `rank` in the order tp-cp-dp-pp."""
        rest, tp_rank = divmod(rank, tp_size)
        rest, cp_rank = divmod(rest, cp_size)
        pp_rank, dp_rank = divmod(rest, dp_size)
        world_size = tp_size * cp_size * dp_size * pp_size
        return cls(rank, world_size, tp_rank, tp_size, cp_rank, cp_size, dp_rank, dp_size, pp_rank, pp_size)

    def global_rank(self, *, tp_rank: int, cp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """The global rank at a place; inverse of `of`."""
        return tp_rank + self.tp_size * (cp_rank + self.cp_size * (dp_rank + self.dp_size * pp_rank))

    def replica_ranks(self, dp_rank: int) -> list[int]:
        """Global ranks that together hold one copy of the model and work on the same samples, ascending."""
        return sorted(
            self.global_rank(tp_rank=tp, cp_rank=cp, dp_rank=dp_rank, pp_rank=pp)
            for pp in range(self.pp_size)
            for cp in range(self.cp_size)
            for tp in range(self.tp_size)
        )


@dataclass(frozen=True, slots=True)
class Groups:
    """Process groups of this rank; passed on instead of asking megatron's global state."""

    ranks: Ranks
    tp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_cp: ProcessGroup
    """Ranks that average gradients: data and context parallel."""
    pp: ProcessGroup
    embedding: ProcessGroup | None
    """Ranks that share the tied embedding; None on the others."""
    replica: ProcessGroup
    """gloo group of one copy of the model, for CPU tensors: batches are relayed here."""


def init_process_group(platform: Platform, runtime: RuntimeConfig, environ: Mapping[str, str] | None = None) -> None:
    """Join the processes of the job; a process started alone is a job of one and opens no port.

    Args:
        platform: where this process runs; its device is bound here.
        runtime: backend, timeout and local rank.
        environ: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT as torchrun sets them; the process environment if None.

    Raises:
        SetupError: variables are missing or wrong, the port is taken, or other processes do not come.
    """
    environ = os.environ if environ is None else environ
    platform.set_device(runtime.local_rank or 0)
    backend = platform.backend_for(runtime.distributed_backend)
    if backend.note:
        logger.info(backend.note)
    timeout = timedelta(minutes=runtime.distributed_timeout_minutes)
    world_size = _read_int(environ, "WORLD_SIZE", default=1)
    if world_size == 1 and "MASTER_ADDR" not in environ:
        dist.init_process_group(backend.name, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if missing:
        raise SetupError(
            f"WORLD_SIZE={world_size} is set, and {', '.join(missing)} is not. Start the job with torchrun, "
            "which sets them, or unset WORLD_SIZE to run one process."
        )
    rank = _read_int(environ, "RANK")
    port = _read_int(environ, "MASTER_PORT")
    address = f"{environ['MASTER_ADDR']}:{port}"
    if not 0 <= rank < world_size:
        raise SetupError(f"RANK={rank} is not in 0..{world_size - 1} (WORLD_SIZE={world_size}). Check --node-rank.")
    try:
        dist.init_process_group(backend.name, init_method="env://", rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise SetupError(_connection_problem(address, rank, world_size, error)) from error


def init_model_parallel(parallel: ParallelConfig, plan: EmbeddingPlan, *, timeout_minutes: float = 30) -> Groups:
    """Build megatron's groups (order tp-cp-ep-dp-pp) and ours; the embedding group follows the plan.

    Raises:
        SetupError: the degrees do not multiply to the number of processes.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    copy_size = parallel.tp_size * parallel.cp_size * parallel.pp_size
    if world_size % copy_size or parallel.dp_size != world_size // copy_size:
        raise SetupError(
            f"{world_size} processes cannot be split into tensor {parallel.tp_size} x context {parallel.cp_size} x "
            f"pipeline {parallel.pp_size} x data {parallel.dp_size}. Start a multiple of {copy_size} processes."
        )
    state = import_module("megatron.core.parallel_state")
    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vp_size if parallel.vp_size > 1 else None,
        context_parallel_size=parallel.cp_size,
        distributed_timeout_minutes=timeout_minutes,
        order=ORDER,
        get_embedding_ranks=embedding_ranks(plan),
        # Gathering optimizer state for a save goes over gloo groups of the data-parallel ranks.
        create_gloo_process_groups=True,
    )
    ranks = Ranks.of(
        rank,
        tp_size=parallel.tp_size,
        cp_size=parallel.cp_size,
        dp_size=parallel.dp_size,
        pp_size=parallel.pp_size,
    )
    return Groups(
        ranks=ranks,
        tp=state.get_tensor_model_parallel_group(),
        cp=state.get_context_parallel_group(),
        dp=state.get_data_parallel_group(),
        dp_cp=state.get_data_parallel_group(with_context_parallel=True),
        pp=state.get_pipeline_model_parallel_group(),
        # Not asked of megatron: it keeps the ranks of an earlier initialisation.
        embedding=state.get_embedding_group() if ranks.pp_rank in embedding_stages(plan) else None,
        replica=_replica_group(ranks, timeout_minutes),
    )


def embedding_stages(plan: EmbeddingPlan) -> list[int]:
    """Pipeline ranks that hold the word embedding or its tied copy, ascending; the head's alone when it is not tied."""
    wanted = {TOKEN_EMBED, LM_HEAD} if plan.is_tied else {LM_HEAD}
    return sorted({stage.pp_rank for stage in plan.stages if wanted & stage.parts})


def embedding_ranks(plan: EmbeddingPlan) -> Callable[..., list[int]]:
    """megatron's hook: of the global ranks of one pipeline, those that hold the word embedding or its tied copy.

    Untied weights are never reduced together; the group is then the head's stage alone.
    """
    stages = embedding_stages(plan)

    def ranks_of(pp_ranks: Sequence[int], split_rank: int | None = None) -> list[int]:
        return [pp_ranks[stage] for stage in stages]

    return ranks_of


def seed_everything(platform: Platform, seed: int, ranks: Ranks) -> None:
    """Seed Python, numpy, torch and megatron's trackers as Megatron does: another seed on every pipeline stage."""
    stage_seed = seed + 100 * ranks.pp_rank
    random.seed(stage_seed)
    np.random.seed(stage_seed % 2**32)
    platform.manual_seed(stage_seed)
    import_module("megatron.core.tensor_parallel.random").model_parallel_cuda_manual_seed(stage_seed)


def destroy(*, wait: bool = True) -> None:
    """End the job: wait for the other processes (not after an error), then take the groups down."""
    if not dist.is_initialized():
        return
    if wait:
        dist.barrier()
    import_module("megatron.core.parallel_state").destroy_model_parallel()
    dist.destroy_process_group()


def _replica_group(ranks: Ranks, timeout_minutes: float) -> ProcessGroup:
    # Every process has to create every group, in the same order.
    mine = None
    for dp_rank in range(ranks.dp_size):
        members = ranks.replica_ranks(dp_rank)
        group = dist.new_group(members, backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        if dp_rank == ranks.dp_rank:
            mine = group
    assert mine is not None
    return mine


def _read_int(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise SetupError(f"{name}={text!r} in the environment is not a whole number.") from None


def _connection_problem(address: str, rank: int, world_size: int, error: Exception) -> str:
    text = str(error)
    head = f"rank {rank} of {world_size} cannot join the job at {address} (MASTER_ADDR:MASTER_PORT): "
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        return head + "the port is taken. Choose another MASTER_PORT, or end the job that holds it."
    if "imed out" in text or "timeout" in text.lower():
        return (
            head + "not all processes came in time. Check that every node was started, with the same WORLD_SIZE, "
            f"MASTER_ADDR and MASTER_PORT, and that a firewall lets them talk.\n{text.splitlines()[0]}"
        )
    if "connectFullMesh" in text:
        return (
            head
            + "the processes cannot reach each other's addresses. Where a host name leads to the wrong network, set "
            f"GLOO_SOCKET_IFNAME to the interface that joins the machines.\n{text.splitlines()[0]}"
        )
    return head + (text.splitlines() or [type(error).__name__])[0]
