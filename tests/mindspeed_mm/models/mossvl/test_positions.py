"""XRoPE positions (test vector 8 of the format's description)."""

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.positions import rope_deltas, text_positions, vision_positions

IMAGE = 3


def positions(
    ids: list[list[int]], grids: list[tuple[int, int, int]], nums: list[int], mask: list[list[int]] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    layout = VisionLayout.build(grids, nums, merge_size=2)
    tokens = torch.tensor(ids)
    attention = None if mask is None else torch.tensor(mask)
    text = text_positions(tokens, attention, layout, image_token_id=IMAGE)
    return text, vision_positions(text, tokens, attention, layout, image_token_id=IMAGE)


def test_one_image() -> None:
    text, vision = positions([[10, 11, 3, 12, 13]], [(1, 4, 6)], [1])
    assert text.tolist() == [[0, 1, 5, 6, 7]]
    assert vision[:, 0].tolist() == [[2, 2, 2, 2, 2, 2, 5], [2, 2, 2, 3, 3, 3, 5], [2, 3, 4, 2, 3, 4, 5]]
    assert rope_deltas(text).tolist() == [3]


def test_an_image_and_a_video() -> None:
    text, vision = positions([[10, 3, 11, 7, 8, 3, 8, 3, 9, 12]], [(1, 4, 4), (2, 4, 8)], [2])
    assert text.tolist() == [[0, 3, 4, 5, 6, 11, 12, 17, 18, 19]]
    assert rope_deltas(text).tolist() == [10]
    assert vision[:, 0].tolist() == [
        [1, 1, 1, 1, 3] + [7] * 8 + [11] + [13] * 8 + [17],
        [1, 1, 2, 2, 3, 7, 7, 7, 7, 8, 8, 8, 8, 11, 13, 13, 13, 13, 14, 14, 14, 14, 17],
        [1, 2, 1, 2, 3, 7, 8, 9, 10, 7, 8, 9, 10, 11, 13, 14, 15, 16, 13, 14, 15, 16, 17],
    ]


def test_a_text_only_sample_shifts_nobody() -> None:
    with_image, text_only = [10, 3, 11, 12, 13], [20, 21, 22, 0, 0]
    masks = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    text, _ = positions([with_image, text_only], [(1, 4, 6), (1, 8, 8)], [1, 1], masks)
    assert text.tolist() == [[0, 4, 5, 6, 7], [0, 1, 2, 0, 0]]
    assert rope_deltas(text).tolist() == [3, -2]
    text, vision = positions([text_only, with_image], [(1, 8, 8), (1, 4, 6)], [1, 1], masks[::-1])
    assert text.tolist() == [[0, 1, 2, 0, 0], [0, 4, 5, 6, 7]]
    assert vision[:, 0].abs().sum() == 0
    assert vision[0, 1, :7].tolist() == [1, 1, 1, 1, 1, 1, 4]


def test_left_padding() -> None:
    text, vision = positions([[0, 0, 10, 3, 11]], [(1, 4, 4)], [1], [[0, 0, 1, 1, 1]])
    assert text.tolist() == [[0, 0, 0, 3, 4]]
    assert vision[:, 0].tolist() == [[1, 1, 1, 1, 3], [1, 1, 2, 2, 3], [1, 2, 1, 2, 3]]
    assert rope_deltas(text).tolist() == [0]


def test_a_frame_whose_token_is_missing_has_no_position() -> None:
    text, vision = positions([[10, 3]], [(2, 4, 4)], [1])
    assert text.tolist() == [[0, 3]]
    assert vision[0, 0].tolist() == [1, 1, 1, 1, 3, 0, 0, 0, 0, 0]


def test_more_image_tokens_than_frames_are_refused_except_in_generation() -> None:
    layout = VisionLayout.build([(1, 4, 4)], merge_size=2)
    tokens = torch.tensor([[3, 3]])
    with pytest.raises(DataError, match=r"\[2\] image tokens"):
        text_positions(tokens, None, layout, image_token_id=IMAGE)
    generated = text_positions(tokens, None, layout, image_token_id=IMAGE, is_generating=True)
    assert generated.tolist() == [[2, 3]]
    assert text_positions(tokens, None, None, image_token_id=IMAGE).tolist() == [[0, 1]]
