"""The iteration line is Megatron's to the letter, and what scripts do with it still works."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import pytest

from mindspeed_mm.config import LoggingConfig
from mindspeed_mm.training.metrics import IterationMetrics, Reporter, format_log_line, plot_loss, read_metrics

METRICS = IterationMetrics(
    iteration=7,
    train_iters=10000,
    consumed_samples=1344,
    elapsed_ms=2456.78,
    learning_rate=1.25e-6,
    global_batch_size=192,
    loss=1.234567,
    grad_norm=4.5678,
    tokens_per_sample=812.5,
    tokens_per_second=63500.0,
    supervised_tokens=1000,
    throughput_tflops=1.26,
    params_norm=77.1234,
)
NOW = datetime(2026, 1, 2, 3, 4, 5)


def test_line_has_every_field_in_its_format() -> None:
    assert format_log_line(METRICS, LoggingConfig(log_tps=True), NOW) == (
        " [2026-01-02 03:04:05] iteration        7/   10000 | consumed samples:         1344 |"
        " elapsed time per iteration (ms): 2456.8 | learning rate: 1.250000E-06 | global batch size:   192 |"
        " tokens per sample: 8.125000E+02 | loss: 1.234567E+00 | loss scale: 1.0 | grad norm: 4.568 |"
        " num zeros: 0.0 | number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_optional_fields_stand_where_megatron_puts_them() -> None:
    line = format_log_line(METRICS, LoggingConfig(log_throughput=True, log_params_norm=True), NOW)
    assert "(ms): 2456.8 | throughput per GPU (TFLOP/s/GPU): 1.3 | learning rate" in line
    assert "num zeros: 0.0 | params norm: 77.123 | number of skipped" in line
    assert "tokens per sample" not in line


def test_loss_that_is_no_number_is_left_out() -> None:
    line = format_log_line(dataclasses.replace(METRICS, loss=float("nan")), LoggingConfig(), NOW)
    assert " loss:" not in line


def test_scripts_find_the_elapsed_time_in_the_fifth_colon_field() -> None:
    line = format_log_line(METRICS, LoggingConfig(log_tps=True), NOW)
    assert float(line.split(":")[4].split("|")[0]) == 2456.8
    assert float(line.split("tokens per sample:")[1].split("|")[0]) == 812.5


def test_reporter_keeps_the_past_of_a_resumed_run_and_drops_what_is_repeated(tmp_path: Path) -> None:
    first = Reporter(LoggingConfig(), tmp_path)
    for iteration in (1, 2, 3):
        first.iteration(dataclasses.replace(METRICS, iteration=iteration, loss=float(iteration)))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 4, "lo')  # a crash in the middle of a line
    again = Reporter(LoggingConfig(), tmp_path, start_iteration=2)
    again.iteration(dataclasses.replace(METRICS, iteration=3, loss=9.0))
    again.close()
    assert [(row["iteration"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_validation_is_reported_with_perplexity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="mindspeed_mm.training.metrics")
    reporter = Reporter(LoggingConfig(), tmp_path)
    reporter.validation("iteration 5", 5, {"loss": 0.5})
    reporter.close()
    dashes, line, _ = caplog.records[-1].getMessage().split("\n")
    assert line == " validation loss at iteration 5 | loss value: 5.000000E-01 | loss PPL: 1.648721E+00 | "
    assert set(dashes) == {"-"}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "validation": "iteration 5",
        "validated_at": 5,
        "loss": 0.5,
    }
    assert plot_loss(tmp_path) is None
