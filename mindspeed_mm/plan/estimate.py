"""What a stage holds and costs, from the settings alone: parameters, work and memory.

Parameter, gradient and optimizer bytes are exact; activations are within 15 % of what torch keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_mm.plan.activations import FP32_BYTES, stage_activations
from mindspeed_mm.plan.buffers import Buffer, default_bucket_size, lay_out
from mindspeed_mm.plan.flops import SampleShape, Work
from mindspeed_mm.plan.parameters import Parameter, stage_tensors
from mindspeed_mm.plan.schedule import peak_held
from mindspeed_mm.plan.stage import Part, Stage, StagePlan

if TYPE_CHECKING:
    from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, TrainingConfig

STEP_BYTES = 4
"""torch's Adam counts the steps of every parameter in a tensor of its own."""


# ---------------------------------------------------------------------------------------------------------------------
# Parameters and work


def stage_parameters(model: Qwen2VLConfig, plan: StagePlan, stage: Stage) -> tuple[int, int]:
    """Parameters of a stage on one tensor rank: all, and the trained ones.

    The second copy of a tied embedding, on the stage with the output head, counts where it lies.
    """
    tensors = stage_tensors(model, plan, stage)
    return sum(tensor.count for tensor in tensors), sum(tensor.count for tensor in tensors if tensor.is_trained)


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


def stage_work(work: Work, stage: Stage) -> float:
    """What everything that a stage holds costs, over all tensor ranks; in the unit of `work`."""
    parts = {
        Part.PATCH_EMBED: work.patch_embed,
        Part.PROJECTOR: work.projector,
        Part.TOKEN_EMBED: work.token_embed,
        Part.LM_HEAD: work.lm_head,
    }
    layers = len(stage.vision) * work.vision_layer + len(stage.text) * work.text_layer
    return layers + sum(flops for part, flops in parts.items() if part in stage.parts)


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
    dp_rank: int | None = None,
) -> Memory:
    """What a process of a pipeline rank holds, over all its virtual chunks.

    Weights, gradients and optimizer state are exact, the padding of Megatron's buffers included. Activations are those
    of the fullest moment of the schedule, for samples of `shape`, without what kernels and the allocator need.

    Args:
        dp_rank: the replica (context ranks counted as replicas); the one with most optimizer state when not given.
    """
    value_bytes = 4 if training.params_dtype == "fp32" else 2
    # with 16-bit weights megatron reduces gradients in fp32, always so with bf16
    gradients_in_fp32 = training.params_dtype != "fp16" or optimizer.accumulate_allreduce_grads_in_fp32
    replicas = parallel.dp_size * parallel.cp_size
    weights = gradients = 0
    states = [0] * replicas
    for stage in plan.stages_of_rank(pp_rank):
        tensors = stage_tensors(model, plan, stage)
        buffer = _buffer(tensors, stage, replicas, optimizer)
        frozen = sum(tensor.count for tensor in tensors if not tensor.is_trained)
        # the distributed optimizer moves trained weights into a buffer like that of the gradients
        trained = buffer.length if optimizer.use_distributed_optimizer else sum(t.count for t in tensors) - frozen
        weights += (frozen + trained) * value_bytes
        gradients += buffer.length * (FP32_BYTES if gradients_in_fp32 else 2)
        for replica, (values, pieces) in enumerate(_shares(buffer, replicas, optimizer)):
            states[replica] += _state_bytes(values, pieces, value_bytes, optimizer)
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=max(states) if dp_rank is None else states[dp_rank],
        activations_bytes=_peak_activations(model, plan, pp_rank, parallel, training, shape, value_bytes),
    )


def _buffer(tensors: list[Parameter], stage: Stage, replicas: int, optimizer: OptimizerConfig) -> Buffer:
    return lay_out(
        tensors,
        dp_size=replicas,
        is_distributed=optimizer.use_distributed_optimizer,
        bucket_size=default_bucket_size(
            stage.pp_rank, stage.vp_stage, dp_size=replicas, overlaps_reduction=optimizer.overlap_grad_reduce
        ),
    )


def _shares(buffer: Buffer, replicas: int, optimizer: OptimizerConfig) -> list[tuple[int, int]]:
    """Values and parameters that the optimizer of every replica updates."""
    if optimizer.use_distributed_optimizer:
        return [buffer.share(replica, replicas) for replica in range(replicas)]
    return [(sum(end - start for start, end in buffer.places), len(buffer.places))] * replicas


def _state_bytes(values: int, pieces: int, value_bytes: int, optimizer: OptimizerConfig) -> int:
    """Optimizer state: moments, steps, and fp32 weights beside 16-bit ones."""
    masters = FP32_BYTES * values if value_bytes == 2 else 0
    if optimizer.optimizer == "adam":
        return masters + 2 * FP32_BYTES * values + STEP_BYTES * pieces
    return masters + (FP32_BYTES * values if optimizer.sgd_momentum else 0)


def sample_shape(training: TrainingConfig) -> SampleShape:
    """The sample that estimates assume: full length, a quarter of the tokens from one picture."""
    return SampleShape(tokens=training.seq_length, image_tokens=training.seq_length // 4)


def _peak_activations(
    model: Qwen2VLConfig,
    plan: StagePlan,
    pp_rank: int,
    parallel: ParallelConfig,
    training: TrainingConfig,
    shape: SampleShape | None,
    value_bytes: int,
) -> int:
    chunks = [
        stage_activations(
            model,
            plan,
            stage,
            shape or sample_shape(training),
            parallel=parallel,
            value_bytes=value_bytes,
            samples=training.micro_batch_size,
        )
        for stage in plan.stages_of_rank(pp_rank)
    ]
    return peak_held(
        pp_rank,
        [chunk.kept_bytes for chunk in chunks],
        [chunk.working_bytes for chunk in chunks],
        pp_size=plan.pp_size,
        num_micro_batches=training.num_micro_batches(parallel.dp_size),
    )
