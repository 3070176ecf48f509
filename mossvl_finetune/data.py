"""Data set and collator of a fine-tuning run; their code is in `mindspeed_mm.data.mossvl`."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.data.mossvl.collator import MossVLCollator
from mindspeed_mm.data.mossvl.dataset import MossVLDataset
from mossvl_finetune.arguments import DataArguments


def build_data(
    data: DataArguments, processor: Any, *, vision_chunked_length: int
) -> tuple[MossVLDataset, MossVLCollator]:
    """What the Trainer reads: records as rendered conversations, and the function that makes batches of them."""
    processor.tokenizer.padding_side = "right"
    dataset = MossVLDataset(data.data_path, processor.tokenizer, data_dir=data.data_dir, keep_bad=data.skip_bad_samples)
    collator = MossVLCollator(
        processor,
        max_length=data.max_length or None,
        vision_chunked_length=vision_chunked_length,
        skip_bad=data.skip_bad_samples,
    )
    return dataset, collator
