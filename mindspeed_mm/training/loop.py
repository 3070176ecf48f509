"""The training loop: iterations on megatron's schedules, reports, evaluations, saves."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from mindspeed_mm.errors import InterruptedRunError, NumericError
from mindspeed_mm.plan.flops import SampleShape, training_flops
from mindspeed_mm.training.checkpoint import Trainee, TrainState, save_checkpoint
from mindspeed_mm.training.gradients import GradientFinalizer
from mindspeed_mm.training.messages import GradientMessages
from mindspeed_mm.training.metrics import IterationMetrics, Reporter
from mindspeed_mm.training.norms import parameters_norm
from mindspeed_mm.training.step import StepResult, forward_step, loss_kind, summarise
from mindspeed_mm.training.stop import StopRequests

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mindspeed_mm.config import RunConfig
    from mindspeed_mm.ops.batch import Batch
    from mindspeed_mm.plan import StagePlan
    from mindspeed_mm.platform.base import Platform
    from mindspeed_mm.platform.groups import Groups
    from mindspeed_mm.training.relay import BatchRelay

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Trainer:
    """One rank of a run, ready to train.

    `relay` hands out this rank's training batches, `validation` those of the validation set (None without one);
    one pass over that set is `validation_iters` global batches.
    """

    run: RunConfig
    plan: StagePlan
    groups: Groups
    platform: Platform
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    relay: BatchRelay
    validation: BatchRelay | None
    validation_iters: int
    reporter: Reporter | None
    state: TrainState
    messages: GradientMessages = field(init=False)

    def __post_init__(self) -> None:
        self.messages = GradientMessages(self.trainee.chunks, self.plan, self.run.model)

    @property
    def trainee(self) -> Trainee:
        """What saves write."""
        return Trainee([model.module for model in self.models], self.optimizer, self.scheduler, self.platform)

    # ---- the loop --------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run to `train_iters`, with saves and evaluations on their intervals and at the end.

        Raises:
            NumericError: the gradient norm is not finite (unless the check is switched off).
            InterruptedRunError: a signal asked for the end; the position was saved where there is a place for it.
        """
        training, checkpoint = self.run.training, self.run.checkpoint
        overlaps_gather = self.run.optimizer.overlap_param_gather
        connect_schedule(self.models, self.optimizer, self.groups.embedding, overlaps_gather=overlaps_gather)
        requests = StopRequests(self.platform.device, training.exit_duration_in_mins)
        with requests.listening() if training.exit_signal_handler else nullcontext():
            saved_at, reason = self._loop(requests)
        if checkpoint.save and saved_at != self.state.iteration:
            self.save()
        if reason is not None and reason.startswith("signal"):
            saved = f"saved to {checkpoint.save}" if checkpoint.save else "not saved: there is no --save"
            raise InterruptedRunError(f"stopped by {reason} after iteration {self.state.iteration}, {saved}.")
        if self.validation is not None and self.state.iteration % training.eval_interval != 0:
            self.evaluate(f"iteration {self.state.iteration} on validation set")

    def _loop(self, requests: StopRequests) -> tuple[int, str | None]:
        """Iterate until the end or a reason to stop; the iteration of the last save, and the reason."""
        training, checkpoint = self.run.training, self.run.checkpoint
        listens = training.exit_signal_handler or training.exit_duration_in_mins is not None
        iterators = self.relay.iterators()
        saved_at, reason = self.state.iteration, None
        # Full collections walk every autograd node; Megatron's multimodal entry point uses the same thresholds.
        gc.set_threshold(700, 10, 1000)
        while self.state.iteration < training.train_iters:
            self._iterate(iterators)
            if self.validation is not None and self.state.iteration % training.eval_interval == 0:
                self.evaluate(f"iteration {self.state.iteration}")
            if checkpoint.save and checkpoint.save_interval and self.state.iteration % checkpoint.save_interval == 0:
                self.save()
                saved_at = self.state.iteration
            if training.exit_interval and self.state.iteration % training.exit_interval == 0:
                reason = "--exit-interval"
            elif listens:
                reason = requests.agreed()
            if reason is not None:
                logger.info("exiting at iteration %d: %s", self.state.iteration, reason)
                break
        return saved_at, reason

    def save(self) -> None:
        """Write a training save at the present position."""
        assert self.run.checkpoint.save is not None
        save_checkpoint(Path(self.run.checkpoint.save), self.run, self.plan, self.groups, self.trainee, self.state)

    def _iterate(self, iterators: list[Iterator[Batch]]) -> None:
        started = time.perf_counter()
        # Of a group with no fields of its own: the schedule unscaled. A frozen stage may have no groups to read.
        learning_rate = float(self.scheduler.get_lr({}))
        self.relay.flush()
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        result = self._forward_backward(iterators)
        updated, grad_norm, num_zeros = self.optimizer.step()
        if self.run.training.check_for_nan_in_loss_and_grad and not math.isfinite(grad_norm or 0.0):
            raise NumericError(
                f"the gradient norm of iteration {self.state.iteration + 1} is {grad_norm}.\n"
                "  Nothing was saved after it. Look at the data of this iteration and at the learning rate;"
                " --no-check-for-nan-in-loss-and-grad goes on regardless."
            )
        global_batch = self.run.training.global_batch_size
        if updated:
            self.scheduler.step(increment=global_batch)
        self.state.iteration += 1
        self.state.consumed_samples += global_batch
        self.platform.synchronize()
        elapsed_s = time.perf_counter() - started
        params_norm = None
        if self.run.logging.log_params_norm and self.state.iteration % self.run.logging.log_interval == 0:
            params_norm = parameters_norm(self.trainee.chunks, self.groups, self.platform.device)
        if self.reporter is not None and result is not None:
            metrics = self._metrics(result, elapsed_s, learning_rate, grad_norm, num_zeros, updated)
            self.reporter.iteration(replace(metrics, params_norm=params_norm))

    def _metrics(
        self,
        result: StepResult,
        elapsed_s: float,
        learning_rate: float,
        grad_norm: float | None,
        num_zeros: int | None,
        updated: bool,
    ) -> IterationMetrics:
        training = self.run.training
        return IterationMetrics(
            iteration=self.state.iteration,
            train_iters=training.train_iters,
            consumed_samples=self.state.consumed_samples,
            elapsed_ms=elapsed_s * 1000,
            learning_rate=learning_rate,
            global_batch_size=training.global_batch_size,
            loss=result.loss,
            grad_norm=grad_norm or 0.0,
            tokens_per_sample=result.tokens_per_sample,
            tokens_per_second=result.tokens_per_sample * training.global_batch_size / elapsed_s,
            supervised_tokens=result.supervised_tokens,
            loss_scale=float(self.optimizer.get_loss_scale()),
            num_zeros=float(num_zeros or 0),
            skipped_iterations=0 if updated else 1,
            nan_iterations=0 if math.isfinite(result.loss) else 1,
            throughput_tflops=self._tflops(result, elapsed_s),
        )

    def _tflops(self, result: StepResult, elapsed_s: float) -> float:
        """Trillions of floating-point operations per second and process, of an average sample of this iteration."""
        tokens = max(round(result.tokens_per_sample), 1)
        samples = max(result.samples, 1)
        shape = SampleShape(
            tokens,
            min(round(result.image_tokens / samples), tokens),
            supervised_tokens=min(round(result.supervised_tokens / samples), tokens),
        )
        work = training_flops(self.run.model, shape)
        per_sample = (
            work.patch_embed
            + work.projector
            + work.lm_head
            + work.vision_layer * self.plan.vision_layers
            + work.text_layer * self.plan.text_layers
        )
        return per_sample * result.samples / elapsed_s / self.groups.ranks.world_size / 1e12

    def _forward_backward(
        self, iterators: list[Iterator[Batch]], *, forward_only: bool = False, num_micro_batches: int | None = None
    ) -> StepResult | None:
        training = self.run.training
        kind = loss_kind(training)
        interleaved = len(self.models) > 1
        num_micro_batches = num_micro_batches or training.num_micro_batches(self.groups.ranks.dp_size)
        measures = get_forward_backward_func()(
            forward_step_func=partial(forward_step, kind=kind),
            data_iterator=iterators if interleaved else iterators[0],
            model=self.models if interleaved else self.models[0],
            num_microbatches=num_micro_batches,
            # Both are ignored: shapes vary and are exchanged before every transfer.
            seq_length=training.seq_length,
            micro_batch_size=training.micro_batch_size,
            forward_only=forward_only,
            **({} if forward_only else self.messages.arguments(num_micro_batches)),
        )
        if not measures:
            return None
        return summarise(measures, kind, self.groups.dp_cp, self.platform.device)

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def evaluate(self, prefix: str) -> None:
        """Mean loss over the validation set, or over its first `eval_iters` global batches; the same every time."""
        assert self.validation is not None
        self.validation.restart()
        iterators = self.validation.iterators()
        total: StepResult | None = None
        with torch.no_grad():
            for model in self.models:
                model.eval()
            for _ in range(min(self.run.training.eval_iters, self.validation_iters)):
                result = self._forward_backward(iterators, forward_only=True)
                self.validation.flush()
                if result is not None:
                    total = result if total is None else total + result
            for model in self.models:
                model.train()
        if self.reporter is not None and total is not None:
            values = {"loss": total.evaluation_loss}
            if self.run.logging.log_tps:
                values["tokens per sample"] = total.tokens_per_sample
            self.reporter.validation(prefix, self.state.iteration, values)


def connect_schedule(
    models: list[DistributedDataParallel],
    optimizer: MegatronOptimizer | None,
    embedding_group: dist.ProcessGroup | None,
    *,
    overlaps_gather: bool = False,
) -> None:
    """Give megatron's schedules the functions that finish gradients and hold back their reduction."""
    config: Any = models[0].module.config
    config.finalize_model_grads_func = GradientFinalizer(embedding_group)
    config.grad_scale_func = None if optimizer is None else optimizer.scale_loss
    if models[0].ddp_config.overlap_grad_reduce:
        config.no_sync_func = _one_or_all([model.no_sync for model in models])
    if overlaps_gather:
        config.param_sync_func = _one_or_all([model.start_param_sync for model in models])


def _one_or_all(functions: list[Any]) -> Any:
    return functions[0] if len(functions) == 1 else functions
