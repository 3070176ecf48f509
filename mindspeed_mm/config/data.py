"""Data settings: what `--mm-data` (data.json) holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mindspeed_mm.config.base import Settings


class PreprocessParameters(Settings):
    """Tokenizer, processor and the sizes of media."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "image_resolution": "image_max_pixels says it",
        "video_resolution": "video_max_pixels says it",
        "image_do_pan_and_scan": "belongs to other models",
        "crop_to_patches": "belongs to other models",
        "use_audio_in_video": "belongs to other models",
        "audio_sampling_rate": "belongs to other models",
        "fix_mistral_regex": "belongs to other models",
    }

    model_name_or_path: str
    """Hugging Face directory with tokenizer, processor and config.json; never downloaded."""
    use_fast_tokenizer: bool = True
    """Use the Rust tokenizer."""
    split_special_tokens: bool = False
    """Read special tokens in texts as ordinary text."""
    image_max_pixels: int = Field(default=768 * 768, gt=0)
    """Larger pictures are scaled down to this many pixels first."""
    image_min_pixels: int = Field(default=32 * 32, ge=0)
    """Smaller pictures are scaled up to this many pixels first."""
    video_max_pixels: int = Field(default=256 * 256, gt=0)
    """Like image_max_pixels, per frame."""
    video_min_pixels: int = Field(default=16 * 16, ge=0)
    """Like image_min_pixels, per frame."""
    video_fps: float = Field(default=2.0, gt=0)
    """Frames sampled per second."""
    video_maxlen: int = Field(default=128, gt=0)
    """Most frames of one video."""
    trust_remote_code: bool = False
    """Allow tokenizer code from the directory."""

    @model_validator(mode="after")
    def _check(self) -> PreprocessParameters:
        problems = [
            f"{kind}_min_pixels = {low} is greater than {kind}_max_pixels = {high}."
            for kind, low, high in (
                ("image", self.image_min_pixels, self.image_max_pixels),
                ("video", self.video_min_pixels, self.video_max_pixels),
            )
            if low > high
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class BasicParameters(Settings):
    """Where the records are and how they become token sequences."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "tool_format": "tool calls have one format",
        "enable_thinking": "belongs to other models",
        "use_pmcc_data": "belongs to other models",
        "cache_dir": "data is read lazily, nothing is cached",
        "overwrite_cache": "data is read lazily, nothing is cached",
        "preprocessing_batch_size": "data is read lazily, there is no preprocessing pass",
        "preprocessing_num_workers": "data is read lazily, there is no preprocessing pass",
        "preprocess_on_fly": "always so",
    }
    refused_keys: ClassVar[Mapping[str, str]] = {"cutoff_len": "is deprecated; use `--seq-length` instead"}

    template: str = "qwen2vl"
    """Conversation template."""
    dataset_dir: str = "data"
    """Directory that relative media paths start at."""
    dataset: str
    """Record files, separated by commas; each relative to the working directory or absolute."""
    train_on_prompt: bool = False
    """Learn the prompts as well."""
    mask_history: bool = False
    """Learn only the last turn of every conversation."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first records."""
    streaming: bool = False
    """Read records in order without an index."""
    async_preprocess: bool = False
    """Prepare streamed records in a background thread."""
    val_dataset: str | None = None
    """Record files for evaluation, separated by commas."""
    val_max_samples: int | None = Field(default=None, gt=0)
    """Use only the first evaluation records."""
    val_rate: float | None = Field(default=None, ge=0, lt=1)
    """Part of the records set aside for evaluation when there is no val_dataset."""
    packing: bool | None = None
    """Put several short samples into one row of at most seq_length tokens."""
    neat_packing: bool = False
    """Packed samples do not attend to each other; always so here."""

    @model_validator(mode="after")
    def _check(self) -> BasicParameters:
        problems = [
            f'{name} = "{value}" has an empty entry between its commas.'
            for name, value in (("dataset", self.dataset), ("val_dataset", self.val_dataset))
            if value is not None and not all(part.strip() for part in value.split(","))
        ]
        if self.val_dataset is not None and self.val_rate:
            problems.append("val_dataset and val_rate exclude each other.")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def dataset_files(self) -> tuple[str, ...]:
        """The record files of `dataset`."""
        return tuple(part.strip() for part in self.dataset.split(","))

    @property
    def val_dataset_files(self) -> tuple[str, ...]:
        """The record files of `val_dataset`; empty without one."""
        return () if self.val_dataset is None else tuple(part.strip() for part in self.val_dataset.split(","))


class Attributes(Settings):
    """Which column and which tag means what in the records."""

    packing: bool = False
    """Records are already packed."""
    ranking: bool = False
    """Records hold a chosen and a rejected answer."""
    pretrain: bool = False
    """Records are plain text to continue."""
    formatting: Literal["sharegpt", "alpaca"] = "sharegpt"
    """Form of the records."""
    system: str | None = None
    """Column of the system prompt."""
    images: str | None = None
    """Column of the list of picture paths."""
    videos: str | None = None
    """Column of the list of video paths."""
    audios: None = None
    """Audio does not exist in this family."""
    messages: str | None = "conversations"
    """Column of the list of turns."""
    role_tag: str | None = "from"
    """Key of a turn that names its speaker."""
    content_tag: str | None = "value"
    """Key of a turn that holds its text."""
    user_tag: str | None = "human"
    """Speaker: user."""
    assistant_tag: str | None = "gpt"
    """Speaker: the model."""
    observation_tag: str | None = "observation"
    """Speaker: a tool's result."""
    function_tag: str | None = "function_call"
    """Speaker: the model calling a tool."""
    system_tag: str | None = "system"
    """Speaker: system prompt."""
    tools: str | None = None
    """Column of tool descriptions."""
    chosen: str | None = None
    """Column of the better answer."""
    rejected: str | None = None
    """Column of the worse answer."""
    prompt: str | None = "instruction"
    """Alpaca: column of the instruction."""
    query: str | None = "input"
    """Alpaca: column of the input."""
    response: str | None = "output"
    """Alpaca: column of the answer."""
    history: str | None = None
    """Alpaca: column of earlier turns."""


class DatasetParameters(Settings):
    """The records and how they are read."""

    dataset_type: Literal["huggingface"]
    """Kind of data set."""
    preprocess_parameters: PreprocessParameters
    """Tokenizer, processor and the sizes of media."""
    basic_parameters: BasicParameters
    """Where the records are and how they become token sequences."""
    attr: Attributes = Attributes()
    """Which column and which tag means what in the records."""


class CollateParameters(Settings):
    """How samples become a batch."""

    model_name: Literal["qwen2vl", "qwen2vl_dpo"]
    """Collator."""
    ignore_pad_token_for_loss: bool = True
    """Padding is never learned; without effect here, because batches have no padding."""


class DataloaderParameters(Settings):
    """Order, batches and loading."""

    ignored_keys: ClassVar[Mapping[str, str]] = {
        "priority_mode": "belongs to bucketing samplers",
    }
    refused_keys: ClassVar[Mapping[str, str]] = {
        "batch_size": "is not set in this file; use `--micro-batch-size`",
        "num_workers": "is not set in this file; use `--num-workers`",
        "seed": "is not set in this file; use `--seed`",
    }

    dataloader_mode: Literal["sampler", "base"] = "sampler"
    """Accepted values of existing files; both give the same loader."""
    drop_last: bool = True
    """Leave out the last, incomplete batch of an epoch."""
    sampler_type: Literal["BaseRandomBatchSampler", "stateful_distributed_sampler"] = "BaseRandomBatchSampler"
    """Order of the samples."""
    collate_param: CollateParameters
    """How samples become a batch."""
    pin_memory: bool = True
    """Use page-locked memory where there is an accelerator."""
    shuffle: bool = True
    """Draw samples in random order, from `--seed`."""
    data_sharding: bool = False
    """Each replica draws from its own part of the records."""
    prefetch_factor: int | None = Field(default=None, gt=0)
    """Batches loaded ahead per worker."""
    persistent_workers: bool | None = None
    """Keep workers between epochs; yes with workers when not given."""


class DataConfig(Settings):
    """The whole data file."""

    dataset_param: DatasetParameters
    """The records and how they are read."""
    dataloader_param: DataloaderParameters
    """Order, batches and loading."""
