"""One record of either format as a checked conversation with its media."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import DataError

IMAGE, VIDEO = "<|image|>", "<|video|>"
ROLES = ("system", "user", "assistant", "tool")
_PROMPT_KEYS = ("prompt", "response", "images", "videos", "system_prompt")
_CONVERSATION_KEYS = ("conversations", "images", "videos")

VideoEntry = str | dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with string contents, and the media that their placeholders stand for, in reading order.

    Attributes:
        messages: `role`, `content` and, from an assistant, optional `tool_calls`.
        images: absolute paths. videos: absolute paths, or dictionaries with an absolute `video_path`.
    """

    messages: tuple[Message, ...]
    images: tuple[str, ...]
    videos: tuple[VideoEntry, ...]


def to_conversation(columns: Mapping[str, Any], media_root: Path) -> Conversation:
    """The conversation of a record, media placed and counted.

    Args:
        columns: format 1 (`prompt`, `response`, optional `system_prompt`) or format 2 (`conversations`), each with
            optional `images` and `videos`.
        media_root: what relative paths are joined to.
    Raises:
        DataError: a record of neither or both formats, an unknown role, nothing to learn, or media that do not match
            the placeholders.
    """
    has_turns = columns.get("conversations") is not None
    _check_keys(columns, _CONVERSATION_KEYS if has_turns else _PROMPT_KEYS, has_turns)
    images = [_resolved(path, media_root, "images") for path in _list(columns, "images")]
    videos = [_resolved_video(entry, media_root) for entry in _list(columns, "videos")]
    units = [_num_units(entry) for entry in videos]
    if has_turns:
        messages = [_message(turn, number) for number, turn in enumerate(_turns(columns["conversations"]))]
        expand_video_placeholders(messages, units)
    else:
        messages = _prompt_messages(columns, len(images), sum(units))
    _check_turns(messages)
    for token, given, what in ((IMAGE, len(images), "images"), (VIDEO, sum(units), "video clips or segments")):
        found = sum(message["content"].count(token) for message in messages)
        if found != given:
            raise DataError(f"the text has {found} {token}, but the record has {given} {what}")
    return Conversation(tuple(messages), tuple(images), tuple(videos))


def expand_video_placeholders(messages: Sequence[Message], units: Sequence[int]) -> None:
    """Repeat the k-th `<|video|>` in reading order for every segment of entry k.

    Only when there is one placeholder per entry and some entry has several segments; every other text stays as it is.
    """
    found = sum(message["content"].count(VIDEO) for message in messages)
    if sum(units) == len(units) or found != len(units):
        return
    remaining = iter(units)
    for message in messages:
        first, *rest = message["content"].split(VIDEO)
        message["content"] = first + "".join(VIDEO * next(remaining) + part for part in rest)


def _check_keys(columns: Mapping[str, Any], known: tuple[str, ...], has_turns: bool) -> None:
    if has_turns and (others := [key for key in ("prompt", "response", "system_prompt") if key in columns]):
        raise DataError(f"the record mixes both formats: 'conversations' and {others}; keep one of them")
    if not has_turns and not ("prompt" in columns and "response" in columns):
        raise DataError(
            f"the record has keys {sorted(columns)}; expected 'prompt' and 'response', or 'conversations' (not null)"
        )
    for key in columns:
        # Other keys are the user's own (ids, sources); one that looks like ours is a slip that would lose media.
        close = [] if key in known else difflib.get_close_matches(key, known, n=1, cutoff=0.8)
        if close:
            raise DataError(f"'{key}' is not a key of this format; did you mean '{close[0]}'?")


def _list(columns: Mapping[str, Any], key: str) -> list[Any]:
    value = columns.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise DataError(f"{key} = {value!r} must be a list")
    return value


def _resolved(path: Any, root: Path, where: str) -> str:
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise DataError(f"{where} holds {path!r}, which is not a path")
    if "://" in path or path.startswith("data:"):
        raise DataError(f"{where} holds {path[:80]!r}; media are read from files, not from addresses")
    return str((root / path).absolute())


def _resolved_video(entry: Any, root: Path) -> VideoEntry:
    if not isinstance(entry, dict):
        return _resolved(entry, root, "videos")
    if "video_path" not in entry:
        raise DataError(f"a video entry has keys {sorted(entry)}; expected 'video_path' and optional 'segments'")
    return {**entry, "video_path": _resolved(entry["video_path"], root, "videos")}


def _num_units(entry: VideoEntry) -> int:
    segments = entry.get("segments") if isinstance(entry, dict) else None
    if segments is None:
        return 1
    if not isinstance(segments, list) or not segments:
        raise DataError(f"segments = {segments!r} must be a list with at least one [from, to] or [second]")
    return len(segments)


def _prompt_messages(columns: Mapping[str, Any], num_images: int, num_units: int) -> list[Message]:
    for key in ("prompt", "response", "system_prompt"):
        value = columns.get(key, "")
        if not isinstance(value, str) and not (key == "system_prompt" and value is None):
            raise DataError(f"{key} = {value!r} must be text")
    content = f"{IMAGE}\n" * num_images + f"{VIDEO}\n" * num_units + columns["prompt"]
    system = [{"role": "system", "content": columns["system_prompt"]}] if columns.get("system_prompt") else []
    return [
        *system,
        {"role": "user", "content": content},
        {"role": "assistant", "content": columns["response"]},
    ]


def _turns(turns: Any) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise DataError("conversations must be a list with at least one message")
    return turns


def _message(turn: Any, number: int) -> Message:
    where = f"conversations[{number}]"
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise DataError(f"{where} must be an object with 'role' and 'content'")
    if turn["role"] not in ROLES:
        raise DataError(f"{where} has the unknown role {turn['role']!r}; expected one of {', '.join(ROLES)}")
    message = {"role": turn["role"], "content": _text(turn["content"], turn["role"], where)}
    if turn["role"] == "assistant" and turn.get("tool_calls"):
        message["tool_calls"] = turn["tool_calls"]
    return message


def _text(content: Any, role: str, where: str) -> str:
    """String content as it is; the items of a list one after another, media as placeholders."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise DataError(f"{where}.content must be text or a list of items")
    parts = []
    for item in content:
        if isinstance(item, str):
            parts.append(item)
        elif isinstance(item, dict) and isinstance(item.get("text"), str):
            parts.append(item["text"])
        elif isinstance(item, dict) and item.get("type") in ("image", "video") and role in ("user", "tool"):
            parts.append(f"<|{item['type']}|>")
        else:
            raise DataError(f"{where}.content has the item {item!r}; expected text, or an image or video of the user")
    return "".join(parts)


def _check_turns(messages: Sequence[Message]) -> None:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise DataError("no message of the assistant: there is nothing to learn")
    if any(not message["content"].strip() and not message.get("tool_calls") for message in answers):
        raise DataError("an answer of the assistant is empty")
    if messages[0]["role"] == "assistant":
        raise DataError("the conversation starts with an answer; a user message must come first")
