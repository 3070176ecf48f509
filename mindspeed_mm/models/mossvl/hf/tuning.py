"""Which parameters of MOSS-VL are trained: freezing by part, or LoRA on the projections of all text layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mindspeed_mm.errors import ConfigError, SetupError


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """Parts that are trained in full. The separator belongs to none of them and is always trained.

    Attributes:
        tune_vision: the vision tower with its merger.
        tune_language: the text tower with embeddings, cross-attention layers, gates and final norm.
        tune_lm_head: the head.
    """

    tune_vision: bool = False
    tune_language: bool = True
    tune_lm_head: bool = True


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters beside frozen weights; `alpha / r` scales what they add."""

    r: int = 64
    alpha: int = 128
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


def freeze_parts(model: nn.Module, settings: TuneSettings) -> None:
    """Set `requires_grad` of every parameter of a `MossVLForConditionalGeneration` (or the published class)."""
    parts = {
        "model.visual.": settings.tune_vision,
        "model.language_model.": settings.tune_language,
        "lm_head.": settings.tune_lm_head,
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(next((tuned for prefix, tuned in parts.items() if name.startswith(prefix)), True))


def add_lora(model: Any, settings: LoraSettings) -> Any:
    """The model wrapped by `peft`, everything but the adapters frozen.

    Raises:
        SetupError: peft is not installed.
        ConfigError: a target that names no linear layer of the model, or a rank below 1.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SetupError("LoRA needs peft: pip install peft") from None
    linears = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in settings.target_modules if target.rpartition(".")[2] not in linears]
    if unknown or not settings.target_modules or settings.r < 1:
        raise ConfigError(
            "LoRA",
            f"lora_target_modules = {','.join(settings.target_modules)!r} with r = {settings.r}: {unknown or 'no'} "
            f"targets; the linear layers are {sorted(linears)} and r must be at least 1.",
        )
    model.requires_grad_(False)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, is_trained in sizes if is_trained), sum(size for size, _ in sizes)
