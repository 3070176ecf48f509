"""Make the task of the quick start: drawn pictures and short encoded clips with questions whose answers are known.

A clip shows four scenes of a second, each a circle or a square of one of four colours. Questions: which colour comes
first, how many scenes show a circle, and for single pictures which colour and which shape it is.

    python examples/mossvl/make_clips.py FOLDER [--train 600] [--test 60] [--seed 0]

writes FOLDER/train.json, FOLDER/test.json (clips of another random stream) and the media they name.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mossvl_finetune.demo.make_demo import COLOURS, draw_scene, write_clip  # noqa: E402  (needs the path above)

SHAPES = ("circle", "square")
NUM_SCENES = 4
FIRST_COLOUR = "Which colour comes first?"
NUM_CIRCLES = "How many show a circle?"
COLOUR = "Which colour is it?"
SHAPE = "Which shape is it?"


def make_split(folder: Path, name: str, count: int, rng: random.Random) -> None:
    """Write `count` clips with two questions each, and half as many pictures with two questions each."""
    media = folder / name
    media.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        scenes = [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(NUM_SCENES)]
        path = media / f"{number:04d}.mp4"
        write_clip(path, [draw_scene(*scene, size=64) for scene in scenes], fps=4, seconds_each=1.0)
        videos = [f"{name}/{path.name}"]
        circles = sum(shape == "circle" for shape, _ in scenes)
        records.append({"prompt": FIRST_COLOUR, "response": scenes[0][1], "videos": videos})
        records.append({"prompt": NUM_CIRCLES, "response": str(circles), "videos": videos})
        if number % 2 == 0:
            shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            draw_scene(shape, colour, size=64).save(media / f"{number:04d}.png")
            images = [f"{name}/{number:04d}.png"]
            records.append({"prompt": COLOUR, "response": colour, "images": images})
            records.append({"prompt": SHAPE, "response": shape, "images": images})
    (folder / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the pictures, clips and questions of the MOSS-VL quick start.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=600, help="clips to learn from (default: %(default)s)")
    parser.add_argument("--test", type=int, default=60, help="clips held out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for offset, (name, count) in enumerate((("train", args.train), ("test", args.test))):
        make_split(args.folder, name, count, random.Random(2 * args.seed + offset))
    print(args.folder)


if __name__ == "__main__":
    main()
