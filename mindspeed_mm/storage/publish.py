"""Atomic appearance of whole directories: written as a temporary sibling, made durable, renamed once."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindspeed_mm.errors import ConfigError, SetupError
from mindspeed_mm.storage.files import DIR_MODE, make_dir, sync_dir, write_errors

logger = logging.getLogger(__name__)


def check_target(final: Path, *, overwrite: bool = False) -> None:
    """Refuse a place where a directory must not be published; nothing is changed.

    Raises:
        ConfigError: `final` is a link, a file, or a non-empty directory without `overwrite`.
        SetupError: the directory above it is not writable, or is writable for everybody.
    """
    if final.is_symlink():
        raise ConfigError(
            str(final), "is a symbolic link; name the directory itself, so that nothing else is replaced."
        )
    if final.exists():
        if not final.is_dir():
            raise ConfigError(str(final), "is a file; expected a directory to write to.")
        if not overwrite and any(final.iterdir()):
            raise ConfigError(str(final), "is not empty; choose another directory or allow overwriting it.")
    parent = _existing_parent(final)
    mode = parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise SetupError(
            f"{parent} is writable for every user and has no sticky bit: others could exchange files while they are "
            "written. Choose another place or `chmod o-w` it."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SetupError(f"{parent} is not writable for this user; {final.name} cannot be created there.")


@contextmanager
def staging_directory(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new temporary sibling of `final`; published when the block ends well, removed when it raises.

    What a killed run left beside `final` is removed first: such a directory is no longer locked by its process.
    """
    check_target(final, overwrite=overwrite)
    make_dir(final.parent)
    _remove_stale(final)
    temporary = final.parent / f".{final.name}.tmp-{secrets.token_hex(6)}"
    with write_errors(temporary):
        temporary.mkdir(DIR_MODE)
        temporary.chmod(DIR_MODE)
        lock = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        publish_directory(temporary, final, overwrite=overwrite)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(temporary: Path, final: Path, *, overwrite: bool = False) -> None:
    """Make everything under `temporary` durable and give it the name `final` in one step.

    A directory that has the name already is moved aside first and deleted afterwards, so a crash in between leaves the
    old one or the new one complete.

    Raises:
        ConfigError: `final` holds something and `overwrite` is false.
        SetupError, DiskFullError: a rename or an fsync failed.
    """
    temporary, final = Path(temporary), Path(final)
    check_target(final, overwrite=overwrite)
    trash = final.parent / f".{final.name}.trash-{secrets.token_hex(6)}"
    with write_errors(final):
        _sync_tree(temporary)
        if final.exists() and any(final.iterdir()):
            final.rename(trash)
        try:
            temporary.rename(final)
        except OSError:
            if trash.exists():
                trash.rename(final)
            raise
        sync_dir(final.parent)
    shutil.rmtree(trash, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_dir(Path(folder))


def _remove_stale(final: Path) -> None:
    for leftover in final.parent.glob(f".{_escape(final.name)}.tmp-*"):
        if leftover.is_symlink() or not leftover.is_dir():
            continue
        descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # another run is writing there
        finally:
            os.close(descriptor)
        logger.warning("removing %s, left by a run that was interrupted", leftover)
        shutil.rmtree(leftover, ignore_errors=True)


def _escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
