"""A conversion as byte ranges: which bytes of which source file make up every byte of every target file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

from checkpoint.blocks import Move, check_cover, match
from checkpoint.rules.base import Layout, as_rows
from checkpoint.stores.base import Placement
from mindspeed_mm.storage.tensors import Dtype, FileLayout, StoredTensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Equal runs of bytes at equal distances in a source file, and the column where they go."""

    source: Path
    offset: int
    stride: int
    """Bytes from one run to the next in the source."""
    width: int
    """Bytes of one run."""
    column: int
    """Bytes from the start of a target row."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A contiguous range of target bytes, as rows of equal length that pieces fill side by side."""

    offset: int
    """In the target file."""
    rows: int
    row_bytes: int
    pieces: tuple[Piece, ...]
    dtype: Dtype
    name: str
    """Canonical name of the tensor, for messages."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole segment."""
        return self.rows * self.row_bytes

    @property
    def is_flat(self) -> bool:
        """One contiguous range of one source."""
        return len(self.pieces) == 1 and self.pieces[0].stride == self.pieces[0].width == self.row_bytes


@dataclass(frozen=True, slots=True)
class TargetFile:
    """One file to be written."""

    path: Path
    layout: FileLayout
    segments: tuple[Segment, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.layout.nbytes

    def items(self) -> Iterator[tuple[int, bytes | Segment]]:
        """Literals and segments in the order of the file.

        Raises:
            AssertionError: they leave a hole or overlap; a plan that does so is a programming error.
        """
        both: list[tuple[int, bytes | Segment]] = [
            *self.layout.literals,
            *((segment.offset, segment) for segment in self.segments),
        ]
        both.sort(key=lambda item: item[0])
        end = 0
        for offset, item in both:
            assert offset == end, f"{self.path}: byte {end} is written {'twice' if offset < end else 'by nobody'}"
            end = offset + (item.nbytes if isinstance(item, Segment) else len(item))
            yield offset, item
        assert end == self.nbytes, f"{self.path}: {end} of {self.nbytes} bytes are written"


@lru_cache(maxsize=1024)
def moves_between(source: Layout, target: Layout, rows: int, cols: int) -> tuple[Move, ...]:
    """The moves from one layout of a tensor to another; both are checked to cover it exactly.

    Layers of one kind share the result, so a plan for many layers costs no more arithmetic than for one.
    """
    source_parts, target_parts = source.parts(rows, cols), target.parts(rows, cols)
    check_cover(source_parts, rows, cols)
    check_cover(target_parts, rows, cols)
    moves = match(source_parts, target_parts)
    assert sum(move.rows * move.cols for move in moves) == rows * cols, "moves do not cover the tensor"
    return moves


def segments_of(name: str, source: Placement, target: Placement) -> dict[int, list[Segment]]:
    """The segments that write every part of `target` from `source`, by number of the target part."""
    rows, cols = as_rows(source.shape)
    size = source.dtype.itemsize
    found: dict[int, list[Segment]] = {number: [] for number in range(len(target.tensors))}
    group: list[Move] = []
    for move in (*moves_between(source.layout, target.layout, rows, cols), None):
        if group and (move is None or (move.target, move.target_row) != (group[0].target, group[0].target_row)):
            first = group[0]
            tensor = target.tensors[first.target]
            found[first.target].append(_segment(name, group, source.tensors, tensor, size))
            group = []
        if move is not None:
            group.append(move)
    return found


def _segment(
    name: str, group: Sequence[Move], sources: Sequence[StoredTensor], target: StoredTensor, size: int
) -> Segment:
    """Moves that fill the same target rows side by side."""
    first = group[0]
    row_bytes = target.cols * size
    assert all(move.rows == first.rows for move in group), "moves of one row group differ in height"
    assert sum(move.cols for move in group) == target.cols, "moves do not fill whole target rows"
    pieces = []
    for move in group:
        tensor = sources[move.source]
        stride = tensor.cols * size
        offset = tensor.offset + move.source_row * stride + move.source_col * size
        pieces.append(Piece(tensor.path, offset, stride, move.cols * size, move.target_col * size))
    return Segment(
        target.offset + first.target_row * row_bytes, first.rows, row_bytes, tuple(pieces), target.dtype, name
    )


def compile_files(
    layouts: Mapping[Path, FileLayout],
    transfers: Iterable[tuple[str, Placement, Placement]],
) -> list[TargetFile]:
    """The files to write.

    Args:
        layouts: target path -> what of the file is no tensor.
        transfers: (name, source, target) of every copy of every tensor; the targets lie in those files.
    Returns:
        Files in the order of `layouts`, each checked to be written exactly once from its first to its last byte.
    """
    segments: dict[Path, list[Segment]] = {path: [] for path in layouts}
    for name, source, target in transfers:
        for number, part in segments_of(name, source, target).items():
            if prod(target.tensors[number].shape):
                segments[target.tensors[number].path].extend(part)
    files = []
    for path, layout in layouts.items():
        file = TargetFile(path, layout, tuple(sorted(segments[path], key=lambda segment: segment.offset)))
        for _ in file.items():
            pass
        files.append(file)
    return files
