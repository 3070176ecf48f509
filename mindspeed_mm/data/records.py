"""Raw records by number, read from their files one at a time."""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mindspeed_mm.data.record_index import Int64Array, RecordIndex, build_index
from mindspeed_mm.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record."""

    name: str
    """File and number within it, as errors and logs name it: `data/train.json[17]`."""
    columns: dict[str, Any]
    """The JSON object."""


class RecordFile:
    """The records of one file; nothing is kept in memory but their offsets.

    Safe to use from several processes, forked or spawned: reads carry their own position, and a copy sent to another
    process opens the file again.
    """

    def __init__(self, index: RecordIndex) -> None:
        self.index = index
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> RecordIndex:
        return self.index

    def __setstate__(self, state: RecordIndex) -> None:
        self.index, self._descriptor = state, None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def read(self, number: int) -> Record:
        """The record of this number, from 0.

        Raises:
            DataError: the bytes are not one JSON object in UTF-8, or hold NaN, an infinite number or a key twice.
        """
        name = self.index.name_of(number)
        start, end = (int(offset) for offset in self.index.offsets[number : number + 2])
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self.index.path, os.O_RDONLY | os.O_CLOEXEC)
            raw = os.pread(self._descriptor, end - start, start).strip(b" \t\r\n")
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
        if self.index.form == "array" and number + 1 < len(self):
            raw = raw.removesuffix(b",")
        return Record(name, _parse_record(raw, f"{name} (byte {start})"))


def _parse_record(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text: byte {error.start} of the record") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not valid JSON: {error.msg} at character {error.pos} of the record") from None
    except RecursionError:
        raise DataError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} is not an object but {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f'key "{next(key for key in names if names.count(key) > 1)}" stands twice in one object')
    return value


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not a JSON number")


class RecordSet:
    """The records of several files, one file after another: all, the first of them, or a selection."""

    def __init__(self, files: Sequence[RecordFile], numbers: range | Int64Array) -> None:
        self.files = tuple(files)
        self._ends = tuple(accumulate(len(file) for file in self.files))
        self._numbers = numbers

    @classmethod
    def open(cls, paths: Sequence[str | Path], *, max_samples: int | None = None) -> RecordSet:
        """Index the files.

        Args:
            max_samples: use only the first records of the concatenated files; None means all.
        Raises:
            DataError: a file cannot be indexed, there is no record at all, or there are fewer than `max_samples`.
        """
        files = tuple(RecordFile(build_index(path)) for path in paths)
        total = sum(len(file) for file in files)
        names = ", ".join(str(path) for path in paths)
        if total == 0:
            raise DataError(f"{names}: no records (JSON objects) in it")
        records = cls(files, range(total))
        return records if max_samples is None else records.first(max_samples)

    def first(self, size: int) -> RecordSet:
        """The first records; DataError when there are fewer."""
        if size > len(self):
            names = ", ".join(str(file.index.path) for file in self.files)
            raise DataError(f"max_samples = {size}, but {names} hold only {len(self)} records; lower or drop it")
        return RecordSet(self.files, self._numbers[:size])

    def split(self, rate: float, *, seed: int) -> tuple[RecordSet, RecordSet]:
        """Two disjoint parts in file order: the rest, and a random ceil(rate * size) records drawn from the seed.

        Raises:
            DataError: nothing is left for the first part.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        held_out = math.ceil(len(self) * rate)
        if held_out == len(self):
            raise DataError(f"val_rate = {rate} leaves none of the {len(self)} records for training")
        numbers = np.asarray(self._numbers, dtype=np.int64)
        return (
            RecordSet(self.files, numbers[np.sort(order[held_out:])]),
            RecordSet(self.files, numbers[np.sort(order[:held_out])]),
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def _locate(self, number: int) -> tuple[RecordFile, int]:
        in_files = int(self._numbers[number])
        file = bisect.bisect_right(self._ends, in_files)
        return self.files[file], in_files - (self._ends[file - 1] if file else 0)

    def name_of(self, number: int) -> str:
        """How errors and logs name this record; does not read it."""
        file, local = self._locate(number)
        return file.index.name_of(local)

    def __getitem__(self, number: int) -> Record:
        """The record of this number, from 0; DataError when its text is not one JSON object."""
        file, local = self._locate(number)
        return file.read(local)
