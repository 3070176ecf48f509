"""Small makers of settings and records."""

from __future__ import annotations

from typing import Any

from mindspeed_mm.config.run import TrainingConfig


def training(**changes: Any) -> TrainingConfig:
    values = {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 5, "seq_length": 256, "num_workers": 0}
    return TrainingConfig(**(values | changes))


def record(question: str, answer: str, *images: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)} | columns
