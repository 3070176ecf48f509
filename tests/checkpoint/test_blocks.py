"""Rectangles of tensors: small literals in, exact literals out."""

from __future__ import annotations

import pytest

from checkpoint.blocks import Block, Move, check_cover, match, row_blocks, whole
from checkpoint.rules.base import COLUMN, ROW, Concat


def test_runs_of_rows_lie_one_after_the_other_in_their_part() -> None:
    assert row_blocks([[(0, 2), (4, 1)], [(2, 2)]], 3) == (
        (Block(0, 0, 2, 3, 0, 0), Block(4, 0, 1, 3, 2, 0)),
        (Block(2, 0, 2, 3, 0, 0),),
    )


def test_a_whole_tensor_goes_to_column_slices() -> None:
    moves = match(whole(4, 6), ROW.layout(2).parts(4, 6))
    assert moves == (Move(0, 0, 0, 0, 0, 0, 4, 3), Move(0, 0, 3, 1, 0, 0, 4, 3))


def test_neighbouring_runs_become_one_move() -> None:
    moves = match(COLUMN.layout(4).parts(8, 5), COLUMN.layout(2).parts(8, 5))
    assert [(m.source, m.target, m.target_row, m.rows) for m in moves] == [
        (0, 0, 0, 2),
        (1, 0, 2, 2),
        (2, 1, 0, 2),
        (3, 1, 2, 2),
    ]
    assert match(Concat(2).parts(8, 5), Concat(2).parts(8, 5)) == (
        Move(0, 0, 0, 0, 0, 0, 4, 5),
        Move(1, 0, 0, 1, 0, 0, 4, 5),
    )


@pytest.mark.parametrize("runs", [[[(0, 2)], [(3, 1)]], [[(0, 3)], [(2, 1)]], [[(0, 4), (0, 1)]]])
def test_holes_and_overlaps_are_found(runs: list[list[tuple[int, int]]]) -> None:
    with pytest.raises(AssertionError):
        check_cover(row_blocks(runs, 2), 4, 2)
