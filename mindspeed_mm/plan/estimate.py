"""Parameters of a stage (exact) and memory of a process (rough), from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_mm.plan.flops import SampleShape
from mindspeed_mm.plan.stage import Part, Stage, StagePlan

if TYPE_CHECKING:
    from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, TrainingConfig


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


@dataclass(frozen=True, slots=True)
class ModuleParameters:
    """Parameters of one piece of a stage, on one tensor rank."""

    name: str
    count: int
    is_trained: bool


def stage_parameters(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> tuple[int, int]:
    """Parameters of a stage on one tensor rank: all, and the trained ones.

    The second copy of a tied embedding, on the stage with the output head, counts where it lies.
    """
    modules = stage_modules(model, plan, stage)
    return sum(module.count for module in modules), sum(module.count for module in modules if module.is_trained)


def stage_modules(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> list[ModuleParameters]:
    """The pieces of a stage with their parameters on one tensor rank."""
    tp_size = plan.tp_size
    text, encoder = model.text_decoder, model.image_encoder
    modules: list[ModuleParameters] = []

    def add(name: str, count: int, *, frozen: bool) -> None:
        if count:
            modules.append(ModuleParameters(name, count, not frozen))

    if encoder is not None:
        tower, projector = encoder.vision_encoder, encoder.vision_projector
        if Part.PATCH_EMBED in stage.parts:
            add(Part.PATCH_EMBED, tower.patch_dim * tower.hidden_size, frozen=tower.freeze)
        add("vision layers", len(stage.vision) * _vision_layer(model, tp_size), frozen=tower.freeze)
        if Part.PROJECTOR in stage.parts:
            add(Part.PROJECTOR, _projector(model, tp_size), frozen=projector.freeze)
    vocabulary = text.vocab_size // tp_size * text.hidden_size
    if Part.TOKEN_EMBED in stage.parts:
        add(Part.TOKEN_EMBED, vocabulary, frozen=text.freeze)
    add("text layers", len(stage.text) * _text_layer(model, tp_size), frozen=text.freeze)
    if Part.FINAL_NORM in stage.parts:
        add(Part.FINAL_NORM, text.hidden_size, frozen=text.freeze)
    if Part.LM_HEAD in stage.parts and (not plan.is_tied or plan.has_head_copy(stage)):
        add(Part.LM_HEAD, vocabulary, frozen=text.freeze)
    return modules


def model_parameters(model: Qwen2VLConfig) -> tuple[int, int]:
    """Parameters of the whole model: all, and the trained ones; a tied head counts once."""
    plan = StagePlan.from_lists(
        model.model_id,
        [[model.vision_layers]],
        [[model.text_decoder.num_layers]],
        tp_size=1,
        vision_layers=model.vision_layers,
        text_layers=model.text_decoder.num_layers,
        is_tied=model.text_decoder.is_tied,
    )
    return stage_parameters(model, plan, plan.stages[0])


def _linear(inputs: int, outputs: int, tp_size: int, *, has_bias: bool, splits_rows: bool) -> int:
    """Parameters of a linear on one tensor rank; the bias is split with the rows (outputs) or not at all."""
    bias = (outputs // tp_size if splits_rows else outputs) if has_bias else 0
    return inputs * outputs // tp_size + bias


def _vision_layer(model: Qwen2VLConfig, tp_size: int) -> int:
    assert model.image_encoder is not None
    tower = model.image_encoder.vision_encoder
    width, wide = tower.hidden_size, tower.ffn_hidden_size
    norms = 2 * 2 * width
    qkv = _linear(width, 3 * width, tp_size, has_bias=True, splits_rows=True)
    proj = _linear(width, width, tp_size, has_bias=True, splits_rows=False)
    fc1 = _linear(width, wide, tp_size, has_bias=True, splits_rows=True)
    fc2 = _linear(wide, width, tp_size, has_bias=True, splits_rows=False)
    return norms + qkv + proj + fc1 + fc2


def _projector(model: Qwen2VLConfig, tp_size: int) -> int:
    assert model.image_encoder is not None
    projector = model.image_encoder.vision_projector
    wide = projector.ffn_hidden_size
    fc1 = _linear(wide, wide, tp_size, has_bias=True, splits_rows=True)
    fc2 = _linear(wide, projector.hidden_size, tp_size, has_bias=True, splits_rows=False)
    return 2 * projector.input_size + fc1 + fc2


def _text_layer(model: Qwen2VLConfig, tp_size: int) -> int:
    text = model.text_decoder
    width, wide = text.hidden_size, text.ffn_hidden_size
    query_width, qkv_width = _widths(model)
    qkv = _linear(width, qkv_width, tp_size, has_bias=True, splits_rows=True)
    proj = _linear(query_width, width, tp_size, has_bias=False, splits_rows=False)
    fc1 = _linear(width, 2 * wide, tp_size, has_bias=False, splits_rows=True)
    fc2 = _linear(wide, width, tp_size, has_bias=False, splits_rows=False)
    return 2 * width + qkv + proj + fc1 + fc2


def _widths(model: Qwen2VLConfig) -> tuple[int, int]:
    """Width of the queries, and of queries, keys and values together, in the text decoder."""
    text = model.text_decoder
    query_width = text.num_attention_heads * text.kv_channels
    return query_width, query_width + 2 * text.num_query_groups * text.kv_channels


# ---------------------------------------------------------------------------------------------------------------------
# Memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one process holds."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes


def estimate_memory(
    model: Qwen2VLConfig,
    plan: StagePlan,
    pp_rank: int,
    *,
    parallel: ParallelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    shape: SampleShape | None = None,
) -> Memory:
    """What a process of a pipeline rank holds, over all its virtual chunks.

    Weights, gradients and optimizer state follow from the parameters; activations are a rough estimate for samples of
    `shape`, without what attention kernels and the allocator need.
    """
    weight_bytes = 4 if training.params_dtype == "fp32" else 2
    # with 16-bit weights megatron reduces gradients in fp32, always so with bf16
    gradients_in_fp32 = training.params_dtype != "fp16" or optimizer.accumulate_allreduce_grads_in_fp32
    gradient_bytes = 4 if gradients_in_fp32 else 2
    moments = 2 if optimizer.optimizer == "adam" else 1
    state_bytes = 4 * moments + (4 if weight_bytes == 2 else 0)
    shards = parallel.dp_size * parallel.cp_size if optimizer.use_distributed_optimizer else 1
    counts = [stage_parameters(model, plan, stage) for stage in plan.stages_of_rank(pp_rank)]
    total, trained = sum(count for count, _ in counts), sum(count for _, count in counts)
    shape = shape or sample_shape(training)
    in_flight = micro_batches_in_flight(plan, pp_rank, training.num_micro_batches(parallel.dp_size))
    per_chunk = [
        stage_activation_bytes(model, plan, stage, shape, parallel, weight_bytes)
        for stage in plan.stages_of_rank(pp_rank)
    ]
    activations = sum(per_chunk) * training.micro_batch_size * in_flight // plan.vp_size
    return Memory(
        weights_bytes=total * weight_bytes,
        gradients_bytes=trained * gradient_bytes,
        optimizer_bytes=-(-trained * state_bytes // shards),
        activations_bytes=activations + _logit_bytes(model, plan, pp_rank, shape) * training.micro_batch_size,
    )


def sample_shape(training: TrainingConfig) -> SampleShape:
    """The sample that estimates assume: full length, a quarter of the tokens from pictures."""
    return SampleShape(tokens=training.seq_length, image_tokens=training.seq_length // 4)


def micro_batches_in_flight(plan: StagePlan, pp_rank: int, num_micro_batches: int) -> int:
    """Forward passes of single chunks whose backward has not run yet, at most, in megatron's schedules."""
    if plan.vp_size == 1:
        return min(num_micro_batches, plan.pp_size - pp_rank)
    warm_up = 2 * (plan.pp_size - pp_rank - 1) + (plan.vp_size - 1) * plan.pp_size
    return min(num_micro_batches * plan.vp_size, warm_up + 1)


