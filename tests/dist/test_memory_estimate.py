"""The memory estimates are the bytes of tensors on real ranks: chunks, DDP, Megatron's optimizer, kept activations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, RuntimeConfig, TrainingConfig
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.plan.activations import stage_activations
from mindspeed_mm.plan.checks import input_needs_gradient
from mindspeed_mm.plan.estimate import Memory, estimate_memory
from mindspeed_mm.plan.flops import SampleShape
from tests.dist.harness import run_ranks
from tests.mindspeed_mm.plan.models import small_model

# ---------------------------------------------------------------------------------------------------------------------
# Weights, gradients, optimizer


@dataclass(frozen=True)
class Case:
    """One run."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    dp: int = 1
    bf16: bool = False
    distributed: bool = False
    overlap: bool = False
    optimizer: str = "adam"
    model: tuple[tuple[str, Any], ...] = ()


FROZEN_VISION = (("freeze_vision", True), ("text_layers", 9))
TIED = (("is_tied", True),)
CASES = {
    1: [Case(), Case(bf16=True), Case(bf16=True, distributed=True, model=FROZEN_VISION), Case(optimizer="sgd")],
    2: [
        Case(dp=2),
        Case(dp=2, bf16=True, distributed=True, overlap=True),
        Case(dp=2, bf16=True, optimizer="sgd"),
        Case(tp=2, bf16=True),
        Case(pp=2, bf16=True, model=TIED),
        Case(pp=2, vp=2, model=FROZEN_VISION),
    ],
    4: [
        Case(pp=2, dp=2, bf16=True, distributed=True, model=TIED),
        Case(tp=2, pp=2, bf16=True, distributed=True, model=FROZEN_VISION),
        Case(tp=2, dp=2, distributed=True),
        Case(pp=2, vp=2, dp=2, bf16=True, distributed=True, model=TIED),
    ],
}
SGD_MOMENTUM = 0.9


def memory_pairs(world_size: int) -> list[tuple[Memory, tuple[int, int, int]]]:
    """(estimate, measured weights, gradients and optimizer bytes) of this rank for every case of so many processes."""
    from mindspeed_mm.platform.groups import destroy, init_process_group
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform("cpu")
    activate(platform)
    init_process_group(platform, RuntimeConfig(distributed_timeout_minutes=2))
    pairs = [_measure(case, platform) for case in CASES[world_size]]
    destroy()
    return pairs


def _measure(case: Case, platform: Any) -> tuple[Memory, tuple[int, int, int]]:
    from megatron.core import parallel_state

    from mindspeed_mm.models.qwen2vl.chunk import build_chunk
    from mindspeed_mm.platform.groups import init_model_parallel, seed_everything
    from mindspeed_mm.training.build import wrap_chunks
    from mindspeed_mm.training.optimizer import build_optimizer

    world_size = case.tp * case.pp * case.dp
    model = small_model(**dict(case.model))
    parallel = ParallelConfig(tp_size=case.tp, pp_size=case.pp, vp_size=case.vp, world_size=world_size)
    training = TrainingConfig(
        micro_batch_size=1, global_batch_size=4 * case.dp, train_iters=1, seq_length=64, bf16=case.bf16
    )
    settings = OptimizerConfig(
        lr=1e-3,
        optimizer=case.optimizer,
        sgd_momentum=SGD_MOMENTUM,
        use_distributed_optimizer=case.distributed,
        overlap_grad_reduce=case.overlap,
    )
    plan = StagePlan.build(model, parallel)
    groups = init_model_parallel(parallel, plan, timeout_minutes=2)
    seed_everything(platform, 1, groups.ranks)
    chunks = [
        build_chunk(model, plan, stage, parallel, training, platform, initialize=True)
        for stage in plan.stages_of_rank(groups.ranks.pp_rank)
    ]
    wrapped = wrap_chunks(chunks, settings, training)
    optimizer = build_optimizer(settings, training, wrapped)
    # one update of zero gradients, after which the optimizer has its state
    optimizer.step()
    weights = storage_bytes(parameter for chunk in chunks for parameter in chunk.parameters())
    gradients = storage_bytes(buffer.grad_data for ddp in wrapped for buffer in ddp.buffers)
    estimate = estimate_memory(
        model,
        plan,
        groups.ranks.pp_rank,
        parallel=parallel,
        training=training,
        optimizer=settings,
        dp_rank=groups.ranks.dp_rank,
    )
    measured = weights, gradients, optimizer_bytes(optimizer, chunks)
    parallel_state.destroy_model_parallel()
    return estimate, measured


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors; memory that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def optimizer_bytes(optimizer: Any, chunks: list[Any]) -> int:
    """Bytes of the state and of the weights that the optimizer holds beside the model's own."""
    own = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    tensors: list[Tensor] = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if inner is None:
            continue
        tensors += [parameter for group in inner.param_groups for parameter in group["params"]]
        tensors += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    return storage_bytes(tensor for tensor in tensors if tensor.untyped_storage().data_ptr() not in own)


