"""Clips encoded here, read back by frame number and time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mindspeed_mm.errors import DataError, SetupError
from mindspeed_mm.models.mossvl.hf import MossVLVideoProcessor
from mindspeed_mm.models.mossvl.hf.video_processing import VideoUnit, num_units
from mindspeed_mm.models.mossvl.hf.video_reader import open_video
from tests.mindspeed_mm.models.mossvl.media import write_grey_clip

LEVELS = [4 * index for index in range(60)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_grey_clip(tmp_path_factory.mktemp("clips") / "grey.mp4", LEVELS)


def levels(frames: torch.Tensor) -> list[int]:
    """Grey level of each frame, to the nearest of those that were encoded."""
    return [round(float(value) / 4) * 4 for value in frames.float().mean((1, 2, 3))]


def test_every_frame_comes_back(clip: Path) -> None:
    with open_video(clip) as reader:
        assert reader.info.num_frames == 60
        assert reader.info.average_fps == 10
        assert reader.info.duration_s == pytest.approx(6.0)
        frames = reader.read(list(range(60)))
    assert frames.shape == (60, 3, 64, 64)
    assert frames.dtype == torch.uint8
    assert levels(frames) == LEVELS


@pytest.mark.parametrize("indices", [[59], [0, 59], [11, 12, 13, 35], [5, 5, 5], [47, 48, 59]])
def test_chosen_frames_come_back(clip: Path, indices: list[int]) -> None:
    with open_video(clip) as reader:
        assert levels(reader.read(indices)) == [LEVELS[index] for index in indices]


@pytest.mark.parametrize(
    ("codec", "suffix", "options"),
    [("mpeg4", "avi", {}), ("libvpx-vp9", "webm", {"g": "20"}), ("libx264", "mkv", {"bf": "3", "g": "30"})],
)
def test_other_containers(tmp_path: Path, codec: str, suffix: str, options: dict[str, str]) -> None:
    path = write_grey_clip(tmp_path / f"clip.{suffix}", LEVELS[:40], codec=codec, options=options)
    with open_video(path) as reader:
        assert reader.info.num_frames == 40
        read = levels(reader.read([0, 17, 39]))
    assert all(abs(found - LEVELS[index]) <= 4 for found, index in zip(read, (0, 17, 39), strict=True))


def processor(**settings: object) -> MossVLVideoProcessor:
    return MossVLVideoProcessor(**settings)  # type: ignore[arg-type]


def test_a_plain_clip_is_sampled_evenly(clip: Path) -> None:
    (unit,) = processor().read_units([str(clip)])
    indices = [0, 11, 23, 35, 47, 59]
    assert unit.times_s == pytest.approx([index / 10 for index in indices])
    assert levels(unit.frames) == [LEVELS[index] for index in indices]


def test_segments_are_half_open_seconds(clip: Path) -> None:
    entry = {"video_path": str(clip), "segments": [[0, 2], [3.05, 5.05], [5.5], [5, 9]]}
    units = processor().read_units([entry])
    assert num_units(entry) == 4
    assert [unit.times_s for unit in units[:3]] == [(0, 1), pytest.approx((3.05, 4.05)), (5.5,)]
    assert units[3].times_s == pytest.approx((5, 5.9, 5.9, 5.9))
    assert [levels(unit.frames) for unit in units] == [
        *[[0, 40], [LEVELS[30], LEVELS[40]], [LEVELS[55]], [LEVELS[50], *[LEVELS[59]] * 3]]
    ]


def test_clips_of_one_call_share_the_frames(clip: Path, tmp_path: Path) -> None:
    short = write_grey_clip(tmp_path / "short.mp4", LEVELS[:20])
    units = processor(video_fps=5.0, max_frames=10).read_units([str(clip), {"video_path": str(short)}])
    assert [len(unit.frames) for unit in units] == [7, 3]


def test_patches_grid_and_times(clip: Path) -> None:
    features = processor(max_frames=3)([str(clip), VideoUnit(torch.zeros(2, 3, 32, 96, dtype=torch.uint8), (0.5, 1.5))])
    assert features["video_grid_thw"].tolist() == [[2, 4, 4], [2, 4, 8]]
    assert features["pixel_values_videos"].shape == (2 * 16 + 2 * 32, 768)
    assert features["timestamps"] == [[0.0, 5.9], [0.5, 1.5]]


def test_bare_frames_are_stamped_at_24_per_second() -> None:
    (unit,) = processor().read_units([torch.zeros(3, 3, 64, 64, dtype=torch.uint8)])
    assert unit.times_s == (0, 1 / 24, 2 / 24)


def truncated(clip: Path, target: Path, share: float) -> Path:
    content = clip.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def test_damaged_and_missing_files_are_refused(clip: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a clip", encoding="utf-8")
    (tmp_path / "empty.mp4").touch()
    cases = {
        "text.mp4": "not a readable video",
        "empty.mp4": "not a readable video",
        "none.mp4": "No such file",
        ".": "not a regular file",
        "cut.mp4": "not a readable video|no video stream",
    }
    truncated(clip, tmp_path / "cut.mp4", 0.6)
    for name, message in cases.items():
        with pytest.raises(DataError, match=message):
            open_video(tmp_path / name)


def test_a_clip_cut_behind_its_header_is_refused(tmp_path: Path) -> None:
    whole = write_grey_clip(
        tmp_path / "whole.mp4", LEVELS, options={"crf": "10", "movflags": "faststart"}, size=(128, 128)
    )
    # The header first, so that it is read and then found to promise more than there is.
    import av

    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    cut = truncated(tmp_path / "fast.mp4", tmp_path / "cut.mp4", 0.7)
    with pytest.raises(DataError, match="truncated"), open_video(cut) as reader:
        reader.read([59])


def test_sound_without_pictures_is_refused(tmp_path: Path) -> None:
    import av
    import numpy as np

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="no video stream"):
        open_video(tmp_path / "sound.mp4")


def test_a_segment_behind_the_end_is_refused(clip: Path) -> None:
    with pytest.raises(DataError, match=r"grey.mp4.*starts at 7 s.*ends at 6 s"):
        processor().read_units([{"video_path": str(clip), "segments": [[7, 9]]}])


def test_decord_gives_the_same_frames(clip: Path) -> None:
    with open_video(clip) as ours, open_video(clip, "decord") as theirs:
        assert theirs.info.num_frames == ours.info.num_frames
        assert theirs.info.average_fps == pytest.approx(ours.info.average_fps)
        assert theirs.info.duration_s == pytest.approx(ours.info.duration_s, abs=0.01)
        assert theirs.frame_times == pytest.approx(ours.frame_times, abs=0.01)
        assert levels(theirs.read([0, 11, 59])) == levels(ours.read([0, 11, 59]))
    (unit,) = processor(video_backend="decord").read_units([{"video_path": str(clip), "segments": [[2, 4]]}])
    assert (unit.times_s, levels(unit.frames)) == ((2, 3), [LEVELS[20], LEVELS[30]])


def test_decord_refuses_what_is_no_clip(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a clip", encoding="utf-8")
    with pytest.raises(DataError, match="not a readable video"):
        open_video(tmp_path / "text.mp4", "decord")


def test_backends_are_named(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SetupError, match=r"'vhs'.*decord.*pyav"):
        open_video(clip, "vhs")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(SetupError, match="pip install decord"):
        open_video(clip, "decord")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SetupError, match="pip install av"):
        open_video(clip)
