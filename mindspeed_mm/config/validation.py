"""Rules between settings of a run, and what a user should hear about settings that have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mindspeed_mm.config.flags import STRUCTURE_FLAGS
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.run import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RuntimeConfig,
    TrainingConfig,
)


class RunSections(NamedTuple):
    """The settings of the command line without the files."""

    parallel: ParallelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    runtime: RuntimeConfig


def section_problems(sections: RunSections, *, has_data: bool) -> list[str]:
    """The rules between settings of the command line that are broken, one text each."""
    return [
        *_batch_problems(sections.parallel, sections.training),
        *_training_problems(sections.training),
        *_optimizer_problems(sections.optimizer),
        *_start_problems(sections, has_data=has_data),
    ]


def _batch_problems(parallel: ParallelConfig, training: TrainingConfig) -> list[str]:
    problems = []
    replica = parallel.model_parallel_size
    if parallel.world_size % replica:
        return [
            f"the world size {parallel.world_size} is not divisible by {replica}, the processes of one replica: "
            f"TP {parallel.tp_size} x PP {parallel.pp_size} x CP {parallel.cp_size}."
        ]
    samples = training.micro_batch_size * parallel.dp_size
    if training.global_batch_size % samples:
        problems.append(
            f"--global-batch-size = {training.global_batch_size} is not divisible by {samples}, which is "
            f"--micro-batch-size {training.micro_batch_size} x {parallel.dp_size} data-parallel replicas."
        )
    elif parallel.vp_size > 1 and training.num_micro_batches(parallel.dp_size) % parallel.pp_size:
        problems.append(
            f"virtual pipeline chunks need a multiple of PP = {parallel.pp_size} micro-batches per step, but "
            f"--global-batch-size {training.global_batch_size} gives {training.num_micro_batches(parallel.dp_size)}."
        )
    return problems


def _training_problems(training: TrainingConfig) -> list[str]:
    problems = []
    if training.bf16 and training.fp16:
        problems.append("--bf16 and --fp16 exclude each other.")
    if training.calculate_per_sample_loss and training.calculate_per_token_loss:
        problems.append("--calculate-per-sample-loss and --calculate-per-token-loss exclude each other.")
    return problems


def _optimizer_problems(optimizer: OptimizerConfig) -> list[str]:
    problems = []
    if optimizer.lr is not None and optimizer.min_lr > optimizer.lr:
        problems.append(f"--min-lr = {optimizer.min_lr:g} is greater than --lr = {optimizer.lr:g}.")
    if optimizer.lr_warmup_fraction is not None and optimizer.lr_warmup_iters:
        problems.append("--lr-warmup-fraction and --lr-warmup-iters exclude each other.")
    if optimizer.lr is not None and optimizer.lr_warmup_init > optimizer.lr:
        problems.append(f"--lr-warmup-init = {optimizer.lr_warmup_init:g} is greater than --lr = {optimizer.lr:g}.")
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is None:
        problems.append("--lr-decay-style WSD needs --lr-wsd-decay-iters.")
    if optimizer.overlap_param_gather and not optimizer.use_distributed_optimizer:
        problems.append("--overlap-param-gather needs --use-distributed-optimizer.")
    if optimizer.overlap_param_gather and not optimizer.overlap_grad_reduce:
        problems.append("--overlap-param-gather needs --overlap-grad-reduce.")
    bounds = optimizer.start_weight_decay, optimizer.end_weight_decay
    if optimizer.weight_decay_incr_style == "constant" and bounds != (None, None):
        problems.append(
            "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style linear or cosine, but it is "
            "constant."
        )
    if optimizer.weight_decay_incr_style != "constant" and None in bounds:
        problems.append(
            f"--weight-decay-incr-style {optimizer.weight_decay_incr_style} needs --start-weight-decay and "
            "--end-weight-decay."
        )
    if optimizer.use_checkpoint_opt_param_scheduler and optimizer.override_opt_param_scheduler:
        problems.append("--use-checkpoint-opt-param-scheduler and --override-opt-param-scheduler exclude each other.")
    if optimizer.lr_scale_modules and optimizer.lr_mult == 1.0:
        problems.append("--lr-scale-modules has an effect only with --lr-mult other than 1.")
    return problems


def _start_problems(sections: RunSections, *, has_data: bool) -> list[str]:
    """What keeps a run from starting; a dry run needs no data, no checkpoint and no learning rate."""
    checkpoint = sections.checkpoint
    problems = []
    if checkpoint.load is not None and checkpoint.init_random:
        problems.append("--load and --init-random exclude each other.")
    if checkpoint.ckpt_step is not None and checkpoint.load is None:
        problems.append("--ckpt-step names an iteration of --load, which is not given.")
    if sections.runtime.dry_run:
        return problems
    if not has_data:
        problems.append("--mm-data is missing; it names the data.json. (--dry-run works without.)")
    if checkpoint.load is None and not checkpoint.init_random:
        problems.append(
            "--load is missing; it names the checkpoint to start from. Pass --init-random to start from random weights "
            "on purpose."
        )
    if sections.optimizer.lr is None:
        problems.append("--lr is missing; it is the largest learning rate.")
    return problems


def model_problems(model: Qwen2VLConfig, sections: RunSections) -> list[str]:
    """The rules between the command line and the model that are broken; those of the stage plan are checked there."""
    training, longest = sections.training, model.text_decoder.max_position_embeddings
    if training.seq_length > longest:
        return [
            f"--seq-length = {training.seq_length} is greater than text_decoder.max_position_embeddings = {longest}, "
            "the longest sequence of the model."
        ]
    return []


def section_notes(sections: RunSections) -> list[str]:
    """What a user should hear about flags that have no effect together."""
    notes = []
    if sections.training.variable_seq_lengths:
        notes.append("no effect: --variable-seq-lengths (it is always so here).")
    if sections.checkpoint.save is None and sections.checkpoint.save_hf is None and not sections.runtime.dry_run:
        notes.append("nothing will be saved: neither --save nor --save-hf is given.")
    return notes


def model_notes(model: Qwen2VLConfig, training: TrainingConfig, structure: Mapping[str, str]) -> list[str]:
    """Where the command line and model.json say different things, and which one counts.

    Args:
        structure: the values of flags that describe the model.
    """
    notes = []
    for flag, value in structure.items():
        name = STRUCTURE_FLAGS[flag]
        expected = getattr(model.text_decoder, name)
        if not _is_same(value, expected):
            notes.append(f"[INFO] {flag} {value} has no effect: model.json says text_decoder.{name} = {expected}.")
    modules = {"text_decoder": model.text_decoder}
    if model.image_encoder is not None:
        modules["image_encoder.vision_encoder"] = model.image_encoder.vision_encoder  # type: ignore[assignment]
        modules["image_encoder.vision_projector"] = model.image_encoder.vision_projector  # type: ignore[assignment]
    for module, settings in modules.items():
        said = settings.dtype_said
        if said not in (None, training.params_dtype):
            notes.append(
                f"[INFO] model.json says {said} for {module}, but the command line says {training.params_dtype}, "
                "which counts."
            )
    return notes


def _is_same(word: str, expected: object) -> bool:
    """Whether a word of the command line means the value of a setting."""
    if isinstance(expected, int | float):
        try:
            return float(word) == expected
        except ValueError:
            return False
    return word == str(expected)
