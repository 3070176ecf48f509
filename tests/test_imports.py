"""The tree keeps to its own rules: who imports whom, what stays cold, where devices are named, who prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOWER = frozenset({"config", "plan", "ops", "storage", "platform", "data", "models", "peft", "errors"})

MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "config": frozenset({"errors"}),
    "plan": frozenset({"config", "errors"}),
    "ops": frozenset({"errors"}),
    "storage": frozenset({"config", "plan", "errors"}),
    "platform": frozenset({"config", "errors"}),
    "data": frozenset({"config", "ops", "errors"}),
    "models": frozenset({"config", "plan", "ops", "platform", "errors"}),
    "peft": frozenset({"config", "ops", "models", "errors"}),
    "training": LOWER | {"checkpoint"},
    "tasks": LOWER | {"checkpoint", "training"},
    "checkpoint": frozenset({"config", "plan", "storage", "errors"}),
}
"""Rooms of `mindspeed_mm`, and the packages beside it, that each room may import; its own modules are free."""

COLD_ROOMS = ("config", "plan", "ops", "storage", "data", "checkpoint")
NAMES_DEVICES_FOR_THE_COMMAND_LINE = {"mindspeed_mm/config/run.py"}
PRINTS = {"checkpoint/convert_cli.py"}
TOP_LEVEL = ("mindspeed_mm", "checkpoint", "tools", "tests", "examples", "mossvl_finetune")


def sources(*directories: str) -> list[Path]:
    """Every Python file below the given directories."""
    return sorted(path for directory in directories for path in (ROOT / directory).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(module: str) -> str | None:
    """`mindspeed_mm.plan.stage` -> plan, `checkpoint.load` -> checkpoint; None for what is not ours."""
    parts = module.split(".")
    if parts[0] == "mindspeed_mm":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in TOP_LEVEL else None


def imported_modules(path: Path) -> Iterator[str]:
    """Absolute names of everything that a file imports, wherever in the file; `from a import b` gives a and a.b."""
    package = path.relative_to(ROOT).parent.as_posix().split("/")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, node.module or ""]).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_the_rooms_of_its_row(room: str) -> None:
    place = "checkpoint" if room == "checkpoint" else f"mindspeed_mm/{room}"
    files = [ROOT / f"{place}.py"] if room == "errors" else sources(place)
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in files
        for module in imported_modules(path)
        if (target := room_of(module)) is not None and target != room and target not in MAY_IMPORT[room]
    }
    assert not wrong


def test_every_room_has_a_row() -> None:
    rooms = {path.parent.name for path in (ROOT / "mindspeed_mm").glob("*/__init__.py")}
    assert rooms <= set(MAY_IMPORT)


def test_nobody_imports_tools_tests_or_examples() -> None:
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in sources("mindspeed_mm", "checkpoint", "mossvl_finetune")
        for module in imported_modules(path)
        if room_of(module) in ("tools", "tests", "examples")
    }
    assert not wrong


def test_only_megatron_core_is_used() -> None:
    wrong = {
        f"{name_of(path)} imports {module}"
        for path in sources("mindspeed_mm", "checkpoint", "tools", "mossvl_finetune")
        for module in imported_modules(path)
        if module.startswith("megatron.") and not module.startswith("megatron.core")
    }
    assert not wrong


def test_cold_rooms_import_no_megatron() -> None:
    places = ("checkpoint" if room == "checkpoint" else f"mindspeed_mm/{room}" for room in COLD_ROOMS)
    modules = sorted(name_of(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in sources(*places))
    assert modules_loaded_by(modules, "megatron") == []


@pytest.mark.parametrize("module", ["mindspeed_mm.config", "mindspeed_mm.plan", "checkpoint.convert_cli"])
def test_configuration_and_plan_import_no_torch(module: str) -> None:
    assert modules_loaded_by([module], "torch", "transformers", "megatron") == []


def modules_loaded_by(modules: list[str], *heavy: str) -> list[str]:
    """Which of the packages named `heavy` a fresh interpreter has loaded after importing the modules."""
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_devices_are_named_in_the_platform_room_only() -> None:
    wrong = set()
    for path in sources("mindspeed_mm", "checkpoint"):
        if path.is_relative_to(ROOT / "mindspeed_mm/platform") or name_of(path) in NAMES_DEVICES_FOR_THE_COMMAND_LINE:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant | ast.Attribute) and names_a_device(node):
                wrong.add(f"{name_of(path)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong


def names_a_device(node: ast.Constant | ast.Attribute) -> bool:
    """`"cuda"`, `"npu:0"`, `"hccl"`, `torch.cuda`; not a text that only mentions one."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and node.value.split(":")[0] in ("cuda", "npu", "nccl", "hccl")
    return isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("cuda", "npu")


def test_only_command_lines_print() -> None:
    wrong = {
        f"{name_of(path)}:{node.lineno}"
        for path in sources("mindspeed_mm", "checkpoint")
        if name_of(path) not in PRINTS
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    assert not wrong


def test_every_directory_with_python_files_is_a_package() -> None:
    directories = {path.parent for path in sources("mindspeed_mm", "checkpoint", "tools", "tests")}
    assert not {name_of(directory) for directory in directories if not (directory / "__init__.py").exists()}
