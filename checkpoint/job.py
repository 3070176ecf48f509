"""What all conversions share: options, the run itself from checks to publication, and the summary."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.execute import Progress, execute
from checkpoint.ranges import Sources
from checkpoint.transfer import TargetFile
from mindspeed_mm.errors import ConfigError, DiskFullError
from mindspeed_mm.storage.manifest import FileRecord, write_manifest


@dataclass(frozen=True, slots=True)
class Options:
    """How a conversion runs; none of it changes the result."""

    workers: int = 2
    """Threads that copy."""
    overwrite: bool = False
    """Replace a target directory that is not empty."""
    allow_nan: bool = False
    """Copy weights that hold NaN or infinity instead of stopping."""
    check_hashes: bool = False
    """Compare the source with its manifest first."""
    progress: Callable[[int], Progress] | None = None
    """Is given the bytes to write, and gives back what is told of every write."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did."""

    tensors: int
    nbytes: int
    files: int
    seconds: float
    notes: tuple[str, ...] = field(default=())
    """Lines worth showing, such as the files that were copied along."""

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e9
        return (
            f"{self.tensors} tensors, {self.nbytes:,} bytes in {self.files} files, {self.seconds:.1f} s "
            f"({rate:.2f} GB/s), peak memory {peak_memory_bytes() / 2**20:.0f} MiB"
        )


def peak_memory_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start


def check_space(target: Path, nbytes: int) -> None:
    """Check that a target of `nbytes` fits on its file system.

    Raises:
        DiskFullError: both numbers.
    """
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < nbytes:
        raise DiskFullError(
            f"disk full: {target} needs {nbytes:,} bytes, but only {free:,} are free on its file system."
        )


def check_apart(source: Path, target: Path) -> None:
    """Check that a conversion does not write into what it reads.

    Raises:
        ConfigError: one of the directories is the other, or lies in it.
    """
    ours, theirs = source.resolve(), target.resolve()
    if ours == theirs or ours in theirs.parents or theirs in ours.parents:
        raise ConfigError(str(target), f"lies in or around {source}, which is read; choose a directory apart from it.")


def stamped(folder: Path) -> Sources:
    """Sources that know what all files below `folder` look like now."""
    sources = Sources()
    paths = [Path(root) / name for root, _, names in os.walk(folder) for name in names]
    sources.stamp(path for path in paths if path.is_file())
    return sources


def run_files(
    files: Sequence[TargetFile], sources: Sources, options: Options, facts: Mapping[str, Any], folder: Path
) -> list[FileRecord]:
    """Write planned files below `folder`, then its manifest; whatever else belongs there has been written before."""
    progress = options.progress(sum(file.nbytes for file in files)) if options.progress else None
    records = execute(files, sources, folder, workers=options.workers, progress=progress, allow_nan=options.allow_nan)
    write_manifest(folder, records, facts)
    return records
