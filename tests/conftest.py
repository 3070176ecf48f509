"""Settings of every test: one thread per process (the distributed tests run several at once) and no network."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_device_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device chosen in the developer's shell must not decide what a test shows."""
    monkeypatch.delenv("MM_DEVICE", raising=False)
