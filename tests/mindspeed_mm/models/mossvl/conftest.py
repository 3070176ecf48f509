"""A tiny checkpoint and its processor for the tests of MOSS-VL."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_mm.models.mossvl.hf import MossVLProcessor
from mindspeed_mm.models.mossvl.hf.checkpoint import load_processor
from tools.make_tiny_mossvl import make_tiny_mossvl


@pytest.fixture(scope="session")
def nano_moss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nano checkpoint directory; do not write to it."""
    return make_tiny_mossvl(tmp_path_factory.mktemp("mossvl") / "nano", size="nano")


@pytest.fixture
def processor(nano_moss: Path) -> MossVLProcessor:
    """A fresh processor of the nano checkpoint."""
    return load_processor(str(nano_moss))
