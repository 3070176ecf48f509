"""The parameter counts of the estimates are those of chunks that are really built."""

from __future__ import annotations

from typing import Any

import pytest

from mindspeed_mm.config import ParallelConfig, RuntimeConfig, TrainingConfig
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.plan.estimate import stage_parameters
from tests.dist.harness import run_ranks
from tests.mindspeed_mm.plan.models import small_model

MODELS: list[dict[str, Any]] = [
    {},
    {"is_tied": True, "freeze_vision": True, "freeze_projector": True},
    {"vision_layers": 0, "is_tied": True},
    {"freeze_text": True},
]
PIPELINES = [1, 2, 3]


def count_parameters(tp_size: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(estimated, built) pairs of (all, trained) for every stage of every model and pipeline size."""
    from mindspeed_mm.platform.groups import destroy, init_model_parallel, init_process_group, seed_everything
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform("cpu")
    activate(platform)
    # imports megatron, which must see the activated platform
    from mindspeed_mm.models.qwen2vl.chunk import build_chunk

    init_process_group(platform, RuntimeConfig(distributed_timeout_minutes=2))
    tensor_ranks = ParallelConfig(tp_size=tp_size, world_size=tp_size)
    groups = init_model_parallel(tensor_ranks, StagePlan.build(small_model(), tensor_ranks), timeout_minutes=2)
    seed_everything(platform, 1, groups.ranks)
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1, seq_length=8)
    pairs = []
    for settings in MODELS:
        model = small_model(**settings)
        for pp_size in PIPELINES:
            parallel = ParallelConfig(tp_size=tp_size, pp_size=pp_size, world_size=tp_size * pp_size)
            plan = StagePlan.build(model, parallel)
            for stage in plan.stages:
                # building needs the tensor ranks only, so that one small job builds every stage of every pipeline
                chunk = build_chunk(model, plan, stage, tensor_ranks, training, platform, initialize=False)
                sizes = [(weight.numel(), weight.requires_grad) for weight in chunk.parameters()]
                built = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
                pairs.append((stage_parameters(model, plan, stage), built))
    destroy()
    return pairs


@pytest.mark.parametrize("tp_size", [1, 2])
def test_estimated_parameters_are_the_built_ones(tp_size: int) -> None:
    for pairs in run_ranks(tp_size, "tests.dist.test_stage_parameters:count_parameters", tp_size):
        assert len(pairs) == len(MODELS) * sum(PIPELINES)
        for estimated, built in pairs:
            assert estimated == built
