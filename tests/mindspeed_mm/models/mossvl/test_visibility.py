"""Masks and visible prefixes (test vector 11)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.models.mossvl.layout import VisionLayout
from mindspeed_mm.models.mossvl.visibility import dense_mask, masked_frames, row_chunks, visible_lengths

IMAGE = 3


def test_a_token_sees_the_frames_up_to_itself() -> None:
    layout = VisionLayout.build([(1, 4, 4), (2, 2, 6)], merge_size=2)
    mask = masked_frames(torch.tensor([[10, 3, 11, 12, 3, 3, 13]]), None, layout, image_token_id=IMAGE)
    rows = ["".join(str(int(x)) for x in row) for row in mask[0, 0]]
    assert rows == ["111", "011", "011", "011", "001", "000", "000"]
    lengths = visible_lengths(mask, layout)
    assert lengths is not None
    assert lengths.tolist() == [[0, 5, 5, 5, 9, 13, 13]]


def test_padding_and_text_only_samples_see_nothing() -> None:
    layout = VisionLayout.build([(1, 4, 4), (1, 8, 8)], [1, 1], merge_size=2)
    ids, attention = torch.tensor([[10, 3, 11, 12], [10, 11, 2, 2]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = masked_frames(ids, attention, layout, image_token_id=IMAGE)
    assert mask[:, 0].int().tolist() == [[[1], [0], [0], [0]], [[1], [1], [1], [1]]]


def test_frames_become_tokens() -> None:
    layout = VisionLayout.build([(2, 4, 4)], merge_size=2)
    frames = torch.tensor([[True, True], [False, True], [False, False]])[None, None]
    expected = [[1] * 10, [0] * 5 + [1] * 5, [0] * 10]
    assert dense_mask(frames, layout)[0, 0].int().tolist() == expected
    wider = VisionLayout.build([(2, 4, 4)], merge_size=2, pad_multiple=4)
    assert dense_mask(frames, wider)[0, 0].int().tolist() == [[*row, 1, 1] for row in expected]


def test_a_mask_that_is_no_prefix_is_recognised() -> None:
    layout = VisionLayout.build([(2, 4, 4)], merge_size=2)
    assert visible_lengths(torch.tensor([[[[True, False]]]]), layout) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(1, 12))
def test_chunks_cover_every_row_once_and_tell_its_length(counts: list[int], min_rows: int) -> None:
    lengths = [5 * count for count in counts]
    chunks = row_chunks(lengths, min_rows)
    told: list[int] = []
    for chunk in chunks:
        assert chunk.start == len(told)
        told += chunk.lengths or [chunk.num_visible] * (chunk.stop - chunk.start)
        assert chunk.num_visible == max(lengths[chunk.start : chunk.stop])
        assert chunk.num_visible == 0 or 0 not in lengths[chunk.start : chunk.stop]
    assert told == lengths
    joined = [c for c in chunks if c.lengths is not None]
    assert all(c.stop - c.start <= 2 * min_rows for c in joined)
