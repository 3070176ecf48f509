"""Samples of a micro-batch become one row; small literal in, exact literal out."""

from __future__ import annotations

import pytest
import torch

from mindspeed_mm.data.collate import PreparedSample, Qwen2VLCollator, VisionShape, build_collator
from mindspeed_mm.errors import ConfigError

START, END, IMAGE, VIDEO = 90, 91, 95, 96
VISION = VisionShape(media_token_ids=(IMAGE, VIDEO), merge_size=2, patch_dim=6)


def sample(ids: list[int], labels: list[int], *grids: tuple[int, int, int]) -> PreparedSample:
    pixels = tuple(torch.full((t * h * w, 6), float(number + 1)) for number, (t, h, w) in enumerate(grids))
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    return PreparedSample("r", torch.tensor(ids), torch.tensor(labels), grid_thw, pixels)


def test_samples_lie_one_after_another() -> None:
    batch = Qwen2VLCollator(VISION)(
        [
            sample([5, START, IMAGE, IMAGE, END, 6], [-100, -100, -100, -100, 6, -100], (1, 2, 4)),
            sample([7, 8], [8, -100]),
            sample([START, IMAGE, END, IMAGE], [-100, -100, 3, -100], (1, 2, 2), (1, 2, 2)),
        ]
    )
    assert batch.input_ids.tolist() == [5, 90, 95, 95, 91, 6, 7, 8, 90, 95, 91, 95]
    assert batch.labels.tolist() == [-100, -100, -100, -100, 6, -100, 8, -100, -100, -100, 3, -100]
    assert batch.cu_seqlens.tolist() == [0, 6, 8, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.image_rows.tolist() == [2, 3, 9, 11]
    assert batch.grid_thw.tolist() == [[1, 2, 4], [1, 2, 2], [1, 2, 2]]
    assert batch.position_ids.tolist() == [
        [0, 1, 2, 2, 4, 5, 0, 1, 0, 1, 2, 3],
        [0, 1, 2, 2, 4, 5, 0, 1, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 3],
    ]
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0].tolist() == [1.0] * 8 + [1.0] * 4 + [2.0] * 4


def test_micro_batch_without_media_has_one_dummy_of_zeros() -> None:
    batch = Qwen2VLCollator(VISION)([sample([5, 6, 7], [6, 7, -100])])
    assert batch.grid_thw.tolist() == [[1, 2, 2]]
    assert batch.image_rows.tolist() == []
    assert batch.is_text_only
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (4, 6)
    assert not batch.pixel_values.any()
    assert batch.num_patches == 4


def test_filler_teaches_nothing() -> None:
    batch = Qwen2VLCollator(VISION).filler(7)
    assert batch.input_ids.tolist() == [7, 7]
    assert batch.labels.tolist() == [-100, -100]
    assert batch.is_text_only


def test_model_without_vision_tower_has_neither_grids_nor_pixels() -> None:
    batch = Qwen2VLCollator(None)([sample([5, 6], [6, -100]), sample([7], [-100])])
    assert batch.grid_thw.shape == (0, 3)
    assert batch.pixel_values is None
    assert batch.position_ids.tolist() == [[0, 1, 0]] * 3


def test_collator_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match='model_name = "qwen2vl_dpo" is not available here'):
        build_collator("qwen2vl_dpo", VISION)
