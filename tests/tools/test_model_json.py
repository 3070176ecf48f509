from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.config import Qwen2VLConfig, load_settings, parse_settings
from mindspeed_mm.errors import ConfigError
from tools.model_json import main, model_json_from_hf, stage_list, to_json_text, write_model_json

from ..mindspeed_mm.config.test_qwen2vl import HUB_7B

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(HUB_7B))
    return directory


def test_the_content_is_a_model() -> None:
    content = model_json_from_hf(HUB_7B)
    assert parse_settings(Qwen2VLConfig, content, where="model.json") == Qwen2VLConfig.from_hf(HUB_7B)


def test_lists_and_freezes_are_written() -> None:
    content = model_json_from_hf(
        HUB_7B, vision_layers_list=[32, 0], text_layers_list=[8, 20], freeze_vision=False, freeze_text=True
    )
    model = parse_settings(Qwen2VLConfig, content, where="model.json")
    assert model.image_encoder is not None
    assert model.image_encoder.vision_encoder.pipeline_num_layers == (32, 0)
    assert model.text_decoder.pipeline_num_layers == (8, 20)
    freezes = (
        model.image_encoder.vision_encoder.freeze,
        model.image_encoder.vision_projector.freeze,
        model.text_decoder.freeze,
    )
    assert freezes == (False, True, True)


def test_the_command_writes_a_file_that_loads(hf_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "model.json"
    words = ["--from-hf", str(hf_dir), "-o", str(output), "--pp", "4", "--train-projector"]
    assert main([*words, "--vision-layers-list", "32,0,0,0", "--text-layers-list", "1,10,10,7"]) == 0
    model = load_settings(Qwen2VLConfig, output)
    assert model.text_decoder.pipeline_num_layers == (1, 10, 10, 7)
    assert model.image_encoder is not None
    assert not model.image_encoder.vision_projector.freeze
    assert "21-27  final_norm, lm_head" in capsys.readouterr().out


def test_a_fixed_layout_holds_the_lists_that_auto_chooses(hf_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.json"
    assert main(["--from-hf", str(hf_dir), "-o", str(output), "--pp", "4", "--layout", "fixed"]) == 0
    assert load_settings(Qwen2VLConfig, output).text_decoder.pipeline_num_layers == (6, 8, 8, 6)


def test_an_error_ends_with_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-hf", str(tmp_path), "-o", str(tmp_path / "model.json")]) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", "auto"), ("1,10,7", [1, 10, 7]), ("[4,0]", [4, 0]), ("0,1/4,4", [[0, 1], [4, 4]])],
)
def test_lists_on_the_command_line(text: str, expected: object) -> None:
    assert stage_list(text) == expected


def test_another_word_is_no_list() -> None:
    with pytest.raises(ConfigError, match="is not a stage list"):
        stage_list("half")


def test_innermost_lists_stand_on_one_line() -> None:
    content = {"a": [1, 2], "b": [[1], [2, 3]], "c": {"d": []}, "e": "[1,\\n"}
    text = to_json_text(content)
    assert '"a": [1, 2],' in text
    assert json.loads(text) == content


def test_both_tools_run_as_scripts(hf_dir: Path, tmp_path: Path) -> None:
    for words in (
        ["tools/model_json.py", "--from-hf", str(hf_dir), "-o", str(tmp_path / "model.json")],
        ["tools/show_plan.py", "--model", "configs/qwen2vl/7b/model.json", "--pp", "4"],
    ):
        subprocess.run([sys.executable, *words], check=True, cwd=ROOT, capture_output=True)


def test_the_tiny_settings_are_those_of_a_tiny_checkpoint(tmp_path: Path) -> None:
    from tools.make_tiny_checkpoint import make_tiny_checkpoint

    shipped = ROOT / "configs" / "qwen2vl" / "tiny" / "model.json"
    directory = make_tiny_checkpoint(tmp_path / "tiny", tied=False, seed=0)
    written = write_model_json(
        directory,
        tmp_path / "model.json",
        vision_layers_list=[4, 0],
        text_layers_list=[1, 5],
        freeze_vision=False,
        freeze_projector=False,
    )
    assert written.read_text() == shipped.read_text()
