"""Processor of MOSS-VL: conversations with pictures and clips to the inputs of the model."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mindspeed_mm.errors import ConfigError, DataError
from mindspeed_mm.models.mossvl.expansion import (
    IMAGE_PAD,
    NEEDED_TOKENS,
    VISION_END,
    VISION_START,
    Span,
    expand_text,
    media_order,
    supervised_labels,
)
from mindspeed_mm.models.mossvl.hf.image_processing import MossVLImageProcessor, MossVLImageProcessorFast, PictureInput
from mindspeed_mm.models.mossvl.hf.video_processing import MossVLVideoProcessor, VideoEntry
from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.visibility import masked_frames

BLANK_GRID = (1, 8, 8)
_PUBLISHED_CODE = "processing_moss_vl"


class MossVLProcessor(ProcessorMixin):
    """Image processor, tokenizer and video processor of a checkpoint.

    Args:
        chat_template: the checkpoint's template; it replaces the tokenizer's.
    Raises:
        ConfigError: the tokenizer splits a token that marks media or time.
    """

    # transformers 4 reads these lists
    attributes: ClassVar[list[str]] = ["image_processor", "tokenizer", "video_processor"]
    optional_attributes: ClassVar[list[str]] = ["chat_template"]

    def __init__(
        self,
        image_processor: MossVLImageProcessor | None = None,
        tokenizer: Any = None,
        video_processor: MossVLVideoProcessor | None = None,
        chat_template: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in NEEDED_TOKENS if token not in vocabulary]
        if missing:
            raise ConfigError(
                str(tokenizer.name_or_path or "tokenizer"),
                f"the tokenizer lacks {', '.join(missing)}; it would split them into pieces that mean nothing.",
            )
        self.image_token_id = vocabulary[IMAGE_PAD]
        self.vision_start_id, self.vision_end_id = vocabulary[VISION_START], vocabulary[VISION_END]
        # One template on both: training renders with the tokenizer's, inference with the processor's.
        if chat_template is None:
            self.chat_template = tokenizer.chat_template
        else:
            tokenizer.chat_template = chat_template

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """transformers' own check asks for classes that need torchvision."""
        expected: dict[str, type] = {
            "image_processor": MossVLImageProcessor,
            "video_processor": MossVLVideoProcessor,
        }
        if argument_name in expected and not isinstance(argument, expected[argument_name]):
            raise TypeError(f"{argument_name} is a {type(argument).__name__}, not a {expected[argument_name].__name__}")

    def __call__(
        self,
        images: Sequence[PictureInput] | PictureInput | None = None,
        text: str | Sequence[str] | None = None,
        videos: Sequence[VideoEntry] | None = None,
        labels_spans: Sequence[Sequence[Span]] | None = None,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs of a batch.

        Args:
            images: all pictures of the batch, in text order; videos: likewise.
            text: rendered conversations with `<|image|>` and `<|video|>` where media stand.
            labels_spans: supervised character ranges of each text; gives `labels`.
            padding, truncation, max_length: the tokenizer's.
            kwargs: `min_pixels` and `max_pixels` for the image processor.
        Returns:
            input_ids, attention_mask [b, s] int64; pixel_values [p, 3 * patch^2] float32 and grid_thw [media, 3] int64
            of the whole batch in text order; cross_attention_mask [b, 1, s, frames] bool, True masked;
            media_nums_per_sample, a list; labels [b, s] int64 when spans were given. A text without media comes with
            one blank picture that it does not see, so that every sample runs the same modules.
        Raises:
            DataError: no text, media that do not match the placeholders, unreadable media, or media tokens that
                truncation cut off.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts or not all(texts):
            raise DataError("text must hold at least one character for every sample")
        given: Any = [] if images is None else images if isinstance(images, list | tuple) else [images]
        orders = [media_order(sample) for sample in texts]
        pictures = self._pictures(list(given), sum(order.count("image") for order in orders), kwargs)
        clips, times = self._clips(videos or (), sum(order.count("video") for order in orders))
        media = _in_text_order(orders, pictures, clips, patch_width=3 * self.image_processor.patch_size**2)
        encoded, labels = self._tokenize(texts, orders, times, labels_spans, padding, truncation, max_length)
        data: dict[str, Any] = {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "pixel_values": torch.cat([patches for sample in media for patches, _ in sample]),
            "grid_thw": torch.tensor([grid for sample in media for _, grid in sample]),
            "media_nums_per_sample": [len(sample) for sample in media],
        }
        if labels is not None:
            data["labels"] = labels
        if return_tensors is not None:
            self._add_tensors(data, orders)
        return BatchFeature(data)

    def _pictures(self, images: list[PictureInput], needed: int, kwargs: dict[str, Any]) -> list[Any]:
        if len(images) != needed:
            raise DataError(f"the texts have {needed} image placeholders, but {len(images)} images were given")
        if not images:
            return []
        limits = {key: kwargs[key] for key in ("min_pixels", "max_pixels") if key in kwargs}
        return _split(self.image_processor(images, **limits), "pixel_values", "image_grid_thw")

    def _clips(self, videos: Sequence[VideoEntry], needed: int) -> tuple[list[Any], list[list[float]]]:
        if not videos and not needed:
            return [], []
        features = self.video_processor(videos) if videos else {"timestamps": []}
        times = features["timestamps"]
        if len(times) != needed:
            raise DataError(
                f"the texts have {needed} video placeholders, but the videos have {len(times)} units "
                "(clips or segments)"
            )
        return _split(features, "pixel_values_videos", "video_grid_thw"), times

    def _tokenize(
        self,
        texts: list[str],
        orders: list[list[Any]],
        times: list[list[float]],
        labels_spans: Sequence[Sequence[Span]] | None,
        padding: bool | str,
        truncation: bool,
        max_length: int | None,
    ) -> tuple[Any, list[list[int]] | None]:
        units = iter(times)
        spans = labels_spans if labels_spans is not None else [()] * len(texts)
        expanded = [
            expand_text(sample, [next(units) for kind in order if kind == "video"], sample_spans)
            for sample, order, sample_spans in zip(texts, orders, spans, strict=True)
        ]
        encoded = self.tokenizer(
            [sample.text for sample in expanded],
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=False,
            return_offsets_mapping=labels_spans is not None,
        )
        for number, (sample, ids) in enumerate(zip(expanded, encoded["input_ids"], strict=True)):
            needed, left = sample.text.count(IMAGE_PAD), list(ids).count(self.image_token_id)
            if left < needed:
                raise DataError(
                    f"sample {number} is longer than max_length = {max_length}: {needed - left} of its {needed} frames "
                    "would be cut off. Raise max_length, or use fewer frames."
                )
        if labels_spans is None:
            return encoded, None
        labels = [
            supervised_labels(
                ids,
                offsets,
                sample.spans,
                image_token_id=self.image_token_id,
                vision_start_id=self.vision_start_id,
                vision_end_id=self.vision_end_id,
            )
            for ids, offsets, sample in zip(encoded["input_ids"], encoded["offset_mapping"], expanded, strict=True)
        ]
        return encoded, labels

    def _add_tensors(self, data: dict[str, Any], orders: list[list[Any]]) -> None:
        if len({len(ids) for ids in data["input_ids"]}) > 1:
            raise DataError("samples of unequal length need padding=True")
        for name in ("input_ids", "attention_mask", "labels"):
            if name in data:
                data[name] = torch.tensor(data[name])
        layout = VisionLayout.build(
            data["grid_thw"].tolist(), data["media_nums_per_sample"], merge_size=self.image_processor.merge_size
        )
        data["cross_attention_mask"] = masked_frames(
            data["input_ids"], data["attention_mask"], layout, image_token_id=self.image_token_id
        )

    @property
    def model_input_names(self) -> list[str]:
        """Keys that `__call__` gives."""
        names = ["input_ids", "attention_mask", "pixel_values", "grid_thw", "cross_attention_mask"]
        return [*names, "media_nums_per_sample"]

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        """The three parts by our own classes: transformers' video registry does not exist without torchvision."""
        kwargs.pop("trust_remote_code", None)
        backend = kwargs.pop("video_backend", "pyav")
        path = pretrained_model_name_or_path
        image_processor = MossVLImageProcessorFast.from_pretrained(path, **kwargs)
        video_processor = MossVLVideoProcessor.from_pretrained(path, **kwargs)
        video_processor.video_backend = backend
        return [image_processor, AutoTokenizer.from_pretrained(path, **kwargs), video_processor]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> list[str]:
        """Write the files of the published checkpoints, which their own code and ours read.

        transformers 5 would write one `processor_config.json`, which the published code (transformers 4.57) cannot use.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        for part in (self.image_processor, self.video_processor):
            part.save_pretrained(directory)
        for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
            values = json.loads((directory / name).read_text(encoding="utf-8"))
            values["processor_class"] = type(self).__name__
            (directory / name).write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            template = json.dumps({"chat_template": self.chat_template}, indent=4)
            (directory / "chat_template.json").write_text(template + "\n", encoding="utf-8")
        return [str(directory)]


def _split(features: Any, pixels: str, grids: str) -> list[tuple[Tensor, tuple[int, int, int]]]:
    """One (patches, grid) per medium."""
    rows = [tuple(grid) for grid in features[grids].tolist()]
    return list(zip(features[pixels].split([t * h * w for t, h, w in rows]), rows, strict=True))


def _in_text_order(
    orders: list[list[Any]], pictures: list[Any], clips: list[Any], *, patch_width: int
) -> list[list[tuple[Tensor, tuple[int, int, int]]]]:
    """Media of each sample as its text names them; a blank picture where it names none."""
    sources = {"image": iter(pictures), "video": iter(clips)}
    blank = (torch.zeros(BLANK_GRID[0] * BLANK_GRID[1] * BLANK_GRID[2], patch_width), BLANK_GRID)
    return [[next(sources[kind]) for kind in order] or [blank] for order in orders]
