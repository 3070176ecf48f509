from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import Field, ValidationError

from mindspeed_mm.config.base import MAX_FILE_BYTES, Ints, Settings, StageLists, load_settings, read_json
from mindspeed_mm.errors import ConfigError


class Inner(Settings):
    ignored_keys: ClassVar[Mapping[str, str]] = {"old_key": "nobody reads it"}

    num_layers: int = Field(gt=0)
    ratio: float = 0.5
    layout: StageLists = None


class Outer(Settings):
    name: str
    inner: Inner
    ranks: Ints = ()
    nothing: None = None


def write(path: Path, text: str | bytes) -> Path:
    file = path / "settings.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def problems_of(path: Path, content: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_settings(Outer, write(path, json.dumps(content)))
    return list(caught.value.problems)


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    settings = load_settings(Outer, write(tmp_path, '{"name": "a", "inner": {"num_layers": 3}, "ranks": [0, 1]}'))
    assert settings == Outer(name="a", inner=Inner(num_layers=3), ranks=(0, 1))


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, b'\xef\xbb\xbf{"a": 1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": NaN}', "NaN is not a number that a setting can have."),
        ('{"a": -Infinity}', "-Infinity is not a number that a setting can have."),
        ('{"a": 1e999}', "1e999 is too large for a number."),
        ('{"a": 1,\n "b": {"a": 2},\n "a": 3}', 'line 3: key "a" stands twice in one object (first on line 1).'),
        ('{"a": [' + "[" * 70 + "]" * 70 + "]}", "line 1: nested deeper than 64 levels."),
        ('{"a" 1}', "line 1, column 6: not valid JSON: Expecting ':' delimiter."),
        ("[1]", "the file holds a list at its top level, but settings are an object {...}."),
        (b'{"a": "\xff"}', "the file is not UTF-8 text (byte 7)."),
    ],
    ids=["nan", "infinity", "overflow", "duplicate", "deep", "comma", "list", "latin"],
)
def test_a_file_that_is_not_strict_json_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_json(write(tmp_path, text))
    assert caught.value.problems == (expected,)
    assert caught.value.where.endswith("settings.json")


def test_keys_inside_strings_are_no_duplicates(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, r'{"a": "\"a\": {", "b": ["a", "a"]}'))["b"] == ["a", "a"]


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json(tmp_path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    with file.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ConfigError, match=r"has 16,777,217 bytes"):
        read_json(file)


def test_all_problems_of_a_file_are_shown_together(tmp_path: Path) -> None:
    problems = problems_of(tmp_path, {"name": 3, "inner": {"num_layers": 0, "ration": 1.0}, "nothing": {}, "extra": 1})
    assert problems == [
        "inner.ration is not a setting; did you mean ratio?",
        "extra is not a setting.",
        "name = 3 should be a valid string.",
        "inner.num_layers = 0 should be greater than 0.",
        "nothing must be null: this part does not exist in the model.",
    ]


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path, {"inner": {}}) == ["name is missing.", "inner.num_layers is missing."]


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_values_are_not_converted(tmp_path: Path, value: object) -> None:
    assert problems_of(tmp_path, {"name": "a", "inner": {"num_layers": value}})[0].startswith("inner.num_layers = ")


def test_a_key_without_effect_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path, '{"name": "a", "inner": {"num_layers": 3, "old_key": [1]}}')
    notes: list[str] = []
    load_settings(Outer, file, notes)
    assert notes == [f"{file}: accepted without effect: inner.old_key (nobody reads it)."]
    with caplog.at_level(logging.INFO):
        load_settings(Outer, file)
    assert [record.getMessage() for record in caplog.records] == notes


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 10, 10, 7], (1, 10, 10, 7)),
        ([[0, 1], [2, 3]], ((0, 1), (2, 3))),
        ("auto", "auto"),
        (None, None),
    ],
)
def test_stage_lists_have_four_forms(value: object, expected: object) -> None:
    assert Inner.model_validate({"num_layers": 1, "layout": value}).layout == expected


@pytest.mark.parametrize("value", [[], [[]], [1, [2]], [-1], [True], ["1"], "balanced", 4, [[1, 2], [3]]])
def test_other_stage_lists_are_refused(tmp_path: Path, value: object) -> None:
    (problem,) = problems_of(tmp_path, {"name": "a", "inner": {"num_layers": 1, "layout": value}})
    assert problem.startswith(f"inner.layout = {json.dumps(value)} ")


def test_settings_are_frozen() -> None:
    settings = Inner(num_layers=1)
    with pytest.raises(ValidationError):
        settings.num_layers = 2  # type: ignore[misc]
