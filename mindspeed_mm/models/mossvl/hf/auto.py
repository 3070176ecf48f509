"""Registration with transformers' Auto classes."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig, MossVLTextConfig, MossVLVisionConfig
from mindspeed_mm.models.mossvl.hf.image_processing import MossVLImageProcessor, MossVLImageProcessorFast
from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration
from mindspeed_mm.models.mossvl.hf.processing import MossVLProcessor
from mindspeed_mm.models.mossvl.hf.video_processing import MossVLVideoProcessor


def register_auto_classes() -> None:
    """Make the Auto classes use this package for model type `moss_vl`; calling it again changes nothing.

    With these registered, a checkpoint's `auto_map` is not followed unless `trust_remote_code=True` is given.
    """
    for config_class in (MossVLConfig, MossVLTextConfig, MossVLVisionConfig):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
        auto_class.register(MossVLConfig, MossVLForConditionalGeneration, exist_ok=True)
    _register_image_processor()
    AutoProcessor.register(MossVLConfig, MossVLProcessor, exist_ok=True)
    _register_video_processor()


def _register_image_processor() -> None:
    """transformers 5 keeps one slot per backend and picks by what is installed; 4.57 keeps a slow and a fast one, the
    latter only for subclasses of its torchvision class."""
    slots: dict[str, Any] = {"slow_image_processor_class": MossVLImageProcessor}
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        slots["fast_image_processor_class"] = MossVLImageProcessorFast
    AutoImageProcessor.register(MossVLConfig, **slots, exist_ok=True)


def _register_video_processor() -> None:
    """Without torchvision transformers has no AutoVideoProcessor; `MossVLProcessor` does not need it."""
    try:
        from transformers import AutoVideoProcessor

        AutoVideoProcessor.register(MossVLConfig, MossVLVideoProcessor, exist_ok=True)
    except ImportError:
        return
