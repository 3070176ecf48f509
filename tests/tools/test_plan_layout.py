from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tools.plan_layout import main

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "configs" / "qwen2vl" / "7b" / "model.json")


def test_given_and_best_lists_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--pp", "4", "--dp", "2", "--gbs", "192"]) == 0
    text = capsys.readouterr().out
    assert "given lists: vision [32, 0, 0, 0], text [1, 10, 10, 7]" in text
    assert "best lists: vision [32, 0, 0, 0], text [7, 8, 7, 6]" in text
    assert "1,453,814,272    778,055,168      1.971      0.970  patch_embed, projector, token_embed" in text
    # 778 M trained parameters: 4 bytes of gradient each, 12 of optimizer state over two replicas
    assert "   0      2.71       2.90       4.35" in text
    assert "77.7% of the ideal" in text
    assert "96.2% of the ideal" in text
    assert text.rstrip().endswith("With the best lists a step takes 80.8% of the time of the given ones.")


def test_virtual_chunks_without_lists_get_the_best_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--pp", "4", "--vpp", "2"]) == 0
    text = capsys.readouterr().out
    assert "is a flat list; 2 virtual chunks need one list per chunk" in text
    assert "best lists: vision [[32, 0, 0, 0], [0, 0, 0, 0]]" in text
    assert "schedule: interleaved 1F1B" in text
    assert "given lists:" not in text


def test_longer_samples_with_more_pictures_are_more_work(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", MODEL, "--pp", "4", "--seq", "4096", "--images", "3", "--image-size", "560x840"])
    assert "4,096 tokens per sample, 1,800 from 3 pictures, 2,296 with a label" in capsys.readouterr().out
    main(["--model", MODEL, "--pp", "4", "--images", "0"])
    assert "no picture, 1,024 with a label" in capsys.readouterr().out


def test_lists_that_are_the_best_are_shown_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(Path(MODEL).read_text())
    content["text_decoder"]["pipeline_num_layers"] = [7, 8, 7, 6]
    path = tmp_path / "model.json"
    path.write_text(json.dumps(content))
    main(["--model", str(path), "--pp", "4"])
    text = capsys.readouterr().out
    assert text.count("schedule: 1F1B") == 1
    assert "given lists, which are the best found" in text


def test_the_schedule_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, png = tmp_path / "schedule.svg", tmp_path / "schedule.png"
    assert main(["--model", MODEL, "--pp", "4", "--draw", str(svg), str(png)]) == 0
    assert "bubble 38.2% with 8 micro-batches, 85.0% of ideal" in svg.read_text()
    assert "rank 0: vision 0-31, text 0-0" in svg.read_text()
    with Image.open(png) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    # forward and backward
    assert {(0x4C, 0x78, 0xA8), (0xF5, 0x85, 0x18)} <= colours


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pp", "4", "--tp", "8"], "num_query_groups = 4 is not divisible by the tensor-parallel size 8"),
        (["--pp", "4", "--gbs", "5", "--dp", "2"], "--gbs 5 is not a multiple of --mbs x --dp = 2"),
        (["--pp", "4", "--vpp", "2", "--gbs", "6"], "6 micro-batches are not a multiple of the pipeline size 4"),
        (["--pp", "4", "--images", "5"], "image_tokens = 1280 must lie between 0 and tokens = 1024"),
        (["--pp", "4", "--image-size", "448"], "--image-size 448 should be like 448x448"),
        (["--pp", "64"], "60 layers cannot be dealt to 64 stages"),
        (["--pp", "4", "--draw", "schedule.pdf"], "the name should end in .svg or .png"),
    ],
)
def test_what_cannot_be_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, *words]) == 2
    assert message in capsys.readouterr().err
