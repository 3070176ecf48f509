from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.plan import StagePlan
from tools.show_plan import main

MODEL = str(Path(__file__).parents[2] / "configs" / "qwen2vl" / "7b" / "model.json")


def test_the_plan_is_printed_with_parameters_and_balance(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--pp", "4"]) == 0
    text = capsys.readouterr().out
    assert "1,453,814,272    778,055,168  patch_embed, projector, token_embed" in text
    assert "Work per pipeline rank, against the slowest: 20% 100% 100% 87%" in text


def test_the_plan_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--pp", "4", "--tp", "2", "--json"]) == 0
    plan = StagePlan.from_json(capsys.readouterr().out)
    assert (plan.pp_size, plan.tp_size) == (4, 2)


def test_a_broken_plan_ends_with_exit_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", MODEL, "--pp", "3"]) == 2
    assert "must equal --pipeline-model-parallel-size = 3" in capsys.readouterr().err
