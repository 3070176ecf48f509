"""What the parity tests share: references are solved once per checkpoint, whichever file asks first."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.test_parity import KINDS, SIZE
from tools.make_tiny_checkpoint import make_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small checkpoint of each kind."""
    root = tmp_path_factory.mktemp("parity")
    return {
        kind: make_tiny_checkpoint(root / kind, tied=kind == "tied", seed=3, vocab_size=320, size=SIZE)
        for kind in KINDS
    }
