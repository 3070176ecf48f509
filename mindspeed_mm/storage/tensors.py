"""Element types of stored tensors, and where one tensor's bytes lie in a file. No torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type under the names that torch, safetensors and torch's pickles give it."""

    name: str
    """torch's name, such as `bfloat16`."""
    itemsize: int
    """Bytes of one element."""
    safetensors: str
    """The code in a safetensors header."""
    storage: str
    """The typed storage class that `torch.save` names."""


DTYPES: tuple[Dtype, ...] = (
    Dtype("bfloat16", 2, "BF16", "BFloat16Storage"),
    Dtype("float16", 2, "F16", "HalfStorage"),
    Dtype("float32", 4, "F32", "FloatStorage"),
    Dtype("float64", 8, "F64", "DoubleStorage"),
    Dtype("int64", 8, "I64", "LongStorage"),
    Dtype("int32", 4, "I32", "IntStorage"),
    Dtype("int16", 2, "I16", "ShortStorage"),
    Dtype("int8", 1, "I8", "CharStorage"),
    Dtype("uint8", 1, "U8", "ByteStorage"),
    Dtype("bool", 1, "BOOL", "BoolStorage"),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in DTYPES}
BY_STORAGE = {dtype.storage: dtype for dtype in DTYPES}


class Checksum(NamedTuple):
    """A range of a file whose CRC-32 stands elsewhere in it, behind the range."""

    start: int
    end: int
    fields: tuple[int, ...]
    """Offsets of the four little-endian bytes."""


class FileLayout(NamedTuple):
    """A file to be written, but for the tensors in it."""

    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    """(offset, bytes) of headers and the like, ascending."""
    checksums: tuple[Checksum, ...] = ()
    """To be filled in when the tensors are there, ascending."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A contiguous tensor as it lies in a file."""

    path: Path
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file to the first element."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Extent of dimension 0; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """Elements of one row: the product of all dimensions but the first."""
        return prod(self.shape[1:])
