"""Training speed of this engine beside a plain transformers loop: same model, dtype, batch and machine, in one run.

    python tools/bench_train.py [--seq 1024 2048] [--dtype fp32 bf16] [--device cpu] [--repeats 5] [--json FILE]

Both sides train every weight with AdamW (fused) and gradient clipping on one process. Iterations of the two sides
alternate, so a change of the machine's speed meets both; the ratio is the median over the pairs. transformers runs
under torch's default precision of fp32 products unless --same-precision is given; ours under the one that the start-up
check chose. transformers runs with its default attention (SDPA). In bf16 ours keeps fp32 master weights and gradients,
as Megatron does; transformers updates bf16 weights directly.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint.load import read_stage
from mindspeed_mm.config import OptimizerConfig, ParallelConfig, Qwen2VLConfig, RuntimeConfig, TrainingConfig
from mindspeed_mm.ops.batch import Batch
from mindspeed_mm.ops.mrope import mrope_position_ids
from mindspeed_mm.plan import StagePlan
from mindspeed_mm.platform.groups import destroy, init_model_parallel, init_process_group, seed_everything
from mindspeed_mm.platform.select import activate, choose_platform
from tools.make_tiny_checkpoint import TinySize, make_tiny_checkpoint

SIZES = {
    "small": TinySize(512, 1536, 8, 8, 2, (8, 12, 12), 256, 4, 4),
    "medium": TinySize(1536, 8960, 14, 12, 2, (16, 24, 24), 1280, 16, 16),
}
"""`medium` has the layer widths of Qwen2-VL-2B and half its depth: for accelerators."""
GRID = (1, 24, 24)


def main() -> None:
    """Measure and print one row per dtype and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 2048], help="tokens per sample")
    parser.add_argument("--dtype", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--samples", type=int, default=1, help="samples per micro-batch")
    parser.add_argument("--device", default=None, help="cpu, cuda or npu; the best one present if not given")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of iterations after warm-up")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    parser.add_argument(
        "--same-precision",
        action="store_true",
        help="give transformers the matmul precision that our start-up check chose, not torch's default",
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the rows here")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    plain_precision = torch.get_float32_matmul_precision()
    platform = choose_platform(args.device)
    activate(platform)
    precision = {"ours": torch.get_float32_matmul_precision(), "theirs": plain_precision}
    if args.same_precision:
        precision["theirs"] = precision["ours"]
    print(f"fp32 products: ours {precision['ours']}, transformers {precision['theirs']}")
    init_process_group(platform, RuntimeConfig())
    rows = []
    with TemporaryDirectory() as folder:
        directory = make_tiny_checkpoint(
            Path(folder) / "hf", tied=True, seed=0, vocab_size=args.vocab, size=SIZES[args.size]
        )
        print("dtype    seq   ours tok/s  transformers tok/s  ratio (median of pairs)  smallest  largest")
        for dtype in args.dtype:
            for seq in args.seq:
                row = compare(directory, dtype, seq, args.samples, args.repeats, platform, precision)
                rows.append(row)
                print(
                    f"{dtype:5} {seq:6d} {row['ours']:12.0f} {row['transformers']:19.0f} {row['ratio']:24.2f}"
                    f" {row['low']:9.2f} {row['high']:8.2f}",
                    flush=True,
                )
    destroy()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(
    directory: Path, dtype: str, seq: int, samples: int, repeats: int, platform: Any, precision: dict[str, str]
) -> dict[str, Any]:
    """Tokens per second of both sides and the ratios of paired iterations."""
    config = json.loads((directory / "config.json").read_text())
    inputs = make_inputs(config, seq, samples)
    ours = our_step(directory, config, dtype, inputs, platform)
    theirs = transformers_step(directory, config, dtype, inputs, platform)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for repeat in range(repeats + 2):
        for name, step in (("ours", ours), ("theirs", theirs)):
            torch.set_float32_matmul_precision(precision[name])
            platform.synchronize()
            started = time.perf_counter()
            step()
            platform.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    tokens = seq * samples
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "dtype": dtype,
        "seq": seq,
        "ours": tokens / statistics.median(seconds["ours"]),
        "transformers": tokens / statistics.median(seconds["theirs"]),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def make_inputs(config: dict[str, Any], seq: int, samples: int) -> dict[str, torch.Tensor]:
    """[samples, seq] ids with one image each; the second half is supervised."""
    torch.manual_seed(0)
    image_tokens = GRID[1] * GRID[2] // 4
    ids = torch.randint(300, 1000, (samples, seq))
    ids[:, 4] = config["vision_start_token_id"]
    ids[:, 5 : 5 + image_tokens] = config["image_token_id"]
    ids[:, 5 + image_tokens] = config["vision_end_token_id"]
    labels = ids.clone()
    labels[:, : seq // 2] = -100
    pixels = torch.randn(samples * GRID[1] * GRID[2], 1176)
    return {"ids": ids, "labels": labels, "pixels": pixels, "grids": torch.tensor([GRID] * samples)}


def our_step(
    directory: Path, config: dict[str, Any], dtype: str, inputs: dict[str, torch.Tensor], platform: Any
) -> Callable[[], None]:
    """One iteration of this engine."""
    from megatron.core import parallel_state

    from mindspeed_mm.models.qwen2vl.chunk import build_chunk
    from mindspeed_mm.ops.loss import LossKind
    from mindspeed_mm.training.build import fill, wrap_chunks
    from mindspeed_mm.training.loop import connect_schedule
    from mindspeed_mm.training.optimizer import build_optimizer
    from mindspeed_mm.training.step import forward_step

    model = unfrozen(Qwen2VLConfig.from_hf(config))
    samples, seq = inputs["ids"].shape
    parallel = ParallelConfig()
    training = TrainingConfig(
        micro_batch_size=samples, global_batch_size=samples, train_iters=1, seq_length=seq, bf16=dtype == "bf16"
    )
    settings = OptimizerConfig(lr=1e-5, weight_decay=0.0, clip_grad=1.0)
    plan = StagePlan.build(model, parallel)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    groups = init_model_parallel(parallel, plan)
    seed_everything(platform, 0, groups.ranks)
    chunk = build_chunk(model, plan, plan.at(0), parallel, training, platform, initialize=False)
    fill(chunk, read_stage(directory, model, plan, plan.at(0), 0))
    models = wrap_chunks([chunk], settings, training)
    optimizer = build_optimizer(settings, training, models)
    connect_schedule(models, optimizer, groups.embedding)
    batch = to_batch(inputs, config)

    def step() -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        models[0].zero_grad_buffer()
        optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=partial(forward_step, kind=LossKind.PER_MICRO_BATCH),
            data_iterator=iter([batch]),
            model=models[0],
            num_microbatches=1,
            seq_length=seq,
            micro_batch_size=samples,
            forward_only=False,
        )
        optimizer.step()

    return step


def unfrozen(model: Qwen2VLConfig) -> Qwen2VLConfig:
    """The same model with a trainable vision tower."""
    assert model.image_encoder is not None
    image = model.image_encoder
    vision = image.vision_encoder.model_copy(update={"freeze": False})
    projector = image.vision_projector.model_copy(update={"freeze": False})
    return model.model_copy(
        update={"image_encoder": image.model_copy(update={"vision_encoder": vision, "vision_projector": projector})}
    )


def to_batch(inputs: dict[str, torch.Tensor], config: dict[str, Any]) -> Batch:
    """The inputs as one padding-free row."""
    samples, seq = inputs["ids"].shape
    ids = inputs["ids"].flatten()
    shifted = torch.cat([inputs["labels"][:, 1:], torch.full((samples, 1), -100)], dim=1).flatten()
    positions = [
        mrope_position_ids(row, inputs["grids"][:1], media_token_ids=[config["image_token_id"]], merge_size=2).view(
            3, -1
        )
        for row in inputs["ids"]
    ]
    return Batch(
        input_ids=ids,
        labels=shifted,
        position_ids=torch.cat(positions, dim=1),
        cu_seqlens=torch.arange(0, samples * seq + 1, seq, dtype=torch.int32),
        image_rows=(ids == config["image_token_id"]).nonzero().flatten(),
        grid_thw=inputs["grids"],
        pixel_values=inputs["pixels"],
    )


def transformers_step(
    directory: Path, config: dict[str, Any], dtype: str, inputs: dict[str, torch.Tensor], platform: Any
) -> Callable[[], None]:
    """One iteration of a plain transformers loop."""
    from transformers import Qwen2VLForConditionalGeneration

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch_dtype).to(platform.device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    ids = inputs["ids"].to(platform.device)
    kwargs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": inputs["labels"].to(platform.device),
        "pixel_values": inputs["pixels"].to(platform.device, torch_dtype),
        "image_grid_thw": inputs["grids"].to(platform.device),
        "use_cache": False,
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        kwargs["mm_token_type_ids"] = (ids == config["image_token_id"]).int()

    def step() -> None:
        optimizer.zero_grad()
        model(**kwargs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
