"""CRC-32 of the records of a zip container whose pieces are computed apart. Source of the arithmetic: zlib."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.tensors import Checksum

try:
    # The same numbers, about six times as fast as the standard library's: with it a checksum costs nothing.
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

_POLYNOMIAL = 0xEDB88320
_STEP_BYTES = 1 << 20


def combine_crc32(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two byte strings one after the other, from the CRC-32 of each."""
    return _multiply(_power(second_nbytes), first) ^ second


@lru_cache(maxsize=65536)
def _power(nbytes: int) -> int:
    """x to the power of 8 * nbytes, modulo the CRC's polynomial."""
    result, square, exponent = 1 << 31, 1 << 23, nbytes  # 1 and x^8, bits reversed
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's polynomial; bits reversed."""
    product, mask = 0, 1 << 31
    while mask:
        if a & mask:
            product ^= b
            if not a & (mask - 1):
                break
        mask >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


class RunningChecksums:
    """The checksums of a file that is written in pieces, in order.

    Args:
        checksums: ascending and apart; each has its fields behind its range.
    """

    def __init__(self, checksums: Sequence[Checksum]) -> None:
        self._checksums = checksums
        self._starts = [checksum.start for checksum in checksums]
        self._values = [0] * len(checksums)
        self._fields = sorted((field, number) for number, checksum in enumerate(checksums) for field in checksum.fields)

    def parts(self, offset: int, view: memoryview) -> list[tuple[int, int, int]]:
        """(number of the range, CRC-32, bytes) of every range's share of a piece; may be called in any order."""
        end = offset + len(view)
        number = max(bisect_right(self._starts, offset) - 1, 0)
        found = []
        while number < len(self._checksums) and self._starts[number] < end:
            checksum = self._checksums[number]
            start, stop = max(checksum.start, offset), min(checksum.end, end)
            if start < stop:
                found.append((number, crc32(view[start - offset : stop - offset]), stop - start))
            number += 1
        return found

    def fill_in(self, parts: Sequence[tuple[int, int, int]], offset: int, view: memoryview) -> None:
        """Add the shares of a piece, and write the fields that lie in it; the pieces come in the order of the file."""
        for number, value, nbytes in parts:
            self._values[number] = combine_crc32(self._values[number], value, nbytes)
        end = offset + len(view)
        for field, number in self._fields[bisect_left(self._fields, (offset, 0)) :]:
            if field >= end:
                break
            view[field - offset : field - offset + 4] = self._values[number].to_bytes(4, "little")


def refresh_checksums(path: Path, checksums: Sequence[Checksum]) -> None:
    """Compute the checksums of a file anew, after its ranges were changed in place."""
    buffer = memoryview(bytearray(_STEP_BYTES))
    with path.open("r+b", buffering=0) as file:
        for checksum in checksums:
            value = 0
            file.seek(checksum.start)
            left = checksum.end - checksum.start
            while left:
                count = file.readinto(buffer[: min(left, _STEP_BYTES)]) or 0
                if not count:
                    raise CheckpointError(f"{path} is shorter than it was planned.")
                value, left = crc32(buffer[:count], value), left - count
            for field in checksum.fields:
                file.seek(field)
                file.write(value.to_bytes(4, "little"))
        os.fsync(file.fileno())
