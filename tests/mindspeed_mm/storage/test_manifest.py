"""The manifest tells every change of a directory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.manifest import check_manifest, hash_file, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"a" * 100)
    (tmp_path / "b").write_bytes(b"b" * 100)
    (tmp_path / "sub" / "c").write_bytes(b"c" * 100)
    write_manifest(tmp_path, [], {"heads": 2})
    return tmp_path


def test_a_directory_is_as_its_manifest_says(folder: Path) -> None:
    manifest = check_manifest(folder)
    assert [(record.name, record.nbytes) for record in manifest.files] == [("a", 100), ("b", 100), ("sub/c", 100)]
    assert manifest.facts == {"heads": 2}


def test_hashes_that_are_known_are_taken_over(folder: Path) -> None:
    record = hash_file(folder / "a")
    (folder / "a").write_bytes(b"x")
    write_manifest(folder, [record])
    with pytest.raises(CheckpointError, match="a has 1 bytes, expected 100"):
        check_manifest(folder)


def test_any_flipped_bit_is_found(folder: Path) -> None:
    generator = random.Random(0)
    original = (folder / "a").read_bytes()
    for _ in range(50):
        data = bytearray(original)
        data[generator.randrange(100)] ^= 1 << generator.randrange(8)
        (folder / "a").write_bytes(data)
        check_manifest(folder, hashes=False)
        with pytest.raises(CheckpointError, match="a has another content"):
            check_manifest(folder)


def test_missing_extra_and_swapped_files_are_named(folder: Path) -> None:
    (folder / "sub" / "c").rename(folder / "sub" / "d")
    (folder / "a").rename(folder / "t")
    (folder / "b").rename(folder / "a")
    (folder / "t").rename(folder / "b")
    with pytest.raises(CheckpointError) as caught:
        check_manifest(folder)
    for words in ("sub/c is missing", "sub/d is not in the manifest", "a has another content", "b has another content"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"files": None},
        {"files": [{"name": "../a", "nbytes": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"name": "/a", "nbytes": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"name": "a", "nbytes": -1, "xxh3_128": "0" * 32}]},
        {"files": [{"name": "a", "nbytes": 1, "xxh3_128": "0"}]},
        {"files": [{"name": "a", "nbytes": 1, "xxh3_128": "0" * 32}] * 2},
        {"files": [{"name": "a"}]},
    ],
)
def test_a_damaged_manifest_is_refused(change: dict[str, object], folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_manifest(folder)


def test_a_manifest_that_is_no_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_manifest(folder)


def test_a_directory_without_manifest_cannot_be_checked(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        check_manifest(tmp_path)
