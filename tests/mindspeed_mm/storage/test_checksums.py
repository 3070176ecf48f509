"""Checksums of pieces put together are those of the whole."""

from __future__ import annotations

import zlib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_mm.storage.checksums import RunningChecksums, combine_crc32, refresh_checksums
from mindspeed_mm.storage.tensors import Checksum


@given(st.binary(max_size=500), st.binary(max_size=500))
@settings(max_examples=200, deadline=None)
def test_two_checksums_give_that_of_both(first: bytes, second: bytes) -> None:
    assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 90), st.binary(min_size=600, max_size=600))
@settings(max_examples=200, deadline=None)
def test_fields_are_filled_in_whatever_the_pieces(sizes: list[int], step: int, noise: bytes) -> None:
    data, checksums, position = bytearray(noise), [], 0
    for size in sizes:
        checksums.append(Checksum(position, position + size, (position + size,)))
        position += size + 4
    end = position
    running = RunningChecksums(checksums)
    # As the writer does: a field is never cut in two.
    offset = 0
    while offset < end:
        stop = min(offset + step, end)
        for checksum in checksums:
            if checksum.fields[0] < stop < checksum.fields[0] + 4:
                stop = checksum.fields[0] + 4
        view = memoryview(data)[offset:stop]
        running.fill_in(running.parts(offset, view), offset, view)
        offset = stop
    for checksum in checksums:
        found = int.from_bytes(data[checksum.fields[0] : checksum.fields[0] + 4], "little")
        assert found == zlib.crc32(data[checksum.start : checksum.end])


def test_checksums_are_refreshed_in_place(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcdef" + bytes(8))
    refresh_checksums(tmp_path / "x", [Checksum(1, 5, (6, 10))])
    data = (tmp_path / "x").read_bytes()
    assert data[6:10] == data[10:14] == zlib.crc32(b"bcde").to_bytes(4, "little")
