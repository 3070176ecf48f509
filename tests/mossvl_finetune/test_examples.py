"""The quick start, the demo and the launch scripts, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mindspeed_mm.models.mossvl.hf.checkpoint import load_processor
from mindspeed_mm.models.mossvl.hf.video_reader import open_video
from mossvl_finetune.data import build_data
from mossvl_finetune.demo.make_demo import COLOURS
from mossvl_finetune.demo.make_demo import main as make_demo
from tests.mossvl_finetune.test_train import data_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = REPOSITORY / "mossvl_finetune" / "demo"


def run(script: str, timeout: int, **variables: str) -> str:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        ["bash", str(REPOSITORY / script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_demo_media_are_those_of_its_script(tmp_path: Path) -> None:
    make_demo(tmp_path)
    for name in ("images/circle.png", "images/square.png", "images/triangle.jpg"):
        made, kept = (np.asarray(Image.open(folder / name).convert("RGB")).astype(int) for folder in (tmp_path, DEMO))
        assert np.abs(made - kept).max() <= 8, name
    for name in ("videos/colours.mp4", "videos/shapes.mp4"):
        with open_video(tmp_path / name) as made, open_video(DEMO / name) as kept:
            assert made.info == kept.info
    with open_video(DEMO / "videos/colours.mp4") as clip:
        middles = clip.read([5, 15, 25, 35])[:, :, 48, 48].tolist()
    for pixel, colour in zip(middles, ("red", "green", "blue", "yellow"), strict=True):
        assert pixel == pytest.approx(COLOURS[colour], abs=12)


def test_the_demo_records_are_usable(nano_moss: Path) -> None:
    processor = load_processor(str(nano_moss))
    dataset, collate = build_data(data_arguments(DEMO / "sft_data.json"), processor, vision_chunked_length=64)
    batch = collate([dataset[index] for index in range(len(dataset))])
    assert batch["media_nums_per_sample"] == [1, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("script", ["run_sft.sh", "run_sft_lora.sh"])
def test_the_launch_scripts(script: str, nano_moss: Path, tmp_path: Path) -> None:
    path = REPOSITORY / "mossvl_finetune" / "scripts" / script
    environment = {**os.environ, "MODEL": str(nano_moss), "OUTPUT": str(tmp_path), "PYTHON": sys.executable}
    environment |= {"WORKERS": "0", "BF16": "False", "ACCUMULATION": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        ["bash", str(path), "--use_cpu", "True", "--max_steps", "2"], env=environment, check=True, timeout=300
    )
    weights = "adapter_model.safetensors" if "lora" in script else "model.safetensors"
    assert (tmp_path / weights).is_file()
    failed = subprocess.run(
        ["bash", str(path), "--use_cpu", "True", "--lora_r", "0", "--lora_enable", "True"],
        env=environment,
        check=False,
        timeout=300,
    )
    assert failed.returncode == 2


def test_every_configuration_is_valid() -> None:
    for path in sorted((REPOSITORY / "configs" / "mossvl").rglob("*.json")):
        assert json.loads(path.read_text(encoding="utf-8")), path
    for stage in (2, 3):
        path = REPOSITORY / "configs" / "mossvl" / f"ds_config_zero{stage}.json"
        assert json.loads(path.read_text(encoding="utf-8"))["zero_optimization"]["stage"] == stage


@pytest.mark.slow
def test_the_quick_start_learns(tmp_path: Path) -> None:
    printed = run("examples/mossvl/run_tiny.sh", timeout=900, FOLDER=str(tmp_path / "run"))
    shares = [float(share) for share in re.findall(r"([\d.]+)%  of  180  all questions", printed)]
    assert len(shares) == 2
    assert shares[0] < 20
    assert shares[1] > 90
