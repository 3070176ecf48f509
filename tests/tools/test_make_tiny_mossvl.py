"""The small MOSS-VL checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_mm.models.mossvl.hf.checkpoint import load_model, load_processor
from tools.make_tiny_mossvl import make_tiny_mossvl

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("size", "parameters"), [("tiny", 3_004_582), ("nano", 476_564)])
def test_the_checkpoint_loads(size: str, parameters: int, tmp_path: Path) -> None:
    model = load_model(str(make_tiny_mossvl(tmp_path, size=size)), dtype="float32")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    processor = load_processor(str(tmp_path))
    assert model.config.image_token_id == processor.image_token_id
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (
        make_tiny_mossvl(tmp_path / name, size="nano", seed=seed) / "model.safetensors"
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_the_families_share_a_command(tmp_path: Path) -> None:
    script = [sys.executable, str(REPOSITORY / "tools" / "make_tiny_checkpoint.py"), str(tmp_path / "out")]
    subprocess.run([*script, "--family", "mossvl", "--size", "nano"], check=True, cwd=tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "moss_vl"
    done = subprocess.run([*script, "--family", "mossvl", "--tied"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--tied" in done.stderr
