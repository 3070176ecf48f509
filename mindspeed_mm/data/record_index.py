"""Where every record of a JSON array or a JSON-lines file starts, found by one streaming scan in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from mindspeed_mm.errors import DataError

Int64Array = npt.NDArray[np.int64]

MAX_RECORD_BYTES = 16 * 2**20
_CHUNK_BYTES = 4 * 2**20
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


@dataclass(frozen=True, slots=True)
class RecordIndex:
    """Byte offsets of the records of one file."""

    path: Path
    form: Literal["array", "lines"]
    offsets: Int64Array
    """[records + 1] int64: where each record starts, and where the last one ends. Between record i and offset i + 1
    there may only be white space and, in an array, a comma."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def name_of(self, record: int) -> str:
        """How errors and logs name a record."""
        return f"{self.path}[{record}]"


def build_index(path: str | Path) -> RecordIndex:
    """The index of a record file, which is a JSON array of objects or has one JSON object per line.

    The file is read once, 4 MiB at a time; memory is 8 bytes per record. Only the places of records are checked here; a
    record's own text is parsed when it is read.

    Raises:
        DataError: the file is missing, empty, neither form, cut short, or holds a record of more than 16 MiB.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            first, start = _first_byte(file, path)
            if first == b"[":
                index = RecordIndex(path, "array", _array_offsets(path, start, _chunks(file, start)))
            elif first == b"{":
                index = RecordIndex(path, "lines", _line_offsets(_chunks(file, start)))
            else:
                raise DataError(
                    f"{path} starts with {first!r}; a record file is a JSON array of objects ([{{...}}, ...]) or has "
                    "one JSON object per line, in UTF-8"
                )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    _check_record_sizes(index)
    return index


def _first_byte(file: BinaryIO, path: Path) -> tuple[bytes, int]:
    """The first byte that is neither a byte order mark nor white space, and its offset."""
    offset = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(offset)
    while chunk := file.read(_CHUNK_BYTES):
        text = chunk.lstrip(_SPACE)
        if text:
            return text[:1], offset + len(chunk) - len(text)
        offset += len(chunk)
    raise DataError(f"{path} is empty: it holds no records")


def _chunks(file: BinaryIO, start: int) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """Offset and bytes of consecutive parts of the file, in one buffer that each part overwrites."""
    file.seek(start)
    buffer = bytearray(_CHUNK_BYTES)
    view, array = memoryview(buffer), np.frombuffer(buffer, dtype=np.uint8)
    while size := file.readinto(view):  # type: ignore[attr-defined]
        yield start, array[:size]
        start += size


def _check_record_sizes(index: RecordIndex) -> None:
    sizes = np.diff(index.offsets)
    if len(sizes) and int(sizes.max()) > MAX_RECORD_BYTES:
        record = int(sizes.argmax())
        raise DataError(
            f"{index.name_of(record)} (byte {index.offsets[record]}) has {sizes[record]:,} bytes; a record has at most "
            f"{MAX_RECORD_BYTES:,}. Is a bracket, quote or line end missing?"
        )


def _line_offsets(chunks: Iterator[tuple[int, npt.NDArray[np.uint8]]]) -> Int64Array:
    """Offsets of the lines that start with an object, and of the end; other lines belong to the record before them."""
    parts: list[Int64Array] = []
    end = 0
    is_line_start = True
    for offset, data in chunks:
        starts = np.flatnonzero(data[:-1] == ord("\n")) + 1
        if is_line_start:
            starts = np.concatenate([[0], starts])
        is_line_start = bool(data[-1] == ord("\n"))
        parts.append(starts[data[starts] == ord("{")].astype(np.int64) + offset)
        end = offset + len(data)
    return np.append(np.concatenate(parts), end)


# ---------------------------------------------------------------------------------------------------------------------
# JSON arrays

_QUOTE, _BACKSLASH = ord('"'), ord("\\")
_WITHOUT_BIT_5 = np.uint8(0xDF)  # makes one byte of "[" and "{", and one of "]" and "}"
_STEP = np.zeros(256, dtype=np.int64)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


class _ArrayScanner:
    """State of the scan between two parts of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0
        self.is_inside_string = False
        self.odd_backslashes = False
        self.closed_at: int | None = None

    def scan(self, offset: int, data: npt.NDArray[np.uint8]) -> Int64Array:
        """Offsets at which records start in this part."""
        folded = data & _WITHOUT_BIT_5
        marks = np.flatnonzero((folded == ord("[")) | (folded == ord("]")) | (data == _QUOTE))
        kinds = data[marks]
        is_quote = kinds == _QUOTE
        is_quote &= ~self._escaped(data, marks)
        # How many strings have opened or closed before each mark: even means that the mark is outside of strings.
        quotes_before = np.cumsum(is_quote) - is_quote + self.is_inside_string
        is_bracket = (_STEP[kinds] != 0) & (quotes_before % 2 == 0)
        self.is_inside_string ^= bool(np.count_nonzero(is_quote) % 2)

        places, kinds = marks[is_bracket], kinds[is_bracket]
        steps = _STEP[kinds]
        depths = self.depth + np.cumsum(steps)
        if len(depths):
            self.depth = int(depths[-1])
            self._note_end(offset, places, depths)
        is_start = (depths == 2) & (steps == 1)
        is_odd = is_start & (kinds != ord("{"))
        if is_odd.any():
            raise DataError(
                f"{self.path}: a list stands at byte {offset + places[is_odd][0]} where a record (an object) must be"
            )
        return places[is_start].astype(np.int64) + offset

    def _note_end(self, offset: int, places: Int64Array, depths: Int64Array) -> None:
        closed = np.flatnonzero(depths <= 0)
        if self.closed_at is None and len(closed):
            self.closed_at = offset + int(places[closed[0]])
            closed = closed[1:]
        if self.closed_at is not None and offset + int(places[-1]) > self.closed_at:
            raise DataError(
                f"{self.path}: the array of records ends at byte {self.closed_at}, but the file goes on after it"
            )

    def _escaped(self, data: npt.NDArray[np.uint8], marks: Int64Array) -> npt.NDArray[np.bool_]:
        """Which marks follow an odd number of backslashes."""
        slashes = np.flatnonzero(data == _BACKSLASH)
        carried, self.odd_backslashes = self.odd_backslashes, False
        escaped = np.zeros(len(marks), dtype=bool)
        if carried and len(marks) and marks[0] == 0:
            escaped[0] = True
        if not len(slashes):
            return escaped
        firsts = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        lengths = np.diff(firsts, append=len(slashes))
        if carried and slashes[0] == 0:
            lengths[0] += 1
        after = slashes[firsts + np.diff(firsts, append=len(slashes)) - 1] + 1
        odd_ends = after[lengths % 2 == 1]
        self.odd_backslashes = bool(len(odd_ends)) and int(odd_ends[-1]) == len(data)
        where = np.searchsorted(marks, odd_ends)
        found = where < len(marks)
        found[found] = marks[where[found]] == odd_ends[found]
        escaped[where[found]] = True
        return escaped


def _array_offsets(path: Path, array_start: int, chunks: Iterator[tuple[int, npt.NDArray[np.uint8]]]) -> Int64Array:
    """Offsets of the objects of a top-level array, and of its closing bracket."""
    scanner = _ArrayScanner(path)
    parts = [scanner.scan(offset, data) for offset, data in chunks]
    offsets = np.concatenate(parts)
    if scanner.closed_at is None:
        last = f"record {len(offsets) - 1} at byte {offsets[-1]}" if len(offsets) else "its first record"
        raise DataError(
            f"{path} ends inside the array, in or after {last}: the file was cut short or a bracket is missing"
        )
    # Record 0 begins right after the bracket, so that anything odd before its object is seen when it is read.
    offsets[:1] = array_start + 1
    return np.append(offsets, scanner.closed_at)
