"""The zip container is torch's."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.archive import ALIGNMENT, plan_archive, read_archive


def test_records_lie_where_torch_put_them(tmp_path: Path) -> None:
    tensor = torch.arange(7, dtype=torch.float32)
    torch.save({"a": tensor}, tmp_path / "x.pt")
    records = read_archive(tmp_path / "x.pt")
    start = records["data/0"].offset
    assert start % ALIGNMENT == 0
    assert (tmp_path / "x.pt").read_bytes()[start : start + 28] == tensor.numpy().tobytes()


def test_a_planned_container_is_a_zip_file_with_aligned_records(tmp_path: Path) -> None:
    layout = plan_archive(b"pickle", {"0": 10, "1": 0, "2": 300}, stem="name")
    data = bytearray(layout.file.nbytes)
    for offset, literal in layout.file.literals:
        data[offset : offset + len(literal)] = literal
    (tmp_path / "x.pt").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.read("name/data.pkl") == b"pickle"
        assert archive.read("name/byteorder") == b"little"
        assert archive.read("name/version") == b"3\n"
    records = read_archive(tmp_path / "x.pt")
    assert {name: record.nbytes for name, record in records.items() if name.startswith("data/")} == {
        "data/0": 10,
        "data/1": 0,
        "data/2": 300,
    }
    assert all(records[f"data/{key}"].offset == offset for key, offset in layout.offsets.items())
    assert all(record.offset % ALIGNMENT == 0 for record in records.values())


def test_records_beyond_four_gigabytes_have_64_bit_fields(tmp_path: Path) -> None:
    layout = plan_archive(b"p", {"0": 5 << 30, "1": 8}, stem="m")
    with (tmp_path / "x.pt").open("wb") as file:
        file.truncate(layout.file.nbytes)  # a file with holes: it takes no room
        for offset, literal in layout.file.literals:
            file.seek(offset)
            file.write(literal)
    records = read_archive(tmp_path / "x.pt")
    assert records["data/0"].nbytes == 5 << 30
    assert records["data/1"].offset == layout.offsets["1"] > 5 << 30
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        assert archive.getinfo("m/data/0").file_size == 5 << 30


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        read_archive(tmp_path / "x.pt")


def test_a_compressed_container_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 1000)
    with pytest.raises(CheckpointError, match="compressed"):
        read_archive(tmp_path / "x.pt")


def test_a_record_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x/data.pkl", b"2")
    with pytest.raises(CheckpointError, match="twice"):
        read_archive(tmp_path / "x.pt")


def test_the_old_format_of_torch_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"older than 1\.6"):
        read_archive(tmp_path / "x.pt")
