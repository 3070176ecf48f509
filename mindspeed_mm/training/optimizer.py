"""Megatron's optimizer and learning-rate schedule from the settings of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from packaging.version import Version
from torch import nn

from mindspeed_mm.errors import ConfigError
from mindspeed_mm.models.common.transformer import DTYPES
from mindspeed_mm.platform.patches import megatron_version

if TYPE_CHECKING:
    from mindspeed_mm.config import OptimizerConfig, TrainingConfig


def build_optimizer(
    settings: OptimizerConfig,
    training: TrainingConfig,
    chunks: Sequence[nn.Module],
    *,
    log_num_zeros: bool = False,
) -> MegatronOptimizer:
    """Megatron's optimizer over DDP-wrapped chunks.

    Weight decay applies to every parameter, biases and norms included, except those whose name contains one of
    `weight_decay_exclude_modules`; names with one of `lr_scale_modules` learn at `lr * lr_mult`.
    """
    knows_overlap = any(field.name == "overlap_param_gather" for field in fields(MegatronOptimizerConfig))
    config = MegatronOptimizerConfig(
        optimizer=settings.optimizer,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        bf16=training.params_dtype == "bf16",
        fp16=training.params_dtype == "fp16",
        params_dtype=DTYPES[training.params_dtype],
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        sgd_momentum=settings.sgd_momentum,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        # Since 0.15 the optimizer settings repeat what the DDP settings say.
        **({"overlap_param_gather": settings.overlap_param_gather} if knows_overlap else {}),
        clip_grad=settings.clip_grad,
        log_num_zeros_in_grad=log_num_zeros,
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
    )
    no_decay = _name_test(settings.weight_decay_exclude_modules)
    scaled = _name_test(settings.lr_scale_modules)
    return get_megatron_optimizer(config, list(chunks), **_group_arguments(settings, no_decay, scaled))


def _name_test(fragments: Sequence[str]) -> Callable[[str], bool]:
    wanted = tuple(fragment.lower() for fragment in fragments)
    return lambda name: any(fragment in name.lower() for fragment in wanted)


def _group_arguments(
    settings: OptimizerConfig, no_decay: Callable[[str], bool], scaled: Callable[[str], bool]
) -> dict[str, Any]:
    """Parameter groups in the form that the installed megatron-core takes (predicates before 0.15, overrides since)."""
    if "no_weight_decay_cond" in inspect.signature(get_megatron_optimizer).parameters:
        return {
            "no_weight_decay_cond": lambda name, _: no_decay(name),
            "scale_lr_cond": lambda name, _: scaled(name),
            "lr_mult": settings.lr_mult,
        }
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    def key(name: str, test: Callable[[str], bool]) -> ParamKey:
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(name=name, fn=lambda _, parameter_name: test(parameter_name))
        )

    overrides: dict[ParamKey, dict[str, float]] = {}
    if settings.weight_decay_exclude_modules:
        overrides[key("weight_decay_exclude_modules", no_decay)] = {"wd_mult": 0.0}
    if settings.lr_scale_modules and settings.lr is not None:
        overrides[key("lr_scale_modules", scaled)] = {
            "max_lr": settings.lr * settings.lr_mult,
            "min_lr": settings.min_lr * settings.lr_mult,
        }
    return {"config_overrides": overrides}


def build_scheduler(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, training: TrainingConfig
) -> OptimizerParamScheduler:
    """The schedule of learning rate and weight decay; it counts samples, so another global batch keeps its shape.

    Raises:
        ConfigError: the installed megatron-core does not know the decay style.
    """
    if settings.lr_decay_style == "WSD" and settings.lr_wsd_decay_style == "minus_sqrt":
        installed = megatron_version()
        if Version(installed) < Version("0.13"):
            # It would go unnoticed until the decay begins, and end the run there.
            raise ConfigError(
                "command line",
                f"megatron-core {installed} does not know --lr-wsd-decay-style minus_sqrt; choose another style.",
            )
    batch = training.global_batch_size
    decay = (settings.lr_decay_iters or training.train_iters) * batch
    if settings.lr_warmup_fraction is not None:
        warmup = settings.lr_warmup_fraction * decay
    else:
        warmup = settings.lr_warmup_iters * batch
    wsd = settings.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr_warmup_init,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay if settings.start_weight_decay is None else settings.start_weight_decay,
        end_wd=settings.weight_decay if settings.end_weight_decay is None else settings.end_weight_decay,
        wd_incr_steps=training.train_iters * batch,
        wd_incr_style=settings.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
        wsd_decay_steps=None if wsd is None else wsd * batch,
        lr_wsd_decay_style=settings.lr_wsd_decay_style,
    )
