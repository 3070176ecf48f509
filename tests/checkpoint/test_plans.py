"""Lists of the command line, in either form."""

from __future__ import annotations

import pytest

from checkpoint.plans import Cut, build_plan, nested
from mindspeed_mm.errors import ConfigError
from mindspeed_mm.plan import Tower


@pytest.mark.parametrize(
    ("lists", "pp_size", "expected"),
    [
        ([1, 2], None, ((1, 2),)),
        ([[1, 2]], None, ((1, 2),)),
        ([[1, 2], [3, 4]], None, ((1, 2), (3, 4))),
        ([1, 2, 3, 4], 2, ((1, 2), (3, 4))),
        ([1, 2, 3], 2, ((1, 2, 3),)),
    ],
)
def test_flat_and_nested_lists_are_read(lists: list, pp_size: int | None, expected: tuple) -> None:
    assert nested(lists, pp_size) == expected


def test_the_documented_layout_with_chunks_places_every_layer() -> None:
    """Peers lose 7 of 28 text layers here, the final norm and the head."""
    cut = Cut([[10, 10, 10, 2], [0] * 4, [0] * 4], [[0, 0, 0, 1], [4, 4, 4, 4], [4, 3, 2, 2]])
    plan = build_plan(cut, vision_layers=32, text_layers=28, is_tied=False)
    assert [plan.locate(Tower.TEXT, layer)[0].pp_rank for layer in (0, 1, 5, 27)] == [3, 0, 1, 3]
    assert sum(len(stage.text) for stage in plan.stages) == 28


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build_plan(Cut([3, 0], [1, 4]), vision_layers=4, text_layers=6, is_tied=True)
    assert "vit_pp_layers = [3, 0] adds up to 3" in str(caught.value)
    assert "llm_pp_layers = [1, 4] adds up to 5" in str(caught.value)
