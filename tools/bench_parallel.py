"""Pipeline efficiency of layouts from measured times, of the shipped stage lists and of the planned ones.

    python tools/bench_parallel.py [--sizes 7b 72b] [--seq 1024] [--images 1] [--micro-batches 96] [--repeats 3]

Builds chunks of the engine with one layer at true width on one process, measures forward and backward of every piece
(vision layer, patch embedding, projector, token embedding, text layer, output head with loss), adds the pieces up to
stages and simulates the schedule with these times; transfers are free. The planned lists come from FLOPs alone. Times
are processor time of one thread, so that other load on the machine hardly matters; the median of the repeats counts.
The vocabulary is measured at an eighth of its rows and scaled, to save memory.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindspeed_mm.config import ParallelConfig, Qwen2VLConfig, RuntimeConfig, TrainingConfig, load_settings
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.plan import StagePlan, Tower
from mindspeed_mm.plan.checks import shown
from mindspeed_mm.plan.flops import SampleShape, Work, backward_flops, forward_flops
from mindspeed_mm.plan.search import Costs, best_plan, simulate_plan
from mindspeed_mm.platform.groups import destroy, init_model_parallel, init_process_group, seed_everything
from mindspeed_mm.platform.select import activate, choose_platform

if TYPE_CHECKING:
    from mindspeed_mm.models.qwen2vl.chunk import Qwen2VLChunk
    from mindspeed_mm.platform.base import Platform

PIPELINES = {"7b": 4, "72b": 8}
VOCABULARY_SHARE = 8
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "qwen2vl"


@dataclass(frozen=True, slots=True)
class Row:
    """One layout."""

    name: str
    plan: StagePlan
    length_s: float
    busy: float
    share_of_ideal: float


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives back its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--configs", type=Path, default=CONFIGS, metavar="DIR", help="where SIZE/model.json lies")
    parser.add_argument("--seq", type=int, default=1024, help="tokens per sample")
    parser.add_argument("--images", type=int, default=1, help="pictures of 448 x 448 pixels per sample")
    parser.add_argument("--micro-batches", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    platform = choose_platform("cpu")
    activate(platform)
    init_process_group(platform, RuntimeConfig())
    shape = SampleShape(options.seq, 256 * options.images, options.images)
    try:
        for size in options.sizes:
            model = load_settings(Qwen2VLConfig, options.configs / size / "model.json")
            costs = measure(model, shape, options.repeats, platform)
            print(f"\n{size}: {shape.tokens} tokens, {shape.image_tokens} from pictures; CPU seconds per piece")
            print(_pieces(costs))
            print(_rows(compare(model, PIPELINES[size], shape, costs, options.micro_batches)), flush=True)
    finally:
        destroy()
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(model: Qwen2VLConfig, shape: SampleShape, repeats: int, platform: Platform) -> Costs:
    """Processor seconds of one sample, forward and backward, per layer and part of `model`."""
    bench = _Bench(model, shape, repeats, platform)
    times = bench.parts()
    # looking tokens up does not depend on the vocabulary, writing the gradient of the table does
    for name, grows in (("token_embed", 1), ("lm_head", VOCABULARY_SHARE)):
        times[name] = (times[name][0] * grows, times[name][1] * VOCABULARY_SHARE)
    times |= {"vision_layer": bench.layer(Tower.VISION), "text_layer": bench.layer(Tower.TEXT)}
    forward, backward = ({name: pair[at] for name, pair in times.items()} for at in (0, 1))
    return Costs(Work(**forward), Work(**backward))


class _Bench:
    """Chunks of a model with few layers, and the inputs of one sample."""

    def __init__(self, model: Qwen2VLConfig, shape: SampleShape, repeats: int, platform: Platform) -> None:
        assert model.image_encoder is not None
        tower, text = model.image_encoder.vision_encoder, model.text_decoder
        self.model, self.shape, self.repeats, self.platform = model, shape, repeats, platform
        self.vision_flows = not tower.freeze
        self.side_flows = self.vision_flows or not model.image_encoder.vision_projector.freeze
        self.text_flows = self.side_flows or not text.freeze
        side = tower.spatial_merge_size * math.isqrt(shape.image_tokens // shape.images)
        grids = torch.tensor([(1, side, side)] * shape.images)
        ids = torch.randint(10, text.vocab_size // VOCABULARY_SHARE, (shape.tokens,))
        labels = ids.clone()
        labels[: shape.image_tokens] = -100
        self.batch = Batch(
            input_ids=ids,
            labels=labels,
            position_ids=torch.arange(shape.tokens).expand(3, -1).contiguous(),
            cu_seqlens=torch.tensor([0, shape.tokens], dtype=torch.int32),
            image_rows=torch.arange(shape.image_tokens),
            grid_thw=grids,
            pixel_values=torch.randn(int(grids.prod(dim=1).sum()), tower.patch_dim),
        )

    def states(self, rows: int, width: int, *, flows: bool) -> Tensor:
        """[rows, 1, width]: what a module before this one would give."""
        return torch.randn(rows, 1, width, requires_grad=flows)

    def parts(self) -> dict[str, tuple[float, float]]:
        """Forward and backward of everything that is not a layer, on a chunk that holds all of it."""
        chunk = self.build(pp_size=1)
        batch, shape, width = self.batch, self.shape, self.model.text_decoder.hidden_size
        image, decoder = chunk.image_encoder, chunk.text_decoder
        assert image is not None
        assert decoder is not None
        projector, patch_embed = image.projector, image.encoder.patch_embed
        assert projector is not None
        assert patch_embed is not None
        pixels = batch.pixel_values
        assert pixels is not None
        vision_states = self.states(batch.num_patches, tower_width(self.model), flows=self.vision_flows)
        image_embeds = self.states(shape.image_tokens, width, flows=self.side_flows)
        supervised = self.states(shape.head_rows, width, flows=self.text_flows)
        labels = batch.labels[batch.labels >= 0]
        pieces: dict[str, Callable[[], Tensor]] = {
            "patch_embed": lambda: patch_embed(pixels),
            "projector": lambda: projector(vision_states),
            "token_embed": lambda: decoder.embed(batch.input_ids, batch.image_rows, image_embeds),
            "lm_head": lambda: decoder.token_losses(supervised, labels).mean(),
        }
        return {name: _time(run, self.repeats, chunk) for name, run in pieces.items()}

    def layer(self, tower: Tower) -> tuple[float, float]:
        """Forward and backward of a stage in the middle of a tower, which holds one layer and nothing else."""
        chunk = self.build(pp_size=6, tower=tower)
        if tower is Tower.VISION:
            states = self.states(self.batch.num_patches, tower_width(self.model), flows=self.vision_flows)
        else:
            states = self.states(self.shape.tokens, self.model.text_decoder.hidden_size, flows=self.text_flows)

        def run() -> Tensor:
            chunk.set_input_tensor(states)
            return chunk(self.batch)

        return _time(run, self.repeats, chunk)

    def build(self, *, pp_size: int, tower: Tower | None = None) -> Qwen2VLChunk:
        """The chunk of the whole shrunk model, or with six stages of one layer each the middle one of a tower."""
        from megatron.core import parallel_state

        from mindspeed_mm.models.qwen2vl.chunk import build_chunk

        one = ParallelConfig()
        model = shrunk(self.model, layers=1 if tower is None else 3)
        plan = StagePlan.build(model, one.model_copy(update={"pp_size": pp_size, "world_size": pp_size}))
        stage = plan.at(0) if tower is None else plan.locate(tower, 1)[0]
        training = TrainingConfig(micro_batch_size=1, global_batch_size=1, train_iters=1, seq_length=8)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        # building needs the tensor ranks only, so that one process can build any stage
        groups = init_model_parallel(one, StagePlan.build(model, one))
        seed_everything(self.platform, 0, groups.ranks)
        return build_chunk(model, plan, stage, one, training, self.platform, initialize=True)


def tower_width(model: Qwen2VLConfig) -> int:
    """Width of the vision tower."""
    assert model.image_encoder is not None
    return model.image_encoder.vision_encoder.hidden_size


def shrunk(model: Qwen2VLConfig, *, layers: int) -> Qwen2VLConfig:
    """The same model with few layers per tower, one per stage, and a part of the vocabulary."""
    assert model.image_encoder is not None
    ones, zeros = (1,) * layers, (0,) * layers
    tower = model.image_encoder.vision_encoder.model_copy(
        update={"num_layers": layers, "pipeline_num_layers": ones + zeros}
    )
    text = model.text_decoder.model_copy(
        update={
            "num_layers": layers,
            "pipeline_num_layers": zeros + ones,
            "vocab_size": model.text_decoder.vocab_size // VOCABULARY_SHARE,
        }
    )
    image = model.image_encoder.model_copy(update={"vision_encoder": tower})
    return model.model_copy(update={"image_encoder": image, "text_decoder": text})


def _time(run: Callable[[], Tensor], repeats: int, chunk: Qwen2VLChunk) -> tuple[float, float]:
    """Median processor seconds of forward and of backward (0 where nothing is trained), after one warm-up."""
    forward, backward = [], []
    for _ in range(repeats + 1):
        for parameter in chunk.parameters():
            parameter.grad = None
        started = time.process_time()
        output = run()
        between = time.process_time()
        if output.requires_grad:
            gradient = torch.ones_like(output)
            between, started = time.process_time(), started + time.process_time() - between
            output.backward(gradient)
        backward.append(time.process_time() - between)
        forward.append(between - started)
    return statistics.median(forward[1:]), statistics.median(backward[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def compare(
    model: Qwen2VLConfig, pp_size: int, shape: SampleShape, measured: Costs, num_micro_batches: int
) -> list[Row]:
    """The shipped lists, the planned ones, and the planned ones with two virtual chunks, under measured times."""
    shipped = StagePlan.build(model, ParallelConfig(pp_size=pp_size, world_size=pp_size))
    flops = Costs(forward_flops(model, shape), backward_flops(model, shape))
    plans = {"shipped": shipped}
    for name, vp_size in (("planned", 1), ("planned, VPP 2", 2)):
        plans[name] = best_plan(model, flops, pp_size=pp_size, vp_size=vp_size, num_micro_batches=num_micro_batches)
    rows = []
    for name, plan in plans.items():
        timeline = simulate_plan(plan, measured, num_micro_batches)
        rows.append(Row(name, plan, timeline.length, timeline.efficiency, timeline.share_of_ideal))
    return rows


def _pieces(costs: Costs) -> str:
    """Forward and backward seconds as a Markdown table."""
    names = [field.name for field in fields(Work)]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for title, work in (("forward", costs.forward), ("backward", costs.backward)):
        lines.append(f"| {title} | " + " | ".join(f"{getattr(work, name):.3f}" for name in names) + " |")
    return "\n".join(lines)


def _rows(rows: list[Row]) -> str:
    """The layouts as a Markdown table."""
    lines = [
        "",
        "| layout | vision | text | ranks busy | of the ideal | step, against shipped |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        vision, text = (shown(row.plan.lists_of(tower)) for tower in (Tower.VISION, Tower.TEXT))
        lines.append(
            f"| {row.name} | {vision} | {text} | {row.busy:.1%} | {row.share_of_ideal:.1%} | "
            f"{row.length_s / rows[0].length_s:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
