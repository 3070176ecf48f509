"""The safetensors header, read strictly."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mindspeed_mm.errors import CheckpointError
from mindspeed_mm.storage.safetensors_file import index_safetensors, plan_safetensors
from mindspeed_mm.storage.tensors import BY_NAME, DTYPES


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_lie_where_the_library_puts_them(tmp_path: Path) -> None:
    tensors = {dtype.name: torch.arange(4).reshape(2, 2).to(getattr(torch, dtype.name)) for dtype in DTYPES}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    index = index_safetensors(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert index.metadata == {"format": "pt"}
    for name, stored in index.tensors.items():
        assert (stored.dtype.name, stored.shape) == (name, (2, 2))
        expected = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[stored.offset : stored.offset + stored.nbytes] == expected


def test_a_planned_file_is_the_one_that_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a.ü": torch.arange(3).bfloat16(), "empty": torch.zeros(0, 4).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    index = index_safetensors(tmp_path / "x.safetensors")
    planned = plan_safetensors({name: (t.dtype, t.shape) for name, t in index.tensors.items()}, {"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert planned.nbytes == len(raw)
    assert raw.startswith(planned.header)
    assert planned.offsets == {name: stored.offset for name, stored in index.tensors.items()}


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        (b"{", b"", "header has 1 bytes"),
        (b"[]", b"", "no JSON object"),
        (b"{}\xff", b"", "not valid JSON"),
        (b'{"a":' * 50_000, b"", "not valid JSON"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"0000",
            "twice",
        ),
        ({"a": entry([1], 0, 4, "F4")}, b"0000", "has dtype 'F4'"),
        ({"a": entry([2], 0, 4)}, b"0000", "expected them to"),
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"000000", "expected them to"),
        ({"a": entry([1], 4, 8)}, b"00000000", "expected them to"),
        ({"a": entry([1], 0, 4)}, b"00000000", "truncated or damaged"),
        ({"a": entry([2], 0, 8)}, b"0000", "truncated or damaged"),
        ({"a": entry([-1], 0, 4)}, b"0000", "small whole numbers"),
        ({"a": entry([1 << 70, 0], 0, 0)}, b"", "small whole numbers"),
        ({"a": entry([1.5], 0, 4)}, b"0000", "small whole numbers"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype"),
        ({"a": 3}, b"", "lacks dtype"),
        ({"__metadata__": 3}, b"", "__metadata__"),
    ],
)
def test_a_crafted_header_is_refused(header: Any, data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        index_safetensors(write(tmp_path / "x.safetensors", header, data))


@pytest.mark.parametrize("raw", [b"", b"1234567", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 100) + b"{}"])
def test_a_header_that_says_it_is_larger_than_the_file_is_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        index_safetensors(tmp_path / "x.safetensors")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        index_safetensors(tmp_path / "x.safetensors")


def test_a_file_without_metadata_has_no_metadata_entry(tmp_path: Path) -> None:
    planned = plan_safetensors({"a": (BY_NAME["float32"], (1,))}, {})
    (tmp_path / "x.safetensors").write_bytes(planned.header + b"\0\0\x80\x3f")
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [1.0]
    assert index_safetensors(tmp_path / "x.safetensors").metadata == {}
