"""Assembles the data path from settings, and refuses what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mindspeed_mm.config.data import DataConfig
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.run import TrainingConfig
from mindspeed_mm.data.collate import Qwen2VLCollator, VisionShape, build_collator
from mindspeed_mm.data.features import LabelRule
from mindspeed_mm.data.image import ImageSettings
from mindspeed_mm.data.prepare import SamplePreparer
from mindspeed_mm.data.records import RecordSet
from mindspeed_mm.data.template import build_template
from mindspeed_mm.data.tokenizer import TextTokenizer
from mindspeed_mm.errors import ConfigError

WHERE = "data settings (--mm-data)"

Part = Literal["train", "valid"]


def check_data_config(data: DataConfig) -> None:
    """Refuse settings that ask for something which the data path does not do; ConfigError with all of them."""
    loader, basic, attr = data.dataloader_param, data.dataset_param.basic_parameters, data.dataset_param.attr
    tags = (attr.messages, attr.role_tag, attr.content_tag, attr.user_tag, attr.assistant_tag)
    refusals = (
        (not loader.drop_last, "dataloader_param.drop_last = false is not implemented; no sample is lost with true."),
        (
            loader.data_sharding,
            "dataloader_param.data_sharding = true is not implemented: all replicas share one order.",
        ),
        (basic.streaming, "basic_parameters.streaming = true is not implemented; records are read lazily without it."),
        (basic.packing or attr.packing, "packing = true is not implemented; micro-batches have no padding without it."),
        (attr.formatting != "sharegpt", f'attr.formatting = "{attr.formatting}" is not implemented; use "sharegpt".'),
        (attr.ranking, "attr.ranking = true belongs to preference training, which is another task."),
        (attr.pretrain, "attr.pretrain = true is not implemented."),
        (attr.tools is not None, f'attr.tools = "{attr.tools}" is not implemented.'),
        (None in tags, "attr.messages, role_tag, content_tag, user_tag and assistant_tag must not be null."),
        (basic.mask_history and basic.train_on_prompt, "mask_history and train_on_prompt exclude each other."),
    )
    problems = [problem for is_asked, problem in refusals if is_asked]
    if problems:
        raise ConfigError(WHERE, problems)


def open_records(data: DataConfig, *, part: Part, seed: int) -> RecordSet | None:
    """The records of one part of the data; None when no evaluation data are set.

    Raises:
        DataError: a record file cannot be indexed, or has too few records.
    """
    basic = data.dataset_param.basic_parameters
    if part == "valid" and basic.val_dataset_files:
        return RecordSet.open(basic.val_dataset_files, max_samples=basic.val_max_samples)
    if part == "valid" and not basic.val_rate:
        return None
    records = RecordSet.open(basic.dataset_files, max_samples=basic.max_samples)
    if not basic.val_rate:
        return records
    train, valid = records.split(basic.val_rate, seed=seed)
    if part == "train":
        return train
    return valid if basic.val_max_samples is None else valid.first(basic.val_max_samples)


def build_preparer(
    data: DataConfig, model: Qwen2VLConfig, training: TrainingConfig, records: RecordSet
) -> SamplePreparer:
    """What turns records into samples: tokenizer, template, labels and pictures as the checkpoint and the settings say.

    Raises:
        ConfigError: settings that are not implemented, or a checkpoint directory that does not fit the model.
    """
    check_data_config(data)
    preprocess, basic = data.dataset_param.preprocess_parameters, data.dataset_param.basic_parameters
    tokenizer = TextTokenizer.from_directory(preprocess)
    tokenizer.check_model(model, preprocess.model_name_or_path)
    images = None
    if model.image_encoder is not None:
        images = ImageSettings.from_directory(
            preprocess.model_name_or_path,
            image_min_pixels=preprocess.image_min_pixels,
            image_max_pixels=preprocess.image_max_pixels,
        )
        _check_patches(images, model, preprocess.model_name_or_path)
    return SamplePreparer(
        records=records,
        attr=data.dataset_param.attr,
        dataset_dir=Path(basic.dataset_dir),
        template=build_template(basic.template, tokenizer, merge_size=1 if images is None else images.merge_size),
        rule=LabelRule(training.seq_length, train_on_prompt=basic.train_on_prompt, mask_history=basic.mask_history),
        images=images,
    )


def _check_patches(images: ImageSettings, model: Qwen2VLConfig, where: str) -> None:
    assert model.image_encoder is not None
    tower = model.image_encoder.vision_encoder
    pairs = (
        ("patch_size", images.patch_size, tower.patch_size),
        ("temporal_patch_size", images.temporal_patch_size, tower.temporal_patch_size),
        ("merge_size", images.merge_size, tower.spatial_merge_size),
        ("channels", len(images.mean), tower.in_channels),
    )
    problems = [
        f"the image processor's {name} is {ours}, but the vision_encoder of the model says {theirs}."
        for name, ours, theirs in pairs
        if ours != theirs
    ]
    if problems:
        raise ConfigError(where, problems)


def build_collator_for(data: DataConfig, model: Qwen2VLConfig, preparer: SamplePreparer) -> Qwen2VLCollator:
    """The collator that the settings name, for the model's vision tower."""
    vision = None
    if model.image_encoder is not None:
        tower = model.image_encoder.vision_encoder
        vision = VisionShape(preparer.template.tokenizer.special.media, tower.spatial_merge_size, tower.patch_dim)
    return build_collator(data.dataloader_param.collate_param.model_name, vision)
