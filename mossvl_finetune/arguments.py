"""Arguments of `mossvl_finetune/train.py`: names and defaults as documented, then transformers' own."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from mindspeed_mm.errors import ConfigError


@dataclass
class ModelArguments:
    """The checkpoint and the parts of it that are trained."""

    model_name_or_path: str = field(metadata={"help": "checkpoint directory or hub name"})
    tune_vision: bool = field(default=False, metadata={"help": "train the vision tower and its merger"})
    tune_language: bool = field(default=True, metadata={"help": "train the text tower with its cross-attention layers"})
    tune_lm_head: bool = field(default=True, metadata={"help": "train the head"})
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager or flash_attention_2; default: flash_attention_2 where it can run, else sdpa"},
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "run the Python files of a local checkpoint directory instead of this package's classes"},
    )


@dataclass
class DataArguments:
    """The records and how they are read."""

    data_path: str = field(metadata={"help": "JSON list of records"})
    data_dir: str | None = field(
        default=None, metadata={"help": "what relative media paths are joined to; default: the folder of data_path"}
    )
    max_length: int = field(default=4096, metadata={"help": "most tokens of a sample; 0: no limit"})
    video_backend: str = field(default="pyav", metadata={"help": "pyav or decord"})
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "warn of a sample that cannot be used and go on, instead of stopping"}
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' TrainingArguments and what MOSS-VL adds."""

    cache_dir: str | None = field(default=None, metadata={"help": "where hub files are kept"})
    optim: str = field(default="adamw_torch", metadata={"help": "optimizer of transformers' Trainer"})
    vision_chunked_length: int = field(
        default=64, metadata={"help": "media that the vision tower sees at a time; bounds memory, never the result"}
    )
    lora_enable: bool = field(default=False, metadata={"help": "train low-rank adapters instead of the weights"})
    lora_r: int = field(default=64, metadata={"help": "rank of the adapters"})
    lora_alpha: int = field(default=128, metadata={"help": "scale of the adapters, divided by the rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout in front of the adapters"})
    lora_target_modules: str = field(
        default="q_proj,k_proj,v_proj,o_proj", metadata={"help": "linear layers that get adapters, by comma"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # The data set gives samples, not columns of tensors; the collator needs all of it.
        self.remove_unused_columns = False


def parse_arguments(argv: list[str] | None = None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """The three groups of a command line.

    Raises:
        SystemExit: argparse's 2 for arguments that are missing or malformed.
        ConfigError: arguments that are unknown or that this training cannot follow.
    """
    groups = transformers.HfArgumentParser([ModelArguments, DataArguments, TrainingArguments])  # type: ignore[list-item]
    try:
        model, data, training = groups.parse_args_into_dataclasses(args=argv)
    except ValueError as error:
        raise ConfigError("command line", str(error)) from None
    problems = []
    if not training.output_dir:
        problems.append("output_dir is missing: it says where the trained checkpoint goes.")
    if training.label_smoothing_factor:
        problems.append(
            f"label_smoothing_factor = {training.label_smoothing_factor} needs logits of all tokens; MOSS-VL computes "
            "those of supervised tokens only. Set it to 0."
        )
    if getattr(training.accelerator_config, "dispatch_batches", None):
        problems.append("accelerator_config.dispatch_batches = true would cut media_nums_per_sample; set it to false.")
    if data.max_length < 0:
        problems.append(f"max_length = {data.max_length} must be positive, or 0 for no limit.")
    if problems:
        raise ConfigError("command line", problems)
    return model, data, training
