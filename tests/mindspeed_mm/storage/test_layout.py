"""Names of the layout, and the tracker."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage import layout


def test_rank_directories_have_the_names_of_megatron(tmp_path: Path) -> None:
    assert layout.shard_dir(tmp_path, "release", 3, 0, 1) == tmp_path / "release" / "mp_rank_03"
    assert layout.shard_dir(tmp_path, 10, 3, 12, 16) == tmp_path / "iter_0000010" / "mp_rank_03_012"
    assert layout.parse_rank_name("mp_rank_03_012") == (3, 12)
    assert layout.parse_rank_name("mp_rank_03") == (3, 0)
    assert layout.parse_rank_name("mp_rank_x") is None


@pytest.mark.parametrize(
    ("text", "iteration"), [("release", "release"), ("release\n", "release"), ("10000", 10000), (" 7\n", 7)]
)
def test_a_tracker_is_read_with_and_without_newline(text: str, iteration: layout.Iteration, tmp_path: Path) -> None:
    (tmp_path / layout.TRACKER).write_text(text)
    assert layout.read_tracker(tmp_path) == iteration


@pytest.mark.parametrize("text", ["", "abc", "-1", "1.5", "release2", "\0", "¹"])
def test_an_unusable_tracker_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / layout.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match="expected 'release' or an iteration number"):
        layout.read_tracker(tmp_path)


def test_a_tracker_that_is_no_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        layout.read_tracker(tmp_path)
    (tmp_path / layout.TRACKER).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        layout.read_tracker(tmp_path)


def test_the_tracker_is_written_without_newline_and_replaced(tmp_path: Path) -> None:
    layout.write_tracker(tmp_path, 10)
    layout.write_tracker(tmp_path, "release")
    assert (tmp_path / layout.TRACKER).read_bytes() == b"release"
    assert len(list(tmp_path.iterdir())) == 1


def test_iterations_are_listed_in_order(tmp_path: Path) -> None:
    for name in ("iter_0000020", "iter_0000003", "release", "iter_x", "other"):
        (tmp_path / name).mkdir()
    assert layout.list_iterations(tmp_path) == ["release", 3, 20]
    assert layout.list_iterations(tmp_path / "nowhere") == []
