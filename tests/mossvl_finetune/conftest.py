"""The tiny checkpoint of the model's tests, and a way to run the training command in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mossvl_finetune.train import train
from tests.mindspeed_mm.models.mossvl.conftest import nano_moss

__all__ = ["nano_moss", "run_training"]

DEMO = Path(__file__).resolve().parents[2] / "mossvl_finetune" / "demo" / "sft_data.json"


@pytest.fixture
def run_training(nano_moss: Path) -> Callable[..., Any]:
    """`run_training(output_dir, flag=value, ...)` trains the nano checkpoint on the demo data and gives the Trainer."""

    def run(output_dir: Path, **flags: Any) -> Any:
        options = {
            "model_name_or_path": nano_moss,
            "data_path": DEMO,
            "output_dir": output_dir,
            "use_cpu": True,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **flags,
        }
        return train([part for name, value in options.items() for part in (f"--{name}", str(value))])

    return run


def losses(trainer: Any) -> list[float]:
    """Loss of every logged step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
