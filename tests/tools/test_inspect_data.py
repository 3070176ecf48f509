"""The report on one sample."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from tools.inspect_data import main
from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `data.json` and `model.json`, over two records: a picture question and a bad one."""
    directory = tmp_path_factory.mktemp("inspect")
    checkpoint = make_tiny_checkpoint(directory / "hf", tied=True, seed=0, size="nano")
    model = Qwen2VLConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    (directory / "model.json").write_text(model.model_dump_json())
    Image.new("RGB", (84, 84), "red").save(directory / "red.png")
    turns = [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "Red."}]
    records = [{"conversations": turns, "images": [name]} for name in ("red.png", "gone.png")]
    (directory / "records.json").write_text(json.dumps(records))
    data: dict[str, Any] = {
        "dataset_param": {
            "dataset_type": "huggingface",
            "preprocess_parameters": {"model_name_or_path": str(checkpoint)},
            "basic_parameters": {"dataset": str(directory / "records.json"), "dataset_dir": str(directory)},
            "attr": {"images": "images"},
        },
        "dataloader_param": {"collate_param": {"model_name": "qwen2vl"}},
    }
    (directory / "data.json").write_text(json.dumps(data))
    return directory


def run(files: Path, *more: str) -> int:
    return main(["--data", str(files / "data.json"), "--model", str(files / "model.json"), *more])


def test_report_shows_tokens_labels_and_positions(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files) == 0
    text = capsys.readouterr().out
    assert "patch grids: 1x6x6" in text
    assert "pixel_values: [36, 1176]" in text
    rows = [line.split() for line in text.splitlines() if "'<|image_pad|>'" in line or line.strip() == "..."]
    assert [row[0] == "..." for row in rows] == [False, True, False]  # 9 tokens: the first, the last, dots between
    first, last = rows[0], rows[-1]
    assert int(last[0]) - int(first[0]) == 8
    assert [int(b) - int(a) for a, b in zip(first[2:5], last[2:5], strict=True)] == [0, 2, 2]
    assert "labels: Red.<|im_end|>\n" in text


def test_bad_record_ends_with_its_exit_code_and_name(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files, "--index", "1") == 12
    assert "DataError: " in (error := capsys.readouterr().err)
    assert "records.json[1]: gone.png does not exist" in error
    assert run(files, "--index", "2") == 2


def test_it_runs_as_a_script(files: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "inspect_data.py"), "--data", str(files / "data.json")]
    done = subprocess.run(
        [*command, "--model", str(files / "model.json")], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
