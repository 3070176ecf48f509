"""Which frames of a clip are looked at: rules on numbers, no decoder."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindspeed_mm.errors import DataError

Segment = Sequence[float]
_TINY_S = 1e-6


@dataclass(frozen=True, slots=True)
class ClipInfo:
    """What a decoder knows of a clip before it decodes.

    Attributes:
        num_frames: exact number of frames.
        average_fps: frames per second on average.
        begin_s: display time of the first frame.
        end_s: when the last frame stops being displayed.
    """

    num_frames: int
    average_fps: float
    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        """Seconds of content."""
        return self.end_s - self.begin_s


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How densely clips are sampled.

    Attributes:
        fps: frames per second of clip.
        min_frames: at least so many frames of a clip (as far as it has them).
        max_frames: at most so many frames of all clips of one call together.
    """

    fps: float
    min_frames: int
    max_frames: int


def plain_indices(info: ClipInfo, settings: SamplingSettings) -> list[int]:
    """Frame numbers of a whole clip, spread evenly from its first to its last frame.

    Raises:
        DataError: the clip has no frames.
    """
    if info.num_frames < 1:
        raise DataError("the clip has no frames")
    target = math.ceil(info.duration_s * settings.fps - _TINY_S)
    count = min(max(target, settings.min_frames), settings.max_frames, info.num_frames)
    spread = np.linspace(0, info.num_frames - 1, max(count, 1))
    return [int(index) for index in np.unique(spread.astype(np.int32))]


def split_max_frames(durations_s: Sequence[float], max_frames: int) -> list[int]:
    """Share of every clip in the budget of a call: one each, the rest by duration, remainders to the largest parts."""
    num_clips = len(durations_s)
    rest = max_frames - num_clips
    if rest < 0 or num_clips == 0:
        return [1] * num_clips
    total = sum(durations_s)
    weights = [duration / total for duration in durations_s] if total > 0 else [1 / num_clips] * num_clips
    exact = [rest * weight for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_part = sorted(range(num_clips), key=lambda index: (shares[index] - exact[index], index))
    for index in by_part[: rest - sum(shares)]:
        shares[index] += 1
    return [1 + share for share in shares]


def check_segments(segments: object, where: str) -> list[Segment]:
    """The `segments` of a video entry as a list of [second] or [from, to].

    Raises:
        DataError: an empty list, or a segment that is no instant and no range of rising seconds from 0 on.
    """
    if not isinstance(segments, list | tuple) or not segments:
        raise DataError(f"{where}: segments = {segments!r} must be a list with at least one [from, to] or [second]")
    for segment in segments:
        is_list = isinstance(segment, list | tuple) and len(segment) in (1, 2)
        numbers = list(segment) if is_list else []
        if not is_list or any(
            isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers
        ):
            raise DataError(f"{where}: segment {segment!r} must be [from, to] or [second], in seconds")
        if min(numbers) < 0 or (len(numbers) == 2 and numbers[1] <= numbers[0]):
            raise DataError(f"{where}: segment {segment!r} must go forward from 0 seconds on")
    return list(segments)


def segment_times(segments: Sequence[Segment], settings: SamplingSettings) -> list[list[float]]:
    """Seconds of the frames of every segment, each half open: its end is not looked at."""
    total = sum(segment[1] - segment[0] for segment in segments if len(segment) == 2)
    result = []
    for segment in segments:
        if len(segment) == 1:
            result.append([float(segment[0])])
            continue
        begin, end = segment
        weight = (end - begin) / total
        count = math.ceil((end - begin) * settings.fps)
        count = max(count, max(1, round(settings.min_frames * weight)))
        count = min(count, max(1, round(settings.max_frames * weight)))
        result.append([float(time) for time in np.linspace(begin, end, count, endpoint=False)])
    return result


def clamp_times(times: Sequence[float], info: ClipInfo) -> list[float]:
    """Times moved into the clip; several may then be equal, which is kept.

    Raises:
        DataError: all times lie behind the clip's end.
    """
    last = min(info.begin_s + (info.num_frames - 1) / info.average_fps, info.end_s - _TINY_S)
    if times and min(times) >= info.end_s:
        raise DataError(
            f"the segment starts at {min(times):g} s, but the clip ends at {info.end_s:g} s; segments are in seconds"
        )
    return [min(max(time, info.begin_s), last) for time in times]


def frames_at(times: Sequence[float], frame_times: Sequence[float]) -> list[int]:
    """Number of the frame on display at each time: the last one that starts at or before it."""
    # Containers round start times to their time base; a microsecond must not select the frame before.
    return [max(bisect_right(frame_times, time + _TINY_S) - 1, 0) for time in times]
