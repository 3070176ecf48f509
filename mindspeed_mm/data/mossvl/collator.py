"""Samples to a batch: media opened, texts tokenized, everything padded.

Every sample goes through the processor on its own, so its resolution and its frames do not depend on the other samples
of the batch; the budgets of pixels and frames are those of a sample.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_mm.data.image import read_image
from mindspeed_mm.data.mossvl.dataset import RenderedSample
from mindspeed_mm.errors import DataError

logger = logging.getLogger(__name__)

Features = dict[str, Any]


class MossVLCollator:
    """Callable for a DataLoader.

    Args:
        processor: `MossVLProcessor` of the checkpoint.
        max_length: most tokens of a sample; longer ones lose text on the right, and are an error when they would lose
            media or everything that is learned. None: no limit.
        vision_chunked_length: passed on to the model.
        skip_bad: put an empty sample, which teaches nothing, in the place of one that cannot be used, and say so.
    """

    def __init__(
        self, processor: Any, *, max_length: int | None, vision_chunked_length: int, skip_bad: bool = False
    ) -> None:
        self._processor = processor
        self._max_length = max_length
        self._vision_chunked_length = vision_chunked_length
        self._skip_bad = skip_bad

    def __call__(self, samples: Sequence[RenderedSample]) -> Features:
        """The batch.

        Returns:
            input_ids, attention_mask, labels [b, s] int64, padded on the right; pixel_values [p, 3 * patch^2] float32;
            grid_thw [media, 3] int64; cross_attention_mask [b, 1, s, frames] bool, True masked;
            media_nums_per_sample, a list of b; vision_chunked_length, an int.
        Raises:
            DataError: a sample that cannot be used, named by file and number.
        """
        features = [self._usable_features(sample) for sample in samples]
        batch = pad_features(features, pad_token_id=self._processor.tokenizer.pad_token_id)
        return {**batch, "vision_chunked_length": self._vision_chunked_length}

    def _usable_features(self, sample: RenderedSample) -> Features:
        try:
            return self.features(sample)
        except DataError as error:
            if not self._skip_bad:
                raise
            logger.warning("skipped a sample: %s", error)
            return self._empty_features()

    def features(self, sample: RenderedSample) -> Features:
        """Model inputs of one sample, as a batch of one; DataError names the sample."""
        if sample.error is not None:
            raise DataError(sample.error)
        try:
            features = self._processor(
                images=[read_image(Path(path)) for path in sample.image_paths] or None,
                text=[sample.text],
                videos=list(sample.video_entries) or None,
                labels_spans=[sample.labels_spans],
                truncation=self._max_length is not None,
                max_length=self._max_length,
            )
        except DataError as error:
            raise DataError(f"{sample.name}: {error}") from None
        if not bool((features["labels"][:, 1:] != -100).any()):
            raise DataError(
                f"{sample.name}: the first {self._max_length} tokens hold nothing that is learned; raise max_length "
                "or shorten the conversation"
            )
        return dict(features)

    def _empty_features(self) -> Features:
        features = dict(self._processor(text=[self._processor.tokenizer.eos_token]))
        return {**features, "labels": torch.full_like(features["input_ids"], -100)}


def pad_features(samples: Sequence[Features], *, pad_token_id: int) -> Features:
    """One batch from batches of one: texts padded on the right, masks with True, media one after another."""
    length = max(sample["input_ids"].shape[1] for sample in samples)
    frames = max(sample["cross_attention_mask"].shape[3] for sample in samples)

    def padded(name: str, value: int) -> Tensor:
        rows = [sample[name] for sample in samples]
        return torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1]), value=value) for row in rows])

    masks = []
    for sample in samples:
        mask = sample["cross_attention_mask"]
        masks.append(torch.nn.functional.pad(mask, (0, frames - mask.shape[3], 0, length - mask.shape[2]), value=True))
    return {
        "input_ids": padded("input_ids", pad_token_id),
        "attention_mask": padded("attention_mask", 0),
        "labels": padded("labels", -100),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "grid_thw": torch.cat([sample["grid_thw"] for sample in samples]),
        "cross_attention_mask": torch.cat(masks),
        "media_nums_per_sample": [count for sample in samples for count in sample["media_nums_per_sample"]],
    }
