"""The header of a safetensors file, read strictly and written; the tensors' bytes are somebody else's work."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.tensors import BY_SAFETENSORS, Dtype, StoredTensor

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class SafetensorsIndex:
    """What one safetensors file holds."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    """By name, in the order of their bytes."""


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """A file to be written: its header, and where each tensor's bytes go."""

    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


def index_safetensors(path: Path) -> SafetensorsIndex:
    """Read the header of a safetensors file and check that it describes the whole file.

    Raises:
        CheckpointError: no such file, a header that is too large or damaged, unknown dtypes, names that repeat, byte
            ranges that overlap or leave holes, or a file that is shorter or longer than the header says.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if length > min(MAX_HEADER_BYTES, max(size - 8, 0)) or length < 2:
                raise CheckpointError(
                    f"{path} ({size:,} bytes) says that its header has {length:,} bytes; it is damaged or no "
                    "safetensors file."
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    return _parse(path, text, data_start=8 + length, size=size)


def _parse(path: Path, text: bytes, *, data_start: int, size: int) -> SafetensorsIndex:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path}: __metadata__ is no JSON object.")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    tensors, end = {}, 0
    for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])):
        if begin != end or stop - begin != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path}: {name} of shape {list(shape)} and dtype {dtype.name} takes bytes {begin:,} to {stop:,}; "
                f"expected them to begin at {end:,} and to be {prod(shape) * dtype.itemsize:,}."
            )
        tensors[name] = StoredTensor(path, dtype, shape, data_start + begin)
        end = stop
    if data_start + end != size:
        raise CheckpointError(
            f"{path} has {size:,} bytes, but its header describes {data_start + end:,}: it is truncated or damaged."
        )
    return SafetensorsIndex(path, {str(key): str(value) for key, value in metadata.items()}, tensors)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _entry(path: Path, name: str, value: Any) -> tuple[Dtype, tuple[int, ...], int, int]:
    try:
        code, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} lacks dtype, shape or data_offsets.") from error
    if any(type(number) is not int or not 0 <= number < 1 << 62 for number in (*shape, begin, end)):
        raise CheckpointError(f"{path}: the header entry of {name} holds something else than small whole numbers.")
    dtype = BY_SAFETENSORS.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: {name} has dtype {code!r}; expected one of {', '.join(BY_SAFETENSORS)}.")
    return dtype, shape, begin, end


def plan_safetensors(
    tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> SafetensorsLayout:
    """Lay out a safetensors file that holds `tensors` in the given order.

    The header is padded with blanks to a multiple of 8 bytes, as the reference implementation does it.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begins, position = {}, 0
    for name, (dtype, shape) in tensors.items():
        begins[name], end = position, position + prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return SafetensorsLayout(
        struct.pack("<Q", len(text)) + text, {name: start + begin for name, begin in begins.items()}, start + position
    )
