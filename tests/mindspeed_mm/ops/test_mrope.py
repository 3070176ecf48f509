"""Positions equal transformers' and the literal vectors of the compatibility specification."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

from mindspeed_mm.errors import DataError
from mindspeed_mm.ops.mrope import mrope_position_ids, vision_cu_seqlens, vision_position_ids

START, END, IMAGE, VIDEO = 90, 91, 95, 96
MEDIA = (IMAGE, VIDEO)


@cache
def reference_model() -> Qwen2VLModel:
    text = {
        "vocab_size": 128,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 1}
    config = Qwen2VLConfig(
        text_config=text | {"num_key_value_heads": 1},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )
    with torch.device("meta"):
        return Qwen2VLModel(config)


def reference(ids: torch.Tensor, kinds: list[int], grids: torch.Tensor) -> torch.Tensor:
    of_kind = {kind: grids[[i for i, k in enumerate(kinds) if k == kind]] for kind in MEDIA}
    token_types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    positions, _ = reference_model().get_rope_index(ids[None], token_types[None], of_kind[IMAGE], of_kind[VIDEO])
    return positions[:, 0]


def sample(*parts: int | tuple[int, int, int, int]) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """Ids of text runs (a number of tokens) and vision blocks (kind, t, h, w), with the kinds and grids."""
    ids: list[int] = []
    media = [part for part in parts if isinstance(part, tuple)]
    for part in parts:
        if isinstance(part, int):
            ids += [7] * part
        else:
            kind, t, h, w = part
            ids += [START, *[kind] * (t * h * w // 4), END]
    grids = torch.tensor([part[1:] for part in media], dtype=torch.int64).reshape(-1, 3)
    return torch.tensor(ids), [part[0] for part in media], grids


@pytest.mark.parametrize(
    "parts",
    [
        (5, (IMAGE, 1, 4, 6), 3),
        ((IMAGE, 1, 2, 2),),
        (1, (IMAGE, 1, 8, 4), (IMAGE, 1, 2, 10), 2, (IMAGE, 1, 6, 6), 4),
        (5, (VIDEO, 2, 4, 6), 3),
        (2, (VIDEO, 2, 4, 4), 1, (IMAGE, 1, 4, 8), (VIDEO, 3, 6, 6), 1),
        (9,),
    ],
    ids=["image", "bare image", "several images", "video", "mixed", "text only"],
)
def test_positions_equal_transformers(parts: tuple[int | tuple[int, int, int, int], ...]) -> None:
    ids, kinds, grids = sample(*parts)
    ours = mrope_position_ids(ids, grids, media_token_ids=MEDIA, merge_size=2)
    torch.testing.assert_close(ours, reference(ids, kinds, grids), rtol=0, atol=0)


def test_positions_of_an_image_between_text_are_the_literal_ones() -> None:
    ids, _, grids = sample(1, (IMAGE, 1, 4, 6), 1)
    assert mrope_position_ids(ids, grids, media_token_ids=MEDIA, merge_size=2).tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_video_of_grid_2_4_6_after_five_tokens_starts_at_5_and_text_goes_on_at_8() -> None:
    ids = torch.tensor([7] * 5 + [VIDEO] * 12 + [7])
    positions = mrope_position_ids(ids, torch.tensor([[2, 4, 6]]), media_token_ids=MEDIA, merge_size=2)
    assert positions[:, 5].tolist() == [5, 5, 5]
    assert positions[:, 16].tolist() == [6, 6, 7]
    assert positions[:, 17].tolist() == [8, 8, 8]
    assert int(positions.max()) + 1 - ids.numel() == -9


def test_text_after_a_long_video_goes_on_after_its_last_frame() -> None:
    ids = torch.tensor([VIDEO] * 10 + [7])
    positions = mrope_position_ids(ids, torch.tensor([[10, 2, 2]]), media_token_ids=MEDIA, merge_size=2)
    assert positions[0].tolist() == list(range(11))
    assert positions[:, 10].tolist() == [10, 10, 10]


def test_positions_start_again_in_every_sample_of_a_row() -> None:
    samples = [sample(3, (IMAGE, 1, 4, 4), 2), sample(4), sample((VIDEO, 2, 4, 6), 1)]
    ids = torch.cat([s[0] for s in samples])
    grids = torch.cat([s[2] for s in samples])
    cu_seqlens = torch.tensor([0, *[s[0].numel() for s in samples]]).cumsum(0).to(torch.int32)
    packed = mrope_position_ids(ids, grids, media_token_ids=MEDIA, merge_size=2, cu_seqlens=cu_seqlens)
    alone = [mrope_position_ids(s[0], s[2], media_token_ids=MEDIA, merge_size=2) for s in samples]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=0)


block = st.tuples(
    st.sampled_from(MEDIA), st.just(1), st.integers(1, 4).map(lambda n: 2 * n), st.integers(1, 4).map(lambda n: 2 * n)
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 5), block), min_size=1, max_size=6))
def test_positions_equal_transformers_for_any_arrangement(parts: list[int | tuple[int, int, int, int]]) -> None:
    ids, kinds, grids = sample(*parts)
    ours = mrope_position_ids(ids, grids, media_token_ids=MEDIA, merge_size=2)
    torch.testing.assert_close(ours, reference(ids, kinds, grids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ids", "grids", "cu_seqlens", "text"),
    [
        ([7, IMAGE], [[1, 4, 4]], None, r"1 vision tokens in the row, but the grids \[\[1, 4, 4\]\] need 4"),
        ([IMAGE, IMAGE], [], None, "2 vision tokens"),
        ([IMAGE, 7, IMAGE, IMAGE, IMAGE], [[1, 4, 4]], None, "interrupted"),
        ([IMAGE] * 4, [[1, 4, 4]], [0, 2, 4], "spans two samples"),
        ([IMAGE], [[1, 3, 2]], None, "multiples of merge_size = 2"),
    ],
)
def test_rows_that_do_not_fit_their_grids_are_refused(
    ids: list[int], grids: list[list[int]], cu_seqlens: list[int] | None, text: str
) -> None:
    boundaries = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    grid_thw = torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)
    with pytest.raises(DataError, match=text):
        mrope_position_ids(torch.tensor(ids), grid_thw, media_token_ids=MEDIA, merge_size=2, cu_seqlens=boundaries)


def test_vision_positions_and_segments_equal_transformers() -> None:
    grids = torch.tensor([[1, 4, 6], [3, 2, 8], [1, 2, 2], [2, 10, 4]])
    torch.testing.assert_close(vision_position_ids(grids, 2), get_vision_position_ids(grids, 2), rtol=0, atol=0)
    torch.testing.assert_close(vision_cu_seqlens(grids), get_vision_cu_seqlens(grids), rtol=0, atol=0)


def test_vision_positions_visit_merge_blocks_first() -> None:
    rows = vision_position_ids(torch.tensor([[1, 2, 4]]), 2).tolist()
    assert rows == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert vision_cu_seqlens(torch.tensor([[1, 2, 4], [2, 2, 2]])).tolist() == [0, 8, 12, 16]
