"""Carrying out a transfer: a few threads, one reused buffer each, hashes and finite-number checks on the way."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

from checkpoint.ranges import MAX_SPAN_BYTES, Sources, fill_rows, rows_per_read
from checkpoint.transfer import Segment, TargetFile
from mindspeed_mm.errors import NumericError
from mindspeed_mm.storage.checksums import RunningChecksums
from mindspeed_mm.storage.files import make_dir, open_new, write_errors
from mindspeed_mm.storage.manifest import FileRecord

SYNC_BYTES = 256 << 20
"""A file is made durable in steps of this size while it is still written, so that little is left to wait for."""
CHUNK_BYTES = 1 << 20
"""Size of a worker's buffer: small enough for the processor's cache, large enough that calls cost nothing."""

# Largest bit pattern of a finite number without its sign bit; patterns above are infinities and NaN.
_FINITE = {
    "bfloat16": ("u2", 0x7F7F),
    "float16": ("u2", 0x7BFF),
    "float32": ("u4", 0x7F7FFFFF),
    "float64": ("u8", 0x7FEFFFFFFFFFFFFF),
}


_UNOPENED, _CLOSED = -1, -2


class Progress(Protocol):
    """Is told how many bytes were written."""

    def add(self, nbytes: int) -> None:
        """`nbytes` more are in the target."""
        ...


@dataclass(frozen=True, slots=True)
class _Fill:
    """A part of a segment: bytes `first` to `first + nbytes` of it go to `position` of the chunk's buffer."""

    segment: Segment
    first: int
    nbytes: int
    position: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A contiguous range of a target file that one worker prepares and writes at once."""

    file: int
    number: int
    """Place within the file."""
    offset: int
    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    """(position in the buffer, bytes)."""
    fills: tuple[_Fill, ...]


def execute(
    files: Sequence[TargetFile],
    sources: Sources,
    root: Path,
    *,
    workers: int = 2,
    progress: Progress | None = None,
    allow_nan: bool = False,
) -> list[FileRecord]:
    """Write all files under `root`, durable when it returns.

    Args:
        files: their paths are below `root` and new.
        workers: threads; memory is a few MiB for each, whatever the size of the checkpoint.
        allow_nan: numbers that are not finite are copied like others.
    Returns:
        Size and hash of every file, in order.
    Raises:
        CheckpointError: a source ended early, could not be read, or changed meanwhile.
        SetupError, DiskFullError: a target could not be written.
        NumericError: weights hold NaN or infinity.
    """
    for file in files:
        make_dir(file.path.parent)
    run = _Run(files, sources, progress, check_finite=not allow_nan)
    try:
        run.carry_out(workers)
    finally:
        run.close()
    sources.check_unchanged()
    if run.not_finite:
        names = sorted(run.not_finite)
        listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise NumericError(
            f"weights hold NaN or infinity: {listed}. Use an earlier checkpoint, or allow them explicitly."
        )
    return [
        FileRecord(file.path.relative_to(root).as_posix(), file.nbytes, state.digest())
        for file, state in zip(files, run.states, strict=True)
    ]


class _FileState:
    """An open target, and its hash so far; chunks are hashed in their order."""

    def __init__(self, file: TargetFile) -> None:
        self.file = file
        self.hash = xxhash.xxh3_128()
        self.checksums = RunningChecksums(file.layout.checksums)
        self.turn = threading.Condition()
        self.writing = threading.Lock()
        self.next = 0
        self.written = 0
        self.dirty = 0
        self.descriptor = _UNOPENED

    def open(self) -> None:
        with self.turn:
            if self.descriptor == _UNOPENED:
                self.descriptor = open_new(self.file.path)

    def digest(self) -> str:
        return str(self.hash.hexdigest())


class _Run:
    def __init__(
        self, files: Sequence[TargetFile], sources: Sources, progress: Progress | None, *, check_finite: bool
    ) -> None:
        self.files = files
        self.states = [_FileState(file) for file in files]
        self.sources = sources
        self.progress = progress
        self.check_finite = check_finite
        self.not_finite: set[str] = set()
        self.failed = threading.Event()
        self._syncs: list[Future[None]] = []
        self._queue = _chunks(files)
        self._queue_lock = threading.Lock()

    def carry_out(self, workers: int) -> None:
        # One thread that syncs keeps the order: the call that closes a file comes after all others for it.
        with ThreadPoolExecutor(workers, "convert") as pool, ThreadPoolExecutor(1, "sync") as self._syncer:
            tasks = [pool.submit(self._work) for _ in range(workers)]
            try:
                done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
                for task in [*done, *tasks]:
                    task.result()
                for sync in self._syncs:
                    sync.result()
            except BaseException:
                self._fail()  # an interrupt reaches this thread only; the workers are told
                raise

    def close(self) -> None:
        for state in self.states:
            if state.descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(state.descriptor)

    def _work(self) -> None:
        buffer, scratch = bytearray(CHUNK_BYTES), bytearray(MAX_SPAN_BYTES)
        try:
            while not self.failed.is_set():
                with self._queue_lock:
                    chunk = next(self._queue, None)
                if chunk is None:
                    return
                if chunk.nbytes > len(buffer):
                    buffer = bytearray(chunk.nbytes)
                self._do(chunk, memoryview(buffer)[: chunk.nbytes], scratch)
        except BaseException:
            self._fail()
            raise

    def _fail(self) -> None:
        """Let every worker stop."""
        self.failed.set()
        for state in self.states:
            with state.turn:
                state.turn.notify_all()

    def _do(self, chunk: _Chunk, view: memoryview, scratch: bytearray) -> None:
        state = self.states[chunk.file]
        state.open()
        for position, data in chunk.literals:
            view[position : position + len(data)] = data
        for fill in chunk.fills:
            part = view[fill.position : fill.position + fill.nbytes]
            segment = fill.segment
            if segment.is_flat:
                self.sources.read_into(segment.pieces[0].source, segment.pieces[0].offset + fill.first, part)
            else:
                fill_rows(self.sources, segment, fill.first // segment.row_bytes, part, scratch)
        if self.check_finite:
            self._look_for_nan(chunk, view)
        parts = state.checksums.parts(chunk.offset, view)
        with state.turn:
            state.turn.wait_for(lambda: state.next == chunk.number or self.failed.is_set())
            if self.failed.is_set():
                return
            state.checksums.fill_in(parts, chunk.offset, view)
            state.hash.update(view)
            state.next += 1
            state.turn.notify_all()
        # The kernel writes to a file for one thread at a time and lets the others spin: they sleep here instead.
        with state.writing, write_errors(state.file.path):
            done = 0
            while done < len(view):
                done += os.pwrite(state.descriptor, view[done:], chunk.offset + done)
        if self.progress is not None:
            self.progress.add(chunk.nbytes)
        self._count(state, chunk)

    def _count(self, state: _FileState, chunk: _Chunk) -> None:
        """Note that a chunk is written; hand a file that is complete, or has much to sync, to the thread for that."""
        with state.turn:
            state.written += chunk.nbytes
            state.dirty += chunk.nbytes
            is_complete = state.written == state.file.nbytes
            if not is_complete and state.dirty < SYNC_BYTES:
                return
            state.dirty = 0
        self._syncs.append(self._syncer.submit(self._sync, state, close=is_complete))

    def _sync(self, state: _FileState, *, close: bool) -> None:
        with write_errors(state.file.path):
            os.fsync(state.descriptor)
            if close:
                descriptor, state.descriptor = state.descriptor, _CLOSED
                os.close(descriptor)

    def _look_for_nan(self, chunk: _Chunk, view: memoryview) -> None:
        start = end = 0
        current: Segment | None = None
        for fill in (*chunk.fills, None):
            if fill is not None and current is not None and fill.position == end and fill.segment.name == current.name:
                end += fill.nbytes
                continue
            if current is not None and not is_finite(view[start:end], current.dtype.name):
                self.not_finite.add(current.name)
            if fill is not None:
                start, end, current = fill.position, fill.position + fill.nbytes, fill.segment


def is_finite(view: memoryview, dtype: str) -> bool:
    """No number in the bytes is NaN or infinite; True for integer dtypes.

    Infinity and NaN are the largest bit patterns of their sign: two maxima tell without any temporary array.
    """
    if dtype not in _FINITE or not len(view):
        return True
    code, largest = _FINITE[dtype]
    unsigned = np.frombuffer(view, code)
    sign = 1 << (8 * unsigned.itemsize - 1)
    return int(unsigned.max()) <= largest | sign and int(unsigned.view("i" + code[1:]).max()) <= largest


def _chunks(files: Sequence[TargetFile]) -> Iterator[_Chunk]:
    """All files cut into chunks of at most CHUNK_BYTES (one row at least), file by file, in order."""
    for number, file in enumerate(files):
        builder = _ChunkBuilder(number)
        for _, item in file.items():
            if isinstance(item, Segment):
                yield from builder.add_segment(item)
            else:
                yield from builder.add_literal(item)
        yield from builder.flush()


class _ChunkBuilder:
    def __init__(self, file: int) -> None:
        self.file = file
        self.number = 0
        self.offset = 0
        self.nbytes = 0
        self.literals: list[tuple[int, bytes]] = []
        self.fills: list[_Fill] = []

    def add_literal(self, data: bytes) -> Iterator[_Chunk]:
        if self.nbytes + len(data) > CHUNK_BYTES:
            yield from self.flush()
        self.literals.append((self.nbytes, data))
        self.nbytes += len(data)

    def add_segment(self, segment: Segment) -> Iterator[_Chunk]:
        unit = segment.dtype.itemsize if segment.is_flat else segment.row_bytes
        most = segment.nbytes if segment.is_flat else rows_per_read(segment) * unit
        done = 0
        while done < segment.nbytes:
            room = (CHUNK_BYTES - self.nbytes) // unit * unit
            if room <= 0 and self.nbytes:
                yield from self.flush()
                continue
            count = min(max(room, unit), most, segment.nbytes - done)
            self.fills.append(_Fill(segment, done, count, self.nbytes))
            self.nbytes += count
            done += count

    def flush(self) -> Iterator[_Chunk]:
        if self.nbytes:
            yield _Chunk(self.file, self.number, self.offset, self.nbytes, tuple(self.literals), tuple(self.fills))
            self.number, self.offset, self.nbytes = self.number + 1, self.offset + self.nbytes, 0
            self.literals, self.fills = [], []
