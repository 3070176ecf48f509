from __future__ import annotations

from collections import Counter

import pytest

from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, TrainingConfig, load_settings
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.plan.estimate import (
    Memory,
    estimate_memory,
    model_parameters,
    stage_parameters,
)
from mindspeed_mm.plan.parameters import stage_tensors

from ..config.launch import FILES
from .models import parallel, small_model


@pytest.mark.parametrize(("size", "expected"), [("2b", 2_208_985_600), ("7b", 8_291_375_616), ("72b", 73_405_560_320)])
def test_the_published_models_have_their_published_sizes(size: str, expected: int) -> None:
    model = load_settings(Qwen2VLConfig, FILES / f"model_{size}.json", [])
    assert model_parameters(model)[0] == expected


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(("pp", "vp"), [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_stages_add_up_to_the_model_and_a_copy_of_a_tied_head(is_tied: bool, pp: int, vp: int) -> None:
    model = small_model(is_tied=is_tied)
    plan = StagePlan.build(model, parallel(pp=pp, vp=vp))
    copy = 1024 * 128 if is_tied and pp > 1 else 0
    assert sum(stage_parameters(model, plan, stage)[0] for stage in plan.stages) == model_parameters(model)[0] + copy


def test_tensor_ranks_share_all_but_norms_and_row_biases() -> None:
    model = small_model()
    whole = StagePlan.build(model, parallel()).stages[0]
    counts = {tp: stage_parameters(model, StagePlan.build(model, parallel(tp=tp)), whole)[0] for tp in (1, 2)}
    # norms and the biases of linears that are split by their inputs, the patch embedding
    vision_layer = 4 * 96 + 2 * 96
    projector = 2 * 96 + 128
    text_layer = 2 * 128
    replicated = 4 * vision_layer + projector + 6 * text_layer + 128 + 1176 * 96
    assert 2 * counts[2] == counts[1] + replicated


def test_trained_parameters_follow_the_freezes() -> None:
    plan = StagePlan.build(small_model(), parallel())
    whole = plan.stages[0]
    total, _ = stage_parameters(small_model(), plan, whole)
    parts = Counter[str]()
    for tensor in stage_tensors(small_model(), plan, whole):
        parts[tensor.module] += tensor.count
    vision, projector = parts["patch_embed"] + parts["vision layers"], parts["projector"]
    assert stage_parameters(small_model(), plan, whole)[1] == total
    assert stage_parameters(small_model(freeze_vision=True), plan, whole)[1] == total - vision
    assert stage_parameters(small_model(freeze_projector=True), plan, whole)[1] == total - projector
    assert stage_parameters(small_model(freeze_text=True), plan, whole)[1] == vision + projector


def memory_of(
    *, bf16: bool = True, distributed: bool = False, freeze_vision: bool = False
) -> tuple[tuple[int, int], Memory]:
    """Parameters (all, trained) and memory of a process among four replicas of a small model."""
    model = small_model(freeze_vision=freeze_vision)
    plan = StagePlan.build(model, parallel())
    return stage_parameters(model, plan, plan.stages[0]), estimate_memory(
        model,
        plan,
        0,
        parallel=ParallelConfig(world_size=4),
        training=TrainingConfig(micro_batch_size=1, global_batch_size=8, train_iters=1, seq_length=64, bf16=bf16),
        optimizer=OptimizerConfig(use_distributed_optimizer=distributed),
    )


def test_memory_of_weights_gradients_and_optimizer_follows_from_the_parameters() -> None:
    (total, trained), memory = memory_of(freeze_vision=True)
    assert (memory.weights_bytes, memory.gradients_bytes) == (2 * total, 4 * trained)
    # fp32 weights and two moments, and one step counter per tensor
    tensors = 2 + 4 + 1 + 6 * 7 + 2
    assert memory.optimizer_bytes == 12 * trained + 4 * tensors
    (total, trained), memory = memory_of(bf16=False)
    assert (memory.weights_bytes, memory.gradients_bytes) == (4 * total, 4 * total)
    assert memory.optimizer_bytes == 8 * total + 4 * (1 + 4 * 12 + tensors)


def test_the_distributed_optimizer_splits_its_state_over_the_replicas() -> None:
    assert memory_of(distributed=True)[1].optimizer_bytes == pytest.approx(memory_of()[1].optimizer_bytes / 4, rel=0.01)


def test_frozen_vision_keeps_no_activations() -> None:
    assert memory_of(freeze_vision=True)[1].activations_bytes < memory_of()[1].activations_bytes


def test_recomputation_keeps_less() -> None:
    settings = load_settings(Qwen2VLConfig, FILES / "model_72b.json", [])
    kept = settings.text_decoder.model_copy(update={"recompute_granularity": None})
    sizes = []
    for model in (settings, settings.model_copy(update={"text_decoder": kept})):
        plan = StagePlan.build(model, parallel(tp=2, pp=8))
        training = TrainingConfig(micro_batch_size=1, global_batch_size=8, train_iters=1, seq_length=1024, bf16=True)
        memory = estimate_memory(
            model, plan, 3, parallel=parallel(tp=2, pp=8), training=training, optimizer=OptimizerConfig()
        )
        sizes.append(memory.activations_bytes)
    assert 4 * sizes[0] < sizes[1]