@pytest.mark.parametrize("world_size", CASES)
def test_weights_gradients_and_optimizer_state_are_those_of_real_ranks(world_size: int) -> None:
    results = run_ranks(world_size, "tests.dist.test_memory_estimate:memory_pairs", world_size)
    for rank, pairs in enumerate(results):
        for case, (estimate, measured) in zip(CASES[world_size], pairs, strict=True):
            estimated = estimate.weights_bytes, estimate.gradients_bytes, estimate.optimizer_bytes
            assert estimated == measured, (rank, case)


# ---------------------------------------------------------------------------------------------------------------------
# Activations


@dataclass(frozen=True)
class Size:
    """A model and a sample to measure."""

    name: str
    text: tuple[int, int, int, int] = (128, 256, 4, 2)
    """Hidden size, FFN size, heads, key-value groups."""
    vision: tuple[int, int] = (96, 4)
    """Hidden size and heads."""
    vocab_size: int = 1024
    tokens: int = 200
    grids: tuple[tuple[int, int, int], ...] = ((1, 12, 12),)
    supervised: int = 100
    pp: int = 1
    tp: int = 1
    sequence_parallel: bool = False
    bf16: bool = False
    samples: int = 1
    text_recompute: tuple[Any, ...] = (None, None, None)
    vision_recompute: tuple[Any, ...] = (None, None, None)
    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_text: bool = False
    lists: tuple[Any, Any] = ("auto", "auto")
    """Layers of vision and text per stage."""

    @property
    def image_tokens(self) -> int:
        """Vision features of a sample."""
        return sum(t * h * w for t, h, w in self.grids) // 4

    @property
    def shape(self) -> SampleShape:
        """The sample as estimates see it."""
        return SampleShape(self.tokens, self.image_tokens, len(self.grids), self.supervised)


