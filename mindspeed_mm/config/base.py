"""Base of all settings classes: strict JSON reading, unknown keys refused, all problems of a file shown together."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from mindspeed_mm.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 16 * 2**20
MAX_DEPTH = 64

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]')
_COLON = re.compile(r"\s*:")


class Settings(BaseModel):
    """A frozen group of settings; unknown keys are refused, values are never converted between types.

    `ignored_keys` names the keys that existing MindSpeed-MM files carry and that have no effect here, with the reason.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )
    ignored_keys: ClassVar[Mapping[str, str]] = {}
    refused_keys: ClassVar[Mapping[str, str]] = {}
    """Keys that are set elsewhere, each with the end of a sentence that says where."""

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.ignored_keys}


S = TypeVar("S", bound=Settings)


def _stage_lists(value: Any) -> Any:
    """The canonical form of a `pipeline_num_layers` value; lists become tuples."""
    if value is None or value == "auto":
        return value
    if not isinstance(value, list | tuple) or not value:
        raise _stage_lists_error(value)
    if all(_is_count(n) for n in value):
        return tuple(value)
    if not all(isinstance(row, list | tuple) and row and all(_is_count(n) for n in row) for row in value):
        raise _stage_lists_error(value)
    if len({len(row) for row in value}) > 1:
        raise PydanticCustomError(
            "stage_lists",
            "has inner lists of unequal length ({lengths}); each is a virtual chunk with one entry per pipeline rank",
            {"lengths": ", ".join(str(len(row)) for row in value)},
        )
    return tuple(tuple(row) for row in value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stage_lists_error(value: Any) -> PydanticCustomError:
    return PydanticCustomError(
        "stage_lists",
        "is not a stage list; write one layer count (0 or more) per pipeline rank like [1, 10, 10, 7], "
        'one such list per virtual chunk like [[0, 0, 0, 1], [4, 4, 4, 4]], or "auto"',
    )


StageLists = Annotated[
    tuple[int, ...] | tuple[tuple[int, ...], ...] | typing.Literal["auto"] | None, BeforeValidator(_stage_lists)
]
"""Layers per stage: one count per pipeline rank, nested once more for virtual chunks, or "auto"."""

# strict validation takes no list for a tuple, but JSON knows only lists
Ints = Annotated[tuple[int, ...], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, read strictly.

    Raises:
        ConfigError: the file is missing, too large (16 MiB), not UTF-8, not JSON, nested deeper than 64, holds NaN or
            an infinite number, holds a key twice in one object, or its top level is not an object.
    """
    path = Path(path)
    where = str(path)
    try:
        size_bytes = path.stat().st_size
        raw = path.read_bytes() if size_bytes <= MAX_FILE_BYTES else b""
    except FileNotFoundError:
        raise ConfigError(where, "there is no such file.") from None
    except OSError as error:
        raise ConfigError(where, f"the file cannot be read: {error.strerror}.") from None
    if size_bytes > MAX_FILE_BYTES:
        raise ConfigError(where, f"the file has {size_bytes:,} bytes; a configuration has at most {MAX_FILE_BYTES:,}.")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(where, f"the file is not UTF-8 text (byte {error.start}).") from None
    return parse_json(text, where)


def parse_json(text: str, where: str) -> dict[str, Any]:
    """The object in a JSON text, by the rules of `read_json`; `where` is named in errors."""
    problems = _structure_problems(text)
    if problems:
        raise ConfigError(where, problems)
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
    except json.JSONDecodeError as error:
        raise ConfigError(where, f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}.") from None
    except ValueError as error:
        raise ConfigError(where, str(error)) from None
    if not isinstance(value, dict):
        raise ConfigError(where, f"the file holds {_kind(value)} at its top level, but settings are an object {{...}}.")
    return value


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number that a setting can have.")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number.")
    return value


def _structure_problems(text: str) -> list[str]:
    """Keys that stand twice in one object, and nesting too deep for the parser; works on invalid JSON as well."""
    problems: list[str] = []
    open_objects: list[dict[str, int] | None] = []
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word in "{[":
            open_objects.append({} if word == "{" else None)
            if len(open_objects) > MAX_DEPTH:
                return [f"line {_line(text, token.start())}: nested deeper than {MAX_DEPTH} levels."]
        elif word in "}]":
            if open_objects:
                open_objects.pop()
        elif open_objects and (keys := open_objects[-1]) is not None and _COLON.match(text, token.end()):
            if word in keys:
                line, first = _line(text, token.start()), _line(text, keys[word])
                problems.append(f"line {line}: key {word} stands twice in one object (first on line {first}).")
            keys[word] = token.start()
    return problems


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


# ---------------------------------------------------------------------------------------------------------------------
# Validating


def load_settings(cls: type[S], path: str | Path, notes: list[str] | None = None) -> S:
    """Settings from a JSON file.

    Args:
        notes: receives a line per key that is accepted without effect; logged at info level when not given.
    Raises:
        ConfigError: with every problem of the file.
    """
    return parse_settings(cls, read_json(path), where=str(path), notes=notes)


def parse_settings(cls: type[S], data: Mapping[str, Any], *, where: str, notes: list[str] | None = None) -> S:
    """Settings from the content of a JSON file; see `load_settings`."""
    problems: list[str] = []
    ignored: list[str] = []
    known = _known_keys(cls, data, "", problems, ignored)
    settings: S | None = None
    try:
        settings = cls.model_validate(known)
    except ValidationError as error:
        problems.extend(render_validation_error(error))
    if problems or settings is None:
        raise ConfigError(where, problems)
    if ignored:
        report = f"{where}: accepted without effect: {'; '.join(ignored)}."
        if notes is None:
            logger.info(report)
        else:
            notes.append(report)
    return settings


def _known_keys(
    cls: type[Settings], data: Mapping[str, Any], prefix: str, problems: list[str], ignored: list[str]
) -> dict[str, Any]:
    """`data` without unknown keys, which become problems; keys without effect are listed in `ignored`."""
    known: dict[str, Any] = {}
    for key, value in data.items():
        if key in cls.ignored_keys:
            ignored.append(f"{prefix}{key} ({cls.ignored_keys[key]})")
        elif key in cls.refused_keys:
            problems.append(f"{prefix}{key} {cls.refused_keys[key]}.")
        elif key not in cls.model_fields:
            problems.append(f"{prefix}{key} is not a setting{did_you_mean(key, cls.model_fields)}")
        else:
            section = _section_class(cls.model_fields[key].annotation)
            if section is not None and isinstance(value, dict):
                value = _known_keys(section, value, f"{prefix}{key}.", problems, ignored)
            known[key] = value
    return known


def _section_class(annotation: Any) -> type[Settings] | None:
    """The settings class of a field that is a section (`X` or `X | None`), else None."""
    options = (
        typing.get_args(annotation) if typing.get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    )
    return next((o for o in options if isinstance(o, type) and issubclass(o, Settings)), None)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """The end of a sentence about an unknown `word`: "; did you mean X?", or "." when nothing is close."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else "."


def render_validation_error(error: ValidationError, names: Mapping[str, str] | None = None) -> list[str]:
    """One complete sentence or more per problem that pydantic found.

    Args:
        names: what fields are called where the user wrote them, if not by their own name.
    """
    return [_render_problem(detail, names or {}) for detail in error.errors(include_url=False)]


def _render_problem(detail: Mapping[str, Any], names: Mapping[str, str]) -> str:
    name = _location(detail["loc"])
    name = names.get(name, name)
    kind, value = detail["type"], detail.get("input")
    if kind == "missing":
        return f"{name} is missing."
    if kind == "extra_forbidden":
        return f"{name} is not a setting."
    if kind == "value_error":
        # the texts of our own cross-field checks, complete sentences with the names inside
        text = str(detail["ctx"]["error"])
        return "\n".join(f"{name}.{line}" if name else line for line in text.splitlines())
    if kind == "stage_lists":
        return f"{name} = {_shown(value)} {detail['msg']}."
    if kind == "none_required":
        return f"{name} must be null: this part does not exist in the model."
    if kind == "literal_error":
        return f"{name} = {_shown(value)} is not supported; expected {detail['ctx']['expected']}."
    message = detail["msg"]
    message = message.removeprefix("Input ").removeprefix("should be").strip()
    return f"{name} = {_shown(value)} should be {message}."


def _location(loc: Sequence[int | str]) -> str:
    name = ""
    for part in loc:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
