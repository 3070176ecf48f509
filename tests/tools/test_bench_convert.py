from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.bench_convert import LAYOUTS, hf_config, main, plan_of_72b


def test_the_benchmark_prints_ratios_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--params", "tiny", "--layout", "tp2pp4", "--repeats", "1", "--dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^cp -r +[\d.]+ s .* GB/s$", text, re.MULTILINE)
    for job in ("hf_to_mm tp2pp4", "mm_to_hf tp2pp4", "resplit tp2pp4 -> tp1pp4"):
        assert re.search(rf"^{re.escape(job)} +[\d.]+ s .* x cp  peak +\d+ MiB$", text, re.MULTILINE), job
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_of_the_largest_model_is_planned_without_its_weights() -> None:
    assert plan_of_72b() < 10


@pytest.mark.parametrize(("params", "billions"), [("2b", 2.21), ("7b", 8.29), ("72b", 73.4)])
def test_the_shapes_are_those_of_the_real_models(params: str, billions: float) -> None:
    from math import prod

    from checkpoint.rules.qwen2vl import qwen2vl_rules
    from mindspeed_mm.config import Qwen2VLConfig

    rules = qwen2vl_rules(Qwen2VLConfig.from_hf(hf_config(params)))
    count = sum(prod(weight.rule.shape or ()) for weight in rules.weights)
    assert count / 1e9 == pytest.approx(billions, rel=0.005)


def test_layouts_are_of_28_layers() -> None:
    for vision, text, _ in LAYOUTS.values():
        assert (sum(map(sum, vision)), sum(map(sum, text))) == (32, 28)
