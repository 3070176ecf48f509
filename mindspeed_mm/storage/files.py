"""Files and directories with the modes of a checkpoint (0640, 0750), written so that a crash leaves old or new."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_mm.errors import DiskFullError, SetupError

FILE_MODE = 0o640
DIR_MODE = 0o750
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_write_error(path: Path, error: OSError) -> SetupError | DiskFullError:
    """The named error that stands for a failed write: DiskFullError (exit 19) or SetupError (exit 11)."""
    if error.errno in _NO_SPACE:
        try:
            stat = os.statvfs(path if path.is_dir() else path.parent)
            free = f"{stat.f_bavail * stat.f_frsize:,} bytes are free there"
        except OSError:
            free = "free space is unknown"
        return DiskFullError(f"disk full (or over quota) while writing {path}: {os.strerror(error.errno)}; {free}.")
    return SetupError(f"{path} cannot be written: {error.strerror or error}.")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn OSError inside the block into the project's errors, naming `path`."""
    try:
        yield
    except OSError as error:
        raise explain_write_error(Path(path), error) from error


def make_dir(path: Path) -> Path:
    """Create `path` and its parents with mode 0750, whatever the umask; directories that exist keep theirs."""
    with write_errors(path):
        for folder in reversed([path, *path.parents]):
            if not folder.exists():
                folder.mkdir(DIR_MODE)
                folder.chmod(DIR_MODE)
    return path


def open_new(path: Path) -> int:
    """A descriptor of a new file with mode 0640, open for writing; neither an existing file nor a link is followed.

    Raises:
        SetupError, DiskFullError: the file exists already or cannot be created.
    """
    with write_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        os.fchmod(descriptor, FILE_MODE)
    return descriptor


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, replace: bool = False) -> None:
    """Write a small file durably: into a temporary sibling, then renamed over `path`.

    Args:
        replace: an existing file is replaced; without it that is an error.
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise SetupError(f"{path} exists already; it is not overwritten.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = open_new(temporary)
    try:
        with write_errors(path):
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
