"""Make the media of the demo: drawn pictures and encoded clips whose contents are known.

    python mossvl_finetune/demo/make_demo.py [FOLDER]

The files beside this script were written by it; nothing in them was taken from elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 210, 40),
}
BACKGROUND = (235, 235, 235)


def draw_scene(shape: str | None, colour: str, size: int = 96) -> Image.Image:
    """A shape ("circle", "square", "triangle" or None for none) of a colour on a light ground."""
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw, low, high = ImageDraw.Draw(image), size // 5, size - size // 5
    fill = COLOURS[colour]
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        draw.rectangle((low, low, high, high), fill=fill)
    elif shape == "triangle":
        draw.polygon([(size // 2, low), (high, high), (low, high)], fill=fill)
    return image


def write_clip(path: Path, frames: Sequence[Image.Image], *, fps: int = 10, seconds_each: float = 1.0) -> None:
    """Encode the pictures as H.264, each shown for `seconds_each`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "g": "10"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            for _ in range(round(fps * seconds_each)):
                frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
                container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main(folder: Path) -> None:
    """Write the pictures and clips that `sft_data.json` names."""
    images, videos = folder / "images", folder / "videos"
    for directory in (images, videos):
        directory.mkdir(parents=True, exist_ok=True)
    draw_scene("circle", "red").save(images / "circle.png")
    draw_scene("square", "blue").save(images / "square.png")
    draw_scene("triangle", "green").save(images / "triangle.jpg", quality=92)
    write_clip(videos / "colours.mp4", [draw_scene("square", colour) for colour in ("red", "green", "blue", "yellow")])
    shown = ("circle", "circle", None, "triangle", "triangle", "triangle")
    write_clip(videos / "shapes.mp4", [draw_scene(shape, "blue") for shape in shown])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
