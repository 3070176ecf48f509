"""Frames of a video file by number: PyAV, or decord when it is chosen. Workers open the files they need."""

from __future__ import annotations

import stat
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from mindspeed_mm.errors import DataError, SetupError
from mindspeed_mm.models.mossvl.sampling import ClipInfo

MAX_FRAME_PIXELS = 64_000_000
MAX_CLIP_FRAMES = 4_000_000
MAX_DECODE_S = 120.0


class VideoReader(Protocol):
    """An open clip."""

    info: ClipInfo
    frame_times: list[float]
    """Display time of every frame in seconds, rising."""

    def read(self, indices: Sequence[int]) -> Tensor:
        """[len(indices), 3, h, w] uint8 RGB of these frame numbers, rising, repeats allowed."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_video(path: str | Path, backend: str = "pyav", *, num_threads: int = 4) -> VideoReader:
    """Open a clip.

    Raises:
        DataError: no such file, no readable video stream, a truncated file, or one beyond the limits of this module.
        SetupError: the backend is unknown or not installed.
    """
    path = Path(path)
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not is_file:
        raise DataError(f"{path} is not a regular file")
    if backend not in _READERS:
        raise SetupError(f"video backend {backend!r} is not known; expected one of {sorted(_READERS)}")
    reader: VideoReader = _READERS[backend](path, num_threads)
    return reader


class PyAVReader:
    """Reads with PyAV; seeks to key frames, so that far-apart frames do not cost the whole file."""

    def __init__(self, path: Path, num_threads: int) -> None:
        try:
            import av
        except ImportError:
            raise SetupError("reading videos needs PyAV: pip install av") from None
        self._path = path
        self._errors = (av.error.FFmpegError, OSError, ValueError)
        try:
            self._container: Any = av.open(str(path), metadata_errors="ignore")
        except self._errors as error:
            raise DataError(f"{path} is not a readable video: {error}") from None
        try:
            self._stream = self._video_stream()
            self._stream.thread_type = "AUTO"
            self._stream.codec_context.thread_count = num_threads
            self._scan()
        except BaseException:
            self._container.close()
            raise

    def _video_stream(self) -> Any:
        streams = self._container.streams.video
        if not streams:
            raise DataError(f"{self._path} has no video stream")
        stream = streams[0]
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise DataError(f"{self._path} has frames of {stream.width}x{stream.height} pixels; {MAX_FRAME_PIXELS:,} "
                            "are allowed")  # fmt: skip
        return stream

    def _scan(self) -> None:
        """Times of all frames and key frames from the packets' headers; nothing is decoded."""
        stamps, keys, end = [], [], 0
        try:
            for packet in self._container.demux(self._stream):
                if packet.pts is None or packet.size == 0 or packet.is_discard:
                    continue
                stamps.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
                if packet.is_keyframe:
                    keys.append(packet.pts)
                if len(stamps) > MAX_CLIP_FRAMES:
                    raise DataError(f"{self._path} has more than {MAX_CLIP_FRAMES:,} frames")
        except self._errors as error:
            raise DataError(f"{self._path} is damaged: {error}") from None
        if not stamps:
            raise DataError(f"{self._path} has no frames")
        if self._stream.frames and len(stamps) < self._stream.frames:
            raise DataError(
                f"{self._path} is truncated: its header promises {self._stream.frames} frames, it holds {len(stamps)}"
            )
        self._stamps, self._keys = sorted(stamps), sorted(keys)
        base = float(self._stream.time_base)
        self.frame_times = [stamp * base for stamp in self._stamps]
        rate = self._stream.average_rate or self._stream.guessed_rate
        begin, end_s = self.frame_times[0], max(end * base, self.frame_times[-1])
        if not rate:
            rate = len(stamps) / (end_s - begin) if end_s > begin else 24
        self.info = ClipInfo(len(stamps), float(rate), begin, end_s)

    def read(self, indices: Sequence[int]) -> Tensor:
        """See `VideoReader.read`."""
        try:
            frames = list(self._decode([self._stamps[index] for index in indices]))
        except self._errors as error:
            raise DataError(f"{self._path} cannot be decoded: {error}") from None
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()

    def _decode(self, stamps: Sequence[int]) -> Iterator[np.ndarray]:
        deadline = time.monotonic() + MAX_DECODE_S
        decoder: Iterator[Any] = iter(())
        frame: Any = None
        for stamp in stamps:
            # Seeking pays when a key frame lies between here and there.
            if frame is None or bisect_right(self._keys, stamp) > bisect_right(self._keys, frame.pts):
                self._container.seek(stamp, stream=self._stream, backward=True, any_frame=False)
                decoder, frame = self._container.decode(self._stream), None
            while frame is None or frame.pts < stamp:
                frame = next(decoder, None)
                if frame is None:
                    seconds = stamp * float(self._stream.time_base)
                    raise DataError(f"{self._path} is truncated or damaged: nothing can be decoded at {seconds:.2f} s")
                if time.monotonic() > deadline:
                    raise DataError(f"{self._path} takes more than {MAX_DECODE_S:g} s to decode")
            yield frame.to_ndarray(format="rgb24")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()


class DecordReader:
    """Reads with decord."""

    def __init__(self, path: Path, num_threads: int) -> None:
        try:
            import decord
        except ImportError:
            raise SetupError("the video backend decord is not installed: pip install decord") from None
        self._path = path
        try:
            self._reader = decord.VideoReader(str(path), num_threads=num_threads)
            num_frames = len(self._reader)
            times = self._reader.get_frame_timestamp(range(num_frames))
        except Exception as error:  # decord has its own error class, derived from Exception
            raise DataError(f"{path} is not a readable video: {str(error).splitlines()[0]}") from None
        if not num_frames:
            raise DataError(f"{path} has no frames")
        self.frame_times = [float(begin) for begin in times[:, 0]]
        fps = float(self._reader.get_avg_fps())
        self.info = ClipInfo(num_frames, fps, float(times[0, 0]), float(times[-1, 1]))

    def read(self, indices: Sequence[int]) -> Tensor:
        """See `VideoReader.read`."""
        try:
            frames = self._reader.get_batch(list(indices)).asnumpy()
        except Exception as error:
            raise DataError(f"{self._path} cannot be decoded: {str(error).splitlines()[0]}") from None
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._reader


_READERS: dict[str, type[PyAVReader] | type[DecordReader]] = {"pyav": PyAVReader, "decord": DecordReader}
