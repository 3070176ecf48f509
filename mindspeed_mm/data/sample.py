"""The one form that every raw record takes before anything else sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from mindspeed_mm.config.data import Attributes
from mindspeed_mm.data.records import Record
from mindspeed_mm.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")


class Role(StrEnum):
    """Who speaks."""

    USER = "user"
    OBSERVATION = "observation"
    ASSISTANT = "assistant"
    FUNCTION = "function"


class MediaKind(StrEnum):
    """What a medium is; the value is the word in its placeholder."""

    IMAGE = "image"
    VIDEO = "video"

    @property
    def placeholder(self) -> str:
        """What stands for one medium in the text of a message."""
        return f"<{self.value}>"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn's half: what one side says."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Medium:
    """One picture or video of a sample."""

    kind: MediaKind
    path: Path


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: prompts (user, observation) and answers (assistant, function) in turn."""

    name: str
    """The record it comes from."""
    system: str
    """System prompt; empty means the template's default."""
    messages: tuple[Message, ...]
    """Prompt, answer, prompt, answer, ...; never empty."""
    media: tuple[Medium, ...]
    """In the order of their placeholders in the messages."""


class UnusableSampleError(Exception):
    """A sample vanishes from the set by a documented rule; the run goes on and counts it.

    Not a DataError: those stop the run.
    """

    def __init__(self, name: str, reason: str, detail: str) -> None:
        self.name = name
        self.reason = reason
        """The same text for all samples of one kind, so that they can be counted."""
        self.detail = detail
        """What was found in this sample."""
        super().__init__(name, reason, detail)

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}: {self.detail}"


def to_sample(record: Record, attr: Attributes, dataset_dir: Path) -> Sample:
    """The sample of a record in the "sharegpt" form.

    Even messages must be the user's or an observation, odd ones the assistant's or a function call, and the last one an
    answer. A system prompt is the first message's (with the system tag), else the system column's. A medium's path is
    taken under `dataset_dir` if a file is there, else as it is.

    Raises:
        UnusableSampleError: roles in a wrong order, no message, or no answer at the end; MindSpeed-MM drops them too.
        DataError: the record lacks columns or keys, a value has a wrong type, or media and placeholders do not match.
    """
    messages, system = _messages(record, attr)
    answers = {attr.assistant_tag: Role.ASSISTANT, attr.function_tag: Role.FUNCTION}
    prompts = {attr.user_tag: Role.USER, attr.observation_tag: Role.OBSERVATION}
    spoken: list[Message] = []
    for number, message in enumerate(messages):
        tag, content = _tag_and_content(record, message, number, attr)
        expected = answers if number % 2 else prompts
        if tag not in expected:
            choices = " or ".join(f'"{choice}"' for choice in expected if choice is not None)
            detail = f'message {number} is from "{tag}" where {choices} must speak (attr.*_tag)'
            raise UnusableSampleError(record.name, "prompts and answers do not alternate", detail)
        spoken.append(Message(expected[tag], content))
    if not spoken or len(spoken) % 2:
        raise UnusableSampleError(record.name, "does not end with an answer", f"{len(spoken)} messages")
    return Sample(record.name, system, tuple(spoken), _media(record, spoken, attr, dataset_dir))


def _messages(record: Record, attr: Attributes) -> tuple[list[Any], str]:
    """The messages without the system prompt, and the system prompt."""
    if attr.messages not in record.columns:
        columns = ", ".join(record.columns) or "none"
        raise DataError(f'{record.name}: no column "{attr.messages}" (attr.messages); its columns are: {columns}')
    messages = record.columns[attr.messages]
    if not isinstance(messages, list):
        raise DataError(f'{record.name}: column "{attr.messages}" is not a list of messages but {_kind(messages)}')
    if attr.system_tag is not None and messages:
        tag, content = _tag_and_content(record, messages[0], 0, attr)
        if tag == attr.system_tag:
            return messages[1:], content
    system = record.columns.get(attr.system) if attr.system is not None else None
    if system is not None and not isinstance(system, str):
        raise DataError(f'{record.name}: column "{attr.system}" is not text but {_kind(system)}')
    return messages, system or ""


def _tag_and_content(record: Record, message: Any, number: int, attr: Attributes) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{record.name}: message {number} is not an object but {_kind(message)}")
    values = []
    for name, key in (("role_tag", attr.role_tag), ("content_tag", attr.content_tag)):
        value = message.get(key)
        if not isinstance(value, str):
            found = f"the keys {', '.join(message)}" if key not in message else _kind(value)
            raise DataError(f'{record.name}: message {number} needs text under "{key}" (attr.{name}), but has {found}')
        values.append(value)
    return values[0], values[1]


def _media(record: Record, messages: list[Message], attr: Attributes, dataset_dir: Path) -> tuple[Medium, ...]:
    """The media in the order of their placeholders, which must be as many."""
    columns = {MediaKind.IMAGE: attr.images, MediaKind.VIDEO: attr.videos}
    paths = {kind: _paths(record, column, dataset_dir) for kind, column in columns.items()}
    order = [kind for message in messages for kind in placeholders(message.content)]
    for kind, column in columns.items():
        placed, given = order.count(kind), len(paths[kind])
        if placed != given:
            raise DataError(
                f'{record.name}: {placed} {kind.placeholder} in the messages, but {given} paths in column "{column}" '
                f"(attr.{kind}s)"
            )
    iterators = {kind: iter(paths[kind]) for kind in columns}
    return tuple(Medium(kind, next(iterators[kind])) for kind in order)


def _paths(record: Record, column: str | None, dataset_dir: Path) -> list[Path]:
    value = record.columns.get(column) if column is not None else None
    if value is None:
        return []
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f'{record.name}: column "{column}" must hold paths, but has {_kind(value)}')
    return [resolve_media_path(name, dataset_dir, record.name) for name in names]


def resolve_media_path(name: str, dataset_dir: Path, record_name: str) -> Path:
    """`dataset_dir/name` if that file exists, else `name` itself, relative to the working directory or absolute.

    Raises:
        DataError: the name is a URL or holds a zero byte; nothing is ever fetched.
    """
    if _URL.match(name) or "\0" in name:
        raise DataError(f"{record_name}: {name[:80]!r} is not a file path; media are read from local files only")
    inside = dataset_dir / name
    return inside if inside.is_file() else Path(name)


_PLACEHOLDER = re.compile("|".join(kind.placeholder for kind in MediaKind))


def placeholders(text: str) -> list[MediaKind]:
    """The kinds of media that a message's text mentions, in order."""
    return [MediaKind(found[1:-1]) for found in _PLACEHOLDER.findall(text)]


def split_at_placeholders(text: str) -> list[str]:
    """The text between placeholders: one more piece than `placeholders` gives."""
    return _PLACEHOLDER.split(text)


def _kind(value: Any) -> str:
    words = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a truth value"}
    return words.get(type(value), "a number")
