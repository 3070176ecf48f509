"""Supervised fine-tuning: from the command line to a finished run."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_mm.config import RunConfig, parse_command_line
from mindspeed_mm.errors import ConfigError, MindSpeedMMError
from mindspeed_mm.plan import StagePlan, check_trainable
from mindspeed_mm.plan.dry_run import render_dry_run
from mindspeed_mm.storage.publish import check_target
from mindspeed_mm.tasks.logs import set_up_logging

if TYPE_CHECKING:
    from mindspeed_mm.platform.base import Platform
    from mindspeed_mm.platform.groups import Groups
    from mindspeed_mm.training.loop import Trainer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the house (0 done, 2 configuration, 13 no checkpoint, ...)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    set_up_logging(os.environ)
    try:
        run = parse_command_line(arguments, os.environ)
        plan = StagePlan.build(run.model, run.parallel)
        check_trainable(run.model, plan, run.optimizer.enable_dummy_optimizer)
        check_supported(run)
        if run.runtime.dry_run:
            sys.stdout.write(render_dry_run(run, plan) + "\n")
            return 0
        check_export(run)
        train(run, plan)
    except MindSpeedMMError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except RuntimeError as error:
        from mindspeed_mm.platform.peers import is_lost_peer, lost_peer_error

        # Outside of the roll call: while groups are built, or at the last barrier.
        if not is_lost_peer(error):
            raise
        lost = lost_peer_error(error, "another process of the job ended or hangs.", "start-up or shut-down", None)
        logger.error("%s: %s", type(lost).__name__, lost)
        return lost.exit_code
    return 0


def check_export(run: RunConfig) -> None:
    """Refuse an export that could not be written, before hours of training.

    Raises:
        ConfigError: the place is taken, or there is no Hugging Face directory to take the other files from.
    """
    if run.checkpoint.save_hf:
        hf_reference(run)
        check_target(Path(run.checkpoint.save_hf))


def check_supported(run: RunConfig) -> None:
    """Refuse what this release does not do yet, before any process group exists.

    Raises:
        ConfigError: naming every such setting.
    """
    problems = []
    micro_batches = run.training.num_micro_batches(run.parallel.dp_size)
    if run.parallel.vp_size > 1 and micro_batches % run.parallel.pp_size:
        problems.append(
            f"--virtual-pipeline-model-parallel-size {run.parallel.vp_size}: the interleaved schedule needs\n"
            f"micro-batches in multiples of the {run.parallel.pp_size} pipeline ranks; a replica has {micro_batches}.\n"
            "Change --global-batch-size or --micro-batch-size."
        )
    if run.parallel.cp_size > 1 and run.parallel.context_parallel_algo != "ulysses_cp_algo":
        problems.append(
            f"--context-parallel-algo {run.parallel.context_parallel_algo}: of the algorithms only ulysses_cp_algo is "
            "available."
        )
    if run.optimizer.optimizer == "sgd" and run.optimizer.use_distributed_optimizer:
        problems.append("--optimizer sgd: megatron's distributed optimizer takes Adam only; drop one of the two.")
    if run.tool.profile.enable or run.tool.memory_profile.enable:
        problems.append(
            "--mm-tool: profiling is not available yet; set `enable` of profile and memory_profile to false."
        )
    if run.checkpoint.ckpt_format != "torch" and run.checkpoint.save and not run.runtime.dry_run:
        problems.append("--ckpt-format torch_dist: not available yet; use --ckpt-format torch.")
    if problems:
        raise ConfigError("command line", problems)


def check_precision(run: RunConfig, platform: Platform) -> None:
    """Refuse precisions that the device cannot train in.

    Raises:
        ConfigError: fp16 without an accelerator, or bf16 where the device lacks it.
    """
    if run.training.fp16 and platform.name == "cpu":
        raise ConfigError("command line", "--fp16: products in float16 are unusable on a CPU; use --bf16 or neither.")
    if run.training.bf16 and not platform.supports_bf16:
        raise ConfigError(
            "command line", f"--bf16: this {platform.name} device has no bfloat16; use --fp16 or neither."
        )


def train(run: RunConfig, plan: StagePlan) -> None:
    """Join the other processes, build this rank's part, train, export."""
    from mindspeed_mm.platform.groups import destroy, init_model_parallel, init_process_group, seed_everything
    from mindspeed_mm.platform.patches import megatron_version
    from mindspeed_mm.platform.peers import Peers
    from mindspeed_mm.platform.select import activate, choose_platform

    platform = choose_platform(run.runtime.device)
    activate(platform)
    check_precision(run, platform)
    if run.training.use_deter_comp:
        platform.enable_determinism()
    # Only now: these modules import megatron-core, which binds device names at import.
    from mindspeed_mm.training.setup import build_trainer

    started = time.perf_counter()
    init_process_group(platform, run.runtime)
    timeout_minutes = run.runtime.distributed_timeout_minutes
    finished = False
    try:
        with Peers.of_job(os.environ, timeout_minutes) as peers:
            groups = init_model_parallel(run.parallel, plan, timeout_minutes=timeout_minutes)
            seed_everything(platform, run.training.seed, groups.ranks)
            if groups.ranks.rank == 0:
                for note in run.notes:
                    logger.info(note)
                logger.info("megatron-core %s on %s", megatron_version(), platform.name)
                logger.info("stage plan\n%s", plan.table())
            logger.info("time to initialize megatron (seconds): %.3f", time.perf_counter() - started)
            trainer = build_trainer(run, plan, groups, platform)
            peers.activity = lambda: f"iteration {trainer.state.iteration + 1}"
            logger.info("done with setup ...\ntraining ...")
            try:
                trainer.train()
            finally:
                if trainer.reporter is not None:
                    trainer.reporter.close()
            if run.checkpoint.save_hf:
                peers.activity = lambda: "the export"
                export_hf(run, plan, groups, trainer)
        finished = True
    finally:
        destroy(wait=finished)


def export_hf(run: RunConfig, plan: StagePlan, groups: Groups, trainer: Trainer) -> None:
    """Write the trained weights as a Hugging Face directory beside the files of the one they came from.

    Every rank writes its shard of a temporary MM directory, the first one converts it: no rank holds the whole model.
    """
    import torch.distributed as dist

    from checkpoint.convert import mm_to_hf
    from mindspeed_mm.training.checkpoint import save_weights

    assert run.checkpoint.save_hf is not None
    target = Path(run.checkpoint.save_hf)
    temporary = target.with_name(f".{target.name}.mm")
    save_weights(temporary, plan, groups, trainer.trainee.chunks)
    if groups.ranks.rank == 0:
        try:
            mm_to_hf(temporary, hf_reference(run), target)
            logger.info("exported to %s", target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()


def hf_reference(run: RunConfig) -> Path:
    """The Hugging Face directory whose configuration, tokenizer and index an export takes over."""
    from checkpoint.load import recognise

    candidates = [run.checkpoint.load]
    if run.data is not None:
        candidates.append(run.data.dataset_param.preprocess_parameters.model_name_or_path)
    for candidate in candidates:
        if candidate and (Path(candidate) / "config.json").exists() and recognise(Path(candidate)) == "hf":
            return Path(candidate)
    raise ConfigError(
        "command line",
        "--save-hf needs a Hugging Face directory to take config.json, tokenizer and shard index from.\n"
        "Neither --load nor preprocess_parameters.model_name_or_path of --mm-data names one with weights.",
    )


if __name__ == "__main__":
    sys.exit(main())
