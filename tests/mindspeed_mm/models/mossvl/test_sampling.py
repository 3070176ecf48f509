"""Which frames of a clip are looked at (test vector 5)."""

import pytest

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.sampling import (
    ClipInfo,
    SamplingSettings,
    check_segments,
    clamp_times,
    frames_at,
    plain_indices,
    segment_times,
    split_max_frames,
)


def clip(num_frames: int, fps: float, duration_s: float) -> ClipInfo:
    return ClipInfo(num_frames, fps, 0.0, duration_s)


def rule(fps: float = 1.0, min_frames: int = 1, max_frames: int = 256) -> SamplingSettings:
    return SamplingSettings(fps, min_frames, max_frames)


def test_plain_clips() -> None:
    indices = plain_indices(clip(250, 25, 10.0), rule())
    assert indices == [0, 27, 55, 83, 110, 138, 166, 193, 221, 249]
    assert " ".join(f"{index / 25:.1f}" for index in indices) == "0.0 1.1 2.2 3.3 4.4 5.5 6.6 7.7 8.8 10.0"
    indices = plain_indices(clip(310, 25, 12.4), rule())
    assert (len(indices), indices[:7], indices[-1]) == (13, [0, 25, 51, 77, 103, 128, 154], 309)
    indices = plain_indices(clip(3000, 30, 100.1), rule())
    assert (len(indices), indices[-1], f"{indices[-1] / 30:.1f}") == (101, 2999, "100.0")
    indices = plain_indices(clip(90000, 25, 3600.0), rule())
    assert [f"{index / 25:.1f}" for index in indices[:6]] == ["0.0", "14.1", "28.2", "42.3", "56.4", "70.6"]
    assert (len(indices), f"{indices[-1] / 25:.1f}") == (256, "3600.0")
    assert plain_indices(clip(25, 25, 1.0), rule()) == [0]
    assert plain_indices(clip(10, 25, 0.4), rule()) == [0]


@pytest.mark.parametrize(
    ("settings", "count"), [(rule(fps=2), 20), (rule(min_frames=16), 16), (rule(fps=2, max_frames=8), 8)]
)
def test_counts(settings: SamplingSettings, count: int) -> None:
    assert len(plain_indices(clip(250, 25, 10.0), settings)) == count


@pytest.mark.parametrize(
    ("segments", "settings", "expected"),
    [
        ([[0, 10]], rule(), [[float(t) for t in range(10)]]),
        ([[20, 30]], rule(), [[float(t) for t in range(20, 30)]]),
        ([[0, 2.5]], rule(), [[0, 2.5 / 3, 5 / 3]]),
        ([[0, 10], [20, 50]], rule(max_frames=20), [[0, 2, 4, 6, 8], list(range(20, 50, 2))]),
        ([[0, 1], [5, 8], [9]], rule(min_frames=8), [[0, 0.5], [5, 5.5, 6, 6.5, 7, 7.5], [9]]),
        ([[0, 10]], rule(max_frames=4), [[0, 2.5, 5, 7.5]]),
        ([[0, 30], [30, 60]], rule(max_frames=5), [[0, 15], [30, 45]]),
    ],
)
def test_segments(segments: list[list[float]], settings: SamplingSettings, expected: list[list[float]]) -> None:
    times = segment_times(segments, settings)
    assert [len(unit) for unit in times] == [len(unit) for unit in expected]
    for unit, wanted in zip(times, expected, strict=True):
        assert unit == pytest.approx(wanted)


def test_times_are_moved_into_the_clip() -> None:
    info = clip(250, 25, 10.0)
    assert clamp_times([8, 9, 10, 11], info) == pytest.approx([8, 9, 9.96, 9.96])
    with pytest.raises(DataError, match="clip ends at 10 s"):
        clamp_times([12.0, 13.0], info)


def test_the_frame_on_display_is_taken() -> None:
    assert frames_at([0, 0.39, 0.4, 0.79, 5], [0, 0.4, 0.8]) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("durations", "budget", "shares"),
    [
        ([10, 30], 256, [65, 191]),
        ([10, 20, 30], 10, [2, 3, 5]),
        ([5, 5, 5], 2, [1, 1, 1]),
        ([0, 0], 9, [5, 4]),
        ([], 9, []),
    ],
)
def test_clips_share_the_frames_of_a_call(durations: list[float], budget: int, shares: list[int]) -> None:
    assert split_max_frames(durations, budget) == shares


@pytest.mark.parametrize(
    "segments", [[], None, [[3, 3]], [[3, 2]], [[-1, 2]], [["0", "1"]], [[1, 2, 3]], [5], "0-5", [[0, float("nan")]]]
)
def test_impossible_segments_are_refused(segments: object) -> None:
    with pytest.raises(DataError):
        check_segments(segments, "clip.mp4")


def test_an_empty_clip_is_refused() -> None:
    with pytest.raises(DataError, match="no frames"):
        plain_indices(clip(0, 25, 0.0), rule())
