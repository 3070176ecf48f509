"""Nothing outside the platform room names a device."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mindspeed_mm.platform.conftest import ROOT

DEVICE_WORDS = {"cuda", "npu", "nccl", "hccl"}
ALLOWED_WORDS = {
    "mindspeed_mm/config/run.py": {"cuda", "npu", "nccl"},
    "mindspeed_mm/config/arguments.py": {"cuda", "npu", "nccl", "hccl"},
}
"""Where the words are what users type for --device and --distributed-backend."""


def _sources() -> list[Path]:
    folders = ("mindspeed_mm", "checkpoint", "tools")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if "platform" not in path.relative_to(ROOT).parts]


def device_names(source: str, allowed: set[str]) -> list[str]:
    """Every name or word of a device in a source text, with its line."""
    found = []
    docstrings = _docstring_lines(source)
    for node in ast.walk(ast.parse(source)):
        text = None
        match node:
            case ast.Attribute(attr="cuda" | "npu" | "is_cuda" | "is_npu") | ast.Name(id="torch_npu"):
                text = ast.unparse(node)
            case ast.Import(names=names):
                text = next((n.name for n in names if re.match(r"torch_npu|torch\.cuda|mindspeed(\.|$)", n.name)), None)
            case ast.ImportFrom(module=str(module)):
                text = module if re.match(r"torch_npu|torch\.cuda|mindspeed(\.|$)", module) else None
            case ast.Constant(value=str(word)) if node.lineno not in docstrings:
                name = word.partition(":")[0]
                text = repr(word) if name in DEVICE_WORDS - allowed else None
        if text is not None:
            found.append(f"line {node.lineno}: {text}")  # type: ignore[attr-defined]
    return found


def _docstring_lines(source: str) -> set[int]:
    return {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_device_is_named_outside_the_platform(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    assert device_names(path.read_text(), ALLOWED_WORDS.get(name, set())) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.synchronize()",
        "x = t.cuda()",
        'x = t.to("cuda")',
        'torch.zeros(1, device="npu:0")',
        "import torch_npu",
        "from torch.cuda import Stream",
        "import mindspeed.ops",
        'backend = "nccl"',
        "t.is_cuda",
    ],
)
def test_the_search_finds(line: str) -> None:
    assert device_names(line, set())


def test_the_search_leaves_prose_alone() -> None:
    assert device_names('"""cuda"""\nx = "runs on cuda and npu"\nimport mindspeed_mm', set()) == []