def stage_activation_bytes(
    model: Qwen2VLConfig, plan: StagePlan, stage: Stage, shape: SampleShape, parallel: ParallelConfig, value_bytes: int
) -> int:
    """What one forward pass of a sample keeps for backward on a stage."""
    values = _text_values(model, len(stage.text), parallel) * shape.tokens if stage.text else 0
    encoder = model.image_encoder
    if encoder is not None and not encoder.vision_encoder.freeze:
        # nothing is kept for a frozen tower: no gradient flows into it
        patches = shape.image_tokens * encoder.vision_encoder.spatial_merge_size**2
        values += _vision_values(model, len(stage.vision), parallel) * patches
    return values * value_bytes // parallel.cp_size


def _text_values(model: Qwen2VLConfig, num_layers: int, parallel: ParallelConfig) -> int:
    """Values kept per token by the text layers of a stage."""
    text, tp_size = model.text_decoder, parallel.tp_size
    query_width, qkv_width = _widths(model)
    whole = text.hidden_size // (tp_size if parallel.sequence_parallel else 1)
    # two residuals and two norm outputs; queries, keys, values and their result; both halves of fc1 and their product
    layer = 4 * whole + (qkv_width + query_width + 3 * text.ffn_hidden_size) // tp_size
    return _kept(layer, whole, num_layers, text.recompute_granularity, text.recompute_method, text.recompute_num_layers)


def _vision_values(model: Qwen2VLConfig, num_layers: int, parallel: ParallelConfig) -> int:
    """Values kept per patch by the vision layers of a stage."""
    assert model.image_encoder is not None
    tower = model.image_encoder.vision_encoder
    layer = 4 * tower.hidden_size + (4 * tower.hidden_size + 2 * tower.ffn_hidden_size) // parallel.tp_size
    granularity, method, group = tower.recompute_granularity, tower.recompute_method, tower.recompute_num_layers
    return _kept(layer, tower.hidden_size, num_layers, granularity, method, group)


def _kept(
    layer: int, layer_input: int, num_layers: int, granularity: str | None, method: str | None, group: int | None
) -> int:
    """Values that `num_layers` layers keep, given what one keeps without recomputation and the size of its input."""
    if granularity != "full" or group is None:
        return layer * num_layers
    if method == "block":
        recomputed = min(group, num_layers)
        return layer_input * recomputed + layer * (num_layers - recomputed + min(1, recomputed))
    groups = -(-num_layers // group)
    return layer_input * groups + layer * min(group, num_layers)


def _logit_bytes(model: Qwen2VLConfig, plan: StagePlan, pp_rank: int, shape: SampleShape) -> int:
    """fp32 logits and their gradient, where the output head lies; only one micro-batch has them at a time."""
    if plan.stage_of(Part.LM_HEAD).pp_rank != pp_rank:
        return 0
    # the head runs on supervised rows: at most the tokens that are not vision features
    rows = shape.tokens - shape.image_tokens
    return 2 * 4 * rows * (model.text_decoder.vocab_size // plan.tp_size)
