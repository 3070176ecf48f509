"""What `--dry-run` prints: plan with parameters, memory estimate, batch arithmetic and what would be loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_mm.plan.auto import balanced_lists
from mindspeed_mm.plan.checks import shown
from mindspeed_mm.plan.estimate import (
    Memory,
    estimate_memory,
    model_parameters,
    sample_shape,
    stage_parameters,
    stage_work,
)
from mindspeed_mm.plan.flops import SampleShape, training_flops
from mindspeed_mm.plan.stage import StagePlan, Tower

if TYPE_CHECKING:
    from mindspeed_mm.config import Qwen2VLConfig, RunConfig

GIB = 2**30


def render_dry_run(run: RunConfig, plan: StagePlan) -> str:
    """The report of a dry run, plain text."""
    blocks = [
        _table(_summary_rows(run, plan), left=(0, 1)),
        plan_table(run.model, plan),
        balance_text(run.model, plan),
        _memory_block(run, plan),
    ]
    if run.notes:
        blocks.append("\n".join(run.notes))
    return "\n\n".join(blocks)


# ---------------------------------------------------------------------------------------------------------------------
# Summary


def _summary_rows(run: RunConfig, plan: StagePlan) -> list[tuple[str, ...]]:
    parallel, training, optimizer, checkpoint = run.parallel, run.training, run.optimizer, run.checkpoint
    total, trained = model_parameters(run.model)
    frozen = [name for name, is_frozen in _freezes(run.model) if is_frozen]
    vp_text = f" (VPP {plan.vp_size})" if plan.vp_size > 1 else ""
    micro_batches = training.num_micro_batches(parallel.dp_size)
    lr = "not given" if optimizer.lr is None else f"{optimizer.lr:g}"
    return [
        (
            "model",
            f"{plan.family}: {plan.vision_layers} vision and {plan.text_layers} text layers, {total:,} parameters, "
            f"{trained:,} trained; embeddings {'tied' if plan.is_tied else 'not tied'}",
        ),
        ("frozen", ", ".join(frozen) or "nothing"),
        (
            "processes",
            f"{parallel.world_size} = TP {parallel.tp_size} x PP {parallel.pp_size}{vp_text} x CP {parallel.cp_size} x "
            f"DP {parallel.dp_size}",
        ),
        (
            "batch",
            f"{training.micro_batch_size} per micro-batch x {micro_batches} micro-batches x {parallel.dp_size} "
            f"replicas = {training.global_batch_size} samples per step, at most {training.seq_length:,} tokens each",
        ),
        (
            "steps",
            f"{training.train_iters:,} = {training.train_iters * training.global_batch_size:,} samples; learning rate "
            f"{lr}, {optimizer.lr_decay_style}, warm-up {_warm_up(run)}",
        ),
        (
            "precision",
            f"{training.params_dtype}, {optimizer.optimizer}"
            f"{', distributed optimizer' if optimizer.use_distributed_optimizer else ''}",
        ),
        ("load", _load_text(run)),
        ("data", "not given" if run.data is None else _found(run.data.dataset_param.basic_parameters.dataset_files)),
        (
            "save",
            "nothing"
            if checkpoint.save is None
            else f"{checkpoint.save}, format {checkpoint.ckpt_format}, "
            + (
                f"every {checkpoint.save_interval:,} steps and at the end" if checkpoint.save_interval else "at the end"
            ),
        ),
        *([("export", f"{checkpoint.save_hf}, Hugging Face form, at the end")] if checkpoint.save_hf else []),
    ]


def _freezes(model: Qwen2VLConfig) -> list[tuple[str, bool]]:
    encoder = model.image_encoder
    vision = (
        []
        if encoder is None
        else [("vision tower", encoder.vision_encoder.freeze), ("projector", encoder.vision_projector.freeze)]
    )
    return [*vision, ("text decoder", model.text_decoder.freeze)]


def _warm_up(run: RunConfig) -> str:
    optimizer = run.optimizer
    if optimizer.lr_warmup_fraction is not None:
        return f"{optimizer.lr_warmup_fraction * (optimizer.lr_decay_iters or run.training.train_iters):,.0f} steps"
    return f"{optimizer.lr_warmup_iters:,} steps"


def _load_text(run: RunConfig) -> str:
    checkpoint = run.checkpoint
    if checkpoint.load is None:
        return "nothing: random weights" if checkpoint.init_random else "nothing: --load is not given"
    step = "" if checkpoint.ckpt_step is None else f", iteration {checkpoint.ckpt_step}"
    return _found([checkpoint.load]) + step


def _found(paths: Sequence[str]) -> str:
    return ", ".join(path if Path(path).exists() else f"{path} (not found on this machine)" for path in paths)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def plan_table(model: Qwen2VLConfig, plan: StagePlan) -> str:
    """The plan's table with two more columns: parameters and trained parameters of each stage on one tensor rank."""
    counts = [stage_parameters(model, plan, stage) for stage in plan.stages]
    columns = [("parameters", "trained"), *((f"{total:,}", f"{trained:,}") for total, trained in counts)]
    lines = plan.table().splitlines()
    # the parts come last, so the numbers are put in front of them
    at = lines[0].index("parts")
    widths = [max(len(row[column]) for row in columns) for column in range(2)]
    return "\n".join(
        line[:at] + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "  " + line[at:]
        for line, row in zip(lines, columns, strict=True)
    )


