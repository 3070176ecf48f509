"""MOSS-VL for transformers 4.57 and 5.x, from our own code: no remote code is needed or run.

`register_auto_classes()` makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM`, `AutoImageProcessor`, `AutoProcessor`
and, where transformers offers it, `AutoVideoProcessor` find these classes for a checkpoint of model type `moss_vl`.
"""

from __future__ import annotations

from mindspeed_mm.models.mossvl.hf.auto import register_auto_classes
from mindspeed_mm.models.mossvl.hf.configuration import MossVLConfig, MossVLTextConfig, MossVLVisionConfig
from mindspeed_mm.models.mossvl.hf.image_processing import MossVLImageProcessor, MossVLImageProcessorFast
from mindspeed_mm.models.mossvl.hf.modeling import MossVLForConditionalGeneration, MossVLModel
from mindspeed_mm.models.mossvl.hf.processing import MossVLProcessor
from mindspeed_mm.models.mossvl.hf.video_processing import MossVLVideoProcessor

__all__ = [
    "MossVLConfig",
    "MossVLForConditionalGeneration",
    "MossVLImageProcessor",
    "MossVLImageProcessorFast",
    "MossVLModel",
    "MossVLProcessor",
    "MossVLTextConfig",
    "MossVLVideoProcessor",
    "MossVLVisionConfig",
    "register_auto_classes",
]
