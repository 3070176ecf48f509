"""One way out for every metric: the log line, metrics.jsonl, and the trackers that were asked for."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from mindspeed_mm.config import LoggingConfig

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"


@dataclass(frozen=True, slots=True)
class IterationMetrics:
    """What one iteration reports."""

    iteration: int
    train_iters: int
    consumed_samples: int
    elapsed_ms: float
    learning_rate: float
    global_batch_size: int
    loss: float
    grad_norm: float
    tokens_per_sample: float
    tokens_per_second: float
    supervised_tokens: int
    loss_scale: float = 1.0
    num_zeros: float = 0.0
    skipped_iterations: int = 0
    nan_iterations: int = 0
    params_norm: float | None = None
    throughput_tflops: float | None = None


def format_log_line(metrics: IterationMetrics, logging_config: LoggingConfig, now: datetime | None = None) -> str:
    """Megatron's iteration line, field by field: scripts split it by ':' and '|' and count fields.

    A loss that is negative or not a number is left out, as there.
    """
    stamp = (now or datetime.now()).strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f" [{stamp}] iteration {metrics.iteration:8d}/{metrics.train_iters:8d} |",
        f" consumed samples: {metrics.consumed_samples:12d} |",
        f" elapsed time per iteration (ms): {metrics.elapsed_ms:.1f} |",
    ]
    if metrics.throughput_tflops is not None and logging_config.log_throughput:
        parts.append(f" throughput per GPU (TFLOP/s/GPU): {metrics.throughput_tflops:.1f} |")
    parts += [
        f" learning rate: {metrics.learning_rate:.6E} |",
        f" global batch size: {metrics.global_batch_size:5d} |",
    ]
    if logging_config.log_tps:
        parts.append(f" tokens per sample: {metrics.tokens_per_sample:.6E} |")
    if metrics.loss >= 0:
        parts.append(f" loss: {metrics.loss:.6E} |")
    parts += [
        f" loss scale: {metrics.loss_scale:.1f} |",
        f" grad norm: {metrics.grad_norm:.3f} |",
        f" num zeros: {metrics.num_zeros:.1f} |",
    ]
    if metrics.params_norm is not None and logging_config.log_params_norm:
        parts.append(f" params norm: {metrics.params_norm:.3f} |")
    parts += [
        f" number of skipped iterations: {metrics.skipped_iterations:3d} |",
        f" number of nan iterations: {metrics.nan_iterations:3d} |",
    ]
    return "".join(parts)


class Reporter:
    """Writes what the last rank knows; on other ranks it is not created.

    Args:
        logging_config: which fields and trackers were asked for.
        save: the run's directory, where metrics.jsonl and loss.png go; None writes neither.
        start_iteration: entries of metrics.jsonl after it are dropped: a resumed run replaces what it repeats.
    """

    def __init__(self, logging_config: LoggingConfig, save: Path | None, *, start_iteration: int = 0) -> None:
        self.config = logging_config
        self.save = save
        self._file: TextIO | None = None
        self._started = time.monotonic()
        self._first_iteration = start_iteration
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
            kept = [row for row in _read_rows(save) if _iteration_of(row) <= start_iteration]
            self._file = (save / METRICS_FILE).open("w", encoding="utf-8")
            for row in kept:
                self._write(row)
        self._trackers = _open_trackers(logging_config)

    def iteration(self, metrics: IterationMetrics) -> None:
        """Report one iteration."""
        row = {key: value for key, value in asdict(metrics).items() if value is not None}
        if self._file is not None:
            self._write(row)
        if metrics.iteration % self.config.tensorboard_log_interval == 0:
            for tracker in self._trackers:
                tracker.log(row, metrics.iteration)
        if metrics.iteration % self.config.log_interval == 0:
            logger.info("%s%s", format_log_line(metrics, self.config), self._eta(metrics))

    def validation(self, prefix: str, iteration: int, values: dict[str, float]) -> None:
        """Report an evaluation after `iteration` in Megatron's form, between two dashed lines."""
        text = f" validation loss at {prefix} | "
        for key, value in values.items():
            text += f"{key} value: {value:.6E} | {key} PPL: {math.exp(min(20.0, value)):.6E} | "
        logger.info("%s\n%s\n%s", "-" * len(text), text, "-" * len(text))
        if self._file is not None:
            self._write({"validation": prefix, "validated_at": iteration, **values})

    def close(self) -> None:
        """Flush files and draw the loss curve."""
        for tracker in self._trackers:
            tracker.close()
        if self._file is not None:
            self._file.close()
        if self.save is not None:
            plot_loss(self.save)

    def _write(self, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _eta(self, metrics: IterationMetrics) -> str:
        # Only for a person at a terminal: scripts that read the line from a file see Megatron's fields alone.
        if not sys.stderr.isatty():
            return ""
        done = metrics.iteration - self._first_iteration
        left = (time.monotonic() - self._started) / max(done, 1) * (metrics.train_iters - metrics.iteration)
        return f" ETA {int(left // 3600)}:{int(left // 60) % 60:02d}:{int(left) % 60:02d}"


def read_metrics(save: Path) -> list[dict[str, Any]]:
    """Entries of a run's metrics.jsonl that belong to training iterations."""
    return [row for row in _read_rows(save) if "iteration" in row]


def _read_rows(save: Path) -> list[dict[str, Any]]:
    """All entries but a line that a crash cut short."""
    path = save / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _iteration_of(row: dict[str, Any]) -> int:
    return int(row.get("iteration", row.get("validated_at", 0)))


def plot_loss(save: Path) -> Path | None:
    """Draw loss and learning rate over iterations into loss.png; None when there is nothing to draw."""
    rows = [row for row in read_metrics(save) if row.get("loss") is not None]
    if not rows:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [row["iteration"] for row in rows]
    losses = [row["loss"] for row in rows]
    axes.plot(steps, losses, color="#1f77b4", alpha=0.35, linewidth=1, label="loss")
    axes.plot(steps, _smooth(losses), color="#1f77b4", linewidth=2, label="loss (smoothed)")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [row["learning_rate"] for row in rows], color="#ff7f0e", linewidth=1, label="learning rate")
    rate.set_ylabel("learning rate")
    lines = [*axes.get_lines(), *rate.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper right")
    axes.set_title(f"{len(rows)} iterations, last loss {losses[-1]:.4f}")
    path = save / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    smoothed, mean, norm = [], 0.0, 0.0
    for value in values:
        mean = weight * mean + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smoothed.append(mean / norm)
    return smoothed


class _TensorBoard:
    def __init__(self, directory: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(directory)

    def log(self, row: dict[str, Any], iteration: int) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, iteration)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, project: str, name: str | None, directory: str | None) -> None:
        import wandb

        self.run = wandb.init(project=project, name=name, dir=directory)

    def log(self, row: dict[str, Any], iteration: int) -> None:
        self.run.log(row, step=iteration)

    def close(self) -> None:
        self.run.finish()


class _SwanLab:
    def __init__(self, project: str, name: str | None, directory: str | None) -> None:
        import swanlab

        self.run = swanlab.init(project=project, experiment_name=name, logdir=directory)

    def log(self, row: dict[str, Any], iteration: int) -> None:
        self.run.log(row, step=iteration)

    def close(self) -> None:
        self.run.finish()


def _open_trackers(config: LoggingConfig) -> list[_TensorBoard | _Wandb | _SwanLab]:
    from mindspeed_mm.errors import SetupError

    trackers: list[_TensorBoard | _Wandb | _SwanLab] = []
    try:
        if config.tensorboard_dir:
            trackers.append(_TensorBoard(config.tensorboard_dir))
        if config.wandb_project:
            trackers.append(_Wandb(config.wandb_project, config.wandb_exp_name, config.wandb_save_dir))
        if config.swanlab_project:
            trackers.append(_SwanLab(config.swanlab_project, config.swanlab_exp_name, config.swanlab_save_dir))
    except ImportError as error:
        raise SetupError(
            f"{error.name} is asked for on the command line but not installed.\n"
            "  Install the logging extra (`pip install .[logging]`) or drop the flag."
        ) from error
    return trackers
