"""Settings: typed once, frozen, checked at the edge. Imports neither torch nor megatron."""

from mindspeed_mm.config.arguments import parse_command_line
from mindspeed_mm.config.base import Settings, load_settings, parse_settings, read_json
from mindspeed_mm.config.data import (
    Attributes,
    BasicParameters,
    CollateParameters,
    DataConfig,
    DataloaderParameters,
    DatasetParameters,
    PreprocessParameters,
)
from mindspeed_mm.config.qwen2vl import (
    ImageEncoderConfig,
    Qwen2VLConfig,
    TextDecoderConfig,
    VisionEncoderConfig,
    VisionProjectorConfig,
)
from mindspeed_mm.config.run import (
    CheckpointConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)
from mindspeed_mm.config.tool import ToolConfig

__all__ = [
    "Attributes",
    "BasicParameters",
    "CheckpointConfig",
    "CollateParameters",
    "DataConfig",
    "DataloaderParameters",
    "DatasetParameters",
    "ImageEncoderConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PreprocessParameters",
    "Qwen2VLConfig",
    "RunConfig",
    "RuntimeConfig",
    "Settings",
    "TextDecoderConfig",
    "ToolConfig",
    "TrainingConfig",
    "VisionEncoderConfig",
    "VisionProjectorConfig",
    "load_settings",
    "parse_command_line",
    "parse_settings",
    "read_json",
]
