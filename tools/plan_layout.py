"""Work, memory and schedule of a pipeline layout, and the best layer lists for it.

    python tools/plan_layout.py --model configs/qwen2vl/7b/model.json --pp 4 [--vpp 2] [--tp 1] [--dp 2] [--gbs 192]
        [--seq 1024] [--images 1] [--image-size 448x448] [--draw schedule.svg schedule.png]

Compares the lists of the model.json with the best ones found, on one simulated iteration in which FLOPs are time and
transfers are free. Frozen parts cost their forward pass only. What recomputation repeats counts as backward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# run as a script, the repository root is not on the path
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, TrainingConfig, load_settings
from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.plan import StagePlan, Tower
from mindspeed_mm.plan.checks import shown, tp_problems
from mindspeed_mm.plan.drawing import (
    BLOCK_HEIGHT,
    IDEAL_TEXT,
    LANE_HEIGHT,
    Panel,
    colour,
    legend_entries,
    longest,
    render_svg,
)
from mindspeed_mm.plan.dry_run import plan_table
from mindspeed_mm.plan.estimate import estimate_memory
from mindspeed_mm.plan.flops import SampleShape, backward_flops, forward_flops
from mindspeed_mm.plan.schedule import Timeline, check_micro_batches
from mindspeed_mm.plan.search import Costs, best_plan, simulate_plan

GIB, TERA = 2**30, 1e12


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    options = _parser().parse_args(argv)
    try:
        _run(options)
    except MindSpeedMMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FILE", help="the model.json")
    sizes = (
        ("pp", 1, "pipeline size"),
        ("vpp", 1, "virtual chunks per pipeline rank"),
        ("tp", 1, "tensor-parallel size"),
        ("cp", 1, "context-parallel size"),
        ("dp", 1, "replicas"),
        ("mbs", 1, "samples per micro-batch"),
        ("gbs", None, "samples per optimizer step; four micro-batches per pipeline rank if not given"),
        ("seq", 1024, "tokens per sample, those of pictures included"),
        ("images", 1, "pictures per sample; 0 for text only"),
        ("supervised", None, "tokens per sample that have a label; all but those of pictures if not given"),
        ("draw-micro-batches", None, "micro-batches in the picture; two per pipeline rank if not given"),
    )
    for name, default, text in sizes:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--image-size", default="448x448", metavar="HxW", help="pixels of a picture")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of weights and activations")
    parser.add_argument(
        "--distributed-optimizer",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="split optimizer state over the replicas",
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="split what lies between the linears, over TP")
    parser.add_argument(
        "--draw", type=Path, nargs="+", default=[], metavar="FILE", help="write the schedules as .svg or .png"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    model = load_settings(Qwen2VLConfig, options.model)
    parallel = ParallelConfig(
        tp_size=options.tp,
        pp_size=options.pp,
        vp_size=options.vpp,
        cp_size=options.cp,
        world_size=options.tp * options.pp * options.cp * options.dp,
        sequence_parallel=options.sequence_parallel,
    )
    training = _training(options)
    num_micro_batches = training.num_micro_batches(options.dp)
    shape = _shape(model, options)
    check_micro_batches(options.pp, options.vpp, num_micro_batches)
    problems = tp_problems(model, options.tp)
    if problems:
        raise ConfigError("stage plan", problems)
    print(_heading(model, parallel, training, shape))
    given: StagePlan | None = None
    try:
        given = StagePlan.build(model, parallel)
    except ConfigError as error:
        print(f"\nThe lists of {options.model} do not fit:\n  " + "\n  ".join(error.problems))
    costs = Costs(forward_flops(model, shape), backward_flops(model, shape))
    best = best_plan(
        model,
        costs,
        tp_size=options.tp,
        pp_size=options.pp,
        vp_size=options.vpp,
        num_micro_batches=num_micro_batches,
        given=given,
    )
    settings = OptimizerConfig(use_distributed_optimizer=options.distributed_optimizer)
    plans = {"best lists": best} if given is None else {"given lists": given, "best lists": best}
    if given == best:
        plans = {"given lists, which are the best found": best}
    timelines = {name: simulate_plan(plan, costs, num_micro_batches) for name, plan in plans.items()}
    for name, plan in plans.items():
        print(f"\n{name}: {_lists_text(plan)}\n")
        print(_work_table(model, plan, costs, parallel, options.mbs))
        print(_memory_table(model, plan, parallel, training, settings, shape))
        print(_schedule_text(timelines[name]))
    if len(plans) > 1:
        before, after = (timeline.length for timeline in timelines.values())
        print(f"\nWith the best lists a step takes {after / before:.1%} of the time of the given ones.")
    if options.draw:
        _draw(options.draw, plans, costs, options.draw_micro_batches or min(num_micro_batches, 2 * options.pp))


def _training(options: argparse.Namespace) -> TrainingConfig:
    gbs = options.gbs or 4 * options.pp * options.mbs * options.dp
    if gbs % (options.mbs * options.dp):
        raise ConfigError(
            "command line", f"--gbs {gbs} is not a multiple of --mbs x --dp = {options.mbs * options.dp}."
        )
    return TrainingConfig(
        micro_batch_size=options.mbs,
        global_batch_size=gbs,
        train_iters=1,
        seq_length=options.seq,
        bf16=options.dtype == "bf16",
    )


def _shape(model: Qwen2VLConfig, options: argparse.Namespace) -> SampleShape:
    """The sample of the command line."""
    encoder = model.image_encoder
    if encoder is None or options.images == 0:
        return _checked(options, image_tokens=0)
    height, _, width = options.image_size.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError("command line", f"--image-size {options.image_size} should be like 448x448 (height x width).")
    pixels = encoder.vision_encoder.patch_size * encoder.vision_encoder.spatial_merge_size
    tokens = max(1, round(int(height) / pixels)) * max(1, round(int(width) / pixels))
    return _checked(options, image_tokens=options.images * tokens)


def _checked(options: argparse.Namespace, *, image_tokens: int) -> SampleShape:
    try:
        return SampleShape(options.seq, image_tokens, max(1, options.images), options.supervised)
    except ValueError as error:
        raise ConfigError("command line", f"the sample is impossible: {error}.") from None


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _heading(model: Qwen2VLConfig, parallel: ParallelConfig, training: TrainingConfig, shape: SampleShape) -> str:
    chunks = f" (VPP {parallel.vp_size})" if parallel.vp_size > 1 else ""
    pictures = (
        f"{shape.image_tokens:,} from {_counted(shape.images, 'picture')}" if shape.image_tokens else "no picture"
    )
    batches = _counted(training.num_micro_batches(parallel.dp_size), "micro-batch", "es")
    return (
        f"{model.model_id}: TP {parallel.tp_size} x PP {parallel.pp_size}{chunks} x CP {parallel.cp_size} x "
        f"DP {parallel.dp_size}; {batches} of {_counted(training.micro_batch_size, 'sample')}; "
        f"{shape.tokens:,} tokens per sample, {pictures}, {shape.head_rows:,} with a label"
    )


def _counted(count: int, name: str, ending: str = "s") -> str:
    return f"{count:,} {name}{'' if count == 1 else ending}"


def _lists_text(plan: StagePlan) -> str:
    text = f"text {shown(plan.lists_of(Tower.TEXT))}"
    return f"vision {shown(plan.lists_of(Tower.VISION))}, {text}" if plan.vision_layers else text


def _work_table(model: Qwen2VLConfig, plan: StagePlan, costs: Costs, parallel: ParallelConfig, samples: int) -> str:
    """The plan with its parameters, and the FLOPs of a micro-batch per process."""
    forward, backward = costs.of_stages(plan)
    scale = samples / parallel.tp_size / parallel.cp_size / TERA
    cells = [("fwd TFLOP", "bwd TFLOP")]
    cells += [(f"{f * scale:.3f}", f"{b * scale:.3f}") for f, b in zip(forward, backward, strict=True)]
    lines = plan_table(model, plan).splitlines()
    at = lines[0].index("parts")
    return "\n".join(f"{line[:at]}{f:>9}  {b:>9}  {line[at:]}" for line, (f, b) in zip(lines, cells, strict=True))


def _memory_table(
    model: Qwen2VLConfig,
    plan: StagePlan,
    parallel: ParallelConfig,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    shape: SampleShape,
) -> str:
    lines = ["memory per process in GiB", "  pp   weights  gradients  optimizer  activations     total"]
    for rank in range(plan.pp_size):
        memory = estimate_memory(
            model, plan, rank, parallel=parallel, training=training, optimizer=optimizer, shape=shape
        )
        lines.append(
            f"{rank:>4}  {memory.weights_bytes / GIB:8.2f}  {memory.gradients_bytes / GIB:9.2f}  "
            f"{memory.optimizer_bytes / GIB:9.2f}  {memory.activations_bytes / GIB:11.2f}  "
            f"{memory.total_bytes / GIB:8.2f}"
        )
    return "\n".join(lines)


def _schedule_text(timeline: Timeline) -> str:
    kind = "interleaved 1F1B" if timeline.vp_size > 1 else "1F1B"
    busy = " ".join(f"{timeline.busy(rank) / timeline.length:.0%}" for rank in range(timeline.pp_size))
    return (
        f"schedule: {kind}; pipeline ranks work {busy} of the time, on average {timeline.efficiency:.1%} (bubble "
        f"{timeline.bubble:.1%}); {timeline.share_of_ideal:.1%} of the ideal, the same work dealt evenly"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _draw(paths: Sequence[Path], plans: dict[str, StagePlan], costs: Costs, num_micro_batches: int) -> None:
    panels = []
    for name, plan in plans.items():
        timeline = simulate_plan(plan, costs, num_micro_batches)
        title = (
            f"{name}: {_lists_text(plan)} — bubble {timeline.bubble:.1%} with {num_micro_batches} micro-batches, "
            f"{timeline.share_of_ideal:.1%} of ideal"
        )
        panels.append(Panel(title, timeline, tuple(_lane(plan, rank) for rank in range(plan.pp_size))))
    for path in paths:
        if path.suffix == ".svg":
            path.write_text(render_svg(panels), encoding="utf-8")
        elif path.suffix == ".png":
            write_png(path, panels)
        else:
            raise ConfigError("command line", f"--draw {path}: the name should end in .svg or .png.")
        print(f"\ndrawn to {path}")


def _lane(plan: StagePlan, pp_rank: int) -> str:
    if plan.vp_size > 1:
        return f"rank {pp_rank}"
    stage = plan.at(pp_rank)
    held = [f"{tower} {layers.start}-{layers.stop - 1}" for tower in Tower if (layers := stage.layers(tower))]
    return f"rank {pp_rank}: {', '.join(held)}"


def write_png(path: Path, panels: Sequence[Panel]) -> None:
    """The same picture as the SVG, by matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heights = [panel.timeline.pp_size for panel in panels]
    figure = Figure(figsize=(14, 0.42 * sum(heights) + 1.0 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
    end = longest(panels)
    for panel, axes in zip(panels, grid[:, 0], strict=True):
        bar = BLOCK_HEIGHT / LANE_HEIGHT
        for rank in range(panel.timeline.pp_size):
            axes.broken_barh([(0, panel.timeline.length)], (rank - bar / 2, bar), facecolors="#eeeeee")
        for block in panel.timeline.blocks:
            width = block.end - block.start
            axes.broken_barh(
                [(block.start, width)],
                (block.pp_rank - bar / 2, bar),
                facecolors=colour(block),
                edgecolor="white",
                linewidth=0.5,
            )
            number = str(block.step.micro_batch)
            if width > end * 0.008 * len(number):
                axes.text(block.start + width / 2, block.pp_rank, number, ha="center", va="center", fontsize=8)
        axes.axvline(panel.timeline.ideal_length, color="#333333", linestyle="--", linewidth=1)
        axes.set(
            title=panel.title, yticks=range(panel.timeline.pp_size), yticklabels=panel.lanes, xlim=(0, end * 1.005)
        )
        axes.title.set_fontsize(10)
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
    ideal = Line2D([], [], color="#333333", linestyle="--", label=IDEAL_TEXT)
    entries = legend_entries(max(panel.timeline.vp_size for panel in panels))
    figure.legend(
        handles=[*(Patch(color=fill, label=name) for fill, name in entries), ideal],
        loc="outside lower left",
        ncols=len(entries) + 1,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    raise SystemExit(main())
