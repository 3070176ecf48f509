"""Every example of docs/converter.md runs, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from checkpoint.verify import Subject, verify
from mindspeed_mm.storage.manifest import check_manifest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "converter.md"
_BLOCK = re.compile(r"^```(bash run|yaml file=(\S+))\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_examples_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name, words in (("mm-convert", "-m checkpoint.convert_cli"), ("python", "")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        script.chmod(0o755)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    environ = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    count = 0
    for kind, file, text in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if file:
            (tmp_path / file).write_text(text)
            continue
        done = subprocess.run(
            ["bash", "-euc", text], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{kind}:\n{text}\n{done.stderr}"
        count += text.count("mm-convert ")
    assert count == 11
    ckpt = tmp_path / "ckpt"
    assert verify(Subject(ckpt / "hf"), Subject(ckpt / "back")).is_same
    assert verify(Subject(ckpt / "hf"), Subject(ckpt / "mm_from_file")).is_same
    assert verify(Subject(ckpt / "hf"), Subject(ckpt / "mm_from_environment")).is_same
    assert not verify(Subject(ckpt / "mm_vpp"), Subject(ckpt / "merged")).is_same
    check_manifest(ckpt / "peft_again")
    files = {path.name for path in (ckpt / "peft_again").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "manifest.json"}


def test_every_command_has_an_example() -> None:
    from checkpoint.convert_cli import QWEN2VL

    text = PAGE.read_text(encoding="utf-8")
    for command in QWEN2VL:
        assert command == "_help" or f"mm-convert Qwen2VLConverter {command} " in text, command


def test_every_option_of_the_table_exists() -> None:
    import checkpoint.options as options

    source = Path(options.__file__).read_text()
    for row in re.findall(r"^\| (`--cfg.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"--cfg\.([\w.]+)", row):
            for part in name.strip(".").split("."):
                assert re.search(rf"^    {part}: ", source, re.MULTILINE), name
