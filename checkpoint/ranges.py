"""Reading byte ranges of source files into memory, contiguous or strided."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

from checkpoint.transfer import Piece, Segment
from mindspeed_mm.errors import CheckpointError

MAX_SPAN_BYTES = 1 << 20
"""Most bytes that a strided read takes from a source at once, to keep some of them."""
STEP_BYTES = 1 << 20
"""Bytes of a contiguous range that are read at once where nothing else asks for a size."""
MAX_WASTE = 6
"""Runs are read one by one where reading over the gaps would read more than this many times as much."""

Stamp = tuple[int, int, int]


class Sources:
    """Open source files, shared by threads; remembers what they looked like when they were opened."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._stamps: dict[Path, Stamp] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Sources:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def stamp(self, paths: Iterable[Path]) -> None:
        """Remember what files look like now, before their headers are read."""
        self._stamps.update((path, file_stamp(path)) for path in paths)

    def read_into(self, path: Path, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes of a file from `offset` on.

        Raises:
            CheckpointError: the file cannot be read, or ends before the view is full.
        """
        descriptor = self._files.get(path) or self._open(path)
        done = 0
        try:
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], offset + done)
                if count == 0:
                    raise CheckpointError(f"{path} ends at byte {offset + done:,}; it was cut off while it was read.")
                done += count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error

    def check_unchanged(self) -> None:
        """Check that no source was written to since it was opened.

        Raises:
            CheckpointError: naming the first one that was.
        """
        for path, stamp in self._stamps.items():
            if file_stamp(path) != stamp:
                raise CheckpointError(f"{path} changed while it was read; run again when nothing writes to it.")

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
                self._stamps.setdefault(path, file_stamp(path))
            return self._files[path]


def file_stamp(path: Path) -> Stamp:
    """What changes when a file is written to or exchanged: inode, size, time of change in ns.

    Raises:
        CheckpointError: the file is not there any more.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def rows_per_read(segment: Segment) -> int:
    """How many rows of a strided segment to fill at once, so that no read is much larger than MAX_SPAN_BYTES."""
    widest = max(segment.row_bytes, max(piece.stride for piece in segment.pieces))
    return max(1, MAX_SPAN_BYTES // widest)


def fill_rows(sources: Sources, segment: Segment, first: int, view: memoryview, scratch: bytearray) -> None:
    """Fill `view` with whole rows of a strided segment.

    Args:
        first: number of the first row.
        view: rows * row_bytes bytes.
        scratch: room for what is read; it grows as needed and its content is lost.
    """
    rows = len(view) // segment.row_bytes
    target = np.frombuffer(view, np.uint8).reshape(rows, segment.row_bytes)
    for piece in segment.pieces:
        start = piece.offset + first * piece.stride
        if piece.stride > MAX_WASTE * piece.width:
            _fill_runs(sources, piece, start, target)
            continue
        step = max(1, MAX_SPAN_BYTES // piece.stride)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            span = (count - 1) * piece.stride + piece.width
            if len(scratch) < count * piece.stride:
                scratch.extend(bytes(count * piece.stride - len(scratch)))
            sources.read_into(piece.source, start + row * piece.stride, memoryview(scratch)[:span])
            block = np.frombuffer(scratch, np.uint8, count * piece.stride).reshape(count, piece.stride)
            target[row : row + count, piece.column : piece.column + piece.width] = block[:, : piece.width]
            del block


def _fill_runs(sources: Sources, piece: Piece, start: int, target: np.ndarray) -> None:
    for row in range(len(target)):
        run = target[row, piece.column : piece.column + piece.width]
        sources.read_into(piece.source, start + row * piece.stride, run.data)


def fill_segment(sources: Sources, segment: Segment, view: memoryview) -> None:
    """Fill `view` with a whole segment."""
    for start, part in read_segment(sources, segment):
        view[start : start + len(part)] = part


def read_segment(sources: Sources, segment: Segment) -> Iterator[tuple[int, memoryview]]:
    """The bytes of a segment piece by piece: (place in the segment, bytes); the bytes last until the next piece."""
    if segment.is_flat:
        step, unit = max(STEP_BYTES // segment.dtype.itemsize, 1), segment.dtype.itemsize
    else:
        step, unit = rows_per_read(segment), segment.row_bytes
    buffer, scratch = memoryview(bytearray(min(step * unit, segment.nbytes))), bytearray()
    for start in range(0, segment.nbytes, step * unit):
        part = buffer[: min(step * unit, segment.nbytes - start)]
        if segment.is_flat:
            sources.read_into(segment.pieces[0].source, segment.pieces[0].offset + start, part)
        else:
            fill_rows(sources, segment, start // segment.row_bytes, part, scratch)
        yield start, part