def rank_work(model: Qwen2VLConfig, plan: StagePlan, shape: SampleShape) -> list[float]:
    """FLOPs of one sample's training step on every pipeline rank, over all tensor ranks."""
    work = training_flops(model, shape)
    return [sum(stage_work(work, stage) for stage in plan.stages_of_rank(rank)) for rank in range(plan.pp_size)]


def balance(work: Sequence[float]) -> float:
    """How busy the pipeline ranks are on average while the slowest works, 0 to 1."""
    return sum(work) / len(work) / max(work)


def balance_text(model: Qwen2VLConfig, plan: StagePlan) -> str:
    shape = SampleShape()
    work = rank_work(model, plan, shape)
    text = (
        f"Work per pipeline rank, against the slowest: {' '.join(f'{value / max(work):.0%}' for value in work)}; "
        f"on average {balance(work):.0%} (samples of {shape.tokens} tokens, {shape.image_tokens} from pictures)."
    )
    lists = plan.lists_of(Tower.VISION), plan.lists_of(Tower.TEXT)
    names = [name for name, layers in (("vision", plan.vision_layers), ("text", plan.text_layers)) if layers]
    if plan.pp_size == 1:
        return text
    chosen = balanced_lists(model, plan.pp_size, plan.vp_size)
    used = ", ".join(f"{name} {shown(layers)}" for name, layers in zip(names, lists[-len(names) :], strict=True))
    text += f"\nLayers per stage: {used}."
    if chosen == lists:
        return text + ' That is what "auto" chooses.'
    other = StagePlan.from_lists(
        plan.family,
        *chosen,
        tp_size=plan.tp_size,
        vision_layers=plan.vision_layers,
        text_layers=plan.text_layers,
        is_tied=plan.is_tied,
    )
    shown_lists = ", ".join(
        f"{name} {shown(layers)}" for name, layers in zip(names, chosen[-len(names) :], strict=True)
    )
    reached = balance(rank_work(model, other, shape))
    if reached < balance(work) + 0.005:
        return text
    return text + f'\n"auto" would choose {shown_lists}, on average {reached:.0%}.'


def _memory_block(run: RunConfig, plan: StagePlan) -> str:
    memories = [
        estimate_memory(run.model, plan, rank, parallel=run.parallel, training=run.training, optimizer=run.optimizer)
        for rank in range(plan.pp_size)
    ]
    shape = sample_shape(run.training)
    rows: list[tuple[str, ...]] = [("pp", "weights", "gradients", "optimizer", "activations", "total")]
    rows += [(str(rank), *_gib(memory)) for rank, memory in enumerate(memories)]
    title = (
        f"Memory per process in GiB, estimated (samples of {shape.tokens:,} tokens, {shape.image_tokens:,} from "
        "pictures; kernels and allocator come on top):"
    )
    return f"{title}\n{_table(rows)}"


def _gib(memory: Memory) -> tuple[str, ...]:
    values = (
        memory.weights_bytes,
        memory.gradients_bytes,
        memory.optimizer_bytes,
        memory.activations_bytes,
        memory.total_bytes,
    )
    return tuple(f"{value / GIB:.2f}" for value in values)


def _table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = ()) -> str:
    """Rows as aligned columns; the columns in `left` are aligned to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
