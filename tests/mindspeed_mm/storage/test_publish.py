"""Directories appear complete or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mindspeed_mm.errors import ConfigError, SetupError
from mindspeed_mm.storage.files import write_file
from mindspeed_mm.storage.publish import publish_directory, staging_directory


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    final = tmp_path / "parent" / "final"
    with staging_directory(final) as staging:
        write_file(staging / "a", b"1")
        assert not final.exists()
        assert staging.parent == final.parent
    assert (final / "a").read_bytes() == b"1"
    assert stat.S_IMODE(final.stat().st_mode) == 0o750
    assert list(final.parent.iterdir()) == [final]


def test_nothing_appears_when_the_block_raises(tmp_path: Path) -> None:
    def fail() -> None:
        with staging_directory(tmp_path / "final") as staging:
            write_file(staging / "a", b"1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_but_not_what_a_running_one_writes(tmp_path: Path) -> None:
    (tmp_path / ".final.tmp-0123").mkdir()
    with staging_directory(tmp_path / "final") as running:
        assert not (tmp_path / ".final.tmp-0123").exists()
        with staging_directory(tmp_path / "final") as second:
            assert running.exists()
            (second / "b").touch()
        (running / "a").touch()
        (tmp_path / "final" / "b").unlink()
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["link", "file", "full"])
def test_a_place_that_is_taken_is_refused_and_left_alone(kind: str, tmp_path: Path) -> None:
    final = tmp_path / "final"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        final.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        final.touch()
    else:
        final.mkdir()
        (final / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"symbolic link|is a file|is not empty"), staging_directory(final):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_overwriting_replaces_the_whole_directory(tmp_path: Path) -> None:
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").touch()
    with staging_directory(final, overwrite=True) as staging:
        (staging / "new").touch()
    assert [path.name for path in final.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [final]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "temporary").mkdir()
    publish_directory(tmp_path / "temporary", tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_directory_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(SetupError, match="writable for every user"), staging_directory(shared / "final"):
        pass
    shared.chmod(0o1777)
    with staging_directory(shared / "final"):
        pass


def test_the_old_directory_comes_back_when_the_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, temporary = tmp_path / "final", tmp_path / "temporary"
    final.mkdir()
    (final / "old").touch()
    temporary.mkdir()
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self == temporary:
            raise OSError(30, os.strerror(30))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SetupError, match="Read-only file system"):
        publish_directory(temporary, final, overwrite=True)
    assert [path.name for path in final.iterdir()] == ["old"]