WIDE = Size("wide", text=(256, 1024, 8, 2), vision=(160, 4), vocab_size=2048, tokens=512, supervised=300)
FULL = ("full", "uniform", 1)
SIZES = [
    Size("small"),
    WIDE,
    replace(WIDE, name="wide, bf16", bf16=True),
    replace(WIDE, name="as many key-value heads, three pictures", text=(256, 512, 4, 4), grids=((1, 8, 8),) * 3),
    replace(WIDE, name="stages", pp=3),
    replace(WIDE, name="frozen vision", freeze_vision=True, freeze_projector=True, pp=2),
    replace(
        WIDE,
        name="stages of frozen vision alone",
        freeze_vision=True,
        freeze_projector=True,
        pp=3,
        lists=([3, 1, 0], [0, 0, 6]),
    ),
    replace(
        WIDE, name="frozen vision before a trained projector", freeze_vision=True, pp=3, lists=([2, 2, 0], [0, 3, 3])
    ),
    replace(WIDE, name="frozen text behind vision", freeze_text=True, pp=3, lists=([4, 0, 0], [0, 3, 3])),
    replace(WIDE, name="trained projector", freeze_vision=True),
    replace(WIDE, name="frozen text", freeze_text=True),
    replace(WIDE, name="large vocabulary, two samples", vocab_size=16384, samples=2),
    replace(WIDE, name="recomputed", text_recompute=FULL, vision_recompute=FULL),
    replace(WIDE, name="recomputed, stages", text_recompute=FULL, vision_recompute=FULL, pp=3),
    replace(WIDE, name="recomputed in groups", text_recompute=("full", "uniform", 2), vision_recompute=FULL),
    replace(WIDE, name="recomputed blocks", text_recompute=("full", "block", 3), vision_recompute=("full", "block", 1)),
    replace(WIDE, name="selective", text_recompute=("selective", None, None)),
]
RECOMPUTE_SIZES = [
    WIDE,
    replace(
        WIDE, name="selective", text_recompute=("selective", None, None), vision_recompute=("selective", None, None)
    ),
    replace(
        WIDE, name="half of the layers", text_recompute=("full", "block", 3), vision_recompute=("full", "block", 2)
    ),
    replace(WIDE, name="every layer", text_recompute=FULL, vision_recompute=FULL),
    replace(WIDE, name="groups", text_recompute=("full", "uniform", 2), vision_recompute=("full", "uniform", 2)),
]
"""From the one that keeps most to the one that keeps least."""
TP_SIZES = [
    replace(WIDE, name="tensor ranks", tp=2),
    replace(WIDE, name="tensor ranks, recomputed", tp=2, text_recompute=FULL, vision_recompute=FULL),
    replace(WIDE, name="sequence parallel", tp=2, sequence_parallel=True),
    replace(WIDE, name="sequence parallel, frozen vision", tp=2, sequence_parallel=True, freeze_vision=True, pp=2),
]
TOLERANCE = 0.15


