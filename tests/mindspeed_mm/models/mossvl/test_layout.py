"""Frames, packing and separators."""

import pytest
import torch

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.layout import Frame, VisionLayout, pack_states


@pytest.mark.parametrize(
    ("grids", "length", "padded_to_8"),
    [
        ([(1, 68, 120)], 2041, 2048),
        ([(10, 44, 80)], 8810, 8816),
        ([(1, 8, 8)], 17, 24),
        ([(256, 40, 72)], 184576, 184576),
        ([(1, 6, 8), (3, 16, 20)], 256, 256),
    ],
)
def test_lengths_of_the_vision_sequence(grids: list[tuple[int, int, int]], length: int, padded_to_8: int) -> None:
    assert VisionLayout.build(grids, merge_size=2).lengths == [length]
    assert VisionLayout.build(grids, merge_size=2, pad_multiple=1).padded_length == length
    assert VisionLayout.build(grids, merge_size=2, pad_multiple=8).padded_length == padded_to_8


def test_a_batch_keeps_the_frames_of_each_sample() -> None:
    layout = VisionLayout.build([(1, 4, 6), (2, 4, 4), (1, 8, 8)], [2, 1], merge_size=2)
    assert layout.frames == ((Frame(2, 3), Frame(2, 2), Frame(2, 2)), (Frame(4, 4),))
    assert layout.lengths == [17, 17]
    assert layout.num_frames == 3
    assert layout.extents().tolist() == [[3, 2, 2], [4, 0, 0]]
    assert layout.boundaries().tolist() == [[0, 7, 12, 17], [0, 17, 17, 17]]


def test_every_frame_ends_with_the_separator_and_padding_is_zero() -> None:
    layout = VisionLayout.build([(1, 2, 4), (2, 2, 2), (1, 2, 2)], [2, 1], merge_size=2, pad_multiple=4)
    merged = torch.arange(1.0, 6.0)[:, None].expand(5, 3)
    states = pack_states(merged, torch.full((3,), -1.0), layout)
    assert states[..., 0].tolist() == [[1, 2, -1, 3, -1, 4, -1, 0], [5, -1, 0, 0, 0, 0, 0, 0]]


def test_gradients_reach_tokens_and_separator() -> None:
    layout = VisionLayout.build([(2, 2, 2)], merge_size=2, pad_multiple=8)
    merged, separator = torch.zeros(2, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    pack_states(merged, separator, layout).sum().backward()
    assert merged.grad is not None
    assert separator.grad is not None
    assert merged.grad.unique().tolist() == [1.0]
    assert separator.grad.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("grids", "nums", "text"),
    [
        ([(1, 4, 4)], [2], "adds up to 2"),
        ([(1, 3, 4)], None, "multiples of 2"),
        ([(0, 4, 4)], None, "positive"),
    ],
)
def test_layouts_that_cannot_be_are_refused(grids: list[tuple[int, int, int]], nums: list[int], text: str) -> None:
    with pytest.raises(DataError, match=text):
        VisionLayout.build(grids, nums, merge_size=2)


def test_states_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="3 tokens"):
        pack_states(torch.zeros(3, 2), torch.zeros(2), VisionLayout.build([(1, 4, 4)], merge_size=2))
