"""Small files, written durably."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from mindspeed_mm.errors import DiskFullError, SetupError
from mindspeed_mm.storage.files import explain_write_error, make_dir, write_file


def test_a_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"1")
    with pytest.raises(SetupError, match="exists already"):
        write_file(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"
    write_file(tmp_path / "a", b"2", replace=True)
    assert (tmp_path / "a").read_bytes() == b"2"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"mine")
    (tmp_path / "a").symlink_to(tmp_path / "target")
    write_file(tmp_path / "a", b"2", replace=True)
    assert (tmp_path / "target").read_bytes() == b"mine"
    assert not (tmp_path / "a").is_symlink()


def test_directories_keep_their_modes_and_new_ones_get_0750(tmp_path: Path) -> None:
    tmp_path.chmod(0o701)
    make_dir(tmp_path / "a" / "b")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path, tmp_path / "a", tmp_path / "a" / "b")] == [
        0o701,
        0o750,
        0o750,
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_has_its_own_error(code: int, tmp_path: Path) -> None:
    error = explain_write_error(tmp_path / "a", OSError(code, os.strerror(code)))
    assert isinstance(error, DiskFullError)
    assert "bytes are free" in str(error)


def test_other_write_errors_are_about_the_environment(tmp_path: Path) -> None:
    assert isinstance(explain_write_error(tmp_path, OSError(errno.EROFS, "Read-only file system")), SetupError)
    with pytest.raises(SetupError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "a", b"")
