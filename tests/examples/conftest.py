"""What the tests of launch scripts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.workplace import Workplace


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """An empty place to start launch scripts in."""
    return Workplace(tmp_path)
