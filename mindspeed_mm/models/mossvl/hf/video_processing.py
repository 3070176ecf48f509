"""Video processor of MOSS-VL: whole clips or segments of clips to stamped frames and patches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from mindspeed_mm.errors import DataError
from mindspeed_mm.models.mossvl.hf.image_processing import _without_types, merge_size_limits
from mindspeed_mm.models.mossvl.hf.video_reader import VideoReader, open_video
from mindspeed_mm.models.mossvl.pixels import patchify, resize, video_sizes
from mindspeed_mm.models.mossvl.sampling import (
    SamplingSettings,
    check_segments,
    clamp_times,
    frames_at,
    plain_indices,
    segment_times,
    split_max_frames,
)

VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
FPS_OF_BARE_FRAMES = 24


@dataclass(frozen=True, slots=True)
class VideoUnit:
    """Frames that share one placeholder: a clip, or one segment of a clip.

    Attributes:
        frames: [t, 3, h, w] uint8.
        times_s: what is written before each frame.
    """

    frames: Tensor
    times_s: tuple[float, ...]


VideoEntry = str | Path | Mapping[str, Any] | VideoUnit | Tensor


class MossVLVideoProcessor(BaseImageProcessor):
    """Clips to normalised patches, one grid row per clip or segment.

    Args:
        size: `shortest_edge` and `longest_edge`, least and most pixels of a frame.
        video_max_pixels: pixels of all frames of one call together; None: `longest_edge` for each unit.
        video_fps, min_frames, max_frames: `sampling.SamplingSettings`.
        num_extract_threads: decoder threads.
        video_backend: "pyav" or "decord"; not written to files.
    """

    model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012

    def __init__(
        self,
        size: dict[str, int] | None = None,
        video_max_pixels: int | None = None,
        patch_size: int = 16,
        temporal_patch_size: int = 1,
        merge_size: int = 2,
        video_fps: float = 1.0,
        min_frames: int = 1,
        max_frames: int = 256,
        num_extract_threads: int = 4,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        video_backend: str = "pyav",
        **kwargs: Any,
    ) -> None:
        super().__init__(**_without_types(kwargs))
        self.size = merge_size_limits(size, None, None)
        self.video_max_pixels = video_max_pixels
        self.patch_size = patch_size
        self.temporal_patch_size = temporal_patch_size
        self.merge_size = merge_size
        self.video_fps = video_fps
        self.min_frames = min_frames
        self.max_frames = max_frames
        self.num_extract_threads = num_extract_threads
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.video_backend = video_backend

    def __call__(self, videos: Sequence[VideoEntry], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        """See `preprocess`."""
        return self.preprocess(videos, **kwargs)

    def preprocess(
        self, videos: Sequence[VideoEntry], min_pixels: int | None = None, max_pixels: int | None = None, **_: Any
    ) -> BatchFeature:
        """Patches of one call's clips, which share the budgets of frames and pixels.

        Returns:
            `pixel_values_videos` [p, 3 * patch^2] float32, `video_grid_thw` [units, 3] int64, and `timestamps`, the
            seconds of every frame of every unit.
        Raises:
            DataError: a clip that cannot be read, or frames that are too small or too narrow.
        """
        units = self.read_units(videos)
        limits = merge_size_limits(self.size, min_pixels, max_pixels)
        sizes = video_sizes(
            [(unit.frames.shape[0], unit.frames.shape[2], unit.frames.shape[3]) for unit in units],
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
            budget=self.video_max_pixels,
            factor=self.patch_size * self.merge_size,
        )
        patches = [
            patchify(
                resize(unit.frames, *size),
                patch_size=self.patch_size,
                merge_size=self.merge_size,
                mean=self.image_mean,
                std=self.image_std,
            )
            for unit, size in zip(units, sizes, strict=True)
        ]
        grids = [
            [unit.frames.shape[0], height // self.patch_size, width // self.patch_size]
            for unit, (height, width) in zip(units, sizes, strict=True)
        ]
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(patches),
                "video_grid_thw": torch.tensor(grids),
                "timestamps": [list(unit.times_s) for unit in units],
            }
        )

    def read_units(self, videos: Sequence[VideoEntry]) -> list[VideoUnit]:
        """Decode the sampled frames of all entries, in order; a segmented entry gives one unit per segment."""
        readers: list[VideoReader | None] = [None] * len(videos)
        settings = self._sampling(self.max_frames)
        try:
            for index, entry in enumerate(videos):
                if not isinstance(entry, VideoUnit | Tensor):
                    path = entry_path(entry)
                    readers[index] = open_video(path, self.video_backend, num_threads=self.num_extract_threads)
            durations = [_sampled_duration(entry, reader) for entry, reader in zip(videos, readers, strict=True)]
            shares = split_max_frames(durations, settings.max_frames) if len(videos) > 1 else [settings.max_frames]
            units: list[VideoUnit] = []
            for entry, reader, share in zip(videos, readers, shares, strict=False):
                units += self._units_of(entry, reader, self._sampling(share))
            return units
        finally:
            for reader in readers:
                if reader is not None:
                    reader.__exit__(None, None, None)

    def _sampling(self, max_frames: int) -> SamplingSettings:
        if self.video_max_pixels is not None:
            max_frames = min(max_frames, max(self.video_max_pixels // self.size["shortest_edge"], 1))
        return SamplingSettings(self.video_fps, self.min_frames, max_frames)

    def _units_of(self, entry: VideoEntry, reader: VideoReader | None, settings: SamplingSettings) -> list[VideoUnit]:
        if isinstance(entry, VideoUnit):
            return [entry]
        if isinstance(entry, Tensor):
            return [VideoUnit(entry, tuple(index / FPS_OF_BARE_FRAMES for index in range(len(entry))))]
        if reader is None:
            raise AssertionError("every file has a reader")
        info = reader.info
        segments = entry_segments(entry)
        if segments is None:
            indices = plain_indices(info, settings)
            return [VideoUnit(reader.read(indices), tuple(index / info.average_fps for index in indices))]
        units = []
        for times in segment_times(segments, settings):
            try:
                shown = clamp_times(times, info)
            except DataError as error:
                raise DataError(f"{entry_path(entry)}: {error}") from None
            indices = frames_at(shown, reader.frame_times)
            units.append(VideoUnit(reader.read(indices), tuple(shown)))
        return units

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint's file holds."""
        output = super().to_dict()
        output.pop("image_processor_type", None)
        output.pop("video_backend", None)
        output["video_processor_type"] = type(self).__name__
        return output

    def save_pretrained(self, save_directory: str | os.PathLike[str], *_: Any, **__: Any) -> list[str]:
        """Write `video_preprocessor_config.json`."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        path = Path(save_directory) / VIDEO_PROCESSOR_FILE
        self.to_json_file(path)
        return [str(path)]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """Read `video_preprocessor_config.json` of a checkpoint."""
        kwargs.setdefault("image_processor_filename", VIDEO_PROCESSOR_FILE)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)


def entry_path(entry: VideoEntry) -> Path:
    """File of a video entry.

    Raises:
        DataError: an entry that is no path and no dictionary with `video_path`.
    """
    if isinstance(entry, Mapping):
        entry = entry.get("video_path")  # type: ignore[assignment]
    if not isinstance(entry, str | Path) or not str(entry):
        raise DataError(f"a video must be a path or {{'video_path': path, 'segments': [...]}}, not {entry!r}")
    return Path(entry)


def entry_segments(entry: VideoEntry) -> list[Sequence[float]] | None:
    """Segments of a video entry; None: the whole clip. A dictionary without `segments` is a plain path."""
    if not isinstance(entry, Mapping) or entry.get("segments") is None:
        return None
    return check_segments(entry["segments"], str(entry.get("video_path")))


def num_units(entry: VideoEntry) -> int:
    """Video units, that is placeholders, of an entry."""
    segments = entry_segments(entry)
    return 1 if segments is None else len(segments)


def _sampled_duration(entry: VideoEntry, reader: VideoReader | None) -> float:
    """Seconds that count when several entries share the frame budget: what is looked at, not what is skipped."""
    if reader is None:
        return len(entry.frames if isinstance(entry, VideoUnit) else entry) / FPS_OF_BARE_FRAMES  # type: ignore[arg-type]
    segments = entry_segments(entry)
    if segments is None:
        return reader.info.duration_s
    return float(sum(segment[1] - segment[0] for segment in segments if len(segment) == 2))
