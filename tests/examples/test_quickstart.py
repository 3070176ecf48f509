"""The quick start: its pictures, its evaluation, and a short run from end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from examples.quickstart.evaluate import Question, choose_examples, main, render_table, score
from examples.quickstart.make_pictures import ANSWERS, COLOURS, COUNTS, QUESTIONS, make_pictures
from tools.make_tiny_checkpoint import make_tiny_checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    make_pictures(directory, num_train=300, num_held_out=60, seed=3)
    return directory


def read(path: Path) -> list[dict]:
    content: list[dict] = json.loads(path.read_text())
    return content


def test_held_out_pictures_are_not_in_the_training_part(pictures: Path) -> None:
    pixels = {
        part: {Image.open(path).tobytes() + repr(Image.open(path).size).encode() for path in files}
        for part in ("train", "held_out")
        if (files := list((pictures / "images" / part).glob("*.png")))
    }
    assert (len(pixels["train"]), len(pixels["held_out"])) == (300, 60), "no picture occurs twice"
    assert not pixels["train"] & pixels["held_out"]


def test_records_are_conversations_about_one_picture(pictures: Path) -> None:
    for record in read(pictures / "train.json"):
        assert set(record) == {"messages", "images"}
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert [message["content"].startswith("<image>") for message in record["messages"][::2]].count(True) == 1
        assert record["messages"][0]["content"].startswith("<image>")
        (image,) = record["images"]
        width, height = Image.open(pictures / image).size
        assert width % 28 == height % 28 == 0, "nothing is resized on the way to the model"
        assert 56 <= min(width, height) <= max(width, height) <= 84


def test_the_answers_are_what_the_picture_shows(pictures: Path) -> None:
    questions = read(pictures / "questions.json")
    assert {question["kind"] for question in questions} == set(QUESTIONS) == set(ANSWERS)
    assert all(question["answer"] in ANSWERS[question["kind"]] for question in questions)
    by_image: dict[str, dict[str, str]] = {}
    for question in questions:
        by_image.setdefault(question["image"], {})[question["kind"]] = question["answer"]
    for image, answers in by_image.items():
        picture = Image.open(pictures / image)
        cells = cells_with(picture, COLOURS[answers["colour"]])
        assert len(cells) == COUNTS.index(answers["count"]) + 1
        assert ("position" in answers) is (len(cells) == 1)
        if len(cells) == 1:
            (column, row) = cells.pop()
            assert answers["position"] == f"{'top' if row == 0 else 'bottom'} {'left' if column == 0 else 'right'}"


def cells_with(picture: Image.Image, colour: tuple[int, int, int]) -> set[tuple[int, int]]:
    """The 28-pixel cells (column, row) that hold a pixel of this colour."""
    return {
        (x // 28, y // 28)
        for x in range(picture.width)
        for y in range(picture.height)
        if picture.getpixel((x, y)) == colour
    }


def test_the_seed_decides_every_file(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_pictures(tmp_path / name, num_train=5, num_held_out=3, seed=seed)
    first, second, other = (
        {path.relative_to(tmp_path / n): path.read_bytes() for path in (tmp_path / n).rglob("*.*")} for n in "abc"
    )
    assert first == second
    assert first != other


def test_scores_stand_beside_what_a_constant_answer_reaches() -> None:
    questions = [
        Question(f"{i}.png", "colour", "?", answer) for i, answer in enumerate(["red", "red", "blue", "green"])
    ]
    questions.append(Question("0.png", "count", "?", "two"))
    colour, count = score(questions, ["red", "", "", "", "two"], ["red", "red", "blue", "red", "one"])
    assert (colour.kind, colour.number, colour.chance, colour.before, colour.after) == ("colour", 4, 0.5, 0.25, 0.75)
    assert (count.number, count.before, count.after) == (1, 1.0, 0.0)


def test_examples_take_turns_among_kinds_and_pictures(pictures: Path) -> None:
    questions = [Question(**entry) for entry in read(pictures / "questions.json")]
    chosen = [questions[row] for row in choose_examples(questions, 8)]
    assert len({question.image for question in chosen}) == 8
    assert set(Counter(question.kind for question in chosen).values()) == {2}


def test_tables_are_aligned() -> None:
    assert render_table(("a", "b"), [("long", "x"), ("s", "")]) == "a     b\nlong  x\ns"


def test_an_untrained_model_fails_and_the_report_is_self_contained(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = make_tiny_checkpoint(tmp_path / "start", tied=True, seed=0, size="nano")
    report = tmp_path / "report.html"
    command = ["--data", pictures, "--before", start, "--after", start, "--report", report]
    assert main([str(part) for part in command]) == 1
    output = capsys.readouterr()
    assert "at least 90% wanted" in output.err
    for kind in QUESTIONS:
        assert re.search(rf"^{kind} +\d+ +[\d.]+% +[\d.]+% +[\d.]+%$", output.out, re.MULTILINE)
    page = report.read_text()
    assert page.count("data:image/png;base64,") == 12
    assert "http" not in page


def test_a_short_run_goes_from_nothing_to_a_report(tmp_path: Path) -> None:
    """Two steps teach nothing, so the script ends with 1; every result lies where it says."""
    environment = os.environ | {
        "MM_VENV": "active",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RUN": str(tmp_path / "run"),
        "TRAIN_ITERS": "2",
        "NUM_TRAIN": "40",
        "NUM_HELD_OUT": "8",
    }
    result = subprocess.run(
        ["bash", str(ROOT / "examples/quickstart/run.sh")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1, result.stdout + result.stderr
    listed = re.findall(r"^  (\S+) {3,}", result.stdout.split("Where everything lies:")[1], re.MULTILINE)
    assert len(listed) == 7
    assert all(Path(path).exists() for path in listed)
    assert (tmp_path / "run/save/latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert (tmp_path / "run/save/metrics.jsonl").exists()
    assert (tmp_path / "run/trained/tokenizer.json").read_bytes() == (
        tmp_path / "run/start/tokenizer.json"
    ).read_bytes()
