"""A run that is saved, stopped and resumed equals the uninterrupted one bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_mm.storage.shard import read_shard
from tests.dist.harness import run_ranks
from tests.dist.jobs import Workplace, arguments, make_workplace


@dataclass(frozen=True)
class Layout:
    """How a run is spread."""

    name: str
    world_size: int
    flags: tuple[str, ...]
    vision: tuple[Any, ...] = (4,)
    text: tuple[Any, ...] = (4,)
    freezes_vision: bool = False


LAYOUTS = [
    Layout("tp1pp2", 2, ("--pipeline-model-parallel-size", "2"), (3, 1), (0, 4)),
    Layout("tp2pp1", 2, ("--tensor-model-parallel-size", "2")),
    Layout("dp2-distributed", 2, ("--use-distributed-optimizer", "--micro-batch-size", "1")),
    Layout("bf16", 1, ("--bf16",)),
    Layout(
        "frozen-stage",
        2,
        ("--pipeline-model-parallel-size", "2", "--enable-dummy-optimizer", "--use-distributed-optimizer"),
        (3, 1),
        (0, 4),
        freezes_vision=True,
    ),
    Layout(
        "pp2vp2",
        2,
        ("--pipeline-model-parallel-size", "2", "--virtual-pipeline-model-parallel-size", "2"),
        ((2, 2), (0, 0)),
        ((0, 1), (1, 2)),
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_resumed_equals_uninterrupted(layout: Layout, place: Workplace, tmp_path: Path) -> None:
    model = place.model(layout.vision, layout.text, freezes_vision=layout.freezes_vision)
    common = arguments(place, model, *layout.flags, "--train-iters", "20", "--save-interval", "10")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    commands = [
        [*common, "--load", str(place.hf), "--save", str(whole)],
        [*common, "--load", str(place.hf), "--save", str(parts), "--exit-interval", "10"],
        [*common, "--load", str(parts), "--save", str(parts)],
    ]
    codes = run_ranks(layout.world_size, "tests.dist.jobs:train", commands)
    assert codes == [[0, 0, 0]] * layout.world_size
    assert not unequal_shards(whole, parts, iteration=20)
    assert losses(whole) == losses(parts)
    assert (whole / "latest_checkpointed_iteration.txt").read_bytes() == b"20"


def losses(save: Path) -> list[tuple[int, float, float]]:
    rows = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["loss"], row["grad_norm"]) for row in rows]


def unequal_shards(one: Path, other: Path, *, iteration: int) -> list[str]:
    """Places where two saves of an iteration differ."""
    shards = sorted(path.relative_to(one) for path in one.glob(f"iter_{iteration:07d}/*/*.pt"))
    assert shards
    return [where for name in shards for where in unequal(read_shard(one / name), read_shard(other / name), str(name))]


def unequal(a: Any, b: Any, where: str) -> Any:
    """Places where two trees differ."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            yield f"{where}: {a.keys() ^ b.keys()}"
            return
        for key in a:
            yield from unequal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{where}: length"
            return
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from unequal(x, y, f"{where}/{number}")
    elif isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield where
    elif isinstance(a, np.ndarray):
        if not np.array_equal(a, b):
            yield where
    elif a != b:
        yield f"{where}: {a} and {b}"
