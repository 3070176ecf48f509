"""Fixtures of the platform tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mindspeed_mm.platform.cpu import CpuPlatform
from mindspeed_mm.platform.select import activate

ROOT = Path(__file__).parents[3]


@pytest.fixture
def active() -> CpuPlatform:
    """The CPU platform with all rows applied; activation is idempotent and stays for the rest of the process."""
    platform = CpuPlatform()
    activate(platform)
    return platform


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Runs a program in a process of its own and returns what it printed; fails with its output if it fails."""

    def run(program: str) -> str:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program], env=environ, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
