"""The index finds every record of arrays and lines, whatever stands in strings and wherever the scan is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_mm.data import record_index
from mindspeed_mm.data.record_index import build_index
from mindspeed_mm.data.records import RecordFile, RecordSet
from mindspeed_mm.errors import DataError


def read_all(path: Path) -> list[dict[str, Any]]:
    file = RecordFile(build_index(path))
    return [file.read(number).columns for number in range(len(file))]


texts = st.text(alphabet=st.sampled_from('ab"\\{}[],:\n\té€😀'), max_size=12)
values = st.recursive(
    texts | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
)
records = st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records, st.integers(1, 40), st.sampled_from(["array", "indented", "lines"]), st.booleans())
def test_reading_by_index_gives_what_json_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], chunk: int, form: str, ascii_only: bool
) -> None:
    monkeypatch.setattr(record_index, "_CHUNK_BYTES", chunk)
    path = tmp_path / "records.json"
    if form == "lines":
        text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=ascii_only, indent=2 if form == "indented" else None)
    path.write_text(text, encoding="utf-8")
    assert read_all(path) == rows


def test_byte_order_mark_line_ends_and_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n{"a": 1}\r\n\r\n{"a": 2}\r\n \r\n{"a": 3}')
    assert [row["a"] for row in read_all(path)] == [1, 2, 3]


def test_objects_over_several_lines_may_follow_each_other(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text('{\n "a": 1\n}\n{\n "a": 2\n}\n')
    assert [row["a"] for row in read_all(path)] == [1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("hello", "starts with b'h'"),
        ('[{"a": 1}, {"a": ', "ends inside the array, in or after record 1 at byte 11"),
        ('[{"a": "1}, {"a": 2}]', "ends inside the array"),
        ('[{"a": 1}] [{"a": 2}]', "the file goes on after it"),
        ('[{"a": 1}, [2]]', "a list stands at byte 11"),
    ],
)
def test_files_that_are_no_record_files_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem.replace("[", r"\[")):
        build_index(path)


def test_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read: No such file"):
        build_index("nowhere.json")


@pytest.mark.parametrize(
    ("text", "number", "problem"),
    [
        ('[5, {"a": 1}]', 0, r"records.json\[0\] \(byte 1\) is not valid JSON: Extra data"),
        ('[{"a": 1}, 5, {"a": 2}]', 0, "Extra data"),
        ('[{"a": 1} {"a": 2}, {"a": NaN}]', 2, "NaN is not a JSON number"),
        ('[{"a": 1, "a": 2}]', 0, 'key "a" stands twice'),
        ('{"a": 1} 7\n', 0, "Extra data"),
        ('{"a": 1\n{"a": 2}\n', 0, "is not valid JSON"),
    ],
)
def test_records_that_are_not_one_strict_object_are_refused_by_name(
    tmp_path: Path, text: str, number: int, problem: str
) -> None:
    path = tmp_path / "records.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        RecordFile(build_index(path)).read(number)


def test_bytes_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "\xff"}\n')
    file = RecordFile(build_index(path))
    assert file.read(0).columns == {"a": 1}
    with pytest.raises(DataError, match=r"records.jsonl\[1\] \(byte 9\) is not UTF-8"):
        file.read(1)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match="nested too deeply"):
        RecordFile(build_index(path)).read(0)


def test_record_over_16_mebibytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "MAX_RECORD_BYTES", 100)
    path = tmp_path / "records.jsonl"
    path.write_text('{"a": 1}\n{"a": "' + "x" * 200 + '"}\n')
    with pytest.raises(DataError, match=r"records.jsonl\[1\] \(byte 9\) has 210 bytes"):
        build_index(path)


def test_files_follow_each_other_and_max_samples_takes_the_first(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "c.json"]
    paths[0].write_text('[{"n": 0}, {"n": 1}]')
    paths[1].write_text('{"n": 2}\n')
    paths[2].write_text('[{"n": 3}]')
    whole = RecordSet.open(paths)
    assert [whole[i].columns["n"] for i in range(len(whole))] == [0, 1, 2, 3]
    assert whole[2].name == whole.name_of(2) == f"{paths[1]}[0]"
    assert len(RecordSet.open(paths, max_samples=3)) == 3
    with pytest.raises(DataError, match=r"max_samples = 5, but .* hold only 4 records"):
        RecordSet.open(paths, max_samples=5)


def test_set_without_any_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(DataError, match="no records"):
        RecordSet.open([tmp_path / "a.json"])


def test_split_is_disjoint_complete_and_depends_on_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"n": n} for n in range(50)]))
    records = RecordSet.open([path])

    def numbers(part: RecordSet) -> list[int]:
        return [part[i].columns["n"] for i in range(len(part))]

    train, valid = records.split(0.1, seed=1)
    assert len(valid) == 5
    assert sorted(numbers(train) + numbers(valid)) == list(range(50))
    assert numbers(train) == sorted(numbers(train))
    assert numbers(records.split(0.1, seed=1)[1]) == numbers(valid)
    assert numbers(records.split(0.1, seed=2)[1]) != numbers(valid)
    with pytest.raises(DataError, match="leaves none"):
        records.first(1).split(0.5, seed=1)


def test_large_file_is_indexed_in_bounded_memory(tmp_path: Path) -> None:
    """64 MiB here; memory does not grow with the file but for 8 bytes per record."""
    path = tmp_path / "records.json"
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode()
    with path.open("wb") as file:
        file.write(b"[" + b",\n".join([row] * (64 * 2**20 // len(row))) + b"]")
    code = (
        "import resource, sys\n"
        "from mindspeed_mm.data.record_index import build_index\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "index = build_index(sys.argv[1])\n"
        "print(len(index), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, env=os.environ
    )
    size, grown_kib = map(int, done.stdout.split())
    assert size == 64 * 2**20 // len(row)
    assert grown_kib < 32 * 1024
