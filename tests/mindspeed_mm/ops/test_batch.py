"""A batch survives its payload form."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.ops.batch import Batch


def small_batch() -> Batch:
    return Batch(
        input_ids=torch.tensor([5, 9, 6, 7, 8]),
        labels=torch.tensor([-100, 6, -100, 8, -100]),
        position_ids=torch.arange(15).reshape(3, 5),
        cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32),
        image_rows=torch.tensor([1]),
        grid_thw=torch.tensor([[1, 2, 2]]),
        pixel_values=torch.ones(4, 6),
    )


def test_payload_gives_the_batch_back_without_its_pixels() -> None:
    batch = small_batch()
    back = Batch.from_payload(batch.to_payload())
    assert back.pixel_values is None
    for field in fields(Batch)[:-1]:
        torch.testing.assert_close(getattr(back, field.name), getattr(batch, field.name), rtol=0, atol=0)


def test_payload_may_lie_in_a_larger_buffer_and_does_not_share_it() -> None:
    payload = torch.cat([small_batch().to_payload(), torch.full((9,), -1)])
    back = Batch.from_payload(payload, pixel_values=torch.zeros(4, 6))
    payload.fill_(3)
    assert back.input_ids.tolist() == [5, 9, 6, 7, 8]
    assert back.pixel_values is not None


def test_payload_that_is_no_payload_is_refused() -> None:
    good = small_batch().to_payload()
    for bad in (good[:-1], good[:3], torch.zeros(40, dtype=torch.int64), good[1:]):
        with pytest.raises(DataError, match="not a batch payload"):
            Batch.from_payload(bad)


def test_sizes_are_counted() -> None:
    batch = small_batch()
    assert (batch.num_tokens, batch.num_samples, batch.num_patches, batch.is_text_only) == (5, 2, 4, False)
    assert batch.without_pixels().pixel_values is None
    assert batch.to("cpu").pixel_values is not None
