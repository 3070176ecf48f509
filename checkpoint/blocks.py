"""Index arithmetic of moving weights: which rectangle of a whole tensor lies where in a stored one.

Every tensor is looked at as [rows, cols], with rows its dimension 0 and cols the product of the others (1 for vectors).
Rules describe a layout as blocks; slicing reads, tensor-parallel splits and byte ranges all follow from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Part = tuple["Block", ...]
"""The blocks of one stored tensor."""


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of the whole tensor, and its upper left corner in the stored one."""

    row: int
    col: int
    rows: int
    cols: int
    stored_row: int
    stored_col: int


@dataclass(frozen=True, slots=True)
class Move:
    """A rectangle that goes from one stored tensor to another."""

    source: int
    """Number of the source part."""
    source_row: int
    source_col: int
    target: int
    """Number of the target part."""
    target_row: int
    target_col: int
    rows: int
    cols: int


def whole(rows: int, cols: int) -> tuple[Part, ...]:
    """One stored tensor that is the whole tensor."""
    return ((Block(0, 0, rows, cols, 0, 0),),)


def row_blocks(runs: Sequence[Sequence[tuple[int, int]]], cols: int) -> tuple[Part, ...]:
    """Parts made of runs of whole rows.

    Args:
        runs: for every part, its (first row of the whole tensor, number of rows) in stored order.
    """
    parts = []
    for part in runs:
        blocks, position = [], 0
        for row, count in part:
            blocks.append(Block(row, 0, count, cols, position, 0))
            position += count
        parts.append(tuple(blocks))
    return tuple(parts)


def check_cover(parts: Sequence[Part], rows: int, cols: int) -> None:
    """Check that the blocks tile the whole tensor, and each stored tensor, exactly once.

    Raises:
        AssertionError: they overlap or leave a hole; a layout that does so is a programming error.
    """
    blocks = [block for part in parts for block in part]
    assert sum(block.rows * block.cols for block in blocks) == rows * cols, "blocks leave a hole or overlap"
    for first, second in _neighbours(blocks):
        assert first.row + first.rows <= second.row or first.col + first.cols <= second.col, "blocks overlap"


def _neighbours(blocks: list[Block]) -> list[tuple[Block, Block]]:
    ordered = sorted(blocks, key=lambda block: (block.row, block.col))
    return list(pairwise(ordered))


def match(sources: Sequence[Part], targets: Sequence[Part]) -> tuple[Move, ...]:
    """Every rectangle that has to move so that the targets hold what the sources hold.

    Returns:
        Moves ordered by target part, target row and target column; neighbours that continue each other are one.
    """
    ordered = sorted(
        ((block, number) for number, part in enumerate(sources) for block in part),
        key=lambda item: (item[0].row, item[0].col),
    )
    moves: list[Move] = []
    for number, part in enumerate(targets):
        for wanted in part:
            for block, source in ordered:
                if block.row >= wanted.row + wanted.rows:
                    break
                move = _overlap(source, block, number, wanted)
                if move is not None:
                    moves.append(move)
    moves.sort(key=lambda move: (move.target, move.target_row, move.target_col))
    return _joined(moves)


def _overlap(source: int, block: Block, target: int, wanted: Block) -> Move | None:
    top, bottom = max(block.row, wanted.row), min(block.row + block.rows, wanted.row + wanted.rows)
    left, right = max(block.col, wanted.col), min(block.col + block.cols, wanted.col + wanted.cols)
    if top >= bottom or left >= right:
        return None
    return Move(
        source,
        block.stored_row + top - block.row,
        block.stored_col + left - block.col,
        target,
        wanted.stored_row + top - wanted.row,
        wanted.stored_col + left - wanted.col,
        bottom - top,
        right - left,
    )


def _joined(moves: list[Move]) -> tuple[Move, ...]:
    joined: list[Move] = []
    for move in moves:
        last = joined[-1] if joined else None
        if (
            last is not None
            and (last.source, last.source_col, last.target, last.target_col, last.cols)
            == (move.source, move.source_col, move.target, move.target_col, move.cols)
            and last.source_row + last.rows == move.source_row
            and last.target_row + last.rows == move.target_row
        ):
            joined[-1] = Move(
                last.source,
                last.source_row,
                last.source_col,
                last.target,
                last.target_row,
                last.target_col,
                last.rows + move.rows,
                last.cols,
            )
        else:
            joined.append(move)
    return tuple(joined)
