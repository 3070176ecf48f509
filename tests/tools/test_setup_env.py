"""The set-up script is idempotent, clear about a wrong Python, and never done after a failure. Its Python is a stub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/setup_env.sh"
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"{log}"
if [[ "$*" == *"pip"* ]]; then exit {pip_status}; fi
"""


def set_up(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MM_")} | variables
    return subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    return tmp_path / "venv"


def write_python(venv: Path, pip_status: int) -> Path:
    log = venv / "calls"
    (venv / "bin" / "python").write_text(PYTHON.format(log=log, pip_status=pip_status))
    (venv / "bin" / "python").chmod(0o755)
    return log


def test_the_second_time_nothing_is_installed(venv: Path) -> None:
    log = write_python(venv, pip_status=0)
    first = set_up(MM_VENV=str(venv))
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{venv}\n", "callers read the directory from standard output"
    installs = [line for line in log.read_text().splitlines() if "pip" in line]
    *pinned, older = installs
    assert len(pinned) == 2
    assert all("--constraint" in line and "constraints/cpu.txt" in line for line in pinned)
    assert "megatron-core==0.12.1" in older
    assert "--index-url" not in log.read_text()
    calls = log.read_text()
    assert set_up(MM_VENV=str(venv)).stdout == f"{venv}\n"
    assert log.read_text() == calls


def test_a_failed_installation_is_tried_again(venv: Path) -> None:
    write_python(venv, pip_status=1)
    assert set_up(MM_VENV=str(venv)).returncode != 0
    log = write_python(venv, pip_status=0)
    before = log.read_text()
    assert set_up(MM_VENV=str(venv)).returncode == 0
    assert log.read_text() != before


def test_a_wrong_python_is_refused_by_name(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text("#!/usr/bin/env bash\nif [[ $1 == --version ]]; then echo Python 3.8.1; else exit 1; fi\n")
    old.chmod(0o755)
    result = set_up(MM_VENV=str(tmp_path / "venv"), MM_PYTHON=str(old))
    assert result.returncode == 11
    assert "is not a Python 3.11 or 3.12 (Python 3.8.1)" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_an_environment_of_a_wrong_python_is_refused(venv: Path) -> None:
    (venv / "bin" / "python").write_text(
        "#!/usr/bin/env bash\nif [[ $1 == --version ]]; then echo Python 3.9.9; fi\nexit 1\n"
    )
    (venv / "bin" / "python").chmod(0o755)
    result = set_up(MM_VENV=str(venv))
    assert result.returncode == 11
    assert "was made with Python 3.9.9; Python 3.11 or 3.12 is needed" in result.stderr


def test_the_active_environment_is_taken_as_it_is() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    assert set_up(MM_VENV="active", PATH=path).stdout == f"{sys.prefix}\n"
