"""Draw small pictures with questions and answers: the data of the quick start.

Every picture shows one to four equal shapes on a grid of cells. A record asks for their shape, colour and number, and
for the position when there is one shape. Records have the LLaVA-like form that `data.json` describes: `messages` with
role and content, and `images`. The pictures of the held-out part never occur in the training part, pixel for pixel.

    python examples/quickstart/make_pictures.py OUT_DIR [--train 8000] [--held-out 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 30),
    "purple": (140, 40, 170),
    "black": (20, 20, 20),
}
COUNTS = ("one", "two", "three", "four")
CELL_SIZE = 28
"""Pixels; one cell becomes one image token (patch 14, merged two by two)."""
FRAME_SIZE = 2
FRAME_COLOUR = (110, 110, 110)
"""Every picture is framed: the vision tower knows relative positions only, and on an even background nothing else
tells it where a corner is."""

QUESTIONS = {
    "shape": "What shape is it?",
    "colour": "What colour is it?",
    "count": "How many are there?",
    "position": "Where is it?",
}
POSITIONS = ("top left", "top right", "bottom left", "bottom right")
ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "count": COUNTS,
    "position": POSITIONS,
}
"""Possible answers of each kind of question; one over their number is the chance level."""

SIZES = ((2, 2), (3, 2), (2, 3), (3, 3))
"""Rows and columns of cells: pictures of 56x56 to 84x84 pixels."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What one picture shows; `cells` are (row, column) of the grid, with the offset of each shape in pixels."""

    grid: tuple[int, int]
    shape: str
    colour: str
    cells: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[int, int], ...]
    radius: int
    background: tuple[int, int, int]

    def answers(self) -> dict[str, str]:
        """The right answer for every kind of question that this picture allows."""
        answers = {"shape": self.shape, "colour": self.colour, "count": COUNTS[len(self.cells) - 1]}
        if len(self.cells) == 1:
            (row, column), (rows, columns) = self.cells[0], self.grid
            answers["position"] = f"{'top' if row == 0 else 'bottom'} {'left' if column == 0 else 'right'}"
            assert row in (0, rows - 1)
            assert column in (0, columns - 1)
        return answers


def draw_scene(rng: random.Random) -> Scene:
    """A random scene; a lone shape sits in a corner cell, so that its position has one right name."""
    rows, columns = grid = rng.choice(SIZES)
    count = rng.choice((1, 1, 2, 3, 4))
    if count == 1:
        cells = [(rng.choice((0, rows - 1)), rng.choice((0, columns - 1)))]
    else:
        cells = rng.sample([(row, column) for row in range(rows) for column in range(columns)], count)
    radius = rng.randint(8, 10)
    free = CELL_SIZE // 2 - radius - FRAME_SIZE - 1
    return Scene(
        grid=grid,
        shape=rng.choice(SHAPES),
        colour=rng.choice(tuple(COLOURS)),
        cells=tuple(cells),
        offsets=tuple((rng.randint(-free, free), rng.randint(-free, free)) for _ in cells),
        radius=radius,
        background=(rng.randint(205, 255), rng.randint(205, 255), rng.randint(205, 255)),
    )


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB."""
    rows, columns = scene.grid
    width, height = columns * CELL_SIZE, rows * CELL_SIZE
    picture = Image.new("RGB", (width, height), scene.background)
    canvas, r, fill = ImageDraw.Draw(picture), scene.radius, COLOURS[scene.colour]
    canvas.rectangle((0, 0, width - 1, height - 1), outline=FRAME_COLOUR, width=FRAME_SIZE)
    for (row, column), (dx, dy) in zip(scene.cells, scene.offsets, strict=True):
        x = column * CELL_SIZE + CELL_SIZE // 2 + dx
        y = row * CELL_SIZE + CELL_SIZE // 2 + dy
        if scene.shape == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif scene.shape == "square":
            canvas.rectangle((x - r + 1, y - r + 1, x + r - 1, y + r - 1), fill=fill)
        elif scene.shape == "triangle":
            canvas.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
        else:
            arm = max(2, r // 3)
            canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    return picture


def make_record(scene: Scene, image: str, rng: random.Random) -> dict[str, object]:
    """One conversation about one picture: every question that it allows, in random order; the picture comes first."""
    kinds = list(scene.answers().items())
    rng.shuffle(kinds)
    messages = []
    for turn, (kind, answer) in enumerate(kinds):
        prefix = "<image>" if turn == 0 else ""
        messages.append({"role": "user", "content": prefix + QUESTIONS[kind]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": [image]}


def make_pictures(out_dir: str | Path, *, num_train: int, num_held_out: int, seed: int) -> None:
    """Write `train.json`, `held_out.json`, `questions.json` and the PNG files under `images/`; the seed decides all.

    `questions.json` lists every question about the held-out pictures on its own: `image`, `kind`, `question`, `answer`.
    Image paths are relative to `out_dir` (`dataset_dir` in data.json).
    """
    out_dir, rng = Path(out_dir), random.Random(seed)
    seen: set[bytes] = set()
    questions: list[dict[str, object]] = []
    for part, number in (("held_out", num_held_out), ("train", num_train)):
        (out_dir / "images" / part).mkdir(parents=True, exist_ok=True)
        records: list[dict[str, object]] = []
        while len(records) < number:
            scene = draw_scene(rng)
            picture = render(scene)
            digest = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            name = f"images/{part}/{len(records):05d}.png"
            picture.save(out_dir / name)
            records.append(make_record(scene, name, rng))
            if part == "held_out":
                questions += [
                    {"image": name, "kind": kind, "question": QUESTIONS[kind], "answer": answer}
                    for kind, answer in scene.answers().items()
                ]
        _write_json(out_dir / f"{part}.json", records)
    _write_json(out_dir / "questions.json", questions)


def _write_json(path: Path, content: list[dict[str, object]]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """The command line: draw both parts and print what was written."""
    parser = argparse.ArgumentParser(description="Draw pictures with questions and answers for the quick start.")
    parser.add_argument("out_dir", help="the directory to write")
    parser.add_argument("--train", type=int, default=8000, help="training pictures (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="held-out pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    make_pictures(args.out_dir, num_train=args.train, num_held_out=args.held_out, seed=args.seed)
    print(f"{args.out_dir}: {args.train} training and {args.held_out} held-out pictures")


if __name__ == "__main__":
    main()
