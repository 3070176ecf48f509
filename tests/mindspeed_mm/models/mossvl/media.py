"""Pictures and encoded clips with known contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_grey_clip(
    path: Path,
    levels: Sequence[int],
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 64),
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """A clip with one plain grey frame per level; width and height are `size`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options or {"crf": "10", "g": "12"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for level in levels:
            pixels = np.full((size[1], size[0], 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_picture(path: Path, size: tuple[int, int] = (96, 64), seed: int = 0) -> Path:
    """A picture of noise; width and height are `size`."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path
