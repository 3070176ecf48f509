"""A place to start launch scripts in: `torchrun`, `hostname` and `getent` are stand-ins on PATH."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPES = {size: ROOT / f"examples/qwen2vl/finetune_qwen2vl_{size}.sh" for size in ("2b", "7b", "72b")}

TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$STUB_DIR/arguments"
env >"$STUB_DIR/environment"
if [[ -f "$STUB_DIR/output" ]]; then cat "$STUB_DIR/output"; fi
exit "${STUB_STATUS:-0}"
"""
HOSTNAME = """#!/usr/bin/env bash
case "${1:-}" in
    -I) echo "192.168.7.12 10.0.0.2 " ;;
    -f) echo "node12.cluster.local" ;;
    *) echo "node12" ;;
esac
"""
GETENT = """#!/usr/bin/env bash
case "$2" in
    trainer-b) echo "10.0.0.2 STREAM trainer-b" ;;
    trainer-a) echo "10.0.0.1 STREAM trainer-a" ;;
    *) exit 2 ;;
esac
"""


class Workplace:
    """A directory with the stand-ins, where the scripts log and save."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stub("torchrun", TORCHRUN)
        self.stub("hostname", HOSTNAME)
        self.stub("getent", GETENT)

    def stub(self, name: str, text: str) -> None:
        path = self.directory / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, size: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.start(["bash", str(RECIPES[size]), *arguments], **variables)

    def start(self, command: list[str], *, cwd: str | Path = "/", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, env=self.environ(**variables), cwd=cwd, capture_output=True, text=True, timeout=60
        )

    def environ(self, **variables: str) -> dict[str, str]:
        own = {
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
            "STUB_DIR": str(self.directory),
            "LOG_DIR": str(self.directory / "logs"),
            "SAVE_PATH": str(self.directory / "save"),
            "MM_DEVICE": "cpu",
        }
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "TMPDIR")}
        return kept | own | variables

    def arguments(self) -> list[str]:
        return (self.directory / "arguments").read_text().splitlines()

    def hostfile(self, text: str) -> str:
        path = self.directory / "hosts.txt"
        path.write_text(text)
        return str(path)
