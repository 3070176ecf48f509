"""The zip container of `torch.save`: where its records lie, and the bytes around the records of a new one."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.tensors import Checksum, FileLayout

ALIGNMENT = 64
_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_FLAGS = 0x0808  # sizes follow the data, names are UTF-8: what torch writes


@dataclass(frozen=True, slots=True)
class Record:
    """One file of the container: where its bytes begin and how many they are."""

    offset: int
    nbytes: int


def read_archive(path: Path) -> dict[str, Record]:
    """The records of a `torch.save` file by their name without the leading directory (`data.pkl`, `data/0`, ...).

    Raises:
        CheckpointError: not such a file, truncated, or records that overlap, repeat or are compressed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            try:
                with zipfile.ZipFile(file) as archive:
                    entries = archive.infolist()
            except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
                raise CheckpointError(
                    f"{path} ({size:,} bytes) is not a whole torch.save file: it is truncated, damaged, or was written "
                    f"by torch older than 1.6 ({error})."
                ) from error
            records: dict[str, Record] = {}
            for entry in entries:
                name = entry.filename.partition("/")[2]
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise CheckpointError(f"{path}: record {entry.filename} is compressed; torch.save never does that.")
                if name in records:
                    raise CheckpointError(f"{path}: record {entry.filename} is there twice.")
                file.seek(entry.header_offset)
                header = file.read(_LOCAL.size)
                if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
                    raise CheckpointError(f"{path}: record {entry.filename} is not where the container says it is.")
                *_, name_length, extra_length = _LOCAL.unpack(header)
                start = entry.header_offset + _LOCAL.size + name_length + extra_length
                records[name] = Record(start, entry.file_size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    _check_records(path, records, size)
    return records


def _check_records(path: Path, records: Mapping[str, Record], size: int) -> None:
    end = 0
    for name, record in sorted(records.items(), key=lambda item: item[1].offset):
        if record.offset < end or record.offset + record.nbytes > size:
            raise CheckpointError(
                f"{path}: record {name} overlaps another one or ends behind the file ({size:,} bytes)."
            )
        end = record.offset + record.nbytes


@dataclass(frozen=True, slots=True)
class ArchiveLayout:
    """A container to be written: every byte of it that is not a tensor, and where the tensors go."""

    file: FileLayout
    offsets: Mapping[str, int]
    """Storage key -> offset of its bytes."""


def plan_archive(pickle_data: bytes, storages: Mapping[str, int], *, stem: str) -> ArchiveLayout:
    """Lay out a `torch.save` file.

    Args:
        pickle_data: content of `data.pkl`.
        storages: storage key -> bytes, in the order of the file.
        stem: name of the directory inside the container; torch uses the file's name without suffix.
    """
    writer = _ArchivePlanner(stem)
    for name, data in (
        ("data.pkl", pickle_data),
        (".format_version", b"1"),
        (".storage_alignment", b"64"),
        ("byteorder", b"little"),
    ):
        writer.add(name, len(data), data)
    offsets = {key: writer.add(f"data/{key}", nbytes) for key, nbytes in storages.items()}
    writer.add("version", 2, b"3\n")
    writer.finish()
    return ArchiveLayout(FileLayout(writer.position, tuple(writer.literals), tuple(writer.checksums())), offsets)


class _ArchivePlanner:
    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.position = 0
        self.literals: list[tuple[int, bytes]] = []
        self.central: list[bytes] = []
        self.pending: list[tuple[int, int, int, int]] = []
        """(start, end, offset of one field, offset of the other in the central directory)."""
        self.central_start = 0

    def _literal(self, data: bytes) -> None:
        if self.literals and self.literals[-1][0] + len(self.literals[-1][1]) == self.position:
            offset, before = self.literals.pop()
            self.literals.append((offset, before + data))
        else:
            self.literals.append((self.position, data))
        self.position += len(data)

    def checksums(self) -> Iterator[Checksum]:
        """Where the checksums of records go that are not known yet."""
        for start, end, field, central in self.pending:
            yield Checksum(start, end, (field, self.central_start + central))

    def add(self, name: str, nbytes: int, data: bytes | None = None) -> int:
        full_name = f"{self.stem}/{name}".encode()
        header_offset = self.position
        checksum = 0 if data is None else zlib.crc32(data)
        padding = -(header_offset + _LOCAL.size + len(full_name) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._literal(
            _LOCAL.pack(0x04034B50, 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(full_name), len(extra)) + full_name + extra
        )
        offset = self.position
        if data is not None:
            self._literal(data)
        else:
            self.position += nbytes
            self.pending.append((offset, offset + nbytes, self.position + 4, sum(map(len, self.central)) + 16))
        is_large = nbytes >= 0xFFFFFFFF
        self._literal(struct.pack("<IIQQ" if is_large else "<IIII", 0x08074B50, checksum, nbytes, nbytes))
        self._central_entry(full_name, nbytes, checksum, header_offset)
        return offset

    def _central_entry(self, name: bytes, nbytes: int, checksum: int, header_offset: int) -> None:
        limit = 0xFFFFFFFF
        large = [value for value in (nbytes, nbytes) if nbytes >= limit] + [header_offset] * (header_offset >= limit)
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        size = min(nbytes, limit)
        fields = (0x02014B50, 0, 0, _FLAGS, 0, 0, 0, checksum, size, size, len(name), len(extra), 0, 0, 0, 0)
        self.central.append(_CENTRAL.pack(*fields, min(header_offset, limit)) + name + extra)

    def finish(self) -> None:
        self.central_start = start = self.position
        directory, count = b"".join(self.central), len(self.central)
        self._literal(directory)
        end = self.position
        self._literal(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count, len(directory), start))
        self._literal(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        short = (min(count, 0xFFFF), min(count, 0xFFFF), min(len(directory), 0xFFFFFFFF), min(start, 0xFFFFFFFF))
        self._literal(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *short, 0))
