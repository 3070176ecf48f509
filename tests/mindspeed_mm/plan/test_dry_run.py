from __future__ import annotations

import re

import pytest

from mindspeed_mm.config import parse_command_line
from mindspeed_mm.plan import StagePlan, render_dry_run

from ..config.launch import WORLD_SIZES, script_words


def report(size: str, *words: str) -> str:
    world_size = ["--dry-run", "--world-size", str(WORLD_SIZES[size])]
    run = parse_command_line([*script_words(size), *world_size, *words], {})
    return render_dry_run(run, StagePlan.build(run.model, run.parallel))


@pytest.mark.parametrize("size", ["2b", "7b", "72b"])
def test_the_shipped_recipes_are_reported(size: str) -> None:
    text = report(size)
    assert "stage  pp  vp  vision  text" in text
    assert re.search(rf"^processes  {WORLD_SIZES[size]} = TP", text, re.MULTILINE)
    assert "(not found on this machine)" in text
    assert "Memory per process in GiB, estimated" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_the_batch_arithmetic_is_shown() -> None:
    assert "1 per micro-batch x 96 micro-batches x 2 replicas = 192 samples per step" in report("7b")
    assert "8 = TP 1 x PP 4 x CP 1 x DP 2" in report("7b")
    assert "10,000 = 1,920,000 samples; learning rate 1e-05, cosine, warm-up 1,000 steps" in report("7b")


def test_parameters_of_every_stage_are_shown() -> None:
    lines = report("7b").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("stage"))
    assert lines[start].split()[-3:] == ["parameters", "trained", "parts"]
    assert lines[start + 1].split()[5:7] == ["1,453,814,272", "778,055,168"]


def test_a_better_balance_is_suggested() -> None:
    assert '"auto" would choose vision [32, 0, 0, 0], text [6, 8, 8, 6], on average 96%.' in report("7b")
    assert '"auto" would choose' not in report("2b")


def test_notes_are_at_the_end() -> None:
    assert report("2b", "--num-layers", "24").splitlines()[-1] == (
        "[INFO] --num-layers 24 has no effect: model.json says text_decoder.num_layers = 28."
    )
