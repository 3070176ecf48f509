"""The manifest of a published directory: name, size and content hash of every file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.files import write_file
from mindspeed_mm.storage.layout import MANIFEST_FILE

FORMAT = 1
_BUFFER_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of a manifest."""

    name: str
    """Relative to the manifest's directory, with `/`."""
    nbytes: int
    xxh3_128: str
    """32 hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a directory held when it was published."""

    files: tuple[FileRecord, ...]
    facts: Mapping[str, Any]
    """What the writer knew about the content, such as head counts; plain JSON values."""


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file; `name` is the file's own."""
    digest, size, buffer = xxhash.xxh3_128(), 0, bytearray(_BUFFER_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileRecord(path.name, size, digest.hexdigest())


def write_manifest(
    folder: Path, records: Iterable[FileRecord] | None = None, facts: Mapping[str, Any] | None = None
) -> None:
    """Write the manifest of `folder`.

    Args:
        records: files whose hashes are known already; every other file below `folder` is hashed here.
    """
    folder = Path(folder)
    known = {record.name: record for record in records or ()}
    for name in _files_below(folder):
        if name not in known:
            found = hash_file(folder / name)
            known[name] = FileRecord(name, found.nbytes, found.xxh3_128)
    content = {
        "format": FORMAT,
        "facts": dict(facts or {}),
        "files": [
            {"name": name, "nbytes": known[name].nbytes, "xxh3_128": known[name].xxh3_128} for name in sorted(known)
        ],
    }
    write_file(folder / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode(), replace=True)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of `folder`; None where there is none.

    Raises:
        CheckpointError: it is damaged, or names files outside its directory or twice.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {content['format']}; this version reads format {FORMAT}.")
        records = tuple(FileRecord(entry["name"], entry["nbytes"], entry["xxh3_128"]) for entry in content["files"])
        facts = dict(content.get("facts", {}))
        _check_records(path, records)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return Manifest(records, facts)


def check_manifest(folder: Path, *, hashes: bool = True) -> Manifest:
    """Check that a directory holds what its manifest says.

    Args:
        hashes: compare contents, not only sizes.
    Raises:
        CheckpointError: no manifest, or naming every file that is missing, left over, of another size or content.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder} has no {MANIFEST_FILE}; its content cannot be checked.")
    problems = []
    for record in manifest.files:
        path = folder / record.name
        if not path.is_file():
            problems.append(f"{record.name} is missing")
        elif path.stat().st_size != record.nbytes:
            problems.append(f"{record.name} has {path.stat().st_size:,} bytes, expected {record.nbytes:,}")
        elif hashes and hash_file(path).xxh3_128 != record.xxh3_128:
            problems.append(f"{record.name} has another content than when it was written")
    listed = {record.name for record in manifest.files}
    problems += [f"{name} is not in the manifest" for name in _files_below(folder) if name not in listed]
    if problems:
        raise CheckpointError("\n  ".join([f"{folder} does not hold what its {MANIFEST_FILE} says:", *problems]))
    return manifest


def _files_below(folder: Path) -> Sequence[str]:
    names = []
    for root, _, files in os.walk(folder):
        names += [os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/") for name in files]
    return sorted(name for name in names if name != MANIFEST_FILE)


def _check_records(path: Path, records: Sequence[FileRecord]) -> None:
    names = [record.name for record in records]
    for record in records:
        parts = record.name.split("/")
        if record.name.startswith("/") or "\0" in record.name or any(part in ("", ".", "..") for part in parts):
            raise CheckpointError(f"{path} names a file outside its directory: {record.name!r}.")
        if type(record.nbytes) is not int or record.nbytes < 0 or not _DIGEST.match(record.xxh3_128):
            raise CheckpointError(f"{path}: size or hash of {record.name} is no such thing.")
    if len(set(names)) != len(names):
        raise CheckpointError(f"{path} names a file twice.")