def build_model(size: Size) -> Qwen2VLConfig:
    """The model of a size: six text and four vision layers."""
    hidden, wide, heads, groups = size.text
    model = small_model(
        freeze_vision=size.freeze_vision,
        freeze_projector=size.freeze_projector,
        freeze_text=size.freeze_text,
        vision_lists=size.lists[0],
        text_lists=size.lists[1],
    )
    assert model.image_encoder is not None
    names = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    content = model.model_dump()
    sections = 2 * [hidden // heads // 2 // 3]
    content["text_decoder"] |= {
        "hidden_size": hidden,
        "ffn_hidden_size": wide,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
        "vocab_size": size.vocab_size,
        "mrope_section": (hidden // heads // 2 - sum(sections), *sections),
        **dict(zip(names, size.text_recompute, strict=True)),
    }
    vision_width, vision_heads = size.vision
    content["image_encoder"]["vision_encoder"] |= {
        "hidden_size": vision_width,
        "ffn_hidden_size": 4 * vision_width,
        "num_attention_heads": vision_heads,
        "num_query_groups": vision_heads,
        "kv_channels": vision_width // vision_heads,
        **dict(zip(names, size.vision_recompute, strict=True)),
    }
    content["image_encoder"]["vision_projector"] |= {
        "input_size": vision_width,
        "ffn_hidden_size": 4 * vision_width,
        "hidden_size": hidden,
    }
    return Qwen2VLConfig.model_validate(content)


def build_batch(size: Size) -> Batch:
    """A micro-batch of equal samples."""
    generator = torch.Generator().manual_seed(0)
    tokens = size.samples * size.tokens
    ids = torch.randint(5, 900, (size.samples, size.tokens), generator=generator)
    ids[:, 3 : 3 + size.image_tokens] = 1
    labels = torch.full((size.samples, size.tokens), -100)
    labels[:, -size.supervised :] = 7
    patches = size.samples * 4 * size.image_tokens
    return Batch(
        input_ids=ids.flatten(),
        labels=labels.flatten(),
        position_ids=torch.arange(size.tokens).repeat(size.samples).expand(3, tokens).contiguous(),
        cu_seqlens=torch.arange(0, tokens + 1, size.tokens, dtype=torch.int32),
        image_rows=(ids.flatten() == 1).nonzero().flatten(),
        grid_thw=torch.tensor(size.grids * size.samples),
        pixel_values=torch.randn(patches, 1176, generator=generator),
    )


def activation_pairs(sizes: list[Size]) -> list[list[tuple[int, int]]]:
    """(estimated, kept) bytes of every stage of every size."""
    from mindspeed_mm.platform.groups import destroy, init_model_parallel, init_process_group, seed_everything
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform("cpu")
    activate(platform)
    init_process_group(platform, RuntimeConfig(distributed_timeout_minutes=2))
    tensor_ranks = ParallelConfig(tp_size=sizes[0].tp, world_size=sizes[0].tp)
    groups = init_model_parallel(tensor_ranks, StagePlan.build(small_model(), tensor_ranks), timeout_minutes=2)
    seed_everything(platform, 1, groups.ranks)
    pairs = [_kept_by_stages(size, tensor_ranks, platform) for size in sizes]
    destroy()
    return pairs


def _kept_by_stages(size: Size, tensor_ranks: ParallelConfig, platform: Any) -> list[tuple[int, int]]:
    """The stages run one after another in this process; what each sends, the next one receives."""
    from mindspeed_mm.models.qwen2vl.chunk import InputGradient, build_chunk

    model, batch = build_model(size), build_batch(size)
    tensor_ranks = tensor_ranks.model_copy(update={"sequence_parallel": size.sequence_parallel})
    plan = StagePlan.build(model, ParallelConfig(tp_size=size.tp, pp_size=size.pp, world_size=size.tp * size.pp))
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1, seq_length=8, bf16=size.bf16)
    pairs, payload = [], None
    for stage in plan.stages:
        chunk = build_chunk(model, plan, stage, tensor_ranks, training, platform, initialize=True)
        if payload is not None:
            if not input_needs_gradient(model, plan, stage):
                chunk.input_gradient = InputGradient.NONE
            # as megatron's schedules receive it
            chunk.set_input_tensor(payload.detach().requires_grad_())
        kept, payload = kept_bytes(chunk, batch)
        estimate = stage_activations(
            model,
            plan,
            stage,
            size.shape,
            parallel=tensor_ranks,
            value_bytes=2 if size.bf16 else 4,
            samples=size.samples,
        )
        pairs.append((estimate.kept_bytes, kept))
    return pairs


def kept_bytes(chunk: Any, batch: Batch) -> tuple[int, Tensor]:
    """Bytes of the memory that the graph of a forward pass keeps, weights left out, and the output."""
    own = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # held here, so that no two of them ever lie at the same address
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = chunk(batch)
    return storage_bytes(tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in own), output


@pytest.mark.parametrize("sizes", [SIZES, TP_SIZES], ids=["one tensor rank", "two tensor ranks"])
def test_activations_are_estimated_within_fifteen_percent(sizes: list[Size]) -> None:
    results = run_ranks(sizes[0].tp, "tests.dist.test_memory_estimate:activation_pairs", sizes)
    for pairs_by_size in results:
        for size, pairs in zip(sizes, pairs_by_size, strict=True):
            for stage, (estimated, kept) in enumerate(pairs):
                assert abs(estimated - kept) <= TOLERANCE * kept, (size.name, stage, estimated, kept)


def test_recomputation_really_keeps_less() -> None:
    [pairs] = run_ranks(1, "tests.dist.test_memory_estimate:activation_pairs", RECOMPUTE_SIZES)
    kept = [bytes_kept for [(_, bytes_kept)] in pairs]
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.98 * kept[0]
    assert kept[2] < 0.7 * kept[0]
    assert kept[3] < 0.25 * kept[0]
