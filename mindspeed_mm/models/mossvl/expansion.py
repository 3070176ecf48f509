"""From the placeholders of a rendered conversation to the tokens of its frames, supervised spans kept in place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mindspeed_mm.errors import DataError

IMAGE, VIDEO = "<|image|>", "<|video|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
TIME_START, TIME_END = "<|time_start|>", "<|time_end|>"
NEEDED_TOKENS = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, TIME_START, TIME_END)

Kind = Literal["image", "video"]
Span = tuple[int, int]
_PLACEHOLDER = re.compile(r"<\|(image|video)(?:_pad)?\|>")


@dataclass(frozen=True, slots=True)
class ExpandedText:
    """Text ready for the tokenizer, and the spans of it that are supervised."""

    text: str
    spans: tuple[Span, ...]


def media_order(text: str) -> list[Kind]:
    """Kinds of the media that a text names, in reading order."""
    return ["image" if match.group(1) == "image" else "video" for match in _PLACEHOLDER.finditer(text)]


def time_stamps(times_s: Sequence[float]) -> str:
    """What stands for a video unit: its frames, each behind its time with one decimal."""
    frames = (f"{TIME_START}{time:.1f} seconds{TIME_END}{IMAGE_PAD}" for time in times_s)
    return VISION_START + "".join(frames) + VISION_END


def expand_text(text: str, videos: Sequence[Sequence[float]], spans: Sequence[Span] = ()) -> ExpandedText:
    """Replace every placeholder: an image by one image token, a video unit by its stamped frames.

    Args:
        videos: frame times in seconds of each video unit, in reading order.
        spans: half-open character ranges of `text` that are supervised.
    Raises:
        DataError: more or fewer video placeholders than units.
    """
    num_videos = media_order(text).count("video")
    if num_videos != len(videos):
        raise DataError(f"{num_videos} video placeholders, but {len(videos)} video units")
    remaining = iter(videos)
    moved = [list(span) for span in spans]
    parts, done, grown = [], 0, 0
    for match in _PLACEHOLDER.finditer(text):
        replacement = IMAGE_PAD if match.group(1) == "image" else time_stamps(next(remaining))
        position, change = match.start() + grown, len(replacement) - len(match.group())
        for span in moved:
            if span[0] > position:
                span[0] += change
                span[1] += change
            elif span[1] > position:
                span[1] += change
        parts += [text[done : match.start()], replacement]
        done = match.end()
        grown += change
    return ExpandedText("".join(parts) + text[done:], tuple((start, end) for start, end in moved))


def supervised_labels(
    input_ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: Sequence[Span],
    *,
    image_token_id: int,
    vision_start_id: int,
    vision_end_id: int,
) -> list[int]:
    """The token's own id where it overlaps a span, -100 elsewhere and on everything that stands for vision.

    Args:
        offsets: half-open character range of each token; (0, 0) on padding.
    """
    labels = [-100] * len(input_ids)
    for start, end in spans:
        is_vision = False
        for index, (token, (token_start, token_end)) in enumerate(zip(input_ids, offsets, strict=True)):
            if not (token_end > start and token_start < end):
                continue
            if token == vision_start_id:
                is_vision = True
            elif token == vision_end_id:
                is_vision = False
            elif not is_vision and token != image_token_id:
                labels[index] = token
    return labels
